"""The join: what it adds up to does not depend on the order in which sources tell, and is never less than one of them.

The stories are of plain requests; each source's view of them is made here, and so is what they must add up to.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import reduce
from itertools import combinations, permutations
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from bridge.join import (
    KINDS,
    Cell,
    Matching,
    Observed,
    Tokens,
    Verdict,
    Worth,
    add_cells,
    add_worth,
    request_cell,
    settle,
    worth,
)
from bridge.model import Source, Usage, UsageCell
from bridge.pricing import normalise_model
from bridge.store import Store
from bridge.usage import MANY_ALIKE, UsageBooks
from bridge.usage_store import UsageRow, UsageStore
from tests.test_cases import unsynced

TOOL = "claude_code"
HOUR = 3_600_000
SEEDS = (*range(21), 56, 58, 81, 98)
"""The last are of requests alike that sources know by different ids, or by none."""
SOURCES = ("metrics", "events", "transcripts")
SUBSETS = [subset for size in (1, 2, 3) for subset in combinations(SOURCES, size)]

# --- matching --------------------------------------------------------------------------------------------------

OBSERVED = st.builds(
    Observed,
    id=st.just(0),
    key=st.just(b""),
    source=st.sampled_from(Source),
    output=st.integers(0, 4),
    has_id=st.booleans(),
    is_united=st.just(False),
    is_copy=st.just(False),
)
GROUPS = st.lists(OBSERVED, max_size=8).map(
    lambda rows: [row._replace(id=at, key=bytes([at])) for at, row in enumerate(rows, 1)]
)


@given(GROUPS, st.randoms(use_true_random=False))
def test_uniting_does_not_depend_on_order(rows: list[Observed], choose: random.Random) -> None:
    shuffled = choose.sample(rows, len(rows))
    renumbered = [row._replace(id=at) for at, row in enumerate(shuffled, 100)]
    by_key = {row.key: row.id for row in renumbered}
    first, second = Matching(rows).news(), Matching(renumbered).news()
    assert {row.key: first[row.id] for row in rows} == {row.key: second[by_key[row.key]] for row in rows}


def most_pairs(rows: list[Observed]) -> int:
    """The most pairs of an event and a line of which at most one has an id, found by trying."""
    events = [row.has_id for row in rows if row.source is Source.EVENT]
    lines = [row.has_id for row in rows if row.source is Source.TRANSCRIPT]
    counts = Counter((left, True) for left in events) + Counter((right, False) for right in lines)
    e_with, e_without = counts[True, True], counts[False, True]
    l_with, l_without = counts[True, False], counts[False, False]
    return max(
        first + second + min(e_without - second, l_without - first)
        for first in range(min(e_with, l_without) + 1)
        for second in range(min(e_without, l_with) + 1)
    )


@given(GROUPS)
def test_as_many_are_paired_as_can_be_and_none_is_lost(rows: list[Observed]) -> None:
    """As many as can be of equal output at least, and of all where no outputs are equal."""
    counted = [verdict for verdict in Matching(rows).news().values() if verdict.is_counted]
    equal = sum(most_pairs([row for row in rows if row.output == output]) for output in {row.output for row in rows})
    assert equal <= len(rows) - len(counted) <= most_pairs(rows)
    for source in Source:
        assert sum(row.output for row in rows if row.source is source) <= sum(verdict.output for verdict in counted)
    unequal = [row._replace(output=2 * row.output + (row.source is Source.EVENT)) for row in rows]
    assert sum(verdict.is_counted for verdict in Matching(unequal).news().values()) == len(rows) - most_pairs(rows)


class Alike(NamedTuple):
    """A request among others alike: its output, whether sources give its id, and whether they tell of it."""

    output: int
    has_event_id: bool
    has_line_id: bool
    has_event: bool
    has_line: bool


@given(st.lists(st.builds(Alike, st.integers(1, 9)), max_size=10), st.booleans())
def test_sources_that_tell_right_outputs_add_up_to_what_happened(requests: list[Alike], tells_all: bool) -> None:
    """Whichever of them know ids; while some have yet to tell, to no more than what was told of."""
    rows: list[Observed] = []
    happened = []
    for request in requests:
        has_event, has_line = (tells_all or told for told in request[3:])
        is_united = has_event and has_line and request.has_event_id and request.has_line_id
        for source, has_id in zip(Source, request[1:3], strict=True):
            if has_event if source is Source.EVENT else has_line:
                at = len(rows) + 1
                rows.append(Observed(at, bytes([at]), source, request.output, has_id, is_united, is_copy=False))
        if has_event or has_line:
            happened.append(request.output)
    counted = [verdict.output for verdict in Matching(rows).news().values() if verdict.is_counted]
    if tells_all:
        assert (len(counted), sum(counted)) == (len(happened), sum(happened))
    assert len(counted) <= len(happened)
    assert sum(counted) <= sum(happened)


@given(st.lists(st.tuples(st.integers(1, 8), st.none() | OBSERVED, st.booleans()), max_size=30))
def test_a_group_that_is_kept_says_what_one_made_anew_says(
    steps: list[tuple[int, Observed | None, bool]],
) -> None:
    """Rows come, change and go; some are copies or told of by an id."""
    kept, rows, verdicts = Matching(), dict[int, Observed](), dict[int, Verdict]()
    for row_id, row, is_decided in steps:
        if row is None:
            kept.remove(row_id)
            rows.pop(row_id, None)
            verdicts.pop(row_id, None)
        else:
            is_copy = is_decided and row.has_id
            rows[row_id] = row._replace(
                id=row_id, key=bytes([row_id]), is_copy=is_copy, is_united=is_decided and not is_copy
            )
            kept.put(rows[row_id])
        verdicts |= kept.news()
        assert verdicts == Matching(rows.values()).news()
        assert kept.news() == {}


def rows_looked_at(
    directory: Path, monkeypatch: pytest.MonkeyPatch, with_ids: tuple[Source, ...], reads: tuple[str, ...]
) -> int:
    """How many rows are read to unite 400 requests alike, each told by both sources, of which some give ids."""
    looked_at = 0

    def counting(read: Callable[[UsageStore, Any], list[UsageRow]]) -> Callable[[UsageStore, Any], list[UsageRow]]:
        def reading(store: UsageStore, wanted: Any) -> list[UsageRow]:
            nonlocal looked_at
            found = read(store, wanted)
            looked_at += len(found)
            return found

        return reading

    for name in reads:
        monkeypatch.setattr(UsageStore, name, counting(getattr(UsageStore, name)))
    store = Store(directory, connect=unsynced)
    store.open(0)
    with closing(store):
        books = UsageBooks(store, lambda _: 1, normalise_model, frozenset())
        books.load()
        with store.transaction():
            for at in range(400):
                for source in Source:
                    key, name = bytes([source, *at.to_bytes(15, "big")]), f"r{at}" if source in with_ids else ""
                    books.add(Usage(TOOL, source, key, "s", "claude-x", HOUR, 1, 2, 3, 0, 0, request_id=name))
            books.flush(1, HOUR)
        ((requests, outputs),) = store.execute("select sum(requests), sum(output) from rollup").fetchall()
        counted = store.execute("select sum(is_counted) from usage").fetchall()
    assert (requests, outputs, counted) == (400, 800, [(400,)])
    return looked_at


@pytest.mark.parametrize("with_ids", [(), (Source.TRANSCRIPT,), (Source.EVENT,)])
def test_of_many_rows_alike_few_are_looked_at_for_one_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_ids: tuple[Source, ...]
) -> None:
    """The same numbers in hundreds of requests, of which one side or none has ids."""
    assert rows_looked_at(tmp_path, monkeypatch, with_ids, ("group", "by_ids")) < MANY_ALIKE**2 + 4 * 400


def test_many_rows_alike_are_judged_alone_where_none_of_them_can_be_the_same_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with an id of the API, told by both sources: the same few numbers in hundreds of requests."""
    assert rows_looked_at(tmp_path, monkeypatch, tuple(Source), ("group",)) < 4 * 400


