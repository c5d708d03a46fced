"""The OTLP decoder: every form JSON may take, protobuf, their agreement, and bodies that are not OTLP at all.

Law under test: any bytes become a `Batch`, or raise `DecodeError` or `TooLarge`; never anything else. json_format,
protobuf's own reader of JSON, is the oracle.
"""

import base64
import gzip
import json
import math
import random
import re
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from bridge import otlp
from bridge.model import (
    Attributes,
    AttributeValue,
    Batch,
    DataPoint,
    Drop,
    Exemplar,
    ExponentialHistogram,
    Histogram,
    Kind,
    Metric,
    Refusal,
    Resource,
    Scope,
    Summary,
    Temporality,
    Typed,
    Value,
)
from bridge.otlp import (
    DecodeError,
    Encoding,
    Records,
    Signal,
    TooLarge,
    decode_logs,
    decode_metrics,
    decode_traces,
    decompress,
)
from bridge.tools.claude_code import EVENT_KEYS
from tests.recordings import ALL_REQUESTS

START, TIME = 1_795_235_255_603_000_000, 1_795_235_315_603_000_000
MAX_INT64 = 2**63 - 1
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
REAL_JSON = [r.decoded for r in ALL_REQUESTS if r.path == "/v1/metrics" and r.content_type == "application/json"]
REAL_PROTOBUF = [r.decoded for r in ALL_REQUESTS if r.path == "/v1/metrics" and r.content_type != "application/json"]


def request_of(*points: Any, name: Any = "claude_code.token.usage", **data: Any) -> dict[str, Any]:
    """A JSON request of one delta sum; `data` replaces members of the sum."""
    sum_ = {"aggregationTemporality": 1, "isMonotonic": True, "dataPoints": list(points), **data}
    metric = {"name": name, "unit": "tokens", "description": "d", "sum": sum_}
    scope = {"name": "com.anthropic.claude_code", "version": "2.1.329"}
    resource = {"attributes": [{"key": "service.name", "value": {"stringValue": "claude-code"}}]}
    return {"resourceMetrics": [{"resource": resource, "scopeMetrics": [{"scope": scope, "metrics": [metric]}]}]}


def point_of(**members: Any) -> dict[str, Any]:
    """A JSON data point with value 5; `members` replace or add, None stands as null."""
    times = {"startTimeUnixNano": str(START), "timeUnixNano": str(TIME)}
    value = {} if "asInt" in members or "asDouble" in members else {"asInt": "5"}
    return {**times, **value, **members}


def from_json(body: Any) -> Batch:
    return decode_metrics(body if isinstance(body, bytes) else json.dumps(body).encode(), Encoding.JSON)


def from_protobuf(body: dict[str, Any]) -> Batch:
    """The same request, made protobuf by json_format."""
    return decode_metrics(message_of(body).SerializeToString(), Encoding.PROTOBUF)


def message_of(body: dict[str, Any]) -> ExportMetricsServiceRequest:
    """The request as json_format reads it. Trace and span ids are base64 there, where OTLP has hex."""
    in_base64 = with_ids(body, lambda text: base64.b64encode(bytes.fromhex(text)).decode())
    return json_format.ParseDict(in_base64, ExportMetricsServiceRequest(), ignore_unknown_fields=True)


def with_ids(body: Any, convert: Callable[[str], str]) -> Any:
    if isinstance(body, dict):
        ids = {"traceId", "spanId", "trace_id", "span_id"}
        return {name: convert(member) if name in ids else with_ids(member, convert) for name, member in body.items()}
    return [with_ids(member, convert) for member in body] if isinstance(body, list) else body


def only_point(batch: Batch) -> DataPoint:
    assert batch.refused == []
    (point,) = batch.points
    return point


def assert_same(one: Batch, other: Batch) -> None:
    """Equal to the letter: NaN equals NaN here, and 5 is not 5.0."""
    assert repr(one) == repr(other)


# --- what a request says ---------------------------------------------------------------------------------------


def test_a_request_becomes_its_points() -> None:
    first = point_of(
        attributes=[{"key": "type", "value": {"stringValue": "input"}}, {"key": "a", "value": {"intValue": "7"}}]
    )
    batch = from_json(request_of(first, point_of(asDouble=0.25, flags=0)))
    metric = Metric(
        "claude_code.token.usage",
        Kind.COUNTER,
        Temporality.DELTA,
        "tokens",
        "d",
        Scope("com.anthropic.claude_code", "2.1.329"),
        Resource((("service.name", "claude-code"),)),
    )
    attributes = (("a", Typed("int", "7")), ("type", "input"))
    points = [DataPoint(metric, attributes, START, TIME, 5), DataPoint(metric, (), START, TIME, 0.25)]
    assert_same(batch, Batch(points, []))
    assert batch.points[0].metric is batch.points[1].metric


@pytest.mark.parametrize(
    ("data", "kind", "temporality"),
    [
        ({"sum": {"isMonotonic": True, "aggregationTemporality": 2}}, Kind.COUNTER, Temporality.CUMULATIVE),
        ({"sum": {"isMonotonic": False, "aggregationTemporality": 2}}, Kind.UPDOWN, Temporality.CUMULATIVE),
        ({"sum": {"aggregationTemporality": 1}}, Kind.UPDOWN, Temporality.DELTA),
        ({"sum": {"isMonotonic": True}}, Kind.COUNTER, Temporality.UNSPECIFIED),
        ({"sum": {"isMonotonic": True, "aggregationTemporality": 99}}, Kind.COUNTER, Temporality.UNSPECIFIED),
        ({"gauge": {}}, Kind.GAUGE, Temporality.UNSPECIFIED),
    ],
)
def test_kind_and_temporality(data: dict[str, Any], kind: Kind, temporality: Temporality) -> None:
    ((name, members),) = data.items()
    metric = {"name": "m", name: {**members, "dataPoints": [point_of()]}}
    body = {"resourceMetrics": [{"scopeMetrics": [{"metrics": [metric]}]}]}
    for batch in (from_json(body), from_protobuf(body)):
        found = only_point(batch).metric
        assert (found.kind, found.temporality) == (kind, temporality)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"resourceMetrics": []},
        {"resourceMetrics": None},
        {"resourceMetrics": [{}]},
        {"resourceMetrics": [{"scopeMetrics": []}]},
        {"resourceMetrics": [{"scopeMetrics": [{}]}]},
        {"resourceMetrics": [{"scopeMetrics": [{"metrics": [{}]}]}]},
        {"resourceMetrics": [{"scopeMetrics": [{"metrics": [{"name": "m"}]}]}]},
        {"resourceMetrics": [{"scopeMetrics": [{"metrics": [{"name": "m", "sum": {}}]}]}]},
        {"resourceMetrics": [{"scopeMetrics": [{"metrics": [{"name": "m", "futureKind": {"dataPoints": [{}]}}]}]}]},
    ],
    ids=json.dumps,
)
def test_a_request_without_points_is_empty(body: dict[str, Any]) -> None:
    assert from_json(body) == from_protobuf(body) == Batch([], [])


def test_a_point_without_recorded_value_has_none() -> None:
    body = request_of({"flags": 1, "timeUnixNano": "5"}, point_of(flags="1"), point_of(flags=2))
    for batch in (from_json(body), from_protobuf(body)):
        assert batch.refused == []
        assert [point.value for point in batch.points] == [None, None, 5]


