"""The daemon: the only place that wires clock, state, tasks and sockets, and stops them in order.

Start: take the lock, take the supervisor's sockets or bind, load the state; who asks before it is loaded waits for
it a moment, and gets 503 if it takes longer. Stop (SIGTERM, SIGINT): refuse new exports with 503, let the ones in
flight be committed, checkpoint, exit, all within two seconds.
"""

import asyncio
import contextlib
import gc
import os
import resource
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

from bridge import __version__, place, pricing, supervisor, tokens
from bridge.bookkeeper import LedgerSettings, Recover
from bridge.config import Config, listened
from bridge.copies import keep_copy, newest_copy_time
from bridge.database import DATABASE, SCHEMA_VERSION
from bridge.descriptors import ADVICE, ran_out
from bridge.filesystem import distrust
from bridge.join import KINDS
from bridge.ledger import Ledger
from bridge.listeners import (
    Site,
    StartError,
    listening,
    offers,
    require_access,
    room_for,
    shown_addresses,
)
from bridge.mark import Mark, MarkUnreadable, checksum, read_mark
from bridge.model import Usage
from bridge.pricing import normalise_model
from bridge.recovery import recover
from bridge.state import Damaged, StateError, StoreUnavailable, lock, prepare_directory
from bridge.store import Store
from bridge.telemetry import Telemetry, Throttle, configure_log, log
from bridge.tokens import TokenError, Tokens
from bridge.tools import known
from bridge.tools.transcripts import TRANSCRIPTS
from bridge.transcripts import Follower
from bridge.watch import HANG_SECONDS, LoopWatch
from bridge.web.access import Access, is_loopback
from bridge.web.metrics import Views
from bridge.web.receiver import Receiver
from bridge.web.server import Server

if TYPE_CHECKING:
    from bridge.tls import TlsFiles

STOP_SECONDS = 1.0
"""How long requests in flight may take once the daemon stops."""
DOOR_SECONDS = 0.25
"""How long a connection that was accepted may take to say what it wants."""
EXPIRE_SECONDS = 60.0
FORGET_SECONDS = 3_600.0
CLOCK_STEP_SECONDS = 600
PROBE_SECONDS = 5.0
SURVEY_SECONDS = 60.0
MARK_SECONDS = 5.0
COPY_CHECK_SECONDS = 60.0
COPY_SECONDS = 3_600.0
YOUNG_OBJECTS = 10_000
"""New objects between two garbage collections: some commits make as many, and hardly any of them is garbage."""
ACCESS_SECONDS = 2.0
SWITCH_SECONDS = 0.001
"""How long a thread computes while another waits for its turn: decoding must not hold up every answer and statement."""


def default_state_dir(platform: str, environment: "os._Environ[str] | dict[str, str]", home: Path) -> Path:
    """Where state is kept: XDG's place, on macOS Application Support."""
    return Path(place.default_state_dir(platform, environment, str(home)))


def state_directory(config: Config) -> Path:
    """The state directory in force."""
    state = Path(config.state_dir).expanduser() if config.state_dir else None
    return state or default_state_dir(sys.platform, os.environ, Path.home())


def run(config: Config, *, accept_data_loss: bool = False) -> int:
    """Run the bridge until it is told to stop; the exit code. With `accept_data_loss` a damaged state without a copy
    begins anew."""
    os.umask(0o077)
    sys.setswitchinterval(SWITCH_SECONDS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))  # a core has secrets
    try:
        configure_log(config.log_format, config.log_level, config.log_file)
    except OSError as error:
        sys.stderr.write(f"claude-otel-bridge: log_file: cannot write {error.filename}: {error.strerror}\n")
        return os.EX_CANTCREAT
    try:
        directory = state_directory(config)
        return _run_loop(lambda loop: _serve(config, directory, loop, accept_data_loss=accept_data_loss))
    except (StartError, StateError, TokenError) as error:
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