# --- worth -----------------------------------------------------------------------------------------------------

COUNT = st.integers(0, 10**6)
TOKENS: st.SearchStrategy[Tokens] = st.tuples(COUNT, COUNT, COUNT, COUNT)
CELLS = st.builds(Cell, TOKENS, COUNT, st.just(0), TOKENS, COUNT, st.just(0), st.just(0))
PROMPTS = st.builds(Cell, TOKENS, COUNT, COUNT, TOKENS, COUNT, COUNT, COUNT)
"""As tools tell that report no cost: prompts as a whole, and estimates."""


@given(CELLS, CELLS, st.booleans())
def test_worth_is_monotone_in_tokens(cell: Cell, more: Cell, reports_cost: bool) -> None:
    before, after = (worth(one, reports_cost=reports_cost).tokens for one in (cell, add_cells(cell, more)))
    assert all(x <= y for x, y in zip(before, after, strict=True))


@given(CELLS | PROMPTS, st.booleans())
def test_worth_is_never_below_a_source(cell: Cell, reports_cost: bool) -> None:
    tokens, cost, _ = worth(cell, reports_cost=reports_cost)
    assert all(x >= y for x, y in zip(tokens, cell.requests, strict=True))
    assert all(x >= y for x, y in zip(tokens, cell.metrics, strict=True))
    assert tokens[0] + tokens[2] + tokens[3] >= cell.prompt
    assert cost >= (cell.metrics_cost if reports_cost else cell.requests_cost)


