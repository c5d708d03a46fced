"""The command `report`: asks the database, also while a bridge writes it, and prints a table, JSON or CSV."""

import errno
import io
import os
import sqlite3
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta, tzinfo
from functools import cache
from typing import NamedTuple

from bridge import report_store, reports, tables
from bridge.database import Unreadable, is_running, read
from bridge.place import Misplaced, Place, columns, find
from bridge.reports import BLOCK_HOURS, DAY, PERIODS, QUARTER, Block, Names, Offset, Row, Selection
from bridge.tables import Scope, ShownBlock, ShownLimit

BLOCKS_OF = "claude_code"
"""The tool whose blocks are shown when none is named: each vendor counts its own."""


class Refused(Exception):
    """An argument makes no sense; the text says which, what is expected and what was given."""


class Zone(NamedTuple):
    """A time zone as reports need it."""

    name: str
    offset: Offset


class Found(NamedTuple):
    """What the database holds for a report."""

    rows: list[Row]
    names: Names
    progress: report_store.Progress | None
    first_request: int | None = None
    block_begins: Sequence[int] = ()
    limits: Sequence[ShownLimit] = ()


def run(options: Namespace, environment: Mapping[str, str], home: str) -> int:
    """Print the report that is asked for; the exit code."""
    now = int(time.time())
    try:
        if options.active and options.kind != "blocks":
            raise Refused("--active is for blocks: claude-otel-bridge report blocks --active")
        place = find(vars(options), sys.platform, environment, home)
        zone = _zone(options.timezone, now)
        selection = _selection(options, _today(zone, now))
        found = read(place.state_dir, lambda connection: _ask(connection, options.kind, selection, zone, now))
    except Refused as error:
        sys.stderr.write(f"claude-otel-bridge: {error}\n")
        return os.EX_USAGE
    except Misplaced as error:
        sys.stderr.write(f"claude-otel-bridge: {error}\n")
        return os.EX_CONFIG
    except Unreadable as error:
        sys.stderr.write(f"claude-otel-bridge: {error}\n")
        return error.exit_code
    is_complete = _tell_progress(found.progress, place)
    _tell_unmatched(found.names, selection)
    scope = _scope(selection, zone, is_complete=is_complete)
    return _print(_rendered(options, found, selection, zone, scope, now))


def _print(text: str) -> int:
    """Write all of it to standard output; the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, "it is closed")
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        if sys.stdout is not None:  # what is left in it goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # a pager that was left
            return os.EX_OK
        sys.stderr.write(f"claude-otel-bridge: cannot write to standard output: {error.strerror}\n")
        return os.EX_IOERR
    return os.EX_OK


# --- what is asked for -----------------------------------------------------------------------------------------


def _zone(name: str | None, now: int) -> Zone:
    if name is None:
        return Zone(f"local time ({time.strftime('%Z', time.localtime(now))})", lambda at: time.localtime(at).tm_gmtoff)
    if name.upper() in ("UTC", "Z"):
        return Zone("UTC", lambda _: 0)
    import zoneinfo

    try:
        found = zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        expected = "expected a name such as Europe/Berlin or UTC"
        if not zoneinfo.available_timezones():
            expected = "this system has no time zones; install its package tzdata, or ask for UTC"
        raise Refused(f"--timezone {name}: {expected}") from None
    return Zone(name, lambda at: _offset(found, at))


def _offset(zone: tzinfo, at: int) -> int:
    offset = datetime.fromtimestamp(at, zone).utcoffset()
    return int(offset.total_seconds()) if offset is not None else 0


def _today(zone: Zone, now: int) -> date:
    return datetime.fromtimestamp(now + zone.offset(now), UTC).date()


def _selection(options: Namespace, today: date) -> Selection:
    since, until = _day("--since", options.since, today), _day("--until", options.until, today)
    if since is not None and until is not None and since > until:
        raise Refused(f"--since {since} is after --until {until}")
    projects = tuple(map(_path, options.project or ()))
    return Selection(since, until, tuple(options.tool or ()), projects, tuple(options.model or ()))


def _day(flag: str, text: str | None, today: date) -> date | None:
    """A day as 2026-11-28, 20261128, `today`, `yesterday` or `7d` (seven days, today included)."""
    if text is None:
        return None
    try:
        match text.lower():
            case "today":
                return today
            case "yesterday":
                return today - timedelta(days=1)
            case days if days.endswith("d") and days[:-1].isdecimal():
                return today - timedelta(days=max(0, int(days[:-1]) - 1))
        return date.fromisoformat(text)
    except (ValueError, OverflowError):
        raise Refused(f"{flag} {text}: expected a day such as 2026-11-28, 20261128, today, yesterday or 7d") from None


def _path(pattern: str) -> str:
    """A project's pattern; one that is written as a place on this machine becomes that place."""
    is_place = pattern.startswith((".", "~"))
    return os.path.realpath(os.path.expanduser(pattern)) if is_place else pattern  # noqa: PTH111  # a text stays one


