"""OTLP/HTTP bodies: bytes to data points and back to answers.

Law: any bytes become a value or raise `DecodeError` or `TooLarge`, never anything else. Sizes are bounded
before and after decompression and in points, so that no body can take more than about 150 MB for a moment.
Protobuf is parsed by protobuf's own C library; JSON by msgspec, because the protobuf library's json_format
is thirty times slower (it is the oracle of the tests). Sources: opentelemetry-proto 1.11 `docs/specification.md`
and the JSON mapping of protobuf 3 with OTLP's exceptions (hex ids, integer enums, unknown fields ignored).

Content-like attributes (`CONTENT_KEYS`) are replaced by a digest here: it tells two streams apart, names nothing.
"""

import base64
import json
import math
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from decimal import Decimal
from enum import StrEnum
from hashlib import blake2b
from itertools import islice, pairwise
from typing import Any, NamedTuple, NoReturn

import msgspec
from google.protobuf.message import DecodeError as ProtobufDecodeError
from google.protobuf.message import Message
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import (
    ExportLogsServiceRequest,
    ExportLogsServiceResponse,
)
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import InstrumentationScope, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import NumberDataPoint
from opentelemetry.proto.resource.v1.resource_pb2 import Resource as PbResource

from bridge.frame import MetricsRequest, NumberPoint
from bridge.model import (
    Attributes,
    AttributeValue,
    Batch,
    DataPoint,
    Drop,
    Event,
    EventValue,
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
from bridge.values import MAX_BUCKETS, coarsen, fit

MAX_POINTS = 20_000
"""Data points (or log records, or spans) in one body; a real export has at most a few hundred."""
MAX_OBJECTS = 400_000
"""Objects of any kind in one body: resources, scopes, metrics, points, attributes."""
BATCH_ADVICE = "lower the client's batch size (send_batch_max_size in a collector)"
SIZE_ADVICE = f"{BATCH_ADVICE} or raise limits.max_body_mib"
MAX_ATTRIBUTES = 10_000
"""Attributes of one resource or point; SDKs stop at 128."""
MAX_KNOWN = 32 * 2**20
"""Bytes of exports whose meaning is remembered, with KNOWN_OVERHEAD for each part: about 40,000 points, as of a
thousand sessions."""
KNOWN_OVERHEAD = 300
MAX_KNOWN_POINT = 4_096
"""Bytes of a point beyond which it is not remembered."""
MAX_GZIP_MEMBERS = 4
WIRE_PIECE, PIECE = 16 * 2**10, 256 * 2**10
"""Bytes that decompression takes and gives at a time, so that a bomb is found out before it has much memory."""
MAX_INT64 = 2**63 - 1
NO_RECORDED_VALUE = 1

CONTENT_KEYS = frozenset(
    {"prompt", "response", "body", "command", "tool_input", "tool_parameters", "tool_result", "error", "headers"}
    | {"process.command_args", "process.command_line"}
)
"""Attributes that can hold what a user or a model wrote; their values never leave this module."""
REDACTED = "redacted"
"""The `Typed.type` of a content-like attribute; its text is a digest."""


class DecodeError(ValueError):
    """The body is not what its headers say; the message says where and why, without quoting the body."""


class TooLarge(ValueError):
    """The body is larger than a limit, which the message names."""


class Encoding(StrEnum):
    """The two encodings of OTLP/HTTP, by their content type."""

    JSON = "application/json"
    PROTOBUF = "application/x-protobuf"


class Signal(StrEnum):
    """The signals of OTLP, by the last part of their path."""

    METRICS = "metrics"
    LOGS = "logs"
    TRACES = "traces"


# --- decompression ---------------------------------------------------------------------------------------------


def decompress(body: bytes, content_encoding: str, limit: int) -> bytes:
    """Undo gzip or deflate, to at most `limit` bytes.

    Truncated streams, bytes after the end and more than four gzip members are errors: a shortened body must
    never look like a whole one.
    """
    if content_encoding == "identity":
        return body
    window = 31 if content_encoding == "gzip" else 15
    pieces: list[bytes] = []
    size, rest = 0, memoryview(body)
    for _ in range(MAX_GZIP_MEMBERS):
        stream = zlib.decompressobj(window)
        while rest and not stream.eof:
            try:
                piece = stream.decompress(rest[:WIRE_PIECE], PIECE)
            except zlib.error as error:
                raise DecodeError(f"body is not {content_encoding}: {error}") from None
            size += len(piece)
            if size > limit:
                raise TooLarge(f"body is larger than {limit} bytes after decompression; {SIZE_ADVICE}")
            pieces.append(piece)
            rest = rest[min(len(rest), WIRE_PIECE) - len(stream.unconsumed_tail) - len(stream.unused_data) :]
        if not stream.eof:
            raise DecodeError(f"{content_encoding} body is truncated")
        if not rest:
            return b"".join(pieces)
        if content_encoding != "gzip":
            break
    raise DecodeError(f"{content_encoding} body has {len(rest)} bytes after its end")


# --- metrics ---------------------------------------------------------------------------------------------------


class _Sender(NamedTuple):
    """One resource and scope, and their metrics by name, description, unit, temporality and monotonicity."""

    resource: Resource
    scope: Scope
    metrics: dict[tuple[str, str, str, int, bool], Metric]


class _KnownResource(NamedTuple):
    """One resource, and its scopes by their bytes."""

    resource: Resource
    senders: dict[bytes, _Sender]


class Known:
    """What repeats from export to export, decoded once and looked up by its bytes; for one set of content keys.

    At most MAX_KNOWN bytes are remembered, and equal attributes share their memory; beyond that it begins anew.
    """

    def __init__(self) -> None:
        self.attributes: dict[bytes, Attributes] = {}
        self.pairs: dict[bytes, tuple[str, AttributeValue]] = {}
        self.resources: dict[bytes, _KnownResource] = {}
        self._pairs: dict[tuple[str, AttributeValue], tuple[str, AttributeValue]] = {}
        self._size = 0

    def note_attributes(self, raw: bytes, attributes: Attributes) -> Attributes:
        """Remember what some bytes mean."""
        self._take(len(raw))
        self.attributes[raw] = attributes
        return attributes

    def share(self, attributes: Attributes) -> Attributes:
        """The same attributes, sharing what is known of them."""
        return tuple([self._pairs.setdefault(pair, pair) for pair in attributes])

    def note_pair(self, raw: bytes, pair: tuple[str, AttributeValue]) -> tuple[str, AttributeValue]:
        """Remember what the bytes of one attribute mean; the points of a session differ in one or two."""
        self._take(len(raw))
        noted = self.pairs[raw] = self._pairs.setdefault(pair, pair)
        return noted

    def note_resource(self, raw: bytes, resource: Resource) -> _KnownResource:
        """Remember what the bytes of a resource mean."""
        self._take(len(raw))
        noted = self.resources[raw] = _KnownResource(resource, {})
        return noted

    def note_scope(self, owner: _KnownResource, raw: bytes, scope: Scope) -> _Sender:
        """Remember what the bytes of a scope of a resource mean."""
        self._take(len(raw))
        sender = owner.senders[raw] = _Sender(owner.resource, scope, {})
        return sender

    def note_metric(self, sender: _Sender, key: tuple[str, str, str, int, bool], metric: Metric) -> None:
        """Remember a metric of a sender."""
        self._take(len(key[0]) + len(key[1]) + len(key[2]))
        sender.metrics[key] = metric

    def _take(self, size: int) -> None:
        self._size += size + KNOWN_OVERHEAD
        if self._size > MAX_KNOWN:
            self.attributes.clear()
            self.pairs.clear()
            self.resources.clear()
            self._pairs.clear()
            self._size = size


def decode_metrics(
    body: bytes, encoding: Encoding, content_keys: Set[str] = CONTENT_KEYS, known: Known | None = None
) -> Batch:
    """The data points of an ExportMetricsServiceRequest; the values of `content_keys` do not leave this function.

    Points that are unusable for what they are stand in `Batch.refused`; their neighbours are not touched.
    `known` makes it faster and changes nothing else.
    """
    points: list[DataPoint] = []
    refused: list[Refusal] = []
    read = _json_points if encoding is Encoding.JSON else _protobuf_points
    try:
        for metric, attributes, start, time, value, exemplar in read(body, content_keys, known or Known()):
            if isinstance(value, Drop):
                refused.append(Refusal(value, metric.name))
            elif start > MAX_INT64 or time > MAX_INT64:
                refused.append(Refusal(Drop.MALFORMED, metric.name))
            else:
                points.append(DataPoint(metric, attributes, start, time, value, exemplar))
            if len(points) + len(refused) > MAX_POINTS:
                raise TooLarge(f"body has more than {MAX_POINTS} data points; {BATCH_ADVICE}")
    except ProtobufDecodeError as error:
        raise DecodeError(f"body is not a protobuf ExportMetricsServiceRequest: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError, OverflowError) as error:
        _raise_decode_error(error, "metrics", encoding)
    return Batch(points, refused)


_RawPoint = tuple[Metric, Attributes, int, int, Value | Drop | None, Exemplar | None]


def _raise_decode_error(error: Exception, what: str, encoding: Encoding) -> NoReturn:
    """Give foreign errors our name; they say the type of what was wrong, never its content."""
    if isinstance(error, DecodeError | TooLarge):
        raise error
    reason = "nested too deeply" if isinstance(error, RecursionError) else f"unexpected shape ({type(error).__name__})"
    raise DecodeError(f"body is not an OTLP {what} request in {encoding.value}: {reason}") from None


def _bound(messages: Sequence[Any]) -> None:
    """Refuse a body for what it holds before any of it is looked at."""
    if len(messages) > MAX_POINTS:
        raise TooLarge(f"body has more than {MAX_POINTS} resources, scopes, metrics or points; {BATCH_ADVICE}")


_EMPTY_MESSAGES = (b"\x0a\x00", b"\x12\x00", b"\x3a\x00")


def _parse_protobuf(message: Message, body: bytes) -> None:
    # Two bytes of body become up to 150 of memory when they are an empty message, so those are counted first.
    if len(body) > MAX_OBJECTS and sum(map(body.count, _EMPTY_MESSAGES)) > MAX_OBJECTS // 2:
        raise TooLarge(f"body is made of empty messages; {BATCH_ADVICE}")
    try:
        message.ParseFromString(body)
    except ProtobufDecodeError as error:
        raise DecodeError(f"body is not a protobuf {type(message).__name__}: {error}") from None


def _protobuf_points(body: bytes, content_keys: Set[str], known: Known) -> Iterator[_RawPoint]:
    request = MetricsRequest()
    _parse_protobuf(request, body)
    resources = request.resource_metrics  # type: ignore[attr-defined]  # the class is made at run time
    _bound(resources)
    for resource_metrics in resources:
        raw = b"".join(resource_metrics.resource)
        owner = known.resources.get(raw)
        if owner is None:
            attributes = PbResource.FromString(raw).attributes
            owner = known.note_resource(raw, Resource(_protobuf_attributes(attributes, content_keys)))
        _bound(resource_metrics.scope_metrics)
        for scope_metrics in resource_metrics.scope_metrics:
            raw = b"".join(scope_metrics.scope)
            sender = owner.senders.get(raw)
            if sender is None:
                scope = InstrumentationScope.FromString(raw)
                sender = known.note_scope(owner, raw, Scope(scope.name, scope.version))
            _bound(scope_metrics.metrics)
            for message in scope_metrics.metrics:
                data_kind = message.WhichOneof("data")
                if data_kind is None:
                    continue
                data = getattr(message, data_kind)
                _bound(data.data_points)
                if data_kind == "sum":
                    yield from _protobuf_sum(message, data, sender, content_keys, known)
                    continue
                kind, temporality = _kind(data_kind, getattr(data, "aggregation_temporality", 0), False)
                metric = Metric(
                    message.name, kind, temporality, message.unit, message.description, sender.scope, sender.resource
                )
                for point in data.data_points:
                    yield _protobuf_point(metric, point, content_keys)


def _protobuf_sum(
    message: Any, data: Any, sender: _Sender, content_keys: Set[str], known: Known
) -> Iterator[_RawPoint]:
    """The points of a sum. Most are a start, a time and a value as 27 bytes, and attributes that were seen before."""
    key = (message.name, message.description, message.unit, data.aggregation_temporality, data.is_monotonic)
    metric = sender.metrics.get(key)
    if metric is None:
        kind, temporality = _kind("sum", key[3], key[4])
        metric = Metric(key[0], kind, temporality, key[2], key[1], sender.scope, sender.resource)
        known.note_metric(sender, key, metric)
    for raw in data.data_points:
        attributes = None
        if len(raw) >= _HEAD and raw[0] == _START_TAG and raw[9] == _TIME_TAG and raw[18] in _HEADS:
            tail = raw[_HEAD:]
            attributes = known.attributes.get(tail)
            if attributes is None and len(raw) <= MAX_KNOWN_POINT:
                attributes = _known_attributes(tail, content_keys, known)
        if attributes is None:
            yield _protobuf_point(metric, NumberDataPoint.FromString(raw), content_keys)
        else:
            start, time, value = _HEADS[raw[18]].unpack_from(raw)
            yield metric, attributes, start, time, value, None


_START_TAG, _TIME_TAG = 0x11, 0x19
_HEADS = {0x21: struct.Struct("<xQxQxd"), 0x31: struct.Struct("<xQxQxq")}
"""Start, time and value as every known encoder writes them, by the tag of the value: as_double and as_int."""
_HEAD = 27
_ANY_HEAD = NumberDataPoint(start_time_unix_nano=1, time_unix_nano=1, as_double=1.0).SerializeToString()


def _known_attributes(tail: bytes, content_keys: Set[str], known: Known) -> Attributes | None:
    """What bytes mean that follow a point's start, time and value, from now on known; None where they change these, or
    mean more than attributes."""
    point: Any = NumberPoint.FromString(_ANY_HEAD + tail)
    head = (point.start_time_unix_nano, point.time_unix_nano, point.WhichOneof("value"), point.as_double)
    if point.exemplars or point.flags & NO_RECORDED_VALUE or head != (1, 1, "as_double", 1.0):
        return None
    found: dict[str, tuple[str, AttributeValue]] = {}
    for raw in point.attributes:
        pair = known.pairs.get(raw)
        if pair is None:
            ((key, value),) = _protobuf_attributes([KeyValue.FromString(raw)], content_keys)
            pair = known.note_pair(raw, (key, value))
        found[pair[0]] = pair
    return known.note_attributes(tail, tuple(sorted(found.values())))


def _protobuf_point(metric: Metric, point: Any, content_keys: Set[str]) -> _RawPoint:
    has_exemplar = metric.kind is not Kind.SUMMARY and point.exemplars
    return (
        metric,
        _protobuf_attributes(point.attributes, content_keys),
        point.start_time_unix_nano,
        point.time_unix_nano,
        None if point.flags & NO_RECORDED_VALUE else _PROTOBUF_VALUES[metric.kind](point),
        _protobuf_exemplar(point) if has_exemplar else None,
    )


def _protobuf_number(point: Any) -> int | float | Drop:
    which = point.WhichOneof("value")
    return getattr(point, which) if which else Drop.NO_VALUE


def _protobuf_histogram(point: Any) -> Histogram | Drop:
    total = point.sum if point.HasField("sum") else None
    return _histogram(tuple(point.explicit_bounds), tuple(point.bucket_counts), point.count, total)


def _protobuf_exponential(point: Any) -> ExponentialHistogram | Drop:
    total = point.sum if point.HasField("sum") else None
    return _exponential(
        point.scale, point.zero_count, point.zero_threshold, point.positive.offset,
        tuple(point.positive.bucket_counts), point.negative.offset, tuple(point.negative.bucket_counts), point.count,
        total,
    )  # fmt: skip


def _protobuf_summary(point: Any) -> Summary:
    return Summary(point.count, point.sum, _quantiles((q.quantile, q.value) for q in point.quantile_values))


_PROTOBUF_VALUES: dict[Kind, Callable[[Any], Value | Drop]] = {
    Kind.COUNTER: _protobuf_number,
    Kind.UPDOWN: _protobuf_number,
    Kind.GAUGE: _protobuf_number,
    Kind.HISTOGRAM: _protobuf_histogram,
    Kind.EXPONENTIAL: _protobuf_exponential,
    Kind.SUMMARY: _protobuf_summary,
}


def _protobuf_exemplar(point: Any) -> Exemplar | None:
    newest = max(point.exemplars, key=lambda exemplar: exemplar.time_unix_nano)
    which = newest.WhichOneof("value")
    if which is None:
        return None
    return Exemplar(
        float(getattr(newest, which)), newest.time_unix_nano, newest.trace_id.hex()[:32], newest.span_id.hex()[:16]
    )  # fmt: skip


_NOTHING = msgspec.Raw(b"null")


class _JsonObject(msgspec.Struct):
    """An object in OTLP's usual spelling; members of other names are ignored."""

    def get(self, name: str) -> Any:
        """A member, as of the dictionary that it would be otherwise."""
        return getattr(self, name)


class _JsonPoint(_JsonObject):
    """A number data point; attributes stay text until it is known whether they were seen before."""

    attributes: msgspec.Raw = _NOTHING
    startTimeUnixNano: Any = None  # noqa: N815  # OTLP's spelling, here and below
    timeUnixNano: Any = None  # noqa: N815
    asInt: Any = None  # noqa: N815
    asDouble: Any = None  # noqa: N815
    flags: Any = None
    exemplars: Any = None


class _JsonSum(_JsonObject):
    dataPoints: list[_JsonPoint] | None = None  # noqa: N815
    aggregationTemporality: Any = None  # noqa: N815
    isMonotonic: Any = None  # noqa: N815


class _JsonMetric(_JsonObject):
    name: Any = None
    description: Any = None
    unit: Any = None
    sum: _JsonSum | None = None
    gauge: Any = None
    histogram: Any = None
    exponentialHistogram: Any = None  # noqa: N815
    summary: Any = None


class _JsonScopeMetrics(_JsonObject):
    scope: msgspec.Raw = _NOTHING
    metrics: list[_JsonMetric] | None = None


class _JsonResourceMetrics(_JsonObject):
    resource: msgspec.Raw = _NOTHING
    scopeMetrics: list[_JsonScopeMetrics] | None = None  # noqa: N815


class _JsonRequest(_JsonObject):
    resourceMetrics: list[_JsonResourceMetrics] | None = None  # noqa: N815


_JSON_REQUEST = msgspec.json.Decoder(_JsonRequest)


def _json_points(body: bytes, content_keys: Set[str], known: Known) -> Iterator[_RawPoint]:
    _bound_json(body)
    if _SNAKE_MEMBER.search(body):
        return _any_json_points(body, content_keys)
    try:
        request = _JSON_REQUEST.decode(body)
        body.decode()  # text that was passed over must be UTF-8 as well
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return _any_json_points(body, content_keys)
    if request.resourceMetrics is None:
        return _any_json_points(body, content_keys)
    return _usual_json_points(request.resourceMetrics, content_keys, known)


def _usual_json_points(
    resources: Sequence[_JsonResourceMetrics], content_keys: Set[str], known: Known
) -> Iterator[_RawPoint]:
    """The points of a request in the usual spelling, looked up by the text of their attributes."""
    for resource_metrics in resources:
        raw = bytes(resource_metrics.resource)
        owner = known.resources.get(raw)
        if owner is None:
            owner = known.note_resource(raw, _json_resource(msgspec.json.decode(raw), content_keys))
        for scope_metrics in resource_metrics.scopeMetrics or ():
            raw = bytes(scope_metrics.scope)
            sender = owner.senders.get(raw)
            if sender is None:
                scope = msgspec.json.decode(raw) or {}
                sender = known.note_scope(owner, raw, Scope(_text(scope.get("name")), _text(scope.get("version"))))
            for message in scope_metrics.metrics or ():
                if message.sum is not None:
                    yield from _json_sum(message, message.sum, sender, content_keys, known)
                    continue
                data_kind = next((kind for kind in _DATA_KINDS if message.get(kind) is not None), None)
                if data_kind is not None:
                    data = message.get(data_kind)
                    metric = _json_metric(message, data_kind, data, sender.scope, sender.resource)
                    yield from _json_data_points(metric, data, content_keys)


def _json_sum(
    message: _JsonMetric, data: _JsonSum, sender: _Sender, content_keys: Set[str], known: Known
) -> Iterator[_RawPoint]:
    texts = (_text(message.name), _text(message.description), _text(message.unit))
    key = (*texts, _enum(data.aggregationTemporality), _bool(data.isMonotonic))
    metric = sender.metrics.get(key)
    if metric is None:
        kind, temporality = _kind("sum", key[3], key[4])
        metric = Metric(key[0], kind, temporality, key[2], key[1], sender.scope, sender.resource)
        known.note_metric(sender, key, metric)
    for point in data.dataPoints or ():
        raw = bytes(point.attributes)
        try:
            attributes = known.attributes.get(raw)
            if attributes is None:
                attributes = _json_attributes(msgspec.json.decode(raw), content_keys)
                if len(raw) <= MAX_KNOWN_POINT:
                    attributes = known.note_attributes(raw, known.share(attributes))
            yield _json_point(metric, attributes, point)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            yield metric, (), 0, 0, Drop.MALFORMED, None


def _any_json_points(body: bytes, content_keys: Set[str]) -> Iterator[_RawPoint]:
    """The points of a request in any spelling."""
    for resource_metrics in _members(_parse_json(body), "resourceMetrics"):
        resource = _json_resource(resource_metrics.get("resource"), content_keys)
        for scope_metrics in _members(resource_metrics, "scopeMetrics"):
            scope_object = scope_metrics.get("scope") or {}
            scope = Scope(_text(scope_object.get("name")), _text(scope_object.get("version")))
            for message in _members(scope_metrics, "metrics"):
                data_kind = next((kind for kind in _DATA_KINDS if message.get(kind) is not None), None)
                if data_kind is None:
                    continue
                yield from _json_data_points(
                    _json_metric(message, data_kind, message[data_kind], scope, resource),
                    message[data_kind],
                    content_keys,
                )


def _json_metric(message: Any, data_kind: str, data: Any, scope: Scope, resource: Resource) -> Metric:
    kind, temporality = _kind(data_kind, _enum(data.get("aggregationTemporality")), _bool(data.get("isMonotonic")))
    name, unit, description = (_text(message.get(member)) for member in ("name", "unit", "description"))
    return Metric(name, kind, temporality, unit, description, scope, resource)


def _json_data_points(metric: Metric, data: dict[str, Any], content_keys: Set[str]) -> Iterator[_RawPoint]:
    for point in _members(data, "dataPoints"):
        try:
            yield _json_point(metric, _json_attributes(point.get("attributes"), content_keys), point)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            yield metric, (), 0, 0, Drop.MALFORMED, None


def _json_point(metric: Metric, attributes: Attributes, point: Any) -> _RawPoint:
    return (
        metric,
        attributes,
        _unsigned(point.get("startTimeUnixNano")),
        _unsigned(point.get("timeUnixNano")),
        None if _unsigned(point.get("flags")) & NO_RECORDED_VALUE else _JSON_VALUES[metric.kind](point),
        _json_exemplar(point),
    )


_DATA_KINDS = ("sum", "gauge", "histogram", "exponentialHistogram", "summary")
_KINDS = {
    "gauge": Kind.GAUGE,
    "histogram": Kind.HISTOGRAM,
    "exponentialHistogram": Kind.EXPONENTIAL,
    "exponential_histogram": Kind.EXPONENTIAL,
    "summary": Kind.SUMMARY,
}


def _kind(data_kind: str, temporality: int, is_monotonic: bool) -> tuple[Kind, Temporality]:
    known = Temporality(temporality) if temporality in (1, 2) else Temporality.UNSPECIFIED
    if data_kind == "sum":
        return (Kind.COUNTER if is_monotonic else Kind.UPDOWN), known
    return _KINDS[data_kind], known


# --- attributes ------------------------------------------------------------------------------------------------


def _sorted_attributes(found: dict[str, AttributeValue], content_keys: Set[str]) -> Attributes:
    if not content_keys.isdisjoint(found):
        for key in content_keys & found.keys():
            found[key] = _redacted(found[key])
    return tuple(sorted(found.items()))


def _redacted(value: AttributeValue) -> Typed:
    return Typed(REDACTED, redacted_text(value if isinstance(value, str) else f"{value.type}\0{value.text}"))


def redacted_text(text: str) -> str:
    """What stands in the place of an attribute's text that must not be stored: the same for the same text."""
    return blake2b(text.encode(), digest_size=16).hexdigest()


def _array(values: Iterable[AttributeValue]) -> Typed:
    return _inner("array", [], list(values))


def _kvlist(members: dict[str, AttributeValue], content_keys: Set[str]) -> Typed:
    value = _inner("kvlist", list(members), list(members.values()))
    return value if content_keys.isdisjoint(members) else _redacted(value)


def _inner(kind: str, keys: list[str], values: list[AttributeValue]) -> Typed:
    """An array or map as JSON text; one with content anywhere inside is redacted as a whole."""
    plain = [_plain(value) for value in values]
    text = _json_text(dict(zip(keys, plain, strict=True)) if kind == "kvlist" else plain)
    value = Typed(kind, text)
    has_content = any(isinstance(inner, Typed) and inner.type == REDACTED for inner in values)
    return _redacted(value) if has_content else value


def _protobuf_attributes(items: Sequence[Any], content_keys: Set[str]) -> Attributes:
    if len(items) > MAX_ATTRIBUTES:
        raise TooLarge(f"body has more than {MAX_ATTRIBUTES} attributes in one place")
    found: dict[str, AttributeValue] = {}
    for item in items:
        value = item.value
        # An empty string is the default of the field, so the cheap test comes first and the oneof decides the rest.
        found[item.key] = value.string_value or _protobuf_value(value, content_keys)
    return _sorted_attributes(found, content_keys)


def _protobuf_value(value: Any, content_keys: Set[str]) -> AttributeValue:
    match value.WhichOneof("value"):
        case "string_value":
            return str(value.string_value)
        case "bool_value":
            return Typed("bool", "true" if value.bool_value else "false")
        case "int_value":
            return Typed("int", str(value.int_value))
        case "double_value":
            return Typed("double", double_text(value.double_value))
        case "bytes_value":
            return Typed("bytes", base64.b64encode(value.bytes_value).decode())
        case "array_value":
            return _array(_protobuf_value(item, content_keys) for item in value.array_value.values)
        case "kvlist_value":
            pairs = value.kvlist_value.values
            return _kvlist({pair.key: _protobuf_value(pair.value, content_keys) for pair in pairs}, content_keys)
        case _:
            return Typed("empty", "")


def _json_attributes(items: Any, content_keys: Set[str]) -> Attributes:
    found: dict[str, AttributeValue] = {}
    for item in items or ():
        value = item.get("value") or {}
        text = value.get("stringValue")
        found[_text(item.get("key"))] = text if type(text) is str else _json_value(value, content_keys)
    return _sorted_attributes(found, content_keys)


def _json_resource(value: Any, content_keys: Set[str] = CONTENT_KEYS) -> Resource:
    return Resource(_json_attributes((value or {}).get("attributes"), content_keys))


def _json_value(value: dict[str, Any], content_keys: Set[str]) -> AttributeValue:
    for kind, member in value.items():
        if member is None:
            continue
        match kind:
            case "stringValue":
                return _text(member)
            case "boolValue":
                return Typed("bool", "true" if _bool(member) else "false")
            case "intValue":
                return Typed("int", str(_int64(member)))
            case "doubleValue":
                return Typed("double", double_text(_double(member)))
            case "bytesValue":
                return Typed("bytes", base64.b64encode(_base64(member)).decode())
            case "arrayValue":
                return _array(_json_value(item or {}, content_keys) for item in member.get("values") or ())
            case "kvlistValue":
                pairs = member.get("values") or ()
                members = {_text(pair.get("key")): _json_value(pair.get("value") or {}, content_keys) for pair in pairs}
                return _kvlist(members, content_keys)
            case _:
                continue
    return Typed("empty", "")


def _plain(value: AttributeValue) -> Any:
    """An inner value as it stands in the JSON text of an array or map."""
    if isinstance(value, str):
        return value
    match value.type:
        case "empty":
            return None
        case "bytes" | "redacted":
            return value.text
        case "double" if value.text in ("NaN", "Infinity", "-Infinity"):
            return value.text
        case _:
            return msgspec.Raw(value.text.encode())


def _json_text(value: Any) -> str:
    return msgspec.json.encode(value, order="deterministic").decode()


def double_text(value: float) -> str:
    """A double as JSON writes it: `1`, `0.25`, `1e+21`; NaN and infinities by name."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    if value == 0:
        return "0"
    if 1e-6 <= abs(value) < 1e21:
        text = format(Decimal(repr(value)), "f")
        return text.rstrip("0").rstrip(".") if "." in text else text
    return repr(value).replace("e-0", "e-")


# --- JSON forms ------------------------------------------------------------------------------------------------

_SURROGATE = re.compile("[\ud800-\udfff]")
_SNAKE_MEMBER = re.compile(rb'_[a-z0-9_]+"\s*:')


def _bound_json(body: bytes) -> None:
    if len(body) > MAX_OBJECTS and body.count(b"{") > MAX_OBJECTS:
        raise TooLarge(f"body has more than {MAX_OBJECTS} JSON objects; {BATCH_ADVICE}")


def _parse_json(body: bytes) -> dict[str, Any]:
    """The root object, with all member names in lowerCamelCase."""
    _bound_json(body)
    try:
        root = msgspec.json.decode(body)
    except RecursionError:
        raise DecodeError("body is not JSON: nested too deeply") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        root = _parse_json_with_surrogates(body, error)
    if not isinstance(root, dict):
        raise DecodeError(f"body is not an OTLP request: the root is {type(root).__name__}, not an object")
    # Only lowerCamelCase is OTLP; the other spelling of protobuf's mapping is read as well.
    if _SNAKE_MEMBER.search(body):
        return _camel(root)  # type: ignore[no-any-return]  # a dict stays a dict
    return root


def _parse_json_with_surrogates(body: bytes, error: Exception) -> Any:
    """Clients that cut text at a number of UTF-16 units send half pairs; each becomes U+FFFD, nothing is lost."""
    reason = str(error) if isinstance(error, msgspec.MsgspecError) else "invalid UTF-8"
    if rb"\ud" not in body and rb"\uD" not in body:
        raise DecodeError(f"body is not JSON: {reason}") from None
    try:
        return _without_surrogates(json.loads(body.decode(), parse_constant=_refuse_constant))
    except RecursionError:
        raise DecodeError("body is not JSON: nested too deeply") from None
    except ValueError:
        raise DecodeError(f"body is not JSON: {reason}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _without_surrogates(value: Any) -> Any:
    match value:
        case str():
            return _SURROGATE.sub("\ufffd", value)
        case list():
            return [_without_surrogates(item) for item in value]
        case dict():
            return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
        case _:
            return value


def _camel(value: Any) -> Any:
    match value:
        case list():
            return [_camel(item) for item in value]
        case dict():
            return {_camel_name(key): _camel(item) for key, item in value.items()}
        case _:
            return value


def _camel_name(name: str) -> str:
    return re.sub(r"_([a-z])", lambda m: m[1].upper(), name)


def _members(value: dict[str, Any], name: str) -> list[dict[str, Any]]:
    members = value.get(name)
    if members is None:
        return []
    if not isinstance(members, list):
        raise DecodeError(f"{name} is {type(members).__name__}, not an array")
    return members


def _base64(value: Any) -> bytes:
    """Bytes in either alphabet of base64, with or without padding, as protobuf's JSON mapping takes them."""
    text = _text(value).rstrip("=").translate(_URL_SAFE)
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


_URL_SAFE = str.maketrans("-_", "+/")


def _text(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError("not a string")
    return value


def _integer(value: Any, low: int, high: int) -> int:
    """A 64-bit integer in any of its JSON forms: 5, "5", 5.0, "5.0", "5e0"."""
    match value:
        case None:
            return 0
        case bool():
            raise TypeError("not an integer")
        case int():
            number = value
        case str() if len(value) <= 40 and _JSON_NUMBER.fullmatch(value):
            number = int(value) if value.lstrip("-").isdecimal() else _integral(float(value))
        case float():
            number = _integral(value)
        case _:
            raise TypeError("not an integer")
    if not low <= number <= high:
        raise ValueError("out of range")
    return number


def _integral(value: float) -> int:
    if not value.is_integer():
        raise ValueError("not an integer")
    return int(value)


def _int64(value: Any) -> int:
    return _integer(value, -(2**63), MAX_INT64)


def _unsigned(value: Any) -> int:
    if value is None:
        return 0
    if type(value) is str and len(value) < 20 and value.isascii() and value.isdecimal():
        return int(value)
    return _integer(value, 0, 2**64 - 1)


def _double(value: Any) -> float:
    """A double in any of its JSON forms: 1, 1.5, "1.5", "NaN", "Infinity", "-Infinity"."""
    match value:
        case bool() | None:
            raise TypeError("not a number")
        case int() | float():
            return float(value)
        case "NaN" | "Infinity" | "-Infinity":
            return float(value)
        case str() if _JSON_NUMBER.fullmatch(value):
            return float(value)
        case _:
            raise TypeError("not a number")


_JSON_NUMBER = re.compile(r"-?[0-9]{1,400}(\.[0-9]{1,400})?([eE][+-]?[0-9]{1,4})?")
_TEMPORALITIES = {f"AGGREGATION_TEMPORALITY_{member.name}": member.value for member in Temporality}


def _enum(value: Any) -> int:
    """AggregationTemporality as number, decimal string or name; 0 for anything else."""
    if isinstance(value, str):
        return _TEMPORALITIES[value] if value in _TEMPORALITIES else int(value) if value.isdecimal() else 0
    return _integer(value, 0, MAX_INT64) if isinstance(value, int | float) else 0


def _bool(value: Any) -> bool:
    if value is not None and not isinstance(value, bool):
        raise TypeError("not a boolean")
    return bool(value)


def _json_number(point: dict[str, Any]) -> int | float | Drop:
    as_int, as_double = point.get("asInt"), point.get("asDouble")
    if as_int is None:
        return Drop.NO_VALUE if as_double is None else _double(as_double)
    return _int64(as_int) if as_double is None else Drop.NO_VALUE


def _json_histogram(point: dict[str, Any]) -> Histogram | Drop:
    return _histogram(
        tuple(_double(bound) for bound in point.get("explicitBounds") or ()),
        _counts(point.get("bucketCounts")),
        _unsigned(point.get("count")),
        _optional_double(point.get("sum")),
    )


def _json_exponential(point: dict[str, Any]) -> ExponentialHistogram | Drop:
    positive, negative = point.get("positive") or {}, point.get("negative") or {}
    return _exponential(
        _int32(point.get("scale")), _unsigned(point.get("zeroCount")), _double(point.get("zeroThreshold") or 0),
        _int32(positive.get("offset")), _counts(positive.get("bucketCounts")), _int32(negative.get("offset")),
        _counts(negative.get("bucketCounts")), _unsigned(point.get("count")), _optional_double(point.get("sum")),
    )  # fmt: skip


def _json_summary(point: dict[str, Any]) -> Summary:
    found = _members(point, "quantileValues")
    quantiles = _quantiles((_double(q.get("quantile") or 0), _double(q.get("value") or 0)) for q in found)
    return Summary(_unsigned(point.get("count")), _double(point.get("sum") or 0), quantiles)


_JSON_VALUES: dict[Kind, Callable[[dict[str, Any]], Value | Drop]] = {
    Kind.COUNTER: _json_number,
    Kind.UPDOWN: _json_number,
    Kind.GAUGE: _json_number,
    Kind.HISTOGRAM: _json_histogram,
    Kind.EXPONENTIAL: _json_exponential,
    Kind.SUMMARY: _json_summary,
}


def _json_exemplar(point: dict[str, Any]) -> Exemplar | None:
    if not point.get("exemplars"):
        return None
    newest = max(_members(point, "exemplars"), key=lambda exemplar: _unsigned(exemplar.get("timeUnixNano")))
    value = _json_number(newest)
    if isinstance(value, Drop):
        return None
    trace_id, span_id = (_hex(newest.get(name)) for name in ("traceId", "spanId"))
    return Exemplar(float(value), _unsigned(newest.get("timeUnixNano")), trace_id[:32], span_id[:16])


def _hex(value: Any) -> str:
    """An id, which OTLP/JSON writes in hex of either case."""
    text = _text(value).lower()
    return text if not text.strip("0123456789abcdef") else ""


def _optional_double(value: Any) -> float | None:
    return None if value is None else _double(value)


def _int32(value: Any) -> int:
    return _integer(value, -(2**31), 2**31 - 1)


def _counts(value: Any) -> tuple[int, ...]:
    return tuple(_unsigned(count) for count in value or ())


# --- histograms ------------------------------------------------------------------------------------------------

MAX_SCALE = 20
MIN_SCALE = -10
"""Scales of exponential histograms that the data model's SDKs use."""
MAX_COUNT = 2**53
MAX_QUANTILES = 100


def _histogram(bounds: tuple[float, ...], counts: tuple[int, ...], count: int, total: float | None) -> Histogram | Drop:
    """A consistent explicit histogram, or why it is none. One without buckets is one bucket up to +Inf."""
    if bounds and bounds[-1] == math.inf:
        bounds = bounds[:-1]
    if not counts and not bounds:
        counts = (count,)
    if len(counts) != len(bounds) + 1 or sum(counts) != count or count > MAX_COUNT:
        return Drop.MALFORMED
    if any(not low < high for low, high in pairwise((*bounds, math.inf))):
        return Drop.MALFORMED
    return coarsen(Histogram(bounds, counts, count, total))


def _exponential(
    scale: int, zero_count: int, zero_threshold: float, positive_offset: int, positive: tuple[int, ...],
    negative_offset: int, negative: tuple[int, ...], count: int, total: float | None,
) -> ExponentialHistogram | Drop:  # fmt: skip
    """A consistent exponential histogram without empty buckets at its ends, or why it is none."""
    positive_offset, positive = _trim(positive_offset, positive)
    negative_offset, negative = _trim(negative_offset, negative)
    if not MIN_SCALE <= scale <= MAX_SCALE or zero_count + sum(positive) + sum(negative) != count or count > MAX_COUNT:
        return Drop.MALFORMED
    if not 0 <= zero_threshold < math.inf:
        return Drop.MALFORMED
    histogram = ExponentialHistogram(
        scale, zero_count, zero_threshold, positive_offset, positive, negative_offset, negative, count, total
    )  # fmt: skip
    return fit(histogram, MAX_BUCKETS)


def _quantiles(found: Iterable[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Quantiles in order, each once, at most MAX_QUANTILES."""
    return tuple(sorted(dict(islice(found, MAX_QUANTILES)).items()))


def _trim(offset: int, counts: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    filled = [index for index, count in enumerate(counts) if count]
    if not filled:
        return 0, ()
    return offset + filled[0], counts[filled[0] : filled[-1] + 1]


# --- logs and traces -------------------------------------------------------------------------------------------


class Records(NamedTuple):
    """What a logs or traces request holds: how many records of which name, the first one's service.name, and the
    events or spans that were asked for."""

    service: str
    counts: Counter[str]
    events: list[Event]


EventKeys = Mapping[str, frozenset[str]]
"""Event name -> the attributes of it that may leave the decoder."""


class _Nesting(NamedTuple):
    """How a signal's request holds its records, by protobuf's names, and what a record's own members are called."""

    request: type[Message]
    resources: str
    scopes: str
    records: str
    name: str
    time: str
    start: str = ""
    parent: str = ""
    observed: str = ""


_LOGS = _Nesting(
    ExportLogsServiceRequest, "resource_logs", "scope_logs", "log_records", "event_name", "time_unix_nano",
    observed="observed_time_unix_nano",
)  # fmt: skip
_TRACES = _Nesting(
    ExportTraceServiceRequest, "resource_spans", "scope_spans", "spans", "name", "end_time_unix_nano",
    "start_time_unix_nano", "parent_span_id",
)  # fmt: skip


def decode_logs(body: bytes, encoding: Encoding, wanted: EventKeys, content_keys: Set[str] = CONTENT_KEYS) -> Records:
    """The log records by event name, and the `wanted` attributes of the events that `wanted` names.

    The attribute `event.name` goes before the record's own name, which some libraries fill with a place in the source.

    The values of `content_keys` in a resource do not leave this function.
    """
    return _decode_records(body, encoding, Signal.LOGS, wanted.get, content_keys)


def decode_traces(
    body: bytes, encoding: Encoding, wanted: frozenset[str], content_keys: Set[str] = CONTENT_KEYS
) -> Records:
    """The spans by name, and the `wanted` attributes of those that have any.

    The values of `content_keys` in a resource do not leave this function.
    """
    return _decode_records(body, encoding, Signal.TRACES, lambda _: wanted, content_keys)


_RawRecord = tuple[Resource, str, Event | None]
_KeysOf = Callable[[str], frozenset[str] | None]


def _decode_records(
    body: bytes, encoding: Encoding, signal: Signal, keys_of: _KeysOf, content_keys: Set[str]
) -> Records:
    read = _json_records if encoding is Encoding.JSON else _protobuf_records
    nesting = _LOGS if signal is Signal.LOGS else _TRACES
    names: Counter[str] = Counter()
    events: list[Event] = []
    service = ""
    try:
        for count, (resource, name, event) in enumerate(read(body, nesting, keys_of, content_keys), 1):
            if count > MAX_POINTS:
                raise TooLarge(f"body has more than {MAX_POINTS} records; {BATCH_ADVICE}")
            service = service or resource.get("service.name")
            names[name] += 1
            if event is not None and (event.attributes or signal is Signal.LOGS):
                events.append(event)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError, OverflowError) as error:
        _raise_decode_error(error, signal.value, encoding)
    return Records(service, names, events)


def _protobuf_records(body: bytes, nesting: _Nesting, keys_of: _KeysOf, content_keys: Set[str]) -> Iterator[_RawRecord]:
    request = nesting.request()
    _parse_protobuf(request, body)
    resources = getattr(request, nesting.resources)
    _bound(resources)
    for resource_records in resources:
        resource = Resource(_protobuf_attributes(resource_records.resource.attributes, content_keys))
        scopes = getattr(resource_records, nesting.scopes)
        _bound(scopes)
        for scope_records in scopes:
            records = getattr(scope_records, nesting.records)
            _bound(records)
            for record in records:
                named = (item.value.string_value for item in record.attributes if item.key == "event.name")
                own_name = getattr(record, nesting.name)
                name = own_name if nesting is _TRACES else next(named, "") or own_name
                keys = keys_of(name)
                event = None
                if keys is not None:
                    attributes = {
                        item.key: value
                        for item in record.attributes
                        if item.key in keys and (value := _protobuf_scalar(item.value)) is not None
                    }
                    start = getattr(record, nesting.start) if nesting.start else 0
                    parent = getattr(record, nesting.parent).hex() if nesting.parent else ""
                    trace, span = record.trace_id.hex(), record.span_id.hex()
                    time = getattr(record, nesting.time) or getattr(record, nesting.observed or nesting.time)
                    event = Event(name, attributes, _storable(time), resource, trace, span, parent, _storable(start))
                yield resource, name, event


def _protobuf_scalar(value: Any) -> EventValue | None:
    which = value.WhichOneof("value")
    return getattr(value, which) if which in ("string_value", "int_value", "double_value", "bool_value") else None


def _json_records(body: bytes, nesting: _Nesting, keys_of: _KeysOf, content_keys: Set[str]) -> Iterator[_RawRecord]:
    own = _Nesting(nesting.request, *map(_camel_name, nesting[1:]))
    for resource_records in _members(_parse_json(body), own.resources):
        resource = _json_resource(resource_records.get("resource"), content_keys)
        for scope_records in _members(resource_records, own.scopes):
            for record in _members(scope_records, own.records):
                items = record.get("attributes") or ()
                named = ((i.get("value") or {}).get("stringValue") for i in items if i.get("key") == "event.name")
                own_name = record.get(own.name)
                name = _text(own_name if nesting is _TRACES else next(named, "") or own_name)
                keys = keys_of(name)
                event = None
                if keys is not None:
                    attributes = {
                        key: value
                        for item in items
                        if (key := item.get("key")) in keys and (value := _json_scalar(item.get("value"))) is not None
                    }
                    trace, span, parent = (_hex(record.get(id_)) for id_ in ("traceId", "spanId", own.parent))
                    time, start = (_unsigned(record.get(member)) for member in (own.time, own.start))
                    time = time or _unsigned(record.get(own.observed))
                    event = Event(name, attributes, _storable(time), resource, trace, span, parent, _storable(start))
                yield resource, name, event


def _storable(time: int) -> int:
    """A time that a database can hold; what an event tells counts also where its time is absurd."""
    return time if time <= MAX_INT64 else 0


def _json_scalar(value: Any) -> EventValue | None:
    for kind, member in (value or {}).items():
        if member is None:
            continue
        match kind:
            case "stringValue":
                return _text(member)
            case "boolValue":
                return _bool(member)
            case "intValue":
                return _int64(member)
            case "doubleValue":
                return _double(member)
            case _:
                continue
    return None


# --- answers ---------------------------------------------------------------------------------------------------


def success(signal: Signal, encoding: Encoding, rejected: int = 0, message: str = "") -> bytes:
    """The body of a 200: an Export*ServiceResponse, with partialSuccess only when something was rejected."""
    if not rejected:
        return b"{}" if encoding is Encoding.JSON else b""
    if encoding is Encoding.JSON:
        member = {
            Signal.METRICS: "rejectedDataPoints",
            Signal.LOGS: "rejectedLogRecords",
            Signal.TRACES: "rejectedSpans",
        }[signal]
        return msgspec.json.encode({"partialSuccess": {member: str(rejected), "errorMessage": message}})
    response: Message
    match signal:
        case Signal.METRICS:
            response = ExportMetricsServiceResponse()
            response.partial_success.rejected_data_points = rejected
            response.partial_success.error_message = message
        case Signal.LOGS:
            response = ExportLogsServiceResponse()
            response.partial_success.rejected_log_records = rejected
            response.partial_success.error_message = message
        case Signal.TRACES:
            response = ExportTraceServiceResponse()
            response.partial_success.rejected_spans = rejected
            response.partial_success.error_message = message
    return response.SerializeToString()


_RPC_CODES = {400: 3, 401: 16, 403: 7, 404: 5, 405: 12, 408: 4, 413: 8, 415: 3, 421: 3, 429: 8, 503: 14}


def status(encoding: Encoding, http_code: int, message: str) -> bytes:
    """The body of an error: a google.rpc.Status with the gRPC code that belongs to the HTTP code."""
    code = _RPC_CODES.get(http_code, 2)
    if encoding is Encoding.JSON:
        return msgspec.json.encode({"code": code, "message": message})
    text = message.encode()
    # google.rpc.Status is {int32 code = 1; string message = 2}; its generated class would be one more dependency.
    return b"\x08" + _varint(code) + b"\x12" + _varint(len(text)) + text


def _varint(value: int) -> bytes:
    output = bytearray()
    while value > 127:
        output.append(value & 127 | 128)
        value >>= 7
    output.append(value)
    return bytes(output)
