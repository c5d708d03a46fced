"""Where the bridge's CPU time and memory go: two tables in about a minute.

    python -m tests.bench.profile [--rounds 16] [--repeat 3]

The parts of an export are measured in this process around the objects that the daemon has: the decoder, the
bookkeeper with groups of as many exports as there are senders, and its connection to SQLite. The whole is what a
daemon uses for the same exports from the client of the comparison; what no part explains is the rest. The first
exports of sessions, which make their series, are not measured. Each number is the least of some runs. Linux only.
"""

import argparse
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bridge.bookkeeper import Bookkeeper, LedgerSettings, Post
from bridge.ledger import refuse_damaged
from bridge.otlp import Encoding, Known, decode_metrics
from bridge.store import Store
from bridge.tools import known
from bridge.tools.transcripts import TRANSCRIPTS
from bridge.usage import UsageBooks, UsageChange, no_price
from tests.bench.exports import STEP_NS, Session
from tests.bench.parts import load, queues_of
from tests.bench.peers import Running, bridge, memory_of, running, say, usage_of

SENDERS = (1, 16, 64)
SESSIONS = 64
DECODE, POINTS, JOIN, ROWS, COMMIT = "decode", "points", "join", "rows", "commit"
PARTS = (DECODE, POINTS, JOIN, ROWS, COMMIT)
HTTP, REST, WHOLE, FIRST = "http", "rest", "whole", "first"
TEXTS = {
    DECODE: "decode",
    POINTS: "points: streams, identities, values",
    JOIN: "join of the sources",
    ROWS: "rows, by SQL",
    COMMIT: "commit, synced",
    HTTP: "HTTP alone: `GET /-/healthy`",
    REST: "the rest: the body, between threads, the answer",
    WHOLE: "a daemon, whole",
    FIRST: "a session's first export, which makes its series: decode to commit",
}
_HEALTHY = b"GET /-/healthy HTTP/1.1\r\nHost: localhost\r\n\r\n"
_IMPORTS = {
    "Python": "",
    "+ uvloop": "import uvloop",
    "+ aiohttp": "import uvloop, aiohttp.web",
    "+ the bridge's modules": "import uvloop, aiohttp.web, bridge.daemon",
}


class Parts(NamedTuple):
    """What was measured: the commits and the points counted in them, and CPU microseconds an export by part.

    `first` is what all parts of a session's first export take, which makes its series.
    """

    commits: int
    points: int
    first: float
    parts: dict[str, float]


# --- the parts of an export ------------------------------------------------------------------------------------


class Clock:
    """CPU time of this thread by part; what is done within a part that begins inside another is that part's alone."""

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()
        self._part = ""
        self._since = time.thread_time_ns()

    def turn(self, part: str) -> str:
        """A part begins; the one that it interrupts."""
        now = time.thread_time_ns()
        self.spent[self._part] += now - self._since
        self._since, before, self._part = now, self._part, part
        return before

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        before = self.turn(name)
        try:
            yield
        finally:
            self.turn(before)


