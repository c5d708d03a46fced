"""OTLP/HTTP bodies as a whole: how large they may be, how they are packed, and what is answered to them.

Source: opentelemetry-proto 1.11 `docs/specification.md`.
"""

import zlib
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, NoReturn

import msgspec
from google.protobuf.message import DecodeError as ProtobufDecodeError
from google.protobuf.message import Message
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

MAX_POINTS = 20_000
"""Data points (or log records, or spans) in one body; a real export has at most a few hundred."""
MAX_OBJECTS = 400_000
"""Objects of any kind in one body: resources, scopes, metrics, points, attributes."""
BATCH_ADVICE = "lower the client's batch size (send_batch_max_size in a collector)"
SIZE_ADVICE = f"{BATCH_ADVICE} or raise limits.max_body_mib"
MAX_ATTRIBUTES = 10_000
"""Attributes of one resource or point; SDKs stop at 128."""
MAX_GZIP_MEMBERS = 4
WIRE_PIECE, PIECE = 16 * 2**10, 256 * 2**10
"""Bytes that decompression takes and gives at a time, so that a bomb is found out before it has much memory."""
MAX_INT64 = 2**63 - 1


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


# --- what every body is held to ---------------------------------------------------------------------------------


def raise_decode_error(error: Exception, what: str, encoding: Encoding) -> NoReturn:
    """Give foreign errors our name; they say the type of what was wrong, never its content."""
    if isinstance(error, DecodeError | TooLarge):
        raise error
    reason = "nested too deeply" if isinstance(error, RecursionError) else f"unexpected shape ({type(error).__name__})"
    raise DecodeError(f"body is not an OTLP {what} request in {encoding.value}: {reason}") from None


def bound(messages: Sequence[Any]) -> None:
    """Refuse a body for what it holds before any of it is looked at."""
    if len(messages) > MAX_POINTS:
        raise TooLarge(f"body has more than {MAX_POINTS} resources, scopes, metrics or points; {BATCH_ADVICE}")


_EMPTY_MESSAGES = (b"\x0a\x00", b"\x12\x00", b"\x3a\x00")


def parse_protobuf(message: Message, body: bytes) -> None:
    """Parse a body into a message. Raises DecodeError, and TooLarge for one that would take too much memory."""
    # Two bytes of body become up to 150 of memory when they are an empty message, so those are counted first.
    if len(body) > MAX_OBJECTS and sum(map(body.count, _EMPTY_MESSAGES)) > MAX_OBJECTS // 2:
        raise TooLarge(f"body is made of empty messages; {BATCH_ADVICE}")
    try:
        message.ParseFromString(body)
    except ProtobufDecodeError as error:
        raise DecodeError(f"body is not a protobuf {type(message).__name__}: {error}") from None


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
