"""The background service: what install, uninstall, start, stop, restart, status and logs do.

Law: a file without MARKER is never overwritten or removed, the settings of the service are those of the command line
that installs it, and every verb may be repeated.
"""

import argparse
import contextlib
import fnmatch
import http.client
import ipaddress
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bridge import units
from bridge.config import NOT_SETTINGS, TOKEN_VARIABLES, Config, listened
from bridge.control import Host, Launchd, ServiceError, Supervisor, Systemd
from bridge.daemon import default_state_dir, token_file
from bridge.database import DATABASE
from bridge.listeners import StartError, own_certificate, split_address
from bridge.state import StateError, lock
from bridge.tokens import TokenError, Tokens
from bridge.units import NAME, Address
from bridge.web.access import is_loopback

READY_SECONDS = 60.0
STATE_FILES = ("lock", "tokens", "state.*", "state-*", ".state-*", "served*")
"""What `uninstall --purge` removes from a state directory."""
SYSTEM_STATE = Path("var/lib") / NAME
PLACES = {"XDG_CONFIG_HOME", "XDG_STATE_HOME", "CLAUDE_CONFIG_DIR", "CODEX_HOME"}
PATHS = {"BRIDGE_CONFIG", "BRIDGE_STATE_DIR", "BRIDGE_LOG_FILE"}
STRANGER = "another program"


@dataclass(frozen=True)
class Service:
    """The bridge as a service of one user or of the machine."""

    supervisor: Supervisor
    files: Mapping[str, str]
    command: Sequence[str]
    addresses: Sequence[Address]
    state: Path
    scope: str
    is_tls: bool = False

    @property
    def asked(self) -> Address:
        """The address that is asked whether the bridge answers: one of this machine's own, if it listens there."""
        return next((address for address in self.addresses if is_loopback(address[0])), self.addresses[0])

    @property
    def paths(self) -> list[Path]:
        return [self.supervisor.directory / name for name in self.files]

    def install(self) -> None:
        self._require_ours()
        _require_command(self.command)
        self.supervisor.require()
        if not self.supervisor.is_running() and (address := next(filter(_is_taken, self.addresses), None)):
            raise ServiceError(
                f"{units.shown(address)} is in use; stop the other program, or the bridge in a terminal"
                f" (lsof -i :{address[1]} names it), or choose another `listen`"
            )
        self.supervisor.directory.mkdir(parents=True, exist_ok=True)
        changed = set()
        for path, text in zip(self.paths, self.files.values(), strict=True):
            if path.exists() and path.read_text() == text:
                _say(f"unchanged  {path}")
                continue
            new = path.with_name(f"{path.name}.new")
            new.write_text(text)
            new.chmod(0o644)
            new.replace(path)
            changed.add(path.name)
            _say(f"wrote      {path}")
        self.supervisor.load(changed)
        _say(f"answers    {self.wait_ready()}")

    def uninstall(self, *, purge: bool) -> None:
        self._require_ours()
        if found := [path for path in self.paths if path.exists()]:
            self.supervisor.require()
            self.supervisor.unload([path.name for path in found])
            for path in found:
                path.unlink()
                _say(f"removed    {path}")
            self.supervisor.forget()
        else:
            _say("no service is installed")
        if purge:
            _purge(self.state)
        elif self.state.exists():
            _say(f"kept       {self.state}")

    def change(self, verb: str) -> None:
        """start, stop or restart."""
        if not all(path.exists() for path in self.paths):
            raise ServiceError(f"the service is not installed; `{NAME} install{self.scope}` does that")
        self.supervisor.require()
        if verb == "stop":
            self.supervisor.stop()
            _say("stopped, until the next `start` or login")
            return
        if verb == "start":
            self.supervisor.start()
        else:
            self.supervisor.restart()
        _say(f"answers    {self.wait_ready()}")

    def status(self) -> int:
        """Whether a bridge answers decides, also one in a terminal where there is no supervisor to ask."""
        for path in self.paths:
            _say(f"{'file' if path.exists() else 'no file':<10} {path}")
        try:
            self.supervisor.require()
            _say(f"{'running' if self.supervisor.is_running() else 'stopped':<10} {NAME}")
        except ServiceError as error:
            sys.stderr.write(f"{NAME}: {error}\n")
        answer, url = _ask(self.asked, is_tls=self.is_tls), _url(self.asked)
        _say(f"{'answers' if answer else 'no answer':<10} {url} {answer}".rstrip())
        return os.EX_OK if answer == "ready" else os.EX_UNAVAILABLE

    def wait_ready(self) -> str:
        """Wait until the bridge answers; its address."""
        url = _url(self.asked)
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if (answer := _ask(self.asked, is_tls=self.is_tls)) == "ready":
                return url
            if answer == STRANGER:
                raise ServiceError(f"{url} is answered by {STRANGER}; stop it, or choose another `listen`")
            time.sleep(0.1)
        raise ServiceError(f"{url} does not answer after {READY_SECONDS:.0f} s; `{NAME} logs{self.scope}` may say why")

    def _require_ours(self) -> None:
        for path in self.paths:
            if path.is_symlink() or (path.exists() and units.MARKER not in path.read_text(errors="replace")):
                raise ServiceError(f"{path} was not written by `{NAME} install`; move it away first", os.EX_CANTCREAT)


