"""The ledger: posts data points, each exactly once, and knows what is committed.

Law: the database is the truth. One thread, the writer, owns it: it takes a group of requests, decides what each
point adds, writes all of it in one transaction (group commit) and answers after the commit returned. What arrives
meanwhile is the next group. What the event loop sees, the projection, moves only after a commit. After a failed one
the writer's memory is thrown away and, unless the disk was merely full, the state is read again from disk.

Identities. A stream is metric, scope name, all point attributes and the three service.* identity attributes of
the resource. A delta point of a stream with a writer (session.id or service.instance.id) is named by stream,
start, time and value; one without is only protected by the hash of its request's body. A cumulative run is named
by stream and start time. After a crash: what was acknowledged is there; the rest may be, with its identity.
"""

import asyncio
import contextlib
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from math import ceil
from pathlib import PurePath
from queue import SimpleQueue
from time import monotonic, perf_counter
from typing import Any, NamedTuple

import msgspec

from bridge.bookkeeper import Bookkeeper, Change, LedgerSettings, Post, Recover, source_of
from bridge.mark import Floors, Mark, Shown, series_name, state_of, write_mark
from bridge.model import Batch, DataPoint, Exemplar, Kind, Observation, Receipt, TranscriptRow, Usage
from bridge.rows import MetricRow, SeriesRow, Snapshot, TargetRow
from bridge.state import Damaged, StoreUnavailable
from bridge.store import Store
from bridge.tools import known
from bridge.tools.transcripts import TRANSCRIPTS
from bridge.usage import Price, Survey, UsageBooks, UsageChange, no_price
from bridge.usage_store import ModelRow, ServedRow

MAX_GROUP = 256
"""Requests that share one commit."""
MAX_GROUP_POINTS = 4_000
"""Data points beyond which no more requests join a group, so that one commit stays short."""
GATHER_SECONDS = 0.01
"""How long the first request of a group waits for others, at most."""
GATHER_TURNS = 3
"""Turns of the event loop without another request after which nobody is waited for: who was just answered is quick."""
MAX_PART = 250
"""Data points of one body that share a transaction. A larger body is posted part by part, and what others send goes
between; the parts are named by the body and their number, so this cannot change without a new schema."""
USAGE_POINTS = 4
"""A request that an event tells of takes as long as so many data points."""
MAX_SCRAPERS = 64
MAX_FAILURES, FAILURE_SECONDS = 3, 60.0
"""Failures of the disk within that time after which a new process has to look at it."""
COUNTING = frozenset({Kind.COUNTER.value, Kind.HISTOGRAM.value, Kind.EXPONENTIAL.value})
"""Kinds of metrics whose series must not fall while the bridge shows them."""


class Series(msgspec.Struct):
    """One series of the projection. The exemplar is the newest.

    `labels`, `text` and `openmetrics` belong to whoever renders it; the latter two are emptied when it changes.
    `floor` is what it showed before the database went back, until it has caught up; `name` is its name in the mark.
    """

    row: SeriesRow
    labels: str = ""
    text: bytes = b""
    openmetrics: bytes = b""
    exemplar: Exemplar | None = None
    floor: Shown | None = None
    name: bytes = b""


class Unpostable(Exception):
    """What a request holds brings out a fault of the bridge's own, whose kind and place the text says.

    None of it counts; the requests beside it do.
    """


class _Request(NamedTuple):
    post: Post
    answer: "asyncio.Future[Receipt]"


class _Job(NamedTuple):
    """Something else to do in a transaction of its own."""

    work: Callable[[], Any]
    answer: "asyncio.Future[Any]"


def refuse_damaged(damage: Damaged) -> bool:
    """The recovery of those who have none."""
    raise damage


