"""Reports as text for a terminal, as JSON and as CSV. Pure.

Law: numbers stand in full, with separators in text; a column that does not fit is left out, never a digit. What others
wrote (names of projects, sessions, models) cannot steer a terminal or a spreadsheet.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache, partial
from operator import attrgetter
from typing import Any, NamedTuple

from bridge.reports import KEYS, Amount, Block, Burn, Entry, Report, period

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
_NUMBERS = Amount._fields[:-2]
"""All but the cost and the tokens without one."""
_TITLES = ("models", "tools", *_NUMBERS, "cost_usd", "unpriced_tokens")
"""What JSON and CSV call the rest of an entry, after its keys."""
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
    """`priority`: the column with the greatest goes first when there is no room; 0 stays. Cells are texts or ints."""

    title: str
    priority: int
    is_number: bool
    cells: Callable[[Sequence[Entry]], list[Any]]

    @property
    def align(self) -> str:
        return ">" if self.is_number else "<"


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
            _Column("Last used", 0, is_number=False, cells=partial(_keys, 3)),
            _Column("Session", 0, is_number=False, cells=_sessions),
            _Column("Project", 2, is_number=False, cells=partial(_projects, 2, 24)),
        ]
    if kind == "project":
        return [_Column("Project", 0, is_number=False, cells=partial(_projects, 0, 40))]
    if kind in ("model", "tool"):
        titles = {0: KEYS[kind][0].title(), 1: "Tool"}
        keys = range(len(KEYS[kind]))
        return [_Column(titles[at], 2 * at, is_number=False, cells=partial(_keys, at)) for at in keys]
    title = {"daily": "Date", "weekly": "Week of", "monthly": "Month"}[kind]
    return [_Column(title, 0, is_number=False, cells=partial(_keys, 0))]


def _keys(at: int, entries: Sequence[Entry]) -> list[str]:
    return [plain(entry.keys[at]) for entry in entries]


def _sessions(entries: Sequence[Entry]) -> list[str]:
    """As much of each session's name as tells it from others: those of some tools begin with the time."""
    names = _keys(0, entries)
    counts = Counter(name[:8] for name in names)
    return [(f"…{name[-7:]}" if counts[name[:8]] > 1 and len(name) > 8 else name[:8]) or "(none)" for name in names]


def _amount_columns(report: Report) -> list[_Column]:
    def number(title: str, priority: int, name: str) -> _Column:
        value = attrgetter(f"amount.{name}")
        return _Column(title, priority, is_number=True, cells=lambda entries: list(map(value, entries)))

    models = [_Column("Models", 1, is_number=False, cells=lambda entries: [_models(entry.models) for entry in entries])]
    return [
        *(models if report.kind != "model" else []),
        number("Requests", 8, "requests"),
        number("Input", 4, "input"),
        number("Output", 3, "output"),
        number("Cache write", 6, "cache_write"),
        number("Cache read", 5, "cache_read"),
        number("Tokens", 0, "tokens"),
        _Column("Cost", 0, is_number=True, cells=partial(_costs, report)),
    ]


def _costs(report: Report, entries: Sequence[Entry]) -> list[str]:
    """Costs; an asterisk says that some of its tokens have no price, a dash before it that none has."""
    places = _places(report)
    costs = [dollars(entry.amount.cost, places) if _has_cost(entry.amount) else "-" for entry in entries]
    if not report.unpriced:
        return costs
    return [cost + ("*" if entry.amount.unpriced > 0 else " ") for cost, entry in zip(costs, entries, strict=True)]


def _has_cost(amount: Amount) -> bool:
    """Whether the cost of any of it is known."""
    return amount.cost != 0 or amount.unpriced < max(1, amount.tokens)


def _places(report: Report) -> int:
    return 2 if report.total.cost >= NANO else 4


