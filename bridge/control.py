"""Asks systemd or launchd to load, start and stop the service.

Law: nothing depends on PATH or on a login shell's environment; programs get a small environment of their own.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bridge import units
from bridge.units import NAME, SERVICE, SOCKET

PROGRAMS = "/usr/bin:/bin:/usr/sbin:/sbin:/run/current-system/sw/bin"
"""Where systemctl, launchctl and the like are looked for."""
RETRIES = 20
RETRY_SECONDS = 0.5


class ServiceError(Exception):
    """The verb cannot be done; `exit_code` is a sysexits code, the text says what, where and what to do."""

    def __init__(self, message: str, exit_code: int = os.EX_UNAVAILABLE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Host:
    """The machine, the user and how the bridge is started: what tests replace."""

    platform: str
    home: Path
    uid: int
    environment: Mapping[str, str]
    command: tuple[str, ...]
    root: Path = Path("/")

    def run(self, *command: str, shows: bool = False) -> tuple[int, str]:
        """Run a program of the system; its exit code and its output, unless it shows that itself."""
        program = shutil.which(command[0], path=PROGRAMS)
        if program is None:
            raise ServiceError(f"this machine has no {command[0]}; run {NAME} in whatever starts programs here")
        runtime = self.environment.get("XDG_RUNTIME_DIR") or f"/run/user/{self.uid}"
        kept = {key: self.environment[key] for key in ("LANG", "TERM") if key in self.environment}
        environment = {**kept, "PATH": PROGRAMS, "HOME": str(self.home), "XDG_RUNTIME_DIR": runtime}
        output = None if shows else subprocess.PIPE
        words = [program, *command[1:]]
        done = subprocess.run(words, env=environment, stdout=output, stderr=output, text=True)  # noqa: S603  # no shell
        return done.returncode, "" if shows else (done.stdout + done.stderr).strip()

    def must(self, *command: str) -> None:
        code, output = self.run(*command)
        if code:
            raise ServiceError(f"`{' '.join(command)}` failed: {output or f'exit code {code}'}")


class Supervisor(Protocol):
    """What runs the service. `load` puts changed files in force and restarts it; `unload` stops it before the files
    are removed, `forget` follows afterwards."""

    directory: Path

    def require(self) -> None: ...
    def is_running(self) -> bool: ...
    def load(self, changed: Collection[str]) -> None: ...
    def unload(self, files: Collection[str]) -> None: ...
    def forget(self) -> None: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def restart(self) -> None: ...
    def logs(self, lines: int, follow: bool) -> list[str]: ...


class Systemd:
    """A socket unit, which stays when the service unit is restarted, and the service unit."""

    def __init__(self, host: Host, *, system: bool) -> None:
        self._host = host
        self._system = system
        self._systemctl = ("systemctl", "--system" if system else "--user")
        place = "etc/systemd/system" if system else ".config/systemd/user"
        self.directory = (host.root if system else host.home) / place

    def require(self) -> None:
        code, output = self._host.run(*self._systemctl, "show", "--property=Version")
        if code and self._system:
            raise ServiceError(f"systemd does not answer: {output}. In a container run {NAME} as its command")
        if code:
            raise ServiceError(
                f"systemd does not answer for this user: {output}. Log in as the user (not by su or sudo), or"
                " let the user's services run without a login: `loginctl enable-linger`. In a container run"
                f" {NAME} as its command. For the whole machine: `{NAME} install --system`"
            )

    def is_running(self) -> bool:
        return self._host.run(*self._systemctl, "is-active", SOCKET)[0] == 0

    def load(self, changed: Collection[str]) -> None:
        self._host.must(*self._systemctl, "daemon-reload")
        self._host.must(*self._systemctl, "enable", SOCKET, SERVICE)
        if SOCKET in changed:
            self.stop()
        self.restart()

    def unload(self, files: Collection[str]) -> None:
        self._host.must(*self._systemctl, "disable", "--now", *files)

    def forget(self) -> None:
        self._host.must(*self._systemctl, "daemon-reload")
        self._host.run(*self._systemctl, "reset-failed", SOCKET, SERVICE)

    def start(self) -> None:
        self._host.run(*self._systemctl, "reset-failed", SOCKET, SERVICE)  # fails when there is nothing to reset
        self._host.must(*self._systemctl, "start", SOCKET, SERVICE)

    def stop(self) -> None:
        self._host.must(*self._systemctl, "stop", SOCKET, SERVICE)

    def restart(self) -> None:
        self._host.run(*self._systemctl, "reset-failed", SOCKET, SERVICE)
        self._host.must(*self._systemctl, "start", SOCKET)
        self._host.must(*self._systemctl, "restart", SERVICE)

    def logs(self, lines: int, follow: bool) -> list[str]:
        unit = f"--unit={NAME}" if self._system else f"--user-unit={NAME}"
        return ["journalctl", "--quiet", unit, f"--lines={lines}", *(["--follow"] if follow else ["--no-pager"])]


class Launchd:
    """An agent of the logged-in user, which holds the sockets."""

    def __init__(self, host: Host, log_file: Path) -> None:
        self._host = host
        self._domain = f"gui/{host.uid}"
        self._target = f"{self._domain}/{NAME}"
        self._log_file = log_file
        self.directory = host.home / "Library" / "LaunchAgents"

    def require(self) -> None:
        code, output = self._host.run("launchctl", "print", self._domain)
        if code:
            raise ServiceError(f"launchd has no session of this user: {output}. Log in on the screen of this Mac first")

    def is_running(self) -> bool:
        return self._host.run("launchctl", "print", self._target)[0] == 0

    def load(self, changed: Collection[str]) -> None:
        if changed:
            self.stop()
            self.start()
        else:
            self.restart()

    def unload(self, files: Collection[str]) -> None:
        del files
        self.stop()

    def forget(self) -> None:
        """Nothing: launchd knows no file that is gone."""

    def start(self) -> None:
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        self._host.run("launchctl", "enable", self._target)
        for _ in range(RETRIES):  # bootstrap fails while a bootout is under way
            if self.is_running() or not (failed := self._host.run("launchctl", "bootstrap", *self._agent()))[0]:
                return
            time.sleep(RETRY_SECONDS)
        raise ServiceError(f"`launchctl bootstrap {' '.join(self._agent())}` failed: {failed[1]}")

    def stop(self) -> None:
        """Also takes the sockets away: a connection would start the agent again."""
        if self.is_running():
            self._host.run("launchctl", "bootout", self._target)
        for _ in range(RETRIES):
            if not self.is_running():
                return
            time.sleep(RETRY_SECONDS)
        raise ServiceError(f"`launchctl bootout {self._target}` did not end the agent")

    def restart(self) -> None:
        if self.is_running():
            self._host.must("launchctl", "kickstart", "-k", self._target)
        else:
            self.start()

    def logs(self, lines: int, follow: bool) -> list[str]:
        files = [str(self._log_file), str(self._log_file.with_name("stderr.log"))]
        return ["tail", "-n", str(lines), *(["-F"] if follow else []), *files]

    def _agent(self) -> tuple[str, str]:
        return self._domain, str(self.directory / units.AGENT)