def ingest(group: int, sessions: int, rounds: int) -> Parts:
    """Exports of each session, posted in groups, after a first round that is not measured."""
    clock = Clock()

    class Connection(sqlite3.Connection):
        def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
            with clock.part(COMMIT if sql == "commit" else ROWS):
                return super().execute(sql, parameters)

        def executemany(self, sql: str, rows: Any, /) -> sqlite3.Cursor:
            with clock.part(ROWS):
                return super().executemany(sql, rows)

    class Books(UsageBooks):
        def flush(self, commit: int, now: int) -> UsageChange:
            with clock.part(JOIN):
                return super().flush(commit, now)

    def connect(path: Path) -> sqlite3.Connection:
        return sqlite3.connect(path, isolation_level=None, factory=Connection)

    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        store, seen = Store(Path(directory), connect), Known()
        books = Books(store, no_price, str, known.REPORTING, followed=frozenset(TRANSCRIPTS), asked=known.ASKED)
        now = time.time_ns()
        keeper = Bookkeeper(store, LedgerSettings(), lambda: now // 10**6, lambda *_: (0, 0, 0), books, refuse_damaged)

        def post(bodies: Sequence[bytes]) -> int:
            with clock.part(DECODE):
                posts = [Post(decode_metrics(body, Encoding.PROTOBUF, known=seen), body) for body in bodies]
            with clock.part(POINTS):
                receipts, _ = keeper.post(posts)
            return sum(receipt.accepted for receipt in receipts)

        keeper.open(None, lambda *_: False)
        with closing(store):
            begin = now - (rounds + 2) * STEP_NS
            made = [Session(number, Encoding.PROTOBUF).exports(begin, rounds + 1) for number in range(sessions)]
            first, *others = ([*bodies] for bodies in zip(*made, strict=True))
            for at in range(0, sessions, group):
                post(first[at : at + group])
            began = sum(clock.spent[part] for part in PARTS)
            clock.spent.clear()
            commits = keeper.commits
            points = sum(post(bodies[at : at + group]) for bodies in others for at in range(0, sessions, group))
            commits = keeper.commits - commits
    parts = {part: clock.spent[part] / (sessions * rounds) / 1e3 for part in PARTS}
    return Parts(commits, points, began / sessions / 1e3, parts)


# --- the whole -------------------------------------------------------------------------------------------------


def whole(senders: int, rounds: int) -> dict[str, float]:
    """CPU microseconds of a daemon for an export, and for a request that asks nothing of it."""
    with tempfile.TemporaryDirectory(prefix="bench-") as directory, running(bridge(), Path(directory)) as one:
        load(one, queues_of(one, Encoding.PROTOBUF, SESSIONS, 1, senders))
        exports = _used(one, queues_of(one, Encoding.PROTOBUF, SESSIONS, rounds, senders))
        return {WHOLE: exports, HTTP: _used(one, [[_HEALTHY] * (SESSIONS * rounds // senders)] * senders)}


def _used(one: Running, queues: Sequence[Sequence[bytes]]) -> float:
    before = one.usage.cpu
    load(one, queues)
    return (one.usage.cpu - before) / sum(map(len, queues)) * 1e6


def cpu(senders: int, rounds: int, repeat: int) -> dict[str, float]:
    """All of `TEXTS`, by part."""
    found: dict[str, list[float]] = {}
    for number in range(repeat):
        say(f"CPU, {senders} at once: {number + 1} of {repeat}")
        done = ingest(senders, SESSIONS, rounds)
        for part, value in (done.parts | whole(senders, rounds) | {FIRST: done.first}).items():
            found.setdefault(part, []).append(value)
    least = {part: min(values) for part, values in found.items()}
    return least | {REST: least[WHOLE] - sum(least[part] for part in (*PARTS, HTTP))}


# --- memory ----------------------------------------------------------------------------------------------------


def memory() -> dict[str, tuple[float, float]]:
    """Resident MB, and the CPU seconds that the process had used by then."""
    found = {name: _memory_with(imports) for name, imports in _IMPORTS.items()}
    say("memory of a daemon")
    with tempfile.TemporaryDirectory(prefix="bench-") as directory, running(bridge(), Path(directory)) as one:
        time.sleep(2)
        found["the daemon at rest"] = one.memory, one.usage.cpu
        load(one, queues_of(one, Encoding.PROTOBUF, 334, 1, 16))
        found["with 10,000 series"] = one.memory, one.usage.cpu
        one.get(one.scrape_path)
        found["and a page of them"] = one.memory, one.usage.cpu
    return found


def _memory_with(imports: str) -> tuple[float, float]:
    command = [sys.executable, "-c", f"{imports}\nprint(flush=True)\ninput()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        found = memory_of(process.pid), usage_of(process.pid).cpu
        process.stdin.write(b"\n")
    return found


# --- the tables ------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.profile", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=16, help="exports of each of 64 sessions (default: 16)")
    parser.add_argument("--repeat", type=int, default=3, help="runs, of which the least counts (default: 3)")
    options = parser.parse_args()
    if sys.platform != "linux":
        raise SystemExit("what a process uses is read from /proc, which only Linux has")
    columns = [cpu(senders, options.rounds, options.repeat) for senders in SENDERS]
    sys.stdout.write("| CPU of an export of 30 points, microseconds | 1 sender | 16 senders | 64 senders |\n")
    sys.stdout.write("|---|---:|---:|---:|\n")
    for part, text in TEXTS.items():
        sys.stdout.write(f"| {text} | {' | '.join(f'{column[part]:,.0f}' for column in columns)} |\n")
    sys.stdout.write("\n| resident memory | MB | CPU until then, ms |\n|---|---:|---:|\n")
    for text, (megabytes, seconds) in memory().items():
        sys.stdout.write(f"| {text} | {megabytes:.1f} | {seconds * 1e3:,.0f} |\n")


if __name__ == "__main__":
    main()
