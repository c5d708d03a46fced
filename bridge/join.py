"""The join of sources: what metrics, events and transcripts together say was used. Pure.

The same usage can arrive as metrics (exact, late, lost while the bridge is down), as events (per request) and as
transcript lines (at once, without auxiliary calls). Adding them would double; letting one own a session would lose
what only another saw. So requests of events and transcripts are united into one multiset, and a cell (tool, session,
model, token type) is the larger of that and of what the metrics add up to. Every function here depends on the set
of what was seen, never on the order in which it came.
"""

from collections.abc import Iterable, Mapping
from heapq import merge
from operator import itemgetter
from typing import NamedTuple

from bridge.model import Source

KINDS = ("input", "output", "cache_read", "cache_write")
Tokens = tuple[int, int, int, int]
"""Token counts in the order of KINDS."""
NO_TOKENS: Tokens = (0, 0, 0, 0)
_WEIGHTS = (20, 100, 2, 25)
"""What a token of each kind costs relative to the others, for sharing out a cost whose parts are not known."""


class Observed(NamedTuple):
    """One request as one source saw it, among those of equal session, model, input and cache tokens.

    `key` is the same in whatever order rows come, unlike `id`.
    `has_id`: the source knows the API's request id. `is_united`: a row of the other source has the same id.
    `is_copy`: a side-chain's replay of a response that stands elsewhere.
    """

    id: int
    key: bytes
    source: Source
    output: int
    has_id: bool
    is_united: bool
    is_copy: bool


class Verdict(NamedTuple):
    """Whether a row counts, and with which output."""

    is_counted: bool
    output: int


def unite(rows: Iterable[Observed]) -> dict[int, Verdict]:
    """What each row of a group counts as.

    Rows with one request id are one request, told by the event. Of the others an event and a transcript line are
    the same request unless both have ids; the group holds as many requests as the larger side, and each pair takes
    the larger output. Pairing is by descending output, so it does not depend on the order of arrival.
    """
    verdicts: dict[int, Verdict] = {}
    events: list[Observed] = []
    lines: list[Observed] = []
    for row in rows:
        if row.is_copy or (row.is_united and row.source is Source.TRANSCRIPT):
            verdicts[row.id] = Verdict(False, row.output)
        elif row.is_united:
            verdicts[row.id] = Verdict(True, row.output)
        else:
            (events if row.source is Source.EVENT else lines).append(row)
    for event, line in _pairs(events, lines):
        verdicts[event.id] = Verdict(True, max(event.output, line.output))
        verdicts[line.id] = Verdict(False, line.output)
    for row in (*events, *lines):
        verdicts.setdefault(row.id, Verdict(True, row.output))
    return verdicts


def _pairs(events: list[Observed], lines: list[Observed]) -> Iterable[tuple[Observed, Observed]]:
    """As many pairs as possible of which at most one side has an id: those with an id choose first."""

    def by_id(rows: list[Observed], *, has_id: bool) -> list[Observed]:
        return sorted((row for row in rows if row.has_id is has_id), key=lambda row: (-row.output, row.key))

    events_with, events_without = by_id(events, has_id=True), by_id(events, has_id=False)
    lines_with, lines_without = by_id(lines, has_id=True), by_id(lines, has_id=False)
    yield from zip(events_with, lines_without, strict=False)
    yield from zip(events_without, lines_with, strict=False)
    yield from zip(events_without[len(lines_with) :], lines_without[len(events_with) :], strict=False)


