"""A disk that loses power, and one that fails any of its calls.

Law under test: what was acknowledged is in what the disk holds after it lost power, whatever else it kept of what was
not synced; nothing is there that was not sent, nothing half, nothing twice, and every image opens. A call that fails
makes no false acknowledgement: not for those who read on, not after SIGKILL, not after power loss.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from random import Random

import pytest

from bridge.store import connect
from tests.rigs.disk import SECTOR, Call, Disk, Record, recorded
from tests.rigs.progress import Progress
from tests.rigs.workload import ERRORS, EXPORTS, build, exports_in
from tests.test_served import MarkedRig

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("gcc") is None, reason="the shim is made for Linux and needs gcc"
)
RunWatched = Callable[..., str]


@pytest.fixture(scope="module")
def run_watched(tmp_path_factory: pytest.TempPathFactory) -> RunWatched:
    """`run_watched(verb, directory, numbers...)`: the workload under the shim; its last line."""
    library = build(HERE / "shim.c", tmp_path_factory.mktemp("shim"))

    def run(verb: str, directory: Path, *numbers: int) -> str:
        command = [sys.executable, "-m", "tests.rigs.workload", verb, str(directory), *map(str, numbers)]
        environment = {**os.environ, "LD_PRELOAD": str(library)}
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, timeout=3_600)
        assert done.returncode == 0, done.stdout
        return done.stdout.rpartition("\n")[0].rpartition("\n")[2]

    return run


# --- power loss ------------------------------------------------------------------------------------------------


def numbers(marks: list[str], verb: str) -> set[int]:
    return {int(mark.split()[1]) for mark in marks if mark.startswith(verb)}


def assert_recovered(image: Path, tried: set[int], acknowledged: set[int], where: str) -> None:
    """Open what was left as the bridge does, and compare; then send everything again."""
    with closing(MarkedRig(image.parent, connect=connect, name=f"open-{image.name}")) as rig:
        shutil.copytree(image, rig.directory, dirs_exist_ok=True)
        rig.start()
        found = exports_in(rig.totals)
        assert acknowledged <= found <= tried, f"{where}: lost {acknowledged - found}, made up {found - tried}"
        assert rig.ledger.lost == 0, f"{where}: behind what was served"
        rig.post_together([EXPORTS[number] for number in sorted(tried)])
        assert exports_in(rig.totals) == tried, f"{where}: a repeat counts, or does not"


def test_whatever_the_power_leaves_what_was_acknowledged_is_there(
    run_watched: RunWatched, tmp_path: Path, campaign: bool
) -> None:
    recordings, images = (50, 50) if campaign else (2, 12)
    run_watched("record", tmp_path, 1, recordings)
    progress = Progress("power", recordings * images)
    done = kept = 0
    for number in range(recordings):
        choose = Random(number)
        calls = recorded(tmp_path / f"run{number}.calls")
        cuts = sorted(choose.randrange(len(calls) + 1) for _ in range(images))
        disk = Disk(tmp_path / f"run{number}-0")
        at = 0
        for cut in cuts:
            for record in calls[at:cut]:
                disk.replay(record)
            at = cut
            image = tmp_path / f"image-{done}"
            disk.lose_power(image, choose)
            tried, acknowledged = numbers(disk.marks, "try"), numbers(disk.marks, "ack")
            assert_recovered(image, tried, acknowledged, f"recording {number}, call {cut} of {len(calls)}")
            shutil.rmtree(image)
            done += 1
            kept += len(acknowledged)
            progress.tell(done, f"{kept} acknowledged exports found")
        (tmp_path / f"run{number}.calls").unlink()
    progress.end(f"{done} images of {recordings} recordings, {kept} acknowledged exports found, 0 lost, 0 unopenable")
    assert kept


def test_the_model_of_the_disk_loses_what_was_not_synced(tmp_path: Path) -> None:
    directory = tmp_path / "d"
    disk = Disk(directory)
    sectors = [bytes([letter]) * SECTOR for letter in b"abc"]
    for record in (
        Record(Call.OPEN, 3, 0, str(directory).encode()),
        Record(Call.OPEN, 4, 0o100, f"{directory}/file".encode()),
        Record(Call.SYNC, 3, 0, b""),
        Record(Call.WRITE, 4, 0, sectors[0]),
        Record(Call.SYNC, 4, 0, b""),
        Record(Call.WRITE, 4, SECTOR, b"".join(sectors[1:])),
        Record(Call.RENAME, -1, 0, f"{directory}/file\0{directory}/new".encode()),
    ):
        disk.replay(record)
    seen = set()
    for seed in range(300):
        image = tmp_path / str(seed)
        disk.lose_power(image, Random(seed))
        (file,) = image.iterdir()
        seen.add((file.name, file.read_bytes()))
    empty = bytes(SECTOR)
    a, b, c = sectors
    assert {content for _, content in seen} == {a, a + b, a + empty + c, a + b + c}
    assert {name for name, _ in seen} == {"file", "new"}

    for record in (Record(Call.SYNC, 4, -1, b""), Record(Call.WRITE, 4, 0, c), Record(Call.SYNC, 4, 0, b"")):
        disk.replay(record)
    disk.lose_all(tmp_path / "least")
    assert (tmp_path / "least" / "file").read_bytes() == c, "what a failed sync was to bring may never come"


# --- calls that fail -------------------------------------------------------------------------------------------


def test_no_call_that_fails_makes_a_false_acknowledgement(
    run_watched: RunWatched, tmp_path: Path, campaign: bool
) -> None:
    """EIO, ENOSPC, EROFS, EDQUOT, EINTR and a short write at the n-th call, for a sample of n."""
    points, shards = (520, 4) if campaign else (2, 1)  # a ledger waits more than it computes

    def run(shard: int) -> list[int]:
        directory = tmp_path / str(shard)
        directory.mkdir()
        return [int(count) for count in run_watched("fail", directory, 1, points, shard, shards).split()]

    with ThreadPoolExecutor(shards) as pool:
        runs, places, refusals = map(sum, zip(*pool.map(run, range(shards)), strict=True))
    what = f"{runs} runs, {places} calls, {refusals} refusals; 0 false acknowledgements, 0 counted twice"
    Progress("faults", runs).end(what)
    assert (places, runs) == (points, points * len(ERRORS))
