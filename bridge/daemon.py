"""The daemon: the only place that wires clock, state, tasks and sockets, and stops them in order.

Start: bind the sockets, take the lock, answer 503 while the state is loaded, then serve. Stop (SIGTERM, SIGINT):
refuse new exports with 503, let the ones in flight be committed, checkpoint, exit, all within two seconds.
"""

import asyncio
import contextlib
import errno
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from aiohttp import web

from bridge import __version__
from bridge.bookkeeper import LedgerSettings
from bridge.config import Config
from bridge.ledger import Ledger
from bridge.store import StateError, Store, StoreUnavailable, lock, prepare_directory
from bridge.telemetry import Telemetry, Throttle, configure_log, log
from bridge.web.metrics import Views
from bridge.web.receiver import Receiver
from bridge.web.server import Server

STOP_SECONDS = 1.0
"""How long requests in flight may take once the daemon stops."""
EXPIRE_SECONDS = 60.0
FORGET_SECONDS = 3_600.0
BACKLOG = 512


class StartError(Exception):
    """The daemon cannot start; `exit_code` is a sysexits code, the text says what, where and what to do."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def default_state_dir(platform: str, environment: "os._Environ[str] | dict[str, str]", home: Path) -> Path:
    """Where state is kept: XDG's place, on macOS Application Support."""
    if platform == "darwin":
        return home / "Library" / "Application Support" / "claude-otel-bridge"
    base = environment.get("XDG_STATE_HOME", "")
    # The XDG specification: a relative path is to be ignored.
    root = Path(base) if base.startswith("/") else home / ".local" / "state"
    return root / "claude-otel-bridge"


def run(config: Config) -> int:
    """Run the bridge until it is told to stop; the exit code."""
    configure_log(config.log_format, config.log_level)
    os.umask(0o077)
    try:
        state = Path(config.state_dir).expanduser() if config.state_dir else None
        directory = state or default_state_dir(sys.platform, os.environ, Path.home())
        return _run_loop(lambda loop: _serve(config, directory, loop))
    except (StartError, StateError) as error:
        log.error(str(error))  # the message is made for people, a traceback is not
        return error.exit_code


def _run_loop(main: Callable[[str], Awaitable[int]]) -> int:
    """On uvloop; on asyncio where uvloop is not installed."""

    async def body(loop: str) -> int:
        return await main(loop)

    try:
        import uvloop
    except ImportError:
        return asyncio.run(body("asyncio"))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(body("uvloop"))


async def _serve(config: Config, directory: Path, loop_name: str) -> int:
    if os.geteuid() == 0:
        log.warning("running as root; a user of its own is safer")
    if note := prepare_directory(directory):
        log.warning(note)
    held = lock(directory)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    outcome = 0

    def fail(error: BaseException) -> None:
        nonlocal outcome
        outcome = os.EX_SOFTWARE
        log.critical("the ledger failed; stopping so that a supervisor starts a fresh bridge", exc_info=error)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    sockets = bind(config.listen)
    throttle = Throttle(time.monotonic)
    telemetry = Telemetry(time.time, throttle)
    telemetry.note_build(loop_name)
    ledger = Ledger(Store(directory), ledger_settings(config), _clock_ms, fail)
    ledger.observers.append(telemetry.observe)
    receiver = Receiver(ledger, config, telemetry, throttle)
    views = Views(ledger, config, telemetry, _clock_ms)
    routes = {path: dict(methods) for path, methods in views.routes.items()}
    for path, methods in receiver.routes.items():
        routes.setdefault(path, {}).update(methods)
    server = Server(routes, config, telemetry, throttle)
    runner = web.ServerRunner(server, shutdown_timeout=STOP_SECONDS)
    await runner.setup()
    try:
        for sock in sockets:
            await web.SockSite(runner, sock, backlog=BACKLOG).start()
        await ledger.start()
        log.info("ready", extra={"version": __version__, "listen": _addresses(sockets), "state": str(directory)})
        async with asyncio.TaskGroup() as tasks:
            expire = tasks.create_task(_every(EXPIRE_SECONDS, _expire(ledger)))
            forget = tasks.create_task(_every(FORGET_SECONDS, ledger.forget))
            await stop.wait()
            expire.cancel()
            forget.cancel()
        log.info("stopping")
    finally:
        receiver.draining = server.draining = True
        await runner.cleanup()
        await ledger.stop()
        receiver.close()
        os.close(held)
    log.info("stopped")
    return outcome


def ledger_settings(config: Config) -> LedgerSettings:
    """What the ledger needs of the settings."""
    return LedgerSettings(
        retention_ms=int(config.retention_days * 86_400_000),
        expiry_ms=int(config.series_expiry_hours * 3_600_000),
        max_series=config.limits.series,
        max_series_per_metric=config.limits.series_per_metric,
        max_metrics=config.limits.metrics,
        max_attributes=config.limits.attributes,
        max_label_length=config.limits.label_length,
        promoted=frozenset(config.labels.promote),
        dropped=frozenset(config.labels.drop),
        hashed=frozenset(config.labels.hash),
        scope_labels=config.labels.scope,
    )


def _clock_ms() -> int:
    return time.time_ns() // 1_000_000


def _expire(ledger: Ledger) -> Callable[[], Awaitable[int]]:
    async def expire() -> int:
        return ledger.expire()

    return expire


async def _every(seconds: float, work: Callable[[], Awaitable[int]]) -> None:
    while True:
        await asyncio.sleep(seconds)
        with contextlib.suppress(StoreUnavailable):  # the next export's refusal says so
            await work()


# --- sockets ---------------------------------------------------------------------------------------------------


def bind(listen: tuple[str, ...]) -> list[socket.socket]:
    """Listening sockets for `HOST:PORT` addresses; `localhost` is both loopback families.

    An address in use is StartError 69, a wrong one 64; nothing stays bound then. A family that the machine lacks is
    skipped with one line.
    """
    sockets: list[socket.socket] = []
    try:
        for address in listen:
            _bind_host(*split_address(address), sockets)
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def split_address(address: str) -> tuple[str, int]:
    """`localhost:4318`, `[::1]:4318` -> host and port. StartError 64 for anything else."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise StartError(f"--listen {address}: expected HOST:PORT, as in localhost:4318", os.EX_USAGE)
    return host, int(port)


def _bind_host(host: str, port: int, sockets: list[socket.socket]) -> None:
    """Append the sockets of one address."""
    if host == "localhost":
        wanted = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
    else:
        wanted = [(socket.AF_INET6 if ":" in host else socket.AF_INET, host)]
    before = len(sockets)
    for family, name in wanted:
        shown = f"[{name}]:{port}" if ":" in name else f"{name}:{port}"
        try:
            sockets.append(_bind_one(family, name, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise StartError(
                    f"{shown} is already in use; stop the other program (lsof -i :{port} names it) or choose another"
                    " --listen",
                    os.EX_UNAVAILABLE,
                ) from None
            if error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL) and len(wanted) > 1:
                log.warning("this machine has no such address; not listening there", extra={"address": shown})
                continue
            raise StartError(f"cannot listen on {shown}: {error.strerror}", os.EX_UNAVAILABLE) from None
    if len(sockets) == before:
        raise StartError(f"cannot listen on {host}:{port}: no loopback address", os.EX_UNAVAILABLE)


def _bind_one(family: socket.AddressFamily, name: str, port: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((name, port))
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


def _addresses(sockets: list[socket.socket]) -> str:
    names = (sock.getsockname()[:2] for sock in sockets)
    return " ".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in names)