def histogram_of(**members: Any) -> dict[str, Any]:
    """A JSON histogram point of 6 values in 3 buckets."""
    buckets = {"count": "6", "sum": 9.5, "explicitBounds": [1, 2.5], "bucketCounts": ["1", "2", 3]}
    return {"startTimeUnixNano": str(START), "timeUnixNano": str(TIME), **buckets, **members}


def exponential_of(**members: Any) -> dict[str, Any]:
    """A JSON exponential histogram point of 7 values, the empty buckets at the ends included."""
    positive, negative = {"offset": -2, "bucketCounts": ["0", "1", "3", 0]}, {"offset": 5, "bucketCounts": ["2"]}
    buckets = {"scale": 3, "zeroCount": "1", "zeroThreshold": 0.5, "positive": positive, "negative": negative}
    return {"timeUnixNano": str(TIME), "count": 7, "sum": 1.5, **buckets, **members}


def summary_of(**members: Any) -> dict[str, Any]:
    """A JSON summary point."""
    quantiles = [{"quantile": 0.9, "value": 8}, {"quantile": 0.5, "value": 4.5}]
    return {"timeUnixNano": str(TIME), "count": "2", "sum": 12.5, "quantileValues": quantiles, **members}


def metric_of(kind: str, *points: dict[str, Any]) -> dict[str, Any]:
    temporality = {} if kind in ("gauge", "summary") else {"aggregationTemporality": 2}
    metric = {"name": kind, kind: {"dataPoints": list(points), **temporality}}
    return {"resourceMetrics": [{"scopeMetrics": [{"metrics": [metric]}]}]}


@pytest.mark.parametrize(
    ("kind", "point", "value"),
    [
        ("histogram", histogram_of(), Histogram((1.0, 2.5), (1, 2, 3), 6, 9.5)),
        ("histogram", histogram_of(sum=None), Histogram((1.0, 2.5), (1, 2, 3), 6, None)),
        (
            "histogram",
            histogram_of(explicitBounds=[1, "Infinity"], bucketCounts=[2, 4]),
            Histogram((1.0,), (2, 4), 6, 9.5),
        ),
        ("histogram", histogram_of(explicitBounds=None, bucketCounts=None), Histogram((), (6,), 6, 9.5)),
        ("histogram", histogram_of(explicitBounds=[], bucketCounts=[6]), Histogram((), (6,), 6, 9.5)),
        ("exponentialHistogram", exponential_of(), ExponentialHistogram(3, 1, 0.5, -1, (1, 3), 5, (2,), 7, 1.5)),
        (
            "exponentialHistogram",
            {"timeUnixNano": "5", "count": "2", "zeroCount": 2, "scale": -1},
            ExponentialHistogram(-1, 2, 0.0, 0, (), 0, (), 2, None),
        ),
        ("summary", summary_of(), Summary(2, 12.5, ((0.5, 4.5), (0.9, 8.0)))),
        ("summary", {"timeUnixNano": "5"}, Summary(0, 0.0, ())),
    ],
)
def test_points_with_buckets(kind: str, point: dict[str, Any], value: Value) -> None:
    body = metric_of(kind, point)
    assert only_point(from_json(body)).value == value
    assert_same(from_json(body), from_protobuf(body))


@pytest.mark.parametrize(
    ("kind", "point"),
    [
        ("histogram", histogram_of(count=7)),
        ("histogram", histogram_of(bucketCounts=[1, 5])),
        ("histogram", histogram_of(bucketCounts=[])),
        ("histogram", histogram_of(explicitBounds=[2.5, 1])),
        ("histogram", histogram_of(explicitBounds=[1, 1])),
        ("histogram", histogram_of(explicitBounds=["NaN", 1])),
        ("histogram", histogram_of(count=2**64 - 1, bucketCounts=[0, 0, 2**64 - 1])),
        ("exponentialHistogram", exponential_of(count=8)),
        ("exponentialHistogram", exponential_of(scale=100)),
        ("exponentialHistogram", exponential_of(scale=-100)),
        ("exponentialHistogram", exponential_of(zeroThreshold="NaN")),
        ("exponentialHistogram", exponential_of(zeroThreshold=-1)),
    ],
)
def test_buckets_that_contradict_themselves(kind: str, point: dict[str, Any]) -> None:
    good = {"histogram": histogram_of(), "exponentialHistogram": exponential_of()}[kind]
    body = metric_of(kind, good, point, good)
    batch = from_json(body)
    assert batch.refused == [Refusal(Drop.MALFORMED, kind)]
    assert len(batch.points) == 2
    assert_same(batch, from_protobuf(body))


# --- forms of JSON ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "value"),
    [
        ({"asInt": 5}, 5),
        ({"asInt": "5"}, 5),
        ({"asInt": 5.0}, 5),
        ({"asInt": "-5"}, -5),
        ({"asInt": 0}, 0),
        ({"asInt": str(MAX_INT64)}, MAX_INT64),
        ({"asInt": MAX_INT64}, MAX_INT64),
        ({"asInt": "-9223372036854775808"}, -(2**63)),
        ({"asDouble": 67}, 67.0),
        ({"asDouble": 0.04239675}, 0.04239675),
        ({"asDouble": "12.5"}, 12.5),
        ({"asDouble": "1e3"}, 1000.0),
        ({"asDouble": "-0.5"}, -0.5),
        ({"asDouble": 0}, 0.0),
        ({"asDouble": 9007199254740993}, 9007199254740992.0),
        ({"asDouble": "NaN"}, math.nan),
        ({"asDouble": "Infinity"}, math.inf),
        ({"asDouble": "-Infinity"}, -math.inf),
        ({"asInt": None, "asDouble": 1.5}, 1.5),
        ({"asInt": 4, "asDouble": None}, 4),
    ],
)
def test_forms_of_a_value(members: dict[str, Any], value: float) -> None:
    body = request_of(point_of(**members))
    assert repr(only_point(from_json(body)).value) == repr(value)
    assert_same(from_json(body), from_protobuf(body))


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"asInt": None}, Drop.NO_VALUE),
        ({"asInt": None, "asDouble": None}, Drop.NO_VALUE),
        ({"asInt": 1, "asDouble": 1.0}, Drop.NO_VALUE),
        ({"asInt": 5.5}, Drop.MALFORMED),
        ({"asInt": "five"}, Drop.MALFORMED),
        ({"asInt": ""}, Drop.MALFORMED),
        ({"asInt": True}, Drop.MALFORMED),
        ({"asInt": [5]}, Drop.MALFORMED),
        ({"asInt": {"low": 5}}, Drop.MALFORMED),
        ({"asInt": str(2**63)}, Drop.MALFORMED),
        ({"asInt": 2**64}, Drop.MALFORMED),
        ({"asInt": "9" * 5000}, Drop.MALFORMED),
        ({"asDouble": "twelve"}, Drop.MALFORMED),
        ({"asDouble": ""}, Drop.MALFORMED),
        ({"asDouble": True}, Drop.MALFORMED),
        ({"asDouble": {}}, Drop.MALFORMED),
        ({"asDouble": 10**308 * 10}, Drop.MALFORMED),
        ({"timeUnixNano": "yesterday"}, Drop.MALFORMED),
        ({"timeUnixNano": -1}, Drop.MALFORMED),
        ({"timeUnixNano": str(2**63)}, Drop.MALFORMED),
        ({"startTimeUnixNano": [1]}, Drop.MALFORMED),
        ({"startTimeUnixNano": str(2**64)}, Drop.MALFORMED),
        ({"flags": "many"}, Drop.MALFORMED),
        ({"attributes": 5}, Drop.MALFORMED),
        ({"attributes": ["type"]}, Drop.MALFORMED),
        ({"attributes": [{"key": 5, "value": {"stringValue": "x"}}]}, Drop.MALFORMED),
        ({"attributes": [{"key": "a", "value": "x"}]}, Drop.MALFORMED),
        ({"attributes": [{"key": "a", "value": {"stringValue": 5}}]}, Drop.MALFORMED),
        ({"attributes": [{"key": "a", "value": {"boolValue": "yes"}}]}, Drop.MALFORMED),
        ({"attributes": [{"key": "a", "value": {"intValue": "x"}}]}, Drop.MALFORMED),
        ({"attributes": [{"key": "a", "value": {"doubleValue": "x"}}]}, Drop.MALFORMED),
        ({"attributes": [{"key": "a", "value": {"bytesValue": 5}}]}, Drop.MALFORMED),
        ({"attributes": [{"key": "a", "value": {"arrayValue": [1]}}]}, Drop.MALFORMED),
        ({"attributes": [{"key": "a", "value": {"kvlistValue": {"values": {"a": 1}}}}]}, Drop.MALFORMED),
    ],
    ids=lambda given: json.dumps(given)[:60] if isinstance(given, dict) else str(given),
)
def test_a_bad_point_is_refused_and_its_neighbours_are_not(members: dict[str, Any], reason: Drop) -> None:
    batch = from_json(request_of(point_of(asInt=1), point_of(**members), point_of(asInt=3)))
    assert batch.refused == [Refusal(reason, "claude_code.token.usage")]
    assert [point.value for point in batch.points] == [1, 3]


