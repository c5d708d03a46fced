"""After a restored backup, a lost WAL or a lost database: what was served before is the floor.

Law under test: no total and no counter is ever shown lower than it was, nothing is added to make up for what is
gone, nothing that a scraper has seen is shown to it at 0 again, and no state begins at 0 by itself.
"""

import asyncio
import os
import re
import shutil
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from bridge.copies import back_up
from bridge.database import DATABASE
from bridge.ledger import Ledger
from bridge.mark import Floors, Mark, MarkUnreadable, Shown, held_up, is_held, read_mark, series_name, write_mark
from bridge.model import ExponentialHistogram, Histogram, Value
from bridge.rows import MetricRow, SeriesRow
from bridge.state import SERVED, Damaged, StoreUnavailable
from bridge.store import Store
from bridge.values import add, classic, highest
from tests.daemon import PROTOBUF, Daemon
from tests.prometheus import Prometheus, run_prometheus, scrape_config, wait_for
from tests.recordings import delta_body
from tests.test_backup import COMMITS, MakeDaemon, commit, restore, run_backup
from tests.test_cases import Rig, body_of, read_point, value_of
from tests.test_increase import growth, series_of
from tests.xrg_reader import XRG

WRAPPED = 2**31
"""XRG shows a fall as a rate near 2**32."""
HOUR_MS = 3_600_000


class MarkedRig(Rig):
    """A rig whose ledger goes on from the mark in its directory, as the daemon's does."""

    def make_ledger(self) -> Ledger:
        store, mark = Store(self.directory, self._connect), read_mark(self.directory)
        return Ledger(store, self.settings, lambda: self.now_ms, self.failed, mark=mark)

    async def _start(self) -> None:
        self.ledger = self.make_ledger()
        await self.ledger.start()

    def mark(self) -> None:
        self.call(self.ledger.write_mark())

    def send(self, *points: str) -> None:
        self.post(body_of([read_point(point) for point in points]))

    def back_up(self) -> Path:
        file = self.directory.parent / "backup.db"
        file.unlink(missing_ok=True)
        back_up(self.directory, file)
        return file

    def restore(self, file: Path) -> None:
        """Stop in order, with a mark, and start from an older database."""
        self.stop()
        self.mark()
        for path in self.directory.glob(f"{DATABASE}*"):
            path.unlink()
        shutil.copy(file, self.directory / DATABASE)
        self.start()

    @property
    def held(self) -> dict[str, Any]:
        """What every counter shows, floors and all."""
        return {
            self.name_of(series.row): value_of(series.row)
            if series.floor is None
            else held_up(series.row.value or 0, series.floor)
            for family in self.ledger.families.values()
            for series in family.values()
        }

    @property
    def held_totals(self) -> dict[str, int]:
        return {name: value for name, value in self.ledger.shown_totals.items() if value}


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[MarkedRig]:
    rig = MarkedRig(tmp_path)
    rig.start()
    yield rig
    rig.close()


def tokens(session: str, start: int, amount: int) -> str:
    return f"{{session: {session}, type: input, start: {start}, time: {start + 60}, delta: {amount}}}"


def shown_of(session: str) -> str:
    return f'claude_code.token.usage{{session.id="{session}",type="input"}}'


# --- values ----------------------------------------------------------------------------------------------------

BOUNDS = st.lists(st.integers(-5, 5).map(float), max_size=4, unique=True).map(lambda bounds: tuple(sorted(bounds)))


@st.composite
def histograms(draw: st.DrawFn) -> Histogram:
    bounds = draw(BOUNDS)
    counts = tuple(draw(st.lists(st.integers(0, 5), min_size=len(bounds) + 1, max_size=len(bounds) + 1)))
    return Histogram(bounds, counts, sum(counts), float(sum(counts)))


@st.composite
def exponentials(draw: st.DrawFn) -> ExponentialHistogram:
    buckets = st.lists(st.integers(0, 5), max_size=5).map(tuple)
    positive, negative, zeros = draw(buckets), draw(buckets), draw(st.integers(0, 3))
    offsets = st.integers(-3, 3)
    count = sum(positive) + sum(negative) + zeros
    return ExponentialHistogram(
        draw(st.integers(0, 2)), zeros, 0.0, draw(offsets), positive, draw(offsets), negative, count, float(count)
    )


