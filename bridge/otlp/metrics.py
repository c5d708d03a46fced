"""Metrics requests to data points."""

from collections.abc import Set

from google.protobuf.message import DecodeError as ProtobufDecodeError

from bridge.model import Batch, DataPoint, Drop, Refusal
from bridge.otlp.attributes import CONTENT_KEYS
from bridge.otlp.body import BATCH_ADVICE, MAX_INT64, MAX_POINTS, DecodeError, Encoding, TooLarge, raise_decode_error
from bridge.otlp.json_points import json_points
from bridge.otlp.points import Known
from bridge.otlp.protobuf_points import protobuf_points


def decode_metrics(
    body: bytes, encoding: Encoding, content_keys: Set[str] = CONTENT_KEYS, known: Known | None = None
) -> Batch:
    """The data points of an ExportMetricsServiceRequest; the values of `content_keys` do not leave this function.

    Points that are unusable for what they are stand in `Batch.refused`; their neighbours are not touched.
    `known` makes it faster and changes nothing else.
    """
    points: list[DataPoint] = []
    refused: list[Refusal] = []
    read = json_points if encoding is Encoding.JSON else protobuf_points
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
        raise_decode_error(error, "metrics", encoding)
    return Batch(points, refused)
