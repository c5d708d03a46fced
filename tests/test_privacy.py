"""What people and models wrote, and the secrets of requests, are never stored, logged or served.

Every content-like field of every signal holds the word CANARY. After posting, after a crash, after a restart and
after a stop it must stand nowhere: not in the state directory, not in the log, not in any page or answer.
"""

import base64
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.daemon import JSON, PROTOBUF, Daemon
from tests.test_transcripts import eventually, select, wait_until_read
from tests.transcript_tree import MODELS, response

CANARY = "kanarienvogel"
VISIBLE = "hirundo-rustica"
"""The value of an attribute that may be seen: where it does not show, the search itself is broken."""
CONTENT_KEYS = (
    "prompt", "response", "body", "command", "tool_input", "tool_parameters", "tool_result", "error", "headers",
    "process.command_args", "process.command_line",
)  # fmt: skip
TIMES = {"startTimeUnixNano": "1795235255603000000", "timeUnixNano": "1795235315603000000"}
PAGES = ("/v1/metrics", "/metrics", "/", "/-/healthy", "/-/ready")


def canary(place: str) -> str:
    """The word, and where it was put."""
    return f"{CANARY} in {place}"


def attribute(key: str, value: Any) -> dict[str, Any]:
    return {"key": key, "value": {"stringValue": value} if isinstance(value, str) else value}


def values(place: str) -> list[dict[str, Any]]:
    """The word in every type of attribute value."""
    text = canary(place)
    entry = attribute("prompt", text)
    return [
        {"stringValue": text},
        {"bytesValue": base64.b64encode(text.encode()).decode()},
        {"arrayValue": {"values": [{"intValue": "1"}, {"stringValue": text}]}},
        {"kvlistValue": {"values": [entry, {"key": "inner", "value": {"kvlistValue": {"values": [entry]}}}]}},
    ]


def content(place: str) -> list[dict[str, Any]]:
    """The word under every content-like key."""
    return [attribute(key, canary(f"{place} {key}")) for key in CONTENT_KEYS]


def metrics_request() -> dict[str, Any]:
    """Good points, refused points and points of other kinds, each with the word in its content-like attributes."""
    shown = [attribute("type", "input"), attribute("model", VISIBLE), attribute("session.id", "s-1")]
    points = [{**TIMES, "asInt": "5", "attributes": [*shown, *content("a point")]}]
    for at, value in enumerate(values("a typed point attribute")):
        points.append({**TIMES, "asInt": "5", "attributes": [*shown, attribute(CONTENT_KEYS[at], value)]})
    nested = [attribute("details", value) for value in values("an attribute in an attribute")[3:]]
    points.append({**TIMES, "asInt": "7", "attributes": [*shown, *nested]})
    points.append({**TIMES, "asInt": "-1", "attributes": [*shown, *content("a negative point")]})
    points.append({**TIMES, "attributes": [*shown, *content("a point without a value")]})
    exemplar = {"timeUnixNano": "5", "asInt": "1", "filteredAttributes": content("an exemplar")}
    points.append({**TIMES, "asInt": "9", "attributes": shown, "exemplars": [exemplar]})
    buckets = {**TIMES, "count": "1", "sum": 1.0, "explicitBounds": [1.0], "bucketCounts": ["0", "1"]}
    histogram = {**buckets, "attributes": content("a histogram"), "exemplars": [exemplar]}
    resource = {"attributes": [attribute("service.name", "claude-code"), *content("a metric resource")]}
    cumulative = {"aggregationTemporality": 2, "isMonotonic": True, "dataPoints": points}
    metrics = [
        {"name": "claude_code.token.usage", "sum": {**cumulative, "aggregationTemporality": 1}},
        {"name": "other.counter", "sum": cumulative, "metadata": content("metadata")},
        {"name": "other.gauge", "gauge": {"dataPoints": points}},
        {"name": "other.histogram", "histogram": {"aggregationTemporality": 2, "dataPoints": [histogram]}},
    ]
    scope = {"name": "com.anthropic.claude_code", "attributes": content("a scope")}
    return {"resourceMetrics": [{"resource": resource, "scopeMetrics": [{"scope": scope, "metrics": metrics}]}]}


def logs_request() -> dict[str, Any]:
    named = attribute("event.name", "user_prompt")
    secrets = [attribute("user.remark", canary("a free log attribute")), *content("a log attribute")]
    typed = [attribute(f"typed.{at}", value) for at, value in enumerate(values("a typed log attribute"))]
    records = [
        {
            "timeUnixNano": "5",
            "body": body,
            "attributes": [named, *secrets, *typed],
            "severityText": canary("a severity"),
        }
        for body in values("a log body")
    ]
    resource = {"attributes": [attribute("host.remark", canary("a log resource")), *content("a log resource")]}
    scope = {"name": canary("a log scope"), "attributes": content("a log scope")}
    return {"resourceLogs": [{"resource": resource, "scopeLogs": [{"scope": scope, "logRecords": records}]}]}


