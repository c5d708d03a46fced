"""The real Codex CLI against a small mock of the API that it speaks to, which knows what it handed out.

    python -m tests.clients.codex_cli codex tests/recordings/codex

records a run for each encoding of OTLP: the bodies, the rollouts without what was said in them, and the truth.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

OLD_SECONDS = 20 * 86_400
"""Rollouts that nobody touched for so long are packed."""
_ROLLOUT = re.compile(r"rollout-.{19}-([0-9a-f-]{36})")
_MESSAGES: dict[str, Any] = {"metrics": ExportMetricsServiceRequest, "logs": ExportLogsServiceRequest}


class Handed(NamedTuple):
    """What the mock told a client that one response used."""

    model: str
    prompt: int
    cached: int
    written: int
    output: int


def tokens(handed: list[Handed]) -> dict[str, dict[str, int]]:
    """Model -> kind -> tokens, and the number of requests."""
    sums: dict[str, Counter[str]] = {}
    for one in handed:
        new = one.prompt - one.cached - one.written
        counts = {"input": new, "output": one.output, "cache_read": one.cached, "cache_write": one.written}
        sums.setdefault(one.model, Counter()).update({**counts, "requests": 1})
    return {model: dict(counts) for model, counts in sums.items()}


class MockApi:
    """Answers `/v1/responses` with a stream, and keeps what it is sent under other paths.

    The prompt says what to do: TOOL calls a tool first, SPAWN starts two agents, LONG has a prompt above every limit,
    FAIL gets 500 once.
    """

    def __init__(self) -> None:
        self.handed: list[Handed] = []
        self.bodies: list[tuple[str, bytes]] = []
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._failed: set[str] = set()
        mock = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the name is given
                pass

            def do_GET(self) -> None:
                self.answer(200, b'{"object":"list","data":[],"models":[]}')

            def do_POST(self) -> None:
                body = self.read()
                if self.path.rpartition("/")[2] in _MESSAGES:
                    mock.bodies.append((self.path.rpartition("/")[2], body))
                    self.answer(200, b"")
                elif self.path == "/v1/responses":
                    if self.headers.get("Content-Encoding") == "zstd":
                        body = zstd.decompress(body)
                    self.answer(*mock.respond(json.loads(body)), kind="text/event-stream")
                else:
                    self.answer(404, b"{}")

            def read(self) -> bytes:
                if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                body = b""
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

            def answer(self, status: int, body: bytes, kind: str = "application/json") -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("x-codex-primary-used-percent", str(len(mock.handed)))
                self.send_header("x-codex-primary-window-minutes", "300")
                self.send_header("x-codex-primary-reset-at", "1795999999")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def respond(self, request: dict[str, Any]) -> tuple[int, bytes]:
        last = json.dumps(request["input"][-1])
        with self._lock:
            number = next(self._numbers)
            if "FAIL" in last and last not in self._failed:
                self._failed.add(last)
                return 500, b'{"error":{"message":"once"}}'
            prompt = (300_000 if "LONG" in last else 1_000) + 100 * number
            used = Handed(request["model"], prompt, 10 * number, number, 50 + number)
            self.handed.append(used)
        items = _items(last, number)
        response: dict[str, Any] = {"id": f"resp_{number:04d}", "model": used.model, "usage": _usage(used, number)}
        events: list[dict[str, Any]] = [
            {"type": "response.created", "response": {"id": response["id"]}},
            *({"type": "response.output_item.done", "output_index": 0, "item": item} for item in items),
            {"type": "response.completed", "response": response},
        ]
        return 200, "".join(f"event: {one['type']}\ndata: {json.dumps(one)}\n\n" for one in events).encode()


def _usage(used: Handed, reasoning: int) -> dict[str, Any]:
    return {
        "input_tokens": used.prompt,
        "input_tokens_details": {"cached_tokens": used.cached, "cache_write_tokens": used.written},
        "output_tokens": used.output,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": used.prompt + used.output,
    }


def _items(last: str, number: int) -> list[dict[str, Any]]:
    """What the model says next to what it was told last."""
    is_user = '"user"' in last
    if "TOOL" in last and is_user:
        return [_call(f"{number}", "exec_command", cmd="echo hi")]
    if "SPAWN" in last and is_user:
        return [
            {**_call(f"{number}{name}", "spawn_agent", message="child TOOL", task_name=name, fork_turns=turns),
             "namespace": "collaboration"}
            for name, turns in (("kid_one", "all"), ("kid_two", "none"))
        ]  # fmt: skip
    if "function_call_output" in last and "kid_two" in last:
        return [{**_call(f"{number}", "wait_agent", timeout_ms=10_000), "namespace": "collaboration"}]
    text = {"type": "output_text", "text": f"answer {number}"}
    return [{"type": "message", "id": f"msg_{number}", "role": "assistant", "content": [text]}]


def _call(name: str, tool: str, **arguments: Any) -> dict[str, Any]:
    call = {"type": "function_call", "id": f"fc_{name}", "call_id": f"call_{name}", "name": tool}
    return {**call, "arguments": json.dumps(arguments)}


class Codex:
    """A clean user of the CLI, whose exports go to `endpoint`; `signals` of metrics and logs are switched on."""

    def __init__(self, command: str, directory: Path, mock: MockApi) -> None:
        self.command = command
        self.home = directory / ".codex"
        self.work = directory / "work"
        self.mock = mock
        self.home.mkdir(parents=True)
        self.work.mkdir()
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("OTEL_", "XDG_", "CODEX_"))}
        self.environment = {**kept, "HOME": str(directory), "CODEX_HOME": str(self.home), "MOCK_KEY": "k"}
        self.run_quietly("git", "init", "-q", ".")

    def export(self, endpoint: str, signals: tuple[str, ...], protocol: str) -> None:
        """Write the settings."""
        exporters = {
            key: f'{{ otlp-http = {{ endpoint = "{endpoint}/v1/{signal}", protocol = "{protocol}" }} }}'
            for key, signal in (("exporter", "logs"), ("metrics_exporter", "metrics"))
            if signal in signals
        }
        both = {"exporter": '"none"', "metrics_exporter": '"none"', **exporters}
        (self.home / "config.toml").write_text(
            f"""model = "gpt-5.5"
