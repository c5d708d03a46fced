"""What `doctor` looks at: the bridge's answers, its directory and database, what tools are told and what they wrote.

Law: nothing is changed, nothing raises for what a machine may be like, and only loopback addresses are asked; where no
bridge is kept, also the one that Claude Code is set to export to, with what it would send.
"""

import contextlib
import errno
import http.client
import os
import shutil
import stat
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from bridge import edits, exporters, filesystem, setup, state, store
from bridge.config import Config
from bridge.daemon import default_state_dir
from bridge.listeners import own_certificate, split_address
from bridge.state import StoreUnavailable
from bridge.store import Inspection
from bridge.tools import claude_code
from bridge.tools.transcripts import TRANSCRIPTS
from bridge.web.access import is_loopback
from bridge.web.metrics import INSTANCE_HEADER

TIMEOUT_SECONDS = 2.0
MAX_ANSWER_BYTES = 64 * 2**20
MAX_TRANSCRIPTS = 20_000
MANAGED = (
    Path("/etc/claude-code/managed-settings.json"),
    Path("/Library/Application Support/ClaudeCode/managed-settings.json"),
)
STARTED = "process_start_time_seconds"
_OWN = ("bridge_", STARTED)
UNKNOWN_CERTIFICATE = "its certificate is not believed"
SHELL = "the shell's environment"


class Answer(NamedTuple):
    """What came of asking one address whether the bridge is there: a problem, or a status and who said so."""

    address: str
    problem: str = ""
    status: int = 0
    server: str = ""
    instance: str = ""


class Directory(NamedTuple):
    path: Path
    owner: int | None = None  # None: it does not exist
    mode: int = 0
    file_system: str = ""
    free: int = 0
    put_aside: str = ""
    """The newest directory with a database that was found damaged."""


class Layer(NamedTuple):
    """Variables that Claude Code gets from one place, or why they cannot be read. Later layers win."""

    name: str
    variables: Mapping[str, str]
    problem: str = ""
    is_managed: bool = False


class Transcripts(NamedTuple):
    root: Path
    files: int = 0
    newest: float = 0.0


Metrics = Mapping[str, list[tuple[Mapping[str, str], float]]]
"""Samples by name: labels and value."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that the checks look at."""

    now: float
    here: str
    """Where clients on this machine reach the bridge."""
    endpoints: tuple[str, ...]
    """The URLs of the addresses that take exports; of another machine's bridge, the one."""
    user: int
    answers: tuple[Answer, ...]
    holder: str
    instance: str
    metrics: Metrics | None
    profile: str | None
    directory: Directory
    inspection: Inspection | str | None
    layers: tuple[Layer, ...]
    transcripts: Transcripts
    xrg_endpoint: str
    others: tuple[tuple[str, Transcripts], ...] = ()
    """What other tools wrote, by tool."""
    denied: str = ""
    """Why the bridge does not show its metrics."""
    elsewhere: Answer | None = None
    """Where no bridge is kept on this machine: what the one said that Claude Code is set to export to."""
    guarded: frozenset[str] = frozenset()
    """Those of this bridge's endpoints that ask for a token."""
    settings: tuple[exporters.Exporter, ...] = ()
    """What other tools are told of their exports."""


XRG_DOMAIN = "com.gauchosoft.XRG"
XRG_KEY = "aiTokenOTelEndpoint"


