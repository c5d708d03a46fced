"""install, uninstall, start, stop, restart, status and logs, on homes of their own with a systemd that only notes."""

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from bridge import cli, config, service, tokens, units
from bridge.control import Host, ServiceError
from bridge.service import addresses, stable_command, variables_of
from tests.daemon import Daemon

ROOT = Path(__file__).parent.parent
OURS = (sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); from bridge.cli import main; main()")


@dataclass(frozen=True)
class Machine(Host):
    """A host whose systemctl notes what it is asked, and runs a real bridge while the service is started."""

    daemon: Daemon | None = None
    asked: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def run(self, *command: str, shows: bool = False) -> tuple[int, str]:
        del shows
        line = " ".join(command).replace(units.NAME, "X")
        self.asked.append(line)
        if any(word in line for word in self.broken):
            return 1, "it is broken"
        assert self.daemon is not None
        running = self.daemon.process is not None and self.daemon.process.poll() is None
        match command[2] if command[0] == "systemctl" else "":
            case "is-active":
                return (0, "active") if running else (3, "inactive")
            case "start" | "restart" if units.SERVICE in command:
                if running and command[2] == "restart":
                    self.daemon.stop()
                if not running or command[2] == "restart":
                    self.daemon.start()
            case "stop" | "disable" if running:
                self.daemon.stop()
        return 0, ""

    def take(self) -> list[str]:
        """What was asked since the last time."""
        taken = [line.removeprefix("systemctl --user ") for line in self.asked]
        self.asked.clear()
        return taken

    @property
    def units(self) -> Path:
        return self.home / ".config" / "systemd" / "user"

    def do(self, *words: str) -> int:
        """A command line of the user."""
        assert self.daemon is not None
        options = cli.parser().parse_args(words)
        flags = {"listen": [f"127.0.0.1:{self.daemon.port}"], "state_dir": str(self.daemon.state_dir)}
        return service.main(options, config.load("", {}, flags, ""), flags, self)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    (tmp_path / "home").mkdir()
    daemon = Daemon(tmp_path)
    yield Machine("linux", tmp_path / "home", 1000, {}, OURS, tmp_path, daemon)
    daemon.close()


Capture = pytest.CaptureFixture[str]


def test_install_writes_starts_waits_and_says_so(machine: Machine, capsys: Capture) -> None:
    assert machine.do("install") == 0
    assert machine.take() == [
        "show --property=Version",
        "is-active X.socket",
        "daemon-reload",
        "enable X.socket X.service",
        "stop X.socket X.service",
        "reset-failed X.socket X.service",
        "start X.socket",
        "restart X.service",
    ]
    assert {path.name for path in machine.units.iterdir()} == {units.SOCKET, units.SERVICE}
    assert machine.daemon is not None
    assert f"ListenStream=127.0.0.1:{machine.daemon.port}\n" in (machine.units / units.SOCKET).read_text()
    text = (machine.units / units.SERVICE).read_text()
    assert f"Environment=BRIDGE_STATE_DIR={machine.daemon.state_dir}\n" in text
    assert stat.S_IMODE((machine.units / units.SERVICE).stat().st_mode) == 0o644
    said = capsys.readouterr().out
    assert f"answers    {machine.daemon.url}\n" in said
    assert "next       claude-otel-bridge setup" in said


def test_install_again_changes_nothing_and_keeps_the_sockets(machine: Machine, capsys: Capture) -> None:
    machine.do("install")
    before = {path: path.stat().st_mtime_ns for path in machine.units.iterdir()}
    machine.take()
    assert machine.do("install") == 0
    assert {path: path.stat().st_mtime_ns for path in machine.units.iterdir()} == before
    assert "stop X.socket X.service" not in machine.take()
    assert capsys.readouterr().out.count("unchanged") == 2


def test_dry_run_prints_the_files_and_does_nothing(machine: Machine, capsys: Capture) -> None:
    assert machine.do("install", "--dry-run") == 0
    assert machine.asked == []
    assert list(machine.home.iterdir()) == []
    said = capsys.readouterr().out
    assert f"# {machine.units / units.SOCKET}\n# {units.MARKER}" in said
    assert "[Service]" in said


