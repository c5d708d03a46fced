"""A bridge under load for long: memory, descriptors, threads and the WAL stay where they were, totals are exact."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pytest

from bridge.database import DATABASE
from tests.daemon import Daemon
from tests.rigs.progress import Progress
from tests.rigs.test_kill import Campaign

MAX_GROWTH = 0.05
MAX_DESCRIPTORS, MAX_THREADS = 64, 16
"""Ten clients, the database and its WAL, a transcript, and what the event loop needs."""
MAX_WAL = 64 * 2**20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class Reading(NamedTuple):
    """What /proc and the directory say: MiB, counts, bytes, and seconds of CPU."""

    memory: float
    descriptors: int
    threads: int
    wal: int
    cpu: float


def read(daemon: Daemon) -> Reading:
    assert daemon.process is not None
    process = Path(f"/proc/{daemon.process.pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    fields = (process / "stat").read_text().rpartition(")")[2].split()
    wal = daemon.state_dir / f"{DATABASE}-wal"
    return Reading(
        int(status["VmRSS"].split()[0]) / 1024,
        sum(1 for _ in (process / "fd").iterdir()),
        int(status["Threads"]),
        wal.stat().st_size if wal.exists() else 0,
        (int(fields[11]) + int(fields[12])) / 100,
    )


def test_nothing_grows_under_load(make_daemon: Callable[..., Daemon], campaign: bool) -> None:
    seconds, every = (600, 1.0) if campaign else (1.5, 0.1)
    daemon = make_daemon().start()
    load = Campaign(daemon, 3, (30, 30), sessions_end=False)
    readings: list[Reading] = []
    progress = Progress("soak", int(seconds))
    began = time.monotonic()
    with load.running():
        while (elapsed := time.monotonic() - began) < seconds:
            time.sleep(every)
            readings.append(read(daemon))
            assert not load.faults, load.faults[:5]
            progress.tell(int(elapsed), readings[-1])
    load.settle()
    third = len(readings) // 3
    early, late = readings[third : 2 * third], readings[2 * third :]
    memory, memory_later = (median(found.memory for found in part) for part in (early, late))
    elapsed = time.monotonic() - began
    requests = daemon.samples("/metrics")['bridge_requests_total{code="200",signal="metrics"}']
    progress.end(
        f"{requests} exports, {load.counts['acknowledged']} points; {memory:.1f} MiB in the second third and"
        f" {memory_later:.1f} in the last, descriptors {min(r.descriptors for r in readings)} to"
        f" {max(r.descriptors for r in readings)}, threads up to {max(r.threads for r in readings)}, WAL up to"
        f" {max(r.wal for r in readings) / 2**20:.1f} MiB, {readings[-1].cpu / elapsed:.0%} of a CPU; totals exact"
    )
    assert max(found.wal for found in readings) <= MAX_WAL
    assert max(found.descriptors for found in readings) <= MAX_DESCRIPTORS
    assert max(found.threads for found in readings) <= MAX_THREADS
    if campaign:
        assert max(found.descriptors for found in late) <= max(found.descriptors for found in early)
        assert max(found.threads for found in late) <= max(found.threads for found in early)
        assert memory_later <= memory * (1 + MAX_GROWTH)