# --- what the verbs need -------------------------------------------------------------------------------------------


def service_of(host: Host, config: Config, variables: Mapping[str, str], *, system: bool) -> Service:
    """The service of this host and these settings. `variables` become part of it."""
    at = addresses(listened(config), has_ipv6=_has_ipv6())
    supervisor: Supervisor
    if host.platform == "linux":
        supervisor = Systemd(host, system=system)
        files = units.systemd_units(units.command_line(host.command), at, variables, system=system)
    elif host.platform == "darwin" and not system:
        log_file = Path(config.log_file or host.home / "Library" / "Logs" / NAME / "bridge.log").expanduser()
        supervisor = Launchd(host, log_file)
        files = units.launchd_agent(host.command, at, variables, log_file)
    elif host.platform == "darwin":
        raise ServiceError("--system is for Linux; on macOS the bridge is an agent of its user", os.EX_USAGE)
    else:
        raise ServiceError(f"no service on {host.platform}: there has to be systemd (Linux) or launchd (macOS)")
    state = host.root / SYSTEM_STATE if system else _state(config, variables, host)
    scope = " --system" if system else ""
    return Service(supervisor, files, host.command, at, state, scope, bool(config.tls.cert))


def _state(config: Config, variables: Mapping[str, str], host: Host) -> Path:
    usual = default_state_dir(host.platform, dict(variables), host.home)
    return Path(variables.get("BRIDGE_STATE_DIR") or config.state_dir or usual).expanduser()


def as_installed(service: Service, config: Config, host: Host, *, system: bool) -> Service:
    """The same with the addresses and the state directory of the files that are in place, if they are ours."""
    texts = {path.name: path.read_text() for path in service.paths if path.exists()}
    if len(texts) < len(service.paths) or not all(units.MARKER in text for text in texts.values()):
        return service
    at, variables = units.read_back(texts)
    return replace(service, addresses=at, state=service.state if system else _state(config, variables, host))


def addresses(listen: Sequence[str], *, has_ipv6: bool) -> list[Address]:
    """Settings as numeric addresses; `localhost` is both loopback families."""
    found: list[Address] = []
    for text in listen:
        host, port = split_address(text)
        if host == "localhost":
            found += [("127.0.0.1", port), *([("::1", port)] if has_ipv6 else [])]
            continue
        try:
            found.append((str(ipaddress.ip_address(host)), port))
        except ValueError:
            raise ServiceError(f"listen {text}: a service needs localhost or an IP address", os.EX_CONFIG) from None
    return list(dict.fromkeys(found))


def stable_command(home: Path) -> tuple[str, ...]:
    """The running program by a path that outlives upgrades: a shim of pipx, uv or Homebrew, else the venv's script."""
    own = Path(sysconfig.get_path("scripts")) / NAME
    for place in (home / ".local" / "bin", Path("/usr/local/bin"), Path("/opt/homebrew/bin")):
        if (shim := place / NAME).exists() and shim.resolve() == own.resolve():
            return (str(shim),)
    return (str(own),) if own.exists() else (sys.executable, "-P", "-m", "bridge")


def variables_of(environment: Mapping[str, str], flags: Mapping[str, Any], *, system: bool) -> dict[str, str]:
    """What the service has to be told so that its settings are those of this command line."""
    kept = {
        name: value
        for name, value in environment.items()
        if (name.startswith("BRIDGE_") and not name.startswith(NOT_SETTINGS) and name not in TOKEN_VARIABLES)
        or (name in PLACES and value.startswith("/") and not system)
    }
    for key, value in flags.items():
        kept[f"BRIDGE_{key}".upper()] = ",".join(value) if isinstance(value, list) else _plain(value)
    for name in PATHS & kept.keys():
        kept[name] = str(Path(kept[name]).expanduser().absolute())
    return dict(sorted(kept.items()))


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _require_command(command: Sequence[str]) -> None:
    """The command has to work as a supervisor starts it: from elsewhere and without an environment."""
    words = [*command, "--version"]
    done = subprocess.run(words, cwd="/", env={}, capture_output=True, text=True)  # noqa: S603  # no shell
    if done.returncode or not done.stdout.startswith(NAME):
        reason = done.stderr.strip().rpartition("\n")[2]
        raise ServiceError(
            f"`{' '.join(command)}` does not run on its own: {reason}. In the source tree: pipx install ."
        )


def _has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as sock:
        sock.bind(("::1", 0))
        return True
    return False


def _reachable(address: Address) -> Address:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address[0], address[0]), address[1]  # noqa: S104  # not to bind


def _is_taken(address: Address) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(_reachable(address), timeout=5):
        return True
    return False


def _url(address: Address) -> str:
    return f"http://{units.shown(_reachable(address))}"