@given(CELLS | PROMPTS, COUNT, COUNT, st.booleans())
def test_worth_is_monotone_in_cost(cell: Cell, requests: int, metrics: int, reports_cost: bool) -> None:
    cost = worth(cell, reports_cost=reports_cost).cost
    more = [cell._replace(requests_cost=cell.requests_cost + requests)]
    if cell.metrics_cost or not reports_cost:  # once told, the tool's own stands for what the requests said until then
        more.append(cell._replace(metrics_cost=cell.metrics_cost + metrics))
    assert all(worth(one, reports_cost=reports_cost).cost >= cost for one in more)


@given(CELLS, st.booleans())
def test_a_source_alone_is_worth_what_it_says(cell: Cell, reports_cost: bool) -> None:
    requests = Cell(cell.requests, cell.requests_cost if any(cell.requests) else 0)
    assert worth(requests, reports_cost=reports_cost)[:2] == requests[:2]
    metrics = Cell(metrics=cell.metrics, metrics_cost=cell.metrics_cost if any(cell.metrics) else 0)
    assert worth(metrics, reports_cost=reports_cost)[:2] == metrics[3:5]


def test_tokens_whose_cost_the_tool_never_told_are_visible() -> None:
    assert worth(Cell(metrics=(1, 2, 3, 4))) == Worth((1, 2, 3, 4), 0, 10)
    assert worth(Cell(metrics=(1, 2, 3, 4), metrics_cost=5)) == Worth((1, 2, 3, 4), 5, 0)


def test_where_metrics_tell_no_cost_the_requests_do() -> None:
    """As of a client whose cost metric is switched off, or of a model that has a price in the bridge alone."""
    tokens = (10, 200, 3000, 400)
    metrics, priced = Cell(metrics=tokens), request_cell(tokens, 700, is_estimated=True)
    assert worth(add_cells(metrics, priced)) == Worth(tokens, 700, 0)
    twice = add_cells(metrics, metrics)
    assert worth(add_cells(twice, priced)) == Worth((20, 400, 6000, 800), 700, sum(tokens))
    assert worth(add_cells(metrics, request_cell(tokens, None, is_estimated=False))) == Worth(tokens, 0, sum(tokens))
    assert worth(add_cells(priced, add_cells(metrics, priced))) == Worth((20, 400, 6000, 800), 1400, 0)


