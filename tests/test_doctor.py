"""`doctor` says what works and what does not, with or without a bridge, and touches nothing."""

import http.server
import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bridge import __version__, doctor, evidence, exporters, filesystem
from bridge.config import Config, load
from bridge.database import SCHEMA_VERSION
from bridge.doctor import Finding, Status
from bridge.evidence import SHELL, Answer, Directory, Evidence, Layer, Metrics, Transcripts
from bridge.model import Drop
from bridge.store import Inspection
from bridge.tools.claude_code import environment
from bridge.tools.transcripts import TRANSCRIPTS
from tests.daemon import Daemon, free_port
from tests.test_daemon import ONE
from tests.xrg_reader import XRG

MakeDaemon = Callable[..., Daemon]
ENDPOINT = "http://localhost:4318"
NOW = 1_800_000_000.0
FAIL, WARN, OK = Status


def run(home: Path, *arguments: str, env: Mapping[str, str] | None = None) -> tuple[int, list[dict[str, str]], str]:
    """The exit code and the findings of `doctor --json` with nothing in the environment but a home."""
    command = [sys.executable, "-m", "bridge", *arguments, "doctor", "--json"]
    variables = {"HOME": str(home), "PYTHONWARNINGS": "error", **(env or {})}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
    assert not done.stderr
    report = json.loads(done.stdout)
    assert set(report) == {"version", "healthy", "findings"}
    assert report["version"] == __version__
    assert report["healthy"] == (done.returncode == 0)
    for finding in report["findings"]:
        assert set(finding) == {"status", "check", "what", "todo"}
        assert all(isinstance(value, str) for value in finding.values())
        assert finding["status"] == "ok" or finding["todo"]
    order = [finding["status"] for finding in report["findings"]]
    assert order == sorted(order, key=["fail", "warn", "ok"].index)
    return done.returncode, report["findings"], done.stdout


def ask(daemon: Daemon, env: Mapping[str, str] | None = None) -> tuple[int, list[dict[str, str]], str]:
    where = ["--listen", f"localhost:{daemon.port}", "--state-dir", str(daemon.state_dir)]
    return run(daemon.directory, *where, env=env)


def told(findings: list[dict[str, str]], status: str, check: str) -> str:
    return "\n".join(f["what"] + "\n" + f["todo"] for f in findings if f["status"] == status and f["check"] == check)


def recommended(daemon: Daemon) -> dict[str, str]:
    return environment(f"http://localhost:{daemon.port}")


@contextmanager
def stranger(port: int) -> Iterator[None]:
    """Another program on the port: a web server that says 200 to everything."""

    class Handler(http.server.BaseHTTPRequestHandler):
        server_version, sys_version = "Other/1", ""

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


# --- against a bridge ------------------------------------------------------------------------------------------


def test_a_bridge_that_works(daemon: Daemon) -> None:
    daemon.post("/v1/metrics", ONE)
    daemon.post("/v1/metrics", ONE)
    daemon.get("/metrics", {"X-Prometheus-Scrape-Timeout-Seconds": "10", "User-Agent": "Prometheus/3"})
    code, findings, _ = ask(daemon, recommended(daemon))
    assert code == 0
    assert {finding["status"] for finding in findings} == {"ok"}, findings
    assert f"answers on 127.0.0.1:{daemon.port}" in told(findings, "ok", "daemon")
    assert "claude_code: metrics" in told(findings, "ok", "exports")
    assert "XRG would show 5 tokens" in told(findings, "ok", "xrg")
    assert "delta seen" in told(findings, "ok", "temporality")
    assert "127.0.0.1 Prometheus" in told(findings, "ok", "prometheus")
    assert "1 counted, 1 came again" in told(findings, "ok", "points")
    assert f"schema {SCHEMA_VERSION}" in told(findings, "ok", "database")


def test_an_empty_home_is_no_failure(daemon: Daemon) -> None:
    code, findings, _ = ask(daemon)
    assert code == 0
    assert "not switched on" in told(findings, "warn", "claude")
    assert "setup --write" in told(findings, "warn", "claude")
    assert "nothing was received since the bridge started" in told(findings, "warn", "exports")


