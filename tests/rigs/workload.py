"""What runs on the watched disk, in a process of its own with `shim.c` before the C library.

    python -m tests.rigs.workload record DIRECTORY SEED RECORDINGS
    python -m tests.rigs.workload fail DIRECTORY SEED POINTS SHARD SHARDS

`record` writes one file of calls each for some runs of a ledger, with marks of what was tried and acknowledged. `fail`
runs a ledger once for each n, fails its n-th call, and prints what it did; several processes may share the work.

The worth of the i-th export is 2 to the power of i, so that a total tells exactly which exports it holds, and anything
that counts twice shows as an export that was never made.
"""

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from random import Random
from typing import NamedTuple

from bridge import store
from bridge.copies import keep_copy
from bridge.state import StateError, StoreUnavailable
from bridge.store import connect
from tests.rigs.disk import Disk, recorded
from tests.rigs.progress import Progress
from tests.test_cases import Body, body_of
from tests.test_served import MarkedRig

TYPES = ("input", "output", "cacheRead", "cacheCreation")
TOTALS = ("tokens.input", "tokens.output", "tokens.cache_read", "tokens.cache_creation")
BITS = 28
"""A delta of more tokens than 10^9 is refused."""
LINES = 9
"""Points of an export beside the one that names it: one line of code each."""
CHECKPOINT_PAGES = 40
"""Checkpoints more often than a small test would have."""
ERRORS = {"EIO": 5, "ENOSPC": 28, "EROFS": 30, "EDQUOT": 122, "EINTR": 4, "short": -1}
ATTEMPTS = 30


def export(number: int) -> Body:
    """The export that adds 2**number, and LINES lines of code."""
    kind, bit = divmod(number, BITS)
    common = {"session": f"s{number % 3}", "start": str(1000 + number), "time": str(2000 + number)}
    points = [{**common, "type": TYPES[kind], "delta": str(1 << bit)}]
    for line in range(LINES):
        lines = {"metric": "claude_code.lines_of_code.count", "type": "added", "delta": "1"}
        points.append({**common, **lines, "start": str(line)})
    return body_of(points)


EXPORTS = [export(number) for number in range(BITS * len(TYPES))]


def exports_in(totals: dict[str, int]) -> set[int]:
    """The exports that the totals hold. Raises AssertionError when they hold half of one, or one twice."""
    found = {
        kind * BITS + bit
        for kind, name in enumerate(TOTALS)
        for bit in range(totals.get(name, 0).bit_length())
        if totals[name] >> bit & 1
    }
    assert totals.get("lines.added", 0) == LINES * len(found), f"{totals} are not those of whole exports"
    return found


