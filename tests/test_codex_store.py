"""A store of Codex under a running bridge: plain and packed, archived and brought back, history and live."""

import asyncio
import sys
from collections import Counter
from pathlib import Path

import pytest

from bridge import transcripts
from bridge.model import Batch, DataPoint, Drop, Histogram, Kind, Metric, Temporality
from bridge.tools.codex_lines import TOOL, TRANSCRIPTS
from tests.codex_tree import Style, Thread, World, truth, without_turns
from tests.following import PATIENCE, Following, following

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


class Store:
    """A `CODEX_HOME`, and the roots in it."""

    def __init__(self, home: Path) -> None:
        home = home.resolve()
        self.sessions, self.archived = home / "sessions", home / "archived_sessions"
        self.sessions.mkdir(parents=True)
        self.archived.mkdir()
        self.roots = dict.fromkeys(TRANSCRIPTS.roots({"CODEX_HOME": str(home)}, ""), TRANSCRIPTS)

    def put(self, thread: Thread) -> Path:
        """Write a rollout as it is now."""
        path = self.sessions / thread.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(thread.content)
        return path

    def put_packed(self, thread: Thread) -> Path:
        """Write a rollout as packed, never plain."""
        path = self.sessions / f"{thread.file}.zst"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(zstd.compress(thread.content))
        return path


def packed(path: Path) -> Path:
    """The rollout is packed, as Codex does it: another file, and the plain one goes away."""
    made = path.with_name(f"{path.name}.zst")
    made.write_bytes(zstd.compress(path.read_bytes()))
    path.unlink()
    return made


def plain(path: Path) -> Path:
    made = path.with_suffix("")
    made.write_bytes(zstd.decompress(path.read_bytes()))
    path.unlink()
    return made


def thread(seed: int, requests: int = 5, tells: str = "records") -> Thread:
    world = World(seed, Style(tells=tells))
    return Thread(world).work(world.decide() for _ in range(requests))


async def told(bridge: Following) -> dict[str, Counter[str]]:
    """By model, what the requests add up to, history included."""
    sums: dict[str, Counter[str]] = {}
    for (_, model), counts in (await bridge.requests()).items():
        sums.setdefault(model, Counter()).update(counts)
    return sums


def expected(*threads: Thread) -> dict[str, Counter[str]]:
    return {
        model: Counter({kind: count for kind, count in counts.items() if kind != "written"})
        for model, counts in truth(threads).items()
    }


async def shows(bridge: Following, *threads: Thread) -> None:
    await bridge.until_read()
    assert await told(bridge) == expected(*threads)


@pytest.mark.parametrize("is_history", [True, False])
def test_a_rollout_counts_once_wherever_it_goes(tmp_path: Path, is_history: bool) -> None:
    store, one = Store(tmp_path / "codex"), thread(1)

    async def story() -> None:
        path = store.put(one) if is_history else None
        async with following(tmp_path / "state", store.roots) as bridge:
            path = path or store.put(one)
            await shows(bridge, one)
            path = packed(path)
            await shows(bridge, one)
            path = path.rename(store.archived / path.name)
            await shows(bridge, one)
            path = plain(path).rename(store.put(one))
            await shows(bridge, one)
            one.work([one.world.decide()])
            store.put(one)
            await shows(bridge, one)
            served = sum((counts for counts in bridge.served(TOOL).values()), Counter())
            assert served["requests"] == (1 if is_history else 6)

    asyncio.run(story())


@pytest.mark.parametrize("is_history", [True, False])
def test_a_packed_rollout_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_history: bool) -> None:
    monkeypatch.setattr(transcripts, "CHUNK", 2000)
    monkeypatch.setattr("bridge.packed.BLOCK", 700)
    store, one = Store(tmp_path / "codex"), thread(2, 40)
    child = without_turns(one).work([one.world.decide()])

    async def story() -> None:
        files = [*map(store.put_packed, (one, child))] if is_history else []
        async with following(tmp_path / "state", store.roots) as bridge:
            files = files or [*map(store.put_packed, (one, child))]
            await shows(bridge, one, child)
        async with following(tmp_path / "state", store.roots) as bridge:
            await shows(bridge, one, child)

    asyncio.run(story())


def test_what_stands_before_damage_counts(tmp_path: Path) -> None:
    store, one, two = Store(tmp_path / "codex"), thread(3), thread(4)

    async def story() -> None:
        path = store.put_packed(one)
        path.write_bytes(path.read_bytes() + b"damage")
        async with following(tmp_path / "state", store.roots) as bridge:
            await shows(bridge, one)
            path = store.put_packed(two)
            path.write_bytes(path.read_bytes() + b"damage")
            await shows(bridge, one, two)
            assert bridge.telemetry.transcript_errors._value.get() >= 2

    asyncio.run(story())


def test_without_a_library_packed_rollouts_wait_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, old, new, readable = Store(tmp_path / "codex"), thread(5), thread(6), thread(7)

    async def story() -> None:
        store.put_packed(old)
        with monkeypatch.context() as changed:
            changed.setitem(sys.modules, "backports" if sys.version_info < (3, 14) else "compression", None)
            async with following(tmp_path / "state", store.roots) as bridge:
                store.put_packed(new)
                store.put(readable)
                async with asyncio.timeout(PATIENCE):
                    while (known := await told(bridge)) != expected(readable):
                        assert not known
                        await asyncio.sleep(0.01)
                assert "backports.zstd is not installed" in [getattr(one, "error", "") for one in caplog.records]
        async with following(tmp_path / "state", store.roots) as bridge:
            await shows(bridge, old, new, readable)
            served = sum((counts for counts in bridge.served(TOOL).values()), Counter())
            assert served["requests"] == 10  # what was there at the first look is history still

    asyncio.run(story())


def test_limits_are_shown(tmp_path: Path) -> None:
    store, one = Store(tmp_path / "codex"), thread(8)

    async def story() -> None:
        async with following(tmp_path / "state", store.roots) as bridge:
            store.put(one)
            await bridge.until_read()
            names = {metric.name for metric in bridge.ledger.metrics.values()}
            assert {"ai.limit.used", "ai.limit.reset.timestamp"} <= names

    asyncio.run(story())


@pytest.mark.parametrize(("tokens", "reason"), [(10**9, None), (10**9 + 1, Drop.IMPLAUSIBLE)])
def test_absurd_sums_of_the_token_metric_are_refused(tmp_path: Path, tokens: int, reason: Drop | None) -> None:
    metric = Metric("codex.turn.token_usage", Kind.HISTOGRAM, Temporality.DELTA)
    attributes = (("model", "gpt-5.5"), ("token_type", "output"))
    point = DataPoint(metric, attributes, 1, 2, Histogram((), (1,), 1, float(tokens)))

    async def story() -> None:
        async with following(tmp_path / "state") as bridge:
            receipt = await bridge.ledger.post(Batch([point], []), b"body")
            assert [refused.reason for refused in receipt.refused] == ([reason] if reason else [])
            assert bridge.served(TOOL).get("gpt-5.5", Counter())["output"] == (0 if reason else tokens)

    asyncio.run(story())