def test_prompts_are_divided_by_what_is_known_of_them() -> None:
    told = Cell(metrics=(0, 7, 30, 0), metrics_cost=500, prompt=100)
    assert worth(told, reports_cost=False) == Worth((70, 7, 30, 0), 500)
    complete = told._replace(requests=(60, 7, 30, 10), requests_cost=480)
    assert worth(complete, reports_cost=False) == Worth((60, 7, 30, 10), 480)
    a_request_lost = told._replace(requests=(20, 7, 10, 10), requests_cost=200)
    assert worth(a_request_lost, reports_cost=False).tokens == (60, 7, 30, 10)
    a_metric_lost = complete._replace(prompt=50, metrics=(0, 3, 20, 0))
    assert worth(a_metric_lost, reports_cost=False) == Worth((60, 7, 30, 10), 480)


def test_where_the_table_says_more_than_the_tool_only_untold_requests_are_estimated() -> None:
    a_request = (10, 200, 3000, 400)
    line, event = (request_cell(a_request, cost, is_estimated=cost > 700) for cost in (1000, 700))
    metric = Cell(metrics=a_request, metrics_cost=700)
    told = add_cells(line, metric)
    for _ in range(3):
        told = add_cells(told, add_cells(line, metric))
    assert worth(told).cost == 4 * 700
    assert worth(add_cells(told, line)).cost == 4 * 700 + 1000
    assert worth(add_cells(told, event)).cost == 4 * 700 + 1000  # nobody knows which of them metrics have told of
    all_events = reduce(add_cells, [event] * 5, Cell(metrics=told.metrics, metrics_cost=told.metrics_cost))
    assert worth(all_events).cost == 5 * 700
    assert worth(add_cells(all_events, line)).cost == 5 * 700 + 1000
    assert worth(add_cells(reduce(add_cells, [event] * 4, metric), line)).cost == 4 * 700 + 1000


# --- settle ----------------------------------------------------------------------------------------------------

AMOUNTS = st.builds(Worth, TOKENS, st.integers(-100, 10**6), COUNT)


@given(st.dictionaries(st.integers(0, 20), AMOUNTS, max_size=6), st.data())
def test_what_is_settled_adds_up_and_leaves_no_negative_tokens(entries: dict[int, Worth], data: st.DataObject) -> None:
    whole = total(entries.values())
    told = total(data.draw(st.lists(AMOUNTS, max_size=2)))
    # The requests that now tell of it can have no more tokens than there were and are.
    explained = Worth(
        tuple(data.draw(st.integers(0, most)) for most in add_worth(whole, told).tokens),  # type: ignore[arg-type]  # four
        data.draw(st.integers(-50, 10**6)),
    )
    changes = {data.draw(st.integers(0, 20)): told}
    at = data.draw(st.integers(0, 20))
    changes[at] = add_worth(changes.get(at, Worth()), explained, -1)
    booked = settle(sorted(entries.items(), reverse=True), changes)
    assert total(booked.values()) == total(changes.values())
    for time, change in booked.items():
        assert min(add_worth(entries.get(time, Worth()), change).tokens) >= 0


def total(amounts: Iterable[Worth]) -> Worth:
    return reduce(add_worth, amounts, Worth())


def test_what_a_request_explains_is_taken_from_the_latest_time_that_has_it() -> None:
    entries = [(9, Worth((0, 5, 0, 0), 50)), (8, Worth((7, 0, 0, 0), 70)), (3, Worth((9, 0, 0, 0), 90))]
    assert settle(entries, {9: Worth((-10, 0, 0, 0), -230)}) == {
        9: Worth((0, 0, 0, 0), -70), 8: Worth((-7, 0, 0, 0), -70), 3: Worth((-3, 0, 0, 0), -90),
    }  # fmt: skip


# --- stories ---------------------------------------------------------------------------------------------------


class Request(NamedTuple):
    """What really happened. Ids as the API gives them, or as seen without; `cost` as the tool knows it."""

    number: int
    session: str
    model: str
    tokens: Tokens
    time_ms: int
    has_event_id: bool
    has_line_id: bool

    @property
    def cost(self) -> int:
        return sum(weight * count for weight, count in zip((3, 15, 1, 4), self.tokens, strict=True))