@pytest.mark.parametrize(
    ("form", "time"),
    [(TIME, TIME), (str(TIME), TIME), (1.7e18, 1_700_000_000_000_000_000), (0, 0), (None, 0), ("0", 0)],
)
def test_forms_of_a_time(form: Any, time: int) -> None:
    body = request_of(point_of(startTimeUnixNano=form, timeUnixNano=form))
    assert_same(from_json(body), from_protobuf(body))
    point = only_point(from_json(body))
    assert (point.start, point.time) == (time, time)


@pytest.mark.parametrize(
    ("form", "temporality"),
    [
        (1, Temporality.DELTA),
        (2, Temporality.CUMULATIVE),
        ("AGGREGATION_TEMPORALITY_DELTA", Temporality.DELTA),
        ("AGGREGATION_TEMPORALITY_CUMULATIVE", Temporality.CUMULATIVE),
        ("AGGREGATION_TEMPORALITY_UNSPECIFIED", Temporality.UNSPECIFIED),
        ("1", Temporality.DELTA),
        (1.0, Temporality.DELTA),
        (0, Temporality.UNSPECIFIED),
        (None, Temporality.UNSPECIFIED),
    ],
)
def test_forms_of_an_enum(form: Any, temporality: Temporality) -> None:
    body = request_of(point_of(), aggregationTemporality=form)
    assert only_point(from_json(body)).metric.temporality == temporality
    assert_same(from_json(body), from_protobuf(body))


@pytest.mark.parametrize(
    ("value", "want"),
    [
        ({"stringValue": "x"}, "x"),
        ({"stringValue": ""}, ""),
        ({"stringValue": 'a\n"\\\0é😀'}, 'a\n"\\\0é😀'),
        ({"boolValue": True}, Typed("bool", "true")),
        ({"boolValue": False}, Typed("bool", "false")),
        ({"intValue": 7}, Typed("int", "7")),
        ({"intValue": "7"}, Typed("int", "7")),
        ({"intValue": 7.0}, Typed("int", "7")),
        ({"intValue": "-9223372036854775808"}, Typed("int", "-9223372036854775808")),
        ({"doubleValue": 0.25}, Typed("double", "0.25")),
        ({"doubleValue": 3}, Typed("double", "3")),
        ({"doubleValue": "12.5"}, Typed("double", "12.5")),
        ({"doubleValue": "NaN"}, Typed("double", "NaN")),
        ({"doubleValue": "-Infinity"}, Typed("double", "-Infinity")),
        ({"doubleValue": 1e21}, Typed("double", "1e+21")),
        ({"doubleValue": 1e-7}, Typed("double", "1e-7")),
        ({"bytesValue": "AP8Q"}, Typed("bytes", "AP8Q")),
        ({"bytesValue": "-_-_"}, Typed("bytes", "+/+/")),
        ({"bytesValue": "AP8"}, Typed("bytes", "AP8=")),
        ({"bytesValue": ""}, Typed("bytes", "")),
        ({"arrayValue": {"values": [{"stringValue": "a"}, {"intValue": "1"}]}}, Typed("array", '["a",1]')),
        ({"arrayValue": {"values": [{}, {"boolValue": True}]}}, Typed("array", "[null,true]")),
        ({"arrayValue": {"values": [{"doubleValue": "NaN"}]}}, Typed("array", '["NaN"]')),
        ({"arrayValue": {}}, Typed("array", "[]")),
        (
            {
                "kvlistValue": {
                    "values": [{"key": "b", "value": {"intValue": 2}}, {"key": "a", "value": {"boolValue": False}}]
                }
            },
            Typed("kvlist", '{"a":false,"b":2}'),
        ),
        (
            {"kvlistValue": {"values": [{"key": "k", "value": {"arrayValue": {"values": [{"bytesValue": "AA=="}]}}}]}},
            Typed("kvlist", '{"k":["AA=="]}'),
        ),
        ({"kvlistValue": {"values": []}}, Typed("kvlist", "{}")),
        ({"stringValue": None, "intValue": 7}, Typed("int", "7")),
        ({"intValue": None}, Typed("empty", "")),
        ({}, Typed("empty", "")),
        (None, Typed("empty", "")),
    ],
    ids=lambda given: json.dumps(given)[:60] if isinstance(given, dict) else None,
)
def test_forms_of_an_attribute(value: Any, want: AttributeValue) -> None:
    body = request_of(point_of(attributes=[{"key": "k", "value": value}]))
    assert only_point(from_json(body)).attributes == (("k", want),)
    assert_same(from_json(body), from_protobuf(body))


def test_the_last_of_repeated_attribute_keys_counts() -> None:
    repeated: list[Any] = [{"key": "k", "value": {"stringValue": text}} for text in ("first", "second", "last")]
    body = request_of(point_of(attributes=repeated))
    body["resourceMetrics"][0]["resource"]["attributes"] = repeated
    point = only_point(from_json(body))
    assert point.attributes == point.metric.resource.attributes == (("k", "last"),)
    assert_same(from_json(body), from_protobuf(body))


def test_the_order_of_attributes_says_nothing() -> None:
    attributes = [{"key": key, "value": {"stringValue": key}} for key in "zamé"]
    bodies = [request_of(point_of(attributes=order)) for order in (attributes, attributes[::-1])]
    assert_same(from_json(bodies[0]), from_json(bodies[1]))
    assert_same(from_json(bodies[0]), from_protobuf(bodies[1]))


def every_object(value: Any) -> Iterator[dict[str, Any]]:
    """All JSON objects in a value, outermost first."""
    if isinstance(value, dict):
        yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from every_object(child)


