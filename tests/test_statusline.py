"""The command `statusline`: it always prints a line at once, and tells a running bridge of the official limits."""

import io
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from bridge import statusline
from bridge.__main__ import main
from bridge.cli import _main
from tests.daemon import Daemon
from tests.test_reports import State
from tests.test_transcripts import append, eventually, follow_from_here, projects, select
from tests.transcript_tree import response

NOW = datetime.fromisoformat("2026-02-14T13:30Z").timestamp()
TOLD: dict[str, Any] = {
    "session_id": "s1",
    "transcript_path": "/home/ann/.claude/projects/x/s1.jsonl",
    "model": {"id": "claude-opus-5", "display_name": "Opus 5"},
    "workspace": {"current_dir": "/home/ann/app", "project_dir": "/home/ann/app"},
    "cost": {"total_cost_usd": 0.4231, "total_duration_ms": 45_000},
    "context_window": {"used_percentage": 41.6, "context_window_size": 200_000},
    "rate_limits": {
        "five_hour": {"used_percentage": 37.2, "resets_at": NOW + 9000},
        "seven_day": {"used_percentage": 12, "resets_at": NOW + 3 * 86_400},
    },
}

Run = Callable[..., str]


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    """The command with this on standard input, for a state directory; the line that it prints."""

    def run(told: Any, directory: Path = tmp_path, now: float | None = NOW, **environment: str) -> str:
        content = told if isinstance(told, bytes) else json.dumps(told).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        monkeypatch.setattr(sys, "argv", ["claude-otel-bridge", "statusline"])
        for name, value in {"BRIDGE_STATE_DIR": str(directory), "HOME": str(tmp_path), **environment}.items():
            monkeypatch.setenv(name, value)
        if now is not None:
            monkeypatch.setattr("bridge.statusline.time.time", lambda: now)
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        out, errors = capfdbinary.readouterr()
        assert errors == b""
        assert out.count(b"\n") == 1
        return out.decode().removesuffix("\n")

    return run


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    (tmp_path / "state").mkdir()
    with closing(State(tmp_path / "state")) as state:
        yield state


def test_a_line_of_all_that_is_known(state: State, run: Run) -> None:
    state.add("2026-02-14T03:00Z", cost=1_000_000_000)
    state.add("2026-02-14T12:30Z", cost=2_000_000_000)
    state.add("2026-02-14T12:40Z", cost=9_000_000_000, tool="codex", model="gpt-6-astra")
    (state.directory / "lock").write_text(f"{os.getpid()}\nme")
    with socket.create_server(("127.0.0.1", 0)) as nobody_answers:
        listen = f"localhost:{nobody_answers.getsockname()[1]}"
        assert run(TOLD, state.directory, BRIDGE_LISTEN=listen) == (
            "Opus 5 · $0.42 session · $3.00 today · $2.00 block, $2.00/h, 3h30 left · ctx 42%"
            " · 5h 37% until 16:00 · 7d 12% until Tue 13:30"
        )


def test_today_begins_at_local_midnight(state: State, run: Run) -> None:
    state.add("2026-02-14T02:00Z", cost=1_000_000_000)
    state.add("2026-02-14T12:00Z", cost=2_000_000_000)
    for zone, today in (("UTC", "$3.00"), ("America/New_York", "$2.00"), ("Asia/Kolkata", "$3.00")):
        os.environ["TZ"] = zone
        time.tzset()
        assert f"{today} today" in run({}, state.directory)