def _scope(selection: Selection, zone: Zone, *, is_complete: bool) -> Scope:
    since, until = (day.isoformat() if day else "" for day in (selection.since, selection.until))
    named = (("tool", selection.tools), ("project", selection.projects), ("model", selection.models))
    filters = tuple(f"{name} {' or '.join(patterns)}" for name, patterns in named if patterns)
    return Scope(zone.name, since, until, filters, is_complete)


# --- what is found ---------------------------------------------------------------------------------------------


def _ask(connection: sqlite3.Connection, kind: str, selection: Selection, zone: Zone, now: int) -> Found:
    has_projects = kind in ("session", "project") or bool(selection.projects)
    names = report_store.names(connection, with_sessions=kind == "session", with_projects=has_projects)
    progress = report_store.progress(connection)
    begin, end = report_store.span(connection)
    if kind == "blocks":
        tools = _block_tools(selection, names)
        models = [number for number, model in names.models.items() if model.tool in tools]
        begins = report_store.block_begins(connection, models)
        by_block = report_store.by_block_and_project if has_projects else report_store.by_block
        first = report_store.first_request(connection, now - BLOCK_HOURS * 3600, now + 1, tools)
        limits = _limits(connection, tools, zone, now)
        return Found(list(by_block(connection, begins)), names, progress, first, begins, limits)
    parts = (reports.limited(part, selection) for part in reports.segments(begin, end, zone.offset))
    rows = [row for part in parts for row in _rows(connection, kind, part, has_projects=has_projects)]
    return Found(rows, names, progress)


def _rows(
    connection: sqlite3.Connection, kind: str, part: reports.Segment, *, has_projects: bool
) -> Iterator[Row]:  # fmt: skip
    if kind in PERIODS:
        by_day = report_store.by_day_and_project if has_projects else report_store.by_day
        return by_day(connection, part)
    if kind == "session":
        return report_store.by_session(connection, part.begin, part.end)
    by = report_store.by_project if has_projects else report_store.by_model
    return by(connection, part.begin, part.end)


