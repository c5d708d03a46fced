"""The frame of a metrics export: protobuf's own parser cuts it up, and what repeats in it stays bytes.

An export repeats nearly all of the one before it; of most points only start, time and value are new. The messages
here have the wire format of OTLP's, but for four places that stay bytes, to be looked up before they are decoded:
resources, scopes, the points of sums and, in a message of its own, a point's attributes. Everything else is parsed,
and checked, as OTLP's messages are; a field that was sent twice is merged as protobuf does it, because bytes that
stand one after the other are merged when parsed.
"""

from typing import Any

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.message import Message
from opentelemetry.proto.metrics.v1 import metrics_pb2

_OTLP = ".opentelemetry.proto"
_FRAME = ".bridge.otlp.frame"
_Field = FieldDescriptorProto
_MESSAGES: dict[str, tuple[tuple[int, str, Any, str], ...]] = {
    "ExportMetricsServiceRequest": ((1, "resource_metrics", _Field.TYPE_MESSAGE, f"{_FRAME}.ResourceMetrics*"),),
    "ResourceMetrics": (
        (1, "resource", _Field.TYPE_BYTES, "*"),
        (2, "scope_metrics", _Field.TYPE_MESSAGE, f"{_FRAME}.ScopeMetrics*"),
        (3, "schema_url", _Field.TYPE_STRING, ""),
    ),
    "ScopeMetrics": (
        (1, "scope", _Field.TYPE_BYTES, "*"),
        (2, "metrics", _Field.TYPE_MESSAGE, f"{_FRAME}.Metric*"),
        (3, "schema_url", _Field.TYPE_STRING, ""),
    ),
    "Metric": (
        (1, "name", _Field.TYPE_STRING, ""),
        (2, "description", _Field.TYPE_STRING, ""),
        (3, "unit", _Field.TYPE_STRING, ""),
        (5, "gauge", _Field.TYPE_MESSAGE, f"{_OTLP}.metrics.v1.Gauge|"),
        (7, "sum", _Field.TYPE_MESSAGE, f"{_FRAME}.Sum|"),
        (9, "histogram", _Field.TYPE_MESSAGE, f"{_OTLP}.metrics.v1.Histogram|"),
        (10, "exponential_histogram", _Field.TYPE_MESSAGE, f"{_OTLP}.metrics.v1.ExponentialHistogram|"),
        (11, "summary", _Field.TYPE_MESSAGE, f"{_OTLP}.metrics.v1.Summary|"),
        (12, "metadata", _Field.TYPE_MESSAGE, f"{_OTLP}.common.v1.KeyValue*"),
    ),
    "Sum": (
        (1, "data_points", _Field.TYPE_BYTES, "*"),
        (2, "aggregation_temporality", _Field.TYPE_ENUM, f"{_OTLP}.metrics.v1.AggregationTemporality"),
        (3, "is_monotonic", _Field.TYPE_BOOL, ""),
    ),
    "NumberDataPoint": (
        (2, "start_time_unix_nano", _Field.TYPE_FIXED64, ""),
        (3, "time_unix_nano", _Field.TYPE_FIXED64, ""),
        (4, "as_double", _Field.TYPE_DOUBLE, "|"),
        (5, "exemplars", _Field.TYPE_MESSAGE, f"{_OTLP}.metrics.v1.Exemplar*"),
        (6, "as_int", _Field.TYPE_SFIXED64, "|"),
        (7, "attributes", _Field.TYPE_BYTES, "*"),
        (8, "flags", _Field.TYPE_UINT32, ""),
    ),
}
"""Number, name, type and type name of each field; `*` is repeated, `|` one of the alternatives of `data` or `value`."""


def _make_messages() -> tuple[type[Message], type[Message]]:
    file = FileDescriptorProto(name="bridge/otlp/frame.proto", package=_FRAME[1:], syntax="proto3")
    common = metrics_pb2.DESCRIPTOR.dependencies
    file.dependency.extend([metrics_pb2.DESCRIPTOR.name, *(dependency.name for dependency in common)])
    for message_name, fields in _MESSAGES.items():
        message = file.message_type.add(name=message_name)
        for number, name, kind, type_name in fields:
            label = _Field.LABEL_REPEATED if type_name.endswith("*") else _Field.LABEL_OPTIONAL
            field = message.field.add(name=name, number=number, type=kind, label=label)
            if plain := type_name.rstrip("*|"):
                field.type_name = plain
            if type_name.endswith("|"):
                if not message.oneof_decl:
                    message.oneof_decl.add(name="value" if message_name == "NumberDataPoint" else "data")
                field.oneof_index = 0
    pool = descriptor_pool.Default()
    pool.AddSerializedFile(file.SerializeToString())
    request, point = (
        message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_FRAME[1:]}.{name}"))
        for name in ("ExportMetricsServiceRequest", "NumberDataPoint")
    )
    return request, point


MetricsRequest, NumberPoint = _make_messages()
"""An ExportMetricsServiceRequest whose resources, scopes and points of sums are bytes; and a NumberDataPoint whose
attributes are."""
