"""Reports as text for a terminal, as JSON and as CSV. Pure.

Law: numbers stand in full, with separators in text; a column that does not fit is left out, never a digit. What others
wrote (names of projects, sessions, models) cannot steer a terminal or a spreadsheet.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import lru_cache, partial
from operator import attrgetter
from typing import NamedTuple

from bridge.reports import KEYS, Amount, Block, Burn, Entry, Report

NANO = 1_000_000_000
TITLES = {
    "daily": "by day",
    "weekly": "by week, which begins on Monday",
    "monthly": "by month",
    "session": "by session",
    "project": "by project",
    "model": "by model",
    "tool": "by tool",
    "blocks": "in blocks of five hours",
}
NOTE = "Cost is API-equivalent: what it comes to at API prices. A subscription has no bill per token."
_NUMBERS = ("requests", "input", "output", "cache_read", "cache_write", "cache_write_1h", "tokens")
_numbers = attrgetter(*_NUMBERS)
_MODELS_WIDTH = 32


class Scope(NamedTuple):
    """What a report is about, as it is told with it; the days are empty where no bound was asked for."""

    timezone: str
    since: str
    until: str
    filters: tuple[str, ...]
    complete: bool


# --- text ------------------------------------------------------------------------------------------------------


class _Column(NamedTuple):
    """`priority`: the column with the greatest goes first when there is no room; 0 stays."""

    title: str
    priority: int
    is_number: bool
    cell: Callable[[Entry], str]


def text(report: Report, scope: Scope, width: int) -> str:
    """A table of at most `width` columns where that is possible, the sum below it, and what must be said of it."""
    title = f"Usage {TITLES[report.kind]} · {_scope(scope)}"
    if not report.entries:
        return f"{title}\n\nNo usage is recorded there.\n"
    columns = [*_key_columns(report), *_amount_columns(report)]
    table = _fit(columns, report.entries, Entry(("Total",), (), (), report.total), width)
    return "\n".join((title, "", *table, *_unpriced(report), NOTE)) + "\n"


def _scope(scope: Scope) -> str:
    days = f"{scope.since or 'the beginning'} to {scope.until or 'now'}" if scope.since or scope.until else "all"
    return " · ".join((days, *map(plain, scope.filters), scope.timezone))


def _key_columns(report: Report) -> list[_Column]:
    kind = report.kind
    if kind == "session":
        return [
            _Column("Last used", 0, is_number=False, cell=lambda entry: entry.keys[-1]),
            _Column("Session", 0, is_number=False, cell=partial(_session, _ambiguous(report.entries))),
            _Column("Project", 2, is_number=False, cell=lambda entry: _tail(_project(entry.keys[2]), 24)),
        ]
    if kind == "project":
        return [_Column("Project", 0, is_number=False, cell=lambda entry: _tail(_project(entry.keys[0]), 40))]
    if kind in ("model", "tool"):
        titles = {0: KEYS[kind][0].title(), 1: "Tool"}
        keys = range(len(KEYS[kind]))
        return [_Column(titles[at], 2 * at, is_number=False, cell=partial(_key, at)) for at in keys]
    title = {"daily": "Date", "weekly": "Week of", "monthly": "Month"}[kind]
    return [_Column(title, 0, is_number=False, cell=partial(_key, 0))]


def _ambiguous(entries: Sequence[Entry]) -> set[str]:
    """Beginnings that several sessions have: those of some tools begin with the time."""
    counts = Counter(entry.keys[0][:8] for entry in entries)
    return {beginning for beginning, count in counts.items() if count > 1}


def _session(ambiguous: set[str], entry: Entry) -> str:
    """As much of a session's name as tells it from others."""
    name = plain(entry.keys[0])
    return (f"…{name[-7:]}" if name[:8] in ambiguous and len(name) > 8 else name[:8]) or "(none)"


def _key(at: int, entry: Entry) -> str:
    return plain(entry.keys[at])