class Ledger:
    """The event loop's side of the ledger: `post`, and the projection of what is committed.

    `failed` is called, in the event loop, when the writer thread ended with an error, or when the disk failed
    MAX_FAILURES times in short order. `recover` is asked, in the writer thread, what to do about a damaged database.
    """

    def __init__(
        self,
        store: Store,
        settings: LedgerSettings,
        clock_ms: Callable[[], int],
        failed: Callable[[BaseException], None],
        price: Price = no_price,
        normalise: Callable[[str], str] = str,
        mark: Mark | None = None,
        recover: Recover = refuse_damaged,
    ) -> None:
        self._store = store
        self._usage = UsageBooks(
            store,
            price,
            normalise,
            known.REPORTING,
            followed=frozenset(TRANSCRIPTS),
            asked=known.ASKED,
            hides_sessions=settings.hides_sessions,
        )
        self._settings = settings
        self._clock_ms = clock_ms
        self._failed = failed
        self._queue: SimpleQueue[list[_Request] | _Job | None] = SimpleQueue()
        self._arrived: deque[_Request] = deque()
        self._gathers_until = 0.0
        self._is_posting = False
        self._last_group = 0
        self._turn = asyncio.Lock()
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._mark = mark
        self._recover = recover
        self._failures: list[float] = []
        self._marking = threading.Lock()
        self._marked = self._committed = 0
        self.floors = Floors(mark)
        self.lost = 0
        self.ready = False
        self._loaded = asyncio.Event()
        self.healthy = True
        self.commits = 0
        self.metrics: dict[int, MetricRow] = {}
        self.families: dict[int, dict[int, Series]] = {}
        self.count = 0
        self.appeared = 0
        """How often a series appeared in the projection."""
        self.sources: Counter[str] = Counter()
        self.totals: dict[str, int] = {}
        self.targets: dict[tuple[str, str], TargetRow] = {}
        self.scrapers: dict[str, int] = {}
        self.served: dict[tuple[int, str], ServedRow] = {}
        self.models: dict[int, ModelRow] = {}
        self.unpriced: dict[int, int] = {}
        self.observers: list[Callable[[Observation], None]] = []

    # --- the event loop's side ---

    async def start(self) -> None:
        """Load the state; returns when the projection is complete. Raises what Store.open raises."""
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._stopped: asyncio.Future[None] = self._loop.create_future()
        self._thread.start()
        await self._started
        self.ready = True
        self._loaded.set()  # here, so that nobody is answered before the caller has told what became of the state

    def now_ms(self) -> int:
        """The time as the ledger takes it, in Unix ms."""
        return self._clock_ms()

    async def wait_ready(self, seconds: float) -> bool:
        """Wait until the state is loaded, but not longer than `seconds`; whether it is."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._loaded.wait()
        return self.ready

    async def post(self, batch: Batch, body: bytes, source: str = "") -> Receipt:
        """Count the points of one request body, which came with the token `source`; returns after the commit. Raises
        StoreUnavailable and Unpostable; of a large body the parts before may count then."""
        post = Post(batch, body, source=source)
        if _weight(batch) <= MAX_PART:
            return await self._post(post)
        receipts = []
        parts = _parts(post)
        for part in parts:
            try:
                async with self._turn:
                    receipts.append(await self._post(part))
            except asyncio.CancelledError:
                self._post_unanswered((part, *parts))
                raise
        accepted, duplicate = (sum(counts) for counts in zip(*(receipt[:2] for receipt in receipts), strict=True))
        return Receipt(accepted, duplicate, tuple(refusal for receipt in receipts for refusal in receipt.refused))

    def _post_unanswered(self, parts: Iterable[Post]) -> None:
        """What is left of a body whose sender is gone, as at the stop: it was accepted, and may not come again."""
        for part in parts:
            answer: asyncio.Future[Receipt] = self._loop.create_future()
            answer.cancel()
            self._arrived.append(_Request(part, answer))
        if not self._is_posting:
            self._begin_group()

    async def _post(self, post: Post) -> Receipt:
        request = _Request(post, self._loop.create_future())
        self._arrived.append(request)
        if len(self._arrived) == 1 and not self._is_posting:
            self._begin_group()
        return await request.answer

    def _begin_group(self) -> None:
        """Gather what comes with the first request that waits. A lone sender's need not wait for others."""
        self._is_posting = True
        self._gathers_until = self._loop.time() + GATHER_SECONDS
        if self._last_group == 1 and len(self._arrived) == 1:
            self._hand_over()
        else:
            self._gather(0, GATHER_TURNS)

    def _gather(self, count: int, turns: int) -> None:
        """Hand a group to the writer when the loop has turned some times without another request."""
        if len(self._arrived) > count:
            count, turns = len(self._arrived), GATHER_TURNS
        if turns and count < MAX_GROUP and self._loop.time() < self._gathers_until:
            self._loop.call_soon(self._gather, count, turns - 1)
        elif self._arrived:
            self._hand_over()

    def _hand_over(self) -> None:
        group: list[_Request] = []
        points = 0
        while self._arrived and len(group) < MAX_GROUP and points < MAX_GROUP_POINTS:
            group.append(self._arrived.popleft())
            points += _weight(group[-1].post.batch)
        self._last_group = len(group)
        group[-1].answer.add_done_callback(self._end_group)
        self._queue.put(group)

    def _end_group(self, _: "asyncio.Future[Receipt]") -> None:
        self._is_posting = False
        if self._arrived:
            self._begin_group()

    async def forget_requests(self, days: float) -> int:
        """Delete request rows older than `days`, a thousand a transaction; their number. Sums and keys stay."""
        before = self._clock_ms() - int(days * 86_400_000)
        gone = 0
        while count := await self.run(lambda: self._usage.forget_rows(before, 1_000)):
            gone += count
        return gone

    async def post_transcript(
        self, row: TranscriptRow, usages: tuple[Usage, ...], points: tuple[DataPoint, ...], *, is_history: bool
    ) -> TranscriptRow:
        """Count what a transcript says, and remember how far it is read. Raises StoreUnavailable and Unpostable."""
        await self._post(Post(Batch(list(points), [], usages), b"", row, is_history))
        return row if row.id else row._replace(id=-1)

    def post_history(
        self, pieces: Iterable[tuple[TranscriptRow, tuple[Usage, ...]]]
    ) -> "list[asyncio.Future[Receipt]]":
        """Count pieces of history, all in one transaction; an answer for each, which may raise what `post_transcript`
        raises."""
        posts = [Post(Batch([], [], usages), b"", row, is_history=True) for row, usages in pieces]
        requests = [_Request(post, self._loop.create_future()) for post in posts]
        if requests:
            self._queue.put(requests)
        return [request.answer for request in requests]

    async def transcripts(self) -> list[TranscriptRow]:
        """The transcripts that were read, and how far. Raises StoreUnavailable."""
        rows: list[TranscriptRow] = await self.run(self._usage.transcripts)
        return rows

    async def roots(self) -> dict[str, bool]:
        """The roots that were looked at, and whether their history is read. Raises StoreUnavailable."""
        roots: dict[str, bool] = await self.run(self._usage.roots)
        return roots

    async def add_root(self, path: str, rows: list[TranscriptRow]) -> list[TranscriptRow]:
        """Remember the first look at a root. Raises StoreUnavailable."""
        written: list[TranscriptRow] = await self.run(lambda: self._usage.add_root(path, rows))
        return written

    async def survey(self) -> Survey:
        """How the sources agree. Raises StoreUnavailable."""
        survey: Survey = await self.run(self._usage.survey)
        return survey

    async def finish_history(self) -> None:
        """All history is read. Raises StoreUnavailable."""
        await self.run(self._usage.finish_history)

    async def run(self, work: Callable[[], Any]) -> Any:
        """Run `work` in the writer thread in a transaction of its own. Raises StoreUnavailable."""
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._queue.put(_Job(work, answer))
        return await answer

    async def forget(self) -> int:
        """Delete the identities of writers that were silent for the retention time, some at a time; their number."""
        before = self._clock_ms() - self._settings.retention_ms
        gone = 0
        while count := await self.run(lambda: self._store.forget(before)):
            gone += count
        return gone

    async def probe(self) -> None:
        """See whether the disk takes commits again, if it did not. Raises StoreUnavailable."""
        if not self.healthy:
            await self.run(self._store.touch)
            self.healthy = True

    def expire(self) -> int:
        """Take series out of the projection whose last point is older than the expiry; their number."""
        before = self._clock_ms() - self._settings.expiry_ms
        gone = [row for row in self.rows() if row.expires and row.seen < before]
        for row in gone:
            series = self.families[row.metric].pop(row.id)
            if series.floor is not None:
                self.floors.drop(series_name(self.metrics[row.metric], row))
        self.count -= len(gone)
        self.sources.subtract(source_of(row) for row in gone)
        self.floors.forget(before)
        return len(gone)

    def rows(self) -> Iterator[SeriesRow]:
        """All series of the projection."""
        return (series.row for family in self.families.values() for series in family.values())

    def shown_to(self, scraper: str) -> int | None:
        """The commit that a scraper's last answer showed; None for one that is not known."""
        return self.scrapers.get(scraper)

    def note_shown(self, scraper: str, commit: int) -> None:
        """Remember what a scraper is shown; of too many, whoever scraped longest ago is forgotten."""
        self.scrapers.pop(scraper, None)
        self.scrapers[scraper] = commit
        if len(self.scrapers) > MAX_SCRAPERS:
            del self.scrapers[next(iter(self.scrapers))]

    async def commit_shown(self, scraper: str, commit: int) -> None:
        """The same, on disk, for the scrapers that memory knows and this one. Raises StoreUnavailable."""
        self.note_shown(scraper, commit)
        scrapers = list(self.scrapers.items())
        now = self._clock_ms()
        await self.run(lambda: self._store.write_scrapers(scrapers, now))

    @property
    def shown_totals(self) -> Mapping[str, int]:
        """The lifetime totals, held up where the database has gone back."""
        return self.floors.lift(self.totals)

    async def write_mark(self, database: int = 0) -> None:
        """Bring the mark beside the database up to date, if something was committed, or there is a checksum of the
        database, which is closed then. Raises StoreUnavailable."""
        commits = max(self.commits, self._committed)
        has_served = self.totals or self.count or self.served
        if not self.ready or not has_served or (commits == self._marked and not database):
            return
        families = [(self.metrics[metric], list(family.values())) for metric, family in self.families.items()]
        joined = [(self.models[row.model], row) for row in self.served.values()]
        mark = Mark(
            commits,
            dict(self.shown_totals),
            tuple((model.tool, model.name, row.kind, row.value) for model, row in joined),
            self.floors.lost,
            tuple(self.scrapers),
            database,
        )
        await asyncio.to_thread(self._write_mark, mark, families)

    def _write_mark(self, mark: Mark, families: list[tuple[MetricRow, list[Series]]]) -> None:
        """In a thread of its own: the rows that it reads are never changed, only replaced by later ones."""
        for metric, members in families:
            if metric.kind in COUNTING:
                for series in members:
                    name = series.name = series.name or series_name(metric, series.row)
                    mark.series[name] = state_of(series.row, series.floor)
        with self._marking:
            if mark.commits > self._marked or mark.database:  # else one that was begun later was faster
                write_mark(self._store.path.parent, mark)
                self._marked = mark.commits

    async def stop(self) -> None:
        """Post what waits, checkpoint, close."""
        if self._thread.is_alive():
            while self._arrived:
                self._hand_over()
            self._queue.put(None)
            await self._stopped

    def _load(self, snapshot: Snapshot, usage: UsageChange) -> None:
        self.metrics = {row.id: row for row in snapshot.metrics}
        self.families = {}
        for row in snapshot.series:
            series = self.families.setdefault(row.metric, {})[row.id] = Series(row)
            series.floor = self._floor_of(series)
        self.floors.forget(self._clock_ms() - self._settings.expiry_ms)
        self.count = len(snapshot.series)
        self.appeared += self.count
        self.sources = Counter(map(source_of, snapshot.series))
        self.totals = snapshot.totals
        self.floors.reach(self.totals)
        self.targets = {(row.job, row.instance): row for row in snapshot.targets}
        # Memory may be ahead of the disk: what a scraper was shown without a 0 is not noted there.
        for key, shown in snapshot.scrapers.items():
            self.scrapers[key] = max(shown, self.scrapers.get(key, 0))
        self._note_usage(usage)
        self.commits = snapshot.commits

    def _note_usage(self, usage: UsageChange) -> None:
        self.models.update((row.id, row) for row in usage.models)
        self.unpriced.update(usage.unpriced)
        self.served.update(((row.model, row.kind), row) for row in usage.served)

    def _raise(self, series: Series, row: SeriesRow) -> None:
        """A held series goes on; one that left and came back is a new counter."""
        if row.born != series.row.born:
            self.floors.drop(series_name(self.metrics[row.metric], row))
        series.row = row
        series.floor = self._floor_of(series)

    def _floor_of(self, series: Series) -> Shown | None:
        """The floor that a series needs. It is named for that, which the mark needs as well and takes its time."""
        if not self.floors.has_series:
            return None
        name = series.name = series.name or series_name(self.metrics[series.row.metric], series.row)
        return self.floors.find(name, series.row)

    def _publish(self, change: Change, seconds: float) -> None:
        self.metrics.update((row.id, row) for row in change.metrics)
        for row in change.series:
            family = self.families.setdefault(row.metric, {})
            known = family.get(row.id)
            if known is None:
                known = family[row.id] = Series(row)
                known.floor = self._floor_of(known)
                self.count += 1
                self.appeared += 1
                self.sources[source_of(row)] += 1
            elif known.floor is not None:
                self._raise(known, row)
            else:
                known.row = row
            known.text = known.openmetrics = b""
            exemplar = change.exemplars.get(row.id)
            if exemplar is not None and (known.exemplar is None or exemplar.time >= known.exemplar.time):
                known.exemplar = exemplar
        self.totals.update(change.totals)
        self.floors.reach(change.totals)
        for target in change.targets:
            self.targets[target.job, target.instance] = target
        self._note_usage(change.usage)
        self.commits = change.commits
        for observe in self.observers:
            observe(Observation(seconds, change.limited))

    # --- the writer's side ---

    def _run(self) -> None:
        bookkeeper = Bookkeeper(self._store, self._settings, self._clock_ms, self._live, self._usage, self._recover)
        call = self._loop.call_soon_threadsafe
        try:
            loaded = bookkeeper.open(self._mark, self.floors.knows)
            self.lost = bookkeeper.lost
        except BaseException as error:
            call(self._stopped.set_result, None)
            call(self._started.set_exception, error)  # last: the loop may end on it
            return
        call(self._load, *loaded)
        call(self._started.set_result, None)
        self._mark = None
        del loaded  # what it holds of all series would stay as long as this thread
        try:
            self._serve(bookkeeper)
        except BaseException as error:  # a fault of ours: whoever supervises has to start afresh
            call(self._failed, error)
        finally:
            self._store.close()
            call(self._stopped.set_result, None)

    def _live(self, metric: int, source: str) -> tuple[int, int, int]:
        """Series shown: of a metric, of a source, and in all. Read from the writer thread; a commit's lag does not
        matter."""
        return len(self.families.get(metric, ())), self.sources[source], self.count

    def _serve(self, bookkeeper: Bookkeeper) -> None:
        while (task := self._queue.get()) is not None:
            if isinstance(task, _Job):
                self._do(bookkeeper, task)
            else:
                self._answer(bookkeeper, task)

    def _answer(self, bookkeeper: Bookkeeper, group: list[_Request]) -> None:
        began = perf_counter()
        try:
            self._restore(bookkeeper)
            receipts, change = bookkeeper.post([request.post for request in group])
        except StoreUnavailable as error:
            self._refuse(bookkeeper, error, [request.answer for request in group])
            return
        except OSError as error:  # what is loaded when it is first needed could not be
            self._refuse(
                bookkeeper, StoreUnavailable(str(error), disk_full=True), [request.answer for request in group]
            )
            return
        except Exception as error:  # a fault of ours; what others sent must not be lost for what one did
            bookkeeper.forget()
            if len(group) > 1:
                for request in group:
                    self._answer(bookkeeper, [request])
            else:
                self._loop.call_soon_threadsafe(_reject, group[0].answer, Unpostable(_place_of(error)))
            return
        seconds = perf_counter() - began
        self._loop.call_soon_threadsafe(self._finish, group, receipts, change, seconds)

    def _finish(self, group: list[_Request], receipts: list[Receipt], change: Change | None, seconds: float) -> None:
        if change is not None:  # else nothing was written, which proves nothing
            self.healthy = True
            self._publish(change, seconds)
        for request, receipt in zip(group, receipts, strict=True):
            _resolve(request.answer, receipt)

    def _do(self, bookkeeper: Bookkeeper, job: _Job) -> None:
        try:
            self._restore(bookkeeper)
            before = bookkeeper.commits
            result = bookkeeper.do(job.work)
        except StoreUnavailable as error:
            self._refuse(bookkeeper, error, [job.answer])
            return
        self._loop.call_soon_threadsafe(self._finish_job, job, result, bookkeeper.commits, bookkeeper.commits > before)

    def _finish_job(self, job: _Job, result: Any, commits: int, has_written: bool) -> None:
        self.healthy |= has_written
        self._committed = commits
        _resolve(job.answer, result)

    def _restore(self, bookkeeper: Bookkeeper) -> None:
        """After a failure the disk says what the state is: a failed sync may have reached it after all."""
        if bookkeeper.is_lost:
            self._loop.call_soon_threadsafe(self._load, *bookkeeper.restore())

    def _refuse(self, bookkeeper: Bookkeeper, error: StoreUnavailable, answers: "list[asyncio.Future[Any]]") -> None:
        bookkeeper.lose(error)
        with contextlib.suppress(StoreUnavailable):  # then the next transaction tries again
            self._restore(bookkeeper)
        if not error.disk_full:
            now = monotonic()
            self._failures = [*(then for then in self._failures if now - then < FAILURE_SECONDS), now]
            if len(self._failures) >= MAX_FAILURES:
                self._loop.call_soon_threadsafe(self._failed, error)
        self._loop.call_soon_threadsafe(self._fail, answers, error)

    def _fail(self, answers: "list[asyncio.Future[Any]]", error: StoreUnavailable) -> None:
        self.healthy = False
        for answer in answers:
            _reject(answer, error)


def _weight(batch: Batch) -> int:
    """How long a batch takes to post, in data points."""
    return len(batch.points) + USAGE_POINTS * len(batch.usages)


def _parts(post: Post) -> Iterator[Post]:
    """A large post in parts of about MAX_PART."""
    batch = post.batch
    count = ceil(_weight(batch) / MAX_PART)
    points, usages = ceil(len(batch.points) / count), ceil(len(batch.usages) / count)
    name = blake2b(post.body).digest()
    for at in range(count):
        part = batch._replace(
            points=batch.points[at * points : (at + 1) * points],
            usages=batch.usages[at * usages : (at + 1) * usages],
            refused=[] if at else batch.refused,
        )
        yield post._replace(batch=part, body=name + at.to_bytes(4))


def _place_of(error: Exception) -> str:
    """Where an error was raised, without the values that it tells of: `TypeError at usage.py:123`."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {PurePath(frame.filename).name}:{frame.lineno}"


def _reject(answer: "asyncio.Future[Any]", error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)


def _resolve(answer: "asyncio.Future[Any]", result: Any) -> None:
    if not answer.done():
        answer.set_result(result)
