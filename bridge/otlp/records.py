"""Logs and traces requests to events."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any, NamedTuple

from google.protobuf.message import Message
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from bridge.model import Event, EventValue, Resource
from bridge.otlp.attributes import CONTENT_KEYS, json_resource, protobuf_attributes
from bridge.otlp.body import (
    BATCH_ADVICE,
    MAX_INT64,
    MAX_POINTS,
    Encoding,
    Signal,
    TooLarge,
    bound,
    parse_protobuf,
    raise_decode_error,
)
from bridge.otlp.forms import (
    bool_of,
    camel_name,
    double_of,
    hex_of,
    int64_of,
    members_of,
    parse_json,
    string_of,
    unsigned_of,
)


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
        raise_decode_error(error, signal.value, encoding)
    return Records(service, names, events)


def _protobuf_records(body: bytes, nesting: _Nesting, keys_of: _KeysOf, content_keys: Set[str]) -> Iterator[_RawRecord]:
    request = nesting.request()
    parse_protobuf(request, body)
    resources = getattr(request, nesting.resources)
    bound(resources)
    for resource_records in resources:
        resource = Resource(protobuf_attributes(resource_records.resource.attributes, content_keys))
        scopes = getattr(resource_records, nesting.scopes)
        bound(scopes)
        for scope_records in scopes:
            records = getattr(scope_records, nesting.records)
            bound(records)
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
    own = _Nesting(nesting.request, *map(camel_name, nesting[1:]))
    for resource_records in members_of(parse_json(body), own.resources):
        resource = json_resource(resource_records.get("resource"), content_keys)
        for scope_records in members_of(resource_records, own.scopes):
            for record in members_of(scope_records, own.records):
                items = record.get("attributes") or ()
                named = ((i.get("value") or {}).get("stringValue") for i in items if i.get("key") == "event.name")
                own_name = record.get(own.name)
                name = string_of(own_name if nesting is _TRACES else next(named, "") or own_name)
                keys = keys_of(name)
                event = None
                if keys is not None:
                    attributes = {
                        key: value
                        for item in items
                        if (key := item.get("key")) in keys and (value := _json_scalar(item.get("value"))) is not None
                    }
                    trace, span, parent = (hex_of(record.get(id_)) for id_ in ("traceId", "spanId", own.parent))
                    time, start = (unsigned_of(record.get(member)) for member in (own.time, own.start))
                    time = time or unsigned_of(record.get(own.observed))
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
                return string_of(member)
            case "boolValue":
                return bool_of(member)
            case "intValue":
                return int64_of(member)
            case "doubleValue":
                return double_of(member)
            case _:
                continue
    return None
