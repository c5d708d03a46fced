"""Usage by days, sessions, models or blocks of five hours: rows of the store in, entries of a report out. Pure.

Law: every report adds up what the rows hold and leaves nothing out, so that all of them have the same total. Times are
quarters of an hour since 1970: every time zone's days begin with one. Nothing here starts slowly.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date, timedelta
from fnmatch import fnmatchcase
from functools import cache
from operator import add, attrgetter
from typing import NamedTuple, TypeVar

QUARTER = 900
"""Seconds."""
DAY = 86_400
PERIODS = ("daily", "weekly", "monthly")
KINDS = (*PERIODS, "session", "project", "model", "tool")
KEYS = {
    "daily": ("date",),
    "weekly": ("week",),
    "monthly": ("month",),
    "session": ("session", "tool", "project", "last"),
    "project": ("project",),
    "model": ("model", "tool"),
    "tool": ("tool",),
    "blocks": ("start", "end"),
}
"""What names an entry of each kind of report."""
_EPOCH = date(1970, 1, 1)
_TRANSITIONS = (946_684_800, 4_102_444_800)
"""From 2000 to 2100 changes of a zone's offset are looked for; no telemetry is older, and later is a broken clock."""
_STEP = 7 * DAY
"""No zone has two changes within a week."""

Group = TypeVar("Group")
Offset = Callable[[int], int]
"""Seconds east of Greenwich at a time (Unix seconds)."""


class Amount(NamedTuple):
    """What was used. `cache_write` includes `cache_write_1h`, `tokens` all but that; cost in nano-dollars; nobody knows
    that of `unpriced`."""

    requests: int = 0
    input: int = 0
    output: int = 0
    cache_read: int = 0
    cache_write: int = 0
    cache_write_1h: int = 0
    tokens: int = 0
    cost: int = 0
    unpriced: int = 0


class Row(NamedTuple):
    """A sum of the store: of a day, an hour or a session (`key`), a model and a project. `last` is the last quarter of
    sessions. The members of an amount follow, flat as the database gives them: there are thousands of rows."""

    key: int
    model: int
    project: int
    last: int
    requests: int
    input: int
    output: int
    cache_read: int
    cache_write: int
    cache_write_1h: int
    tokens: int
    cost: int
    unpriced: int

    @property
    def amount(self) -> Amount:
        return Amount._make(self[4:])


class Model(NamedTuple):
    tool: str
    name: str


class Names(NamedTuple):
    """What the numbers in rows stand for."""

    models: Mapping[int, Model]
    sessions: Mapping[int, str]
    projects: Mapping[int, str]


class Selection(NamedTuple):
    """Which usage is asked for: days (both included) of the time zone, and patterns of which one must match."""

    since: date | None = None
    until: date | None = None
    tools: tuple[str, ...] = ()
    projects: tuple[str, ...] = ()
    models: tuple[str, ...] = ()


class Entry(NamedTuple):
    """One line of a report: the values of its KEYS, the models and tools in it, and what was used."""

    keys: tuple[str, ...]
    models: tuple[str, ...]
    tools: tuple[str, ...]
    amount: Amount


class Report(NamedTuple):
    """A report: its entries in their order, their sum, and by model the tokens without a price."""

    kind: str
    entries: tuple[Entry, ...]
    total: Amount
    unpriced: tuple[tuple[str, int], ...]


# --- time ------------------------------------------------------------------------------------------------------


class Segment(NamedTuple):
    """Quarters [begin, end) in which a zone has one offset (seconds)."""

    begin: int
    end: int
    offset: int


