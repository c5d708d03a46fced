"""History that is read by processes: the same as the bridge reads it, whatever becomes of them and of the files."""

import asyncio
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridge import transcripts
from bridge.ledger import Ledger
from bridge.pricing import normalise_model
from bridge.readers import Readers
from bridge.reading import Chunk, Wanted
from bridge.tools import codex_lines, gemini_lines
from bridge.tools.claude_code_lines import TRANSCRIPTS
from bridge.tools.tool import Transcripts
from tests import codex_tree, gemini_tree
from tests.following import Following, following
from tests.transcript_tree import START_MS, Truth, response, timestamp, write_tree

KINDS = ("input", "output", "read", "requests")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes for any history, many pieces, and several of them of one file."""
    monkeypatch.setattr(transcripts, "PROCESS_BYTES", 0)
    monkeypatch.setattr(transcripts, "BATCH", 300_000)
    monkeypatch.setattr("bridge.reading.CHUNK", 300_000)


@pytest.fixture
def tree(tmp_path: Path) -> tuple[Path, Truth]:
    truth = write_tree(tmp_path, files=24, size=4_000_000, seed=11)
    (tmp_path / "projects" / "p\udcff").mkdir()  # a name that is no text is read by the bridge itself
    (tmp_path / "projects" / "p\udcff" / "s.jsonl").write_bytes(response("m", "r", model="odd"))
    return tmp_path / "projects", truth


def expected(truth: Truth) -> dict[str, Counter[str]]:
    sums: dict[str, Counter[str]] = {"odd": Counter(input=10, output=20, read=0, requests=1)}
    for model, counts in truth.tokens().items():
        sums.setdefault(normalise_model(model), Counter()).update({kind: counts[kind] for kind in KINDS})
    return sums


async def stored(bridge: Following) -> dict[str, Counter[str]]:
    """What is in the books of each model when all is read."""
    await bridge.until_looked()
    await bridge.until_read()
    sums: dict[str, Counter[str]] = {}
    for (_, model), counts in (await bridge.requests()).items():
        sums.setdefault(model, Counter()).update(counts)
    return sums


async def until(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(15):
        while not check():  # noqa: ASYNC110  # nobody sets an event
            await asyncio.sleep(0)


def started(bridge: Following) -> Readers | None:
    """The processes, once it is known what there is to read."""
    assert bridge.follower is not None
    return bridge.follower._readers if bridge.follower._has_history else None


def test_what_processes_read_is_the_truth_and_lines_written_meanwhile_are_served(
    tmp_path: Path, tree: tuple[Path, Truth]
) -> None:
    root, truth = tree

    async def follow() -> None:
        async with following(tmp_path / "state", {str(root): TRANSCRIPTS}, waits=False) as bridge:
            await until(lambda: started(bridge) is not None)
            for at, path in enumerate(sorted(root.rglob("*.jsonl"))[:3]):
                with path.open("ab") as file:
                    file.write(b"\n" + response(f"msg_new{at}", f"req_new{at}", model="live"))
            live = Counter(input=30, output=60, read=0, requests=3)
            assert await stored(bridge) == {**expected(truth), "live": live}
            assert bridge.served("claude_code")["live"]["input"] == 30
            assert bridge.served("claude_code").keys() <= {"live"}
            await until(lambda: bridge.follower is not None and bridge.follower._readers is None)

    asyncio.run(follow())


def codex_store(home: Path) -> tuple[Path, Transcripts, dict[str, Counter[str]]]:
    truth = codex_tree.write_store(home, threads=16, size=900_000)
    return home / "sessions", codex_lines.TRANSCRIPTS, truth


def gemini_store(home: Path) -> tuple[Path, Transcripts, dict[str, Counter[str]]]:
    truth: dict[str, Counter[str]] = {}
    for one in gemini_tree.write_store(home, files=9, size=900_000):
        truth.setdefault(one.model, Counter()).update(input=one.input, output=one.output, read=one.read, requests=1)
    return home, gemini_lines.TRANSCRIPTS, truth


@pytest.mark.parametrize("write", [codex_store, gemini_store])
def test_what_processes_read_of_other_tools_is_the_truth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], tuple[Path, Transcripts, Any]]
) -> None:
    root, tool, truth = write(tmp_path / "home")
    monkeypatch.setattr(transcripts, "read_old", None)  # nothing is left for the bridge to read

    async def follow() -> None:
        async with following(tmp_path / "state", {str(root): tool}, waits=False) as bridge:
            known = {model: Counter({kind: counts[kind] for kind in KINDS}) for model, counts in truth.items()}
            assert await stored(bridge) == known

    asyncio.run(follow())


def test_the_bridge_reads_on_where_a_process_ends(tmp_path: Path, tree: tuple[Path, Truth]) -> None:
    root, truth = tree

    async def follow() -> None:
        async with following(tmp_path / "state", {str(root): TRANSCRIPTS}, waits=False) as bridge:
            await until(lambda: started(bridge) is not None)
            readers = started(bridge)
            assert readers is not None
            readers._processes[0].kill()
            assert await stored(bridge) == expected(truth)

    asyncio.run(follow())


def test_the_bridge_reads_alone_where_no_process_starts(
    tmp_path: Path, tree: tuple[Path, Truth], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, truth = tree
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))

    async def follow() -> None:
        async with following(tmp_path / "state", {str(root): TRANSCRIPTS}, waits=False) as bridge:
            assert await stored(bridge) == expected(truth)

    asyncio.run(follow())


def test_reading_goes_on_after_a_stop_in_between(
    tmp_path: Path, tree: tuple[Path, Truth], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, truth = tree
    read, reads = Readers.read, 0

    async def read_three(readers: Readers, wanted: list[Wanted]) -> list[Chunk]:
        nonlocal reads
        reads += 1
        return await (asyncio.Event().wait() if reads > 3 else read(readers, wanted))  # type: ignore[return-value]

    async def begin() -> None:
        async with following(tmp_path / "state", {str(root): TRANSCRIPTS}, waits=False) as bridge:
            async with asyncio.timeout(15):
                while not await bridge.requests_read():  # noqa: ASYNC110  # nobody sets an event
                    await asyncio.sleep(0)
            assert not all((await bridge.ledger.roots()).values())

    async def go_on() -> None:
        async with following(tmp_path / "state", {str(root): TRANSCRIPTS}, waits=False) as bridge:
            assert await stored(bridge) == expected(truth)

    with monkeypatch.context() as patch:
        patch.setattr(Readers, "read", read_three)
        asyncio.run(begin())
    asyncio.run(go_on())


def test_forks_and_renames_of_unread_history_are_history(
    tmp_path: Path, tree: tuple[Path, Truth], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What begins later is served at once, while all else waits for the history that it may be a copy of."""
    root, truth = tree
    read, may_read = Readers.read, asyncio.Event()
    looked_ms = START_MS + 10**10
    shutil.rmtree(root / "p\udcff")  # where there is one, there are no events

    async def read_later(readers: Readers, wanted: list[Wanted]) -> list[Chunk]:
        await may_read.wait()
        return await read(readers, wanted)

    async def follow() -> None:
        async with following(tmp_path / "state", {str(root): TRANSCRIPTS}, waits=False) as bridge:
            await until(lambda: started(bridge) is not None)
            first, second, *_ = sorted(path for path in root.glob("-home*/*.jsonl") if path.stat().st_size > 1000)
            old = first.read_bytes()
            (first.parent / "fork.jsonl").write_bytes(
                old[: old.rindex(b"\n", 0, -1) + 1].replace(b'"sessionId":"', b'"sessionId":"f')
            )
            second.rename(second.with_name("renamed.jsonl"))
            new = response("msg_live", "req_live", model="live", timestamp=timestamp(looked_ms + 1))
            (first.parent / "new.jsonl").write_bytes(new)
            await until(lambda: "live" in bridge.served("claude_code"))
            may_read.set()
            live = Counter(input=10, output=20, read=0, requests=1)
            known = {model: counts for model, counts in expected(truth).items() if model != "odd"}
            assert await stored(bridge) == {**known, "live": live}
            assert bridge.served("claude_code").keys() == {"live"}

    monkeypatch.setattr(Readers, "read", read_later)
    monkeypatch.setattr(Ledger, "now_ms", lambda _: looked_ms, raising=False)
    asyncio.run(follow())


def test_a_process_ends_with_its_input() -> None:
    done = subprocess.run([sys.executable, "-m", "bridge.reading"], stdin=subprocess.DEVNULL, timeout=30, check=False)
    assert done.returncode == 0