def _amount_columns(report: Report) -> list[_Column]:
    def number(title: str, priority: int, name: str) -> _Column:
        value = attrgetter(f"amount.{name}")
        return _Column(title, priority, is_number=True, cell=lambda entry: f"{value(entry):,}")

    models = [_Column("Models", 1, is_number=False, cell=lambda entry: _models(entry.models))]
    return [
        *(models if report.kind != "model" else []),
        number("Requests", 8, "requests"),
        number("Input", 4, "input"),
        number("Output", 3, "output"),
        number("Cache write", 6, "cache_write"),
        number("Cache read", 5, "cache_read"),
        number("Tokens", 0, "tokens"),
        _Column("Cost", 0, is_number=True, cell=partial(_cost, report)),
    ]


def _cost(report: Report, entry: Entry) -> str:
    """A cost; an asterisk says that some of its tokens have no price, a dash before it that none has."""
    amount = entry.amount
    mark = "*" if amount.unpriced > 0 else " "
    shown = dollars(amount.cost, _places(report)) if _has_cost(amount) else "-"
    return shown + (mark if report.unpriced else "")


def _has_cost(amount: Amount) -> bool:
    """Whether the cost of any of it is known."""
    return amount.cost != 0 or amount.unpriced < max(1, amount.tokens)


def _places(report: Report) -> int:
    return 2 if report.total.cost >= NANO else 4


def _fit(columns: list[_Column], entries: Sequence[Entry], whole: Entry, width: int) -> list[str]:
    """The rows of a table, without the columns that do not fit."""
    cells = {column: [column.cell(entry) for entry in entries] for column in columns}
    sums = {column: column.cell(whole) if column.is_number else "" for column in columns}
    sums[columns[0]] = "Total"
    widths = {
        column: max(display_width(cell) for cell in (column.title, sums[column], *cells[column])) for column in columns
    }
    while sum(widths.values()) + 2 * (len(widths) - 1) > width:
        victim = max(widths, key=lambda column: column.priority)
        if not victim.priority:
            break
        del widths[victim]
    rules = ["─" * size for size in widths.values()]
    whole_columns = [
        _padded([column.title, *cells[column], sums[column]], size, right=column.is_number)
        for column, size in widths.items()
    ]
    header, *rows, footer = ("  ".join(row).rstrip() for row in zip(*whole_columns, strict=True))
    rule = "  ".join(rules)
    return [header, rule, *rows, rule, footer]


def _padded(cells: Sequence[str], size: int, *, right: bool) -> list[str]:
    """Cells, each as wide as `size`."""
    if all(map(str.isascii, cells)):
        return [cell.rjust(size) for cell in cells] if right else [cell.ljust(size) for cell in cells]
    spaces = (" " * (size - display_width(cell)) for cell in cells)
    return [space + cell if right else cell + space for cell, space in zip(cells, spaces, strict=True)]


def display_width(cell: str) -> int:
    """Columns that a text takes on a terminal."""
    if cell.isascii():
        return len(cell)
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in cell)
    return len(cell) + wide - sum(bool(unicodedata.combining(character)) for character in cell)


def plain(name: str) -> str:
    """A name without what would steer a terminal."""
    if name.isprintable():
        return name
    return "".join(character if character.isprintable() else "�" for character in name)


def _project(path: str) -> str:
    return plain(path) or "(unknown)"


def _tail(name: str, most: int) -> str:
    """The end of a name: of a path that says the most."""
    return name if len(name) <= most else f"…{name[-most + 1 :]}"


@lru_cache
def _models(names: tuple[str, ...]) -> str:
    """As many models as there is room for, the most expensive first."""
    shown = ""
    for at, name in enumerate(names):
        short = plain(name).removeprefix("claude-")
        longer = f"{shown}, {short}" if shown else short
        if shown and len(longer) > _MODELS_WIDTH - 4:
            return f"{shown} +{len(names) - at}"
        shown = longer
    return shown


