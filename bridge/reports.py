"""Usage by days, sessions, models or blocks of five hours: rows of the store in, entries of a report out. Pure.

Law: every report adds up what the rows hold and leaves nothing out, so that all of them have the same total. Times are
quarters of an hour since 1970: every time zone's days begin with one. Nothing here starts slowly.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date, timedelta
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from typing import NamedTuple

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

Offset = Callable[[int], int]
"""Seconds east of Greenwich at a time (Unix seconds)."""


class Amount(NamedTuple):
    """What was used. `cache_write` includes `cache_write_1h`; cost in nano-dollars; nobody knows that of `unpriced`."""

    requests: int = 0
    input: int = 0
    output: int = 0
    cache_read: int = 0
    cache_write: int = 0
    cache_write_1h: int = 0
    cost: int = 0
    unpriced: int = 0

    @property
    def tokens(self) -> int:
        return self.input + self.output + self.cache_read + self.cache_write


class Row(NamedTuple):
    """A sum of the store: of a day, an hour or a session (`key`), a model and a project; `last` is its last quarter."""

    key: int
    model: int
    project: int
    last: int
    amount: Amount


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
    for row in rows:
        if row.model in models and _is_below(names.projects.get(row.project, ""), selection.projects):
            yield row


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
    groups: dict[tuple[str, ...], list[Row]] = {}
    group = _grouping(kind, names)
    for row in rows:
        if any(row.amount):
            groups.setdefault(group(row), []).append(row)
    if kind == "session":
        last = {keys: max(row.last for row in members) for keys, members in groups.items()}
        entries = [
            _of_session(entry(keys, groups[keys], names), groups[keys], names, when(last[keys]))
            for keys in sorted(groups, key=lambda keys: (last[keys], keys))
        ]
    else:
        entries = [entry(keys, members, names) for keys, members in groups.items()]
        if kind in PERIODS:
            entries.sort(key=lambda entry: entry.keys)
        else:
            entries.sort(key=lambda entry: (-entry.amount.cost, -entry.amount.tokens, entry.keys))
    entries = [entry for entry in entries if any(entry.amount)]
    return summed(kind, entries, (row for members in groups.values() for row in members), names)


def summed(kind: str, entries: Iterable[Entry], rows: Iterable[Row], names: Names) -> Report:
    """A report of these entries; `rows` are what they were made of."""
    entries = tuple(entries)
    unpriced: dict[str, int] = {}
    for row in rows:
        if row.amount.unpriced:
            model = names.models[row.model].name
            unpriced[model] = unpriced.get(model, 0) + row.amount.unpriced
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
        case "session":
            return lambda row: (str(row.key),)
        case "project":
            return lambda row: (projects.get(row.project, ""),)
        case "model":
            return lambda row: (models[row.model].name, models[row.model].tool)
        case "tool":
            return lambda row: (models[row.model].tool,)
    periods = lru_cache(maxsize=None)(partial(period, kind))  # many rows of one day follow each other
    return lambda row: (periods(row.key),)


def _of_session(entry: Entry, rows: Sequence[Row], names: Names, last: str) -> Entry:
    """An entry under its session's name, tool and the project that most of it was for."""
    amounts = dict.fromkeys((names.projects.get(row.project, "") for row in rows), 0)
    if len(amounts) > 1:
        for row in rows:
            amounts[names.projects.get(row.project, "")] += row.amount.tokens
    project = max(amounts, key=lambda name: (amounts[name], name))
    name = names.sessions.get(rows[0].key, "")
    return Entry((name, ", ".join(entry.tools), project, last), *entry[1:])


def entry(keys: tuple[str, ...], rows: Sequence[Row], names: Names) -> Entry:
    """Models and tools stand in the order of what they cost."""
    if len(rows) == 1:
        model = names.models[rows[0].model]
        return Entry(keys, (model.name,), (model.tool,), rows[0].amount)
    models: dict[str, tuple[int, int]] = {}
    tools: dict[str, tuple[int, int]] = {}
    for row in rows:
        model = names.models[row.model]
        more_cost, more_tokens = row.amount.cost, row.amount.tokens
        for weights, name in ((models, model.name), (tools, model.tool)):
            cost, tokens = weights.get(name, (0, 0))
            weights[name] = cost + more_cost, tokens + more_tokens
    return Entry(keys, _by_weight(models), _by_weight(tools), total([row.amount for row in rows]))


def _by_weight(weights: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    if len(weights) == 1:
        return tuple(weights)
    return tuple(sorted(weights, key=lambda name: (-weights[name][0], -weights[name][1], name)))


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
        if any(row.amount):
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