def _fit(columns: list[_Column], entries: Sequence[Entry], whole: Entry, width: int) -> list[str]:
    """The rows of a table, without the columns that do not fit."""
    cells = {
        column: column.cells([*entries, whole]) if column.is_number else [*column.cells(entries), ""]
        for column in columns
    }
    cells[columns[0]][-1] = "Total"
    widths = {column: max(len(column.title), _width(cells[column])) for column in columns}
    while sum(widths.values()) + 2 * (len(widths) - 1) > width:
        victim = max(widths, key=lambda column: column.priority)
        if not victim.priority:
            break
        del widths[victim]
    header = "  ".join(f"{column.title:{column.align}{size}}" for column, size in widths.items())
    rule = "  ".join("─" * size for size in widths.values())
    # Numbers become text with their row: there are thousands of cells.
    forms, shown = zip(*(_formed(cells[column], size, column) for column, size in widths.items()), strict=True)
    *rows, footer = [row.rstrip() for row in map("  ".join(forms).format, *shown)]
    return [header.rstrip(), rule, *rows, rule, footer]


def _width(cells: Sequence[Any]) -> int:
    """As wide as the widest."""
    if isinstance(cells[0], int):
        return max(len(f"{number:,}") for number in (min(cells), max(cells)))
    return max(map(len if _is_ascii(cells) else display_width, cells))


def _formed(cells: Sequence[Any], size: int, column: _Column) -> tuple[str, Sequence[Any]]:
    """The form of cells that makes them as wide as `size`, and what to put into it."""
    if isinstance(cells[0], int):
        return f"{{:{size},}}", cells
    if _is_ascii(cells):
        return f"{{:{column.align}{size}}}", cells
    spaces = (" " * (size - display_width(cell)) for cell in cells)
    return "{}", [space + cell if column.is_number else cell + space for cell, space in zip(cells, spaces, strict=True)]


def _is_ascii(cells: Sequence[str]) -> bool:
    return all(map(str.isascii, cells))


def display_width(cell: str) -> int:
    """Columns that a text takes on a terminal."""
    if cell.isascii():
        return len(cell)
    cell = unicodedata.normalize("NFC", cell)  # names of files may come in parts, each of which has a width
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in cell)
    return len(cell) + wide - sum(unicodedata.category(character) in ("Mn", "Me") for character in cell)


def plain(name: str) -> str:
    """A name without what would steer a terminal."""
    if name.isprintable():
        return name
    return "".join(character if character.isprintable() else "�" for character in name)


def _projects(at: int, most: int, entries: Sequence[Entry]) -> list[str]:
    names = _keys(at, entries)
    shown = {name: _tail(name, most) or "(unknown)" for name in set(names)}
    return [shown[name] for name in names]


def _tail(name: str, most: int) -> str:
    """The end of a path, which says the most of it."""
    if display_width(name) <= most:
        return name
    name = name[1 - most :]
    while display_width(name) >= most:
        name = name[1:]
    return f"…{name}"


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
    columns = [_Column("Block", 0, is_number=False, cells=partial(_keys, 0)), *_amount_columns(report)]
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
    import json

    encode = json.JSONEncoder().encode
    line = _json_line((*KEYS[report.kind], *_TITLES))
    rows = [line % (*map(encode, entry.keys), *_json_values(entry)) for entry in report.entries]
    return _dump(report, scope, {"rows": rows})


def blocks_json(shown: Sequence[ShownBlock], limits: Sequence[ShownLimit], report: Report, scope: Scope) -> str:
    titles = ("start", "end", "gap", "active", *_TITLES)
    line, active_line = _json_line(titles), _json_line((*titles, "burn"))
    rows = []
    for one in shown:
        begin, end, *_ = one.block
        values = (f'"{_iso(begin)}"', f'"{_iso(end)}"', *_flags(one), *_json_values(one.entry))
        rows.append(line % values if one.burn is None else active_line % (*values, _json(_burn(one.burn))))
    return _dump(report, scope, {"blocks": rows, "limits": [_json(limit._asdict()) for limit in limits]})


