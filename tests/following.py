"""A ledger and a follower of transcripts in the test's own process, and what stands in their database."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

from bridge import reading
from bridge.bookkeeper import LedgerSettings
from bridge.ledger import Ledger
from bridge.model import Batch, Event
from bridge.pricing import normalise_model
from bridge.store import Store
from bridge.telemetry import Telemetry, Throttle
from bridge.tools import known
from bridge.tools.tool import Transcripts
from bridge.transcripts import Follower
from bridge.usage_store import UsageStore

PATIENCE = 15.0
Sums = dict[tuple[str, str], Counter[str]]


class Following:
    """A running bridge without its sockets."""

    def __init__(self, state: Path, ledger: Ledger, follower: Follower | None, telemetry: Telemetry) -> None:
        self.state = state
        self.ledger = ledger
        self.follower = follower
        self.telemetry = telemetry
        self._bodies = 0

    async def tell(self, batch: Batch) -> None:
        """Post a batch under a body of its own."""
        self._bodies += 1
        await self.ledger.post(batch, str(self._bodies).encode())

    async def tell_events(self, events: Iterable[Event]) -> None:
        usages, points, refused = known.read_events(events)
        await self.tell(Batch(points, refused, tuple(usages)))

    async def requests(self) -> Sums:
        """By session and model: tokens of requests, history included, and how many."""
        store = UsageStore(self.ledger._store)
        sql = (
            "select s.name, m.name, sum(input), sum(output), sum(cache_read), sum(requests) from rollup"
            " join session s on s.id = session join model m on m.id = model where requests group by 1, 2"
        )
        rows = await self.ledger.run(lambda: store._store.execute(sql).fetchall())
        names = ("input", "output", "read", "requests")
        return {(row[0], row[1]): Counter(dict(zip(names, row[2:], strict=True))) for row in rows}

    async def requests_read(self) -> int:
        """How many rows of requests there are, summed up or not."""
        ((count,),) = await self.ledger.run(lambda: self.ledger._store.execute("select count(*) from usage").fetchall())
        return int(count)

    def served(self, tool: str) -> dict[str, Counter[str]]:
        """What is served of a tool: model -> kind -> value."""
        found: dict[str, Counter[str]] = {}
        for (model, kind), row in self.ledger.served.items():
            name = self.ledger.models[model]
            if name.tool == tool:
                found.setdefault(name.name, Counter())[kind] = row.value
        return found

    async def until_looked(self) -> None:
        """Wait until all roots were looked at and their history is read."""
        roots = len(self.follower._roots) if self.follower is not None else 0
        async with asyncio.timeout(PATIENCE):
            while len(looked := await self.ledger.roots()) < roots or not all(looked.values()):
                assert self._task is not None
                assert not self._task.done(), self._task
                await asyncio.sleep(0.01)

    async def until_read(self) -> None:
        """Wait until all transcripts are read as they are."""
        deadline = time.monotonic() + PATIENCE
        while unread := await asyncio.to_thread(self._unread):
            assert time.monotonic() < deadline, unread
            await asyncio.sleep(0.01)

    def _unread(self) -> list[str]:
        unread = []
        assert self.follower is not None
        for root, tool in self.follower._roots.items():
            for path, _ in reading.files(root, tool):
                row = self.follower._files.get(path)
                content = Path(path).read_bytes()
                is_whole = tool.is_document(path) or path.endswith(".zst")
                end = len(content) if is_whole else content.rfind(b"\n") + 1
                is_read = row is not None and row.live == end and row.history >= row.history_end
                if row is None or not is_read or (is_whole and row.head != _version(path)):
                    unread.append(path)
        return unread

    _task: "asyncio.Task[None] | None" = None


def _version(path: str) -> bytes:
    return reading.version(Path(path).stat())


@asynccontextmanager
async def following(
    state: Path,
    roots: dict[str, Transcripts] | None = None,
    price: Callable[[object], int | None] = lambda _: 0,
    *,
    waits: bool = True,
) -> AsyncIterator[Following]:
    """Run until the block ends; the state stays. `roots`: no transcripts without. `waits`: history is read first."""

    def fail(error: BaseException) -> None:
        raise AssertionError from error

    await asyncio.to_thread(state.mkdir, exist_ok=True)
    ledger = Ledger(
        Store(state), LedgerSettings(), lambda: time.time_ns() // 10**6, fail, price=price, normalise=normalise_model
    )
    await ledger.start()
    throttle = Throttle(time.monotonic)
    telemetry = Telemetry(time.time, throttle)
    follower = Follower(ledger, roots, telemetry, throttle) if roots else None
    bridge = Following(state, ledger, follower, telemetry)
    if follower is not None:
        bridge._task = asyncio.create_task(follower.run())
    try:
        if waits:
            await bridge.until_looked()
        yield bridge
    finally:
        if bridge._task is not None:
            bridge._task.cancel()
            await asyncio.gather(bridge._task, return_exceptions=True)
        await ledger.stop()