FULL = request_of(
    point_of(
        attributes=[
            {"key": "type", "value": {"stringValue": "input"}},
            {"key": "flags", "value": {"arrayValue": {"values": [{"boolValue": True}, {"intValue": 1}]}}},
            {"key": "map", "value": {"kvlistValue": {"values": [{"key": "k", "value": {"doubleValue": 0.5}}]}}},
            {"key": "raw", "value": {"bytesValue": "AP8Q"}},
        ],
        flags=0,
        exemplars=[{"timeUnixNano": "7", "asInt": 1, "traceId": "00" * 16, "spanId": "00" * 8}],
    ),
    point_of(asDouble=1.5),
)
FULL["resourceMetrics"] += [
    *metric_of("gauge", point_of())["resourceMetrics"],
    *metric_of("histogram", histogram_of())["resourceMetrics"],
    *metric_of("exponentialHistogram", exponential_of())["resourceMetrics"],
    *metric_of("summary", summary_of())["resourceMetrics"],
]
"""A request with every kind of point and every member that is read."""


FULL_JSON = json.dumps(FULL).encode()


def test_the_full_request_is_whole() -> None:
    assert len(from_json(FULL).points) == 6
    assert_same(from_json(FULL), from_protobuf(FULL))


def test_unknown_members_are_ignored_at_every_depth() -> None:
    body = deepcopy(FULL)
    for found in list(every_object(body)):
        found.update(unknownMember={"deep": [1, {"x": None}]}, droppedAttributesCount=0, schemaUrl="", **{"": ""})
    assert_same(from_json(body), from_json(FULL))


def test_null_members_are_as_if_absent() -> None:
    body = deepcopy(FULL)
    names = ["schemaUrl", "metadata", "exemplars", "flags", "gauge", "histogram", "summary", "min", "max", "bytesValue"]
    for found in list(every_object(body)):
        found.update({name: None for name in names if name not in found})
    assert_same(from_json(body), from_json(FULL))


def snake(name: str) -> str:
    return re.sub("([A-Z])", lambda match: "_" + match[1].lower(), name)


def with_names(body: Any, rename: Callable[[str], str]) -> Any:
    if isinstance(body, dict):
        return {rename(name): with_names(member, rename) for name, member in body.items()}
    return [with_names(member, rename) for member in body] if isinstance(body, list) else body


def test_snake_case_names_are_read_as_well() -> None:
    body = with_names(FULL, snake)
    assert '"resource_metrics"' in json.dumps(body)
    assert_same(from_json(body), from_json(FULL))


def test_a_single_snake_case_name_is_read_as_well() -> None:
    def is_misread(name: str) -> bool:
        body = with_names(FULL, lambda found: snake(found) if found == name else found)
        return repr(from_json(body)) != repr(from_json(FULL))

    names = {name for found in every_object(FULL) for name in found}
    assert {name for name in names if is_misread(name)} == set()


def test_of_a_repeated_member_the_last_counts() -> None:
    text = json.dumps(request_of(point_of(asInt=5))).replace('"asInt": "5"', '"asInt": "4", "asInt": "5"')
    assert only_point(from_json(text.encode())).value == 5


@pytest.mark.parametrize(
    ("escaped", "text"),
    [
        (r"cut\ud83d", f"cut{REPLACEMENT}"),
        (r"\ude00cut", f"{REPLACEMENT}cut"),
        (r"a\uD83Db", f"a{REPLACEMENT}b"),
        (r"\ud83d\ud83d\ude00", f"{REPLACEMENT}😀"),
        (r"\ude00\ud83d", REPLACEMENT * 2),
        (r"\ud83d\ude00", "😀"),
        (r"\\ud83d", r"\ud83d"),
    ],
)
def test_half_a_surrogate_pair_loses_nothing(escaped: str, text: str) -> None:
    """Clients that cut text at a number of UTF-16 units send these."""
    marked = point_of(attributes=[{"key": "SURROGATE", "value": {"stringValue": "SURROGATE"}}])
    body = request_of(marked, point_of(asInt=7), name="SURROGATE")
    body["resourceMetrics"][0]["resource"]["attributes"][0]["value"]["stringValue"] = "SURROGATE"
    body["resourceMetrics"][0]["scopeMetrics"][0]["scope"]["name"] = "SURROGATE"
    body["resourceMetrics"][0]["unknownSURROGATE"] = ["SURROGATE"]
    batch = from_json(json.dumps(body).replace("SURROGATE", escaped).encode())
    first, second = batch.points
    assert (first.value, second.value, batch.refused) == (5, 7, [])
    assert first.attributes == ((text, text),)
    assert (first.metric.name, first.metric.scope.name, first.metric.resource.get("service.name")) == (text, text, text)


CONTENT_KEYS = (
    "prompt",
    "response",
    "body",
    "command",
    "tool_input",
    "tool_parameters",
    "tool_result",
    "error",
    "headers",
)


def test_content_does_not_leave_the_decoder() -> None:
    """The values of content-like keys are gone, but two streams that differ in nothing else stay two."""

    def decoded(secret: str) -> tuple[DataPoint, str]:
        attributes = [{"key": key, "value": {"stringValue": f"{secret}-{key}"}} for key in CONTENT_KEYS]
        body = request_of(point_of(attributes=[*attributes, {"key": "kept", "value": {"stringValue": "kept"}}]))
        body["resourceMetrics"][0]["resource"]["attributes"] += attributes
        assert_same(from_json(body), from_protobuf(body))
        return only_point(from_json(body)), repr(from_json(body))

    (one, one_text), (other, other_text) = decoded("canary"), decoded("siskin")
    assert ("kept", "kept") in one.attributes
    assert "canary" not in one_text
    assert "siskin" not in other_text
    assert one.attributes != other.attributes


@pytest.mark.parametrize("kind", ["arrayValue", "kvlistValue"])
def test_content_inside_of_an_attribute_does_not_leave_the_decoder(kind: str) -> None:
    inner: Any = {"values": [{"key": "prompt", "value": {"stringValue": "canary"}}]}
    value = {"kvlistValue": inner} if kind == "kvlistValue" else {"arrayValue": {"values": [{"kvlistValue": inner}]}}
    body = request_of(point_of(attributes=[{"key": "details", "value": value}]))
    assert "canary" not in repr(from_json(body))
    assert "canary" not in repr(from_protobuf(body))


# --- bodies that are not OTLP ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"garbage",
        b"null",
        b"true",
        b"5",
        b'"resourceMetrics"',
        b"[]",
        b"[{}]",
        b"{",
        b"{}{}",
        b"{} trailing",
        b"{}\0",
        b"\xef\xbb\xbf{}",
        "{}".encode("utf-16"),
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":-Infinity}',
        b"{'a':1}",
        b'{"a":1,}',
        b'{"a":01}',
        b'{"a":"\xff"}',
        b'{"a":"\n"}',
        b'{"a":"\\x"}',
        b'{"a":"\\ud83d",}',
        b'{"a":"\\ud83d","b":NaN}',
        b'{"a":"\\ud83d"} trailing',
        b'{"a":"\\ud83d","b":' + b"1" * 5000 + b"}",
        b'{"a":' + b"1" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"s":"\\ud83d","a":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"s":"\\ud83d","a":' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"as_int":' + b'{"a":' * 990 + b"1" + b"}" * 991,
    ],
    ids=lambda body: repr(body[:70]),
)
def test_what_is_not_an_otlp_request_in_json(body: bytes) -> None:
    with pytest.raises(DecodeError) as caught:
        from_json(body)
    assert str(caught.value)


