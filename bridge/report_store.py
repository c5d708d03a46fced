"""What reports ask of the database. Like the other stores, this knows SQL and nothing of what the rows mean.

Law: every question is answered from the rollups and adds up all that they hold, so that no two reports differ. Nothing
here is slower than a scan of them, and it starts fast.
"""

import sqlite3
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from bridge.reports import Model, Names, Row, Segment

LIMIT_USED, LIMIT_RESET = "ai.limit.used", "ai.limit.reset.timestamp"
"""The gauges of official limits: the part that is used, and when they begin anew (Unix seconds)."""
_AMOUNT = (
    "sum(requests), sum(input), sum(output), sum(cache_read), sum(cache_write_5m) + sum(cache_write_1h),"
    " sum(cache_write_1h), sum(input) + sum(output) + sum(cache_read) + sum(cache_write_5m) + sum(cache_write_1h),"
    " sum(cost), sum(unpriced)"
)
_PROJECT = "coalesce(nullif(project, 0), (select session.project from session where session.id = rollup.session), 0)"
"""What metrics alone saw of a session is of its project as well."""
_NEXT = (
    "select quarter / 4 from rollup where quarter >= {} and model in (select value from json_each(?1))"
    " and (requests or input or output or cache_read or cache_write_5m or cache_write_1h or cost)"
    " order by quarter limit 1"
)
_BLOCKS = (
    f"with recursive block(begin) as (select * from ({_NEXT.format('0')}) union all"
    f" select ({_NEXT.format('(begin + 5) * 4')}) from block where begin is not null)"
    " select begin from block where begin is not null"
)
"""Blocks of five hours: one seek for each, however much was used in it."""
_IN_BLOCKS = (
    "(select value as begin from json_each(?)) join rollup on quarter >= begin * 4 and quarter < (begin + 5) * 4"
)
_IN_TIME = "from rollup where quarter >= ? and quarter < ?"


class Progress(NamedTuple):
    """How far history is read; `unsettled`: something of it is in no report yet."""

    unsettled: bool
    files: int
    files_done: int
    bytes: int
    bytes_done: int


class Limit(NamedTuple):
    """What a gauge of an official limit said last, and when (Unix nanoseconds); `name` where a tool has several."""

    tool: str
    window: str
    name: str
    value: float
    time: int


def span(connection: sqlite3.Connection) -> tuple[int, int]:
    """The quarters [begin, end) that have usage."""
    # Asked for at once they would be looked for in all rows.
    ((first, last),) = connection.execute("select (select min(quarter) from rollup), (select max(quarter) from rollup)")
    return (0, 0) if first is None else (first, last + 1)


def by_day(connection: sqlite3.Connection, segment: Segment) -> Iterator[Row]:
    """By day since 1970 of the segment's offset."""
    sql = f"select (quarter * 900 + ?) / 86400, model, 0, 0, {_AMOUNT} {_IN_TIME} group by 1, 2"
    return _rows(connection.execute(sql, (segment.offset, segment.begin, segment.end)))


def by_day_and_project(connection: sqlite3.Connection, segment: Segment) -> Iterator[Row]:
    sql = f"select (quarter * 900 + ?) / 86400, model, {_PROJECT}, 0, {_AMOUNT} {_IN_TIME} group by 1, 2, 3"
    return _rows(connection.execute(sql, (segment.offset, segment.begin, segment.end)))


def block_begins(connection: sqlite3.Connection, models: Iterable[int]) -> list[int]:
    """The hours since 1970 with which blocks of these models begin: that of the first use after the last block."""
    return [begin for (begin,) in connection.execute(_BLOCKS, (_listed(models),))]


def by_block(connection: sqlite3.Connection, begins: Iterable[int]) -> Iterator[Row]:
    """By the hour that a block begins with, whoever used what in it."""
    sql = f"select begin, model, 0, 0, {_AMOUNT} from {_IN_BLOCKS} group by 1, 2"
    return _rows(connection.execute(sql, (_listed(begins),)))


def by_block_and_project(connection: sqlite3.Connection, begins: Iterable[int]) -> Iterator[Row]:
    sql = f"select begin, model, {_PROJECT}, 0, {_AMOUNT} from {_IN_BLOCKS} group by 1, 2, 3"
    return _rows(connection.execute(sql, (_listed(begins),)))


def _listed(numbers: Iterable[int]) -> str:
    """Numbers as a JSON array."""
    return f"[{', '.join(map(str, numbers))}]"


def by_session(connection: sqlite3.Connection, begin: int, end: int) -> Iterator[Row]:
    sql = f"select session, model, {_PROJECT}, max(quarter), {_AMOUNT} {_IN_TIME} group by 1, 2, 3"
    return _rows(connection.execute(sql, (begin, end)))


def by_project(connection: sqlite3.Connection, begin: int, end: int) -> Iterator[Row]:
    sql = f"select 0, model, {_PROJECT}, 0, {_AMOUNT} {_IN_TIME} group by 2, 3"
    return _rows(connection.execute(sql, (begin, end)))


def by_model(connection: sqlite3.Connection, begin: int, end: int) -> Iterator[Row]:
    sql = f"select 0, model, 0, 0, {_AMOUNT} {_IN_TIME} group by 2"
    return _rows(connection.execute(sql, (begin, end)))


def _rows(found: sqlite3.Cursor) -> Iterator[Row]:
    return map(Row._make, found)


def names(connection: sqlite3.Connection, *, with_sessions: bool, with_projects: bool) -> Names:
    """What the numbers stand for."""
    models = {
        number: Model(tool, name) for number, tool, name in connection.execute("select id, tool, name from model")
    }
    sessions = dict(connection.execute("select id, name from session")) if with_sessions else {}
    projects = dict(connection.execute("select id, text from label")) if with_projects else {}
    return Names(models, sessions, projects)


def first_request(connection: sqlite3.Connection, begin: int, end: int, tools: set[str]) -> int | None:
    """When the first request of these tools was made in [begin, end), Unix seconds; None where none is kept."""
    rows = connection.execute(
        "select model.tool, min(time) from usage join model on model.id = usage.model"
        " where time >= ? and time < ? and is_counted group by 1",
        (begin * 1000, end * 1000),
    )
    return min((time // 1000 for tool, time in rows if tool in tools), default=None)


def progress(connection: sqlite3.Connection) -> Progress | None:
    """How far history is read; None where no place of transcripts was looked at."""
    ((roots, unread),) = connection.execute("select count(*), sum(not looked) from root")
    ((files, size, files_done, done),) = connection.execute(
        "select count(*), coalesce(sum(history_end), 0), coalesce(sum(history >= history_end), 0),"
        " coalesce(sum(min(history, history_end)), 0) from transcript where history_end"
    )
    return Progress(unread > 0, files, files_done, size, done) if roots else None


def limits(connection: sqlite3.Connection, metric: str) -> list[Limit]:
    """The gauges of a metric by tool and window."""
    import json

    rows = connection.execute(
        "select labels, value, time from series join series_value using (id) join metric on metric.id = series.metric"
        " where metric.name = ? and kind = 'gauge' and typeof(value) in ('integer', 'real')",
        (metric,),
    )
    told = ((dict(json.loads(labels)), value, time) for labels, value, time in rows)
    return [
        Limit(pairs.get("tool", ""), pairs.get("window", ""), pairs.get("limit", ""), float(value), time)
        for pairs, value, time in told
    ]