def dollars(cost: int, places: int = 2) -> str:
    """Nano-dollars as text; something is never shown as nothing."""
    least = NANO // 10**places
    if 0 < 2 * cost < least:
        return f"<{dollars(least, places)}"
    sign = "-" if cost < 0 else ""
    return f"{sign}${abs(cost) / NANO:,.{places}f}"


def _unpriced(report: Report) -> list[str]:
    if not report.unpriced:
        return [""]
    models = ", ".join(f"{plain(model)} ({tokens:,} tokens)" for model, tokens in report.unpriced)
    return ["", f"* Without a price, so not in the cost: {models}. [prices] in config.toml prices later ones."]


# --- blocks ----------------------------------------------------------------------------------------------------


class ShownBlock(NamedTuple):
    """A block or gap with its limits as text; the active one has a burn rate."""

    start: str
    end: str
    block: Block
    entry: Entry
    burn: Burn | None


class ShownLimit(NamedTuple):
    """An official limit: the part that is used, and as text when it begins anew and when that was told."""

    tool: str
    window: str
    used: float
    resets_at: str
    told_at: str


def blocks_text(
    shown: Sequence[ShownBlock], limits: Sequence[ShownLimit], report: Report, scope: Scope, width: int
) -> str:
    """Blocks as a table, gaps as lines of their own, what the active one comes to, and the official limits."""
    title = f"Usage {TITLES['blocks']} · {_scope(scope)}"
    if not report.entries:
        return f"{title}\n\nNo usage is recorded there.\n"
    columns = [_Column("Block", 0, is_number=False, cell=partial(_key, 0)), *_amount_columns(report)]
    table = _fit(columns, report.entries, Entry(("Total",), (), (), report.total), width)
    header, rows, footer = table[:2], iter(table[2:-2]), table[-2:]
    lines = [title, "", *header]
    for one in shown:
        hours = one.block.end - one.block.begin
        lines.append(f"  {one.start}  gap of {hours:,} h" if one.block.is_gap else next(rows))
    lines += footer
    for one in shown:
        if one.burn is not None:
            lines += ["", *_burning(one, one.burn, _places(report))]
    lines += ["", *map(_limit, limits)] if limits else []
    return "\n".join((*lines, *_unpriced(report), NOTE)) + "\n"


def _limit(limit: ShownLimit) -> str:
    name = plain(f"{limit.tool} {limit.window}").replace("_", " ")
    until = f" until {limit.resets_at}" if limit.resets_at else ""
    return f"Official limit of {name}: {limit.used:.0%} used{until}, as told {limit.told_at}."


def _burning(shown: ShownBlock, burn: Burn, places: int) -> list[str]:
    hours, minutes = divmod(burn.minutes_left, 60)
    has_cost = _has_cost(shown.entry.amount)
    rate = f", {dollars(round(burn.cost_per_hour), places)}/h" if has_cost else ""
    projection = f"{burn.projected_tokens:,} tokens"
    projection += f", {dollars(burn.projected_cost, places)}" if has_cost else ""
    return [
        f"Active until {shown.end}, {hours} h {minutes:02} min left.",
        f"Since its first request: {round(burn.tokens_per_minute):,} tokens/min{rate}.",
        f"If that goes on: {projection}.",
    ]


# --- JSON ------------------------------------------------------------------------------------------------------


def as_json(report: Report, scope: Scope) -> str:
    """A report as JSON, every number in full."""
    rows = [_json_entry(report.kind, entry) for entry in report.entries]
    return _dump(report, scope, {"rows": rows})


def blocks_json(shown: Sequence[ShownBlock], limits: Sequence[ShownLimit], report: Report, scope: Scope) -> str:
    rows = []
    for one in shown:
        begin, end = (_iso(hour * 3600) for hour in one.block[:2])
        row: dict[str, object] = {"start": begin, "end": end, "gap": one.block.is_gap, "active": one.burn is not None}
        row |= {"models": one.entry.models, "tools": one.entry.tools, **_amounts(one.entry.amount)}
        if one.burn is not None:
            row["burn"] = _burn(one.burn)
        rows.append(row)
    told: list[dict[str, object]] = [limit._asdict() for limit in limits]
    return _dump(report, scope, {"blocks": rows, "limits": told})