model_provider = "mock"
approval_policy = "never"
sandbox_mode = "danger-full-access"
check_for_update_on_startup = false
[model_providers.mock]
name = "mock"
base_url = "http://127.0.0.1:{self.mock.port}/v1"
env_key = "MOCK_KEY"
wire_api = "responses"
request_max_retries = 2
stream_max_retries = 0
[otel]
environment = "test"
{"".join(f"{key} = {value}{chr(10)}" for key, value in both.items())}"""
        )

    def run_quietly(self, *command: str) -> None:
        done = subprocess.run(
            command, cwd=self.work, env=self.environment, capture_output=True, text=True, timeout=120,
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        assert not done.returncode, done.stderr[-3000:]

    def exec(self, *arguments: str) -> None:
        self.run_quietly(self.command, "exec", "--skip-git-repo-check", *arguments)

    def rollouts(self) -> list[Path]:
        """All of them, the oldest first."""
        return sorted(self.home.glob("*sessions/**/rollout-*"), key=lambda path: path.name)

    def thread(self, number: int) -> str:
        found = _ROLLOUT.match(self.rollouts()[number].name)
        assert found
        return found[1]


def first_half(codex: Codex) -> None:
    """Several turns, a resume, a failed request, a long prompt, another model."""
    codex.exec("hello")
    codex.exec("resume", "--last", "again with TOOL")
    codex.exec("please FAIL once")
    codex.exec("-m", "gpt-5.6-sol", "a LONG one")


def second_half(codex: Codex) -> None:
    """Subagents, forks of old threads, a compaction, a review; what is old is archived and packed."""
    codex.exec("--enable", "multi_agent_v2", "please SPAWN")
    codex.exec("fork", codex.thread(0), "forked")
    codex.exec("-c", "model_auto_compact_token_limit=1000", "resume", codex.thread(0), "resumed")
    (codex.work / "new.txt").write_text("new\n")
    codex.exec("review", "--uncommitted")
    codex.run_quietly(codex.command, "archive", codex.thread(1))
    for path in codex.rollouts():
        os.utime(path, (path.stat().st_mtime - OLD_SECONDS,) * 2)
    codex.exec("--enable", "local_thread_store_compression", "last")


# --- recording ---------------------------------------------------------------------------------------------------

_KEPT = {
    "session_meta": ("id", "session_id", "forked_from_id", "parent_thread_id", "timestamp", "cwd", "cli_version",
                     "source", "history_mode", "history_base"),
    "turn_context": ("turn_id", "root_turn_id", "cwd", "approval_policy", "model"),
    "event_msg": ("type", "info", "rate_limits", "turn_id", "thread_id", "thread_settings"),
    "token_usage_record": ("thread_id", "turn_id", "session_id", "response_id", "usage", "thread_token_usage"),
}  # fmt: skip
"""Of other lines only the kind is kept."""
_KEPT_METRICS = "codex.turn."
_UNKEPT = frozenset({"arguments", "output", "prompt", "content", "error.message"})


def _line(text: str) -> str:
    line = json.loads(text)
    kept = _KEPT.get(line["type"], ("type",))
    line["payload"] = {key: value for key, value in line["payload"].items() if key in kept}
    return json.dumps(line, separators=(",", ":"))


def _without_content(value: Any) -> Any:
    """A body without what was said, without the machine's name, and with few of its 150 metrics."""
    match value:
        case {"metrics": list(metrics)}:
            return {**value, "metrics": [one for one in metrics if one["name"].startswith(_KEPT_METRICS)]}
        case {"key": "host.name", "value": _}:
            return {"key": "host.name", "value": {"stringValue": "host"}}
        case {"key": key, "value": _} if key in _UNKEPT:
            return {"key": key, "value": {"stringValue": "x"}}
        case dict():
            return {name: _without_content(member) for name, member in value.items()}
        case list():
            return [_without_content(member) for member in value]
    return value


