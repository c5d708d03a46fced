"""Canaries: a text of its own in every field of every signal, in headers and in transcripts; none may be found again.

Searched are the state directory with its WAL, mark and copies, the log, every page and every answer, in the spellings
of tests/test_privacy.py; while the bridge runs, after a kill and after a stop.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from bridge.tools import known
from tests.daemon import JSON, PROTOBUF, Daemon
from tests.test_privacy import CANARY, CONTENT_KEYS, PAGES, VISIBLE, assert_no_tracks, attribute, tracks_in
from tests.test_transcripts import eventually, select, wait_until_read
from tests.transcript_tree import response

KEPT = {"name", "unit", "description", "version"}
"""Fields of a metric and its scope that are there to be shown."""


class Aviary:
    """Makes canaries, each different from all others."""

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def __call__(self) -> str:
        return f"{CANARY}!{next(self._numbers)}!"

    @property
    def count(self) -> int:
        return int(repr(self._numbers).partition("(")[2].rstrip(")"))


def fill(message: Any, canary: Aviary, depth: int = 0, *, is_metric: bool = False) -> None:
    """A canary in every string and bytes field of a message and of all messages in it, each once."""
    for field in message.DESCRIPTOR.fields:
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            if depth < 9 and not (field.containing_oneof and message.WhichOneof(field.containing_oneof.name)):
                inner = getattr(message, field.name).add() if field.is_repeated else getattr(message, field.name)
                inner.SetInParent()
                fill(inner, canary, depth + 1, is_metric=is_metric)
        elif field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
            if is_metric and field.name in KEPT:
                continue
            text: Any = canary() if field.type == FieldDescriptor.TYPE_STRING else canary().encode()
            if field.is_repeated:
                getattr(message, field.name).append(text)
            elif not (field.containing_oneof and message.WhichOneof(field.containing_oneof.name)):
                setattr(message, field.name, text)


def attributes(canary: Aviary) -> list[dict[str, Any]]:
    """A canary in every type of value, under content-like keys and under a key of its own."""
    pairs = []
    for key in (*CONTENT_KEYS, canary()):
        text = canary()
        inner = {"kvlistValue": {"values": [attribute(canary(), canary()), attribute("prompt", canary())]}}
        pairs += [attribute(key, text), attribute(f"{key}.list", {"arrayValue": {"values": [inner]}})]
    return pairs


def logs(canary: Aviary) -> dict[str, Any]:
    """Every event that is known and one that is not, with what must not be kept under every key but the known ones."""
    records = [
        {
            "timeUnixNano": "1795235315603000000",
            "severityText": canary(),
            "body": {"stringValue": canary()},
            "attributes": [attribute("event.name", name), attribute("model", VISIBLE), *attributes(canary)],
        }
        for name in (*known.EVENT_KEYS, canary())
    ]
    return {"resourceLogs": [{"scopeLogs": [{"scope": {"name": canary()}, "logRecords": records}]}]}


def metrics(canary: Aviary) -> dict[str, Any]:
    """Points of Claude Code's and of another counter with content-like attributes; what is refused; exemplars."""
    times = {"startTimeUnixNano": "1795235255603000000", "timeUnixNano": "1795235315603000000"}
    content = [attribute(key, canary()) for key in CONTENT_KEYS]
    nested = {"kvlistValue": {"values": [attribute("prompt", canary()), attribute("error", canary())]}}
    exemplar = {"asInt": "1", "timeUnixNano": "5", "filteredAttributes": [attribute("x", canary()), *content]}
    points = [
        {**times, "asInt": "5", "attributes": [attribute("type", "input"), attribute("model", VISIBLE), *content]},
        {**times, "asInt": "6", "attributes": [attribute("details", nested)], "exemplars": [exemplar]},
        {**times, "asInt": "-1", "attributes": [attribute("command", canary())]},
        {**times, "attributes": [attribute("headers", canary())]},
    ]
    data = {"aggregationTemporality": 1, "isMonotonic": True, "dataPoints": points}
    found = [
        {"name": name, "sum": data, "metadata": [attribute("x", canary())], canary(): canary()}
        for name in ("claude_code.token.usage", "other.counter")
    ]
    scope = {"name": "s", "attributes": [attribute("x", canary())]}
    resource = {"attributes": [attribute(key, canary()) for key in CONTENT_KEYS]}
    return {
        "resourceMetrics": [
            {
                "resource": resource,
                "schemaUrl": canary(),
                "scopeMetrics": [{"scope": scope, "schemaUrl": canary(), "metrics": found}],
            }
        ],
        canary(): [canary()],
    }