def _ask(address: Address, *, is_tls: bool = False) -> str:
    """What answers there: `ready`, `not ready`, STRANGER or nothing. Ours is known by its Server header. `is_tls`:
    addresses beyond loopback speak TLS."""
    connection = http.client.HTTPConnection(*_reachable(address), timeout=10)
    if is_tls and not is_loopback(address[0]):
        connection = http.client.HTTPSConnection(*_reachable(address), timeout=10, context=own_certificate())
    try:
        connection.request("GET", "/-/ready")
        reply = connection.getresponse()
    except http.client.HTTPException:
        return STRANGER
    except OSError:
        return ""
    finally:
        connection.close()
    if reply.getheader("Server") != NAME:
        return STRANGER
    return "ready" if reply.status == 200 else "not ready"


def _purge(directory: Path) -> None:
    """Remove a state directory: its known files, and itself if nothing else is in it."""
    if not (directory / DATABASE).exists():
        _say(f"no state in {directory}")
        return
    _say(f"removing   {directory}")
    held = lock(directory)  # refuses while a bridge runs on it
    for entry in directory.iterdir():
        if any(fnmatch.fnmatch(entry.name, pattern) for pattern in STATE_FILES):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    os.close(held)
    try:
        directory.resolve().rmdir()
    except OSError:
        _say(f"left       {directory}: other files are in it")
        return
    if directory.is_symlink():
        directory.unlink()


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


# --- the commands --------------------------------------------------------------------------------------------------


def main(options: argparse.Namespace, config: Config, flags: Mapping[str, Any], host: Host | None = None) -> int:
    """Do `options.command`; the exit code."""
    host = host or Host(sys.platform, Path.home(), os.geteuid(), os.environ, stable_command(Path.home()))
    try:
        return _do(options, config, variables_of(host.environment, flags, system=options.system), host)
    except (ServiceError, StartError, StateError, TokenError) as error:
        sys.stderr.write(f"{NAME}: {error}\n")
        return error.exit_code
    except OSError as error:
        sys.stderr.write(f"{NAME}: {error.filename}: {error.strerror}\n")
        return os.EX_CANTCREAT


def _do(options: argparse.Namespace, config: Config, variables: Mapping[str, str], host: Host) -> int:
    verb, system = options.command, options.system
    service = service_of(host, config, variables, system=system)
    if verb == "install" and options.dry_run:
        for path, text in zip(service.paths, service.files.values(), strict=True):
            _say(f"# {path}\n{text}")
        return os.EX_OK
    if verb != "install":
        service = as_installed(service, config, host, system=system)
    if verb == "status":
        return service.status()
    if verb == "logs":
        if not any(path.exists() for path in service.paths):
            _say(f"the service is not installed; `{NAME} install{service.scope}` does that. What it once logged:")
        with contextlib.suppress(KeyboardInterrupt):
            return host.run(*service.supervisor.logs(options.lines, options.follow), shows=True)[0]
        return os.EX_OK
    _require_user(host, system=system)
    if verb == "install":
        if system:
            _require_public(service.command)
        require_tokens(service, config, host)
        service.install()
        _say(f"next       {NAME} setup     (what Claude Code needs to be told)")
        if host.platform == "linux" and not system:
            _say("next       loginctl enable-linger     (if it is to run while you are not logged in)")
    elif verb == "uninstall":
        service.uninstall(purge=options.purge)
    else:
        service.change(verb)
    return os.EX_OK


def require_tokens(service: Service, config: Config, host: Host) -> None:
    """What the bridge would refuse to start for is said before it is a service."""
    if any(host.environment.get(name) for name in TOKEN_VARIABLES):
        raise ServiceError(
            "BRIDGE_TOKEN and BRIDGE_TOKENS would stand in a file that others may read; put the tokens into token_file"
            f" (`{NAME} token NAME` makes one) and unset the variables",
            os.EX_CONFIG,
        )
    public = next((address for address in service.addresses if not is_loopback(address[0])), None)
    if public and not config.insecure_no_auth:
        file = token_file(config, service.state)
        allowed = Tokens(file, ())
        allowed.refresh()
        if not allowed:
            raise ServiceError(
                f"{units.shown(public)} is beyond loopback and {file} has no token: make one with `{NAME} token NAME`"
                f"{' --state-dir ' + str(service.state) if service.scope else ''}",
                os.EX_CONFIG,
            )


def _require_user(host: Host, *, system: bool) -> None:
    if system and host.uid != 0:
        raise ServiceError("--system needs root: run it with sudo", os.EX_NOPERM)
    if not system and host.uid == 0 and "SUDO_UID" in host.environment:
        raise ServiceError("with sudo it would be root's service; leave sudo out, or add --system", os.EX_NOPERM)


def _require_public(command: Sequence[str]) -> None:
    """The system's service runs as a user of its own, which sees no home."""
    for part in (command[0], str(Path(command[0]).resolve()), str(Path(sys.executable).resolve()), __file__):
        if part.startswith(("/home/", "/root/")):
            raise ServiceError(
                f"{part} is in a home, which the system's service cannot see; install the program for all users"
                " (in the source tree: sudo pipx install --global .)"
            )
