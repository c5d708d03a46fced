"""Schedules of the ledger's core, one seed each: retries, repeats, other batches, crashes, faults, clocks and expiry.

The core is the bookkeeper on the store, without threads, sockets and files: its database is in memory, and a crash is
an exception at the n-th call of the storage, before or after it was done. Its sender repeats what was not answered.
The oracle is the one of test_ledger_properties: sets and dictionaries that never fail.
"""

import os
import sqlite3
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

import msgspec

from bridge.bookkeeper import Bookkeeper, LedgerSettings, Post
from bridge.database import DATABASE
from bridge.ledger import refuse_damaged
from bridge.model import DataPoint, Drop, Receipt
from bridge.state import StoreUnavailable
from bridge.store import Store
from bridge.tools import known
from bridge.usage import UsageBooks, no_price
from tests.rigs.progress import Progress
from tests.test_cases import Body
from tests.test_ledger_properties import (
    CUMULATIVE,
    HOUR_MS,
    TOKENS,
    TYPES,
    Oracle,
    body_of,
    point,
    session_of,
)
from tests.test_store import disk_full, io_error

_LABELS = msgspec.json.Decoder(list[tuple[str, str]])

SESSIONS = ("s1", "s2", "s3", "")
STEPS = (9, 18)
MAX_POINTS = 15
SECONDS, LEAST_SEEDS = 3_600, 20_000
"""A campaign's time, and what it has to have done by then on a slow machine."""
CHUNK = 500
"""Seeds that a process takes at a time."""


class Crash(BaseException):
    """The process is killed here."""


class Storage:
    """A database in memory that outlives the process. The n-th call from `fail` on crashes or fails."""

    def __init__(self, template: bytes) -> None:
        self.raw = sqlite3.connect(":memory:", isolation_level=None)
        if template:
            self.raw.deserialize(template)
        self.calls = 0
        self._nth = 0
        self._error: BaseException | None = None
        self._is_late = False

    def fail(self, nth: int, error: BaseException | None, *, is_late: bool) -> None:
        self.calls, self._nth, self._error, self._is_late = 0, nth, error, is_late

    def execute(self, sql: str, parameters: Any = ()) -> sqlite3.Cursor:
        return self._around(self.raw.execute, sql, parameters)

    def executemany(self, sql: str, rows: Any) -> sqlite3.Cursor:
        return self._around(self.raw.executemany, sql, rows)

    def _around(self, run: Any, sql: str, rest: Any) -> sqlite3.Cursor:
        self.calls += 1
        error = self._error if self.calls == self._nth else None
        if error is not None and not self._is_late:
            raise error
        cursor: sqlite3.Cursor = run(sql, rest)
        if error is not None:
            cursor.close()
            raise error
        return cursor

    def end_of_process(self) -> None:
        self.fail(0, None, is_late=False)
        if self.raw.in_transaction:
            self.raw.rollback()

    def close(self) -> None:
        """Not yet: the next process opens it."""

    @property
    def total_changes(self) -> int:
        return self.raw.total_changes

    @property
    def in_transaction(self) -> bool:
        return self.raw.in_transaction


class Counts(NamedTuple):
    """What schedules did: seeds, points posted, crashes and faults."""

    seeds: int = 0
    points: int = 0
    crashes: int = 0
    faults: int = 0

    def __add__(self, other: object) -> "Counts":
        assert isinstance(other, Counts)
        return Counts(*map(sum, zip(self, other, strict=True)))


