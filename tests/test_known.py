"""What was decoded before changes nothing: the decoder with its memory is held against protobuf's and JSON's own.

Bodies are put together from bytes, so that fields come in any order, twice, at their defaults, or not at all.
"""

import json
import struct
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import pytest
from google.protobuf.message import DecodeError as ProtobufDecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from bridge.model import Batch, DataPoint
from bridge.otlp import DecodeError, Encoding, Known, decode_metrics
from tests.recordings import ALL_REQUESTS

Plain = tuple[Any, ...]


def field(number: int, payload: bytes) -> bytes:
    """A length-delimited field; with 3 bytes of length, as some encoders write them, where they are not needed."""
    size = len(payload)
    return bytes([number << 3 | 2, size & 127 | 128, size >> 7 & 127 | 128, size >> 14]) + payload


def text(key: str, value: str) -> bytes:
    """An attribute."""
    return field(7, field(1, key.encode()) + field(2, field(1, value.encode())))


STARTS = [b"", b"\x11" + bytes(8), b"\x11" + struct.pack("<Q", 10**18), b"\x11" + b"\xff" * 8]
TIMES = [b"", b"\x19" + bytes(8), b"\x19" + struct.pack("<Q", 2 * 10**18)]
VALUES = [b"", b"\x21" + struct.pack("<d", 1.5), b"\x31" + struct.pack("<q", -7), b"\x21" + bytes(8)]
OTHERS = [
    text("type", "input"), text("type", "output"), text("model", "a"), text("prompt", "secret"), text("", ""),
    field(7, b""), field(7, b"\x0a\x03abc"), b"\x40\x00", b"\x40\x01", b"\x40\x02", field(5, b""),
    field(5, b"\x11" + bytes(8) + b"\x19" + struct.pack("<d", 2.0)), field(99 - 84, b"unknown"),
]  # fmt: skip
BROKEN = [b"\x3a", b"\x07", field(7, field(1, b"\xff")), field(7, b"\x0a\x7f"), b"\x11\x00"]

tails = st.lists(st.sampled_from(OTHERS), max_size=4).map(b"".join)
points = st.one_of(
    st.tuples(st.sampled_from(STARTS), st.sampled_from(TIMES), st.sampled_from(VALUES), tails).map(b"".join),
    st.tuples(st.sampled_from(STARTS[2:]), st.just(TIMES[2]), st.sampled_from(VALUES[1:3]), tails).map(b"".join),
    st.lists(st.sampled_from([*STARTS, *TIMES, *VALUES, *OTHERS]), max_size=8).map(b"".join),
)
shapes = st.sampled_from([b"", b"\x10\x01\x18\x01", b"\x10\x02", b"\x10\x09\x18\x01", b"\x10\x01\x10\x02\x18\x00"])


