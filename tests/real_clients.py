"""Runs of real clients against stand-ins for their APIs: what they sent and wrote, and what they were billed.

    python -m tests.real_clients gemini-cli|genai-python

makes the recording of that name in `recorded_clients/` anew, without what is of this machine or was said. It needs
BRIDGE_TEST_GEMINI, the client's `gemini.js` (npm install @google/gemini-cli@0.61.0), or BRIDGE_TEST_GENAI, the `bin`
of an environment with the packages that the README names, `openai` and `anthropic`.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from bridge import setup
from tests.model_apis import Billed, ModelAPIs, model_apis

DIRECTORY = Path(__file__).parent / "recorded_clients"
CLIENTS = ("gemini-cli", "genai-python")
SECONDS = 180
SESSION_FILES = ".gemini/tmp"


class Sent(NamedTuple):
    """One export as it came, decompressed."""

    path: str
    content_type: str
    body: bytes


class Recording(NamedTuple):
    """A run: its exports, the files that it left below its home, and what its APIs billed."""

    sent: list[Sent]
    files: dict[str, bytes]
    billed: list[Billed]


def run_gemini(program: str, home: Path, apis: ModelAPIs, endpoint: str) -> None:
    """Two questions to Gemini CLI, of which each has it call a tool; its telemetry goes to `endpoint`."""
    place = home / "project"
    place.mkdir(parents=True, exist_ok=True)
    settings = {
        "security": {"auth": {"selectedType": "gemini-api-key"}},
        "general": {"enableAutoUpdate": False},
        "privacy": {"usageStatisticsEnabled": False},
    }
    (home / ".gemini").mkdir(exist_ok=True)
    (home / ".gemini" / "settings.json").write_text(json.dumps(settings))
    setup.run("gemini", "write", endpoint, {"HOME": str(home)})
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(home), "GEMINI_API_KEY": "none", "NO_COLOR": "1",
        "GOOGLE_GEMINI_BASE_URL": apis.url, "GEMINI_CLI_TRUST_WORKSPACE": "true",
    }  # fmt: skip
    for question in ("list the files", "list them again"):
        command = ["node", program, "-m", "gemini-2.5-flash", "-p", question, "--yolo"]
        _run(command, environment, place)


def run_genai(programs: str, home: Path, apis: ModelAPIs, endpoint: str) -> None:
    """The instrumented application, as the README starts one."""
    environment = {
        **os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(home), "OTEL_SERVICE_NAME": "my-app",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf", "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
    }  # fmt: skip
    client = Path(__file__).parent / "clients" / "genai_client.py"
    _run(["opentelemetry-instrument", "python", str(client), apis.url], environment, home)


def _run(command: list[str], environment: Mapping[str, str], place: Path) -> None:
    done = subprocess.run(command, cwd=place, env=environment, timeout=SECONDS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@contextmanager
def sink() -> Iterator[tuple[str, list[Sent]]]:
    """A receiver that keeps every export: its address, and what came."""
    kept: list[Sent] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Sink,), {"kept": kept}))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", kept
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Sink(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    kept: ClassVar[list[Sent]]

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""

    def do_POST(self) -> None:
        body = b""
        if self.headers.get("Transfer-Encoding"):
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        assert not self.headers.get("Content-Encoding")
        self.kept.append(Sent(self.path, self.headers["Content-Type"], body))
        self.send_response(200)
        self.send_header("Content-Type", self.headers["Content-Type"])
        self.send_header("Content-Length", "0")
        self.end_headers()


def record(client: str) -> Recording:
    """Run a real client and keep what it sent, wrote and was billed."""
    with tempfile.TemporaryDirectory() as directory, model_apis() as apis, sink() as (endpoint, kept):
        home = Path(directory)
        if client == "gemini-cli":
            run_gemini(os.environ["BRIDGE_TEST_GEMINI"], home, apis, endpoint)
        else:
            run_genai(os.environ["BRIDGE_TEST_GENAI"], home, apis, endpoint)
        root = home / SESSION_FILES
        files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("chats/**/*") if path.is_file()}
        return Recording(kept, files, apis.billed)


def load(client: str) -> Recording:
    """The recording of a client."""
    place = DIRECTORY / client
    index = json.loads((place / "index.json").read_text())
    sent = [Sent(path, content_type, (place / name).read_bytes()) for name, path, content_type in index["sent"]]
    root = place / "chats"
    files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return Recording(sent, files, [Billed(*one) for one in index["billed"]])


def save(client: str, recording: Recording) -> None:
    """Write a recording, without what is of this machine and without content."""
    place = DIRECTORY / client
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    index: list[tuple[str, str, str]] = []
    for number, one in enumerate(recording.sent, 1):
        is_json = "json" in one.content_type
        name = f"{number:02}.{one.path.rpartition('/')[2]}.{'json' if is_json else 'bin'}"
        body = json.dumps(_cleaned(json.loads(one.body)), separators=(",", ":")).encode() if is_json else one.body
        (place / name).write_bytes(body)
        index.append((name, one.path, one.content_type))
    for name, content in recording.files.items():
        path = place / "chats" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        cleaned = (json.dumps(_cleaned(json.loads(line)), separators=(",", ":")) for line in content.splitlines())
        path.write_text("".join(f"{line}\n" for line in cleaned))
    (place / "index.json").write_text(json.dumps({"sent": index, "billed": recording.billed}, indent=1) + "\n")


_OF_MACHINE = ("host.", "process.", "installation.id", "user.", "server.", "url.")


def _cleaned(value: Any) -> Any:
    match value:
        case str() if len(value) > 80 or "/" in value:
            return "x"
        case list():
            return [_cleaned(one) for one in value if not _is_of_machine(one)]
        case dict():
            return {key: _cleaned(member) for key, member in value.items()}
        case _:
            return value


def _is_of_machine(attribute: Any) -> bool:
    return isinstance(attribute, dict) and str(attribute.get("key", "")).startswith(_OF_MACHINE)


if __name__ == "__main__":
    for client_name in sys.argv[1:]:
        save(client_name, record(client_name))