class Metric(NamedTuple):
    session: str
    model: str
    kind: str
    amount: int
    time_ms: int
    since_ms: int


Told = Usage | Metric


def price(usage: Usage) -> int:
    counts = (usage.input, usage.output, usage.cache_read, usage.cache_write)
    return sum(weight * count for weight, count in zip((3, 15, 1, 4), counts, strict=True))


def story(seed: int) -> list[Request]:
    choose = random.Random(seed)
    return [
        Request(
            number,
            f"s{choose.randrange(3)}",
            choose.choice(("claude-opus-4-6", "claude-haiku-4-5")),
            # Few values, so that different requests look alike.
            (choose.randrange(1, 4), choose.randrange(1, 50), choose.choice((0, 100)), choose.choice((0, 7))),
            HOUR * choose.randrange(1, 4) + number,
            choose.random() < 0.7,
            choose.random() < 0.7,
        )
        for number in range(choose.randrange(1, 25))
    ]


def usage(request: Request, source: Source, **changes: Any) -> Usage:
    has_id = request.has_event_id if source is Source.EVENT else request.has_line_id
    new, output, read, written = request.tokens
    members: dict[str, Any] = {
        "key": bytes([source]) + request.number.to_bytes(15, "big"),
        "request_id": f"req_{request.number}" if has_id else "",
        "message": b"" if source is Source.EVENT else request.number.to_bytes(8, "big"),
        "order": 1000,
        **changes,
    }
    return Usage(
        TOOL, source, members.pop("key"), members.pop("session", request.session), request.model, request.time_ms,
        new, members.pop("output", output), read, written, 0, cost=request.cost if source is Source.EVENT else None,
        **members,
    )  # fmt: skip


def told(requests: Iterable[Request], sources: tuple[str, ...], seed: int) -> Iterator[Told]:
    """What sources tell of requests: also repeats, snapshots, copies in forks and side questions."""
    choose = random.Random(seed)
    for request in requests:
        if "metrics" in sources:
            for kind, amount in (*zip(KINDS, request.tokens, strict=True), ("usd", request.cost)):
                if amount:
                    end = request.time_ms + 30_000
                    yield Metric(request.session, request.model, kind, amount, end, end - 60_000)
        if "events" in sources:
            yield usage(request, Source.EVENT)
        if "transcripts" in sources:
            lines = [usage(request, Source.TRANSCRIPT)]
            if choose.random() < 0.4:
                lines.insert(0, usage(request, Source.TRANSCRIPT, output=min(1, request.tokens[1])))
            if choose.random() < 0.3:
                lines.append(usage(request, Source.TRANSCRIPT, session="fork", order=2000))
            if request.has_line_id and choose.random() < 0.3:
                aside = b"copy" + request.number.to_bytes(12, "big")
                name = f"req_aside_{request.number}"
                lines.append(usage(request, Source.TRANSCRIPT, key=aside, request_id=name, is_sidechain=True))
            yield from lines