def cumulative(histogram: Histogram, bounds: tuple[float, ...]) -> list[int]:
    """The count at or below each bound, read as Prometheus reads buckets: of the largest bound that is not above."""
    counts = dict(zip(histogram.bounds, accumulate(histogram.counts), strict=False))
    return [max((count for at, count in counts.items() if at <= bound), default=0) for bound in bounds]


@given(st.one_of(st.tuples(histograms(), histograms()), st.tuples(exponentials(), exponentials())))
def test_of_two_states_the_highest_is_below_neither_anywhere(states: tuple[Value, Value]) -> None:
    top, *others = map(in_buckets, (highest(*states), *states))
    assert sum(top.counts) == top.count == max(state.count for state in others)
    assert min(top.counts) >= 0
    for state in others:
        common = tuple(bound for bound in state.bounds if bound in top.bounds)
        assert all(a >= b for a, b in zip(cumulative(top, common), cumulative(state, common), strict=True))


def in_buckets(value: Value) -> Histogram:
    """A histogram as /metrics shows it."""
    shown = classic(value) if isinstance(value, ExponentialHistogram) else value
    assert isinstance(shown, Histogram)
    return shown


@given(st.one_of(st.tuples(histograms(), histograms()), st.tuples(st.integers(0, 99), st.integers(0, 99))))
def test_a_later_state_is_higher_than_an_earlier_one_everywhere(states: tuple[Value, Value]) -> None:
    earlier, more = states
    later = add(earlier, more)
    assert highest(later, earlier) == later
    assert highest(later, 0) == later
    assert highest(0, later) == later


# --- the file --------------------------------------------------------------------------------------------------

METRIC = MetricRow(1, "m", "counter", "", 1, "")
ROW = SeriesRow(7, 1, "job", "", (("a", "b"),), expires=False, base=0, born=1, birth=0, value=5, time=0, seen=1)
HISTOGRAM = Histogram((1.0,), (1, 2), 3, 4.5)
MARK = Mark(
    3,
    {"usd": 7},
    (("claude_code", "opus", "input", 5),),
    {series_name(METRIC, ROW): Shown(5, 0.5, 1), b"h": Shown(HISTOGRAM, 0, 1)},
    ("a",),
)


def test_a_mark_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_mark(tmp_path) is None
    write_mark(tmp_path, MARK)
    assert read_mark(tmp_path) == MARK
    assert [path.name for path in tmp_path.iterdir()] == [SERVED]
    assert stat.S_IMODE((tmp_path / SERVED).stat().st_mode) == 0o600


def test_a_mark_that_was_cut_or_changed_is_not_believed(tmp_path: Path) -> None:
    write_mark(tmp_path, MARK)
    whole = (tmp_path / SERVED).read_bytes()
    for at in range(len(whole)):
        for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]):
            (tmp_path / SERVED).write_bytes(damaged)
            with pytest.raises(MarkUnreadable):
                read_mark(tmp_path)


def test_a_mark_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    write_mark(tmp_path, MARK)
    (tmp_path / f"{SERVED}.new").mkdir()
    with pytest.raises(StoreUnavailable, match=SERVED):
        write_mark(tmp_path, MARK)
    assert read_mark(tmp_path) == MARK


# --- what is held up -------------------------------------------------------------------------------------------


def test_without_a_restore_nothing_is_held(rig: MarkedRig) -> None:
    rig.send(tokens("a", 0, 5))
    rig.mark()
    rig.send(tokens("a", 60, 5))
    rig.stop()
    rig.start()
    assert rig.ledger.lost == 0
    assert len(rig.ledger.floors) == 0
    assert rig.held == {shown_of("a"): 10}


