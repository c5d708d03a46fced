"""The daemon's manners: start, refuse to start, stop, log, and its command line."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from bridge import filesystem
from bridge.daemon import Forgetting, default_state_dir
from bridge.listeners import StartError, bind, split_address
from tests.daemon import Daemon
from tests.test_cases import Rig, body_of, read_point

MakeDaemon = Callable[..., Daemon]

ONE = {
    "resourceMetrics": [
        {
            "resource": {"attributes": [{"key": "service.name", "value": {"stringValue": "claude-code"}}]},
            "scopeMetrics": [
                {
                    "scope": {"name": "com.anthropic.claude_code"},
                    "metrics": [
                        {
                            "name": "claude_code.token.usage",
                            "unit": "tokens",
                            "sum": {
                                "aggregationTemporality": 1,
                                "isMonotonic": True,
                                "dataPoints": [
                                    {
                                        "attributes": [
                                            {"key": "session.id", "value": {"stringValue": "s"}},
                                            {"key": "type", "value": {"stringValue": "input"}},
                                        ],
                                        "startTimeUnixNano": "1000",
                                        "timeUnixNano": "2000",
                                        "asDouble": 5,
                                    }
                                ],
                            },
                        }
                    ],
                }
            ],
        }
    ]
}
POST_HEAD = (
    "POST /v1/metrics HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
)
INPUT = 'claude_code_token_usage{type="input"}'


def run(*arguments: str, env: dict[str, str] | None = None, blocked: str = "") -> subprocess.CompletedProcess[str]:
    """The command with `arguments`; `blocked` is a module that cannot be imported."""
    code = f"import sys; sys.modules[{blocked!r}] = None; from bridge.cli import main; main()"
    start = ["-c", code] if blocked else ["-m", "bridge"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("BRIDGE_")}
    command = [sys.executable, *start, *arguments]
    return subprocess.run(command, env={**environment, **(env or {})}, capture_output=True, text=True, timeout=30)


def test_zero_lines_are_there_at_once_and_counters_survive_a_restart(daemon: Daemon) -> None:
    assert set(daemon.samples().values()) == {"0"}
    assert daemon.post("/v1/metrics", ONE).json == {}
    assert daemon.samples()[INPUT] == "5"
    daemon.restart()
    assert daemon.samples()[INPUT] == "5"
    daemon.post("/v1/metrics", ONE)
    assert daemon.samples()[INPUT] == "5"


def test_state_is_private(daemon: Daemon) -> None:
    assert stat.S_IMODE(daemon.state_dir.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in daemon.state_dir.iterdir()} == {0o600}


def test_both_loopback_families(daemon: Daemon) -> None:
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        try:
            connection = socket.socket(family)
            connection.connect((address, daemon.port))
        except OSError:
            assert family == socket.AF_INET6
            assert "no such address" in daemon.log
        finally:
            connection.close()


def test_a_second_bridge_on_the_same_state_is_refused(daemon: Daemon, make_daemon: MakeDaemon) -> None:
    second = make_daemon()
    second.state_dir = daemon.state_dir
    second.spawn()
    assert second.process is not None
    assert second.process.wait(20) == os.EX_TEMPFAIL
    assert daemon.process is not None
    assert f"in use by another bridge, pid {daemon.process.pid}" in second.log
    assert daemon.get("/-/ready").status == 200


def test_a_port_in_use_is_refused(daemon: Daemon, make_daemon: MakeDaemon) -> None:
    second = make_daemon()
    second.port = daemon.port
    second.spawn()
    assert second.process is not None
    assert second.process.wait(20) == os.EX_UNAVAILABLE
    assert f"127.0.0.1:{daemon.port} is already in use" in second.log


def test_half_a_port_leaves_nothing_bound() -> None:
    if not socket.has_ipv6:
        pytest.skip("needs IPv6")
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match="already in use") as error:
            bind((f"localhost:{port}",))
        assert error.value.exit_code == os.EX_UNAVAILABLE
        with socket.create_server(("127.0.0.1", port)):
            pass


@pytest.mark.parametrize(
    "address", ["4318", "localhost", "localhost:", ":4318", "localhost:0", "localhost:70000", "a:b"]
)
def test_wrong_addresses(address: str) -> None:
    with pytest.raises(StartError, match="expected HOST:PORT"):
        split_address(address)


def test_sigterm_finishes_what_is_in_flight(daemon: Daemon) -> None:
    """The body of a request arrives while the daemon is being told to stop: it is answered, and counted."""
    body = json.dumps(ONE).encode()
    head = POST_HEAD.format(length=len(body))
    with socket.create_connection(("127.0.0.1", daemon.port)) as connection:
        connection.sendall(head.encode() + body[:-1])
        assert daemon.process is not None
        # A request on another connection is answered after the first one's headers were taken.
        assert daemon.get("/-/ready").status == 200
        daemon.process.send_signal(signal.SIGTERM)
        connection.sendall(body[-1:])
        answer = connection.recv(65_536)
    assert daemon.process.wait(5) == 0
    assert answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 503")), answer
    daemon.start()
    assert daemon.samples()[INPUT] == ("5" if answer.startswith(b"HTTP/1.1 200") else "0")


def test_stops_within_two_seconds_with_idle_and_stalled_connections(daemon: Daemon) -> None:
    idle = socket.create_connection(("127.0.0.1", daemon.port))
    stalled = socket.create_connection(("127.0.0.1", daemon.port))
    stalled.sendall(POST_HEAD.format(length=9).encode() + b"{")
    assert daemon.get("/-/ready").status == 200
    assert daemon.stop(timeout=3) == 0
    assert not list(daemon.state_dir.glob("state.db-*"))
    idle.close()
    stalled.close()


def test_runs_on_uvloop_and_without_it_on_asyncio(make_daemon: MakeDaemon) -> None:
    plain = make_daemon()
    code = "import sys; sys.modules['uvloop'] = None; from bridge.cli import main; main()"
    command = plain.command
    command[1:3] = ["-c", code]
    with plain.log_path.open("ab") as log:
        plain.process = subprocess.Popen(command, stderr=log, env=plain.environment)
    plain.wait_ready()
    assert 'loop="asyncio"' in plain.get("/metrics").text
    assert plain.post("/v1/metrics", ONE).status == 200
    plain.restart()
    assert 'loop="uvloop"' in plain.get("/metrics").text
    assert plain.samples()[INPUT] == "5"


def test_log_lines_are_json_objects(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("--log-format", "json").start()
    daemon.stop()
    entries = [json.loads(line) for line in daemon.log.splitlines()]
    ready = next(entry for entry in entries if entry["message"] == "ready")
    assert ready["level"] == "info"
    assert str(daemon.port) in ready["listen"]
    assert entries[-1]["message"] == "stopped"


def test_log_level(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("--log-level", "error").start()
    daemon.stop()
    assert daemon.log == ""


def test_posts_from_many_connections_share_the_ledger(daemon: Daemon) -> None:
    text = json.dumps(ONE)
    bodies = [text.replace('"2000"', f'"{time}"').encode() for time in range(2000, 2100)]

    def send(some: list[bytes]) -> None:
        for body in some:
            assert daemon.post("/v1/metrics", body).status == 200

    threads = [threading.Thread(target=send, args=(bodies[start::4],)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert daemon.samples()[INPUT] == "500"


# --- the command line ---


def test_help_and_version() -> None:
    shown = run("--help")
    assert shown.returncode == 0
    for word in ("examples:", "--listen HOST:PORT", "--state-dir", "config", "curl localhost:4318/v1/metrics"):
        assert word in shown.stdout
    assert run("--version").stdout.startswith("claude-otel-bridge ")


def test_usage_errors() -> None:
    wrong = run("--lisen=x")
    assert wrong.returncode == os.EX_USAGE
    assert "--lisen" in wrong.stderr
    assert run("config", "shwo").returncode == os.EX_USAGE


def test_settings_may_stand_before_or_behind_a_command(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("retention_days = 3\n")
    words = ["--config", str(file), "--state-dir", "/s", "--listen", "localhost:5", "--listen", "127.0.0.1:6"]
    before, behind = run(*words, "config", "show"), run("config", "show", *words)
    assert before.stdout == behind.stdout
    for line in ('state_dir = "/s"', 'listen = ["localhost:5","127.0.0.1:6"]', "retention_days = 3.0"):
        assert line in behind.stdout
    assert 'state_dir = "/t"' in run("--state-dir", "/s", "config", "--state-dir", "/t", "show").stdout
    assert "--state-dir DIR" in run("report", "--help").stdout


def test_config_show_and_check(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('listen = ["localhost:5318"]\n')
    shown = run("--config", str(file), "--log-level", "debug", "config", "show", env={"BRIDGE_LIMITS_SERIES": "7"})
    for line in ('listen = ["localhost:5318"]', 'log_level = "debug"', "series = 7"):
        assert line in shown.stdout
    assert run("--config", str(file), "config", "check").stdout == f"{file}: ok\n"
    file.write_text("listne = 1\n")
    wrong = run("config", "check", env={"BRIDGE_CONFIG": str(file)})
    assert wrong.returncode == os.EX_CONFIG
    assert wrong.stderr == f"claude-otel-bridge: {file}: unknown setting listne; did you mean listen?\n"


def test_a_missing_settings_file_is_an_error(tmp_path: Path) -> None:
    wrong = run("--config", str(tmp_path / "none.toml"))
    assert wrong.returncode == os.EX_CONFIG
    assert "none.toml" in wrong.stderr


def test_the_usual_settings_file_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "claude-otel-bridge"
    folder.mkdir()
    (folder / "config.toml").write_text("retention_days = 3\n")
    shown = run("config", "show", env={"XDG_CONFIG_HOME": str(tmp_path), "HOME": str(tmp_path)})
    assert "retention_days = 3.0" in shown.stdout


def test_default_state_directories() -> None:
    home = Path("/home/u")
    assert default_state_dir("linux", {}, home) == home / ".local/state/claude-otel-bridge"
    assert default_state_dir("linux", {"XDG_STATE_HOME": "/x"}, home) == Path("/x/claude-otel-bridge")
    assert default_state_dir("linux", {"XDG_STATE_HOME": "x"}, home) == home / ".local/state/claude-otel-bridge"
    assert default_state_dir("darwin", {}, home) == home / "Library/Application Support/claude-otel-bridge"


def test_an_unwritable_state_directory_is_refused(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    refused = run("--state-dir", str(blocked / "state"))
    assert refused.returncode == os.EX_CANTCREAT
    assert "cannot create state directory" in refused.stderr


def test_wrong_prices_are_settings_errors(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    for table in ("input = 4", "inputs = 1", "input = -4\noutput = 1"):
        file.write_text(f"[prices.claude-sonnet-4-5]\n{table}\n")
        wrong = run("--config", str(file), "config", "check")
        assert wrong.returncode == os.EX_CONFIG
        assert f"{file}: prices.claude-sonnet-4-5" in wrong.stderr


# --- places and clocks ---


@pytest.mark.parametrize(
    ("kind", "path", "why"),
    [
        ("ext4", "/home/u/state", ""),
        ("nfs4", "/home/u/state", "on a network file system (nfs4)"),
        ("smbfs", "/Volumes/x", "on a network file system (smbfs)"),
        ("apfs", "/Users/u/Library/Mobile Documents/com~apple~CloudDocs/b", "synchronised with other machines (Mobile"),
        ("ext4", "/home/u/Dropbox (Work)/state", "synchronised with other machines (Dropbox"),
        ("ext4", "/home/u/Dropboxes/state", ""),
    ],
)
def test_places_that_no_database_should_be_in(
    kind: str, path: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(filesystem, "kind", lambda _: kind)
    found = filesystem.distrust(Path(path))
    assert why in found
    assert bool(why) is bool(found)


def test_a_state_in_a_synchronised_folder_is_refused_unless_it_is_wanted(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    daemon.state_dir = daemon.directory / "Dropbox" / "state"
    refused = run(*daemon.command[3:])
    assert refused.returncode == os.EX_CANTCREAT
    assert "choose another with --state-dir, or pass --allow-network-fs" in refused.stderr
    assert not list(daemon.state_dir.iterdir())
    daemon.arguments = ("--allow-network-fs",)
    daemon.start()
    assert "synchronised with other machines" in daemon.log


def test_a_clock_that_was_set_makes_nothing_old_for_an_hour() -> None:
    """Deltas without a session are known by their body alone, for as long as it is remembered."""
    body = body_of([read_point("{start: 1, time: 2, type: input, delta: 5}")])
    with TemporaryDirectory() as directory, closing(Rig(Path(directory))) as rig:
        rig.start()
        uptime = 0
        forgetting = Forgetting(rig.ledger, 90, lambda: rig.now_ms, lambda: uptime)
        rig.post(body)
        for days, elapsed_days, total in ((366, 0, 5), (-366, 0, 5), (6, 6, 5), (2, 2, 10)):
            rig.now_ms += days * 86_400_000
            uptime += elapsed_days * 86_400_000
            rig.call(forgetting.forget())
            rig.post(body)
            assert rig.totals == {"tokens.input": total}, (days, elapsed_days)


def test_a_stopped_bridge_still_holds_its_state_and_goes_on(daemon: Daemon, make_daemon: MakeDaemon) -> None:
    """As after sleep: nothing is lost meanwhile, and nobody else may take the state."""
    assert daemon.process is not None
    daemon.post("/v1/metrics", ONE)
    daemon.process.send_signal(signal.SIGSTOP)
    try:
        second = make_daemon()
        second.state_dir = daemon.state_dir
        second.spawn()
        assert second.process is not None
        assert second.process.wait(20) == os.EX_TEMPFAIL
    finally:
        daemon.process.send_signal(signal.SIGCONT)
    daemon.post("/v1/metrics", ONE)
    assert daemon.samples()[INPUT] == "5"