def _burn(burn: Burn) -> dict[str, float]:
    return {
        "tokens_per_minute": round(burn.tokens_per_minute, 3),
        "cost_usd_per_hour": round(burn.cost_per_hour) / NANO,
        "minutes_left": burn.minutes_left,
        "projected_tokens": burn.projected_tokens,
        "projected_cost_usd": burn.projected_cost / NANO,
    }


def _dump(report: Report, scope: Scope, rows: dict[str, list[dict[str, object]]]) -> str:
    import json

    told = {
        "report": report.kind,
        "timezone": scope.timezone,
        "since": scope.since or None,
        "until": scope.until or None,
        "complete": scope.complete,
    }
    sums = {"total": _amounts(report.total), "unpriced_models": dict(report.unpriced)}
    # A row a line: the encoder that indents is six times slower.
    lists = {name: [f"    {json.dumps(row)}" for row in members] for name, members in rows.items()}
    members = [
        *(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in told.items()),
        *(f"  {json.dumps(name)}: {_listed(lines)}" for name, lines in lists.items()),
        *(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in sums.items()),
    ]
    return "{\n" + ",\n".join(members) + "\n}\n"


def _listed(lines: list[str]) -> str:
    """A JSON array with a line for each member."""
    return "[\n" + ",\n".join(lines) + "\n  ]" if lines else "[]"


def _json_entry(kind: str, entry: Entry) -> dict[str, object]:
    names: dict[str, object] = dict(zip(KEYS[kind], entry.keys, strict=True))
    return {**names, "models": entry.models, "tools": entry.tools, **_amounts(entry.amount)}


def _amounts(amount: Amount) -> dict[str, object]:
    counts: dict[str, object] = dict(zip(_NUMBERS, _numbers(amount), strict=True))
    return {**counts, "cost_usd": amount.cost / NANO, "unpriced_tokens": amount.unpriced}


def _iso(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


# --- CSV -------------------------------------------------------------------------------------------------------

_CSV_TITLES = ("models", "tools", *_NUMBERS, "cost_usd", "unpriced_tokens")
_BURN_TITLES = tuple(_burn(Burn(0, 0, 0, 0, 0)))


def as_csv(report: Report) -> str:
    """A report as CSV with a line of titles and none for the sum; text that a spreadsheet would calculate is quoted."""
    return _csv((*KEYS[report.kind], *_CSV_TITLES), map(_csv_entry, report.entries))


def blocks_csv(shown: Sequence[ShownBlock]) -> str:
    """Blocks and gaps as CSV; the columns of the burn rate are empty but for the active one."""
    rows = []
    for one in shown:
        start, end, *rest = _csv_entry(one.entry)
        flags = (str(flag).lower() for flag in (one.block.is_gap, one.burn is not None))
        burn = map(str, _burn(one.burn).values()) if one.burn is not None else [""] * len(_BURN_TITLES)
        rows.append([start, end, *flags, *rest, *burn])
    return _csv((*KEYS["blocks"], "gap", "active", *_CSV_TITLES, *_BURN_TITLES), rows)


def _csv_entry(entry: Entry) -> list[str]:
    texts = [*entry.keys, " ".join(entry.models), " ".join(entry.tools)]
    counts = map(str, _numbers(entry.amount))
    return [*map(_inert, texts), *counts, f"{entry.amount.cost / NANO:.9f}", str(entry.amount.unpriced)]


def _inert(cell: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    cell = plain(cell)
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@")) else cell


def _csv(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    import csv
    import io

    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(titles)
    writer.writerows(rows)
    return file.getvalue()