def test_after_a_restore_counters_stand_still_until_they_have_caught_up(rig: MarkedRig) -> None:
    rig.send(tokens("a", 0, 5))
    backup = rig.back_up()
    rig.send(tokens("a", 60, 20))
    rig.send(tokens("b", 60, 7))
    commits = rig.ledger.commits
    rig.restore(backup)
    assert rig.ledger.lost == 2
    assert rig.ledger.commits == commits + 1
    assert (rig.held, rig.held_totals) == ({shown_of("a"): 25}, {"tokens.input": 32})

    for restarts in range(2):  # the floor outlives a restart
        rig.send(tokens("a", 1000 + restarts * 60, 4))
        assert (rig.held, rig.held_totals) == ({shown_of("a"): 25}, {"tokens.input": 32})
        rig.stop()
        rig.mark()
        rig.start()
        assert rig.ledger.lost == 0

    rig.send(tokens("b", 60, 7))  # what was lost is sent again
    assert rig.held == {shown_of("a"): 25, shown_of("b"): 7}
    rig.send(tokens("a", 60, 20))
    assert (rig.held, rig.held_totals) == (
        {shown_of("a"): 33, shown_of("b"): 7},
        {"tokens.input": 40},
    )
    assert len(rig.ledger.floors) == 0


def test_a_session_that_is_gone_comes_back_at_what_it_showed(rig: MarkedRig) -> None:
    rig.send(tokens("a", 0, 5))
    backup = rig.back_up()
    rig.send(tokens("b", 0, 7))
    rig.restore(backup)
    rig.send(tokens("b", 60, 2))
    assert rig.held[shown_of("b")] == 7
    rig.send(tokens("b", 120, 9))
    assert rig.held[shown_of("b")] == 11


def test_a_session_that_is_gone_and_stays_away_comes_back_as_a_new_counter(rig: MarkedRig) -> None:
    rig.send(tokens("a", 0, 5))
    backup = rig.back_up()
    rig.send(tokens("b", 0, 7))
    rig.restore(backup)
    rig.now_ms += 25 * HOUR_MS
    rig.ledger.expire()
    rig.send(tokens("b", 60, 2))
    assert rig.held[shown_of("b")] == 2


def test_a_counter_that_had_begun_anew_is_not_taken_for_its_earlier_life(rig: MarkedRig) -> None:
    """It showed 100 when the backup was made, left, came back and showed 5: then 100 would be growth by 95."""
    rig.send(tokens("a", 0, 100))
    backup = rig.back_up()
    rig.now_ms += 25 * HOUR_MS
    rig.ledger.expire()
    rig.send(tokens("a", 60, 5))
    assert rig.held[shown_of("a")] == 5
    rig.now_ms -= 2 * HOUR_MS  # so that the restored row has not expired
    rig.restore(backup)
    assert rig.held == {shown_of("a"): 5}
    rig.send(tokens("a", 60, 5))
    rig.send(tokens("a", 120, 3))
    assert rig.held == {shown_of("a"): 8}
    assert rig.held_totals == {"tokens.input": 108}

    rig.now_ms += 25 * HOUR_MS
    rig.ledger.expire()
    rig.send(tokens("a", 180, 1))
    assert rig.held == {shown_of("a"): 1}
    assert len(rig.ledger.floors) == 0


def test_a_floor_of_an_earlier_life_holds_nothing() -> None:
    floor = Shown(105, 0, 0)
    assert is_held(replace(ROW, value=60, base=0), floor)
    assert not is_held(replace(ROW, value=70, base=60), floor)
    floors = Floors(Mark(1, {}, (), {series_name(METRIC, ROW): floor}, ()))
    assert floors.find(series_name(METRIC, ROW), replace(ROW, value=70, base=60)) is None
    assert len(floors) == 0


def test_the_floor_of_an_updown_sum_or_a_gauge_is_none(rig: MarkedRig) -> None:
    rig.send("{metric: load, session: a, time: 60, gauge: 9}", "{metric: open, session: a, time: 60, updown_delta: 9}")
    backup = rig.back_up()
    rig.send("{metric: load, session: a, time: 90, gauge: 20}", "{metric: open, session: a, time: 90, updown_delta: 9}")
    rig.restore(backup)
    assert set(rig.held.values()) == {9}


def test_scrapers_have_seen_what_is_restored(rig: MarkedRig) -> None:
    rig.send(tokens("a", 0, 5))
    rig.call(rig.ledger.commit_shown("early", rig.ledger.commits))
    rig.send(tokens("b", 0, 5))
    backup = rig.back_up()
    rig.call(rig.ledger.commit_shown("late", rig.ledger.commits))
    rig.restore(backup)
    assert set(rig.ledger.scrapers.values()) == {rig.ledger.commits}
    assert set(rig.ledger.scrapers) == {"early", "late"}
    assert max(row.born for row in rig.ledger.rows()) < rig.ledger.commits
    rig.send(tokens("c", 0, 5))
    assert max(row.born for row in rig.ledger.rows()) == rig.ledger.commits