class Cell(NamedTuple):
    """What the sources say of one session (or of all without metrics of their own) and one model.

    Costs in nano-dollars; `unpriced` counts tokens of requests whose cost nobody knows, `metrics_unpriced` those of
    metrics. `prompt` is what metrics tell of prompts as a whole: what was read from caches is among it. `covered` are
    requests of history that were made while the metrics already counted: never served, but the reports must not add
    both up. `estimated_cost` is the part of the requests' cost that the price table says, `estimated_weight` what the
    tokens weigh that it says this of.
    """

    requests: Tokens = NO_TOKENS
    requests_cost: int = 0
    unpriced: int = 0
    metrics: Tokens = NO_TOKENS
    metrics_cost: int = 0
    prompt: int = 0
    metrics_unpriced: int = 0
    covered: Tokens = NO_TOKENS
    covered_cost: int = 0
    covered_unpriced: int = 0
    estimated_cost: int = 0
    estimated_weight: int = 0


def request_cell(tokens: Tokens, cost: int | None, *, is_estimated: bool) -> Cell:
    """The cell of one request; nobody knows the cost if that is None."""
    if cost is None:
        return Cell(tokens, unpriced=sum(tokens))
    estimate = (cost, _weight(tokens)) if is_estimated else (0, 0)
    return Cell(tokens, cost, estimated_cost=estimate[0], estimated_weight=estimate[1])


class Worth(NamedTuple):
    """What a cell is worth: tokens, nano-dollars, and tokens without a price."""

    tokens: Tokens = NO_TOKENS
    cost: int = 0
    unpriced: int = 0


NOTHING = Worth()


def worth(cell: Cell, *, reports_cost: bool = True) -> Worth:
    """The larger of both sums for each kind of token; the cost of one side and that of the tokens beyond it.

    With `reports_cost` the metrics' cost is the tool's own, and requests add what exceeds the metrics. Without, the
    metrics' cost is an estimate of their sums: then the requests' stands, and metrics add what exceeds the requests.
    """
    requests, metrics = cell.requests, cell.metrics
    read, written = max(requests[2], metrics[2]), max(requests[3], metrics[3])
    if cell.prompt:  # its rest is new
        metrics = (max(metrics[0], cell.prompt - read - written), *metrics[1:])
    tokens = (max(requests[0], metrics[0]), max(requests[1], metrics[1]), read, written)
    if reports_cost:
        estimate = cell.estimated_cost, cell.estimated_weight
        extra = _beyond(tokens, metrics, cell.metrics_cost, requests, cell.requests_cost, estimate)
        untold = 0 if cell.metrics_cost else sum(metrics)  # a client whose cost metric is switched off
        return Worth(tokens, cell.metrics_cost + extra, untold + min(cell.unpriced, sum(tokens) - sum(metrics)))
    extra = _beyond(tokens, requests, cell.requests_cost, metrics, cell.metrics_cost)
    unpriced = min(max(0, cell.metrics_unpriced - cell.unpriced), sum(tokens) - sum(requests))
    return Worth(tokens, cell.requests_cost + extra, cell.unpriced + unpriced)


