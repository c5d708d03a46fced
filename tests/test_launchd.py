"""What macOS needs: the agent, its sockets, its log. launchd itself is not here; what it reads and calls is."""

import ctypes
import logging
import plistlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

from bridge import cli, config, service, telemetry, units
from bridge.control import Host
from bridge.supervisor import launchd_descriptors
from tests.daemon import Daemon
from tests.test_service import OURS

ROOT = Path(__file__).parent.parent
LOOPBACK = [("127.0.0.1", 4318), ("::1", 4318)]
LOG = PurePosixPath("/Users/YOU/Library/Logs/claude-otel-bridge/bridge.log")


def test_the_agent_for_installation_by_hand_is_the_rendered_one() -> None:
    wanted = units.launchd_agent(["/Users/YOU/.local/bin/claude-otel-bridge"], LOOPBACK, {}, LOG)
    assert {path.name: path.read_text() for path in (ROOT / "launchd").iterdir()} == wanted


def test_the_agent_says_what_launchd_needs() -> None:
    text = units.launchd_agent(["/a b/<x>", "-P"], LOOPBACK, {"BRIDGE_LISTEN": "<&>"}, LOG)[units.AGENT]
    assert units.MARKER in text
    agent = plistlib.loads(text.encode())
    assert agent["Label"] == Path(units.AGENT).stem
    assert agent["ProgramArguments"] == ["/a b/<x>", "-P"]
    assert agent["EnvironmentVariables"] == {"BRIDGE_LOG_FILE": str(LOG), "BRIDGE_LISTEN": "<&>"}
    assert agent["KeepAlive"] == {"SuccessfulExit": False}
    assert agent["ThrottleInterval"] == 10
    assert agent["RunAtLoad"] is True
    assert agent["ProcessType"] == "Background"
    assert [tuple(one.values()) for one in agent["Sockets"][units.AGENT_SOCKETS]] == [
        ("127.0.0.1", "4318", "stream", "IPv4"),
        ("::1", "4318", "stream", "IPv6"),
    ]


def test_the_agent_can_be_read_back() -> None:
    files = units.launchd_agent(["/x"], LOOPBACK, {"BRIDGE_STATE_DIR": "/s"}, LOG)
    assert units.read_back(files) == (LOOPBACK, {"BRIDGE_LOG_FILE": str(LOG), "BRIDGE_STATE_DIR": "/s"})


class Library:
    """A C library with the two calls: launchd's, with its code and descriptors, and free()."""

    def __init__(self, code: int, descriptors: list[int]) -> None:
        self.code = code
        self.array = (ctypes.c_int * max(1, len(descriptors)))(*descriptors)
        self.count = len(descriptors)
        self.asked: list[bytes] = []
        self.freed = 0

    def launch_activate_socket(self, name: bytes, descriptors: object, count: object) -> int:
        self.asked.append(name)
        if self.code == 0:
            descriptors._obj.contents = ctypes.c_int.from_buffer(self.array)  # type: ignore[attr-defined]  # byref()
            count._obj.value = self.count  # type: ignore[attr-defined]  # byref()
        return self.code

    def free(self, pointer: object) -> None:
        del pointer
        self.freed += 1


def test_sockets_of_launchd() -> None:
    library = Library(0, [7, 8])
    assert launchd_descriptors(library) == [7, 8]
    assert library.asked == [units.AGENT_SOCKETS.encode()]
    assert library.freed == 1


@pytest.mark.parametrize("code", [2, 3])  # ENOENT, ESRCH
def test_no_sockets_where_launchd_has_none(code: int) -> None:
    library = Library(code, [])
    assert launchd_descriptors(library) == []
    assert library.freed == 0


class Mac(Host):
    """A host whose launchctl notes what it is asked, and runs a real bridge while the agent is loaded."""

    daemon: Daemon
    asked: list[str]
    busy: int = 0

    def run(self, *command: str, shows: bool = False) -> tuple[int, str]:
        del shows
        self.asked.append(" ".join(command).replace(str(self.home), "~"))
        loaded = self.daemon.process is not None and self.daemon.process.poll() is None
        match command[1]:
            case "print" if command[2].endswith(units.NAME):
                return (0, "") if loaded else (113, "Could not find service")
            case "bootstrap":
                if self.busy:
                    object.__setattr__(self, "busy", self.busy - 1)
                    return 37, "Operation already in progress"
                self.daemon.start()
            case "bootout":
                self.daemon.stop()
            case "kickstart":
                self.daemon.kill()
                self.daemon.start()
        return 0, ""

    def take(self) -> list[str]:
        taken = [line for line in self.asked if " print " not in line]
        self.asked.clear()
        return taken

    def do(self, *words: str) -> int:
        flags = {"listen": [f"127.0.0.1:{self.daemon.port}"], "state_dir": str(self.daemon.state_dir)}
        return service.main(cli.parser().parse_args(words), config.load("", {}, flags, ""), flags, self)


@pytest.fixture
def mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mac]:
    monkeypatch.setattr("bridge.control.RETRY_SECONDS", 0)
    made = Mac("darwin", tmp_path / "home", 501, {}, OURS, tmp_path)
    for name, value in (("daemon", Daemon(tmp_path)), ("asked", [])):
        object.__setattr__(made, name, value)
    yield made
    made.daemon.close()


def test_the_life_of_an_agent(mac: Mac, capsys: pytest.CaptureFixture[str]) -> None:
    start = ["enable gui/501/claude-otel-bridge", "bootstrap gui/501 ~/Library/LaunchAgents/claude-otel-bridge.plist"]
    start = [f"launchctl {line}" for line in start]
    stop = ["launchctl bootout gui/501/claude-otel-bridge"]
    kick = ["launchctl kickstart -k gui/501/claude-otel-bridge"]
    assert mac.do("install") == 0
    assert mac.take() == start
    assert (mac.home / "Library" / "Logs" / "claude-otel-bridge").is_dir()
    assert mac.do("install") == 0
    assert mac.take() == kick
    assert mac.do("restart") == 0
    assert mac.take() == kick
    assert mac.do("stop") == mac.do("stop") == 0
    assert mac.take() == stop
    object.__setattr__(mac, "busy", 2)
    assert mac.do("start") == 0
    assert mac.take() == [start[0], start[1], start[1], start[1]]
    assert mac.do("status") == 0
    assert mac.do("logs", "-f", "-n", "3") == 0
    logs = "~/Library/Logs/claude-otel-bridge"
    assert mac.take() == [f"tail -n 3 -F {logs}/bridge.log {logs}/stderr.log"]
    assert mac.do("uninstall", "--purge") == 0
    assert mac.take() == stop
    assert not (mac.home / "Library" / "LaunchAgents" / units.AGENT).exists()
    assert not mac.daemon.state_dir.exists()


def test_a_mac_without_a_session(mac: Mac, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mac, "run", lambda *_: (112, "Domain does not support it"))
    assert mac.do("install") != 0
    assert "Log in on the screen of this Mac first" in capsys.readouterr().err


def test_the_log_file_is_rotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "MAX_LOG_BYTES", 500)
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        telemetry.configure_log("text", "info", str(tmp_path / "bridge.log"))
        for number in range(200):
            telemetry.log.info("line", extra={"number": number})
    finally:
        for handler in root.handlers:
            handler.close()
        root.handlers[:] = before
        root.setLevel(level)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["bridge.log", "bridge.log.1", "bridge.log.2", "bridge.log.3"]
    assert all(file.stat().st_size <= 500 for file in files)
    assert "number=199" in files[0].read_text()