@pytest.mark.parametrize(
    "body",
    [
        {"resourceMetrics": 5},
        {"resourceMetrics": "x"},
        {"resourceMetrics": {}},
        {"resourceMetrics": [5]},
        {"resourceMetrics": [None]},
        {"resourceMetrics": [[]]},
        {"resourceMetrics": [{"resource": 5, "scopeMetrics": [{}]}]},
        {"resourceMetrics": [{"resource": {"attributes": 5}}]},
        {"resourceMetrics": [{"resource": {"attributes": [5]}}]},
        {"resourceMetrics": [{"scopeMetrics": 5}]},
        {"resourceMetrics": [{"scopeMetrics": [5]}]},
        {"resourceMetrics": [{"scopeMetrics": [{"scope": [1], "metrics": [{}]}]}]},
        {"resourceMetrics": [{"scopeMetrics": [{"scope": {"name": 5}}]}]},
        {"resourceMetrics": [{"scopeMetrics": [{"metrics": 5}]}]},
        {"resourceMetrics": [{"scopeMetrics": [{"metrics": ["x"]}]}]},
        {"resourceMetrics": [{"scopeMetrics": [{"metrics": [{"sum": 5}]}]}]},
        request_of(point_of(), name=5),
        request_of(dataPoints=5),
        request_of(dataPoints="ab"),
        request_of(point_of(), isMonotonic="false"),
    ],
    ids=lambda body: json.dumps(body)[:120],
)
def test_what_has_the_wrong_type_above_the_points(body: dict[str, Any]) -> None:
    with pytest.raises(DecodeError) as caught:
        from_json(body)
    assert str(caught.value)


@pytest.mark.parametrize(
    "body",
    [
        b"garbage",
        b"{}",
        b"\xff" * 20,
        b"\x0a",
        b"\x0a\x05ab",
        b"\x0a" * 1000,
        b"\x08",
        json.dumps(FULL).encode(),
    ],
    ids=lambda body: repr(body[:40]),
)
def test_what_is_not_an_otlp_request_in_protobuf(body: bytes) -> None:
    with pytest.raises(DecodeError) as caught:
        decode_metrics(body, Encoding.PROTOBUF)
    assert str(caught.value)


def nested_protobuf(depth: int) -> bytes:
    """A request whose one point has an attribute of lists in lists, `depth` of them."""
    request = ExportMetricsServiceRequest()
    metric = request.resource_metrics.add().scope_metrics.add().metrics.add(name="m")
    value = metric.gauge.data_points.add(as_int=1).attributes.add(key="k").value
    for _ in range(depth):
        value = value.array_value.values.add()
    return request.SerializeToString()


def nested_json(depth: int) -> bytes:
    body = json.dumps(request_of(point_of(attributes=[{"key": "k", "value": "DEEP"}])))
    return body.replace('"DEEP"', '{"arrayValue":{"values":[' * depth + "]}}" * depth).encode()


def test_depth_is_bounded() -> None:
    """Deeper than anything real is an error of the body, however deep; never a crash."""
    for depth in (1, 20, 40):
        assert isinstance(outcome(nested_protobuf(depth), Encoding.PROTOBUF), Batch)
        assert isinstance(outcome(nested_json(depth), Encoding.JSON), Batch)
    for depth in (1000, 10_000, 100_000):
        assert isinstance(outcome(nested_json(depth), Encoding.JSON), DecodeError)
    for depth in (100, 300, 1000):
        assert isinstance(outcome(nested_protobuf(depth), Encoding.PROTOBUF), DecodeError)
    for depth in range(45, 400, 5):
        outcome(nested_json(depth), Encoding.JSON)
        outcome(nested_protobuf(depth), Encoding.PROTOBUF)


# --- size ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", list(Encoding))
def test_points_of_one_body_are_limited(encoding: Encoding) -> None:
    def body(count: int) -> bytes:
        if encoding is Encoding.JSON:
            return json.dumps(request_of(*[{"asInt": 1}] * count)).encode()
        request = ExportMetricsServiceRequest()
        data = request.resource_metrics.add().scope_metrics.add().metrics.add(name="m").gauge
        for _ in range(count):
            data.data_points.add(as_int=1)
        return request.SerializeToString()

    assert len(decode_metrics(body(otlp.MAX_POINTS), encoding).points) == otlp.MAX_POINTS == 20_000
    with pytest.raises(TooLarge, match="20000"):
        decode_metrics(body(otlp.MAX_POINTS + 1), encoding)


def test_refused_and_stale_points_count_against_the_limit() -> None:
    for point in ({}, {"asInt": "x"}, {"flags": 1}):
        with pytest.raises(TooLarge):
            from_json(request_of(*[point] * (otlp.MAX_POINTS + 1)))


PLAIN = b"counted once. " * 40
GZIP, DEFLATE = gzip.compress(PLAIN, mtime=0), zlib.compress(PLAIN)
RAW_DEFLATE = zlib.compressobj(wbits=-15)


@pytest.mark.parametrize(
    ("body", "encoding", "want"),
    [
        (PLAIN, "identity", PLAIN),
        (GZIP, "gzip", PLAIN),
        (DEFLATE, "deflate", PLAIN),
        (gzip.compress(b"", mtime=0), "gzip", b""),
        (zlib.compress(b""), "deflate", b""),
        (GZIP * 2, "gzip", PLAIN * 2),
        (GZIP * 4, "gzip", PLAIN * 4),
        (gzip.compress(b"", mtime=0) * 3 + GZIP, "gzip", PLAIN),
        (gzip.compress(b"x" * 4000, mtime=0), "gzip", b"x" * 4000),
        (GZIP * 5, "gzip", DecodeError),
        (b"", "gzip", DecodeError),
        (b"", "deflate", DecodeError),
        (PLAIN, "gzip", DecodeError),
        (PLAIN, "deflate", DecodeError),
        (DEFLATE, "gzip", DecodeError),
        (GZIP, "deflate", DecodeError),
        (RAW_DEFLATE.compress(PLAIN) + RAW_DEFLATE.flush(), "deflate", DecodeError),
        (GZIP + b"\0", "gzip", DecodeError),
        (GZIP + b"trailing", "gzip", DecodeError),
        (GZIP + GZIP[:-1], "gzip", DecodeError),
        (DEFLATE + b"\0", "deflate", DecodeError),
        (DEFLATE * 2, "deflate", DecodeError),
        (GZIP[:-8] + bytes(8), "gzip", DecodeError),
        (GZIP[:-4] + bytes(4), "gzip", DecodeError),
        (DEFLATE[:-4] + bytes(4), "deflate", DecodeError),
        (gzip.compress(b"x" * 4001, mtime=0), "gzip", TooLarge),
        (zlib.compress(b"x" * 4001), "deflate", TooLarge),
        (gzip.compress(b"x" * 2001, mtime=0) * 2, "gzip", TooLarge),
        (gzip.compress(bytes(100_000_000), 1, mtime=0), "gzip", TooLarge),
        (gzip.compress(b"x" * 4001, mtime=0)[:-8], "gzip", TooLarge),
    ],
)
def test_decompression_of_at_most_4000_bytes(body: bytes, encoding: str, want: bytes | type[Exception]) -> None:
    if isinstance(want, bytes):
        assert decompress(body, encoding, 4000) == want
    else:
        with pytest.raises(want):
            decompress(body, encoding, 4000)


def test_a_shortened_body_never_looks_like_a_whole_one() -> None:
    for body, encoding in ((GZIP, "gzip"), (DEFLATE, "deflate"), (gzip.compress(b"", mtime=0), "gzip")):
        for length in range(len(body)):
            with pytest.raises(DecodeError):
                decompress(body[:length], encoding, 4000)


