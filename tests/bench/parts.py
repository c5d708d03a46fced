"""What is measured. Each part runs all peers in turn, as often as asked, and appends to `Results`.

A peer runs alone, pinned to one core, with the client on another. Every repetition starts a fresh process with an
empty directory, and begins with another peer than the one before. CPU seconds are the process's own, so they say
more than rates where a machine is shared.
"""

import asyncio
import http.client
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import uvloop

from bridge.otlp import Encoding
from tests.bench.client import Load, post, send
from tests.bench.exports import POINTS, STEP_NS, TOKEN_POINTS, Session, recorded
from tests.bench.peers import CLIENT_CORE, Peer, Running, running, say

WARM_UP = 64
"""Requests before each measured load."""
TOKENS = 1000
PROMETHEUS_HEADERS = {"Accept-Encoding": "gzip", "X-Prometheus-Scrape-Timeout-Seconds": "10"}


class Row(NamedTuple):
    """One line of the table: what is measured, its unit, and which way is better."""

    label: str
    unit: str
    is_higher_better: bool = False


class Options(NamedTuple):
    """How much is measured."""

    repeat: int = 3
    requests: int = 3840  # of 64 sessions: an hour each, at an export a minute
    connections: tuple[int, ...] = (1, 16, 64)
    sessions: tuple[int, ...] = (34, 334, 3334)
    steady_sessions: int = 1000
    steady_seconds: int = 30
    idle_seconds: int = 30


class Results:
    """Values by row and peer, in the order of measurement."""

    def __init__(self) -> None:
        self.values: dict[Row, dict[str, list[float]]] = {}

    def add(self, row: Row, peer: Peer, value: float) -> None:
        """One more value of a peer."""
        self.values.setdefault(row, {}).setdefault(peer.name, []).append(value)


Part = Callable[[Sequence[Peer], Options, Results], None]


def rounds(peers: Sequence[Peer], repeat: int, what: str) -> Iterator[tuple[Peer, Path]]:
    """Each peer in each repetition, with an empty directory; who begins changes."""
    for number in range(repeat):
        for turn in range(len(peers)):
            peer = peers[(number + turn) % len(peers)]
            say(f"{what}: {peer.name}, {number + 1} of {repeat}")
            with tempfile.TemporaryDirectory(prefix="bench-") as directory:
                yield peer, Path(directory)


def load(one: Running, queues: Sequence[Sequence[bytes]], period: float = 0) -> Load:
    """Send requests from the client's core."""
    os.sched_setaffinity(0, {CLIENT_CORE})
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(send(one.ingest_port, queues, period))


def queues_of(
    one: Running, encoding: Encoding, sessions: int, exports: int, connections: int, skip: int = 0
) -> list[list[bytes]]:
    """`exports` requests of each of some sessions, spread so that each session keeps to one connection and in order."""
    begin = time.time_ns() - (exports + 2) * STEP_NS
    queues: list[list[bytes]] = [[] for _ in range(min(connections, sessions))]
    made = [Session(number + skip, encoding).exports(begin, exports, TOKENS) for number in range(sessions)]
    for _ in range(exports):
        for number, bodies in enumerate(made):
            queues[number % len(queues)].append(post(one.ingest_path, next(bodies), encoding))
    return queues


# --- ingest ----------------------------------------------------------------------------------------------------


def ingest(peers: Sequence[Peer], options: Options, results: Results) -> None:
    """Protobuf exports of 64 sessions as fast as they are answered."""
    for connections in options.connections:
        _ingest(peers, options, results, Encoding.PROTOBUF, connections)


def formats(peers: Sequence[Peer], options: Options, results: Results) -> None:
    """The same as JSON, and what real sessions sent."""
    _ingest(peers, options, results, Encoding.JSON, 16)
    for peer, directory in rounds(peers, options.repeat, "ingest, recorded"):
        with running(peer, directory) as one:
            _warm_up(one, Encoding.PROTOBUF)
            bodies = recorded(time.time_ns() - 60 * STEP_NS, options.requests)
            requests = [post(one.ingest_path, body, Encoding.PROTOBUF) for body in bodies]
            queues = [requests[number::16] for number in range(16)]
            _measure(one, queues, "recorded exports, protobuf, 16 connections", results, points=0)


