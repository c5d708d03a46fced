"""The real Claude Code against a small mock of the Messages API, which knows what it billed.

    python -m tests.clients.claude_code claude tests/recordings

records the runs of RUNS: the bodies, the transcripts without what was said in them, and the truth.

A prompt says what the mock does: `DO[think+bash 529+text]` are two responses, the first with thinking and a call of
Bash, the second after an error.
"""

import gzip
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from bridge import setup

SECONDS = 120
_MESSAGES: dict[str, Any] = {"/v1/logs": ExportLogsServiceRequest, "/v1/metrics": ExportMetricsServiceRequest}
_SIGNALS = ("/v1/logs", "/v1/metrics", "/v1/traces")
_STEPS = re.compile(r"DO\[([^\]]*)\]")
_SESSION = re.compile(r"session_(?:id\W*)?([0-9a-f]{8}-[0-9a-f-]{27})")
AGENT_STEPS = "DO[think+read text]"


class Billed(NamedTuple):
    """What the mock told a client that one response used; tokens are disjoint."""

    request_id: str
    session: str
    model: str
    input: int
    output: int
    read: int
    written_5m: int
    written_1h: int
    searches: int = 0
    is_fast: bool = False
    is_complete: bool = True
    is_auxiliary: bool = False


def tokens(billed: Iterable[Billed]) -> dict[str, dict[str, int]]:
    """Model -> kind -> tokens."""
    sums: dict[str, Counter[str]] = {}
    for one in billed:
        written = one.written_5m + one.written_1h
        counts = {"input": one.input, "output": one.output, "cache_read": one.read, "cache_write": written}
        sums.setdefault(one.model, Counter()).update(counts)
    return {model: dict(counts) for model, counts in sums.items()}


class MockApi:
    """Answers `/v1/messages`, with a stream where it is asked for one, and keeps exports.

    With `answering` all responses are that model's, whichever is asked, as behind a gateway.
    """

    def __init__(self, answering: str = "") -> None:
        self.answering = answering
        self.billed: list[Billed] = []
        self.exports: list[tuple[str, str, str | None, bytes]] = []
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._failed: Counter[str] = Counter()
        mock = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the name is given
                pass

            def do_HEAD(self) -> None:
                self.answer(200, b"")

            def do_GET(self) -> None:
                self.answer(404, b'{"type":"error","error":{"type":"not_found_error","message":"none"}}')

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                path = self.path.partition("?")[0]
                if path == "/v1/messages":
                    mock.answer(self, json.loads(body))
                elif path == "/v1/messages/count_tokens":
                    self.answer(200, b'{"input_tokens":1234}')
                elif path in _SIGNALS:
                    kind = self.headers["Content-Type"]
                    mock.exports.append((path, kind, self.headers["Content-Encoding"], body))
                    self.answer(200, b"", kind)
                else:
                    self.do_GET()

            def answer(self, status: int, body: bytes, kind: str = "application/json", name: str = "") -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                if name:
                    self.send_header("request-id", name)
                self.end_headers()
                self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def tokens(self) -> dict[str, dict[str, int]]:
        """What was billed of responses that came to their end."""
        return tokens(one for one in self.billed if one.is_complete)

    def answer(self, handler: Any, request: dict[str, Any]) -> None:
        with self._lock:
            number = next(self._numbers)
            words, place = _words(request)
            errors = [word for word in words if word in _ERRORS or word == "break"]
            attempt = self._failed[place]
            self._failed[place] += 1
        name = f"req_{self.answering}{number:04d}"
        if attempt < len(errors) and errors[attempt] in _ERRORS:
            status, kind = _ERRORS[errors[attempt]]
            said = {"type": "error", "error": {"type": kind, "message": kind}, "request_id": name}
            handler.answer(status, json.dumps(said).encode(), name=name)
            return
        is_broken = attempt < len(errors)
        found = _SESSION.search(str(request.get("metadata", {}).get("user_id", "")))
        is_fast = "fast" in words or request.get("speed") == "fast"
        searches = 2 if "search" in words or _searches(request) else 0
        used = Billed(
            name, found[1] if found else "", request["model"], 10 + number, 50 + 3 * number, 1000 + 7 * number,
            20 + 2 * number, 30 + 5 * number if "1h" in words else 0, searches, is_fast,
            not is_broken, not words,
        )  # fmt: skip
        if "long" in words:
            used = used._replace(read=210_000 + number)
        if "plain" in words:
            used = used._replace(read=0, written_5m=0, written_1h=0)
        with self._lock:
            self.billed.append(used)
        response: dict[str, Any] = {
            "id": f"msg_{self.answering}{number:04d}", "type": "message", "role": "assistant",
            "model": self.answering or used.model, "content": list(_blocks(words, request, number)),
            "stop_sequence": None, "usage": _usage(used, words),
        }  # fmt: skip
        is_call = any(block["type"] == "tool_use" for block in response["content"])
        response["stop_reason"] = "tool_use" if is_call else "refusal" if "refusal" in words else "end_turn"
        if not request.get("stream"):
            handler.answer(200, json.dumps(response).encode(), name=name)
            return
        events = "".join(f"event: {one['type']}\ndata: {json.dumps(one)}\n\n" for one in _events(response)).encode()
        if not is_broken:
            handler.answer(200, events, "text/event-stream", name)
            return
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("request-id", name)
        handler.send_header("Content-Length", str(len(events)))
        handler.end_headers()
        handler.wfile.write(events[: events.index(b"content_block_stop") - 7])
        handler.wfile.flush()
        handler.close_connection = True