def _beyond(
    tokens: Tokens, known: Tokens, known_cost: int, other: Tokens, other_cost: int, estimate: tuple[int, int] = (0, 0)
) -> int:
    """The cost of the tokens beyond `known`, out of what `other` cost; `estimate` is the cost and the weight of what
    is priced by the table in that."""
    if tokens == known:
        return 0
    beyond = _weight(token - count for token, count in zip(tokens, known, strict=True))
    if tokens != other:
        return max(0, other_cost) * beyond // _weight(other)
    # The other side is all there is, so its cost is the whole; it never lowers what is known.
    rest = max(0, other_cost - known_cost)
    estimated, weight = estimate
    if weight <= beyond:
        return rest
    # Of some the cost is known and an estimate beside it: their difference is no part of the others' cost.
    return min(rest, max(0, estimated) * beyond // weight)


def _weight(tokens: Iterable[int]) -> int:
    return sum(weight * count for weight, count in zip(_WEIGHTS, tokens, strict=True))


def has_metrics(cell: Cell) -> bool:
    """Whether metrics say anything of a cell."""
    return any(cell.metrics) or cell.metrics_cost != 0 or cell.prompt != 0


def beyond(cell: Cell, *, reports_cost: bool = True) -> Worth:
    """What the metrics of a cell add to its requests, those of history that they cover included.

    Tokens are never negative. The cost is where a metric says less than the requests do.
    """
    if not has_metrics(cell):
        return Worth()
    requests = Worth(cell.requests, cell.requests_cost, cell.unpriced)
    told = add_worth(requests, Worth(cell.covered, cell.covered_cost, cell.covered_unpriced))
    if told == NOTHING:
        return worth(cell, reports_cost=reports_cost)
    whole = cell._replace(
        requests=told.tokens, requests_cost=told.cost, unpriced=told.unpriced,
        estimated_cost=cell.estimated_cost + cell.covered_cost,
        estimated_weight=cell.estimated_weight + _weight(cell.covered),
    )  # fmt: skip
    return add_worth(worth(whole, reports_cost=reports_cost), told, -1)


def settle(entries: Iterable[tuple[int, Worth]], changes: Mapping[int, Worth]) -> dict[int, Worth]:
    """Where changes of what metrics add to a cell are booked, by time; `entries` are what is booked, the latest first.

    What is added stands at its own time. What is taken away, since a request now tells of it, is taken from the latest
    entries that have it; what none has, as a cost that proves to be lower, stands at the time of the last change.
    """
    if all(min(_numbers(change)) >= 0 for change in changes.values()):
        return dict(changes)
    added = {time: [max(0, number) for number in _numbers(change)] for time, change in changes.items()}
    owed = [sum(min(0, number) for number in numbers) for numbers in zip(*map(_numbers, changes.values()), strict=True)]
    booked = {time: list(numbers) for time, numbers in added.items()}
    newest_first = sorted(((time, numbers) for time, numbers in added.items()), reverse=True)
    told = ((time, _numbers(entry)) for time, entry in entries)
    for time, numbers in merge(newest_first, told, key=itemgetter(0), reverse=True) if any(owed) else ():
        taken = [max(debt, -max(0, number)) for debt, number in zip(owed, numbers, strict=True)]
        if any(taken):
            old = booked.get(time, [0] * len(taken))
            booked[time] = [number + part for number, part in zip(old, taken, strict=True)]
            owed = [debt - part for debt, part in zip(owed, taken, strict=True)]
        if not any(owed):
            break
    last = max(changes)
    booked[last] = [number + debt for number, debt in zip(booked[last], owed, strict=True)]
    return {
        time: Worth((first, output, read, written), cost, unpriced)
        for time, (first, output, read, written, cost, unpriced) in booked.items()
    }


def _numbers(worth: Worth) -> list[int]:
    return [*worth.tokens, worth.cost, worth.unpriced]


def add_cells(a: Cell, b: Cell, sign: int = 1) -> Cell:
    """a + sign * b."""
    return Cell(
        _add(a.requests, b.requests, sign),
        a.requests_cost + sign * b.requests_cost,
        a.unpriced + sign * b.unpriced,
        _add(a.metrics, b.metrics, sign),
        a.metrics_cost + sign * b.metrics_cost,
        a.prompt + sign * b.prompt,
        a.metrics_unpriced + sign * b.metrics_unpriced,
        _add(a.covered, b.covered, sign),
        a.covered_cost + sign * b.covered_cost,
        a.covered_unpriced + sign * b.covered_unpriced,
        a.estimated_cost + sign * b.estimated_cost,
        a.estimated_weight + sign * b.estimated_weight,
    )


def add_worth(a: Worth, b: Worth, sign: int = 1) -> Worth:
    """a + sign * b."""
    return Worth(_add(a.tokens, b.tokens, sign), a.cost + sign * b.cost, a.unpriced + sign * b.unpriced)


def _add(a: Tokens, b: Tokens, sign: int) -> Tokens:
    if b == NO_TOKENS:
        return a
    return (a[0] + sign * b[0], a[1] + sign * b[1], a[2] + sign * b[2], a[3] + sign * b[3])