def _ingest(peers: Sequence[Peer], options: Options, results: Results, encoding: Encoding, connections: int) -> None:
    name = f"30 points, {encoding.name.lower()}, {connections} connection{'s' if connections > 1 else ''}"
    for peer, directory in rounds(peers, options.repeat, f"ingest, {name}"):
        with running(peer, directory) as one:
            _warm_up(one, encoding)
            _measure(one, queues_of(one, encoding, 64, options.requests // 64, connections), name, results)


def _warm_up(one: Running, encoding: Encoding) -> None:
    load(one, queues_of(one, encoding, 16, WARM_UP // 16, 16, skip=1_000_000))


def _measure(
    one: Running, queues: Sequence[Sequence[bytes]], name: str, results: Results, points: int = POINTS
) -> None:
    before = one.usage
    done = load(one, queues)
    after = one.usage
    count = len(done.latencies)
    cpu = after.cpu - before.cpu
    add = results.add
    add(Row(f"{name}: per core", "requests/CPU s", True), one.peer, count / cpu)
    add(Row(f"{name}: rate", "requests/s", True), one.peer, done.rate)
    add(Row(f"{name}: p50", "ms"), one.peer, done.percentile(50) * 1e3)
    add(Row(f"{name}: p99", "ms"), one.peer, done.percentile(99) * 1e3)
    if points:
        add(Row(f"{name}: CPU per point", "us"), one.peer, cpu / count / points * 1e6)
    if done.busy > 0.9:
        say(f"the client was {done.busy:.0%} busy")


def slow_disk(peers: Sequence[Peer], options: Options, results: Results) -> None:
    """The same with a disk that needs 5 or 20 ms for each sync. Only for programs that sync by the C library."""
    for connections, milliseconds in ((16, 5), (64, 5), (64, 20)):
        name = f"30 points, protobuf, {connections} connections, {milliseconds} ms a sync"
        ours = [peer for peer in peers if peer.name == "bridge"]
        for peer, directory in rounds(ours, options.repeat, f"ingest, {name}"):
            shim = _slow_sync(directory, milliseconds)
            if shim is None:
                return
            with running(peer, directory, preload=shim) as one:
                _warm_up(one, Encoding.PROTOBUF)
                queues = queues_of(one, Encoding.PROTOBUF, 64, options.requests // 64, connections)
                _measure(one, queues, name, results)


_SLOW_SYNC = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <unistd.h>
static int slow(const char *name, int descriptor) {
    int (*real)(int) = (int (*)(int)) dlsym(RTLD_NEXT, name);
    usleep(1000 * MILLISECONDS);
    return real(descriptor);
}
int fsync(int descriptor) { return slow("fsync", descriptor); }
int fdatasync(int descriptor) { return slow("fdatasync", descriptor); }
"""


def _slow_sync(directory: Path, milliseconds: int) -> Path | None:
    compiler = shutil.which("cc")
    if compiler is None:
        say("slow disk: needs a C compiler")
        return None
    source, library = directory / "slow.c", directory / "slow.so"
    source.write_text(_SLOW_SYNC)
    define = f"-DMILLISECONDS={milliseconds}"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", define, "-o", library, source, "-ldl"], check=True)
    return library


def truth(peers: Sequence[Peer], options: Options, results: Results) -> None:
    """What is shown after all exports were answered, and again after a restart, of what was sent; and the disk."""
    exports = 30
    for peer, directory in rounds(peers, 1, "truth"):
        with running(peer, directory) as one:
            before = one.usage
            load(one, queues_of(one, Encoding.PROTOBUF, 64, exports, 16))
            sent, points = 64 * exports * TOKEN_POINTS * TOKENS, 64 * exports * POINTS
            results.add(Row("tokens shown of tokens acknowledged", "%", True), peer, 100 * _settled(one) / sent)
            written = one.usage.written - before.written
            one.kill()
            if peer.is_durable or peer.name == "Prometheus":
                results.add(Row("written to disk per million points", "MB"), peer, written / points)
            one.start()
            results.add(Row("the same after kill -9 and a restart", "%", True), peer, 100 * _settled(one) / sent)


def _settled(one: Running) -> float:
    """The tokens on the page when they have not changed for two seconds; after a minute, what they are."""
    shown, since = _tokens(one), time.monotonic()
    deadline = since + 60
    while time.monotonic() < min(since + 2, deadline):
        time.sleep(0.2)
        if (now := _tokens(one)) != shown:
            shown, since = now, time.monotonic()
    return shown


_TOKEN_SAMPLE = re.compile(r"^claude_code\S*token\S*?(?:\{.*\})? ([0-9.e+]+)(?: \d+)?$", re.MULTILINE)


def _tokens(one: Running, path: str = "") -> float:
    """All tokens on a page."""
    code, body = one.get(path or one.scrape_path)
    assert code == 200, body
    return sum(map(float, _TOKEN_SAMPLE.findall(body.decode())))


# --- scrapes, memory, growth -----------------------------------------------------------------------------------


def series(peers: Sequence[Peer], options: Options, results: Results) -> None:
    """Memory, scrapes and the cost of a point as series and sessions grow."""
    for sessions in options.sessions:
        name = f"{round(sessions * POINTS, -3):,} series"
        for peer, directory in rounds(peers, options.repeat if sessions < 1000 else 1, name):
            with running(peer, directory) as one:
                load(one, queues_of(one, Encoding.PROTOBUF, sessions, 1, 16))
                before = one.usage.cpu
                load(one, queues_of(one, Encoding.PROTOBUF, sessions, 1, 16))
                cpu = one.usage.cpu - before
                results.add(Row(f"{name}: CPU per point", "us"), peer, cpu / sessions / POINTS * 1e6)
                _scrapes(one, sessions, name, results)
                results.add(Row(f"{name}: resident memory", "MB"), peer, one.memory)


def _scrapes(one: Running, sessions: int, name: str, results: Results) -> None:
    """Scrapes over a connection that stays open, one export before each, as a poller of a live bridge sees it."""
    encoding = Encoding.PROTOBUF
    count = 20 if sessions < 1000 else 3
    exports = queues_of(one, encoding, 1, 2 * count + 4, 1, skip=2_000_000)[0]
    for suffix, headers in (("", {"Accept-Encoding": "identity"}), (", gzip", PROMETHEUS_HEADERS)):
        connection = http.client.HTTPConnection("127.0.0.1", one.scrape_port, timeout=60)
        took: list[float] = []
        cpu: list[float] = []
        for number in range(count + 2):
            load(one, [[exports.pop(0)]])
            before, began = one.usage.cpu, time.perf_counter()
            connection.request("GET", one.scrape_path, headers=headers)
            answer = connection.getresponse()
            body = answer.read()
            if number > 1:  # the first two make what is kept for the next
                took.append(time.perf_counter() - began)
                cpu.append(one.usage.cpu - before)
            assert answer.status == 200, body
        connection.close()
        results.add(Row(f"{name}: scrape{suffix}", "ms"), one.peer, statistics.median(took) * 1e3)
        results.add(Row(f"{name}: CPU of a scrape{suffix}", "ms"), one.peer, statistics.median(cpu) * 1e3)


# --- what a user feels -----------------------------------------------------------------------------------------


def visible(peers: Sequence[Peer], options: Options, results: Results) -> None:
    """From the first byte of an export to the first page that shows it."""
    for peer, directory in rounds(peers, options.repeat, "POST to visible"):
        with running(peer, directory) as one:
            session = Session(0, Encoding.PROTOBUF)
            page = peer.live or one.scrape_path
            begin = time.time_ns() - 300 * STEP_NS
            took = []
            seen = _tokens(one, page)
            for number in range(200):
                start = begin + number * STEP_NS
                body = session.export(start, start + STEP_NS, 100 + number)
                began = time.perf_counter()
                load(one, [[post(one.ingest_path, body, Encoding.PROTOBUF)]])
                while (now := _tokens(one, page)) == seen:
                    if time.perf_counter() - began > 5:
                        raise SystemExit(f"{peer.name} does not show an export within 5 s")
                took.append(time.perf_counter() - began)
                seen = now
            took.sort()
            results.add(Row("POST to visible: p50", "ms"), peer, took[100] * 1e3)
            results.add(Row("POST to visible: p99", "ms"), peer, took[197] * 1e3)


def idle(peers: Sequence[Peer], options: Options, results: Results) -> None:
    """Nothing happens, after a few exports."""
    for peer, directory in rounds(peers, options.repeat, f"idle for {options.idle_seconds} s"):
        with running(peer, directory) as one:
            time.sleep(2)
            results.add(Row("resident memory at rest, fresh", "MB"), peer, one.memory)
            load(one, queues_of(one, Encoding.PROTOBUF, 4, 4, 4))
            time.sleep(6)
            before, began = one.usage, time.perf_counter()
            time.sleep(options.idle_seconds)
            after, seconds = one.usage, time.perf_counter() - began
            results.add(Row("CPU at rest", "% of a core"), peer, (after.cpu - before.cpu) / seconds * 100)
            results.add(Row("wake-ups at rest", "1/s"), peer, (after.wakeups - before.wakeups) / seconds)


def start(peers: Sequence[Peer], options: Options, results: Results) -> None:
    """From the start of the process to its first answered scrape, with an empty state and with 100,000 series."""
    for peer, directory in rounds(peers, options.repeat * 2, "start"):
        with running(peer, directory) as one:
            results.add(Row("start to first scrape", "ms"), peer, one.start_seconds * 1e3)
            results.add(Row("CPU until the first scrape", "ms"), peer, one.usage.cpu * 1e3)
    keepers = [peer for peer in peers if peer.name in ("bridge", "Prometheus")]
    for peer, directory in rounds(keepers, 1, "start with 100,000 series"):
        with running(peer, directory) as one:
            load(one, queues_of(one, Encoding.PROTOBUF, 3334, 1, 16))
            for _ in range(options.repeat):
                one.stop()
                one.start()
                results.add(Row("start with 100,000 series of state", "ms"), peer, one.start_seconds * 1e3)


def steady(peers: Sequence[Peer], options: Options, results: Results) -> None:
    """A thousand sessions that export every 10 s, and a scrape every second."""
    sessions, seconds = options.steady_sessions, options.steady_seconds
    name = f"{sessions:,} sessions every 10 s, scrape every 1 s"
    for peer, directory in rounds(peers, 1, name):
        with running(peer, directory) as one:
            load(one, queues_of(one, Encoding.PROTOBUF, sessions, 1, 16))
            exports = max(1, seconds // 10)
            queues = queues_of(one, Encoding.PROTOBUF, sessions, exports, 10)
            before, began = one.usage, time.perf_counter()
            stop = asyncio.Event()
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                done = runner.run(_steady(one, queues, 10 / (sessions / 10), stop))
            after, took = one.usage, time.perf_counter() - began
            results.add(Row(f"{name}: CPU", "% of a core"), peer, (after.cpu - before.cpu) / took * 100)
            results.add(Row(f"{name}: resident memory", "MB"), peer, one.memory)
            results.add(Row(f"{name}: p99 of an export", "ms"), peer, done.percentile(99) * 1e3)


async def _steady(one: Running, queues: Sequence[Sequence[bytes]], period: float, stop: asyncio.Event) -> Load:
    async def scrape() -> None:
        while not stop.is_set():
            began = time.perf_counter()
            await asyncio.to_thread(one.get, one.scrape_path)
            await asyncio.sleep(max(0, 1 - (time.perf_counter() - began)))

    scraper = asyncio.create_task(scrape())
    done = await send(one.ingest_port, queues, period)
    stop.set()
    await scraper
    return done


PARTS: dict[str, Part] = {
    "ingest": ingest,
    "formats": formats,
    "slow-disk": slow_disk,
    "series": series,
    "visible": visible,
    "idle": idle,
    "start": start,
    "steady": steady,
    "truth": truth,
}