def sum_of(members: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """The `sum` of a metric."""
    body = st.tuples(st.lists(members.map(lambda point: field(1, point)), max_size=4).map(b"".join), shapes)
    return body.map(b"".join).map(lambda made: field(7, made))


GAUGE = field(5, field(1, VALUES[1]))
names = st.sampled_from([field(1, b"a"), field(1, b"b"), b"", field(1, b"\xff"), field(3, b"s"), field(2, b"text")])
# A sum that a gauge replaces is not looked at, so a broken point in it goes unnoticed: it is not made here.
metrics = st.one_of(
    st.lists(sum_of(points | st.sampled_from(BROKEN)) | names, max_size=4),
    st.lists(sum_of(points) | st.just(GAUGE) | names, max_size=4),
).map(b"".join)
scopes = st.sampled_from(
    [b"", field(1, field(1, b"scope")), field(1, field(2, b"1")), field(3, b"url"), field(3, b"\xfe")]
)
resources = st.sampled_from(
    [
        b"",
        field(1, field(1, text("service.name", "x")[4:])),
        field(1, b"\x10\x00"),
        field(1, field(1, field(1, b"\xff"))),
    ]
)


def repeated(number: int, inner: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return st.lists(inner.map(lambda body: field(number, body)), min_size=1, max_size=2).map(b"".join)


scope_metrics = st.lists(st.one_of(repeated(2, metrics), scopes), max_size=4).map(b"".join)
resource_metrics = st.lists(st.one_of(repeated(2, scope_metrics), resources), max_size=4).map(b"".join)
bodies = repeated(1, resource_metrics)


def shown(batch: Batch) -> list[Plain]:
    """A batch with nothing that compares unequal to itself."""
    return [*map(repr, batch.points), *map(repr, batch.refused)]  # type: ignore[list-item]  # text compares as well


def by_library(body: bytes) -> tuple[list[Plain], int]:
    """What protobuf's parser makes of the sums and gauges of a body, and the number of points without a value."""
    found: list[Plain] = []
    without = 0
    for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
        sender = {item.key: item.value.string_value for item in resource.resource.attributes}
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                is_sum = metric.WhichOneof("data") == "sum"
                read = metric.sum if is_sum else metric.gauge
                shape = (metric.sum.aggregation_temporality, metric.sum.is_monotonic) if is_sum else None
                named = (sender, scope.scope.name, scope.scope.version, metric.name, metric.unit, metric.description)
                for point in read.data_points:
                    which = point.WhichOneof("value")
                    is_late = max(point.start_time_unix_nano, point.time_unix_nano) >= 2**63
                    if is_late or (which is None and not point.flags & 1):
                        without += 1
                        continue
                    value = None if point.flags & 1 else getattr(point, which or "as_int")
                    texts = {item.key: item.value.string_value for item in point.attributes}
                    texts |= {"prompt": ""} if "prompt" in texts else {}
                    times = (point.start_time_unix_nano, point.time_unix_nano)
                    found.append(
                        (*named, shape, texts, *times, value, any(e.WhichOneof("value") for e in point.exemplars[:1]))
                    )
    return found, without


def by_decoder(batch: Batch) -> tuple[list[Plain], int]:
    """The same of what the decoder made."""
    return [_plain(point) for point in batch.points], len(batch.refused)


def _plain(point: DataPoint) -> Plain:
    metric = point.metric
    sender = {key: value if isinstance(value, str) else "" for key, value in metric.resource.attributes}
    shape = None if metric.kind.value == "gauge" else (metric.temporality.value, metric.kind.value == "counter")
    named = (sender, metric.scope.name, metric.scope.version, metric.name, metric.unit, metric.description)
    assert [*point.attributes] == sorted(point.attributes, key=itemgetter(0))
    texts = {key: value if isinstance(value, str) else "" for key, value in point.attributes}
    return (*named, shape, texts, point.start, point.time, point.value, point.exemplar is not None)


def _known_shape(expected: list[Plain]) -> list[Plain]:
    """A temporality that OTLP does not name is as good as none."""
    return [(*row[:6], row[6] and (row[6][0] if row[6][0] in (1, 2) else 0, row[6][1]), *row[7:]) for row in expected]


@settings(max_examples=150, deadline=None)
@given(st.lists(bodies, min_size=1, max_size=4))
def test_protobuf_with_a_memory_is_what_the_library_parses(given_bodies: Sequence[bytes]) -> None:
    known = Known()
    for body in [*given_bodies, *given_bodies]:
        try:
            expected = by_library(body)
        except ProtobufDecodeError:
            with pytest.raises(DecodeError):
                decode_metrics(body, Encoding.PROTOBUF, known=known)
            continue
        batch = decode_metrics(body, Encoding.PROTOBUF, known=known)
        found = by_decoder(batch)
        assert (found[0], found[1]) == (_known_shape(expected[0]), expected[1])
        assert shown(batch) == shown(decode_metrics(body, Encoding.PROTOBUF))


attribute_lists: st.SearchStrategy[Any] = st.sampled_from(
    [None, [], [{}], [{"key": "a", "value": {"stringValue": "x"}}], [{"key": "a", "value": {"intValue": "5"}}],
     [{"key": "prompt", "value": {"stringValue": "x"}}], [{"key": 1}], 5, {},
     [{"key": "a", "value": {"stringValue": 1}}], [{"key": "\ud800"}]]
)  # fmt: skip
json_points = st.fixed_dictionaries(
    {},
    optional={
        "attributes": attribute_lists,
        "startTimeUnixNano": st.sampled_from(["1", 1, 1.0, "x", None, -1, str(2**63), "0005", "\u0661"]),
        "timeUnixNano": st.sampled_from(["2", 2, True]),
        "asInt": st.sampled_from(["3", 3, 1.5, None]),
        "asDouble": st.sampled_from([1.5, "NaN", None, "1e3", []]),
        "flags": st.sampled_from([0, 1, "1", None, "x"]),
        "exemplars": st.sampled_from([None, [], [{"asDouble": 1}], [5]]),
        "ignored": st.just({"a": [1]}),
    },
)
json_data: st.SearchStrategy[Any] = st.fixed_dictionaries(
    {},
    optional={
        "dataPoints": st.lists(json_points | st.sampled_from([None, 5]), max_size=3) | st.sampled_from([None, {}]),
        "aggregationTemporality": st.sampled_from([1, "2", "AGGREGATION_TEMPORALITY_DELTA", None, 1.5]),
        "isMonotonic": st.sampled_from([True, False, None, 1]),
    },
)
json_metrics = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["a", "b", None, 1]),
        "unit": st.sampled_from(["s", None]),
        "sum": json_data | st.none(),
        "gauge": json_data | st.sampled_from([None, 5]),
    },
)
json_scopes = st.fixed_dictionaries(
    {},
    optional={
        "scope": st.sampled_from([None, {}, {"name": "s", "version": None}, {"name": 1}, []]),
        "metrics": st.lists(json_metrics, max_size=3) | st.sampled_from([None, 1]),
    },
)
json_resources = st.fixed_dictionaries(
    {},
    optional={
        "resource": st.fixed_dictionaries({"attributes": attribute_lists}) | st.sampled_from([None, {}, 5]),
        "scopeMetrics": st.lists(json_scopes, max_size=2),
    },
)


