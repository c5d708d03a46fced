"""The points of metrics in JSON: in the usual spelling what repeats is looked up, any other is read at length."""

from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

import msgspec

from bridge.model import (
    Attributes,
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
from bridge.otlp.attributes import json_attributes, json_resource
from bridge.otlp.forms import (
    SNAKE_MEMBER,
    bool_of,
    bound_json,
    counts_of,
    double_of,
    enum_of,
    hex_of,
    int32_of,
    int64_of,
    members_of,
    optional_double,
    parse_json,
    string_of,
    unsigned_of,
)
from bridge.otlp.points import MAX_KNOWN_POINT, NO_RECORDED_VALUE, Known, RawPoint, Sender, kind_of
from bridge.values import explicit_histogram, exponential_histogram, quantiles_of

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


def json_points(body: bytes, content_keys: Set[str], known: Known) -> Iterator[RawPoint]:
    """The points of an ExportMetricsServiceRequest in JSON."""
    bound_json(body)
    if SNAKE_MEMBER.search(body):
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
) -> Iterator[RawPoint]:
    """The points of a request in the usual spelling, looked up by the text of their attributes."""
    for resource_metrics in resources:
        raw = bytes(resource_metrics.resource)
        owner = known.resources.get(raw)
        if owner is None:
            owner = known.note_resource(raw, json_resource(msgspec.json.decode(raw), content_keys))
        for scope_metrics in resource_metrics.scopeMetrics or ():
            raw = bytes(scope_metrics.scope)
            sender = owner.senders.get(raw)
            if sender is None:
                scope = msgspec.json.decode(raw) or {}
                sender = known.note_scope(
                    owner, raw, Scope(string_of(scope.get("name")), string_of(scope.get("version")))
                )
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
    message: _JsonMetric, data: _JsonSum, sender: Sender, content_keys: Set[str], known: Known
) -> Iterator[RawPoint]:
    texts = (string_of(message.name), string_of(message.description), string_of(message.unit))
    key = (*texts, enum_of(data.aggregationTemporality), bool_of(data.isMonotonic))
    metric = sender.metrics.get(key)
    if metric is None:
        kind, temporality = kind_of("sum", key[3], key[4])
        metric = Metric(key[0], kind, temporality, key[2], key[1], sender.scope, sender.resource)
        known.note_metric(sender, key, metric)
    for point in data.dataPoints or ():
        raw = bytes(point.attributes)
        try:
            attributes = known.attributes.get(raw)
            if attributes is None:
                attributes = json_attributes(msgspec.json.decode(raw), content_keys)
                if len(raw) <= MAX_KNOWN_POINT:
                    attributes = known.note_attributes(raw, known.share(attributes))
            yield _json_point(metric, attributes, point)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            yield metric, (), 0, 0, Drop.MALFORMED, None


def _any_json_points(body: bytes, content_keys: Set[str]) -> Iterator[RawPoint]:
    """The points of a request in any spelling."""
    for resource_metrics in members_of(parse_json(body), "resourceMetrics"):
        resource = json_resource(resource_metrics.get("resource"), content_keys)
        for scope_metrics in members_of(resource_metrics, "scopeMetrics"):
            scope_object = scope_metrics.get("scope") or {}
            scope = Scope(string_of(scope_object.get("name")), string_of(scope_object.get("version")))
            for message in members_of(scope_metrics, "metrics"):
                data_kind = next((kind for kind in _DATA_KINDS if message.get(kind) is not None), None)
                if data_kind is None:
                    continue
                yield from _json_data_points(
                    _json_metric(message, data_kind, message[data_kind], scope, resource),
                    message[data_kind],
                    content_keys,
                )


def _json_metric(message: Any, data_kind: str, data: Any, scope: Scope, resource: Resource) -> Metric:
    kind, temporality = kind_of(
        data_kind, enum_of(data.get("aggregationTemporality")), bool_of(data.get("isMonotonic"))
    )
    name, unit, description = (string_of(message.get(member)) for member in ("name", "unit", "description"))
    return Metric(name, kind, temporality, unit, description, scope, resource)


def _json_data_points(metric: Metric, data: dict[str, Any], content_keys: Set[str]) -> Iterator[RawPoint]:
    for point in members_of(data, "dataPoints"):
        try:
            yield _json_point(metric, json_attributes(point.get("attributes"), content_keys), point)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            yield metric, (), 0, 0, Drop.MALFORMED, None


def _json_point(metric: Metric, attributes: Attributes, point: Any) -> RawPoint:
    return (
        metric,
        attributes,
        unsigned_of(point.get("startTimeUnixNano")),
        unsigned_of(point.get("timeUnixNano")),
        None if unsigned_of(point.get("flags")) & NO_RECORDED_VALUE else _JSON_VALUES[metric.kind](point),
        _json_exemplar(point),
    )


_DATA_KINDS = ("sum", "gauge", "histogram", "exponentialHistogram", "summary")


def _json_number(point: dict[str, Any]) -> int | float | Drop:
    as_int, as_double = point.get("asInt"), point.get("asDouble")
    if as_int is None:
        return Drop.NO_VALUE if as_double is None else double_of(as_double)
    return int64_of(as_int) if as_double is None else Drop.NO_VALUE


def _json_histogram(point: dict[str, Any]) -> Histogram | Drop:
    return explicit_histogram(
        tuple(double_of(bound) for bound in point.get("explicitBounds") or ()),
        counts_of(point.get("bucketCounts")),
        unsigned_of(point.get("count")),
        optional_double(point.get("sum")),
    )


def _json_exponential(point: dict[str, Any]) -> ExponentialHistogram | Drop:
    positive, negative = point.get("positive") or {}, point.get("negative") or {}
    return exponential_histogram(
        int32_of(point.get("scale")), unsigned_of(point.get("zeroCount")), double_of(point.get("zeroThreshold") or 0),
        int32_of(positive.get("offset")), counts_of(positive.get("bucketCounts")), int32_of(negative.get("offset")),
        counts_of(negative.get("bucketCounts")), unsigned_of(point.get("count")), optional_double(point.get("sum")),
    )  # fmt: skip


def _json_summary(point: dict[str, Any]) -> Summary:
    found = members_of(point, "quantileValues")
    quantiles = quantiles_of((double_of(q.get("quantile") or 0), double_of(q.get("value") or 0)) for q in found)
    return Summary(unsigned_of(point.get("count")), double_of(point.get("sum") or 0), quantiles)


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
    newest = max(members_of(point, "exemplars"), key=lambda exemplar: unsigned_of(exemplar.get("timeUnixNano")))
    value = _json_number(newest)
    if isinstance(value, Drop):
        return None
    trace_id, span_id = (hex_of(newest.get(name)) for name in ("traceId", "spanId"))
    return Exemplar(float(value), unsigned_of(newest.get("timeUnixNano")), trace_id[:32], span_id[:16])