def gather(config: Config, environment: Mapping[str, str], managed: tuple[Path, ...] = MANAGED) -> Evidence:
    """Everything the checks look at; nothing here raises for what a machine may be like."""
    home = setup.home(environment)
    given = Path(config.state_dir).expanduser() if config.state_dir else None
    directory = given or default_state_dir(sys.platform, dict(environment), home)
    endpoints = setup.endpoints(config)
    endpoint = endpoints[0]
    claude_home = setup.target("claude", environment, endpoint).file.parent
    holder, instance = state.holder(directory)
    addresses = list(_loopback((*config.listen, *config.listen_read), is_tls=bool(config.tls.cert)))
    answers = tuple(_ask(place) for place in addresses)
    token = environment.get("BRIDGE_TOKEN", "")
    metrics = profile = None
    denied = ""
    for place, answer in zip(addresses, answers, strict=True):
        if answer.instance and answer.instance == instance:
            status, metrics = _metrics(place, token)
            if status == 401:
                denied = "BRIDGE_TOKEN is not known to the bridge" if token else "the bridge needs BRIDGE_TOKEN"
            profile = _get(place, "/v1/metrics", token)[1] if metrics is not None else None
            break
    layers = (
        Layer(SHELL, environment),
        _layer(claude_home / "settings.json"),
        *(_layer(path, is_managed=True) for path in managed),
    )
    inspection = _inspection(directory)
    is_kept_here = inspection is not None or any(not answer.problem for answer in answers)
    elsewhere = None if is_kept_here else _elsewhere(layers)
    return Evidence(
        now=time.time(),
        here=endpoint,
        endpoints=(elsewhere.address,) if elsewhere else endpoints,
        user=os.geteuid(),
        answers=answers,
        holder=holder if _is_alive(holder) else "",
        instance=instance,
        metrics=metrics,
        profile=profile,
        directory=_directory(directory),
        inspection=inspection,
        layers=layers,
        transcripts=_transcripts(claude_home / "projects"),
        xrg_endpoint=_xrg_endpoint(sys.platform, home),
        others=tuple(_others(environment, home)),
        denied=denied,
        elsewhere=elsewhere,
        guarded=frozenset(url for url in endpoints if setup.wants_token(config, url)),
        settings=tuple(exporters.of_tools(environment, endpoint)),
    )


def _elsewhere(layers: Iterable[Layer]) -> Answer | None:
    """The bridge of another machine that Claude Code is set to export to, asked; None where it is set to none."""
    variables = {name: value for layer in layers for name, value in layer.variables.items()}
    url = variables.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")
    try:
        address = setup.remote(url)
        host = urlsplit(address).hostname or ""
    except (setup.SetupError, ValueError):
        return None
    if host == "localhost" or is_loopback(host):
        return None
    return ask_elsewhere(address, variables.get(setup.HEADERS, ""))


def ask_elsewhere(address: str, headers: str) -> Answer:
    """What a bridge at an address (`https://host:4318`) says to what a tool sends with these OTLP headers."""
    import ssl

    parts = urlsplit(address)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    pairs = (part.partition("=") for part in headers.split(",") if "=" in part)
    sent = {name.strip(): unquote(value.strip()) for name, _, value in pairs}
    try:
        connection = kind(parts.hostname or "", parts.port, timeout=TIMEOUT_SECONDS)
        try:
            connection.request("GET", "/v1/metrics", headers=sent)
            response = connection.getresponse()
            return _introduced(address, response.status, response.headers)
        finally:
            connection.close()
    except ssl.SSLCertVerificationError as error:
        is_misnamed = "mismatch" in error.verify_message
        what = "its certificate bears another name" if is_misnamed else UNKNOWN_CERTIFICATE
        return Answer(address, f"{what}: {error.verify_message}")
    except TimeoutError:
        return Answer(address, f"no answer within {TIMEOUT_SECONDS:g} s")
    except OSError as error:
        return Answer(address, str(error.strerror or error))
    except (http.client.HTTPException, ValueError):
        return Answer(address, "", 0, "not an HTTP server")


_NAMES = {"localhost": ("127.0.0.1", "::1"), "0.0.0.0": ("127.0.0.1",), "::": ("::1",)}  # noqa: S104  # only asked


class Place(NamedTuple):
    """Where the bridge is asked on this machine."""

    host: str
    port: int
    is_tls: bool


def _loopback(listen: tuple[str, ...], *, is_tls: bool) -> Iterator[Place]:
    """TLS is spoken on what is bound beyond loopback, so also on a wildcard's loopback addresses."""
    for address in listen:
        host, port = split_address(address)
        for name in _NAMES.get(host, (host,)):
            if name == "::1" or name.startswith("127."):
                yield Place(name, port, is_tls and not is_loopback(name if host == "localhost" else host))


def _get(place: Place, path: str, token: str = "") -> tuple[http.client.HTTPResponse, str]:
    host, port, is_tls = place
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_SECONDS)
    if is_tls:
        connection = http.client.HTTPSConnection(host, port, timeout=TIMEOUT_SECONDS, context=own_certificate())
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"} if token else {})
        response = connection.getresponse()
        return response, response.read(MAX_ANSWER_BYTES).decode(errors="replace")
    finally:
        connection.close()