def outcome(body: bytes, known: Known) -> list[Plain] | str:
    try:
        return shown(decode_metrics(body, Encoding.JSON, known=known))
    except DecodeError as error:
        return str(error)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(json_resources, min_size=1, max_size=2), min_size=1, max_size=3))
def test_json_with_a_memory_is_what_it_is_without(exports: list[Any]) -> None:
    """A member in the other spelling makes the decoder take the body as it comes."""
    known = Known()
    for export in [*exports, *exports]:
        usual = json.dumps({"resourceMetrics": export}).encode()
        other = json.dumps({"resourceMetrics": export, "not_ours": 0}).encode()
        assert outcome(usual, known) == outcome(other, Known())


def test_recorded_exports_decode_the_same_the_second_time_and_come_from_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [request for request in ALL_REQUESTS if request.path == "/v1/metrics"]
    known = Known()
    first = [decode_metrics(r.decoded, Encoding(r.content_type), known=known) for r in requests]
    monkeypatch.setattr("bridge.otlp.protobuf_points._protobuf_point", None)
    monkeypatch.setattr("bridge.otlp.json_points.json_attributes", None)
    for request, batch in zip(requests, first, strict=True):
        assert shown(decode_metrics(request.decoded, Encoding(request.content_type), known=known)) == shown(batch)


def test_a_memory_that_is_full_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridge.otlp.points.MAX_KNOWN", 3_000)
    known = Known()
    for number in range(100):
        tail = text("session.id", str(number))
        body = field(1, field(2, field(2, field(7, field(1, STARTS[2] + TIMES[2] + VALUES[1] + tail)))))
        for _ in range(2):
            (point,) = decode_metrics(body, Encoding.PROTOBUF, known=known).points
            assert point.attributes == (("session.id", str(number)),)
        assert len(known.attributes) < 12