def record(command: str, directory: Path, protocol: str) -> None:
    mock = MockApi()
    with tempfile.TemporaryDirectory() as place:
        codex = Codex(command, Path(place).resolve(), mock)
        codex.export(f"http://127.0.0.1:{mock.port}", ("metrics", "logs"), protocol)
        first_half(codex)
        second_half(codex)
        home = str(codex.home.parent)
        for number, (signal, body) in enumerate(mock.bodies):
            path = directory / f"{number:02d}-{signal}.{protocol}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if protocol == "json":
                content = _without_content(json.loads(body.decode().replace(home, "/home/u")))
                path.write_text(json.dumps(content, separators=(",", ":")))
            else:
                message = _MESSAGES[signal].FromString(body)
                path.write_bytes(_without_content_in(message).SerializeToString())
        for path in codex.rollouts():
            packed = path.suffix == ".zst"
            text = (zstd.decompress(path.read_bytes()) if packed else path.read_bytes()).decode()
            lines = "".join(f"{_line(line)}\n" for line in text.splitlines())
            kept = lines.replace(home, "/home/u").encode()
            target = directory / "home" / path.relative_to(codex.home)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(zstd.compress(kept) if packed else kept)
    (directory / "expected.json").write_text(json.dumps(tokens(mock.handed), indent=1) + "\n")
    mock.close()


def _without_content_in(message: Any) -> Any:
    for field, value in message.ListFields():
        if field.name == "metrics":
            kept = [one for one in value if one.name.startswith(_KEPT_METRICS)]
            del value[:]
            value.extend(kept)
        elif field.name == "attributes":
            for attribute in value:
                if attribute.key in _UNKEPT | {"host.name"}:
                    attribute.value.string_value = "host" if attribute.key == "host.name" else "x"
        elif field.message_type is not None:
            for one in value if field.is_repeated else (value,):
                _without_content_in(one)
    return message


def main(arguments: list[str]) -> None:
    command, directory = arguments
    for protocol in ("json", "binary"):
        record(command, Path(directory) / protocol, protocol)


if __name__ == "__main__":
    main(sys.argv[1:])
