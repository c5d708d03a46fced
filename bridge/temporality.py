"""What one data point adds to its stream. Pure: values in, values out.

Delta points commute, so order is no evidence of anything; only an equal (start, time, value) is. A cumulative
run is one process counting from zero: its points add what they exceed the highest one by, in any order.
"""

import math
import struct
import zlib
from typing import NamedTuple

import msgspec

from bridge.model import DataPoint, Drop, Kind, Metric, Temporality, Value
from bridge.values import subtract

IDENTITY_BYTES = 8


class Run(NamedTuple):
    """One cumulative run of a stream: the highest value seen, and the times of its first and last point."""

    highest: Value
    first: int
    last: int


def refusal(metric: Metric, value: Value) -> Drop | None:
    """Why a value must not enter a sum, or None. A counter is permanent, so poison would be too."""
    match metric.kind:
        case Kind.GAUGE:
            return None
        case Kind.SUMMARY:
            return None if math.isfinite(_sum(value)) else Drop.NOT_FINITE
    if metric.temporality is Temporality.UNSPECIFIED:
        return Drop.NO_TEMPORALITY
    number = _sum(value)
    if not math.isfinite(number):
        return Drop.NOT_FINITE
    if metric.kind is Kind.COUNTER and number < 0:
        return Drop.NEGATIVE
    return None


def _sum(value: Value) -> int | float:
    return value if isinstance(value, int | float) else value.sum or 0.0


def delta_identity(stream: int, point: DataPoint) -> bytes:
    """The name of a delta point among those of one writer with one end time: the stream and a hash of the rest.

    Two different points collide only where writer, end and stream are equal, and then once in 2**32.
    """
    value = point.value
    if isinstance(value, float) or (isinstance(value, int) and -(2**53) <= value <= 2**53):
        packed = _START_AND_VALUE.pack(point.start, value)
    else:
        packed = _START.pack(point.start) + msgspec.msgpack.encode(value)
    return _IDENTITY.pack(stream, zlib.crc32(packed))


_START, _START_AND_VALUE, _IDENTITY = (struct.Struct(form) for form in ("<q", "<qd", "<II"))


def advance(run: Run | None, value: Value, time: int) -> tuple[Value, Run]:
    """What a cumulative point adds to its run, and the run after it."""
    if run is None:
        return value, Run(value, time, time)
    first, last = min(run.first, time), max(run.last, time)
    if _size(value) <= _size(run.highest):
        return 0, Run(run.highest, first, last)
    return subtract(value, run.highest), Run(value, first, last)


def begins_run(current: Run, value: Value, time: int) -> bool:
    """Whether a cumulative point without a start time begins a new run: lower than the current one, and later."""
    return _size(value) < _size(current.highest) and time > current.last


def _size(value: Value) -> int | float:
    return value if isinstance(value, int | float) else value.count