def segments(begin: int, end: int, offset: Offset) -> list[Segment]:
    """The quarters [begin, end) cut where the zone's offset changes."""
    found: list[Segment] = []
    start, now = begin, offset(begin * QUARTER)
    earliest, latest = (at // QUARTER for at in _TRANSITIONS)
    at = max(begin, earliest)
    while at < min(end, latest):
        until = min(at + _STEP // QUARTER, end, latest)
        if offset(until * QUARTER) != now:
            change = _change(at, until, now, offset)
            found.append(Segment(start, change, now))
            start, now = change, offset(change * QUARTER)
        at = until
    return [*found, Segment(start, end, now)] if start < end else found


def _change(low: int, high: int, before: int, offset: Offset) -> int:
    """The first quarter in (low, high] whose offset is not `before`."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if offset(middle * QUARTER) == before else (low, middle)
    return high


def limited(segment: Segment, selection: Selection) -> Segment:
    """The part of a segment that stands in the selected days."""
    begin, end = segment.begin, segment.end
    if selection.since is not None:
        begin = max(begin, -((segment.offset - _day(selection.since) * DAY) // QUARTER))
    if selection.until is not None:
        end = min(end, -((segment.offset - (_day(selection.until) + 1) * DAY) // QUARTER))
    return segment._replace(begin=begin, end=max(begin, end))


def _day(when: date) -> int:
    return when.toordinal() - _EPOCH.toordinal()


def day_of(seconds: int) -> date:
    """The day of a local time, in seconds since 1970."""
    return date.fromordinal(_EPOCH.toordinal() + seconds // DAY)


def first_quarter(day: date, offset: Offset) -> int:
    """The quarter with which a day begins."""
    around = _day(day) * DAY // QUARTER
    for segment in segments(around - 96, around + 96, offset):
        part = limited(segment, Selection(since=day))
        if part.begin < part.end:
            return part.begin
    raise AssertionError("no day is longer than two")


@cache  # many rows of one day follow each other
def period(kind: str, day: int) -> str:
    """The name of the day, ISO week or month that a day since 1970 is in; a week is named by its Monday."""
    when = _EPOCH + timedelta(days=day)
    if kind == "weekly":
        when -= timedelta(days=when.weekday())
    return when.isoformat()[: 7 if kind == "monthly" else 10]


# --- what is asked for -----------------------------------------------------------------------------------------


def select(rows: Iterable[Row], names: Names, selection: Selection) -> Iterator[Row]:
    """The rows of the selected tools, models and projects."""
    if not (selection.tools or selection.models or selection.projects):
        yield from rows
        return
    models = {
        number
        for number, model in names.models.items()
        if is_named(model.tool, selection.tools) and is_named(model.name, selection.models)
    }
    is_below = cache(lambda project: _is_below(names.projects.get(project, ""), selection.projects))
    yield from (row for row in rows if row.model in models and is_below(row.project))


def is_named(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns is a part of the name, or matches it where it has wildcards."""
    name = name.lower()
    return not patterns or any(
        fnmatchcase(name, pattern) if _has_wildcards(pattern) else pattern in name
        for pattern in map(str.lower, patterns)
    )


def _is_below(path: str, patterns: Sequence[str]) -> bool:
    """Whether a path is, ends with, or is below one of the patterns; or matches it where it has wildcards."""
    return not patterns or any(
        fnmatchcase(path, pattern) if _has_wildcards(pattern) else f"/{pattern.strip('/')}/" in f"/{path.strip('/')}/"
        for pattern in patterns
    )


def _has_wildcards(pattern: str) -> bool:
    return any(character in pattern for character in "*?[")


# --- reports ---------------------------------------------------------------------------------------------------


def report(kind: str, rows: Iterable[Row], names: Names, when: Callable[[int], str]) -> Report:
    """The report of a kind. `rows` have days as keys where that is a period, else sessions or nothing; `when` names a
    quarter of an hour."""
    rows = [row for row in rows if any(row[4:])]
    if kind == "session":
        sessions = sorted(
            (max(row.last for row in members), str(session), members)
            for session, members in grouped(rows, lambda row: row.key).items()
        )
        entries = [_of_session(members, names, when(last)) for last, _, members in sessions]
    else:
        entries = [entry(keys, members, names) for keys, members in grouped(rows, _grouping(kind, names)).items()]
        if kind in PERIODS:
            entries.sort(key=lambda entry: entry.keys)
        else:
            entries.sort(key=lambda entry: (-entry.amount.cost, -entry.amount.tokens, entry.keys))
    return summed(kind, [entry for entry in entries if any(entry.amount)], rows, names)


def grouped(rows: Iterable[Row], group: Callable[[Row], Group]) -> dict[Group, list[Row]]:
    """Rows by what `group` says of them, in their order."""
    groups: dict[Group, list[Row]] = {}
    for row in rows:
        groups.setdefault(group(row), []).append(row)
    return groups


def summed(kind: str, entries: Iterable[Entry], rows: Iterable[Row], names: Names) -> Report:
    """A report of these entries; `rows` are what they were made of."""
    entries = tuple(entries)
    unpriced: dict[str, int] = {}
    for row in rows:
        if row.unpriced:
            model = names.models[row.model].name
            unpriced[model] = unpriced.get(model, 0) + row.unpriced
    found = sorted(
        ((model, tokens) for model, tokens in unpriced.items() if tokens > 0), key=lambda one: (-one[1], one[0])
    )
    return Report(kind, entries, total(entry.amount for entry in entries), tuple(found))


def total(amounts: Iterable[Amount]) -> Amount:
    """The sum of amounts."""
    columns = list(zip(*amounts, strict=True))
    return Amount._make(map(sum, columns)) if columns else Amount()


def _grouping(kind: str, names: Names) -> Callable[[Row], tuple[str, ...]]:
    """What tells the entry that a row belongs to from others."""
    models, projects = names.models, names.projects
    match kind:
        case "project":
            return lambda row: (projects.get(row.project, ""),)
        case "model":
            return lambda row: (models[row.model].name, models[row.model].tool)
        case "tool":
            return lambda row: (models[row.model].tool,)
    return lambda row: (period(kind, row.key),)


def _of_session(rows: Sequence[Row], names: Names, last: str) -> Entry:
    """An entry under its session's name, tool and the project that most of it was for."""
    tokens = dict.fromkeys([names.projects.get(row.project, "") for row in rows], 0)
    if len(tokens) > 1:
        for row in rows:
            tokens[names.projects.get(row.project, "")] += row.tokens
    project = max(tokens, key=lambda name: (tokens[name], name)) if len(tokens) > 1 else next(iter(tokens))
    models, tools = _used(rows, names)
    return Entry((names.sessions.get(rows[0].key, ""), ", ".join(tools), project, last), models, tools, _sum(rows))


def entry(keys: tuple[str, ...], rows: Sequence[Row], names: Names) -> Entry:
    """What rows add up to."""
    return Entry(keys, *_used(rows, names), _sum(rows)) if rows else Entry(keys, (), (), Amount())


def _sum(rows: Sequence[Row]) -> Amount:
    """For few rows this is faster than the sum of columns."""
    amount: tuple[int, ...] = rows[0][4:]
    for row in rows[1:]:
        amount = tuple(map(add, amount, row[4:]))
    return Amount._make(amount)


def _used(rows: Sequence[Row], names: Names) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Models and tools, in the order of what they cost."""
    by_weight = {_weight(row): names.models[row.model] for row in rows}
    if len(by_weight) == len(rows) and (found := _distinct(tuple([by_weight[at] for at in sorted(by_weight)]))):
        return found
    used = [names.models[row.model] for row in rows]
    return _by_weight([model.name for model in used], rows), _by_weight([model.tool for model in used], rows)


_weight = attrgetter("cost", "tokens")


@cache
def _distinct(used: tuple[Model, ...]) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Names and tool; None where a sum of several decides their order. Thousands of entries have the same few."""
    names, tools = tuple([model.name for model in reversed(used)]), {model.tool for model in used}
    return (names, tuple(tools)) if len(tools) == 1 and len(set(names)) == len(names) else None


def _by_weight(names: Sequence[str], rows: Iterable[Row]) -> tuple[str, ...]:
    """The names of rows, each once, those with the highest cost first."""
    if len(set(names)) == 1:
        return (names[0],)
    weights: dict[str, tuple[int, int, str]] = {}
    for name, row in zip(names, rows, strict=True):
        cost, tokens, _ = weights.get(name, (0, 0, name))
        weights[name] = cost - row.cost, tokens - row.tokens, name
    return tuple(sorted(weights, key=weights.__getitem__))


# --- blocks ----------------------------------------------------------------------------------------------------

BLOCK_HOURS = 5


class Block(NamedTuple):
    """Five hours from the hour of a first request on; or a gap between two of them, without rows. Hours since 1970."""

    begin: int
    end: int
    is_gap: bool
    rows: tuple[Row, ...] = ()

    @property
    def amount(self) -> Amount:
        return total(row.amount for row in self.rows)


class Burn(NamedTuple):
    """How fast a block is used up, on average since its first request, and what it comes to if that goes on."""

    tokens_per_minute: float
    cost_per_hour: float
    minutes_left: int
    projected_tokens: int
    projected_cost: int


def blocks(begins: Iterable[int], rows: Iterable[Row], now: int) -> list[Block]:
    """Blocks by when they begin, and the gaps between them and up to `now` (an hour); `rows` have begins as keys.

    A block of which no row is there is left out, and is no gap.
    """
    used: dict[int, list[Row]] = {}
    for row in rows:
        if any(row[4:]):
            used.setdefault(row.key, []).append(row)
    found: list[Block] = []
    end = None
    for begin in begins:
        if end is not None and begin > end:
            found.append(Block(end, begin, is_gap=True))
        end = begin + BLOCK_HOURS
        if begin in used:
            found.append(Block(begin, end, is_gap=False, rows=tuple(used[begin])))
    return found if end is None or end > now else [*found, Block(end, now, is_gap=True)]


def burn(block: Block, first: int, now: int) -> Burn:
    """The rate of an active block; `first` request and `now` in Unix seconds."""
    minutes = max(1.0, (now - first) / 60)
    left = max(0, block.end * 3600 - now) / 60
    tokens, cost = block.amount.tokens, block.amount.cost
    return Burn(
        tokens / minutes,
        cost / minutes * 60,
        round(left),
        tokens + round(tokens / minutes * left),
        cost + round(cost / minutes * left),
    )