def test_a_bomb_takes_no_memory() -> None:
    bomb = gzip.compress(bytes(100_000_000), 1, mtime=0)
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge):
            decompress(bomb, "gzip", 1 << 20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


# --- agreement -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", REAL_JSON[::7], ids=lambda body: f"{len(body)} bytes")
def test_a_recorded_body_is_the_same_in_both_encodings(body: bytes) -> None:
    batch = from_json(body)
    assert batch.points
    assert batch.refused == []
    assert_same(batch, from_protobuf(json.loads(body)))


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
INT64 = st.integers(-(2**63), MAX_INT64) | st.integers(-3, 2000)
FIXED64 = st.integers(0, 2**64 - 1) | st.integers(START, TIME)
BASE64 = st.binary(max_size=6).map(lambda data: base64.b64encode(data).decode())


def forms_of_integer(number: int) -> st.SearchStrategy[Any]:
    exact = [float(number)] if abs(number) <= 2**53 else []
    return st.sampled_from([number, str(number), *exact])


def forms_of_double(number: float) -> st.SearchStrategy[Any]:
    if not math.isfinite(number):
        return st.just("NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity")
    whole = [int(number)] if number.is_integer() and abs(number) < 1e15 and number != 0 else []
    return st.sampled_from([number, repr(number), *whole])


INTEGER = INT64.flatmap(forms_of_integer)
UNSIGNED = FIXED64.flatmap(forms_of_integer)
DOUBLE = st.floats().map(lambda number: number or 0.0).flatmap(forms_of_double)
ANY_VALUE: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.fixed_dictionaries({"stringValue": TEXT}),
        st.fixed_dictionaries({"boolValue": st.booleans()}),
        st.fixed_dictionaries({"intValue": INTEGER}),
        st.fixed_dictionaries({"doubleValue": DOUBLE}),
        st.fixed_dictionaries({"bytesValue": BASE64}),
        st.just({}),
    ),
    lambda inner: st.one_of(
        st.fixed_dictionaries({"arrayValue": st.fixed_dictionaries({"values": st.lists(inner, max_size=3)})}),
        st.fixed_dictionaries(
            {
                "kvlistValue": st.fixed_dictionaries(
                    {"values": st.lists(st.fixed_dictionaries({"key": TEXT, "value": inner}), max_size=3)}
                )
            }
        ),
    ),
    max_leaves=4,
)
KEYS = st.sampled_from(["type", "model", "session.id", "prompt", ""]) | TEXT
ATTRIBUTES = st.lists(st.fixed_dictionaries({"key": KEYS}, optional={"value": ANY_VALUE}), max_size=4)
NULLS = {"futureMember": st.just({"x": [1]}), "schemaUrl": st.none()}
NUMBER = st.one_of(
    st.fixed_dictionaries({"asInt": INTEGER}), st.fixed_dictionaries({"asDouble": DOUBLE}), st.just({"asInt": None})
)
EXEMPLARS = st.lists(
    NUMBER.flatmap(
        lambda number: st.fixed_dictionaries(
            {name: st.just(form) for name, form in number.items()},
            optional={
                "timeUnixNano": UNSIGNED,
                "traceId": st.binary(min_size=16, max_size=16).map(bytes.hex),
                "spanId": st.binary(min_size=8, max_size=8).map(bytes.hex),
            },
        )
    ),
    max_size=2,
)
SMALL = st.integers(0, 5).flatmap(forms_of_integer)
COUNTS = st.lists(SMALL, max_size=4)
BUCKETS = st.fixed_dictionaries({"bucketCounts": COUNTS}, optional={"offset": st.integers(-40, 40)})
HISTOGRAM = st.fixed_dictionaries(
    {"explicitBounds": st.lists(st.floats(-9, 9), max_size=3, unique=True).map(sorted) | st.lists(DOUBLE, max_size=3)},
    optional={"bucketCounts": COUNTS, "count": SMALL, "sum": DOUBLE, "min": DOUBLE, "max": st.none()},
)
EXPONENTIAL = st.fixed_dictionaries(
    {"scale": st.integers(-11, 21)},
    optional={"positive": BUCKETS, "negative": BUCKETS, "zeroCount": SMALL, "count": SMALL, "zeroThreshold": DOUBLE},
)
QUANTILES = st.lists(st.fixed_dictionaries({}, optional={"quantile": DOUBLE, "value": DOUBLE}), max_size=3)
SUMMARY = st.fixed_dictionaries({}, optional={"count": SMALL, "sum": DOUBLE, "quantileValues": QUANTILES})
COMMON = {
    "attributes": ATTRIBUTES,
    "startTimeUnixNano": UNSIGNED,
    "timeUnixNano": UNSIGNED,
    "flags": st.sampled_from([0, 1, 2, "0"]),
    **NULLS,
}