_ERRORS = {
    "429": (429, "rate_limit_error"), "500": (500, "api_error"), "529": (529, "overloaded_error"),
    "400": (400, "invalid_request_error"),
}  # fmt: skip


def _searches(request: dict[str, Any]) -> bool:
    return any(str(tool.get("type", "")).startswith("web_search") for tool in request.get("tools", []))


def _words(request: dict[str, Any]) -> tuple[list[str], str]:
    """What this response is to be, and a name for its place in the conversation."""
    if not request.get("tools") or _searches(request):
        return [], json.dumps(request["messages"])[-2000:]
    turn = 0
    for message in reversed(request["messages"]):
        if message["role"] == "assistant":
            turn += 1
            continue
        content: Any = message["content"]
        texts: list[str] = [content] if isinstance(content, str) else [one.get("text", "") for one in content]
        for text in reversed(texts):
            if found := _STEPS.findall(text):
                steps = found[-1].split()
                step = steps[turn] if turn < len(steps) else "text"
                return step.split("+"), f"{text}{turn}{len(request['messages'])}"
    return [], json.dumps(request["messages"])[-2000:]


_CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "bash": ("Bash", {"command": "echo hi", "description": "say hi"}),
    "read": ("Read", {"file_path": "/etc/hostname"}),
    "agent": ("Agent", {"description": "look", "prompt": AGENT_STEPS, "subagent_type": "general-purpose"}),
    "web": ("WebSearch", {"query": "anything at all"}),
    "write": ("Write", {"file_path": "new.py", "content": "a = 1\nb = 2\n"}),
    "commit": ("Bash", {"command": "git commit --allow-empty -qm x", "description": "commit"}),
}


def _blocks(words: list[str], request: dict[str, Any], number: int) -> Iterator[dict[str, Any]]:
    offered = {tool.get("name") for tool in request.get("tools", [])}
    if "think" in words:
        yield {"type": "thinking", "thinking": "hm", "signature": "c2ln"}
    if _searches(request):
        yield {"type": "server_tool_use", "id": f"srvtoolu_{number}", "name": "web_search", "input": {"query": "x"}}
        found = {"type": "web_search_result", "url": "http://127.0.0.1/", "title": "t", "encrypted_content": "x",
                 "page_age": None}  # fmt: skip
        yield {"type": "web_search_tool_result", "tool_use_id": f"srvtoolu_{number}", "content": [found]}
    yield {"type": "text", "text": f"answer {number}"}
    for index, word in enumerate(words):
        if word in _CALLS:
            name, given = _CALLS[word]
            if name == "Agent" and name not in offered:
                name = "Task"
            yield {"type": "tool_use", "id": f"toolu_{number:04d}{index}", "name": name, "input": given}


def _usage(used: Billed, words: list[str]) -> dict[str, Any]:
    usage: dict[str, Any] = {
        "input_tokens": used.input,
        "output_tokens": used.output,
        "cache_read_input_tokens": used.read,
        "cache_creation_input_tokens": used.written_5m + used.written_1h,
        "cache_creation": {
            "ephemeral_5m_input_tokens": used.written_5m, "ephemeral_1h_input_tokens": used.written_1h
        },
        "service_tier": "standard",
    }  # fmt: skip
    if used.searches:
        usage["server_tool_use"] = {"web_search_requests": used.searches, "web_fetch_requests": 0}
    if used.is_fast:
        usage["speed"] = "fast"
    if "us" in words:
        usage["inference_geo"] = "us"
    return usage


