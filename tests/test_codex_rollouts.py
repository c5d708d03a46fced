"""Rollouts of Codex: each request counts once in whatever shape its copies stand, in any order, whichever are gone."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import product
from pathlib import Path
from random import Random

import pytest

from bridge.jsonl import Lines
from bridge.model import Usage
from bridge.pricing import normalise_model
from bridge.store import Store
from bridge.tools.codex_lines import TRANSCRIPTS
from bridge.usage import UsageBooks
from tests.codex_tree import (
    SHAPES,
    Style,
    Thread,
    World,
    by_reference,
    restamped,
    resumed_elsewhere,
    truth,
    without_turns,
)

STYLES = [Style(tells=tells) for tells in ("counts", "totals", "records")]
TIMELESS = Style(is_timed=False)
"""Turns have ids that do not tell when they were made."""
OLDEST = Style(has_turns=False, is_timed=False)
ORDERS = 3


class Books:
    """The books of one bridge, for many stores one after another."""

    def __init__(self, directory: Path, *, is_history: bool) -> None:
        directory.mkdir()
        self.store = Store(directory)
        self.store.open(0)
        self.books = UsageBooks(self.store, lambda _: 0, normalise_model, frozenset())
        self.books.load()
        self.is_history = is_history
        self.seen = self._sums()

    def read(self, threads: list[Thread]) -> dict[str, Counter[str]]:
        """What these rollouts add, read in this order."""
        with self.store.transaction():
            for thread in threads:
                usages = read(thread)
                if self.is_history:
                    self.books.load_history(usages, 0)
                else:
                    for usage in usages:
                        self.books.add(usage)
            self.books.flush(0, 0)
        before, self.seen = self.seen, self._sums()
        return {model: grown for model, sums in self.seen.items() if (grown := sums - before.get(model, Counter()))}

    def _sums(self) -> dict[str, Counter[str]]:
        sql = (
            "select m.name, sum(input), sum(shown_output), sum(cache_read), sum(cache_write_5m), count(*) from usage"
            " join model m on m.id = model where is_counted group by 1"
        )
        names = ("input", "output", "read", "written", "requests")
        return {row[0]: Counter(dict(zip(names, row[1:], strict=True))) for row in self.store.execute(sql)}


def read(thread: Thread, size: int = 700) -> list[Usage]:
    """What a rollout says, a restart after each block."""
    usages: list[Usage] = []
    content, state = thread.content, b""
    lines = Lines(TRANSCRIPTS.keys, TRANSCRIPTS.types)
    for start in range(0, len(content), size):
        reader = TRANSCRIPTS.reader(thread.file, thread.lines[0].time_ms, state)
        for line in lines.feed(content[start : start + size]):
            said = reader.read(line)
            assert isinstance(said, tuple)
            usages += (one for one in said if isinstance(one, Usage))
        state = reader.state
    return usages


@pytest.fixture(scope="module", params=[False, True], ids=["live", "history"])
def books(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Books]:
    made = Books(tmp_path_factory.mktemp("books") / "b", is_history=request.param)
    with closing(made.store):
        yield made


def worked(world: World, turns: int = 3) -> Thread:
    thread = Thread(world)
    for _ in range(turns):
        thread.work([world.decide() for _ in range(world.chance.randint(1, 3))], repeats=1)
    return thread


def family(world: World, shape: Callable[[Thread], Thread]) -> list[Thread]:
    """A thread, two children that do equal work, and what the thread did after it was copied."""
    parent = worked(world)
    children = [shape(parent), shape(parent)]
    work = [world.decide() for _ in range(2)]
    for child in children:
        child.work([world.decide(request) for request in work])
    parent.work([world.decide()])
    return [parent, *children]


def assert_true_in_any_order(books: Books, make: Callable[[int], list[Thread]], seed: int) -> None:
    """With all files, and with some of them; each time of a store with names of its own."""
    for number in range(ORDERS):
        threads = make(seed * ORDERS + number)
        chance = Random(number)
        kept = chance.sample(threads, len(threads) if number % 2 else chance.randint(1, len(threads)))
        files = [one.name for one in kept]
        assert books.read(kept) == truth(kept), files
        assert not books.read(chance.sample(kept, len(kept))), "read again"


SHAPED = [
    pytest.param(shape, style, id=f"{shape.__name__}-{style.tells}")
    for shape, style in product(SHAPES, STYLES)
    if (shape, style.tells) != (by_reference, "totals")  # its first total is not its own, and nothing says so
]


@pytest.mark.parametrize(("shape", "style"), SHAPED)
def test_copies(books: Books, shape: Callable[[Thread], Thread], style: Style) -> None:
    seed = SHAPES.index(shape) * 10 + STYLES.index(style)
    assert_true_in_any_order(books, lambda number: family(World(number, style), shape), seed)


@pytest.mark.parametrize(
    "shape", [shape for shape in SHAPES if shape is not resumed_elsewhere], ids=lambda s: s.__name__
)
def test_copies_under_ids_that_tell_no_time(books: Books, shape: Callable[[Thread], Thread]) -> None:
    seed = 100 + SHAPES.index(shape)
    assert_true_in_any_order(books, lambda number: family(World(number, TIMELESS), shape), seed)


@pytest.mark.parametrize("shape", [restamped, resumed_elsewhere], ids=lambda shape: shape.__name__)
@pytest.mark.parametrize("tells", ["counts", "totals"])
def test_copies_of_the_oldest(books: Books, shape: Callable[[Thread], Thread], tells: str) -> None:
    """Their turns have no ids: only the thread that a further `session_meta` names tells copies."""

    def make(number: int) -> list[Thread]:
        world = World(number, OLDEST._replace(tells=tells))
        parent = worked(world)
        child = shape(parent).work([world.decide()])
        return [parent.work([world.decide()]), child, shape(child).work([world.decide()])]

    assert_true_in_any_order(books, make, 110 + len(shape.__name__) + 100 * (tells == "totals"))


CHAINS = [
    pytest.param(first, second, id=f"{first.__name__}-{second.__name__}") for first, second in product(SHAPES, SHAPES)
]


@pytest.mark.parametrize(("first", "second"), CHAINS)
def test_copies_of_copies(books: Books, first: Callable[[Thread], Thread], second: Callable[[Thread], Thread]) -> None:
    """Of a history without turns nobody knows which part was copied before: there the older file has to come first."""

    def make(number: int) -> list[Thread]:
        world = World(number)
        parent = worked(world)
        world.style = Style(tells=world.chance.choice(["counts", "records"]))  # the client was upgraded, or not
        child = first(parent.work([world.decide()])).work([world.decide()])
        return [parent.work([world.decide()]), child, second(child).work([world.decide()])]

    seed = 300 + SHAPES.index(first) * 10 + SHAPES.index(second)
    if without_turns not in (first, second):
        assert_true_in_any_order(books, make, seed)
    threads = make(ORDERS * (seed + 100))
    assert books.read(threads) == truth(threads)