def points_of(value: st.SearchStrategy[Any], **members: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Lists of points: what is special to the kind, and what all have."""

    def with_common(own: dict[str, Any]) -> st.SearchStrategy[Any]:
        return st.fixed_dictionaries(
            {name: st.just(form) for name, form in own.items()}, optional={**COMMON, **members}
        )

    return st.lists(value.flatmap(with_common), min_size=1, max_size=3)


TEMPORALITY = st.sampled_from([0, 1, 2, "AGGREGATION_TEMPORALITY_DELTA", "AGGREGATION_TEMPORALITY_CUMULATIVE", None])
NUMBERS = points_of(NUMBER, exemplars=EXEMPLARS)
DATA = {
    "sum": {"dataPoints": NUMBERS, "aggregationTemporality": TEMPORALITY, "isMonotonic": st.booleans()},
    "gauge": {"dataPoints": NUMBERS},
    "histogram": {"dataPoints": points_of(HISTOGRAM, exemplars=EXEMPLARS), "aggregationTemporality": TEMPORALITY},
    "exponentialHistogram": {"dataPoints": points_of(EXPONENTIAL), "aggregationTemporality": TEMPORALITY},
    "summary": {"dataPoints": points_of(SUMMARY)},
}
NAMES = {"name": TEXT, "unit": TEXT, "description": TEXT, **NULLS}
METRIC = st.one_of(
    *(st.fixed_dictionaries({kind: st.fixed_dictionaries(data)}, optional=NAMES) for kind, data in DATA.items())
)
SCOPE = st.fixed_dictionaries({}, optional={"name": TEXT, "version": TEXT, "attributes": ATTRIBUTES})
METRICS = st.lists(METRIC, min_size=1, max_size=2)
SCOPE_METRICS = st.fixed_dictionaries({"metrics": METRICS}, optional={"scope": SCOPE, **NULLS})
RESOURCE = st.fixed_dictionaries({}, optional={"attributes": ATTRIBUTES})
RESOURCE_METRICS = st.fixed_dictionaries(
    {"scopeMetrics": st.lists(SCOPE_METRICS, min_size=1, max_size=2)}, optional={"resource": RESOURCE, **NULLS}
)
REQUEST = st.fixed_dictionaries({"resourceMetrics": st.lists(RESOURCE_METRICS, min_size=1, max_size=2)})
"""Requests in JSON, in every legal form that json_format reads."""

thorough = settings(max_examples=200, deadline=None, derandomize=True, database=None)


@thorough
@given(REQUEST, st.booleans())
def test_json_is_read_as_json_format_reads_it(body: dict[str, Any], in_snake_case: bool) -> None:
    sent = with_names(body, snake) if in_snake_case else body
    assert_same(from_json(sent), from_protobuf(sent))


@thorough
@given(REQUEST)
def test_a_protobuf_request_written_as_json_is_the_same(body: dict[str, Any]) -> None:
    message = message_of(body)
    written = with_ids(json_format.MessageToDict(message), lambda text: base64.b64decode(text).hex())
    assert_same(decode_metrics(message.SerializeToString(), Encoding.PROTOBUF), from_json(written))


@thorough
@given(st.text(st.characters(), max_size=6))
def test_any_utf16_text_of_a_client_is_read(text: str) -> None:
    """JavaScript's strings are UTF-16 units, paired or not."""
    body = request_of(point_of(attributes=[{"key": "k", "value": {"stringValue": text}}]))
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    assert only_point(from_json(body)).attributes == (("k", whole),)


EXEMPLAR = {
    "timeUnixNano": "7",
    "asDouble": 1.5,
    "traceId": "5B8EFFF798038103D269B633813FC60C",
    "spanId": "eee19b7ec3c1b174",
    "filteredAttributes": [{"key": "k", "value": {"stringValue": "x"}}],
}


def test_the_newest_exemplar_is_kept() -> None:
    """Trace and span ids are hex in OTLP's JSON, in either case."""
    older = {**EXEMPLAR, "timeUnixNano": 6, "asDouble": 2.5}
    body = request_of(point_of(exemplars=[older, EXEMPLAR, older]))
    found = only_point(from_json(body)).exemplar
    assert found == Exemplar(1.5, 7, "5b8efff798038103d269b633813fc60c", "eee19b7ec3c1b174")
    assert_same(from_json(body), from_protobuf(body))


# --- bodies out of true ----------------------------------------------------------------------------------------


def outcome(body: bytes, encoding: Encoding) -> Batch | DecodeError | TooLarge:
    """What becomes of any bytes; a batch that is not well formed fails here."""
    try:
        batch = decode_metrics(body, encoding)
    except (DecodeError, TooLarge) as error:
        return error
    for point in batch.points:
        assert type(point.value) in (int, float, type(None), Histogram, ExponentialHistogram, Summary)
        assert 0 <= point.start <= MAX_INT64
        assert 0 <= point.time <= MAX_INT64
        assert not isinstance(point.value, int) or -(2**63) <= point.value <= MAX_INT64
        assert point.exemplar is None or re.fullmatch(r"[0-9a-f]{0,32}", point.exemplar.trace_id)
        for attributes in (point.attributes, point.metric.resource.attributes):
            assert_well_formed(attributes)
        f"{point.metric.name}{point.metric.unit}{point.metric.description}{point.metric.scope}".encode()
    return batch


def assert_well_formed(attributes: Attributes) -> None:
    keys = [key for key, _ in attributes]
    assert keys == sorted(set(keys))
    for key, value in attributes:
        text = value if isinstance(value, str) else value.text
        assert type(key) is type(text) is str
        f"{key}{text}".encode()


WRONG: list[Any] = [None, True, 0, 5, -1, 1.5, "", "x", [], [5], ["x"], [None], [[]], {}, {"x": 1}, {"values": 5}]


def every_place(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, member in members:
        yield from every_place(member, (*path, name))


def replaced(value: Any, path: tuple[Any, ...], by: Any) -> Any:
    if not path:
        return by
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], by)
    return copy


def test_a_wrong_type_at_any_place_is_a_batch_or_an_error() -> None:
    for path in every_place(FULL):
        for wrong in WRONG:
            outcome(json.dumps(replaced(FULL, path, wrong)).encode(), Encoding.JSON)


def test_json_cut_at_any_byte_is_an_error() -> None:
    body = json.dumps(FULL).encode()
    for length in range(len(body)):
        assert isinstance(outcome(body[:length], Encoding.JSON), DecodeError)


def test_protobuf_cut_at_any_byte_is_a_batch_or_an_error() -> None:
    body = min(REAL_PROTOBUF, key=len)
    results = [outcome(body[:length], Encoding.PROTOBUF) for length in range(len(body))]
    assert results[0] == Batch([], [])
    assert all(isinstance(result, DecodeError) for result in results[1:])


@pytest.mark.parametrize("content", [b"\x80", b"\xc0\x80", b"\xed\xa0\xbd", b"\xff"])
def test_protobuf_text_that_is_not_utf8_is_an_error(content: bytes) -> None:
    body = min(REAL_PROTOBUF, key=len)
    at = body.index(b"claude-code")
    broken = body[:at] + (content * 11)[:11] + body[at + 11 :]
    assert isinstance(outcome(broken, Encoding.PROTOBUF), DecodeError)


WORDS = rb'null true 5 -1 1e999 NaN 9223372036854775808 18446744073709551616 [ ] { } , : " "x" \ \ud83d [[[[[[[['
FRAGMENTS = [*WORDS.split(), b"\0", b"\xff", b"\xff" * 10, b"\x0a\x00", b"\x80\x80\x80\x80\x01"]


def mutated(body: bytes, chance: random.Random) -> bytes:
    """The body with one to four small injuries."""
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(body) + 1)
        end = min(len(body), at + chance.choice([1, 1, 2, 8, 100]))
        match chance.randrange(6):
            case 0:
                body = body[:at] + bytes(byte ^ 1 << chance.randrange(8) for byte in body[at : at + 1]) + body[at + 1 :]
            case 1:
                body = body[:at] + body[end:]
            case 2:
                body = body[:at] + body[at:end] * 2 + body[end:]
            case 3:
                body = body[:at] + chance.choice(FRAGMENTS) + body[end:]
            case 4:
                body = body[:at] + chance.choice(FRAGMENTS) + body[at:]
            case 5:
                other = chance.randrange(len(body) + 1)
                body = body[:at] + body[other : other + end - at] + body[at:]
    return body


def json_mutated(body: bytes, chance: random.Random) -> bytes:
    """The body with a wrong value at one to three places, so that it still is JSON."""
    value = json.loads(body)
    for _ in range(chance.randint(1, 3)):
        value = replaced(value, chance.choice(list(every_place(value))), chance.choice(WRONG))
    return json.dumps(value).encode()


@pytest.mark.parametrize("seed", range(4))
def test_injured_bodies_are_batches_or_errors(seed: int) -> None:
    chance = random.Random(seed)
    outcomes: Counter[str] = Counter()
    small_json = sorted(REAL_JSON, key=len)[:20]
    in_protobuf = [
        *REAL_PROTOBUF,
        *(message_of(json.loads(body)).SerializeToString() for body in [*small_json, FULL_JSON]),
    ]
    in_json = [*REAL_JSON, FULL_JSON]
    for _ in range(1000):
        encoding = chance.choice(list(Encoding))
        body = chance.choice(in_json if encoding is Encoding.JSON else in_protobuf)
        outcomes[type(outcome(mutated(body, chance), encoding)).__name__] += 1
    for _ in range(100):
        outcomes[type(outcome(json_mutated(chance.choice(small_json), chance), Encoding.JSON)).__name__] += 1
    assert set(outcomes) == {"Batch", "DecodeError"}


# --- logs and traces -------------------------------------------------------------------------------------------


def log_request(*records: dict[str, Any]) -> dict[str, Any]:
    return {"resourceLogs": [{"scopeLogs": [{"logRecords": list(records)}]}]}


def span_request(*spans: dict[str, Any]) -> dict[str, Any]:
    return {"resourceSpans": [{"scopeSpans": [{"spans": list(spans)}]}]}


NAMED = {"attributes": [{"key": "event.name", "value": {"stringValue": "user_prompt"}}]}


