"""The ledger: posts data points, each exactly once, and knows what is committed.

Law: the database is the truth. One thread, the writer, owns it: it takes all requests that wait, decides what
each point adds, writes all of it in one transaction (group commit) and answers after the commit returned. What
the event loop sees, the projection, moves only then. After a failed commit the writer's memory is thrown away
and, unless the disk was merely full, the state is read again from disk.

Identities. A stream is metric, scope name, all point attributes and the three service.* identity attributes of
the resource. A delta point of a stream with a writer (session.id or service.instance.id) is named by stream,
start, time and value; one without is only protected by the hash of its request's body. A cumulative run is named
by stream and start time. After a crash: what was acknowledged is there; the rest may be, with its identity.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from time import perf_counter
from typing import Any, NamedTuple

import msgspec

from bridge.bookkeeper import Bookkeeper, Change, LedgerSettings, Post
from bridge.model import Batch, Exemplar, Observation, Receipt
from bridge.store import MetricRow, SeriesRow, Snapshot, Store, StoreUnavailable, TargetRow

MAX_GROUP = 256
"""Requests that share one commit."""
MAX_SCRAPERS = 64


class Series(msgspec.Struct):
    """One series of the projection. `labels` is the cache of whoever renders it; the exemplar is the newest."""

    row: SeriesRow
    labels: str = ""
    exemplar: Exemplar | None = None


class _Request(NamedTuple):
    post: Post
    answer: "asyncio.Future[Receipt]"


class _Job(NamedTuple):
    """Something else to do in a transaction of its own."""

    work: Callable[[], Any]
    answer: "asyncio.Future[Any]"


class Ledger:
    """The event loop's side of the ledger: `post`, and the projection of what is committed.

    `failed` is called, in the event loop, when the writer thread ended with an error that is no StoreUnavailable.
    """

    def __init__(
        self,
        store: Store,
        settings: LedgerSettings,
        clock_ms: Callable[[], int],
        failed: Callable[[BaseException], None],
    ) -> None:
        self._store = store
        self._settings = settings
        self._clock_ms = clock_ms
        self._failed = failed
        self._queue: SimpleQueue[_Request | _Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self.ready = False
        self.healthy = True
        self.commits = 0
        self.metrics: dict[int, MetricRow] = {}
        self.families: dict[int, dict[int, Series]] = {}
        self.count = 0
        self.totals: dict[str, int] = {}
        self.targets: dict[tuple[str, str], TargetRow] = {}
        self.scrapers: dict[str, int] = {}
        self.observers: list[Callable[[Observation], None]] = []

    # --- the event loop's side ---

    async def start(self) -> None:
        """Load the state; returns when the projection is complete. Raises what Store.open raises."""
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._stopped: asyncio.Future[None] = self._loop.create_future()
        self._thread.start()
        await self._started

    async def post(self, batch: Batch, body: bytes) -> Receipt:
        """Count the points of one request body; returns after the commit. Raises StoreUnavailable."""
        answer: asyncio.Future[Receipt] = self._loop.create_future()
        self._queue.put(_Request(Post(batch, body), answer))
        return await answer

    async def run(self, work: Callable[[], Any]) -> Any:
        """Run `work` in the writer thread in a transaction of its own. Raises StoreUnavailable."""
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._queue.put(_Job(work, answer))
        return await answer

    async def forget(self) -> int:
        """Delete the identities of writers that were silent for the retention time; their number."""
        before = self._clock_ms() - self._settings.retention_ms
        writers: int = await self.run(lambda: self._store.forget(before))
        return writers

    def expire(self) -> int:
        """Take series out of the projection whose last point is older than the expiry; their number."""
        before = self._clock_ms() - self._settings.expiry_ms
        gone = [row for row in self.rows() if row.expires and row.seen < before]
        for row in gone:
            del self.families[row.metric][row.id]
        self.count -= len(gone)
        return len(gone)

    def rows(self) -> Iterator[SeriesRow]:
        """All series of the projection."""
        return (series.row for family in self.families.values() for series in family.values())

    async def note_scraper(self, key: str, shown: int) -> None:
        """Remember, on disk, the commit that a scraper is about to be shown. Raises StoreUnavailable."""
        now = self._clock_ms()
        await self.run(lambda: self._store.write_scraper(key, shown, now, MAX_SCRAPERS))
        self.scrapers[key] = shown
        while len(self.scrapers) > MAX_SCRAPERS:
            del self.scrapers[next(iter(self.scrapers))]

    async def stop(self) -> None:
        """Post what waits, checkpoint, close."""
        if self._thread.is_alive():
            self._queue.put(None)
            await self._stopped

    def _load(self, snapshot: Snapshot) -> None:
        self.metrics = {row.id: row for row in snapshot.metrics}
        self.families = {}
        for row in snapshot.series:
            self.families.setdefault(row.metric, {})[row.id] = Series(row)
        self.count = len(snapshot.series)
        self.totals = snapshot.totals
        self.targets = {(row.job, row.instance): row for row in snapshot.targets}
        self.scrapers = snapshot.scrapers
        self.commits = snapshot.commits
        self.ready = True

    def _publish(self, change: Change, seconds: float) -> None:
        self.metrics.update((row.id, row) for row in change.metrics)
        for row in change.series:
            family = self.families.setdefault(row.metric, {})
            known = family.get(row.id)
            if known is None:
                known = family[row.id] = Series(row)
                self.count += 1
            else:
                known.row = row
            known.exemplar = change.exemplars.get(row.id, known.exemplar)
        self.totals.update(change.totals)
        for target in change.targets:
            self.targets[target.job, target.instance] = target
        self.commits = change.commits
        for observe in self.observers:
            observe(Observation(seconds, change.limited))

    # --- the writer's side ---

    def _run(self) -> None:
        bookkeeper = Bookkeeper(self._store, self._settings, self._clock_ms, self._live)
        call = self._loop.call_soon_threadsafe
        try:
            snapshot = bookkeeper.open()
        except BaseException as error:
            call(self._started.set_exception, error)
            call(self._stopped.set_result, None)
            return
        call(self._load, snapshot)
        call(self._started.set_result, None)
        try:
            self._serve(bookkeeper)
        except BaseException as error:  # a fault of ours: whoever supervises has to start afresh
            call(self._failed, error)
        finally:
            self._store.close()
            call(self._stopped.set_result, None)

    def _live(self, metric: int) -> tuple[int, int]:
        """Series shown: of a metric, and in all. Read from the writer thread; a commit's lag does not matter."""
        return len(self.families.get(metric, ())), self.count

    def _serve(self, bookkeeper: Bookkeeper) -> None:
        stopping = False
        while not stopping:
            group: list[_Request] = []
            jobs: list[_Job] = []
            waiting = [self._queue.get()]
            while len(waiting) < MAX_GROUP and not self._queue.empty():
                waiting.append(self._queue.get())
            for task in waiting:
                match task:
                    case None:
                        stopping = True
                    case _Request():
                        group.append(task)
                    case _Job():
                        jobs.append(task)
            if group:
                self._answer(bookkeeper, group)
            for job in jobs:
                self._do(bookkeeper, job)

    def _answer(self, bookkeeper: Bookkeeper, group: list[_Request]) -> None:
        began = perf_counter()
        try:
            self._restore(bookkeeper)
            receipts, change = bookkeeper.post([request.post for request in group])
        except StoreUnavailable as error:
            self._refuse(bookkeeper, error, [request.answer for request in group])
            return
        seconds = perf_counter() - began
        self._loop.call_soon_threadsafe(self._finish, group, receipts, change, seconds)

    def _finish(self, group: list[_Request], receipts: list[Receipt], change: Change | None, seconds: float) -> None:
        self.healthy = True
        if change is not None:
            self._publish(change, seconds)
        for request, receipt in zip(group, receipts, strict=True):
            _resolve(request.answer, receipt)

    def _do(self, bookkeeper: Bookkeeper, job: _Job) -> None:
        try:
            self._restore(bookkeeper)
            result = bookkeeper.do(job.work)
        except StoreUnavailable as error:
            self._refuse(bookkeeper, error, [job.answer])
            return
        self._loop.call_soon_threadsafe(self._finish_job, job, result)

    def _finish_job(self, job: _Job, result: Any) -> None:
        self.healthy = True
        _resolve(job.answer, result)

    def _restore(self, bookkeeper: Bookkeeper) -> None:
        """After a failure the disk says what the state is: a failed sync may have reached it after all."""
        if bookkeeper.is_lost:
            self._loop.call_soon_threadsafe(self._load, bookkeeper.restore())

    def _refuse(self, bookkeeper: Bookkeeper, error: StoreUnavailable, answers: "list[asyncio.Future[Any]]") -> None:
        bookkeeper.lose(error)
        with contextlib.suppress(StoreUnavailable):  # then the next transaction tries again
            self._restore(bookkeeper)
        self._loop.call_soon_threadsafe(self._fail, answers, error)

    def _fail(self, answers: "list[asyncio.Future[Any]]", error: StoreUnavailable) -> None:
        self.healthy = False
        for answer in answers:
            if not answer.done():
                answer.set_exception(error)


def _resolve(answer: "asyncio.Future[Any]", result: Any) -> None:
    if not answer.done():
        answer.set_result(result)