def _events(response: dict[str, Any]) -> Iterator[dict[str, Any]]:
    begun = {**response, "content": [], "stop_reason": None, "usage": {**response["usage"], "output_tokens": 1}}
    yield {"type": "message_start", "message": begun}
    for index, block in enumerate(response["content"]):
        empty: dict[str, Any]
        match block["type"]:
            case "text":
                empty, delta = {**block, "text": ""}, {"type": "text_delta", "text": block["text"]}
            case "thinking":
                empty = {**block, "thinking": "", "signature": ""}
                delta = {"type": "thinking_delta", "thinking": block["thinking"]}
            case "tool_use" | "server_tool_use":
                empty = {**block, "input": {}}
                delta = {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}
            case _:
                empty, delta = block, {}
        yield {"type": "content_block_start", "index": index, "content_block": empty}
        if delta:
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        if block["type"] == "thinking":
            signature = {"type": "signature_delta", "signature": block["signature"]}
            yield {"type": "content_block_delta", "index": index, "delta": signature}
        yield {"type": "content_block_stop", "index": index}
    ended = {"stop_reason": response["stop_reason"], "stop_sequence": None}
    yield {"type": "message_delta", "delta": ended, "usage": response["usage"]}
    yield {"type": "message_stop"}


class Claude:
    """A clean user of the client, who asks the mock; `cost` is what the client says of all that was asked."""

    def __init__(self, command: str, directory: Path, mock: MockApi) -> None:
        self.command = command
        self.home = directory / "home"
        self.config = self.home / ".claude"
        self.work = directory / "work"
        self.cost = 0.0
        self._totals: dict[str, float] = {}
        self.config.mkdir(parents=True)
        self.work.mkdir()
        self.environment = {
            "PATH": os.environ["PATH"], "HOME": str(self.home), "CLAUDE_CONFIG_DIR": str(self.config),
            "ANTHROPIC_BASE_URL": mock.url, "ANTHROPIC_API_KEY": "dummy", "DISABLE_AUTOUPDATER": "1",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_TELEMETRY": "1", "DISABLE_ERROR_REPORTING": "1",
            "IS_SANDBOX": "1", "TERM": "xterm-256color", "LANG": "C.UTF-8", "GIT_AUTHOR_NAME": "u",
            "GIT_AUTHOR_EMAIL": "u@localhost", "GIT_COMMITTER_NAME": "u", "GIT_COMMITTER_EMAIL": "u@localhost",
        }  # fmt: skip
        subprocess.run(["git", "init", "-q", "."], cwd=self.work, env=self.environment, check=True)

    def configure(self, endpoint: str, variables: Mapping[str, str]) -> None:
        """As `setup` does, and these variables beside; a variable that is empty is left out."""
        setup.run("claude", "write", endpoint, self.environment)
        path = self.config / "settings.json"
        settings = json.loads(path.read_text())
        both = {**settings["env"], **variables}
        settings["env"] = {name: value for name, value in both.items() if value}
        path.write_text(json.dumps(settings))

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """One run without a terminal."""
        command = [self.command, "-p", "--output-format", "json", "--dangerously-skip-permissions", *arguments]
        return subprocess.Popen(
            command, cwd=self.work, env=self.environment, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def finish(self, process: "subprocess.Popen[str]", forked_from: str = "") -> dict[str, Any]:
        """What the client says at its end. Its costs are of whole sessions, a fork's with that of its beginning."""
        try:
            out, error = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        try:
            found = json.loads(out)
        except ValueError:
            raise AssertionError(f"{process.returncode}: {out[-2000:]}{error[-2000:]}") from None
        result: dict[str, Any] = found[-1] if isinstance(found, list) else found
        session, total = result["session_id"], result["total_cost_usd"]
        self.cost += total - self._totals.get(forked_from or session, 0.0)
        self._totals[session] = total
        return result

    def ask(self, *arguments: str, forked_from: str = "") -> dict[str, Any]:
        return self.finish(self.start(*arguments), forked_from)


# --- recording ---------------------------------------------------------------------------------------------------

RUNS: dict[str, tuple[str, dict[str, str], tuple[tuple[str, ...], ...]]] = {
    "v332-traces": (
        "",
        {
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json", "CLAUDE_CODE_ENHANCED_TELEMETRY_BETA": "1",
            "OTEL_TRACES_EXPORTER": "otlp", "OTEL_SERVICE_NAME": "my-team",
        },
        (("DO[think+bash agent text]",),),
    ),
    "v332-gateway": (
        "glm-4.6",
        {"OTEL_EXPORTER_OTLP_COMPRESSION": "gzip"},
        (("--model", "claude-opus-5", "DO[bash text]"), ("--continue", "--model", "claude-opus-5", "DO[529+text]")),
    ),
}  # fmt: skip
"""By name: the model that answers, the client's environment, what it is asked."""
_KEPT = frozenset(
    {"type", "uuid", "parentUuid", "isSidechain", "timestamp", "sessionId", "agentId", "cwd", "version", "requestId",
     "requestedModel", "apiBlockIndex", "message", "totalCostUSD", "modelUsage"}
)  # fmt: skip
_OF_MACHINE = {"user.id": "0" * 64, "os.version": "6.1.0"}


def record(command: str, directory: Path, run: str) -> None:
    answering, variables, questions = RUNS[run]
    place = directory / run
    for old in (place, directory / "transcripts" / run):
        shutil.rmtree(old, ignore_errors=True)
    place.mkdir()
    mock = MockApi(answering)
    cost: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        claude = Claude(command, Path(temporary).resolve(), mock)
        claude.configure(mock.url, variables)
        for question in questions:
            for model, used in claude.ask(*question)["modelUsage"].items():
                cost[model] = used["costUSD"]  # of the whole session, also where it goes on
        entries = [_save(place, number, *export) for number, export in enumerate(mock.exports, 1)]
        for path in claude.config.glob("projects/**/*.jsonl"):
            folder, *rest = path.relative_to(claude.config / "projects").parts
            target = (directory / "transcripts" / run / "projects" / f"-home-u-code-{run}").joinpath(*rest)
            target.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text().replace(folder, f"-home-u-code-{run}")
            text = text.replace(str(claude.work), f"/home/u/code/{run}")
            target.write_text("".join(f"{_line(line)}\n" for line in text.splitlines()))
    mock.close()
    known = _as_the_client_says(mock.tokens())
    _note(directory / "index.json", run, entries)
    _note(directory / "expected.json", run, {"tokens": known, "cost_usd": cost})
    told = dict.fromkeys([answering], *known.values()) if answering else known
    _note(directory / "transcripts" / "expected.json", run, told)


def _as_the_client_says(sums: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    names = {"input": "input", "output": "output", "cache_read": "cacheRead", "cache_write": "cacheCreation"}
    return {model: {names[kind]: count for kind, count in counts.items()} for model, counts in sums.items()}


def _save(place: Path, number: int, path: str, kind: str, encoding: str | None, body: bytes) -> dict[str, Any]:
    is_json = "json" in kind
    content = gzip.decompress(body) if encoding == "gzip" else body
    content = _cleaned_json(content) if is_json else _cleaned(_MESSAGES[path].FromString(content)).SerializeToString()
    suffix = ("json" if is_json else "bin") + (".gz" if encoding == "gzip" else "")
    name = f"{place.name}/{number:04}.{path.rpartition('/')[2]}.{suffix}"
    (place.parent / name).write_bytes(gzip.compress(content, mtime=0) if encoding == "gzip" else content)
    return {"body": name, "path": path, "content_type": kind, "content_encoding": encoding, "chunked": False}


def _cleaned_json(body: bytes) -> bytes:
    def of_nobody(members: dict[str, Any]) -> dict[str, Any]:
        if members.get("key") in _OF_MACHINE:
            return {"key": members["key"], "value": {"stringValue": _OF_MACHINE[members["key"]]}}
        return members

    return json.dumps(json.loads(body, object_hook=of_nobody), separators=(",", ":")).encode()


def _cleaned(message: Any) -> Any:
    for field, value in message.ListFields():
        if field.name == "attributes":
            for attribute in value:
                if attribute.key in _OF_MACHINE:
                    attribute.value.string_value = _OF_MACHINE[attribute.key]
        elif field.message_type is not None:
            for one in value if field.is_repeated else (value,):
                _cleaned(one)
    return message


def _line(text: str) -> str:
    """A line of a transcript without what was said."""
    line = {key: value for key, value in json.loads(text).items() if key in _KEPT}
    if isinstance(line.get("message"), dict):
        content = line["message"].get("content")
        blocks = [{"type": block["type"]} for block in content] if isinstance(content, list) else ""
        line["message"] = {**line["message"], "content": blocks}
    elif "message" in line:
        del line["message"]
    return json.dumps(line, separators=(",", ":"))


def _note(path: Path, run: str, value: Any) -> None:
    """Put a run's entry into an index, a line for each run as the others have it."""
    known = {**json.loads(path.read_text()), run: value}
    if path.parent.name == "transcripts":
        path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
        return
    lines = (f"{json.dumps(name)}: {_by_line(one)}" for name, one in known.items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _by_line(value: Any) -> str:
    if isinstance(value, list):
        return "[\n" + ",\n".join(f"  {json.dumps(one)}" for one in value) + "\n]"
    return json.dumps(value)


def main(arguments: list[str]) -> None:
    command, directory = arguments
    for run in RUNS:
        record(str(Path(command).resolve()), Path(directory).resolve(), run)


if __name__ == "__main__":
    main(sys.argv[1:])
