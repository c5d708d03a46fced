"""How live the bridge is, what its scrapes wait for while it reads history, and what following costs at rest.

    python -m tests.bench.live [--files 3000] [--lines 200] [--megabytes 400] [--seconds 30]

A line that is appended to one of that many transcripts is looked for in `/v1/metrics` every five milliseconds; while
that many megabytes of history are read, `/v1/metrics` is scraped fifty times a second. The CPU at rest is that of all
threads, with and without transcripts, so that the difference is what following them costs. Takes about two minutes,
and ends when no line is seen for PATIENCE seconds.
"""

import argparse
import random
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

from tests.bench.peers import usage_of
from tests.daemon import Daemon
from tests.transcript_tree import response, write_tree

PATIENCE = 30.0
POLL_SECONDS = 0.005
SCRAPE_SECONDS = 0.02
SETTLE_SECONDS = 10.0
"""Until what is done once after the start is over."""
OUTPUT = 'claude_code_token_usage{type="output"}'


def await_history(daemon: Daemon, scraped: list[float] | None = None) -> None:
    """Wait until history is read; scrape meanwhile, if the seconds that this takes are wanted."""
    ends = time.monotonic() + 10 * PATIENCE
    while "history is read" not in daemon.log:
        if time.monotonic() > ends:
            raise SystemExit(f"history is not read after {10 * PATIENCE:.0f} s\n{daemon.log}")
        if scraped is not None:
            began = time.perf_counter()
            daemon.get("/v1/metrics")
            scraped.append(time.perf_counter() - began)
        time.sleep(SCRAPE_SECONDS)


def seconds_until_seen(daemon: Daemon, lines: int) -> list[float]:
    """How long appended lines take to show in `/v1/metrics`."""
    choose = random.Random(1)
    paths = sorted((daemon.directory / ".claude" / "projects").rglob("*.jsonl"))
    found = []
    for number in range(lines):
        time.sleep(choose.uniform(0.05, 0.3))
        before = int(daemon.samples()[OUTPUT])
        with choose.choice(paths).open("ab") as file:
            file.write(response(f"live_{number}", f"live_{number}"))
        began = time.perf_counter()
        while int(daemon.samples()[OUTPUT]) == before:
            if time.perf_counter() - began > PATIENCE:
                raise SystemExit(f"line {number} is not seen after {PATIENCE:.0f} s\n{daemon.log}")
            time.sleep(POLL_SECONDS)
        found.append(time.perf_counter() - began)
    return found


def at_rest(daemon: Daemon, seconds: float) -> tuple[float, float]:
    """Percent of a core, and wake-ups a second of all threads."""
    assert daemon.process is not None
    time.sleep(SETTLE_SECONDS)
    before, began = usage_of(daemon.process.pid), time.perf_counter()
    time.sleep(seconds)
    after, took = usage_of(daemon.process.pid), time.perf_counter() - began
    return 100 * (after.cpu - before.cpu) / took, (after.wakeups - before.wakeups) / took


def percentiles(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    parts = (ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] * 1e3 for percent in (50, 99))
    median, high = (f"{part:.0f}" for part in parts)
    return f"{median} ms, p99 {high} ms, at most {ordered[-1] * 1e3:.0f} ms ({len(ordered)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=int, default=3000)
    parser.add_argument("--lines", type=int, default=200)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=30)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        home = Path(name) / "rest"
        for number in range(options.files):
            path = home / ".claude" / "projects" / f"p{number % 100}" / f"{number}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(response(f"old_{number}", f"old_{number}"))
        with closing(Daemon(home).start()) as daemon:
            await_history(daemon)
            following, wakeups = at_rest(daemon, options.seconds)
            seen = seconds_until_seen(daemon, options.lines)
        with closing(Daemon(home, "--no-transcripts").start()) as daemon:
            without, few = at_rest(daemon, options.seconds)
        history = Path(name) / "history"
        write_tree(history / ".claude", files=max(1, options.megabytes), size=options.megabytes * 10**6)
        scraped: list[float] = []
        with closing(Daemon(history).start()) as daemon:
            await_history(daemon, scraped)
    sys.stdout.write(
        f"appended line in /v1/metrics: p50 {percentiles(seen)}\n"
        f"scrape while {options.megabytes} MB of history are read: p50 {percentiles(scraped)}\n"
        f"at rest, {options.files} transcripts: {following:.2f} % of a core, {wakeups:.1f} wake-ups/s\n"
        f"at rest, without: {without:.2f} %, {few:.1f} wake-ups/s; following costs {following - without:.2f} %\n"
    )


if __name__ == "__main__":
    main()