def test_no_secret_gets_into_a_unit_file(machine: Machine, capsys: Capture) -> None:
    secret = "x" * 40
    host = replace(machine, environment={"BRIDGE_TOKEN": secret})
    assert host.do("install") == os.EX_CONFIG
    assert "put the tokens into token_file" in capsys.readouterr().err
    assert not machine.units.exists()
    assert host.do("install", "--dry-run") == 0
    assert secret not in capsys.readouterr().out


def test_beyond_loopback_a_service_needs_a_token(machine: Machine, capsys: Capture) -> None:
    assert machine.daemon is not None
    flags = {"listen": ["0.0.0.0:4318"], "state_dir": str(machine.daemon.state_dir)}
    options = cli.parser().parse_args(["install"])
    assert service.main(options, config.load("", {}, flags, ""), flags, machine) == os.EX_CONFIG
    error = capsys.readouterr().err
    assert "0.0.0.0:4318 is beyond loopback" in error
    assert "claude-otel-bridge token NAME" in error
    assert not machine.units.exists()
    tokens.make(machine.daemon.state_dir / "tokens", "alice")
    service.require_tokens(service.service_of(machine, config.load("", {}, flags, ""), {}, system=False),
                           config.load("", {}, flags, ""), machine)  # fmt: skip


@pytest.mark.parametrize("name", [units.SOCKET, units.SERVICE])
@pytest.mark.parametrize("verb", ["install", "uninstall"])
def test_files_of_others_are_left_alone(name: str, verb: str, machine: Machine, capsys: Capture) -> None:
    machine.units.mkdir(parents=True)
    (machine.units / name).write_text("[Service]\n")
    assert machine.do(verb) == os.EX_CANTCREAT
    assert machine.asked == []
    assert [path.read_text() for path in machine.units.iterdir()] == ["[Service]\n"]
    assert f"{name} was not written by `claude-otel-bridge install`; move it away first" in capsys.readouterr().err


def test_links_are_left_alone(machine: Machine, tmp_path: Path) -> None:
    elsewhere = tmp_path / "dotfiles.service"
    elsewhere.write_text(units.MARKER)
    machine.units.mkdir(parents=True)
    (machine.units / units.SERVICE).symlink_to(elsewhere)
    assert machine.do("install") == os.EX_CANTCREAT
    assert elsewhere.read_text() == units.MARKER


def test_a_port_in_use_is_told_before_anything_is_written(machine: Machine, capsys: Capture) -> None:
    assert machine.daemon is not None
    with socket.create_server(("127.0.0.1", machine.daemon.port)):
        assert machine.do("install") == os.EX_UNAVAILABLE
    assert "is in use; stop the other program" in capsys.readouterr().err
    assert not machine.units.exists()


def test_a_stranger_on_the_port_is_not_taken_for_the_bridge(machine: Machine, capsys: Capture) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    machine.do("install")
    assert machine.daemon is not None
    machine.do("stop")
    with HTTPServer(("127.0.0.1", machine.daemon.port), BaseHTTPRequestHandler) as stranger:
        thread = Thread(target=stranger.serve_forever)
        thread.start()
        assert machine.do("status") == os.EX_UNAVAILABLE
        stranger.shutdown()
        thread.join()
    assert "another program" in capsys.readouterr().out


def test_without_systemd_the_message_says_what_to_do(machine: Machine, capsys: Capture) -> None:
    machine.broken.append("show --property=Version")
    assert machine.do("install") == os.EX_UNAVAILABLE
    said = capsys.readouterr().err
    for part in ("it is broken", "enable-linger", "In a container", "install --system"):
        assert part in said
    assert not machine.units.exists()


def test_without_systemd_the_status_is_whether_a_bridge_answers(machine: Machine, capsys: Capture) -> None:
    machine.broken.append("show --property=Version")
    assert machine.do("status") == os.EX_UNAVAILABLE
    said = capsys.readouterr()
    assert "no answer" in said.out
    assert "systemd does not answer" in said.err
    assert machine.daemon is not None
    machine.daemon.start()
    assert machine.do("status") == 0
    assert f"answers    {machine.daemon.url} ready" in capsys.readouterr().out


def test_what_systemctl_says_is_passed_on(machine: Machine, capsys: Capture) -> None:
    machine.broken.append("restart X.service")
    assert machine.do("install") == os.EX_UNAVAILABLE
    assert "`systemctl --user restart claude-otel-bridge.service` failed: it is broken" in capsys.readouterr().err