def test_a_bridge_that_is_down_and_one_that_was_killed(daemon: Daemon) -> None:
    daemon.post("/v1/metrics", ONE)
    daemon.stop()
    before = {path.name: path.read_bytes() for path in daemon.state_dir.iterdir()}
    code, findings, _ = ask(daemon, recommended(daemon))
    assert code == 1
    assert f"nothing answers on 127.0.0.1:{daemon.port} (refused)" in told(findings, "fail", "daemon")
    assert "commits" in told(findings, "ok", "database")
    assert {path.name: path.read_bytes() for path in daemon.state_dir.iterdir()} == before
    daemon.start()
    daemon.kill()
    code, findings, _ = ask(daemon, recommended(daemon))
    assert code == 1
    assert "commits" in told(findings, "ok", "database")


def test_nothing_is_there_and_nothing_is_made(tmp_path: Path) -> None:
    code, findings, _ = run(tmp_path, "--listen", f"localhost:{free_port()}")
    assert code == 1
    assert "does not exist yet" in told(findings, "ok", "state")
    assert not list(tmp_path.iterdir())


def test_nothing_but_the_path_of_python_is_needed() -> None:
    command = [sys.executable, "-m", "bridge", "--listen", f"localhost:{free_port()}", "doctor"]
    done = subprocess.run(command, env={}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("fail  daemon")
    assert not done.stderr


def test_a_stranger_on_the_port(daemon: Daemon) -> None:
    daemon.stop()
    with stranger(daemon.port):
        code, findings, _ = ask(daemon, recommended(daemon))
    assert code == 1
    assert f"another program answers on 127.0.0.1:{daemon.port} (Other/1)" in told(findings, "fail", "daemon")
    assert f"lsof -i :{daemon.port}" in told(findings, "fail", "daemon")
    assert not told(findings, "ok", "exports")


def test_something_that_is_no_web_server_on_the_port(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def speak() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"220 mail\r\n")

        thread = threading.Thread(target=speak)
        thread.start()
        code, findings, _ = run(tmp_path, "--listen", f"127.0.0.1:{port}")
        thread.join()
    assert code == 1
    assert "not an HTTP server" in told(findings, "fail", "daemon")


def test_a_program_that_accepts_and_says_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        code, findings, _ = run(tmp_path, "--listen", f"127.0.0.1:{server.getsockname()[1]}")
    assert code == 1
    assert "no answer within 2 s" in told(findings, "fail", "daemon")


def test_another_bridge_on_the_port(daemon: Daemon, make_daemon: MakeDaemon) -> None:
    other = make_daemon()
    where = ["--listen", f"localhost:{daemon.port}", "--state-dir", str(other.state_dir)]
    code, findings, _ = run(other.directory, *where)
    assert code == 1
    assert "keeps its state elsewhere" in told(findings, "fail", "daemon")


def test_what_clients_do_wrong_is_named(daemon: Daemon) -> None:
    with socket.create_connection(("127.0.0.1", daemon.port)) as knock:
        knock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        while knock.recv(4096):
            pass
    daemon.post("/", ONE)
    daemon.post("/v1/metrics/v1/metrics", ONE)
    daemon.get("/favicon.ico")
    daemon.post("/v1/metrics", b"x", "text/plain")
    bad = json.loads(json.dumps(ONE))
    bad["resourceMetrics"][0]["scopeMetrics"][0]["metrics"][0]["sum"]["dataPoints"][0]["asDouble"] = -1
    daemon.post("/v1/metrics", bad)
    code, findings, _ = ask(daemon, recommended(daemon))
    assert code == 0
    assert "gRPC clients knocked once" in told(findings, "warn", "protocol")
    assert "http/protobuf" in told(findings, "warn", "protocol")
    assert "wrong path 2 times" in told(findings, "warn", "path")
    assert "/v1/metrics" in told(findings, "warn", "path")
    for line in (
        "warning refused a request: Content-Type must be",
        "warning refused a request: nothing is served here; OTLP goes to /v1/metrics",
        "code=415 client=127.0.0.1",
    ):
        assert line in daemon.log
    assert daemon.log.count("refused a request: nothing") == 1
    assert "1 requests were refused with 415" in told(findings, "warn", "refused")
    assert "1 points were refused as negative" in told(findings, "warn", "points")


def test_settings_of_claude_code_that_lead_elsewhere_fail(daemon: Daemon) -> None:
    file = daemon.directory / ".claude" / "settings.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"env": {**recommended(daemon), "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}}))
    code, findings, _ = ask(daemon)
    assert code == 1
    assert f"OTEL_EXPORTER_OTLP_PROTOCOL=grpc in {file}" in told(findings, "fail", "claude")
    file.write_text("{")
    code, findings, _ = ask(daemon)
    assert f"{file}: it is not valid JSON" in told(findings, "warn", "claude")


