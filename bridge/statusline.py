"""The command `statusline`: one line for Claude Code's status line, and a word to the bridge of the official limits.

Claude Code runs it up to three times a second with a JSON object on standard input and shows the first line that it
prints; with no line, or another exit code than 0, it shows nothing. So the law is: it answers at once, whatever is
missing or broken is left out, and it never fails. The line is printed before the bridge is told of anything; nobody
waits for the bridge's answer. Of the object only the members that are named here are looked at.
"""

import json
import sqlite3
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from bridge import place, report_store, reports
from bridge.database import Unreadable, is_running, read
from bridge.report_store import LIMIT_RESET, LIMIT_USED
from bridge.reports import BLOCK_HOURS, QUARTER, Block, Burn, Selection

TOOL = "claude_code"
REPEAT_SECONDS = 60
"""How long the bridge is not told again of a limit that has not changed."""
POST_SECONDS = 0.02
MAX_INPUT = 4 * 2**20
MAX_TEXT = 40
MAX_PERCENT = 150
"""Of a limit; the last request may lead beyond 100."""
_WINDOWS = {"five_hour": "5h", "seven_day": "7d", "seven_day_opus": "7d Opus", "seven_day_sonnet": "7d Sonnet"}


class Limit(NamedTuple):
    """An official limit: the part of it that is used, and when it begins anew (Unix seconds, 0 if that is not told)."""

    window: str
    used: float
    resets_at: float


class Spent(NamedTuple):
    """What the database says: nano-dollars of today, the block that is running, and the limits that are known."""

    today: int
    block: Block | None
    burn: Burn | None
    is_complete: bool
    known: list[report_store.Limit]


def main(environment: Mapping[str, str], home: str, flags: Mapping[str, Any] | None = None) -> int:
    """Print the line for what stands on standard input, then tell the bridge of limits; always 0."""
    now = time.time()
    told: dict[str, Any] = {}
    spent = None
    where = place.Place("", "", transcripts=True)
    try:
        told = _told()
        where = place.find(flags or {}, sys.platform, environment, home)
        spent = read(where.state_dir, lambda connection: look(connection, now))
    except (Unreadable, place.Misplaced):
        pass
    except Exception as error:  # a status line that ends with a traceback is shown as nothing
        sys.stdout.write(f"claude-otel-bridge: {type(error).__name__}; claude-otel-bridge doctor says more\n")
        return 0
    limits = limits_of(told, now)
    runs = bool(where.state_dir) and is_running(where.state_dir)
    text = line(told, limits, spent, now, runs=runs)
    with suppress(OSError, AttributeError):  # nobody reads it, or it is closed and None
        sys.stdout.buffer.write(text.encode(errors="replace") + b"\n")
        sys.stdout.flush()
    news = [limit for limit in limits if spent is None or is_news(limit, spent.known, now)]
    if news and runs:
        post(where.listen, body(news, now), environment.get("BRIDGE_TOKEN", "").strip())
    return 0


