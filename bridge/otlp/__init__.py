"""OTLP/HTTP bodies: bytes to data points and events, and back to answers.

Law: any bytes become a value or raise `DecodeError` or `TooLarge`, never anything else. Sizes are bounded
before and after decompression and in points, so that no body can take more than about 150 MB for a moment.
Protobuf is parsed by protobuf's own C library; JSON by msgspec, because the protobuf library's json_format
is thirty times slower (it is the oracle of the tests). Sources: opentelemetry-proto 1.11 `docs/specification.md`
and the JSON mapping of protobuf 3 with OTLP's exceptions (hex ids, integer enums, unknown fields ignored).

Content-like attributes (`CONTENT_KEYS`) are replaced by a digest here: it tells two streams apart, names nothing.
"""

from bridge.otlp.attributes import CONTENT_KEYS, REDACTED, redacted_text
from bridge.otlp.body import (
    MAX_INT64,
    MAX_POINTS,
    SIZE_ADVICE,
    DecodeError,
    Encoding,
    Signal,
    TooLarge,
    decompress,
    status,
    success,
)
from bridge.otlp.metrics import decode_metrics
from bridge.otlp.points import Known
from bridge.otlp.records import Records, decode_logs, decode_traces

__all__ = [
    "CONTENT_KEYS",
    "MAX_INT64",
    "MAX_POINTS",
    "REDACTED",
    "SIZE_ADVICE",
    "DecodeError",
    "Encoding",
    "Known",
    "Records",
    "Signal",
    "TooLarge",
    "decode_logs",
    "decode_metrics",
    "decode_traces",
    "decompress",
    "redacted_text",
    "status",
    "success",
]