async def _serve(config: Config, directory: Path, loop_name: str, *, accept_data_loss: bool) -> int:
    if os.geteuid() == 0:
        log.warning("running as root; a user of its own is safer")
    if note := prepare_directory(directory):
        log.warning(note)
    if why := distrust(directory):
        if not config.allow_network_fs:
            raise StateError(
                f"state directory {directory} {why}; choose another with --state-dir, or pass --allow-network-fs",
                os.EX_CANTCREAT,
            )
        log.warning(f"state directory {directory} {why}")
    allowed = tokens_in_force(config, directory)
    if note := pure_python_protobuf():
        log.warning(note)
    instance = os.urandom(8).hex()
    held = lock(directory, instance)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    outcome = 0

    def fail(error: BaseException) -> None:
        nonlocal outcome
        if isinstance(error, StoreUnavailable | StateError):
            outcome = os.EX_IOERR
            log.critical(f"the disk fails again and again; stopping so that a fresh bridge checks the state: {error}")
        else:
            outcome = os.EX_SOFTWARE
            log.critical("the ledger failed; stopping so that a supervisor starts a fresh bridge", exc_info=error)
        stop.set()

    loop.set_exception_handler(_log_type)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    sockets = listening(listened(config))
    tls = require_access(config, allowed, [sock.getsockname() for sock in sockets])
    throttle = Throttle(time.monotonic)
    if tls is not None:
        tls.tell = throttle.warning
    telemetry = Telemetry(time.time, throttle)
    telemetry.note_build(loop_name)
    mark = _mark(directory)
    has_changed = mark is not None and mark.database not in (0, checksum(directory / DATABASE))
    ledger = Ledger(
        Store(directory), ledger_settings(config), _clock_ms, fail,
        price=_lazy_price(config), normalise=normalise_model, mark=mark,
        recover=_recovery(directory, accept_data_loss=accept_data_loss),
    )  # fmt: skip
    del mark  # what it says of all series would stay as long as this process
    follower = _follower(config, ledger, telemetry, throttle)
    ledger.observers.append(telemetry.observe)
    copies = Copies(directory, ledger, _clock_ms)
    forgetful = Forgetting(ledger, config.history_days, _clock_ms, _uptime_ms)
    access = Access(config, allowed, time.monotonic)
    receiver = Receiver(ledger, config, telemetry, throttle)
    views = Views(ledger, config, telemetry, _clock_ms, instance, has_sources=lambda: access.names_sources)
    if follower is not None:
        views.progress = lambda: follower.progress.text
    routes = {path: dict(methods) for path, methods in views.routes.items()}
    for path, methods in receiver.routes.items():
        routes.setdefault(path, {}).update(methods)
    room = room_for(config.limits.connections)
    if room < config.limits.connections:
        text = "the limit of open files leaves room for fewer connections than limits.connections; raise it (ulimit -n)"
        log.warning(text, extra={"connections": room})
    server = Server(
        routes, config, telemetry, throttle, access, offers=offers(config), max_connections=room
    )  # fmt: skip
    watch = LoopWatch(telemetry.stalls.inc, _abort)
    runner = web.ServerRunner(server, shutdown_timeout=STOP_SECONDS)
    await runner.setup()
    try:
        supervisor.notify("STATUS=loading the state")
        watch.start()
        for sock in sockets:
            await Site(
                runner, sock, context=None if tls is None or is_loopback(sock.getsockname()[0]) else tls.context
            ).start()
        await ledger.start()
        gc.freeze()  # what is loaded by now stays, so that no collection looks at it again
        gc.set_threshold(YOUNG_OBJECTS)
        if ledger.lost:
            log.warning(f"state went back {ledger.lost} transactions; counters stand still until it has caught up")
            telemetry.lost.inc(ledger.lost)
        elif has_changed:
            log.warning(
                f"{directory / DATABASE} is not as the bridge left it; if nobody has changed it, the disk may be"
                " failing; what is served was checked, what tells repeats was not"
            )
        addresses = shown_addresses(sockets)
        log.info("ready", extra={"version": __version__, "listen": addresses, "state": str(directory)})
        supervisor.notify(f"READY=1\nSTATUS=version {__version__} serves {addresses}")
        async with asyncio.TaskGroup() as tasks:
            chores = [
                tasks.create_task(_every(EXPIRE_SECONDS, _expire(ledger))),
                tasks.create_task(_every(FORGET_SECONDS, forgetful.forget)),
                tasks.create_task(_every(PROBE_SECONDS, ledger.probe)),
                tasks.create_task(_every(MARK_SECONDS, ledger.write_mark, at_once=True)),
                tasks.create_task(_every(COPY_CHECK_SECONDS, copies.keep)),
                tasks.create_task(_every(SURVEY_SECONDS, lambda: _survey(ledger, telemetry), at_once=True)),
                *([tasks.create_task(_followed(follower, fail))] if follower else []),
                tasks.create_task(_every(ACCESS_SECONDS, lambda: _refresh(allowed, tls))),
                tasks.create_task(_pulse(supervisor.watchdog_seconds())),
            ]
            await stop.wait()
            for chore in chores:
                chore.cancel()
        log.info("stopping")
    finally:
        supervisor.notify("STOPPING=1\nSTATUS=committing what is in flight")
        receiver.draining = server.draining = True
        await _close_door(runner, server)
        await runner.cleanup()
        await ledger.stop()
        watch.stop()
        with contextlib.suppress(StoreUnavailable):
            await ledger.write_mark(await asyncio.to_thread(checksum, directory / DATABASE))
        receiver.close()
        for sock in sockets:
            sock.close()
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
        max_series_per_source=config.limits.series_per_source,
        max_metrics=config.limits.metrics,
        max_attributes=config.limits.attributes,
        max_label_length=config.limits.label_length,
        promoted=frozenset(config.labels.promote),
        dropped=frozenset(config.labels.drop),
        hashed=frozenset(config.labels.hash),
        scope_labels=config.labels.scope,
        hides_sessions=not known.SESSION_KEYS.isdisjoint(config.labels.deny),
        source=config.source,
    )