def _json_line(titles: Iterable[str]) -> str:
    """An object with a place for each value: to encode every object by itself takes three times as long."""
    return "{" + ", ".join(f"{_json(title)}: %s" for title in titles) + "}"


def _json_values(entry: Entry) -> tuple[object, ...]:
    """The values of _TITLES; a number's text is its JSON."""
    amount = entry.amount
    names = _json_names(entry.models), _json_names(entry.tools)
    return *names, *amount[: len(_NUMBERS)], amount.cost / NANO, amount.unpriced


@cache
def _json_names(names: tuple[str, ...]) -> str:
    return _json(names)


def _json(value: object) -> str:
    import json

    return json.dumps(value)


def _flags(shown: ShownBlock) -> tuple[str, str]:
    """Whether it is a gap, and whether it is active; in JSON and CSV."""
    return str(shown.block.is_gap).lower(), str(shown.burn is not None).lower()


def _burn(burn: Burn) -> dict[str, float]:
    return {
        "tokens_per_minute": round(burn.tokens_per_minute, 3),
        "cost_usd_per_hour": round(burn.cost_per_hour) / NANO,
        "minutes_left": burn.minutes_left,
        "projected_tokens": burn.projected_tokens,
        "projected_cost_usd": burn.projected_cost / NANO,
    }


def _dump(report: Report, scope: Scope, lists: dict[str, list[str]]) -> str:
    told = {
        "report": report.kind,
        "timezone": scope.timezone,
        "since": scope.since or None,
        "until": scope.until or None,
        "complete": scope.complete,
    }
    total = report.total
    amounts = {**dict(zip(_NUMBERS, total, strict=False)), "cost_usd": total.cost / NANO}
    sums = {"total": {**amounts, "unpriced_tokens": total.unpriced}, "unpriced_models": dict(report.unpriced)}
    members = {
        **{name: _json(value) for name, value in told.items()},
        **{name: _listed(lines) for name, lines in lists.items()},
        **{name: _json(value) for name, value in sums.items()},
    }
    return "{\n" + ",\n".join(f"  {_json(name)}: {value}" for name, value in members.items()) + "\n}\n"


def _listed(lines: list[str]) -> str:
    """A JSON array with a line for each member: the encoder that indents is six times slower."""
    return "[\n    " + ",\n    ".join(lines) + "\n  ]" if lines else "[]"


def _iso(hour: int) -> str:
    return f"{period('daily', hour // 24)}T{hour % 24:02}:00:00Z"


# --- CSV -------------------------------------------------------------------------------------------------------

_BURN_TITLES = tuple(_burn(Burn(0, 0, 0, 0, 0)))


def as_csv(report: Report) -> str:
    """A report as CSV with a line of titles and none for the sum; text that a spreadsheet would calculate is quoted."""
    return _csv((*KEYS[report.kind], *_TITLES), map(_csv_entry, report.entries))


def blocks_csv(shown: Sequence[ShownBlock]) -> str:
    """Blocks and gaps as CSV; the columns of the burn rate are empty but for the active one."""
    rows = []
    for one in shown:
        start, end, *rest = _csv_entry(one.entry)
        burn = _burn(one.burn).values() if one.burn is not None else [""] * len(_BURN_TITLES)
        rows.append([start, end, *_flags(one), *rest, *burn])
    return _csv((*KEYS["blocks"], "gap", "active", *_TITLES, *_BURN_TITLES), rows)


def _csv_entry(entry: Entry) -> list[object]:
    amount = entry.amount
    texts = map(_inert, (*entry.keys, " ".join(entry.models), " ".join(entry.tools)))
    return [*texts, *amount[: len(_NUMBERS)], f"{amount.cost / NANO:.9f}", amount.unpriced]


@cache
def _inert(cell: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    cell = plain(cell)
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@")) else cell


def _csv(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    import csv
    import io

    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(titles)
    writer.writerows(rows)
    return file.getvalue()