def test_a_command_that_only_works_here_is_refused(machine: Machine, capsys: Capture) -> None:
    lost = Machine("linux", machine.home, 1000, {}, (sys.executable, "-c", "import nowhere"), machine.root)
    options = cli.parser().parse_args(["install"])
    assert service.main(options, config.Config(), {}, lost) == os.EX_UNAVAILABLE
    assert "does not run on its own: ModuleNotFoundError: No module named 'nowhere'" in capsys.readouterr().err


def test_stop_start_restart_and_status(machine: Machine, capsys: Capture) -> None:
    for verb in ("start", "stop", "restart"):
        assert machine.do(verb) == os.EX_UNAVAILABLE
        assert "not installed; `claude-otel-bridge install` does that" in capsys.readouterr().err
    assert machine.do("status") == os.EX_UNAVAILABLE
    machine.do("install")
    assert machine.do("status") == 0
    assert machine.do("stop") == 0
    assert machine.do("stop") == 0
    assert machine.do("status") == os.EX_UNAVAILABLE
    assert "no answer" in capsys.readouterr().out
    for verb in ("start", "start", "restart", "status"):
        assert machine.do(verb) == 0
    assert machine.daemon is not None
    assert f"answers    {machine.daemon.url} ready" in capsys.readouterr().out


def test_the_installed_address_counts_not_the_one_of_the_moment(machine: Machine, capsys: Capture) -> None:
    machine.do("install")
    assert service.main(cli.parser().parse_args(["status"]), config.Config(), {}, machine) == 0
    assert machine.daemon is not None
    assert machine.daemon.url in capsys.readouterr().out


def test_logs(machine: Machine) -> None:
    machine.do("logs", "-f", "-n", "7")
    machine.do("logs", "--system")
    assert machine.asked == [
        "journalctl --quiet --user-unit=X --lines=7 --follow",
        "journalctl --quiet --unit=X --lines=100 --no-pager",
    ]


def test_uninstall_keeps_the_counters(machine: Machine, capsys: Capture) -> None:
    machine.do("install")
    machine.take()
    assert machine.do("uninstall") == 0
    assert machine.take() == [
        "show --property=Version",
        "disable --now X.socket X.service",
        "daemon-reload",
        "reset-failed X.socket X.service",
    ]
    assert list(machine.units.iterdir()) == []
    assert machine.daemon is not None
    assert (machine.daemon.state_dir / "state.db").exists()
    assert f"kept       {machine.daemon.state_dir}" in capsys.readouterr().out
    assert machine.do("uninstall") == 0
    assert "no service is installed" in capsys.readouterr().out


def test_half_an_installation_can_be_removed(machine: Machine) -> None:
    machine.do("install")
    (machine.units / units.SOCKET).unlink()
    machine.take()
    assert machine.do("uninstall") == 0
    assert "disable --now X.service" in machine.take()
    assert list(machine.units.iterdir()) == []


def test_purge_says_which_directory_it_removes(machine: Machine, capsys: Capture) -> None:
    machine.do("install")
    options = cli.parser().parse_args(["uninstall", "--purge"])
    assert service.main(options, config.Config(), {}, machine) == 0  # the directory is the installed one
    assert machine.daemon is not None
    assert f"removing   {machine.daemon.state_dir}\n" in capsys.readouterr().out
    assert not machine.daemon.state_dir.exists()


def test_purge_leaves_what_is_not_the_bridge_s(machine: Machine, capsys: Capture, tmp_path: Path) -> None:
    assert machine.daemon is not None
    state = machine.daemon.state_dir
    machine.do("install")
    (state / "thesis.tex").write_text("years")
    (tmp_path / "precious").mkdir()
    (state / "state-link").symlink_to(tmp_path / "precious")
    (state / "state-v1-copies").mkdir()
    assert machine.do("uninstall", "--purge") == 0
    assert [path.name for path in state.iterdir()] == ["thesis.tex"]
    assert (tmp_path / "precious").exists()
    assert "other files are in it" in capsys.readouterr().out


def test_purge_of_a_directory_without_state_does_nothing(machine: Machine, capsys: Capture) -> None:
    assert machine.daemon is not None
    machine.daemon.state_dir.mkdir()
    (machine.daemon.state_dir / "state-of-the-art.txt").write_text("mine")
    assert machine.do("uninstall", "--purge") == 0
    assert len(list(machine.daemon.state_dir.iterdir())) == 1
    assert "no state in" in capsys.readouterr().out


