"""The join of sources: what metrics, events and transcripts together say was used. Pure.

The same usage can arrive as metrics (exact, late, lost while the bridge is down), as events (per request) and as
transcript lines (at once, without auxiliary calls). Adding them would double; letting one own a session would lose
what only another saw. So requests of events and transcripts are united into one multiset, and a cell (tool, session,
model, token type) is the larger of that and of what the metrics add up to. Every function here depends on the set
of what was seen, never on the order in which it came.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
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


_Place = tuple[int, bytes, int]
"""Where a row stands in its side: the negated output, key, id."""


class _Side:
    """Rows of one source that may be paired, all with ids or all without: the largest output first, then by key.

    `rest` are those that are in no pair of equal outputs. `judged` is what was found of each of them, in this order;
    None where nothing was yet. For events that is the negated output that counts, for lines whether they do.
    """

    def __init__(self) -> None:
        self.rows: list[_Place] = []
        self.rest: list[_Place] = []
        self.negated: list[int] = []
        self.judged: list[int | None] = []

    def start(self, output: int) -> int:
        """Where rows of an output begin."""
        return bisect_left(self.rows, (-output, b"", 0))

    def count(self, output: int) -> int:
        return self.start(output - 1) - self.start(output)

    def put(self, place: _Place) -> None:
        at = bisect_left(self.rest, place)
        self.rest.insert(at, place)
        self.negated.insert(at, place[0])
        self.judged.insert(at, None)

    def remove(self, place: _Place) -> int | None:
        """Take a row out; what was found of it."""
        at = bisect_left(self.rest, place)
        del self.rest[at], self.negated[at]
        return self.judged.pop(at)

    def judge(self, found: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """What is found of each of the rest now: the rows of which it is news, as id, output and finding."""
        if found != self.judged:
            for (negated, _, row_id), new, old in zip(self.rest, found, self.judged, strict=True):
                if new != old:
                    yield row_id, -negated, new
            self.judged = [*found]


class Matching:
    """A group of rows that may be the same requests, kept in order, so that one more row is judged in little time.

    Rows with one request id are one request, told by the event. Of the others an event and a transcript line may be
    the same request unless both have ids. Those of equal output are: as many pairs of them as there can be, those
    with an id first. Of the rest there are as many requests as the larger side has, and each pair takes the larger
    output: pairing is by descending output; those with an id choose first. So nothing depends on the order of arrival,
    and where outputs are right no more is counted than sources have told of.
    """

    def __init__(self, rows: Iterable[Observed] = ()) -> None:
        self._rows: dict[int, Observed] = {}
        self._decided: dict[int, Verdict] = {}
        self._sides = {(source, has_id): _Side() for source in Source for has_id in (True, False)}
        for row in rows:
            self.put(row)

    def __len__(self) -> int:
        return len(self._rows)

    def put(self, row: Observed) -> None:
        """Add a row, or replace what was known of it."""
        self.remove(row.id)
        self._rows[row.id] = row
        if row.is_copy or row.is_united:
            counts = not row.is_copy and row.source is Source.EVENT
            self._decided[row.id] = Verdict(counts, row.output)
        else:
            self._pair(row, is_new=True)

    def remove(self, row_id: int) -> None:
        """Forget a row, if it is there."""
        row = self._rows.pop(row_id, None)
        if row is not None and not (row.is_copy or row.is_united):
            self._pair(row, is_new=False)
        self._decided.pop(row_id, None)

    def _pair(self, row: Observed, *, is_new: bool) -> None:
        """Put a row into its side or take it out, and pair those of its output anew: of each side the first by key."""
        place = (-row.output, row.key, row.id)
        own = row.source, row.has_id
        side = self._sides[own]
        paired = self._equal(row.output)
        at = bisect_left(side.rows, place)
        is_paired = at - side.start(row.output) < paired[own]
        if is_new:
            side.rows.insert(at, place)
        else:
            del side.rows[at]
        if is_paired:
            paired[own] += 1 if is_new else -1
            self._decided[row.id] = Verdict(row.source is Source.EVENT, row.output)
        elif is_new:
            side.put(place)
        else:
            side.remove(place)
        for (source, has_id), count in self._equal(row.output).items():
            side, before = self._sides[source, has_id], paired[source, has_id]
            if count == before:
                continue
            start = side.start(row.output)
            found = -row.output if source is Source.EVENT else 0
            for place in side.rows[start + before : start + count]:
                if side.remove(place) != found:
                    self._decided[place[2]] = Verdict(source is Source.EVENT, row.output)
            for place in side.rows[start + count : start + before]:
                side.put(place)
                self._decided.pop(place[2], None)

    def _equal(self, output: int) -> dict[tuple[Source, bool], int]:
        """How many rows of each side are paired with one of the same output."""
        counts = {key: side.count(output) for key, side in self._sides.items()}
        events, lines = counts[Source.EVENT, False], counts[Source.TRANSCRIPT, False]
        named_events = min(counts[Source.EVENT, True], lines)
        named_lines = min(counts[Source.TRANSCRIPT, True], events)
        nameless = min(events - named_lines, lines - named_events)
        return {
            (Source.EVENT, True): named_events,
            (Source.EVENT, False): named_lines + nameless,
            (Source.TRANSCRIPT, True): named_lines,
            (Source.TRANSCRIPT, False): named_events + nameless,
        }

    def news(self) -> dict[int, Verdict]:
        """What rows count as, of those for which that has changed since this was asked last."""
        changed, self._decided = self._decided, {}
        events_with, events_without = (self._sides[Source.EVENT, has_id] for has_id in (True, False))
        lines_with, lines_without = (self._sides[Source.TRANSCRIPT, has_id] for has_id in (True, False))
        left = lines_without.negated[len(events_with.rest) :]
        for events, partners in (
            (events_with, lines_without.negated),
            (events_without, lines_with.negated + left if left else lines_with.negated),
        ):
            larger = [*map(min, events.negated, partners), *events.negated[len(partners) :]]
            changed |= {row_id: Verdict(True, -found) for row_id, _, found in events.judge(larger)}
        spare = max(0, len(events_without.rest) - len(lines_with.rest))
        for lines, paired in (
            (lines_with, len(events_without.rest)),
            (lines_without, len(events_with.rest) + spare),
        ):
            count = len(lines.rest)
            counted = [0] * min(paired, count) + [1] * (count - paired)
            changed |= {row_id: Verdict(found == 1, output) for row_id, output, found in lines.judge(counted)}
        return changed


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


def worth(cell: Cell, *, reports_cost: bool = True) -> Worth:
    """The larger of both sums for each kind of token; the cost of one side and that of the tokens beyond it.

    With `reports_cost` the metrics' cost is the tool's own, and requests add what exceeds the metrics. Without, the
    metrics' cost is an estimate of their sums: then, as where they tell of none, the requests' stands, and metrics add
    what exceeds the requests.
    """
    requests, metrics = cell.requests, cell.metrics
    read, written = max(requests[2], metrics[2]), max(requests[3], metrics[3])
    if cell.prompt:  # its rest is new
        metrics = (max(metrics[0], cell.prompt - read - written), *metrics[1:])
    tokens = (max(requests[0], metrics[0]), max(requests[1], metrics[1]), read, written)
    if reports_cost and (cell.metrics_cost or not any(metrics)):
        estimate = cell.estimated_cost, cell.estimated_weight
        extra = _beyond(tokens, metrics, cell.metrics_cost, requests, cell.requests_cost, estimate)
        return Worth(tokens, cell.metrics_cost + extra, min(cell.unpriced, sum(tokens) - sum(metrics)))
    extra = _beyond(tokens, requests, cell.requests_cost, metrics, cell.metrics_cost)
    metrics_unpriced = sum(metrics) if reports_cost else cell.metrics_unpriced
    unpriced = min(max(0, metrics_unpriced - cell.unpriced), sum(tokens) - sum(requests))
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


def has_metrics_alone(cell: Cell) -> bool:
    """Whether no request is told of in a cell, so that all its worth is what metrics say."""
    requests = cell.requests == NO_TOKENS and not cell.requests_cost and not cell.unpriced
    return requests and cell.covered == NO_TOKENS and not cell.covered_cost and not cell.covered_unpriced


def beyond(cell: Cell, *, reports_cost: bool = True) -> Worth:
    """What the metrics of a cell add to its requests, those of history that they cover included.

    Tokens are never negative. The cost is where a metric says less than the requests do.
    """
    if not has_metrics(cell):
        return Worth()
    if has_metrics_alone(cell):
        return worth(cell, reports_cost=reports_cost)
    requests = Worth(cell.requests, cell.requests_cost, cell.unpriced)
    told = add_worth(requests, Worth(cell.covered, cell.covered_cost, cell.covered_unpriced))
    whole = cell._replace(
        requests=told.tokens, requests_cost=told.cost, unpriced=told.unpriced,
        estimated_cost=cell.estimated_cost + cell.covered_cost,
        estimated_weight=cell.estimated_weight + _weight(cell.covered),
    )  # fmt: skip
    return add_worth(worth(whole, reports_cost=reports_cost), told, -1)


def told_twice(cells: Mapping[int, Cell], *, with_history: bool = False) -> dict[int, Worth]:
    """What the metrics of a session's models repeat that its requests tell under other names; by model of the metrics.

    Metrics name the model that was asked, requests the one that answered, which behind a gateway is another. So what
    metrics tell beyond the requests of their models may be what is told of models that only requests know: it is more
    only as far as it exceeds that. `with_history` is for the reports, which have both.
    """
    tokens, cost = NO_TOKENS, 0
    for cell in cells.values():
        if not has_metrics(cell):
            tokens, cost = _add(tokens, cell.requests, 1), cost + cell.requests_cost
            if with_history:
                tokens, cost = _add(tokens, cell.covered, 1), cost + cell.covered_cost
    found: dict[int, Worth] = {}
    for model in sorted(cells) if any(tokens) else ():
        cell = cells[model]
        more = beyond(cell if with_history else cell._replace(covered=NO_TOKENS, covered_cost=0, covered_unpriced=0))
        if any(more.tokens):
            repeated = _least(more.tokens, tokens)
            repeated_cost = max(0, min(more.cost, cost))
            rest = sum(more.tokens) - sum(repeated)
            found[model] = Worth(repeated, repeated_cost, max(0, more.unpriced - rest))
            tokens, cost = _add(tokens, repeated, -1), cost - repeated_cost
    return found


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


def _least(a: Tokens, b: Tokens) -> Tokens:
    return min(a[0], b[0]), min(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])


def _add(a: Tokens, b: Tokens, sign: int) -> Tokens:
    if b == NO_TOKENS:
        return a
    return (a[0] + sign * b[0], a[1] + sign * b[1], a[2] + sign * b[2], a[3] + sign * b[3])