def _clock_ms() -> int:
    return time.time_ns() // 1_000_000


def _uptime_ms() -> int:
    """A clock that nobody sets and that goes on while the machine sleeps."""
    return time.clock_gettime_ns(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)) // 1_000_000


def _recovery(directory: Path, *, accept_data_loss: bool) -> Recover:
    def replace(damage: Damaged) -> bool:
        what, begins = recover(directory, damage, SCHEMA_VERSION, _clock_ms(), accept_data_loss=accept_data_loss)
        log.error(what)
        return begins

    return replace


def _expire(ledger: Ledger) -> Callable[[], Awaitable[int]]:
    async def expire() -> int:
        return ledger.expire()

    return expire


def _mark(directory: Path) -> Mark | None:
    try:
        return read_mark(directory)
    except MarkUnreadable as error:
        log.warning(f"{error}; if the state is an older one, counters may fall once")
        return None


class Forgetting:
    """Deletes what is older than it must be kept, unless the clock was set since the last time: a clock that is wrong
    for an hour must not make old of what is new."""

    def __init__(
        self, ledger: Ledger, history_days: float, clock_ms: Callable[[], int], uptime_ms: Callable[[], int]
    ) -> None:
        self._ledger = ledger
        self._history_days = history_days
        self._clock_ms = clock_ms
        self._uptime_ms = uptime_ms
        self._offset = clock_ms() - uptime_ms()

    async def forget(self) -> None:
        """Forget identities and request rows, once the clock has been steady. Raises StoreUnavailable."""
        before, self._offset = self._offset, self._clock_ms() - self._uptime_ms()
        if abs(self._offset - before) > CLOCK_STEP_SECONDS * 1000:
            seconds = (self._offset - before) // 1000
            log.warning("the clock was set; nothing is forgotten for an hour", extra={"seconds": seconds})
            return
        await self._ledger.forget()
        await self._ledger.forget_requests(self._history_days)


class Copies:
    """Copies the database beside itself, at most once an hour and when something was committed since."""

    def __init__(self, directory: Path, ledger: Ledger, clock_ms: Callable[[], int]) -> None:
        self._directory = directory
        self._ledger = ledger
        self._clock_ms = clock_ms
        self._commits = 0

    async def keep(self) -> None:
        """Make the copy that is due, in a thread; nothing waits for it."""
        now, commits = self._clock_ms(), self._ledger.commits
        latest = newest_copy_time(self._directory)
        if commits == self._commits or 0 <= now - latest < COPY_SECONDS * 1000:
            return
        try:
            await asyncio.to_thread(keep_copy, self._directory, SCHEMA_VERSION, now)
        except StateError as error:
            log.warning(str(error))
        else:
            self._commits = commits


