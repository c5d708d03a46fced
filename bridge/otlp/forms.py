"""JSON of OTLP: the root of a body, and members in any of the forms that protobuf's JSON mapping allows.

With OTLP's exceptions: ids are hex, enums are integers, unknown fields are ignored. The protobuf library's json_format,
thirty times slower, is the oracle of the tests.
"""

import base64
import json
import re
from typing import Any, NoReturn

import msgspec

from bridge.model import Temporality
from bridge.otlp.body import BATCH_ADVICE, MAX_INT64, MAX_OBJECTS, DecodeError, TooLarge

_SURROGATE = re.compile("[\ud800-\udfff]")
SNAKE_MEMBER = re.compile(rb'_[a-z0-9_]+"\s*:')


def bound_json(body: bytes) -> None:
    """Refuse a body for the objects that it would become. Raises TooLarge."""
    if len(body) > MAX_OBJECTS and body.count(b"{") > MAX_OBJECTS:
        raise TooLarge(f"body has more than {MAX_OBJECTS} JSON objects; {BATCH_ADVICE}")


def parse_json(body: bytes) -> dict[str, Any]:
    """The root object, with all member names in lowerCamelCase."""
    bound_json(body)
    try:
        root = msgspec.json.decode(body)
    except RecursionError:
        raise DecodeError("body is not JSON: nested too deeply") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        root = _parse_json_with_surrogates(body, error)
    if not isinstance(root, dict):
        raise DecodeError(f"body is not an OTLP request: the root is {type(root).__name__}, not an object")
    # Only lowerCamelCase is OTLP; the other spelling of protobuf's mapping is read as well.
    if SNAKE_MEMBER.search(body):
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
            return {camel_name(key): _camel(item) for key, item in value.items()}
        case _:
            return value


def camel_name(name: str) -> str:
    """A name as OTLP's JSON spells it: `time_unix_nano` -> `timeUnixNano`."""
    return re.sub(r"_([a-z])", lambda m: m[1].upper(), name)


def members_of(value: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The objects of an array; none where there is no array. Raises DecodeError for anything else."""
    members = value.get(name)
    if members is None:
        return []
    if not isinstance(members, list):
        raise DecodeError(f"{name} is {type(members).__name__}, not an array")
    return members


def bytes_of(value: Any) -> bytes:
    """Bytes in either alphabet of base64, with or without padding, as protobuf's JSON mapping takes them."""
    text = string_of(value).rstrip("=").translate(_URL_SAFE)
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


_URL_SAFE = str.maketrans("-_", "+/")


def string_of(value: Any) -> str:
    """A string, empty where there is none. Raises TypeError for anything else."""
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


def int64_of(value: Any) -> int:
    """A signed 64-bit integer in any of its forms. Raises TypeError and ValueError, as all below."""
    return _integer(value, -(2**63), MAX_INT64)


def unsigned_of(value: Any) -> int:
    """An unsigned 64-bit integer in any of its forms."""
    if value is None:
        return 0
    if type(value) is str and len(value) < 20 and value.isascii() and value.isdecimal():
        return int(value)
    return _integer(value, 0, 2**64 - 1)


def double_of(value: Any) -> float:
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


def enum_of(value: Any) -> int:
    """AggregationTemporality as number, decimal string or name; 0 for anything else."""
    if isinstance(value, str):
        return _TEMPORALITIES[value] if value in _TEMPORALITIES else int(value) if value.isdecimal() else 0
    return _integer(value, 0, MAX_INT64) if isinstance(value, int | float) else 0


def bool_of(value: Any) -> bool:
    """A boolean, false where there is none."""
    if value is not None and not isinstance(value, bool):
        raise TypeError("not a boolean")
    return bool(value)


def hex_of(value: Any) -> str:
    """An id, which OTLP/JSON writes in hex of either case."""
    text = string_of(value).lower()
    return text if not text.strip("0123456789abcdef") else ""


def optional_double(value: Any) -> float | None:
    """A double in any of its forms, if there is one."""
    return None if value is None else double_of(value)


def int32_of(value: Any) -> int:
    """A signed 32-bit integer in any of its forms."""
    return _integer(value, -(2**31), 2**31 - 1)


def counts_of(value: Any) -> tuple[int, ...]:
    """The counts of an array of buckets."""
    return tuple(unsigned_of(count) for count in value or ())