def traces_request() -> dict[str, Any]:
    attributes = [attribute("user.remark", canary("a free span attribute")), *content("a span attribute")]
    typed = [attribute(f"typed.{at}", value) for at, value in enumerate(values("a typed span attribute"))]
    genai = [attribute(f"gen_ai.{key}", canary(key)) for key in ("input.messages", "tool.call.arguments", "prompt")]
    genai.append(attribute("gen_ai.usage.input_tokens", {"intValue": "5"}))
    span = {
        "name": "claude_code.tool",
        "traceState": canary("a trace state"),
        "attributes": [*attributes, *typed, *genai],
        "events": [{"name": canary("a span event"), "attributes": content("a span event")}],
        "links": [{"traceState": canary("a link"), "attributes": content("a link")}],
        "status": {"code": 2, "message": canary("a span status")},
    }
    resource = {"attributes": [attribute("service.name", "application"), *content("a span resource")]}
    return {"resourceSpans": [{"resource": resource, "scopeSpans": [{"spans": [span]}]}]}


class Post(NamedTuple):
    """One request and the status it gets."""

    path: str
    body: bytes
    kind: str
    status: int
    headers: tuple[tuple[str, str], ...] = ()


SIGNALS: list[tuple[str, dict[str, Any], type[Message]]] = [
    ("/v1/metrics", metrics_request(), ExportMetricsServiceRequest),
    ("/v1/logs", logs_request(), ExportLogsServiceRequest),
    ("/v1/traces", traces_request(), ExportTraceServiceRequest),
]


def posts() -> Iterator[Post]:
    """Every signal in every encoding, whole and broken in several ways."""
    for path, request, message in SIGNALS:
        text = json.dumps(request)
        in_json = text.encode()
        in_protobuf = ParseDict(request, message()).SerializeToString()
        yield Post(path, in_json, JSON, 200)
        yield Post(path, in_json.replace(b"timeUnixNano", b"time_unix_nano"), JSON, 200)
        yield Post(path, in_json.replace(CANARY.encode(), rb"\ud83d" + CANARY.encode()), JSON, 200)
        yield Post(path, in_protobuf, PROTOBUF, 200)
        yield Post(path, gzip.compress(in_json), JSON, 200, (("Content-Encoding", "gzip"),))
        yield Post(path, in_json[:-1], JSON, 400)
        yield Post(path, in_json + CANARY.encode(), JSON, 400)
        yield Post(path, in_protobuf[:-1], PROTOBUF, 400)
        yield Post(path, in_json, PROTOBUF, 400)
        yield Post(path, gzip.compress(in_json, 0)[:-1], JSON, 400, (("Content-Encoding", "gzip"),))
        yield Post(path, in_json, JSON, 400, (("Content-Encoding", "deflate"),))
        yield Post(path, CANARY.encode(), JSON, 400)
        yield Post(path, json.dumps(CANARY).encode(), JSON, 400)
        yield Post(path, json.dumps({CANARY: [1, {CANARY: "]"}]}).encode()[:-2], JSON, 400)
        yield Post(
            path,
            json.dumps({"resourceMetrics": CANARY, "resourceLogs": CANARY, "resourceSpans": CANARY}).encode(),
            JSON,
            400,
        )
        yield Post(path, in_json, "text/plain", 415)
        yield Post(path + f"?secret={CANARY}", b"{}", JSON, 200)
        yield Post(path, in_json, JSON, 403, (("Origin", "http://evil.example"),))
        yield Post(path, in_json, JSON, 421, (("Host", "evil.example"),))
    yield Post("/nowhere", json.dumps(SIGNALS[0][1]).encode(), JSON, 404)
    yield Post("/metrics", json.dumps(SIGNALS[0][1]).encode(), JSON, 405)


SECRET_HEADERS = {
    "Authorization": f"Bearer {CANARY}",
    "Cookie": f"session={CANARY}",
    "X-Api-Key": CANARY,
    "User-Agent": f"client/1 ({CANARY})",
    "Referer": f"http://localhost/?{CANARY}",
}
TRACKS = [
    CANARY.encode(),
    CANARY.upper().encode(),
    CANARY.encode("utf-16-le"),
    CANARY.encode().hex().encode(),
    *(base64.b64encode(bytes(shift) + CANARY.encode())[4:-4] for shift in range(3)),
]
"""The word as it stands in text and in what text is often turned into."""


def tracks_in(data: bytes) -> str:
    """What was found, with what stands around it; empty if nothing was."""
    for track in TRACKS:
        if (at := data.find(track)) >= 0:
            return repr(data[max(0, at - 200) : at + 200])
    return ""


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def assert_no_tracks(daemon: Daemon, *, is_running: bool) -> None:
    found = {name: tracks_in(data) for name, data in files_of(daemon.directory).items()}
    if is_running:
        for page in PAGES:
            for accept in ("*/*", "application/openmetrics-text"):
                reply = daemon.get(page, {"Accept": accept})
                found[page] = tracks_in(reply.body) + tracks_in(repr(reply.headers).encode())
    assert {place: text for place, text in found.items() if text} == {}