def test_joined_counters_of_models_go_on_where_they_were(rig: MarkedRig) -> None:
    opus = "{session: a, type: input, model: claude-opus-4-5, start: %d, time: %d, delta: %d}"
    rig.send(opus % (0, 60, 5))
    backup = rig.back_up()
    rig.send(opus % (60, 120, 20))

    def served() -> dict[str, int]:
        return {row.kind: row.value for row in rig.ledger.served.values() if row.value}

    before = served()
    rig.restore(backup)
    assert served() == before


def test_whatever_is_left_of_the_wal_nothing_is_shown_lower(rig: MarkedRig) -> None:
    """SQLite takes the WAL up to its first bad frame and says nothing: cut anywhere, or one bit flipped."""
    rig.restart()  # the schema stands in the database, all that follows in the WAL
    for number in range(12):
        rig.send(tokens(f"s{number % 3}", number * 60, 5), tokens("all", number * 60, 1))
    rig.mark()
    before, totals = rig.held, rig.held_totals
    image = rig.image()
    shutil.copy(rig.directory / SERVED, image / SERVED)
    wal = (image / f"{DATABASE}-wal").read_bytes()
    lost = set()
    for at in range(0, len(wal), len(wal) // 40):
        for damaged in (wal[:at], wal[:at] + bytes([wal[at] ^ 1]) + wal[at + 1 :]):
            rig.stop()
            rig.directory = next(rig._directories)
            shutil.copytree(image, rig.directory)
            (rig.directory / f"{DATABASE}-wal").write_bytes(damaged)
            rig.start()
            lost.add(rig.ledger.lost)
            assert rig.held_totals == totals
            assert all(value == before[name] for name, value in rig.held.items())
            assert rig.ledger.commits >= 12
    assert lost == set(range(1, 13))


def test_a_mark_is_written_only_when_something_was_committed(rig: MarkedRig) -> None:
    rig.mark()
    assert not (rig.directory / SERVED).exists()
    rig.send(tokens("a", 0, 5))
    rig.mark()
    (rig.directory / SERVED).unlink()
    rig.mark()
    assert not (rig.directory / SERVED).exists()


# --- the whole bridge ------------------------------------------------------------------------------------------


def poll(xrg: XRG, daemon: Daemon) -> XRG:
    xrg.poll(daemon.get("/v1/metrics").text)
    assert xrg.rate < WRAPPED, "a total fell"
    return xrg


def use(daemon: Daemon, session: str, amount: int, minute: int) -> None:
    """Tokens and their cost."""
    start = (10**9 + minute * 60) * 10**9
    for metric, value, attributes in (
        ("claude_code.token.usage", amount, {"type": "output", "model": "claude-opus-4-5"}),
        ("claude_code.cost.usage", amount / 1000, {"model": "claude-opus-4-5"}),
    ):
        body = delta_body(metric, [value], {"session.id": session, **attributes}, start)
        assert daemon.post("/v1/metrics", body, PROTOBUF).status == 200


def test_a_database_that_was_changed_while_no_bridge_ran_is_told_of(daemon: Daemon) -> None:
    """Also where only what tells repeats apart has changed, which no counter shows."""
    words = "state.db is not as the bridge left it"
    use(daemon, "a", 100, 0)
    daemon.stop()
    file = daemon.state_dir / DATABASE
    with closing(sqlite3.connect(f"file:{file}?mode=ro&immutable=1", uri=True)) as database:
        ((members,), *_) = database.execute("select members from delta_point")
    daemon.restart()
    assert words not in daemon.log
    daemon.stop()
    file.write_bytes(file.read_bytes().replace(members, bytes([members[0] ^ 1]) + members[1:]))
    daemon.start()
    assert words in daemon.log
    daemon.restart()
    assert daemon.log.count(words) == 1


def test_what_became_of_the_state_is_known_before_anything_is_served(rig: MarkedRig) -> None:
    """Whoever starts the ledger tells the log of it; who waits for the state to be loaded is answered afterwards."""
    rig.stop()
    rig.ledger = rig.make_ledger()

    async def start() -> list[str]:
        order = []

        async def serve() -> None:
            await rig.ledger.wait_ready(10)
            order.append("served")

        waiting = asyncio.ensure_future(serve())
        await asyncio.sleep(0)
        await rig.ledger.start()
        order.append("told")
        await waiting
        return order

    assert rig.call(start()) == ["told", "served"]


def test_xrg_sees_no_fall_and_no_false_growth_after_a_restore(daemon: Daemon) -> None:
    xrg = XRG()
    use(daemon, "a", 100, 0)
    file = daemon.directory / "a.db"
    run_backup(daemon, file)
    use(daemon, "a", 50, 1)
    use(daemon, "b", 25, 2)
    poll(xrg, daemon)
    assert xrg.tokens == 175
    assert xrg.cost == pytest.approx(0.175)
    daemon.stop()
    restore(daemon, file)
    daemon.start()
    assert re.search(r"warning state went back \d+ transactions", daemon.log)
    assert poll(xrg, daemon).rate == 0
    assert xrg.cost == pytest.approx(0.175)
    use(daemon, "a", 50, 1)  # again
    use(daemon, "c", 10, 3)
    assert poll(xrg, daemon).rate == 0
    daemon.kill()
    daemon.start()
    assert daemon.log.count("state went back") == 1
    assert poll(xrg, daemon).rate == 0
    use(daemon, "b", 25, 2)
    assert poll(xrg, daemon).rate == 10
    assert xrg.cost == pytest.approx(0.185)


def test_own_metrics_tell_of_what_is_lost_and_held(daemon: Daemon) -> None:
    commit(daemon, "a", 5)
    file = daemon.directory / "a.db"
    run_backup(daemon, file)
    commit(daemon, "a", 5, minute=1)
    assert daemon.samples("/metrics")["bridge_held"] == "0.0"
    daemon.stop()
    restore(daemon, file)
    daemon.start()
    samples = daemon.samples("/metrics")
    assert float(samples["bridge_state_lost_commits_total"]) >= 1
    assert samples["bridge_held"] == "2.0"
    commit(daemon, "a", 6, minute=2)
    assert daemon.samples("/metrics")["bridge_held"] == "0.0"


def test_a_state_db_without_its_wal_is_caught(daemon: Daemon) -> None:
    """What `cp state.db` takes of a running bridge. The stop of the original says what was served."""
    commit(daemon, "a", 5)
    daemon.restart()  # the first commit stands in state.db, the second one in the WAL
    commit(daemon, "a", 7, minute=1)
    copied = daemon.directory / "copied.db"
    shutil.copy(daemon.state_dir / DATABASE, copied)
    daemon.stop()
    restore(daemon, copied)
    daemon.start()
    assert re.search(r"state went back \d+ transactions", daemon.log)
    assert daemon.samples()[COMMITS] == "12"
    commit(daemon, "a", 7, minute=1)
    commit(daemon, "a", 1, minute=2)
    assert daemon.samples()[COMMITS] == "13"


def test_a_lost_wal_after_a_kill_is_caught_by_the_mark_of_the_last_seconds(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start()
    commit(daemon, "a", 5)
    daemon.restart()
    commit(daemon, "a", 7, minute=1)

    def is_marked() -> bool:
        mark = read_mark(daemon.state_dir)
        return mark is not None and mark.totals["commits"] == 12

    wait_for(is_marked, "the mark to be brought up to date")
    daemon.kill()
    (daemon.state_dir / f"{DATABASE}-wal").unlink()
    daemon.start()
    assert re.search(r"state went back \d+ transactions", daemon.log)
    assert daemon.samples()[COMMITS] == "12"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "gone": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"garbage. " * 5000),
    "half": cut,
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_lost_database_is_never_a_silent_beginning(damage: str, make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start()
    commit(daemon, "a", 5)
    daemon.stop()
    DAMAGES[damage](daemon.state_dir / DATABASE)
    before = {path.name: path.read_bytes() for path in daemon.state_dir.iterdir() if path.name.startswith(DATABASE)}
    daemon.spawn()
    assert daemon.process is not None
    assert daemon.process.wait(20) == os.EX_DATAERR
    assert "restore a backup" in daemon.log
    assert "there is no whole copy; --accept-data-loss begins with what served.bin says" in daemon.log
    after = {path.name: path.read_bytes() for path in daemon.state_dir.iterdir() if path.name.startswith(DATABASE)}
    assert after == before, "the evidence was changed"

    assert (f"remove {SERVED} to begin at 0" in daemon.log) is (damage in ("gone", "empty"))
    daemon.arguments = ("--accept-data-loss",)
    daemon.start()
    assert daemon.samples()[COMMITS] == "5", "what was served is the floor"
    kept = {path.name: path.read_bytes() for path in daemon.state_dir.glob("state.corrupt-*/*")}
    assert {name: kept[name] for name in before} == before
    (told,) = [line for line in daemon.log.splitlines() if line.endswith("the state begins anew")]
    assert ("the database is in state.corrupt-" in told) is bool(before)


@pytest.mark.parametrize("damage", ["gone", "half"])
def test_a_lost_database_is_replaced_by_the_newest_whole_copy(damage: str, daemon: Daemon) -> None:
    commit(daemon, "a", 5)
    for hour in range(2):
        run_backup(daemon, daemon.state_dir / f"state-v1-20260101T0{hour}0000000Z.db")
        commit(daemon, "b", 1, minute=hour)
    (daemon.state_dir / "state-v1-20260102T000000000Z.db").write_bytes(b"no copy")
    daemon.stop()
    DAMAGES[damage](daemon.state_dir / DATABASE)
    lost = [path.read_bytes() for path in daemon.state_dir.glob(DATABASE)]
    daemon.start()
    copy = "state-v1-20260101T010000000Z.db"
    (told,) = [line for line in daemon.log.splitlines() if f"going on from {copy}, as of transaction" in line]
    assert not re.search(r"restore|remove|nothing", told), "nobody has to do anything"
    assert re.search(r"state went back \d+ transactions", daemon.log)
    evidence = [*daemon.state_dir.glob("state.corrupt-*")]
    assert [stat.S_IMODE(path.stat().st_mode) for path in evidence] == [0o700 for _ in lost]
    assert [(path / DATABASE).read_bytes() for path in evidence] == lost
    assert daemon.samples()[COMMITS] == "7", "what was served is the floor"
    commit(daemon, "b", 1, minute=1)
    assert daemon.samples()[COMMITS] == "7", "what was lost, sent again"
    commit(daemon, "b", 1, minute=2)
    assert daemon.samples()[COMMITS] == "8"
    daemon.restart()
    assert daemon.samples()[COMMITS] == "8"


def test_a_damaged_mark_is_one_line_and_no_floor(daemon: Daemon) -> None:
    commit(daemon, "a", 5)
    daemon.stop()
    (daemon.state_dir / SERVED).write_bytes(b"garbage")
    daemon.start()
    assert daemon.log.count(f"{SERVED} is damaged") == 1
    assert daemon.samples()[COMMITS] == "5"


def test_a_first_start_that_served_nothing_leaves_no_mark(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start()
    daemon.stop()
    assert not (daemon.state_dir / SERVED).exists()
    (daemon.state_dir / DATABASE).unlink()
    daemon.start()


def test_prometheus_sees_no_fall_and_no_false_growth_after_a_restore(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    daemon = make_daemon()
    config = scrape_config({"bridge": daemon.port}, interval="250ms")
    with run_prometheus(tmp_path / "prometheus", config) as prometheus:
        daemon.start()
        prometheus.wait_for_scrape("bridge")
        commit(daemon, "old", 5)
        shown(prometheus, "old", 5)
        file = tmp_path / "a.db"
        commit(daemon, "unseen", 4)  # in the backup before the scraper has seen it
        back_up(daemon.state_dir, file)
        commit(daemon, "old", 10, minute=1)
        commit(daemon, "gone", 7)
        shown(prometheus, "old", 15)
        shown(prometheus, "gone", 7)
        shown(prometheus, "unseen", 4)
        daemon.stop()
        restore(daemon, file)
        daemon.start()
        prometheus.wait_for_scrape("bridge")
        commit(daemon, "gone", 7)  # sent again
        commit(daemon, "new", 3)
        shown(prometheus, "new", 3)
        commit(daemon, "old", 10, minute=1)
        commit(daemon, "old", 2, minute=2)
        shown(prometheus, "old", 17)
        prometheus.wait_for_scrape("bridge")
        for session, truth in {"old": 17, "unseen": 4, "gone": 7, "new": 3}.items():
            samples = prometheus.samples(series_of(session))
            values = [sample.value for sample in samples]
            assert all(after >= before for before, after in pairwise(values)), (session, values)
            assert values[0] == 0, (session, values)
            assert growth(samples) == truth, (session, values)


def shown(prometheus: Prometheus, session: str, value: int) -> None:
    wait_for(
        lambda: [sample.value for sample in prometheus.samples(series_of(session))][-1:] == [value],
        f"{session} to be stored as {value}",
    )


def test_a_mark_of_ten_thousand_series_is_small_and_soon_written(tmp_path: Path) -> None:
    rows = [replace(ROW, labels=(("session.id", f"{number:032x}"),)) for number in range(10_000)]
    began = time.process_time()
    series = {series_name(METRIC, row): Shown(row.value or 0, row.base, 1_800_000_000_000) for row in rows}
    write_mark(tmp_path, Mark(1, {}, (), series, ()))
    assert time.process_time() - began < 2
    assert (tmp_path / SERVED).stat().st_size < 500_000
    assert read_mark(tmp_path) is not None


def test_text_that_a_flipped_bit_has_made_none_is_damage(rig: MarkedRig) -> None:
    rig.send(tokens("session-of-a-long-name", 0, 5))
    rig.stop()
    path = rig.directory / DATABASE
    path.write_bytes(path.read_bytes().replace(b"session-of-a-long-name", b"session-of-a-long-\xa8ame"))
    with pytest.raises(Damaged, match=r"malformed|Could not decode"):
        rig.start()


def test_a_name_that_its_index_has_otherwise_is_damage(rig: MarkedRig) -> None:
    """Names have no checksum of their own."""
    rig.send("{session: a, type: input, model: claude-opus-4-5, start: 0, time: 60, delta: 5}")
    rig.stop()
    path = rig.directory / DATABASE
    image = path.read_bytes()
    for table, name in (("metric", b"claude_code.token.usage"), ("model", b"claude_codeclaude-opus-4-5")):
        path.write_bytes(image.replace(name, bytes([name[0] ^ 1]) + name[1:], 1))
        with pytest.raises(Damaged, match=f"missing from index sqlite_autoindex_{table}"):
            rig.start()


def test_a_changed_schema_is_damage(rig: MarkedRig) -> None:
    """A flipped bit in the name of a column leaves a database that is whole, and no use."""
    rig.send(tokens("a", 0, 5))
    rig.stop()
    path = rig.directory / DATABASE
    path.write_bytes(path.read_bytes().replace(b"labelled blob not null", b"mabelled blob not null"))
    with pytest.raises(Damaged, match="schema was changed"):
        rig.start()


def test_a_changed_value_is_damage(rig: MarkedRig) -> None:
    for table, column in (("series", "born"), ("series_value", "value"), ("total", "value"), ("served", "value")):
        rig.send("{session: a, type: input, model: claude-opus-4-5, start: 0, time: 60, delta: 5}")
        rig.stop()
        image = rig.directory
        rig.directory = next(rig._directories)
        shutil.copytree(image, rig.directory)
        with closing(sqlite3.connect(rig.directory / DATABASE)) as writer, writer:
            writer.execute(f"update {table} set {column} = {column} + 1")
        with pytest.raises(Damaged, match="a row was changed"):
            rig.start()
        rig.directory = image
        rig.start()


def test_a_missing_or_exchanged_value_is_damage(rig: MarkedRig) -> None:
    rig.send("{session: a, type: input, start: 0, time: 60, delta: 5}")
    rig.send("{session: b, type: input, start: 0, time: 60, delta: 6}")
    rig.stop()
    image = rig.directory
    for sql in (
        "delete from series_value where id = 1",
        "replace into series_value select 1, value, time, seen, proof from series_value where id = 2",
    ):
        rig.directory = next(rig._directories)
        shutil.copytree(image, rig.directory)
        with closing(sqlite3.connect(rig.directory / DATABASE)) as writer, writer:
            writer.execute(sql)
        with pytest.raises(Damaged, match="a row was changed"):
            rig.start()