def _limits(connection: sqlite3.Connection, tools: set[str], zone: Zone, now: int) -> list[ShownLimit]:
    """The official limits of these tools that have not begun anew since they were told."""
    resets = {limit[:3]: limit.value for limit in report_store.limits(connection, report_store.LIMIT_RESET)}
    found = []
    for limit in sorted(report_store.limits(connection, report_store.LIMIT_USED)):
        resets_at = int(resets.get(limit[:3], 0))
        if limit.tool in tools and (not resets_at or now < resets_at < now + 400 * 86_400):
            window = f"{limit.window} {limit.name}".strip()
            shown = _minute(zone, resets_at) if resets_at else ""
            found.append(ShownLimit(limit.tool, window, limit.value, shown, _minute(zone, limit.time // 10**9)))
    return found


def _block_tools(selection: Selection, names: Names) -> set[str]:
    tools = selection.tools or (BLOCKS_OF,)
    return {model.tool for model in names.models.values() if reports.is_named(model.tool, tools)}


def _tell_progress(progress: report_store.Progress | None, place: Place) -> bool:
    """Say on standard error what is not in the report yet; whether all is in it."""
    if progress is None:
        if place.transcripts:
            sys.stderr.write("No transcript has been looked at yet; these numbers are of metrics and events alone.\n")
        return not place.transcripts
    if progress.unsettled:
        goes_on = "" if is_running(place.state_dir) else " The bridge goes on with it when it runs."
        sys.stderr.write(
            f"History is still being read: {progress.files_done:,} of {progress.files:,} files,"
            f" {progress.bytes_done >> 20:,} of {progress.bytes >> 20:,} MiB; it is not in these numbers yet."
            f"{goes_on}\n"
        )
    return not progress.unsettled


def _tell_unmatched(names: Names, selection: Selection) -> None:
    """Say on standard error which pattern no known name matches."""
    for flag, patterns, known in (
        ("--tool", selection.tools, {model.tool for model in names.models.values()}),
        ("--model", selection.models, {model.name for model in names.models.values()}),
    ):
        for pattern in patterns:
            if not any(reports.is_named(name, (pattern,)) for name in known):
                shown = ", ".join(sorted(map(tables.plain, known))[:20]) or "none"
                sys.stderr.write(f"{flag} {tables.plain(pattern)}: nothing of that name was used; known are {shown}\n")


# --- what is shown ---------------------------------------------------------------------------------------------


def _rendered(options: Namespace, found: Found, selection: Selection, zone: Zone, scope: Scope, now: int) -> str:
    if options.kind == "blocks":
        return _blocks(options, found, selection, zone, scope, now)
    rows = reports.select(found.rows, found.names, selection)
    report = reports.report(options.kind, rows, found.names, lambda quarter: _minute(zone, quarter * QUARTER))
    if options.json:
        return tables.as_json(report, scope)
    return tables.as_csv(report) if options.csv else tables.text(report, scope, _width())


def _blocks(options: Namespace, found: Found, selection: Selection, zone: Zone, scope: Scope, now: int) -> str:
    selection = selection._replace(tools=selection.tools or (BLOCKS_OF,))
    rows = reports.select(found.rows, found.names, selection)
    chosen = [
        block
        for block in reports.blocks(found.block_begins, rows, now // 3600)
        if _is_within(block, selection, zone) and not (options.active and not _is_active(block, now))
    ]
    shown = [_shown(block, found, zone, now) for block in chosen]
    if options.active and not shown and not (options.json or options.csv):
        return "No block is active: the last five hours saw no use, or its block is over.\n"
    used = [one for one in shown if not one.block.is_gap]
    everything: Iterable[Row] = (row for one in used for row in one.block.rows)
    report = reports.summed("blocks", (one.entry for one in used), everything, found.names)
    scope = scope._replace(filters=_scope(selection, zone, is_complete=True).filters)
    if options.json:
        return tables.blocks_json(shown, found.limits, report, scope)
    return tables.blocks_csv(shown) if options.csv else tables.blocks_text(shown, found.limits, report, scope, _width())


def _is_within(block: Block, selection: Selection, zone: Zone) -> bool:
    if selection.since is None and selection.until is None:
        return True
    day = _today(zone, block.begin * 3600)
    return (selection.since or date.min) <= day <= (selection.until or date.max)


def _is_active(block: Block, now: int) -> bool:
    return not block.is_gap and block.begin * 3600 <= now < block.end * 3600


def _shown(block: Block, found: Found, zone: Zone, now: int) -> ShownBlock:
    start, end = (_minute(zone, hour * 3600) for hour in block[:2])
    burn = None
    if _is_active(block, now):
        first = max(found.first_request or 0, block.begin * 3600)
        burn = reports.burn(block, first, now)
    return ShownBlock(start, end, block, reports.entry((start, end), block.rows, found.names), burn)


def _minute(zone: Zone, at: int) -> str:
    day, seconds = divmod(at + zone.offset(at), DAY)
    return f"{reports.period('daily', day)} {_clock(seconds // 60)}"


@cache
def _clock(minute: int) -> str:
    return f"{minute // 60:02}:{minute % 60:02}"


def _width() -> int:
    """Columns of the terminal; where there is none, as many as there may be."""
    return columns(sys.maxsize)