class Books:
    """UsageBooks on a real database, with what was served at each step."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.store = Store(directory, connect=unsynced)
        self.store.open(0)
        self.books = UsageBooks(self.store, price, normalise_model, {TOOL})
        self.books.load()
        self.served: dict[tuple[int, str], int] = {}

    def tell(self, group: Iterable[Told]) -> None:
        with self.store.transaction():
            for one in group:
                if isinstance(one, Usage):
                    self.books.add(one)
                else:
                    self.books.add_metric(UsageCell(TOOL, *one[:3]), *one[3:])
            change = self.books.flush(1, 1)
        for row in change.served:
            assert row.value >= self.served.get((row.model, row.kind), 0)
            self.served[row.model, row.kind] = row.value

    def restart(self) -> None:
        self.books = UsageBooks(self.store, price, normalise_model, {TOOL})
        assert {(row.model, row.kind): row.value for row in self.books.load().served} == self.served

    def select(self, sql: str) -> list[tuple[Any, ...]]:
        return self.store.execute(sql).fetchall()

    @property
    def truth(self) -> dict[str, tuple[int, ...]]:
        """By model: tokens, cost, requests."""
        names = dict(self.select("select id, name from model"))
        found = self.books._store.truths()
        totals = {}
        for model, row in found.items():
            pool = worth(row.pool)
            tokens = (x + y for x, y in zip(row.own.tokens, pool.tokens, strict=True))
            totals[names[model]] = (*tokens, row.own.cost + pool.cost, row.requests)
        return totals

    @property
    def state(self) -> list[Any]:
        """All that must not depend on order, by names; what says nothing is left out."""
        cell = ", ".join(f"c.{name}, c.metric_{name}" for name in (*KINDS, "cost"))
        zero = " or ".join(f"c.{name} or c.metric_{name}" for name in KINDS)
        join = "join session s on s.id = session join model m on m.id = model"
        return [
            self.truth,
            self.select(f"select s.name, m.name, {cell} from cell c {join} where {zero} order by 1, 2"),
            self.select(
                "select quarter, m.name, s.name, requests, input, output, cache_read, cache_write_5m, cost"
                f" from rollup {join} where requests order by 1, 2, 3"
            ),
        ]

    @property
    def rollups(self) -> dict[str, tuple[int, ...]]:
        """The rollups by model, as in `truth`."""
        rows = self.select(
            "select m.name, sum(input), sum(output), sum(cache_read), sum(cache_write_5m), sum(cost), sum(requests)"
            " from rollup join model m on m.id = model group by 1"
        )
        return {row[0]: row[1:] for row in rows}


def groups(what: list[Told], choose: random.Random) -> Iterator[list[Told]]:
    while what:
        size = choose.randint(1, 6)
        yield what[:size]
        what = what[size:]


def expected(requests: list[Request]) -> dict[str, tuple[int, ...]]:
    totals: dict[str, tuple[int, ...]] = {}
    for request in requests:
        old = totals.get(request.model, (0,) * 5)
        totals[request.model] = tuple(x + y for x, y in zip(old, (*request.tokens, request.cost), strict=True))
    return totals


@pytest.mark.parametrize("sources", SUBSETS, ids="+".join)
def test_any_subset_of_sources_in_any_order_adds_up_to_the_same(
    tmp_path: Path, sources: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each source alone and all together tell of every request, so all of them add up to what happened; also where
    groups are kept."""
    for seed in SEEDS:
        requests = story(seed)
        views = list(told(requests, sources, seed))
        states = []
        for order in range(3):
            monkeypatch.setattr("bridge.usage.MANY_ALIKE", 2 if order else MANY_ALIKE)
            choose = random.Random(order)
            usages = [one for one in views if isinstance(one, Usage)]
            repeats = choose.sample(usages, len(usages) // 3)
            mixed = choose.sample([*views, *repeats], len(views) + len(repeats)) if order else views
            books = Books(tmp_path / f"{seed}-{order}")
            with closing(books.store):
                for group in groups(mixed, choose):
                    books.tell(group)
                    if choose.random() < 0.2:
                        books.restart()
                states.append(books.state)
                assert {model: total[:5] for model, total in books.truth.items()} == expected(requests), seed
                assert books.rollups == books.truth, seed
                assert (
                    books.select("select * from rollup where min(input, output, cache_read, cache_write_5m) < 0") == []
                )
                served = {(model, kind): value for (model, kind), value in books.served.items() if kind != "requests"}
                names = dict(books.select("select id, name from model"))
                for (model, kind), value in served.items():
                    assert value >= books.truth[names[model]][(*KINDS, "usd").index(kind)]
                if "transcripts" not in sources:  # nothing is corrected downwards but the estimate of a cost
                    assert all(
                        value == books.truth[names[model]][(*KINDS, "usd").index(kind)]
                        for (model, kind), value in served.items()
                        if kind != "usd" or len(sources) == 1
                    )
        assert all(state == states[0] for state in states), seed


# --- advisors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_the_cost_of_an_advisor_is_in_the_event_of_the_request_and_counts_once(
    tmp_path: Path, order: tuple[int, ...]
) -> None:
    """The event has the tokens of the request alone and the cost of all; only the transcript knows the advisors."""
    request = Request(1, "s", "claude-opus-4-6", (5, 50, 0, 0), HOUR, True, True)
    line = usage(request, Source.TRANSCRIPT)
    advisors = [
        replace(line, key=bytes([at]) * 16, model="claude-opus-5", input=at, request_id="", part_of="req_1")
        for at in (70, 80)
    ]
    cost = [sum(price(one) for one in advisors), price(line) + 1]
    event = replace(usage(request, Source.EVENT), cost=sum(cost))
    books = Books(tmp_path / "books")
    with closing(books.store):
        for at in order:
            books.tell([(line, event, *advisors)[at]])
        assert books.truth == {
            "claude-opus-4-6": (5, 50, 0, 0, cost[1], 1),
            "claude-opus-5": (150, 100, 0, 0, cost[0], 2),
        }
        assert books.rollups == books.truth


