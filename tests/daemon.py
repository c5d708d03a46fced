"""A real bridge process for tests: started on a free port with its own state, killed, started again."""

import contextlib
import gzip
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

JSON = "application/json"
PROTOBUF = "application/x-protobuf"


class Reply(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def free_port() -> int:
    """A port that is free on both loopback families now."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port: int = probe.getsockname()[1]
            with contextlib.suppress(OSError), socket.create_server(("::1", port), family=socket.AF_INET6):
                return port
            if not socket.has_ipv6:
                return port


class Daemon:
    """One bridge: `start`, `stop`, `kill`, `restart`; `get` and `post` talk to it over new connections.

    The port stays the same over restarts. Standard error goes to `log_path`; `log` returns it.
    """

    def __init__(self, directory: Path, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        self.directory = directory
        self.state_dir = directory / "state"
        self.log_path = directory / "bridge.log"
        self.port = free_port()
        self.arguments = arguments
        self.env = dict(env or {})
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.log_path.read_text() if self.log_path.exists() else ""

    @property
    def command(self) -> list[str]:
        listen = ["--listen", f"localhost:{self.port}", "--state-dir", str(self.state_dir)]
        return [sys.executable, "-m", "bridge", *listen, *self.arguments]

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a clean user: nothing of the real home, nothing that configures a bridge."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("BRIDGE_", "OTEL_", "XDG_"))}
        return {**kept, "HOME": str(self.directory), "PYTHONWARNINGS": "error", **self.env}

    def spawn(self) -> None:
        """Start the process without waiting until it answers."""
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(self.command, stderr=log, stdout=log, env=self.environment)

    def start(self, timeout: float = 20) -> "Daemon":
        """Start the process and wait until `/-/ready` answers 200."""
        self.spawn()
        self.wait_ready(timeout)
        return self

    def wait_ready(self, timeout: float = 20) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            assert self.process is not None
            if (code := self.process.poll()) is not None:
                raise AssertionError(f"bridge ended with {code}:\n{self.log}")
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.get("/-/ready").status == 200:
                    return
            time.sleep(0.02)
        raise AssertionError(f"bridge not ready after {timeout} s:\n{self.log}")

    def stop(self, timeout: float = 10) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def restart(self) -> None:
        self.stop()
        self.start()

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Reply:
        """One request over a connection of its own. `options` go to http.client's request (encode_chunked=...)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, dict(headers or {}), **options)
            reply = connection.getresponse()
            return Reply(reply.status, {key.lower(): value for key, value in reply.getheaders()}, reply.read())
        finally:
            connection.close()

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Reply:
        return self.request("GET", path, headers=headers)

    def post(
        self,
        path: str,
        body: bytes | dict[str, Any],
        content_type: str = JSON,
        headers: Mapping[str, str] | None = None,
        *,
        compress: bool = False,
        chunked: bool = False,
    ) -> Reply:
        """Post one OTLP body; a dict is sent as JSON."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        sent = {"Content-Type": content_type, **(headers or {})}
        if compress:
            data = gzip.compress(data)
            sent["Content-Encoding"] = "gzip"
        if not chunked:
            return self.request("POST", path, data, sent)
        sent["Transfer-Encoding"] = "chunked"
        step = max(1, len(data) // 3)
        pieces: Iterator[bytes] = (data[at : at + step] for at in range(0, len(data), step))
        return self.request("POST", path, pieces, sent, encode_chunked=True)

    def samples(self, path: str = "/v1/metrics") -> dict[str, str]:
        """The samples of a scrape: `name{labels}` -> the value as printed."""
        result = {}
        for line in self.get(path).text.splitlines():
            if line and not line.startswith("#"):
                words = line.rsplit(" ", 2) if path == "/v1/metrics" else line.rsplit(" ", 1)
                result[words[0]] = words[1]
        return result