def test_a_long_day_without_a_gap_has_its_blocks_where_it_began(state: State, run: Run) -> None:
    first = (int(NOW) // 3600 - 8 * 24) * 3600
    for step in (1, 3, 4):
        begin = first
        for at in range(first, int(NOW), step * 3600):
            begin = at if at >= begin + 5 * 3600 else begin
            state.add(at, cost=1_000_000_000)
        left = (begin + 5 * 3600 - int(NOW)) // 60
        assert f" {left // 60}h{left % 60:02} left" in run({}, state.directory)
        state.clear()


@pytest.mark.parametrize(
    ("told", "line"),
    [
        (b"", ""),
        (b"{", ""),
        (b"\xff\xfe", ""),
        (b"[" * 100_000, ""),
        ([], ""),
        ({}, ""),
        ({"model": "opus"}, ""),
        ({"model": {"display_name": 7}}, ""),
        ({"model": {"display_name": "a\x1b[31mb\nc" + "d" * 99}}, "a[31mbc" + "d" * 33 + " · "),
        ({"cost": {"total_cost_usd": "1"}}, ""),
        ({"cost": {"total_cost_usd": True}}, ""),
        ({"cost": {"total_cost_usd": 1e300}}, ""),
        ({"cost": {"total_cost_usd": 1234.5}}, "$1,234.50 session · "),
        ({"context_window": {"used_percentage": None}}, ""),
        ({"context_window": {"used_percentage": 0}}, "ctx 0% · "),
        ({"rate_limits": None}, ""),
        ({"rate_limits": {"five_hour": None, "other": {"used_percentage": 1}}}, ""),
        ({"rate_limits": {"five_hour": {"used_percentage": 5}}}, "5h 5% · "),
        ({"rate_limits": {"five_hour": {"used_percentage": 100.4}}}, "5h 100% · "),
        ({"rate_limits": {"five_hour": {"used_percentage": 5, "resets_at": 1}}}, ""),
        ({"rate_limits": {"five_hour": {"used_percentage": 900}}}, ""),
        ({"rate_limits": {"five_hour": {"used_percentage": -1}}}, ""),
        ({"rate_limits": {"seven_day_opus": {"used_percentage": 5, "resets_at": "soon"}}}, "7d Opus 5% · "),
    ],
)
def test_whatever_is_missing_or_broken_is_left_out(run: Run, told: Any, line: str) -> None:
    assert run(told) == f"{line}bridge stopped"


def test_a_damaged_or_foreign_state_is_left_out(run: Run, tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(b"not a database" * 1000)
    assert run(TOLD).startswith("Opus 5 · $0.42 session · ctx 42%")
    (tmp_path / ".config" / "claude-otel-bridge").mkdir(parents=True)
    (tmp_path / ".config" / "claude-otel-bridge" / "config.toml").write_text("listen = [")
    assert run(TOLD).startswith("Opus 5 · $0.42 session · ctx 42%")


def test_a_fault_of_ours_is_a_line_as_well(state: State, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statusline, "look", lambda *_: 1 / 0)
    assert run(TOLD, state.directory) == "claude-otel-bridge: ZeroDivisionError; claude-otel-bridge doctor says more"


@pytest.mark.parametrize("redirected", [">/dev/full", ">&-"])
def test_a_line_that_nobody_takes_is_no_fault(tmp_path: Path, redirected: str) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    command = f"echo {{}} | {sys.executable} -m bridge statusline {redirected}"
    environment = {"HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_running_bridge_learns_of_the_limits_and_not_twice_a_minute(
    make_daemon: Callable[..., Daemon], run: Run, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    daemon = follow_from_here(make_daemon())
    listen = f"localhost:{daemon.port}"

    def gauges() -> dict[str, float]:
        found = {name: value for name, value in daemon.samples("/metrics").items() if name.startswith("ai_limit_")}
        of_ours = {name: value for name, value in found.items() if 'job="claude-otel-bridge"' in name}
        window = re.compile(r'tool="claude_code",window="(\w+)"')
        return {" ".join((name.partition("{")[0], *window.findall(name))): float(found[name]) for name in of_ours}

    def commits() -> int:
        ((count,),) = select(daemon, "select commits from meta")
        return int(count)

    now = time.time()
    told = {**TOLD, "rate_limits": {"five_hour": {"used_percentage": 37.2, "resets_at": round(now) + 900}}}
    shown = run(told, daemon.state_dir, None, BRIDGE_LISTEN=listen)
    assert shown.startswith("Opus 5 · $0.42 session · $0.00 today · ctx 42% · 5h 37% until ")
    expected = {
        "ai_limit_used_ratio five_hour": 0.372,
        "ai_limit_reset_timestamp_seconds five_hour": round(now) + 900,
    }
    assert eventually(lambda: gauges() == expected), gauges()
    before = commits()
    run(told, daemon.state_dir, None, BRIDGE_LISTEN=listen)
    told["rate_limits"]["five_hour"]["used_percentage"] = 38
    run(told, daemon.state_dir, None, BRIDGE_LISTEN=listen)
    assert eventually(lambda: 0.38 in gauges().values())
    assert commits() - before == 1
    append(projects(daemon) / "p" / "s.jsonl", response("msg_1", "req_1"))
    assert eventually(lambda: select(daemon, "select 1 from rollup"))
    command = ["--state-dir", str(daemon.state_dir), "report", "blocks"]
    assert _main(command) == 0
    assert b"Official limit of claude code five hour: 38% used until 2" in capfdbinary.readouterr().out
    assert _main([*command, "--json"]) == 0
    (limit,) = json.loads(capfdbinary.readouterr().out)["limits"]
    assert (limit["tool"], limit["window"], limit["used"]) == ("claude_code", "five_hour", 0.38)
    daemon.kill()
    assert run(TOLD, daemon.state_dir, None, BRIDGE_LISTEN=listen).endswith(" · bridge stopped")


@pytest.mark.parametrize(
    ("token", "sent"), [(" abc-123\n", [b"Authorization: Bearer abc-123"]), ("", []), ("a\nb", [])]
)
def test_a_bridge_that_wants_a_token_gets_it(state: State, run: Run, token: str, sent: list[bytes]) -> None:
    (state.directory / "lock").write_text(f"{os.getpid()}\nme")
    with socket.create_server(("127.0.0.1", 0)) as bridge:
        run(TOLD, state.directory, BRIDGE_LISTEN=f"localhost:{bridge.getsockname()[1]}", BRIDGE_TOKEN=token)
        with bridge.accept()[0] as connection, connection.makefile("rb") as told:
            head, _, content = told.read().partition(b"\r\n\r\n")
    assert [line for line in head.split(b"\r\n") if line.startswith(b"Authorization")] == sent
    assert json.loads(content)["resourceMetrics"]


def test_it_loads_nothing_that_starts_slowly(state: State, tmp_path: Path) -> None:
    state.add("2026-02-14T12:30Z")
    script = (
        "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr));"
        "sys.argv[1:] = ['statusline']; from bridge.__main__ import main; main()"
    )
    environment = {"HOME": str(tmp_path), "BRIDGE_STATE_DIR": str(state.directory)}
    command = [sys.executable, "-S", "-c", script]
    done = subprocess.run(
        command, input=json.dumps(TOLD).encode(), capture_output=True, check=True, env=environment,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.stdout.decode().startswith("Opus 5 · $0.42 session · $0.00 today")
    loaded = set(done.stderr.decode().split())
    assert not loaded & {"argparse", "asyncio", "dataclasses", "inspect", "msgspec", "pathlib", "tomllib", "zoneinfo"}