async def _survey(ledger: Ledger, telemetry: Telemetry) -> None:
    """Tell the own metrics how the sources agree."""
    survey = await ledger.survey()
    joined = sum(row.value for row in ledger.served.values() if row.kind in KINDS)
    for source, count in (("requests", survey.requests), ("metrics", survey.metrics), ("joined", joined)):
        telemetry.joined.labels(source).set(count)
    telemetry.conflicts.set(survey.conflicts)


def _lazy_price(config: Config) -> Callable[[Usage], int | None]:
    """Prices, read when a request needs one for the first time."""
    cost: Callable[[Usage], int | None] | None = None

    def price(usage: Usage) -> int | None:
        nonlocal cost
        if cost is None:
            cost = pricing.load(config.prices).cost
        return cost(usage)

    return price


def _follower(config: Config, ledger: Ledger, telemetry: Telemetry, throttle: Throttle) -> Follower | None:
    if not config.transcripts or config.source == "otlp":
        return None
    home = str(Path.home())
    roots = {root: tool for tool in TRANSCRIPTS.values() for root in tool.roots(os.environ, home)}
    return Follower(ledger, roots, telemetry, throttle)


async def _followed(follower: Follower, fail: Callable[[BaseException], None]) -> None:
    try:
        await follower.run()
    except Exception as error:  # a fault of ours: whoever supervises has to start afresh
        fail(error)


async def _every(seconds: float, work: Callable[[], Awaitable[object]], *, at_once: bool = False) -> None:
    while True:
        if not at_once:
            await asyncio.sleep(seconds)
        at_once = False
        try:
            await work()
        except StoreUnavailable:
            pass  # the next export's refusal says so
        except OSError as error:
            if not ran_out(error):
                raise
            log.warning(ADVICE)


def _log_type(loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
    """What goes wrong in a task nobody waits for: its message could quote what a client sent, so it is left out."""
    del loop
    log.error("a task failed", exc_info=context.get("exception"))


def _abort(place: str) -> None:
    """The event loop hangs: whoever supervises has to start afresh. Nothing can be stopped in order."""
    log.critical(f"the event loop has not turned for {HANG_SECONDS:.0f} s; it stands at {place}")
    os._exit(os.EX_SOFTWARE)


async def _close_door(runner: web.ServerRunner, server: Server) -> None:
    """Accept nobody any more, and hear those who came in just before, so that an orderly restart cuts no request."""
    for site in list(runner.sites):
        await site.stop()
    for _ in range(10):
        await asyncio.sleep(DOOR_SECONDS / 10)
        if all(getattr(connection, "answered", True) for connection in server.connections):
            return


async def _pulse(watchdog_seconds: float | None) -> None:
    """Tell the watchdog, from the event loop, that the event loop turns."""
    while watchdog_seconds is not None:
        supervisor.notify("WATCHDOG=1")
        await asyncio.sleep(watchdog_seconds / 2)


def token_file(config: Config, directory: Path) -> Path:
    """The file of tokens in force."""
    return Path(config.token_file).expanduser() if config.token_file else directory / tokens.FILE


def tokens_in_force(config: Config, directory: Path) -> Tokens:
    """The tokens of the environment and the file. Raises TokenError."""
    path = token_file(config, directory)
    if config.token_file and not path.exists():
        raise TokenError(f"token_file: {path} does not exist; `claude-otel-bridge token NAME` makes it")
    allowed = Tokens(path, tokens.of_environment(os.environ))
    allowed.refresh()
    return allowed


async def _refresh(allowed: Tokens, tls: "TlsFiles | None") -> None:
    """Take what has changed in the files that say who comes in."""
    try:
        if allowed.refresh():
            log.info("tokens changed", extra={"count": len(allowed)})
    except TokenError as error:
        log.error(f"{error}; the tokens stay as they were")
    if tls is None:
        return
    from bridge.tls import TlsError

    try:
        if tls.refresh():
            log.info("the files of TLS changed; new connections use them")
    except TlsError as error:
        log.error(f"{error}; TLS stays as it was")


def pure_python_protobuf() -> str:
    """A line for the log if protobuf runs without its C library: it would be slow, and bounds depth less surely."""
    from google.protobuf.internal import api_implementation

    kind = api_implementation.Type()
    return "" if kind == "upb" else f"protobuf runs as {kind}, not upb; install its wheel for this platform"
