"""Attributes of OTLP, sorted, with the values of content-like ones replaced by a digest.

The digest tells two streams apart, and names nothing.
"""

import base64
import math
from collections.abc import Iterable, Sequence, Set
from decimal import Decimal
from hashlib import blake2b
from typing import Any

import msgspec

from bridge.model import Attributes, AttributeValue, Resource, Typed
from bridge.otlp.body import MAX_ATTRIBUTES, TooLarge
from bridge.otlp.forms import bool_of, bytes_of, double_of, int64_of, string_of

CONTENT_KEYS = frozenset(
    {"prompt", "response", "body", "command", "tool_input", "tool_parameters", "tool_result", "error", "headers"}
    | {"process.command_args", "process.command_line"}
)
"""Attributes that can hold what a user or a model wrote; their values never leave this package."""
REDACTED = "redacted"
"""The `Typed.type` of a content-like attribute; its text is a digest."""


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


def protobuf_attributes(items: Sequence[Any], content_keys: Set[str]) -> Attributes:
    """The attributes of a resource, record or point in protobuf."""
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


def json_attributes(items: Any, content_keys: Set[str]) -> Attributes:
    """The same in JSON, `items` being what stands there."""
    found: dict[str, AttributeValue] = {}
    for item in items or ():
        value = item.get("value") or {}
        text = value.get("stringValue")
        found[string_of(item.get("key"))] = text if type(text) is str else _json_value(value, content_keys)
    return _sorted_attributes(found, content_keys)


def json_resource(value: Any, content_keys: Set[str] = CONTENT_KEYS) -> Resource:
    """A resource in JSON."""
    return Resource(json_attributes((value or {}).get("attributes"), content_keys))


def _json_value(value: dict[str, Any], content_keys: Set[str]) -> AttributeValue:
    for kind, member in value.items():
        if member is None:
            continue
        match kind:
            case "stringValue":
                return string_of(member)
            case "boolValue":
                return Typed("bool", "true" if bool_of(member) else "false")
            case "intValue":
                return Typed("int", str(int64_of(member)))
            case "doubleValue":
                return Typed("double", double_text(double_of(member)))
            case "bytesValue":
                return Typed("bytes", base64.b64encode(bytes_of(member)).decode())
            case "arrayValue":
                return _array(_json_value(item or {}, content_keys) for item in member.get("values") or ())
            case "kvlistValue":
                pairs = member.get("values") or ()
                members = {
                    string_of(pair.get("key")): _json_value(pair.get("value") or {}, content_keys) for pair in pairs
                }
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