def test_purge_waits_for_no_bridge(machine: Machine, capsys: Capture) -> None:
    """A bridge in a terminal still uses the state."""
    assert machine.daemon is not None
    machine.daemon.start()
    assert machine.do("uninstall", "--purge") == os.EX_TEMPFAIL
    assert "in use by another bridge" in capsys.readouterr().err
    assert (machine.daemon.state_dir / "state.db").exists()


# --- who may, and where ---


@pytest.mark.parametrize(
    ("platform", "uid", "environment", "words", "code", "text"),
    [
        ("linux", 1000, {}, ("install", "--system"), os.EX_NOPERM, "run it with sudo"),
        ("linux", 0, {"SUDO_UID": "1000"}, ("install",), os.EX_NOPERM, "leave sudo out"),
        ("darwin", 501, {}, ("install", "--system"), os.EX_USAGE, "--system is for Linux"),
        ("freebsd14", 1000, {}, ("status",), os.EX_UNAVAILABLE, "no service on freebsd14"),
    ],
)
def test_refusals(
    platform: str, uid: int, environment: dict[str, str], words: tuple[str, ...], code: int, text: str,
    tmp_path: Path, capsys: Capture,
) -> None:  # fmt: skip
    host = Machine(platform, tmp_path, uid, environment, OURS, tmp_path)
    assert service.main(cli.parser().parse_args(words), config.Config(), {}, host) == code
    assert text in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_system_service_cannot_run_a_program_in_a_home(tmp_path: Path, capsys: Capture) -> None:
    host = Machine("linux", tmp_path, 0, {}, ("/home/u/.local/bin/claude-otel-bridge",), tmp_path)
    assert service.main(cli.parser().parse_args(["install", "--system"]), config.Config(), {}, host) != 0
    assert "is in a home, which the system's service cannot see" in capsys.readouterr().err


def test_the_system_s_files(tmp_path: Path, capsys: Capture) -> None:
    host = Machine("linux", tmp_path, 0, {}, OURS, tmp_path)
    assert service.main(cli.parser().parse_args(["install", "--system", "--dry-run"]), config.Config(), {}, host) == 0
    said = capsys.readouterr().out
    assert f"# {tmp_path}/etc/systemd/system/{units.SERVICE}" in said
    assert "--state-dir %S/claude-otel-bridge\n" in said
    assert "DynamicUser=yes" in said


def test_a_machine_without_systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridge.control.PROGRAMS", str(tmp_path))
    with pytest.raises(ServiceError, match="this machine has no systemctl"):
        Host("linux", tmp_path, 1000, {}, OURS).run("systemctl", "--user", "status")


def test_programs_get_an_environment_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "systemctl"
    script.write_text("#!/bin/sh\n/usr/bin/env; exit 4\n")
    script.chmod(0o700)
    monkeypatch.setattr("bridge.control.PROGRAMS", f"{tmp_path}:/usr/bin:/bin")
    code, output = Host("linux", tmp_path, 77, {"LD_PRELOAD": "x", "LANG": "C"}, OURS).run("systemctl")
    assert code == 4
    shown = dict(line.split("=", 1) for line in output.splitlines())
    assert shown["XDG_RUNTIME_DIR"] == "/run/user/77"
    assert shown["LANG"] == "C"
    assert "LD_PRELOAD" not in shown


# --- what goes into the files ---


def test_addresses_of_the_sockets() -> None:
    def shown(*listen: str, has_ipv6: bool = True) -> list[str]:
        return [units.shown(address) for address in addresses(listen, has_ipv6=has_ipv6)]

    assert shown("localhost:1") == ["127.0.0.1:1", "[::1]:1"]
    assert shown("localhost:1", has_ipv6=False) == ["127.0.0.1:1"]
    assert shown("0.0.0.0:2", "[::]:2", "0.0.0.0:2") == ["0.0.0.0:2", "[::]:2"]
    with pytest.raises(ServiceError, match="needs localhost or an IP address"):
        shown("myhost:1")


