"""The exports of the comparison: 30 points of a session, as Claude Code shapes them, and the recorded ones.

A session's export is serialised once; what differs from one export to the next (start, end and the token counts) is
put in by replacing bytes, so that making a request costs its sender next to nothing.
"""

import json
import struct
from collections.abc import Iterator
from hashlib import sha256
from itertools import product
from uuid import UUID

from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality

from bridge.otlp import Encoding
from tests.recordings import ALL_REQUESTS

POINTS = 30
TOKEN_POINTS = 16
STEP_NS = 10**9
"""The time between two exports of a session, by the clock of their points."""
_START, _END, _TOKENS = 1_111_111_111_111_111_111, 1_222_222_222_222_222_222, 111_111.5

_MODELS = ("claude-opus-4-5-20251101", "claude-haiku-4-5-20251001")
_QUERIES = ("main", "subagent")
_METRICS: tuple[tuple[str, str, list[dict[str, str]]], ...] = (
    (
        "claude_code.token.usage", "tokens",
        [
            {"type": kind, "model": model, "query_source": query, "effort": "high"}
            for kind, model, query in product(("input", "output", "cacheRead", "cacheCreation"), _MODELS, _QUERIES)
        ],
    ),
    (
        "claude_code.cost.usage", "USD",
        [{"model": model, "query_source": query, "effort": "high"} for model, query in product(_MODELS, _QUERIES)],
    ),
    ("claude_code.active_time.total", "s", [{"type": "user"}, {"type": "cli"}]),
    ("claude_code.lines_of_code.count", "", [{"type": "added"}, {"type": "removed"}]),
    ("claude_code.session.count", "", [{"start_type": "fresh"}]),
    ("claude_code.commit.count", "", [{}]),
    ("claude_code.pull_request.count", "", [{}]),
    (
        "claude_code.code_edit_tool.decision", "",
        [{"tool_name": tool, "decision": "accept", "source": "config", "language": "Python"}
         for tool in ("Edit", "Write", "NotebookEdit")],
    ),
)  # fmt: skip


class Session:
    """One session's exports, each of 30 delta points in 30 streams."""

    def __init__(self, number: int, encoding: Encoding) -> None:
        request = _session_request(number)
        if encoding is Encoding.PROTOBUF:
            self._template = request.SerializeToString()
            self._marks = (struct.pack("<Q", _START), struct.pack("<Q", _END), struct.pack("<d", _TOKENS))
        else:
            plain = MessageToDict(request, use_integers_for_enums=True)
            self._template = json.dumps(plain, separators=(",", ":")).encode()
            self._marks = (str(_START).encode(), str(_END).encode(), str(_TOKENS).encode())
        self._encoding = encoding

    def export(self, start: int, end: int, tokens: int) -> bytes:
        """The body of one export; every token point counts `tokens`. Times in Unix nanoseconds."""
        body = self._template
        if self._encoding is Encoding.PROTOBUF:
            values = (struct.pack("<Q", start), struct.pack("<Q", end), struct.pack("<d", tokens))
        else:
            values = (str(start).encode(), str(end).encode(), str(tokens).encode())
        for mark, value in zip(self._marks, values, strict=True):
            body = body.replace(mark, value)
        return body

    def exports(self, first: int, count: int, tokens: int = 1000) -> Iterator[bytes]:
        """`count` exports one after the other, the first beginning at `first` (Unix nanoseconds)."""
        for number in range(count):
            begin = first + number * STEP_NS
            yield self.export(begin, begin + STEP_NS, tokens)


def _session_request(number: int) -> ExportMetricsServiceRequest:
    request = ExportMetricsServiceRequest()
    resource = request.resource_metrics.add()
    for key, text in (
        ("service.name", "claude-code"), ("service.version", "2.1.329"), ("os.type", "linux"),
        ("os.version", "6.8.0"), ("host.arch", "amd64"),
    ):  # fmt: skip
        resource.resource.attributes.add(key=key).value.string_value = text
    scope = resource.scope_metrics.add()
    scope.scope.name, scope.scope.version = "com.anthropic.claude_code", "2.1.329"
    user = number % 50
    common = {
        "user.id": sha256(f"user {user}".encode()).hexdigest(),
        "session.id": str(UUID(int=number + 2**100)),
        "organization.id": str(UUID(int=2**101)),
        "user.email": f"user{user}@example.com",
        "user.account_uuid": str(UUID(int=user + 2**102)),
        "user.account_id": f"user_{user:024d}",
        "terminal.type": "vscode",
    }
    for name, unit, series in _METRICS:
        total = scope.metrics.add(name=name, unit=unit, description=f"The sum of {name}").sum
        total.aggregation_temporality = AggregationTemporality.AGGREGATION_TEMPORALITY_DELTA
        total.is_monotonic = True
        for own in series:
            value = {"claude_code.token.usage": _TOKENS, "claude_code.cost.usage": 0.0123}.get(name, 1.0)
            point = total.data_points.add(start_time_unix_nano=_START, time_unix_nano=_END, as_double=value)
            for key, text in {**common, **own}.items():
                point.attributes.add(key=key).value.string_value = text
    return request


def recorded(first: int, count: int) -> list[bytes]:
    """Metrics exports of real sessions as protobuf, in the recorded order, round after round.

    The times of round n are moved so that every point is new; the first export ends at `first` (Unix nanoseconds).
    """
    bodies: list[bytes] = []
    messages = [
        ExportMetricsServiceRequest.FromString(request.message.SerializeToString())
        for request in ALL_REQUESTS
        if request.path == "/v1/metrics"
    ]
    for number in range(count):
        message = messages[number % len(messages)]
        points = [
            point
            for resource in message.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            for point in metric.sum.data_points
        ]
        shift = first + number * STEP_NS // 100 - max((point.time_unix_nano for point in points), default=0)
        for point in points:
            point.time_unix_nano += shift
            point.start_time_unix_nano += shift
        bodies.append(message.SerializeToString())
    return bodies