def _ask(place: Place) -> Answer:
    host, port, _ = place
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        response, _ = _get(place, "/-/ready")
        if response.status == 503:  # only the live ones say who they are
            healthy, _ = _get(place, "/-/healthy")
            return Answer(address, "", 503, healthy.headers.get("Server", ""), healthy.headers.get(INSTANCE_HEADER, ""))
    except ConnectionRefusedError:
        return Answer(address, "refused")
    except TimeoutError:
        return Answer(address, f"no answer within {TIMEOUT_SECONDS:g} s")
    except OSError as error:
        is_absent = error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
        return Answer(address, "this machine has no such address" if is_absent else str(error.strerror))
    except http.client.HTTPException:
        return Answer(address, "", 0, "not an HTTP server")
    return _introduced(address, response.status, response.headers)


def _introduced(address: str, status: int, headers: "http.client.HTTPMessage") -> Answer:
    return Answer(address, "", status, headers.get("Server", "").strip(), headers.get(INSTANCE_HEADER, ""))


def _metrics(place: Place, token: str) -> tuple[int, Metrics | None]:
    """The HTTP status, 0 where there is none, and the bridge's own metrics."""
    from prometheus_client.parser import text_string_to_metric_families

    metrics: dict[str, list[tuple[Mapping[str, str], float]]] = defaultdict(list)
    try:
        response, text = _get(place, "/metrics", token)
        if response.status != 200:
            return response.status, None
        text = "".join(line for line in text.splitlines(keepends=True) if line.startswith(_OWN))
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                metrics[sample.name].append((sample.labels, sample.value))
    except (OSError, http.client.HTTPException, ValueError):
        return 0, None
    return response.status, metrics


def _is_alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except PermissionError:
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return True


def _directory(path: Path) -> Directory:
    try:
        found = path.stat()
        free = shutil.disk_usage(path).free
        put_aside = max((found.name for found in path.glob("state.corrupt-*")), default="")
    except OSError:
        return Directory(path)
    return Directory(path, found.st_uid, stat.S_IMODE(found.st_mode), filesystem.kind(path), free, put_aside)


def _inspection(directory: Path) -> Inspection | str | None:
    try:
        return store.inspect(directory)
    except StoreUnavailable as error:
        return str(error)


def _layer(path: Path, *, is_managed: bool = False) -> Layer:
    """The variables under `env` of one of Claude Code's settings files."""
    try:
        env = edits.JSON.parse(path.read_text(encoding="utf-8")).get("env", {})
    except FileNotFoundError:
        return Layer(str(path), {}, "", is_managed)
    except (OSError, UnicodeDecodeError) as error:
        return Layer(str(path), {}, f"cannot be read: {error}", is_managed)
    except edits.EditError as error:
        return Layer(str(path), {}, str(error), is_managed)
    if not isinstance(env, dict):
        return Layer(str(path), {}, "`env` is not an object", is_managed)
    variables: dict[str, Any] = env
    return Layer(str(path), {name: str(value) for name, value in variables.items()}, "", is_managed)


def _transcripts(root: Path, holds: Callable[[str], bool] = TRANSCRIPTS[claude_code.TOOL].holds) -> Transcripts:
    count, newest = 0, 0.0
    with contextlib.suppress(OSError):
        for path in root.rglob("*.json*"):
            if not holds(str(path)):
                continue
            with contextlib.suppress(OSError):
                newest = max(newest, path.stat().st_mtime)
                count += 1
            if count >= MAX_TRANSCRIPTS:
                break
    return Transcripts(root, count, newest)


def _others(environment: Mapping[str, str], home: Path) -> Iterator[tuple[str, Transcripts]]:
    for tool, kind in TRANSCRIPTS.items():
        if tool == claude_code.TOOL:
            continue
        for root in kind.roots(environment, str(home)):
            found = _transcripts(Path(root), kind.holds)
            if found.files:
                yield tool, found


def _xrg_endpoint(platform: str, home: Path) -> str:
    """The address that XRG is set to read, on macOS, where it is set."""
    if platform != "darwin":
        return ""
    try:
        done = subprocess.run(  # noqa: S603  # constants
            ["/usr/bin/defaults", "read", XRG_DOMAIN, XRG_KEY],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            env={"HOME": str(home)},
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