def _told() -> dict[str, Any]:
    """The object on standard input; empty for anything else."""
    if sys.stdin is None or sys.stdin.isatty():
        return {}
    try:
        told = json.loads(sys.stdin.buffer.read(MAX_INPUT))
    except (ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


# --- what is known ---------------------------------------------------------------------------------------------


def look(connection: sqlite3.Connection, now: float) -> Spent:
    """What was spent today and in this block of five hours, of Claude Code."""
    seconds = int(now)
    names = report_store.names(connection, with_sessions=False, with_projects=False)
    selection = Selection(tools=(TOOL,))
    zone = time.localtime(seconds)
    today = reports.day_of(seconds + zone.tm_gmtoff)
    begin = reports.first_quarter(today, lambda at: time.localtime(at).tm_gmtoff)
    end = seconds // QUARTER + 97
    rows = reports.select(report_store.by_model(connection, begin, end), names, selection)
    spent = reports.total(row.amount for row in rows).cost
    block = _running(connection, names, seconds)
    burn = None
    if block is not None:
        first = report_store.first_request(connection, block.begin * 3600, seconds + 1, {TOOL})
        burn = reports.burn(block, first or block.begin * 3600, seconds)
    progress = report_store.progress(connection)
    known = report_store.limits(connection, LIMIT_USED)
    return Spent(spent, block, burn, progress is None or not progress.unsettled, known)


def _running(connection: sqlite3.Connection, names: reports.Names, now: int) -> Block | None:
    """The block that `now` is in."""
    begins = report_store.block_begins(connection, [at for at, model in names.models.items() if model.tool == TOOL])
    current = [begin for begin in begins[-2:] if begin * 3600 <= now < (begin + BLOCK_HOURS) * 3600]
    for begin in current:
        rows = report_store.by_model(connection, begin * 4, (begin + BLOCK_HOURS) * 4)
        chosen = tuple(reports.select(rows, names, Selection(tools=(TOOL,))))
        return Block(begin, begin + BLOCK_HOURS, is_gap=False, rows=chosen)
    return None


def limits_of(told: Mapping[str, Any], now: float) -> list[Limit]:
    """The official limits in what Claude Code told, as ratios; those that have begun anew since are left out."""
    members = told.get("rate_limits")
    found = []
    for window, limit in members.items() if isinstance(members, dict) else ():
        percent = number(limit.get("used_percentage")) if isinstance(limit, dict) else None
        resets_at = (number(limit.get("resets_at")) if isinstance(limit, dict) else None) or 0
        is_over = resets_at != 0 and resets_at <= now
        if percent is not None and 0 <= percent <= MAX_PERCENT and not is_over and len(window) <= MAX_TEXT:
            found.append(Limit(window, round(percent / 100, 6), resets_at))
    return found


def number(value: Any) -> float | None:
    """A JSON number that is one."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e15 else None


# --- the line --------------------------------------------------------------------------------------------------


def line(told: Mapping[str, Any], limits: list[Limit], spent: Spent | None, now: float, *, runs: bool) -> str:
    """One line of what is known; never empty."""
    parts = [
        _text(_member(told, "model", "display_name")),
        _session(number(_member(told, "cost", "total_cost_usd"))),
        *(_spent(spent) if spent is not None else ()),
        _context(number(_member(told, "context_window", "used_percentage"))),
        *(_limit(limit, now) for limit in limits if limit.window in _WINDOWS),
        "" if runs else "bridge stopped",
    ]
    return " · ".join(part for part in parts if part) or "claude-otel-bridge: nothing is known yet"


def _member(told: Mapping[str, Any], table: str, key: str) -> Any:
    members = told.get(table)
    return members.get(key) if isinstance(members, dict) else None


def _text(value: Any) -> str:
    return "".join(filter(str.isprintable, value))[:MAX_TEXT] if isinstance(value, str) else ""


def _session(cost: float | None) -> str:
    return "" if cost is None else f"${cost:,.2f} session"


def _spent(spent: Spent) -> list[str]:
    today = f"${spent.today / 1e9:,.2f} today{'' if spent.is_complete else ' (history is still being read)'}"
    if spent.block is None or spent.burn is None:
        return [today]
    left = f"{spent.burn.minutes_left // 60}h{spent.burn.minutes_left % 60:02} left"
    return [today, f"${spent.block.amount.cost / 1e9:,.2f} block, ${spent.burn.cost_per_hour / 1e9:,.2f}/h, {left}"]


def _context(percent: float | None) -> str:
    return "" if percent is None else f"ctx {percent:.0f}%"


def _limit(limit: Limit, now: float) -> str:
    shown = f"{_WINDOWS[limit.window]} {limit.used * 100:.0f}%"
    if not now < limit.resets_at < now + 30 * 86_400:
        return shown
    form = "%H:%M" if limit.resets_at < now + 86_400 else "%a %H:%M"
    return f"{shown} until {time.strftime(form, time.localtime(limit.resets_at))}"


# --- a word to the bridge --------------------------------------------------------------------------------------


def is_news(limit: Limit, known: list[report_store.Limit], now: float) -> bool:
    """Whether the bridge has not heard of a limit's value lately."""
    return not any(
        (one.tool, one.window) == (TOOL, limit.window)
        and abs(one.value - limit.used) < 1e-9
        and now - one.time / 1e9 < REPEAT_SECONDS
        for one in known
    )


def body(limits: list[Limit], now: float) -> bytes:
    """The limits as gauges in an OTLP request."""

    def gauge(name: str, unit: str, text: str, values: list[tuple[str, float]]) -> dict[str, Any]:
        points = [
            {
                "timeUnixNano": str(int(now * 1e9)),
                "asDouble": value,
                "attributes": [_attribute("tool", TOOL), _attribute("window", window)],
            }
            for window, value in values
        ]
        return {"name": name, "unit": unit, "description": text, "gauge": {"dataPoints": points}}

    used = [(limit.window, limit.used) for limit in limits]
    resets = [(limit.window, limit.resets_at) for limit in limits if limit.resets_at]
    metrics = [
        gauge(LIMIT_USED, "1", "How much of a limit is used, 0 to 1.", used),
        gauge(LIMIT_RESET, "s", "When a limit begins anew, Unix time.", resets),
    ]
    resource = {"attributes": [_attribute("service.name", place.NAME)]}
    scopes = [{"scope": {"name": place.NAME}, "metrics": metrics if resets else metrics[:1]}]
    return json.dumps({"resourceMetrics": [{"resource": resource, "scopeMetrics": scopes}]}).encode()


def _attribute(key: str, value: str) -> dict[str, Any]:
    return {"key": key, "value": {"stringValue": value}}


def post(listen: str, content: bytes, token: str) -> None:
    """Send a body to the bridge on this machine, with `token` unless empty; whether it arrives is not found out."""
    import socket

    host, _, port = listen.rpartition(":")
    host = {"localhost": "127.0.0.1"}.get(host, host.strip("[]"))
    access = f"Authorization: Bearer {token}\r\n" if token.isprintable() and token else ""
    head = (
        f"POST /v1/metrics HTTP/1.1\r\nHost: {listen}\r\nContent-Type: application/json\r\n{access}"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    try:
        with socket.create_connection((host, int(port)), POST_SECONDS) as connection:
            connection.sendall(head.encode() + content)
    except (OSError, ValueError):
        return