class Schedule:
    """The life of one ledger and of those who send to it."""

    def __init__(self, seed: int, directory: Path, template: bytes = b"") -> None:
        self.choose = Random(seed)
        self.storage = Storage(template)
        self.directory = directory
        self.now = 1_800_000_000_000
        self.oracle = Oracle(self.now)
        self.bodies: list[Body] = []
        self.points: list[DataPoint] = []
        self.crashes = self.faults = self.posted = 0
        self.start()

    def start(self) -> None:
        self.store = Store(self.directory, lambda _: cast("sqlite3.Connection", self.storage))
        usage = UsageBooks(self.store, no_price, str, known.REPORTING)
        self.core = Bookkeeper(
            self.store, LedgerSettings(), lambda: self.now, lambda *_: (0, 0, 0), usage, refuse_damaged
        )  # fmt: skip
        self.core.open(None, lambda *_: False)

    def run(self) -> Counts:
        for _ in range(self.choose.randint(*STEPS)):
            self.step()
            self.check()
        self.start()
        self.check()
        self.storage.raw.close()
        return Counts(1, self.posted, self.crashes, self.faults)

    def step(self) -> None:
        choose = self.choose
        match choose.choices(("new", "again", "regroup", "clock", "forget", "restart"), (40, 18, 18, 12, 8, 4))[0]:
            case "new":
                self.send([self.new_body() for _ in range(choose.choice((1, 1, 1, 2, 3)))])
            case "again" if self.bodies:
                self.send(choose.choices(self.bodies, k=choose.choice((1, 1, 2))))
            case "regroup" if self.points:
                points = choose.choices(self.points, k=choose.randint(1, MAX_POINTS))
                self.send([body_of(points, salt=choose.randrange(1 << 30))])
            case "clock":
                hours = choose.choice((1, 12, 25, 100, 200, 24 * 366, -1, -30, -24 * 366))
                self.now += hours * HOUR_MS
                self.oracle.now = self.now
            case "forget":
                self.reliably(lambda: self.core.do(lambda: self.store.forget(self.now - LedgerSettings().retention_ms)))
                self.oracle.forget()
            case "restart":
                self.start()

    def new_body(self) -> Body:
        choose = self.choose
        points = [self.new_point() for _ in range(choose.randint(1, MAX_POINTS))]
        body = body_of(points, salt=len(self.bodies))
        self.bodies.append(body)
        self.points += [each for each in points if each.metric is CUMULATIVE or session_of(each)]
        return body

    def new_point(self) -> DataPoint:
        choose = self.choose
        start, length = choose.randint(1, 6), choose.randint(0, 6)
        kind, value = choose.choice(TYPES), choose.randint(0, 30)
        if choose.random() < 0.25:
            return point(CUMULATIVE, kind, "", start, start + length, value)
        return point(TOKENS, kind, choose.choice(SESSIONS), start, start + length, value)

    # --- sending ---

    def send(self, bodies: list[Body]) -> None:
        """Post a group until it is answered; the oracle hears of it as often as it reached the disk."""
        self.posted += sum(len(body.batch.points) for body in bodies)
        commits = self.core.commits
        group = [Post(body.batch, body.data) for body in bodies]
        receipts = self.reliably(lambda: self.core.post(group)[0])
        was_there = self.has_reached and self.core.commits >= commits
        expected = [self.oracle.post(body) for body in bodies]
        if was_there:
            return  # answered as repeats of themselves
        for body, receipt, (accepted, too_old) in zip(bodies, receipts, expected, strict=True):
            if all(each.metric is TOKENS for each in body.batch.points):
                assert receipt.accepted == accepted
            refused = [refusal.reason for refusal in receipt.refused]
            assert refused == [Drop.TOO_OLD] * too_old

    def reliably(self, work: Any) -> list[Receipt]:
        """Do it until it is done; now and then the process is killed, or the disk fails, somewhere in between."""
        self.has_reached = False
        if self.choose.random() < 0.35:
            error = self.choose.choice((Crash(), Crash(), io_error(), disk_full()))
            self.storage.fail(self.choose.randint(1, 60), error, is_late=self.choose.random() < 0.5)
        before = self.commits_on_disk()
        try:
            result: list[Receipt] = work()
            self.storage.fail(0, None, is_late=False)
            return result
        except Crash:
            self.crashes += 1
            self.storage.end_of_process()
            self.start()
        except StoreUnavailable as error:
            self.faults += 1
            self.storage.fail(0, None, is_late=False)
            self.core.lose(error)
            self.core.restore()
        self.has_reached = self.commits_on_disk() > before
        return cast("list[Receipt]", work())

    def commits_on_disk(self) -> int:
        ((commits,),) = self.storage.raw.execute("select commits from meta")
        return int(commits)

    # --- comparing ---

    def check(self) -> None:
        """What stands in the database is what the oracle says."""
        totals = dict(self.storage.raw.execute("select name, value from total where value"))
        assert totals == +self.oracle.totals, f"{totals} is not {+self.oracle.totals}"
        shown = {}
        sql = "select labels, value, base from series join series_value using (id)"
        for labels, value, base in self.storage.raw.execute(sql):
            pairs = dict(_LABELS.decode(labels))
            shown[pairs.get("session.id", ""), pairs["type"]] = (value, base)
        expected = {
            series: (lifetime, self.oracle.base[series]) for series, lifetime in self.oracle.lifetime.items()
        }  # fmt: skip
        assert {series: pair for series, pair in shown.items() if any(pair)} == {
            series: pair for series, pair in expected.items() if any(pair)
        }


def run_seeds(first: int, count: int) -> Counts:
    """Schedules of a range of seeds, in a directory of their own. Raises AssertionError that names the seed."""
    with TemporaryDirectory() as name:
        directory = Path(name)
        (directory / DATABASE).touch()
        template = Schedule(0, directory).storage.raw.serialize()
        counts = Counts()
        for seed in range(first, first + count):
            try:
                counts += Schedule(seed, directory, template).run()
            except Exception as error:
                raise AssertionError(f"seed {seed}: {error!r}") from error
        return counts


def test_every_schedule_adds_up_to_the_oracle(campaign: bool) -> None:
    if not campaign:
        counts = run_seeds(1, 80)
        assert counts.crashes > 20
        assert counts.faults > 10
        return
    total, deadline = 100_000, time.monotonic() + SECONDS
    progress = Progress("schedules", total)
    counts = Counts()
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for found in pool.map(run_seeds, range(0, total, CHUNK), [CHUNK] * (total // CHUNK)):
            counts += found
            progress.tell(counts.seeds, counts)
            if time.monotonic() > deadline:
                pool.shutdown(cancel_futures=True)
                break
    progress.end(counts)
    assert counts.seeds >= LEAST_SEEDS