def test_setup_then_doctor(daemon: Daemon) -> None:
    command = [sys.executable, "-m", "bridge", "--listen", f"localhost:{daemon.port}", "setup", "--write"]
    subprocess.run(command, env={"HOME": str(daemon.directory)}, check=True, capture_output=True, timeout=30)
    _, findings, _ = ask(daemon)
    assert told(findings, "ok", "claude") == f"Claude Code is set to export to http://localhost:{daemon.port}\n"
    assert told(findings, "ok", "exports").startswith("none came since the bridge started ")


def test_a_damaged_and_a_newer_database_fail(daemon: Daemon) -> None:
    daemon.stop()
    with sqlite3.connect(daemon.state_dir / "state.db") as database:
        database.execute(f"pragma user_version = {SCHEMA_VERSION + 1}")
    database.close()
    _, findings, _ = ask(daemon)
    assert f"has schema {SCHEMA_VERSION + 1}" in told(findings, "fail", "database")
    (daemon.state_dir / "state.db").write_bytes(b"no database" * 1000)
    code, findings, _ = ask(daemon)
    assert code == 1
    assert "cannot be read" in told(findings, "fail", "database")


def test_the_fingerprint_changes_with_every_start(daemon: Daemon) -> None:
    first = daemon.get("/-/ready").headers["x-bridge-instance"]
    assert daemon.get("/-/healthy").headers["x-bridge-instance"] == first
    assert (daemon.state_dir / "lock").read_text().split("\n")[1] == first
    assert "x-bridge-instance" not in daemon.get("/metrics").headers
    daemon.restart()
    assert daemon.get("/-/ready").headers["x-bridge-instance"] != first


def test_looking_is_not_scraping(daemon: Daemon) -> None:
    ask(daemon)
    _, findings, _ = ask(daemon)
    assert "none has scraped" in told(findings, "ok", "prometheus")


# --- each check ------------------------------------------------------------------------------------------------


def statuses(findings: Iterator[Finding]) -> list[tuple[Status, str]]:
    return [(finding.status, finding.check) for finding in findings]


def test_daemon_and_address_families() -> None:
    ours = Answer("127.0.0.1:1", status=200, server="claude-otel-bridge", instance="a")
    absent = Answer("[::1]:1", "refused")
    assert statuses(doctor.check_daemon((ours,), "a", "7")) == [(OK, "daemon")]
    assert statuses(doctor.check_daemon((ours, absent), "a", "7")) == [(OK, "daemon"), (WARN, "daemon")]
    assert statuses(doctor.check_daemon((ours._replace(status=503),), "a", "7")) == [(WARN, "daemon")]
    assert statuses(doctor.check_daemon((ours,), "b", "7")) == [(FAIL, "daemon")]
    assert statuses(doctor.check_daemon((), "b", "7")) == [(WARN, "daemon")]
    (finding,) = doctor.check_daemon((absent,), "a", "7")
    assert "process 7 holds the state" in finding.what


def test_state_directory() -> None:
    def f(**values: Any) -> list[Status]:
        usual = Directory(Path("/s"), 5, 0o700, "ext4", 10**10)
        return [finding.status for finding in doctor.check_directory(usual._replace(**values), 5)]

    assert f() == [OK]
    assert f(owner=None) == [OK]
    assert f(owner=6) == [FAIL]
    assert f(mode=0o755) == [WARN]
    assert f(file_system="nfs4") == [WARN]
    assert f(free=10**8) == [WARN]
    assert f(put_aside="state.corrupt-x") == [WARN]
    assert f(free=10**6, mode=0o707) == [WARN, FAIL]


def claude(*layers: Layer, endpoints: tuple[str, ...] = (ENDPOINT,)) -> list[tuple[Status, str]]:
    return [(finding.status, f"{finding.what} > {finding.todo}") for finding in doctor.check_claude(layers, endpoints)]


GOOD = environment(ENDPOINT)