@pytest.mark.parametrize(
    ("signal", "body", "names"),
    [
        (Signal.LOGS, {}, {}),
        (Signal.LOGS, {"resourceLogs": None}, {}),
        (Signal.LOGS, log_request(NAMED, NAMED, {}), {"user_prompt": 2, "": 1}),
        (Signal.LOGS, log_request({"eventName": "api_request"}), {"api_request": 1}),
        (Signal.LOGS, log_request({**NAMED, "eventName": "event src/telemetry.rs:737"}), {"user_prompt": 1}),
        (Signal.LOGS, log_request({"body": {"stringValue": "secret"}, "severityText": "secret"}), {"": 1}),
        (Signal.LOGS, log_request({"attributes": [{"key": "event.name", "value": {"intValue": 5}}]}), {"": 1}),
        (Signal.TRACES, {}, {}),
        (Signal.TRACES, span_request({"name": "a"}, {"name": "b"}, {"name": "a"}, {}), {"a": 2, "b": 1, "": 1}),
    ],
)
def test_logs_and_spans_are_counted_by_name(signal: Signal, body: dict[str, Any], names: dict[str, int]) -> None:
    kind = ExportLogsServiceRequest if signal is Signal.LOGS else ExportTraceServiceRequest
    message = json_format.ParseDict(body, kind())
    assert decode_names(json.dumps(body).encode(), Encoding.JSON, signal).counts == names
    assert decode_names(message.SerializeToString(), Encoding.PROTOBUF, signal).counts == names


def decode_names(body: bytes, encoding: Encoding, signal: Signal) -> Records:
    return (
        decode_logs(body, encoding, EVENT_KEYS) if signal is Signal.LOGS else decode_traces(body, encoding, frozenset())
    )


@pytest.mark.parametrize("encoding", Encoding)
def test_of_an_event_only_what_was_asked_for_leaves_the_decoder(encoding: Encoding) -> None:
    attributes = {"event.name": "tool_result", "tool_name": "Bash", "success": "true", "tool_parameters": "canary"}
    items = [{"key": key, "value": {"stringValue": text}} for key, text in attributes.items()]
    items.append({"key": "duration_ms", "value": {"intValue": "12"}})
    items.append({"key": "tool_use_id", "value": {"kvlistValue": {"values": []}}})
    record = {"attributes": items, "body": {"stringValue": "canary"}, "timeUnixNano": "7"}
    body = log_request(record, {"attributes": [{"key": "event.name", "value": {"stringValue": "hook_registered"}}]})
    sent = json.dumps(body).encode()
    if encoding is Encoding.PROTOBUF:
        sent = json_format.ParseDict(body, ExportLogsServiceRequest()).SerializeToString()
    (event,) = decode_logs(sent, encoding, EVENT_KEYS).events
    kept = {"event.name": "tool_result", "tool_name": "Bash", "success": "true", "duration_ms": 12}
    assert (event.name, event.attributes, event.time) == ("tool_result", kept, 7)


@pytest.mark.parametrize("encoding", Encoding)
def test_a_denied_resource_attribute_does_not_leave_the_decoder_of_logs(encoding: Encoding) -> None:
    body = log_request({"attributes": [{"key": "event.name", "value": {"stringValue": "tool_result"}}]})
    body["resourceLogs"][0]["resource"] = {"attributes": [{"key": "host.name", "value": {"stringValue": "canary"}}]}
    sent = json.dumps(body).encode()
    if encoding is Encoding.PROTOBUF:
        sent = json_format.ParseDict(body, ExportLogsServiceRequest()).SerializeToString()
    (event,) = decode_logs(sent, encoding, EVENT_KEYS, frozenset({"host.name"})).events
    assert "canary" not in repr(event.resource.attributes)
    (event,) = decode_logs(sent, encoding, EVENT_KEYS).events
    assert "canary" in repr(event.resource.attributes)


@pytest.mark.parametrize("path", ["/v1/logs", "/v1/traces"])
def test_recorded_logs_and_spans_have_names(path: str) -> None:
    signal = Signal(path.removeprefix("/v1/"))
    for request in ALL_REQUESTS:
        if request.path == path:
            names = decode_names(request.decoded, Encoding(request.content_type), signal)
            assert names.counts.total() > 0
            assert "" not in names.counts
            assert names.service in ("claude-code", "my-team")  # the latter was given by OTEL_SERVICE_NAME


def test_half_a_surrogate_pair_loses_no_log_record() -> None:
    body = log_request({**NAMED, "body": {"stringValue": "SURROGATE"}}, NAMED)
    text = json.dumps(body).replace("SURROGATE", r"cut\ud83d")
    assert decode_names(text.encode(), Encoding.JSON, Signal.LOGS).counts == {"user_prompt": 2}


@pytest.mark.parametrize("path", ["/v1/logs", "/v1/traces"])
def test_injured_logs_and_spans_are_names_or_errors(path: str) -> None:
    chance = random.Random(path)
    signal = Signal(path.removeprefix("/v1/"))
    recorded = [request for request in ALL_REQUESTS if request.path == path]
    failed = 0
    for _ in range(500):
        request = chance.choice(recorded)
        try:
            names = decode_names(mutated(request.decoded, chance), Encoding(request.content_type), signal)
        except (DecodeError, TooLarge):
            failed += 1
        else:
            assert all(type(name) is str for name in (names.service, *names.counts))
            "".join([names.service, *names.counts]).encode()
    assert 0 < failed < 500


@pytest.mark.parametrize("encoding", list(Encoding))
def test_an_event_of_an_absurd_time_has_none(encoding: Encoding) -> None:
    record = {"timeUnixNano": str(2**63), "eventName": "user_prompt"}
    body: dict[str, Any] = {"resourceLogs": [{"scopeLogs": [{"logRecords": [record]}]}]}
    data = json.dumps(body).encode()
    if encoding is Encoding.PROTOBUF:
        data = json_format.ParseDict(body, ExportLogsServiceRequest()).SerializeToString()
    (event,) = decode_logs(data, encoding, {"user_prompt": frozenset()}).events
    assert event.time == 0


@pytest.mark.parametrize("signal", [Signal.LOGS, Signal.TRACES])
def test_records_of_one_body_are_limited(signal: Signal) -> None:
    records: list[dict[str, Any]] = [{}] * (otlp.MAX_POINTS + 1)
    body = log_request(*records) if signal is Signal.LOGS else span_request(*records)
    with pytest.raises(TooLarge):
        decode_names(json.dumps(body).encode(), Encoding.JSON, signal)


# --- answers ---------------------------------------------------------------------------------------------------


def test_success_has_partial_success_only_when_points_were_refused() -> None:
    for signal in Signal:
        assert otlp.success(signal, Encoding.JSON) == b"{}"
        assert otlp.success(signal, Encoding.PROTOBUF) == b""
    message = 'refused: "é"'
    in_json = json.loads(otlp.success(Signal.METRICS, Encoding.JSON, 3, message))
    assert in_json == {"partialSuccess": {"rejectedDataPoints": "3", "errorMessage": message}}
    in_protobuf = ExportMetricsServiceResponse.FromString(otlp.success(Signal.METRICS, Encoding.PROTOBUF, 3, message))
    assert in_protobuf.partial_success.rejected_data_points == 3
    assert in_protobuf.partial_success.error_message == message
    for signal, member in ((Signal.LOGS, "rejectedLogRecords"), (Signal.TRACES, "rejectedSpans")):
        assert json.loads(otlp.success(signal, Encoding.JSON, 1, "m"))["partialSuccess"][member] == "1"