class Shim:
    """The library that was preloaded."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._library.shim_calls.restype = ctypes.c_long

    def watch(self, directory: Path) -> None:
        self._library.shim_watch(str(directory).encode())

    def record(self, file: Path | None) -> None:
        self._library.shim_record(str(file).encode() if file else None)

    def mark(self, text: str) -> None:
        self._library.shim_mark(text.encode())

    def fail(self, nth: int, error: int, times: int = 1) -> None:
        self._library.shim_arm(ctypes.c_long(nth), ctypes.c_int(error), ctypes.c_long(times))

    @property
    def calls(self) -> int:
        """Calls since the last `fail`."""
        return int(self._library.shim_calls())


# --- recording -------------------------------------------------------------------------------------------------


def record(shim: Shim, directory: Path, seed: int, recordings: int) -> None:
    for number in range(recordings):
        choose = Random(seed * 1_000 + number)
        with closing(MarkedRig(directory, connect=connect, name=f"run{number}")) as rig:
            shim.watch(rig.directory)
            shim.record(directory / f"run{number}.calls")
            rig.start()
            left = list(range(choose.randint(20, 60)))
            while left:
                step(shim, rig, choose, left)
            if choose.random() < 0.5:
                rig.stop()
                rig.mark()
                rig.start()
            shim.record(None)


def step(shim: Shim, rig: MarkedRig, choose: Random, left: list[int]) -> None:
    """One commit of some exports, or one thing that a bridge does besides."""
    match choose.choices(("post", "restart", "mark", "copy", "again"), (70, 6, 12, 4, 8))[0]:
        case "post":
            group = [left.pop(0) for _ in range(min(len(left), choose.randint(1, 3)))]
            for number in group:
                shim.mark(f"try {number}")
            rig.post_together([EXPORTS[number] for number in group])
            for number in group:
                shim.mark(f"ack {number}")
        case "restart":
            rig.restart()
        case "mark":
            rig.mark()
        case "copy":
            keep_copy(rig.directory, 1, rig.now_ms)
        case "again" if left[0]:
            rig.post(EXPORTS[choose.randrange(left[0])])


# --- failing ---------------------------------------------------------------------------------------------------


def fail(shim: Shim, directory: Path, seed: int, points: int, shard: int, shards: int) -> str:
    """Fail some `points` of all calls once with each error, one shard of them: runs, points and refusals.

    The last sync is one of them, failed twice: after it nothing but a repeat can be acknowledged.
    """
    choose = Random(seed)
    runs = failures = 0
    last = count_calls(shim, directory)
    calls = shim.calls
    others = [nth for nth in range(1, calls + 1) if nth != last]
    places = sorted([*choose.sample(others, min(points - 1, len(others))), last])[shard::shards]
    choose = Random(f"{seed} {shard}")
    progress = Progress(f"faults, {shard + 1} of {shards}", len(places) * len(ERRORS))
    for nth in places:
        for name, error in ERRORS.items():
            times = 1 if error < 0 else 2 if nth == last else choose.choice((1, 1, 1, 2, 3))
            failures += run(shim, directory / f"{name}-{nth}", nth, error, times).refusals
            runs += 1
            progress.tell(runs, f"{failures} refusals")
    return f"{runs} {len(places)} {failures}"


def count_calls(shim: Shim, directory: Path) -> int:
    """How many calls a life makes up to the sync of its last export; `shim.calls` are those until its end."""
    return run(shim, directory / "counted", 0, 0, 1).last


EXPORTS_OF_A_RUN = 24


class Life(NamedTuple):
    """How often a ledger refused, and which call was the sync of the last export."""

    refusals: int
    last: int


def run(shim: Shim, directory: Path, nth: int, error: int, times: int) -> Life:
    """One life of a ledger whose n-th call fails. Raises AssertionError."""
    directory.mkdir()
    where = f"call {nth}, {error}, {times} times"
    with closing(MarkedRig(directory, connect=connect)) as rig:
        shim.watch(rig.directory)
        calls = directory / "calls"
        shim.record(calls)
        shim.fail(nth, error, times)
        refusals = start(rig)
        acknowledged: set[int] = set()
        for number in range(EXPORTS_OF_A_RUN):
            refusals += deliver(rig, number, acknowledged)
            if number % 5 == 2:
                refusals += attempt(rig.mark)
            if number % 8 == 4:
                refusals += restart(rig)
        last = shim.calls
        shim.record(None)
        made = set(range(EXPORTS_OF_A_RUN))
        assert exports_in(rig.totals) == made, f"{where}: {exports_in(rig.totals) ^ made}"
        killed = rig.image()
        strict_image(rig.directory, calls, directory / "strict")
    for image in (killed, directory / "strict"):
        assert_holds(image, made, where)
    shim.watch(Path("/nowhere"))
    shutil.rmtree(directory)
    return Life(refusals, last)


def deliver(rig: MarkedRig, number: int, acknowledged: set[int]) -> int:
    """Send an export until it is acknowledged; what is shown does not fall meanwhile."""
    for refusals in range(ATTEMPTS):
        before = dict(rig.totals)
        try:
            rig.post(EXPORTS[number])
        except StoreUnavailable:
            assert all(rig.totals.get(name, 0) >= value for name, value in before.items())
            assert acknowledged <= exports_in(rig.totals) <= acknowledged | {number}
            continue
        acknowledged.add(number)
        assert exports_in(rig.totals) == acknowledged
        return refusals
    raise AssertionError(f"export {number} was never acknowledged")


def attempt(work: object) -> int:
    try:
        work()  # type: ignore[operator]  # a method of the rig
    except (StoreUnavailable, StateError):
        return 1
    return 0


def start(rig: MarkedRig) -> int:
    """Start until it works, as a supervisor does; the number of refusals."""
    for refusals in range(ATTEMPTS):
        if not attempt(rig.start):
            return refusals
    raise AssertionError("never started")


def restart(rig: MarkedRig) -> int:
    rig.stop()
    return attempt(rig.mark) + start(rig)


def strict_image(watched: Path, calls: Path, target: Path) -> None:
    """What the disk holds at the least: nothing that was not synced, nor what a failed sync was to bring."""
    disk = Disk(watched)
    for record_ in recorded(calls):
        disk.replay(record_)
    disk.lose_all(target)


def assert_holds(image: Path, made: Iterable[int], where: str) -> None:
    with closing(MarkedRig(image.parent, name=f"open-{image.name}")) as rig:
        shutil.copytree(image, rig.directory, dirs_exist_ok=True)
        rig.start()
        assert exports_in(rig.held_totals) == set(made), (
            f"{where}: {image.name} has lost {set(made) - exports_in(rig.totals)}"
        )
        assert rig.ledger.lost == 0, f"{where}: {image.name} went back"
        rig.post_together([EXPORTS[number] for number in made])
        assert exports_in(rig.totals) == set(made), f"{where}: {image.name} counts a repeat"


def build(source: Path, target: Path) -> Path:
    """Compile the shim; the library. Raises subprocess.CalledProcessError."""
    library = target / "shim.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True, timeout=60)
    return library


if __name__ == "__main__":
    store.LOG_PAGES = CHECKPOINT_PAGES
    verb, place, *numbers = sys.argv[1:]
    if verb == "record":
        record(Shim(), Path(place), *map(int, numbers))
    else:
        sys.stdout.write(fail(Shim(), Path(place), *map(int, numbers)) + "\n")
