"""How far the joined counters are from the truth when sources fail: sessions are made up, and told of as clients do.

Metrics have all requests, late and lost while the bridge is down; events each request, lost likewise; transcripts all
but auxiliary calls, and never lost. The table is printed with `pytest -s`.
"""

import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest

from bridge.join import KINDS, Tokens
from bridge.model import Source, Usage, UsageCell
from bridge.pricing import normalise_model
from bridge.store import Store
from bridge.usage import UsageBooks
from tests.test_cases import unsynced

TOOL = "claude_code"
SEEDS = range(4)
SESSIONS = 12
MINUTE = 60_000
DAY = 240 * MINUTE
PRICES = (3_000, 15_000, 300, 3_750)


class Request(NamedTuple):
    number: int
    session: str
    model: str
    time_ms: int
    tokens: Tokens
    is_auxiliary: bool

    @property
    def cost(self) -> int:
        return sum(price * count for price, count in zip(PRICES, self.tokens, strict=True))


def price(usage: Usage) -> int:
    counts = (usage.input, usage.output, usage.cache_read, usage.cache_write)
    return sum(price * count for price, count in zip(PRICES, counts, strict=True))


def requests(seed: int) -> list[Request]:
    """Sessions of three to eighty requests within four hours, one request in twelve auxiliary."""
    choose = random.Random(seed)
    made: list[Request] = []
    for session in range(SESSIONS):
        time_ms = choose.randrange(DAY // 2)
        for _ in range(choose.randrange(3, 80)):
            time_ms += choose.randrange(5_000, 3 * MINUTE)
            tokens = (
                choose.randrange(1, 500), choose.randrange(1, 3000), choose.randrange(150_000), choose.randrange(9000),
            )  # fmt: skip
            model = choose.choice(("claude-opus-4-6",) * 3 + ("claude-haiku-4-5",))
            made.append(Request(len(made), f"s{session}", model, time_ms, tokens, choose.random() < 0.08))
    return sorted(made, key=lambda request: request.time_ms)


class Scenario(NamedTuple):
    """What is lost. `downtime`: part of the time in which the bridge is down; `bound`: error in percent that may be."""

    name: str
    bound: float
    downtime: float = 0.0
    cumulative: bool = False
    metrics: bool = True
    events: bool = True
    transcripts: bool = True
    flush_lost: float = 0.0
    session_ids: bool = True


SCENARIOS = (
    Scenario("healthy", 0),
    Scenario("healthy, logs off", 0, events=False),
    Scenario("healthy, metrics absent", 0, metrics=False),
    Scenario("transcripts alone", 15, metrics=False, events=False),
    Scenario("10 % down, delta", 3, 0.1),
    Scenario("10 % down, cumulative", 2, 0.1, cumulative=True),
    Scenario("10 % down, delta, logs off", 12, 0.1, events=False),
    Scenario("10 % down, cumulative, logs off", 4, 0.1, cumulative=True, events=False),
    Scenario("10 % down, metrics absent", 3, 0.1, metrics=False),
    Scenario("10 % down, delta, metrics alone", 30, 0.1, events=False, transcripts=False),
    Scenario("last flush lost in 30 %", 0, flush_lost=0.3),
    Scenario("last flush lost in 30 %, logs off", 3, flush_lost=0.3, events=False),
    Scenario("session ids off", 0.01, session_ids=False),
    Scenario("session ids off, logs off, 10 % down", 15, 0.1, events=False, session_ids=False),
)


class Joined(NamedTuple):
    """What the books made of it: the truth that they hold and the counters, tokens in all and cost."""

    truth: int
    cost: int
    served: int
    served_cost: int


def simulate(made: list[Request], scenario: Scenario, seed: int, directory: Path) -> Joined:
    choose = random.Random(seed)
    outages = [at for at in range(0, DAY * 2, 6 * MINUTE) if choose.random() < scenario.downtime]
    unflushed = {f"s{session}" for session in range(SESSIONS) if choose.random() < scenario.flush_lost}
    ends = {request.session: request.time_ms for request in made}

    def is_up(time_ms: int) -> bool:
        return not any(begin <= time_ms < begin + 6 * MINUTE for begin in outages)

    # (when, what it does to the books)
    happenings: list[tuple[int, int, Callable[[UsageBooks], object]]] = []

    def at(time_ms: int, action: Callable[[UsageBooks], object]) -> None:
        happenings.append((time_ms, len(happenings), action))

    exports: dict[tuple[str, int], Counter[tuple[str, str]]] = {}
    for request in made:
        minute = -(-(request.time_ms + 1) // MINUTE)
        is_last = minute * MINUTE > ends[request.session]
        export = exports.setdefault((request.session, minute), Counter())
        if not (is_last and request.session in unflushed):
            for kind, amount in (*zip(KINDS, request.tokens, strict=True), ("usd", request.cost)):
                export[request.model, kind] += amount
        if scenario.events and is_up(request.time_ms + 5000):
            at(request.time_ms + 5000, told(request, Source.EVENT))
        if scenario.transcripts and not request.is_auxiliary:
            heard = request.time_ms
            while not is_up(heard):  # read when the bridge is back
                heard += MINUTE
            at(heard, told(request, Source.TRANSCRIPT))
    pending: dict[str, Counter[tuple[str, str]]] = {}
    for (session, minute), export in sorted(exports.items(), key=lambda entry: entry[0][1]):
        owed = pending.setdefault(session, Counter()) if scenario.cumulative else Counter()
        owed.update(export)
        if scenario.metrics and is_up(minute * MINUTE):
            at(minute * MINUTE, measured(session if scenario.session_ids else "", dict(owed), minute * MINUTE))
            owed.clear()
    store = Store(directory, connect=unsynced)
    store.open(0)
    with closing(store):
        books = UsageBooks(store, price, normalise_model, {TOOL})
        books.load()
        served: dict[tuple[int, str], int] = {}
        truth: dict[str, int] = {}
        for number, (_, _, action) in enumerate(sorted(happenings, key=lambda entry: entry[:2])):
            with store.transaction():
                action(books)
                change = books.flush(number, number)
            served.update({(row.model, row.kind): row.value for row in change.served})
            truth.update({kind: value for (_, kind), value in change.truth.items()})

        def shown(kinds: Iterable[str]) -> int:
            return sum(value for (_, kind), value in served.items() if kind in kinds)

        tokens = sum(truth.get(kind, 0) for kind in KINDS)
        return Joined(tokens, truth.get("usd", 0), shown(KINDS), shown(("usd",)))


def told(request: Request, source: Source) -> Callable[[UsageBooks], object]:
    new, output, read, written = request.tokens
    usage = Usage(
        TOOL, source, bytes([source]) + request.number.to_bytes(15, "big"), request.session, request.model,
        request.time_ms, new, output, read, written, 0, f"req_{request.number}",
        b"" if source is Source.EVENT else request.number.to_bytes(8, "big"),
        cost=request.cost if source is Source.EVENT else None,
    )  # fmt: skip
    return lambda books: books.add(usage)


def measured(session: str, export: dict[tuple[str, str], int], at_ms: int) -> Callable[[UsageBooks], object]:
    def tell(books: UsageBooks) -> None:
        for (model, kind), amount in export.items():
            if amount:
                books.add_metric(UsageCell(TOOL, session, model, kind), amount, at_ms, at_ms - MINUTE)

    return tell


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_no_source_is_doubled_and_what_one_lacks_another_gives(scenario: Scenario, tmp_path: Path) -> None:
    """Errors in percent of the truth: of the tokens stored, of the cost stored, and of both as served."""
    errors: list[tuple[float, ...]] = []
    for seed in SEEDS:
        made = requests(seed)
        (tmp_path / str(seed)).mkdir()
        joined = simulate(made, scenario, seed, tmp_path / str(seed))
        tokens, cost = sum(sum(request.tokens) for request in made), sum(request.cost for request in made)
        shown = (joined.truth / tokens, joined.cost / cost, joined.served / tokens, joined.served_cost / cost)
        errors.append(tuple(100 * (part - 1) for part in shown))
    columns = list(zip(*errors, strict=True))
    table = "  ".join(f"{statistics.mean(part):+7.2f} ({max(part, key=abs):+7.2f})" for part in columns)
    print(f"\n{scenario.name:40} {table}", end="")  # noqa: T201  # the table that is asked for
    for tokens_error, cost_error, served_error, served_cost_error in errors:
        assert -scenario.bound - 1e-9 <= tokens_error <= 1e-9
        assert tokens_error <= served_error <= 1e-9
        assert abs(cost_error) <= scenario.bound + 1e-9
        assert cost_error <= served_cost_error <= 1