# --- models that answer for others -----------------------------------------------------------------------------


@pytest.mark.parametrize("sources", [subset for subset in SUBSETS if "metrics" in subset and len(subset) > 1])
def test_what_a_gateway_answers_by_another_model_counts_once(tmp_path: Path, sources: tuple[str, ...]) -> None:
    """Metrics name the model that was asked, events and transcripts the one that answered: `glm-4.6` for some."""
    answering = {"claude-opus-4-6": "glm-4.6", "claude-haiku-4-5": "claude-haiku-4-5"}
    for seed in range(8):
        requests = story(seed)
        views = [
            replace(one, model=answering[one.model]) if isinstance(one, Usage) else one
            for one in told(requests, sources, seed)
        ]
        asked = expected(requests)
        states = []
        for order in range(3):
            choose = random.Random(order)
            books = Books(tmp_path / f"{seed}-{order}")
            with closing(books.store):
                for group in groups(choose.sample(views, len(views)), choose):
                    books.tell(group)
                    if choose.random() < 0.2:
                        books.restart()
                answered = {model: total[:5] for model, total in books.truth.items() if any(total[:5])}
                assert answered == {answering[model]: total for model, total in asked.items()}, seed
                assert {model: total for model, total in books.rollups.items() if any(total)} == {
                    model: total for model, total in books.truth.items() if any(total)
                }
                states.append(books.state[1:])
        assert all(state == states[0] for state in states), seed


def test_what_metrics_tell_beyond_what_another_model_answered_counts_as_well(tmp_path: Path) -> None:
    """Auxiliary calls, which no transcript has."""
    request = Request(1, "s", "glm-4.6", (5, 50, 0, 0), HOUR, False, True)
    books = Books(tmp_path / "books")
    with closing(books.store):
        books.tell([usage(request, Source.TRANSCRIPT)])
        books.tell([Metric("s", "claude-opus-4-6", kind, amount, HOUR, 1) for kind, amount in (("output", 70),)])
        books.tell([Metric("s", "claude-opus-4-6", "usd", 1000, HOUR, 1)])
        assert books.truth == {"glm-4.6": (5, 50, 0, 0, 765, 1), "claude-opus-4-6": (0, 20, 0, 0, 235, 0)}


def test_two_models_of_the_tools_own_maker_are_two(tmp_path: Path) -> None:
    request = Request(1, "s", "claude-opus-5", (5, 50, 0, 0), HOUR, False, True)
    books = Books(tmp_path / "books")
    with closing(books.store):
        books.tell([usage(request, Source.TRANSCRIPT), Metric("s", "claude-haiku-4-5", "output", 70, HOUR, 1)])
        assert {model: total[1] for model, total in books.truth.items()} == {
            "claude-opus-5": 50,
            "claude-haiku-4-5": 70,
        }