@pytest.mark.parametrize(
    ("change", "status", "text"),
    [
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, OK, "is set to export"),
        ({"OTEL_METRIC_EXPORT_INTERVAL": "60000"}, OK, "is set to export"),
        ({"OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": "delta"}, OK, "is set to export"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": None}, OK, "is set to export"),  # the default is this port
        ({"OTEL_METRICS_EXPORTER": "prometheus"}, FAIL, "otlp must be in it"),
        ({"OTEL_METRICS_EXPORTER": "prometheus,otlp"}, OK, "is set to export"),
        ({"OTEL_METRICS_EXPORTER": None}, FAIL, "OTEL_METRICS_EXPORTER is not set"),
        ({"OTEL_LOGS_EXPORTER": None}, WARN, "OTEL_LOGS_EXPORTER is not set"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, FAIL, "gRPC is not served"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": None}, WARN, "OTEL_EXPORTER_OTLP_PROTOCOL is not set"),
        ({"OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "grpc"}, FAIL, "unset OTEL_EXPORTER_OTLP_METRICS_PROTOCOL"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4317"}, FAIL, "does not lead to this bridge"),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": ENDPOINT}, FAIL, "with the whole path"),
        ({"OTEL_EXPORTER_OTLP_LOGS_ENDPOINT": ENDPOINT}, WARN, "with the whole path"),
        ({"CLAUDE_CODE_ENABLE_TELEMETRY": "0"}, WARN, "not switched on"),
    ],
)
def test_claude_code_s_environment(change: dict[str, str | None], status: Status, text: str) -> None:
    variables = {name: value for name, value in {**GOOD, **change}.items() if value is not None}
    ((found, line),) = claude(Layer(SHELL, variables))
    assert found == status
    assert text in line


def test_claude_code_s_layers() -> None:
    shell = Layer(SHELL, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:1"})
    settings = Layer("settings.json", GOOD)
    assert [status for status, _ in claude(shell, settings)] == [WARN, OK]
    managed = Layer("managed.json", {"OTEL_EXPORTER_OTLP_ENDPOINT": "https://corp:4318"}, is_managed=True)
    found = claude(settings, managed)
    assert [status for status, _ in found] == [WARN, FAIL]
    assert "managed.json, which wins" in found[0][1]
    assert "ask who manages" in found[1][1]
    without = {name: value for name, value in GOOD.items() if not name.endswith("_ENDPOINT")}
    assert [status for status, _ in claude(Layer("s", without), endpoints=("http://localhost:9",))] == [FAIL]


def test_each_address_of_the_bridge_will_do() -> None:
    public = "https://192.0.2.2:4318"
    both = ("http://localhost:14318", public)
    assert claude(Layer("s", environment(public)), endpoints=both)[0][0] is OK
    assert claude(Layer("s", environment(public.replace("https", "http"))), endpoints=both)[0][0] is FAIL
    codex: dict[str, dict[str, Any]] = {"otlp-http": {"endpoint": f"{public}/v1/logs"}}
    told = exporters.Exporter("codex", "Codex", {"exporter": exporters.Setting(codex)})
    assert [finding.what for finding in doctor.check_exporters((told,), both)] == [
        f"Codex is set to export to {public}"
    ]
    guarded = frozenset({public})
    (finding,) = doctor.check_exporters((told,), both, guarded)
    assert finding.todo == "BRIDGE_TOKEN=... claude-otel-bridge setup codex --write"
    codex["otlp-http"]["headers"] = {"Authorization": "Bearer x"}
    assert statuses(doctor.check_exporters((told,), both, guarded)) == [(OK, "codex")]
    headers = {"OTEL_EXPORTER_OTLP_HEADERS": "Authorization=Bearer%20x"}
    layers = Layer("s", environment(public)), Layer("t", headers)
    (finding,) = doctor.check_claude(layers[:1], both, guarded)
    assert (finding.status, finding.todo) == (WARN, "BRIDGE_TOKEN=... claude-otel-bridge setup --write")
    assert statuses(doctor.check_claude(layers, both, guarded)) == [(OK, "claude")]
    without = {name: value for name, value in GOOD.items() if not name.endswith("_ENDPOINT")}
    assert claude(Layer("s", without), endpoints=(public, ENDPOINT)) == [
        (OK, f"Claude Code is set to export to {ENDPOINT} > ")
    ]


def exports(when: float, started: float = NOW - 9_000, tool: str = "claude_code") -> Metrics:
    labels = {"tool": tool, "signal": "metrics"}
    return {
        "bridge_last_export_timestamp_seconds": [(labels, when)] if when else [],
        "process_start_time_seconds": [({}, started)],
    }


def test_claude_code_was_used_without_exports() -> None:
    def f(newest: float, metrics: Metrics | None) -> list[tuple[Status, str]]:
        return statuses(doctor.check_transcripts(Transcripts(Path("/p"), 3, newest), metrics, NOW))

    assert f(NOW - 10, None) == [(OK, "transcripts")]
    assert f(NOW - 10, exports(NOW - 20)) == [(OK, "transcripts")]
    assert f(NOW - 10, exports(NOW - 900)) == [(OK, "transcripts"), (WARN, "exports")]
    assert f(NOW - 10, exports(0)) == [(OK, "transcripts"), (WARN, "exports")]
    assert f(NOW - 10, exports(0, started=NOW - 60)) == [(OK, "transcripts")]
    assert f(NOW - 9_999, exports(0)) == [(OK, "transcripts")]


def test_other_tools_are_named_with_what_they_do_not_tell(tmp_path: Path) -> None:
    file = tmp_path / "sessions" / "2026" / "rollout-1.jsonl.zst"
    file.parent.mkdir(parents=True)
    file.touch()
    others = tuple(evidence._others({"CODEX_HOME": str(tmp_path)}, tmp_path / "home"))
    assert [(tool, found.root, found.files) for tool, found in others] == [("codex", tmp_path / "sessions", 1)]
    exporting: Metrics = {"bridge_last_export_timestamp_seconds": [({"tool": "codex", "signal": "logs"}, NOW)]}
    cases: list[tuple[Metrics, frozenset[str]]] = [
        ({}, frozenset()),
        (exporting, frozenset()),
        ({}, frozenset({"codex"})),
    ]
    texts = [next(doctor.check_others(others, metrics, time.time(), led)).what for metrics, led in cases]
    assert texts[0].startswith(f"Codex: 1 under {tmp_path}/sessions, the newest")
    assert ["setup codex" in text for text in texts] == [True, False, False]
    for tool in TRANSCRIPTS.keys() - {"claude_code"}:
        (finding,) = doctor.check_others(((tool, others[0][1]),), {}, NOW, frozenset())
        assert finding.status is OK


def test_none_came_yet_is_no_fault_of_settings_that_lead_here() -> None:
    metrics = exports(0, started=NOW - 2)
    (finding,) = doctor.check_exports(metrics, NOW, is_led_here=True)
    assert finding == Finding(OK, "exports", "none came since the bridge started 2 s ago")
    (finding,) = doctor.check_exports(metrics, NOW)
    assert (finding.status, "setup --write" in finding.todo) == (WARN, True)


def test_what_keeps_the_exports_of_codex_and_gemini_away(tmp_path: Path) -> None:
    def f(codex: str = "", gemini: str = "", **environment: str) -> list[tuple[Status, str]]:
        for directory, name, text in ((".codex", "config.toml", codex), (".gemini", "settings.json", gemini)):
            (tmp_path / directory).mkdir(exist_ok=True)
            (tmp_path / directory / name).write_text(text)
        told = tuple(exporters.of_tools({"HOME": str(tmp_path), **environment}, ENDPOINT))
        found = doctor.check_exporters(told, (ENDPOINT,))
        return [(finding.status, f"{finding.what} -> {finding.todo}") for finding in found]

    config, settings = tmp_path / ".codex" / "config.toml", tmp_path / ".gemini" / "settings.json"
    wanted = {"enabled": True, "otlpEndpoint": f"{ENDPOINT}/", "otlpProtocol": "http", "logPrompts": False}
    todo = "claude-otel-bridge setup gemini --write"
    assert f() == f(gemini='{"telemetry": {"enabled": false}}') == f('[otel]\nexporter = "none"') == []
    assert f(gemini=json.dumps({"telemetry": wanted})) == [(OK, f"Gemini CLI is set to export to {ENDPOINT} -> ")]
    assert f(GEMINI_TELEMETRY_ENABLED="1", GEMINI_TELEMETRY_LOG_PROMPTS="0") == [
        (WARN, "telemetry.otlpEndpoint=http://localhost:4317 by default: it does not lead to this bridge -> " + todo),
        (WARN, "telemetry.otlpProtocol=grpc by default: http is needed; gRPC is not served -> " + todo),
    ]
    away = {**wanted, "target": "gcp", "outfile": "/tmp/x", "logPrompts": True}
    assert [text.partition(f" in {settings}: ")[::2] for _, text in f(gemini=json.dumps({"telemetry": away}))] == [
        ("telemetry.target=gcp", f"local is needed; this is Google Cloud -> {todo}"),
        ("telemetry.outfile=/tmp/x", f"what is written to a file is sent nowhere -> {todo}"),
        ("telemetry.logPrompts=True", f"your prompts are sent along; the bridge throws them away -> {todo}"),
    ]
    elsewhere = f(gemini=json.dumps({"telemetry": wanted}), OTEL_EXPORTER_OTLP_ENDPOINT="http://other:4318")
    name = "OTEL_EXPORTER_OTLP_ENDPOINT"
    what = f"{name}=http://other:4318: it does not lead to this bridge -> unset {name} where your shell sets it"
    assert elsewhere == [(WARN, what)]
    good = f'exporter = {{ otlp-http = {{ endpoint = "{ENDPOINT}/v1/logs", protocol = "json" }} }}'
    assert f(f"[otel]\n{good}") == [(OK, f"Codex is set to export to {ENDPOINT} -> ")]
    grpc = f'[otel]\n{good}\nmetrics_exporter = {{ otlp-grpc = {{ endpoint = "http://localhost:4317" }} }}'
    todo = "claude-otel-bridge setup codex --write"
    why = "otlp-http is needed; gRPC is not served"
    assert f(grpc) == [(WARN, f"otel.metrics_exporter=otlp-grpc in {config}: {why} -> {todo}")]
    ((status, text),) = f(f"[otel]\n{good}".replace("v1/logs", "v1/metrics"))
    assert (status, text.partition(": ")[2]) == (WARN, f"it does not lead to this bridge's /v1/logs -> {todo}")
    ((status, text),) = f(gemini="{")
    assert status is WARN
    assert text.startswith(f"{settings} cannot be read: ")


def test_transcripts_are_found(tmp_path: Path) -> None:
    (tmp_path / "-home-me" / "sub").mkdir(parents=True)
    (tmp_path / "-home-me" / "a.jsonl").touch()
    (tmp_path / "-home-me" / "sub" / "b.jsonl").touch()
    (tmp_path / "-home-me" / "c.txt").touch()
    found = evidence._transcripts(tmp_path)
    assert found.files == 2
    assert abs(found.newest - time.time()) < 60


def test_a_clock_that_was_set_back() -> None:
    assert statuses(doctor.check_clock(exports(NOW + 60), NOW)) == [(WARN, "clock")]
    assert statuses(doctor.check_clock(exports(NOW - 60), NOW)) == []


def test_logs_without_metrics() -> None:
    samples: list[tuple[Mapping[str, str], float]] = [({"tool": "claude_code", "signal": "logs"}, NOW - 3)]
    (finding,) = doctor.check_exports({"bridge_last_export_timestamp_seconds": samples}, NOW)
    assert (finding.status, finding.what) == (WARN, "claude_code: logs 3 s ago, but no metrics")


def test_a_disk_that_takes_no_commits_fails() -> None:
    assert statuses(doctor.check_refusals({"bridge_storage_ok": [({}, 0.0)]})) == [(FAIL, "storage")]
    assert statuses(doctor.check_refusals({"bridge_storage_ok": [({}, 1.0)]})) == []


def test_a_bridge_elsewhere_is_asked_with_the_token_that_is_set(make_daemon: MakeDaemon) -> None:
    secret = "s" * 40
    daemon = make_daemon(env={"BRIDGE_LOOPBACK_TOKEN": "true", "BRIDGE_TOKEN": secret}).start()
    address = f"http://127.0.0.1:{daemon.port}"

    def f(headers: str) -> tuple[Status, str]:
        (finding,) = doctor.check_elsewhere(evidence.ask_elsewhere(address, headers))
        return finding.status, finding.what

    assert f(f"Authorization=Bearer%20{secret}") == (
        OK,
        f"the bridge at {address} answers and takes what comes from here",
    )
    assert f("Authorization=Bearer%20wrong")[0] is FAIL
    assert f("") == (FAIL, f"the bridge at {address} does not know the token, or there is none")
    daemon.stop()
    assert "refused" in f("")[1].lower()
    with stranger(daemon.port):
        assert f("") == (WARN, f"{address}, to which Claude Code exports, is another program (Other/1)")


def test_a_client_of_a_team_is_not_sent_to_localhost(tmp_path: Path) -> None:
    address = f"http://0.0.0.0:{free_port()}"  # not a loopback address, and no other machine's
    code, findings, _ = run(tmp_path, "--listen", f"localhost:{free_port()}", env=environment(address))
    assert code == 1
    assert f"{address}, to which Claude Code exports: " in told(findings, "fail", "daemon")
    assert told(findings, "ok", "claude") == f"Claude Code is set to export to {address}\n"
    assert "localhost" not in told(findings, "fail", "daemon")


def test_a_state_that_went_back() -> None:
    def f(held: float, lost: float) -> list[str]:
        found: Metrics = {"bridge_held": [({}, held)], "bridge_state_lost_commits_total": [({}, lost)]}
        return [f"{status} {what}" for status, _, what, _ in doctor.check_held(found)]

    assert f(0, 0) == []
    assert f(3, 7) == ["warn the state went back 7 transactions at the start; 3 totals and series stand still"]
    assert f(3, 0) == ["warn the state went back; 3 totals and series stand still"]
    assert f(0, 7) == ["ok the state went back 7 transactions at the start; it has caught up"]


def test_a_bridge_that_asks_for_a_token(make_daemon: MakeDaemon) -> None:
    secret = "s" * 40
    daemon = make_daemon(env={"BRIDGE_LOOPBACK_TOKEN": "true", "BRIDGE_TOKEN": secret}).start()
    for token, words in (("", "the bridge needs BRIDGE_TOKEN"), ("x" * 40, "not known to the bridge"), (secret, "")):
        _, findings, _ = ask(daemon, {"BRIDGE_TOKEN": token})
        assert words in told(findings, "warn", "token")
        assert bool(told(findings, "warn", "token")) == bool(words)


def test_wrong_tokens_are_no_flood() -> None:
    guesses: list[tuple[Mapping[str, str], float]] = [
        ({"code": "429", "reason": "token"}, 3.0),
        ({"code": "429", "reason": "allowance"}, 2.0),
    ]
    found: Metrics = {"bridge_http_denied_total": guesses[:1], "bridge_http_refused_total": [({"code": "429"}, 3.0)]}
    (finding,) = doctor.check_refusals(found)
    assert "3 requests were refused with 429: an address sent too many wrong tokens" in finding.what
    found = {"bridge_http_denied_total": guesses, "bridge_http_refused_total": [({"code": "429"}, 5.0)]}
    assert "2 requests were refused with 429: above the allowance" in [*doctor.check_refusals(found)][1].what


def test_another_version() -> None:
    assert statuses(doctor.check_version({"bridge_build_info": [({"version": "0.0.0"}, 1.0)]})) == [(WARN, "version")]


def test_every_reason_of_a_drop_has_words() -> None:
    for reason in Drop:
        found = [*doctor.check_points({"bridge_points_dropped_total": [({"reason": reason.value}, 2.0)]})]
        assert found[0].status is WARN
        assert reason.value in found[0].what


def test_xrg_is_read_as_xrg_reads(daemon: Daemon) -> None:
    daemon.post("/v1/metrics", ONE)
    texts = [
        daemon.get("/v1/metrics").text,
        daemon.get("/metrics").text,
        "",
        'claude_code_token_usage{type="input"} 1.2e+06 5\nx_cost 1.5 5\n\n tokens output 7\n',
    ]
    for text in texts:
        tokens, cost, _ = doctor.xrg_reading(text)
        model = XRG().poll(text)
        assert (tokens, cost) == (model.tokens, model.cost)
    assert doctor.xrg_reading(texts[0])[2] == []
    assert doctor.xrg_reading("")[2] == ["input", "output", "cache_read", "cache_create"]
    assert statuses(doctor.check_profile("")) == [(FAIL, "xrg")]


def test_where_xrg_looks() -> None:
    def f(set_to: str) -> list[Finding]:
        return [*doctor.check_xrg_endpoint(set_to, ENDPOINT)]

    assert f("") == []
    assert f("http://localhost:4318/v1/metrics") == f("http://127.0.0.1:4318/v1/metrics") == []
    (finding,) = f("http://localhost:8889/metrics")
    assert finding.todo == f"defaults write com.gauchosoft.XRG aiTokenOTelEndpoint {ENDPOINT}/v1/metrics"
    assert evidence._xrg_endpoint("linux", Path("/")) == ""


def test_the_file_system_is_named() -> None:
    assert sys.platform == "darwin" or filesystem.kind(Path("/proc/self")) == "proc"


def test_managed_settings_are_read(tmp_path: Path) -> None:
    managed = tmp_path / "managed-settings.json"
    managed.write_text(json.dumps({"env": {"OTEL_METRICS_EXPORTER": "none", "OTEL_METRIC_EXPORT_INTERVAL": 5}}))
    config = Config(listen=(f"127.0.0.1:{free_port()}",), state_dir=str(tmp_path / "state"))
    found = evidence.gather(config, {"HOME": str(tmp_path)}, (managed,))
    assert found.layers[-1] == Layer(
        str(managed), {"OTEL_METRICS_EXPORTER": "none", "OTEL_METRIC_EXPORT_INTERVAL": "5"}, is_managed=True
    )


TABLE = """\
fail  daemon       nothing answers on 127.0.0.1:4318 (refused), [::1]:4318 (refused)
                   -> start it: claude-otel-bridge install, or claude-otel-bridge in a terminal
warn  state        /s has mode 0755: others can read it
                   -> chmod 700 /s
warn  claude       Claude Code's telemetry is not switched on
                   -> claude-otel-bridge setup --write
ok    database     schema {schema}, 12 commits
ok    transcripts  4 under /p, the newest 2 h ago
ok    temporality  delta and cumulative seen; both count exactly
ok    prometheus   1 known: 127.0.0.1 Prometheus
1 failed, 2 warnings, 4 ok
"""


def test_the_table() -> None:
    found = Evidence(
        now=NOW,
        here=ENDPOINT,
        endpoints=(ENDPOINT,),
        user=5,
        answers=(Answer("127.0.0.1:4318", "refused"), Answer("[::1]:4318", "refused")),
        holder="",
        instance="",
        metrics=None,
        profile=None,
        directory=Directory(Path("/s"), 5, 0o755, "ext4", 10**10),
        inspection=Inspection(SCHEMA_VERSION, 12, True, True, (("127.0.0.1|Prometheus|", 0),)),
        layers=(Layer(SHELL, {}),),
        transcripts=Transcripts(Path("/p"), 4, NOW - 8_000),
        xrg_endpoint="",
    )
    assert doctor.table(doctor.examine(found)) == TABLE.format(schema=SCHEMA_VERSION)


def test_completion_scripts(tmp_path: Path) -> None:
    pytest.importorskip("shtab")
    for shell in ("bash", "zsh", "fish", "tcsh"):
        command = [sys.executable, "-m", "bridge", "completion", shell]
        done = subprocess.run(command, env={"HOME": str(tmp_path)}, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        assert "doctor" in done.stdout
    script = tmp_path / "completion.bash"
    script.write_text(
        subprocess.run([sys.executable, "-m", "bridge", "completion", "bash"], capture_output=True, text=True).stdout
    )
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=30)


def test_completion_without_shtab_says_what_to_install() -> None:
    code = "import sys; sys.modules['shtab'] = None; from bridge.cli import main; main(['completion', 'bash'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == os.EX_UNAVAILABLE
    assert "in the source tree: .venv/bin/pip install '.[completion]'" in done.stderr


def test_the_daemon_does_not_pay_for_it() -> None:
    code = "import sys, bridge.cli, bridge.daemon; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert not {"bridge.doctor", "bridge.setup", "bridge.edits", "shtab"} & set(done.stdout.split())


def test_the_manual_page_has_every_command() -> None:
    page = subprocess.run([sys.executable, "-m", "bridge", "man"], capture_output=True, text=True).stdout
    assert page.startswith(".TH CLAUDE")
    for word in ("setup", "doctor", "install", "backup", "config", "curl localhost:4318/v1/metrics"):
        assert word in page


def test_the_manual_without_its_library_says_what_to_install() -> None:
    code = "import sys; sys.modules['argparse_manpage'] = None; from bridge.cli import main; main(['man'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == os.EX_UNAVAILABLE
    assert "in the source tree: .venv/bin/pip install '.[completion]'" in done.stderr


def test_a_bridge_that_wants_a_token_is_examined_with_it(make_daemon: Callable[..., Daemon]) -> None:
    token = "x" * 40
    daemon = make_daemon(env={"BRIDGE_LOOPBACK_TOKEN": "true", "BRIDGE_TOKEN": token}).start()
    settings = load("", {}, {"listen": [f"localhost:{daemon.port}"], "state_dir": str(daemon.state_dir)}, "")
    home = {"HOME": str(daemon.directory)}
    with_token = evidence.gather(settings, {**home, "BRIDGE_TOKEN": token}, managed=())
    assert with_token.metrics is not None
    assert with_token.profile
    without = evidence.gather(settings, home, managed=())
    assert (without.metrics, without.profile) == (None, None)
    assert [answer.status for answer in without.answers] == [200, 200]