def bodies(canary: Aviary) -> Iterator[tuple[str, str, bytes]]:
    """Path, type and body."""
    for path, kind in (("/v1/logs", ExportLogsServiceRequest), ("/v1/traces", ExportTraceServiceRequest)):
        for _ in range(2):
            request: Message = kind()
            fill(request, canary)
            yield path, PROTOBUF, request.SerializeToString()
            yield path, JSON, json.dumps(MessageToDict(request)).encode()
    empty = ExportMetricsServiceRequest()
    resource = empty.resource_metrics.add()
    fill(resource.scope_metrics.add().metrics.add().sum.data_points.add().exemplars.add(), canary, is_metric=True)
    yield "/v1/metrics", PROTOBUF, empty.SerializeToString()
    yield "/v1/logs", JSON, json.dumps(logs(canary)).encode()
    yield "/v1/metrics", JSON, json.dumps(metrics(canary)).encode()
    for path in ("/v1/metrics", "/v1/logs", "/v1/traces"):
        yield path, JSON, json.dumps({canary(): canary()}).encode()[:-1]
        yield path, JSON, json.dumps([canary(), {canary(): canary()}]).encode()
        yield path, PROTOBUF, b"\x0a\x7f" + canary().encode()
        yield path, canary(), canary().encode()
        yield f"{path}/{canary()}?{canary()}={canary()}", JSON, canary().encode()


def secret_headers(canary: Aviary) -> dict[str, str]:
    names = (
        "Authorization", "Cookie", "X-Api-Key", "Proxy-Authorization", "Referer", "User-Agent", "Accept",
        "Accept-Language",
        "X-Forwarded-For", "Forwarded", "X-Real-IP", "If-None-Match", "From", "Traceparent", "Baggage", "X-Request-Id",
        "Content-Disposition", "Origin-Trial", "X-Prometheus-Scrape-Timeout-Seconds-X",
    )  # fmt: skip
    return {name: f"Bearer {canary()}" if name == "Authorization" else canary() for name in names}


def transcript(canary: Aviary) -> bytes:
    """A response between lines that hold what people write: prompts, tools, thoughts, summaries, paths, errors."""
    content = [
        {"type": kind, key: canary(), "input": {canary(): canary()}}
        for kind, key in (("text", "text"), ("thinking", "thinking"), ("tool_use", "name"), ("tool_result", "content"))
    ]
    lines: list[dict[str, Any]] = [
        {"type": "user", "message": {"role": "user", "content": canary()}, "gitBranch": canary()},
        {"type": "summary", "summary": canary(), "leafUuid": canary()},
        {"type": "file-history-snapshot", "snapshot": {canary(): canary()}},
        {"type": "system", "content": canary(), "toolUseID": canary()},
        {"type": "user", "toolUseResult": {"stdout": canary(), "stderr": canary(), "filePath": canary()}},
        {canary(): {"usage": {"input_tokens": 1}}, "message": canary()},
    ]
    text = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    told = response("msg_1", "req_1", content=content, version=canary(), gitBranch=canary(), slug=canary())
    return text + told + b'{"message":{"usage":{"input_tokens":' + canary().encode() + b"}}}\n"


def test_no_canary_is_found_again(make_daemon: Callable[..., Daemon], tmp_path_factory: Any) -> None:
    canary = Aviary()
    root: Path = tmp_path_factory.mktemp("config") / "projects"
    root.mkdir()
    daemon = make_daemon("--log-level", "debug", env={"CLAUDE_CONFIG_DIR": str(root.parent)}).start()
    wait_until_read(daemon, root)
    (root / "p").mkdir()
    (root / "p" / "s.jsonl").write_bytes(transcript(canary))
    statuses = set()
    for path, kind, body in bodies(canary):
        reply = daemon.post(path, body, kind, secret_headers(canary))
        statuses.add(reply.status)
        assert tracks_in(reply.body + repr(reply.headers).encode()) == "", path
    assert {200, 400, 404, 415} <= statuses <= {200, 400, 404, 415}
    for page in PAGES:
        daemon.get(f"{page}?{canary()}={canary()}", secret_headers(canary))
    assert eventually(lambda: select(daemon, "select count(*) from usage where output") == [(1,)])
    assert canary.count > 400
    assert_no_tracks(daemon, is_running=True)
    assert VISIBLE in daemon.get("/metrics").text
    daemon.kill()
    assert_no_tracks(daemon, is_running=False)
    daemon.start()
    assert_no_tracks(daemon, is_running=True)
    assert daemon.stop() == 0
    assert_no_tracks(daemon, is_running=False)
