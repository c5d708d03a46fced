"""The points of metrics in protobuf, which protobuf's own C library parses."""

import struct
from collections.abc import Callable, Iterator, Set
from typing import Any

from opentelemetry.proto.common.v1.common_pb2 import InstrumentationScope, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import NumberDataPoint
from opentelemetry.proto.resource.v1.resource_pb2 import Resource as PbResource

from bridge.model import (
    Attributes,
    AttributeValue,
    Drop,
    Exemplar,
    ExponentialHistogram,
    Histogram,
    Kind,
    Metric,
    Resource,
    Scope,
    Summary,
    Value,
)
from bridge.otlp.attributes import protobuf_attributes
from bridge.otlp.body import bound, parse_protobuf
from bridge.otlp.frame import MetricsRequest, NumberPoint
from bridge.otlp.points import MAX_KNOWN_POINT, NO_RECORDED_VALUE, Known, RawPoint, Sender, kind_of
from bridge.values import explicit_histogram, exponential_histogram, quantiles_of


def protobuf_points(body: bytes, content_keys: Set[str], known: Known) -> Iterator[RawPoint]:
    """The points of an ExportMetricsServiceRequest in protobuf."""
    request = MetricsRequest()
    parse_protobuf(request, body)
    resources = request.resource_metrics  # type: ignore[attr-defined]  # the class is made at run time
    bound(resources)
    for resource_metrics in resources:
        raw = b"".join(resource_metrics.resource)
        owner = known.resources.get(raw)
        if owner is None:
            attributes = PbResource.FromString(raw).attributes
            owner = known.note_resource(raw, Resource(protobuf_attributes(attributes, content_keys)))
        bound(resource_metrics.scope_metrics)
        for scope_metrics in resource_metrics.scope_metrics:
            raw = b"".join(scope_metrics.scope)
            sender = owner.senders.get(raw)
            if sender is None:
                scope = InstrumentationScope.FromString(raw)
                sender = known.note_scope(owner, raw, Scope(scope.name, scope.version))
            bound(scope_metrics.metrics)
            for message in scope_metrics.metrics:
                data_kind = message.WhichOneof("data")
                if data_kind is None:
                    continue
                data = getattr(message, data_kind)
                bound(data.data_points)
                if data_kind == "sum":
                    yield from _protobuf_sum(message, data, sender, content_keys, known)
                    continue
                kind, temporality = kind_of(data_kind, getattr(data, "aggregation_temporality", 0), False)
                metric = Metric(
                    message.name, kind, temporality, message.unit, message.description, sender.scope, sender.resource
                )
                for point in data.data_points:
                    yield _protobuf_point(metric, point, content_keys)


def _protobuf_sum(message: Any, data: Any, sender: Sender, content_keys: Set[str], known: Known) -> Iterator[RawPoint]:
    """The points of a sum. Most are a start, a time and a value as 27 bytes, and attributes that were seen before."""
    key = (message.name, message.description, message.unit, data.aggregation_temporality, data.is_monotonic)
    metric = sender.metrics.get(key)
    if metric is None:
        kind, temporality = kind_of("sum", key[3], key[4])
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
            ((key, value),) = protobuf_attributes([KeyValue.FromString(raw)], content_keys)
            pair = known.note_pair(raw, (key, value))
        found[pair[0]] = pair
    return known.note_attributes(tail, tuple(sorted(found.values())))


def _protobuf_point(metric: Metric, point: Any, content_keys: Set[str]) -> RawPoint:
    has_exemplar = metric.kind is not Kind.SUMMARY and point.exemplars
    return (
        metric,
        protobuf_attributes(point.attributes, content_keys),
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
    return explicit_histogram(tuple(point.explicit_bounds), tuple(point.bucket_counts), point.count, total)


def _protobuf_exponential(point: Any) -> ExponentialHistogram | Drop:
    total = point.sum if point.HasField("sum") else None
    return exponential_histogram(
        point.scale, point.zero_count, point.zero_threshold, point.positive.offset,
        tuple(point.positive.bucket_counts), point.negative.offset, tuple(point.negative.bucket_counts), point.count,
        total,
    )  # fmt: skip


def _protobuf_summary(point: Any) -> Summary:
    return Summary(point.count, point.sum, quantiles_of((q.quantile, q.value) for q in point.quantile_values))


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
