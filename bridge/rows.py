"""Rows of the database as objects, and the checksums that prove them."""

import math
import sqlite3
import zlib
from sys import intern
from typing import Any, NamedTuple

import msgspec

from bridge.model import ExponentialHistogram, Histogram, Summary, Value, shared
from bridge.state import StoreUnavailable
from bridge.temporality import Run


class MetricRow(NamedTuple):
    id: int
    name: str
    kind: str
    unit: str
    scale: int
    description: str


class SeriesRow(msgspec.Struct, frozen=True, gc=False):
    """One series. Numbers are in 1/scale of the unit; what is shown is value - base. None: a gauge that has ended.

    One is made for nearly every point, which as a named tuple would take five times as long; so `fixed` keeps the
    checksum of all that a point leaves as it is.
    `expires` says whether it leaves when its sender is silent, `born` is the commit in which it appeared or came back
    and `birth` its time, `time` is the latest point's (gauges take the later one), `seen` the arrival of the last
    point in Unix milliseconds.
    """

    id: int
    metric: int
    job: str
    instance: str
    labels: tuple[tuple[str, str], ...]
    expires: bool
    base: Value
    born: int
    birth: int
    value: Value | None
    time: int
    seen: int
    fixed: int = 0


class StreamRow(NamedTuple):
    id: int
    series: int
    writer: int
    labelled: bytes


class WriterRow(NamedTuple):
    id: int
    latest: int
    forgotten: int


class TargetRow(NamedTuple):
    job: str
    instance: str
    attributes: tuple[tuple[str, str], ...]
    seen: int


class Snapshot(NamedTuple):
    """All that memory holds of the state, at one commit."""

    commits: int
    secret: bytes
    metrics: list[MetricRow]
    series: list[SeriesRow]
    totals: dict[str, int]
    targets: list[TargetRow]
    scrapers: dict[str, int]


PAIRS = msgspec.json.Decoder(tuple[tuple[str, str], ...])
SERIES = (
    "select series.id, metric, job, instance, labels, expires, base, born, birth, value, time, seen, series.proof,"
    " series_value.proof from series left join series_value on series_value.id = series.id"
)


def proof(row: tuple[Any, ...]) -> int:
    """The checksum that stands in a row beside what it proves."""
    return zlib.crc32(msgspec.msgpack.encode(row))


def proved(row: tuple[Any, ...]) -> tuple[Any, ...]:
    """A row without its checksum, which stands last. Raises StoreUnavailable when it is not what was written."""
    if proof(row[:-1]) != row[-1]:
        raise StoreUnavailable(f"database disk image is malformed: a row was changed: {row[:2]}")
    return row[:-1]


_VALUES = msgspec.msgpack.Decoder(Histogram | ExponentialHistogram | Summary)


def stored(value: Value | None) -> int | float | bytes | str | None:
    """A value as a column holds it: what is no number as bytes."""
    if type(value) is int:
        return value
    if isinstance(value, float) and math.isnan(value):
        return "NaN"  # SQLite would make it NULL
    return msgspec.msgpack.encode(value) if isinstance(value, msgspec.Struct) else value


def value_of(stored: Any) -> Any:
    """What `stored` made of a value."""
    if isinstance(stored, bytes):
        return _VALUES.decode(stored)
    return math.nan if stored == "NaN" else stored


def series_row(row: tuple[Any, ...]) -> SeriesRow:
    """A row of `SERIES` without its checksums."""
    series_id, metric, job, instance, labels, expires, base, born, birth, value, time, seen = row
    pairs = shared(PAIRS.decode(labels))
    fixed = (metric, intern(job), intern(instance), pairs, bool(expires), value_of(base), born, birth)
    return SeriesRow(series_id, *fixed, value_of(value), time, seen, proof(fixed))


def check_rows(connection: sqlite3.Connection) -> None:
    """Read what is served, and compare each row with its checksum. Raises StoreUnavailable."""
    for row in connection.execute(SERIES):
        proved_series(row)
    for row in connection.execute("select name, value, proof from total"):
        proved(row)
    for row in connection.execute("select model, kind, value, born, birth, proof from served"):
        proved(row)


def proved_series(row: tuple[Any, ...]) -> SeriesRow:
    """A row of `SERIES`. Raises StoreUnavailable when it is not what was written, or has no value."""
    try:
        series = series_row(row[:-2])
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise StoreUnavailable(f"database disk image is malformed: series {row[0]} cannot be read") from None
    if (series.fixed, value_proof(series)) != row[-2:]:
        raise StoreUnavailable(f"database disk image is malformed: a row was changed: series {row[0]}")
    return series


def fixed_of(row: SeriesRow) -> tuple[Any, ...]:
    """What a point leaves as it is."""
    return row.metric, row.job, row.instance, row.labels, row.expires, row.base, row.born, row.birth


def value_proof(row: SeriesRow) -> int:
    """The checksum of what a point changes, going on from that of the rest: a value of another series fails it."""
    return zlib.crc32(msgspec.msgpack.encode((row.value, row.time, row.seen)), row.fixed)


def run_row(row: tuple[Any, ...]) -> Run:
    """A row of the highest value, and the first and last time of a run."""
    return Run(value_of(row[0]), *row[1:])