@pytest.mark.parametrize("arguments", [(), ("--log-level", "debug", "--log-format", "json")], ids=["default", "debug"])
def test_content_and_secrets_stand_nowhere(make_daemon: Callable[..., Daemon], arguments: tuple[str, ...]) -> None:
    daemon = make_daemon(*arguments).start()
    for path, body, kind, status, headers in posts():
        reply = daemon.post(path, body, kind, {**SECRET_HEADERS, **dict(headers)})
        assert reply.status == status, (path, body[:80], reply.text)
        assert tracks_in(reply.body) == ""
    for page in PAGES:
        daemon.get(page, SECRET_HEADERS)
    assert_no_tracks(daemon, is_running=True)
    assert VISIBLE in daemon.get("/metrics").text
    daemon.kill()
    assert_no_tracks(daemon, is_running=False)
    daemon.start()
    assert_no_tracks(daemon, is_running=True)
    assert daemon.stop() == 0
    assert_no_tracks(daemon, is_running=False)
    assert any(VISIBLE.encode() in data for data in files_of(daemon.state_dir).values())


PEOPLE = ("session.id", "user.id", "user.email", "user.account_uuid", "request_id", "client_request_id", "tool_name")


@pytest.mark.parametrize("kind", [JSON, PROTOBUF])
def test_denied_attributes_of_events_stand_nowhere_and_sources_still_join(
    make_daemon: Callable[..., Daemon], tmp_path_factory: pytest.TempPathFactory, kind: str
) -> None:
    """One request as metrics, event and transcript tell of it, under a session that must not be known."""
    root = tmp_path_factory.mktemp("config") / "projects"
    root.mkdir()
    environment = {"BRIDGE_LABELS_DENY": ",".join(PEOPLE), "CLAUDE_CONFIG_DIR": str(root.parent)}
    daemon = make_daemon("--log-level", "debug", env=environment).start()
    wait_until_read(daemon, root)
    people = [attribute(key, canary(key)) for key in PEOPLE]
    point = {**TIMES, "asInt": "10", "attributes": [*people, attribute("model", MODELS[0]), attribute("type", "input")]}
    added = {"aggregationTemporality": 1, "isMonotonic": True, "dataPoints": [point]}
    metric = {"name": "claude_code.token.usage", "sum": added}
    scope = {"name": "com.anthropic.claude_code"}
    resource = {"attributes": [attribute("service.name", "claude-code")]}
    metrics = {"resourceMetrics": [{"resource": resource, "scopeMetrics": [{"scope": scope, "metrics": [metric]}]}]}
    told = [attribute("input_tokens", {"intValue": "10"}), attribute("output_tokens", {"intValue": "20"})]
    records = [
        {
            "timeUnixNano": "5",
            "attributes": [attribute("event.name", name), attribute("model", MODELS[0]), *people, *told],
        }
        for name in ("api_request", "api_error", "tool_result", "tool_decision", "user_prompt")
    ]
    logs = {"resourceLogs": [{"resource": resource, "scopeLogs": [{"scope": scope, "logRecords": records}]}]}
    line = response("msg_1", None, sessionId=canary("session.id"))
    (root / "p").mkdir()
    (root / "p" / "s.jsonl").write_bytes(line)
    for path, request, message in (
        ("/v1/metrics", metrics, ExportMetricsServiceRequest()),
        ("/v1/logs", logs, ExportLogsServiceRequest()),
    ):
        body = json.dumps(request).encode() if kind == JSON else ParseDict(request, message).SerializeToString()
        assert daemon.post(path, body, kind).status == 200
    assert eventually(lambda: select(daemon, "select count(*) from usage") == [(2,)])
    shown = daemon.samples()
    assert shown['claude_code_token_usage{type="input"}'] == "10"
    assert shown['claude_code_token_usage{type="output"}'] == "20"
    assert select(daemon, "select count(*) from session") == [(1,)]
    assert "ai_errors_total" in daemon.get("/metrics").text
    assert_no_tracks(daemon, is_running=True)
    assert daemon.stop() == 0
    assert_no_tracks(daemon, is_running=False)


def test_the_search_finds_what_it_looks_for() -> None:
    text = f"a{CANARY}b".encode()
    for data in (text, b"\0" + text, base64.b64encode(text), base64.b64encode(b"12" + text), text.hex().encode()):
        assert tracks_in(data)
    assert not tracks_in(VISIBLE.encode())
    for _, request, message in SIGNALS:
        assert ParseDict(request, message()).SerializeToString().count(CANARY.encode()) > 20