# --- history beside metrics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("session", ["s0", ""], ids=["metrics that name the session", "metrics that name none"])
@pytest.mark.parametrize("is_first", [True, False], ids=["metrics first", "history first"])
def test_history_that_a_process_has_counted_in_its_metrics_is_reported_once(
    tmp_path: Path, session: str, is_first: bool
) -> None:
    """A process began before the bridge, and its cumulative metrics have all that it used since."""
    old = [Request(at, "s0", "claude-opus-4-6", (5, 50, 0, 0), HOUR + 60_000 * at, False, True) for at in range(8)]
    since = old[5].time_ms - 1
    metrics = [
        Metric(session, "claude-opus-4-6", kind, amount, 2 * HOUR, since)
        for kind, amount in (("input", 5 * 3 + 1), ("output", 50 * 3), ("usd", 3 * old[0].cost + 3))
    ]
    books = Books(tmp_path / "books")
    with closing(books.store):
        if is_first:
            books.tell(metrics)
        with books.store.transaction():
            books.books.load_history([usage(request, Source.TRANSCRIPT) for request in old], 2 * HOUR)
            books.books.finish_history()
        if not is_first:
            books.tell(metrics)
        books.restart()
        books.tell([Metric(session, "claude-opus-4-6", "output", 10, 2 * HOUR, since)])
        sums = "select sum(input), sum(output), sum(cost) from rollup"
        assert books.truth == {"claude-opus-4-6": (16, 160, 0, 0, 3 * old[0].cost + 3, 0)}
        assert books.select(f"{sums} where part = 1") == [(5 * 8, 50 * 8, 8 * old[0].cost)]
        assert books.select(f"{sums} where part = 2") == [(1, 10, 3)]


# --- rollups ---------------------------------------------------------------------------------------------------

PROMPTED = "codex"
"""A tool whose metrics tell of whole prompts and of no cost."""


def random_tellings(choose: random.Random) -> Iterator[Usage | tuple[UsageCell, int, int]]:
    """What two tools tell of anything in any order, as if no source had anything to do with another."""
    for number in range(60):
        tool = choose.choice((TOOL, PROMPTED))
        session, model = (
            choose.choice(("s0", "s1", "")),
            choose.choice(("claude-opus-4-6", "claude-haiku-4-5", "glm-4.6")),
        )
        time_ms = HOUR * choose.randrange(1, 30) + number
        if choose.random() < 0.5:
            kinds = (*KINDS, "usd") if tool == TOOL else (*KINDS[:2], "prompt", "cached", "written")
            yield UsageCell(tool, session, model, choose.choice(kinds)), choose.randrange(1, 200), time_ms
        else:
            request = Request(number, session, model, (choose.randrange(9), choose.randrange(99), 30, 7), time_ms,
                              choose.random() < 0.5, choose.random() < 0.5)  # fmt: skip
            told = usage(request, choose.choice(list(Source)))
            yield Usage(tool, *(getattr(told, name) for name in told.__struct_fields__[1:]))


@pytest.mark.parametrize("seed", range(8))
def test_the_rollups_add_up_to_the_truth_whatever_is_told(tmp_path: Path, seed: int) -> None:
    choose = random.Random(seed)
    books = Books(tmp_path / "books")
    with closing(books.store):
        for one in random_tellings(choose):
            with books.store.transaction():
                if isinstance(one, Usage):
                    books.books.add(one)
                else:
                    books.books.add_metric(*one, one[2] - 60_000)
                books.books.flush(1, 1)
            names = dict(books.select("select id, tool from model"))
            truths = {}
            for model, row in books.books._store.truths().items():
                total = add_worth(row.own, worth(row.pool, reports_cost=names[model] == TOOL))
                truths[model] = (*total.tokens, total.cost, total.unpriced, row.requests)
            columns = "sum(input), sum(output), sum(cache_read), sum(cache_write_5m), sum(cost), sum(unpriced)"
            rows = books.select(f"select model, {columns}, sum(requests) from rollup group by 1")
            assert {row[0]: row[1:] for row in rows if any(row[1:])} == {
                model: truth for model, truth in truths.items() if any(truth)
            }
            assert not books.select("select * from rollup where min(input, output, cache_read, cache_write_5m) < 0")


settings.register_profile("join", deadline=None, derandomize=True, max_examples=200)
settings.load_profile("join")