def test_settings_of_the_command_line_and_the_shell_become_the_service_s() -> None:
    environment = {
        "BRIDGE_LIMITS_SERIES": "7", "BRIDGE_LOG_LEVEL": "info", "BRIDGE_TEST_X": "1", "BRIDGE_CONFIG": "/etc/c.toml",
        "XDG_STATE_HOME": "/s", "XDG_CONFIG_HOME": "relative", "CLAUDE_CONFIG_DIR": "/c,/d", "PATH": "/", "TOKEN": "x",
    }  # fmt: skip
    flags = {"log_level": "debug", "listen": ["localhost:1", "[::1]:2"], "state_dir": "state", "transcripts": False}
    wanted = {
        "BRIDGE_CONFIG": "/etc/c.toml",
        "BRIDGE_LIMITS_SERIES": "7",
        "BRIDGE_LISTEN": "localhost:1,[::1]:2",
        "BRIDGE_LOG_LEVEL": "debug",
        "BRIDGE_STATE_DIR": str(Path.cwd() / "state"),
        "BRIDGE_TRANSCRIPTS": "false",
        "CLAUDE_CONFIG_DIR": "/c,/d",
        "XDG_STATE_HOME": "/s",
    }
    assert variables_of(environment, flags, system=False) == wanted
    del wanted["CLAUDE_CONFIG_DIR"], wanted["XDG_STATE_HOME"]
    assert variables_of(environment, flags, system=True) == wanted


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the running program's scripts."""
    folder = tmp_path / "venv" / "bin"
    folder.mkdir(parents=True)
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(folder))
    return folder


def test_the_shim_is_taken_if_it_is_ours(scripts: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shim, own = home / ".local" / "bin" / units.NAME, scripts / units.NAME
    shim.parent.mkdir(parents=True)
    assert stable_command(home) == (sys.executable, "-P", "-m", "bridge")
    own.touch()
    assert stable_command(home) == (str(own),)
    shim.touch()  # of another installation
    assert stable_command(home) == (str(own),)
    shim.unlink()
    shim.symlink_to(own)
    assert stable_command(home) == (str(shim),)


def test_commands_are_quoted_for_systemd() -> None:
    def line(*words: str) -> str:
        return units.command_line(words)

    assert line("/a/b", "-P") == "/a/b -P"
    assert line("/a b/c") == '"/a b/c"'
    assert line("/a%h/$HOME") == '"/a%%h/$$HOME"'
    assert line('q"\\') == '"q\\"\\\\"'


@pytest.mark.parametrize("words", [("install", "--dry-run"), ("status",)])
def test_an_empty_environment_will_do(words: tuple[str, ...], tmp_path: Path) -> None:
    done = subprocess.run([*OURS, *words], env={"HOME": str(tmp_path)}, cwd="/", capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert (done.returncode == 0) == (words[0] == "install")
    assert list(tmp_path.iterdir()) == []


Make = Callable[..., Daemon]


def test_a_log_file_is_private_and_no_link_is_followed(make_daemon: Make, tmp_path: Path) -> None:
    log = tmp_path / "logs" / "bridge.log"
    astray = make_daemon("--log-file", str(log))
    astray.spawn()
    assert astray.process is not None
    assert astray.process.wait(20) == os.EX_CANTCREAT
    assert f"log_file: cannot write {log}: No such file" in astray.log
    assert not log.parent.exists()
    log.parent.mkdir()
    daemon = make_daemon("--log-file", str(log)).start()
    assert daemon.stop() == 0
    assert " info ready version=" in log.read_text()
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert daemon.log == ""
    link = tmp_path / "link.log"
    link.symlink_to(log)
    refused = make_daemon("--log-file", str(link))
    refused.spawn()
    assert refused.process is not None
    assert refused.process.wait(20) == os.EX_CANTCREAT
    assert "log_file: cannot write" in refused.log


def test_the_readme_s_installation_by_hand_leaves_files_that_are_ours(tmp_path: Path, machine: Machine) -> None:
    readme = (ROOT / "README.md").read_text()
    lines = [line for line in readme.splitlines() if line.startswith(("mkdir -p ~", "cp systemd/", "sed "))]
    assert len(lines) == 4
    environment = {"HOME": str(machine.home), "PATH": os.defpath}
    subprocess.run(["sh", "-euc", "\n".join(lines)], cwd=ROOT, env=environment, check=True)
    agent = machine.home / "Library" / "LaunchAgents" / units.AGENT
    assert units.read_back({units.AGENT: agent.read_text()})[1]["BRIDGE_LOG_FILE"].startswith(f"{machine.home}/Library")
    assert "YOU" not in agent.read_text()
    assert (machine.home / "Library" / "Logs" / units.NAME).is_dir()
    assert machine.do("install") == 0
    assert machine.do("uninstall") == 0
    assert list(machine.units.iterdir()) == []
