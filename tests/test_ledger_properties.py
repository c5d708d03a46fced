"""The ledger's laws, attacked: whatever the batches, the order, the repeats and the crashes, the truth is counted once.

A sender here repeats each body until it is acknowledged, as the real one does for a while. What may happen to a body
on the way is its `Fate`.
"""

import asyncio
import sqlite3
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from enum import Enum
from itertools import accumulate, pairwise
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bridge.bookkeeper import LedgerSettings
from bridge.database import DATABASE
from bridge.ledger import MAX_GROUP, MAX_PART, Ledger
from bridge.model import Batch, DataPoint, Drop, Kind, Metric, Receipt, Resource, Scope, Temporality
from bridge.state import StoreUnavailable
from tests.test_cases import SECOND, Body, Rig, value_of
from tests.test_store import io_error, watched

LAWS = settings(
    max_examples=50,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow],
)

HOUR_MS = 3_600_000

CLAUDE_CODE = Resource((("service.name", "claude-code"),))
TOKENS = Metric(
    "claude_code.token.usage", Kind.COUNTER, Temporality.DELTA, "tokens", "", Scope("s"), CLAUDE_CODE
)  # fmt: skip
COST = msgspec.structs.replace(TOKENS, name="claude_code.cost.usage", unit="USD")
CUMULATIVE = msgspec.structs.replace(TOKENS, temporality=Temporality.CUMULATIVE)

TYPES = ("input", "output")


def point(metric: Metric, type_: str, session: str, start: int, time: int, value: float) -> DataPoint:
    """A data point; times in seconds, no session where it is empty."""
    attributes = (("session.id", session), ("type", type_)) if session else (("type", type_),)
    return DataPoint(metric, attributes, start * SECOND, time * SECOND, value)


def body_of(points: Sequence[DataPoint], salt: int = 0) -> Body:
    """One request; bodies of equal points and salt are byte for byte the same."""
    return Body(Batch(list(points), []), msgspec.msgpack.encode((salt, points)))


# --- what can happen to a body ---------------------------------------------------------------------------------


class Fate(Enum):
    """What happens when a body is posted. In all but the first two its sender gets no answer or a 503, and repeats."""

    ACKNOWLEDGED = "it is answered"
    KILLED_AFTER = "it is answered, then the bridge is killed"
    KILLED_BEFORE_COMMIT = "the bridge is killed before the commit"
    KILLED_AFTER_COMMIT = "the bridge is killed after the commit, before the answer"
    REFUSED = "the commit fails"
    REFUSED_LATE = "the commit is reported as failed but reached the disk"


UNANSWERED = {Fate.KILLED_BEFORE_COMMIT, Fate.KILLED_AFTER_COMMIT, Fate.REFUSED, Fate.REFUSED_LATE}
REACHED_THE_DISK = {Fate.KILLED_AFTER_COMMIT, Fate.REFUSED_LATE}


class Bridge:
    """A rig whose next commit can be given a fate, or one of those after it: so many are spared before."""

    def __init__(self, directory: Path, settings: LedgerSettings | None = None) -> None:
        self.fate = Fate.ACKNOWLEDGED
        self.spared = 0
        self.image: Path | None = None
        self.rig = Rig(directory, settings, connect=watched(self._around))
        self.rig.start()

    def _around(self, sql: str, run: Any) -> Any:
        fate = self.fate
        if sql != "commit" or fate not in UNANSWERED:
            return run()
        if self.spared:
            self.spared -= 1
            return run()
        self.fate = Fate.ACKNOWLEDGED
        if fate in REACHED_THE_DISK:
            run()
        if fate in (Fate.KILLED_BEFORE_COMMIT, Fate.KILLED_AFTER_COMMIT):
            self.image = self.rig.image()
        raise io_error()

    def send(self, body: Body, fate: Fate = Fate.ACKNOWLEDGED) -> Receipt:
        """Post until acknowledged; the receipt of the last try."""
        self.fate, self.image = fate, None
        try:
            receipt = self.rig.post(body)
        except StoreUnavailable:
            assert fate in UNANSWERED
            if self.image is not None:
                self.rig.kill(self.image)
            receipt = self.rig.post(body)
        else:
            assert fate not in UNANSWERED
        if fate is Fate.KILLED_AFTER:
            self.rig.kill()
        return receipt

    def close(self) -> None:
        self.fate = Fate.ACKNOWLEDGED
        self.rig.close()

    @property
    def totals(self) -> dict[str, int]:
        return self.rig.totals

    @property
    def shown(self) -> dict[tuple[str, str], int | float]:
        """What the series show, by session and type."""
        return {
            (labels.get("session.id", ""), labels.get("type", "")): value_of(row)
            for row in self.rig.ledger.rows()
            for labels in [dict(row.labels)]
        }


@contextmanager
def running_bridge(settings: LedgerSettings | None = None) -> Iterator[Bridge]:
    with tempfile.TemporaryDirectory() as directory, closing(Bridge(Path(directory), settings)) as bridge:
        yield bridge


class Delivery(NamedTuple):
    """A body on its way."""

    body: Body
    fate: Fate


def deliver(bridge: Bridge, deliveries: Sequence[Delivery]) -> None:
    """Deliver in order; no total falls meanwhile, and the end is the same after a restart."""
    last: dict[str, int] = {}
    for body, fate in deliveries:
        bridge.send(body, fate)
        assert all(bridge.totals[name] >= total for name, total in last.items())
        last = bridge.totals
    shown = bridge.shown
    bridge.rig.restart()
    assert bridge.totals == last
    assert bridge.shown == shown


@st.composite
def batches_of(draw: st.DrawFn, points: Sequence[DataPoint]) -> list[Delivery]:
    """All points, some of them again, in any order, in any batches, with any fate."""
    again = draw(st.lists(st.sampled_from(points), max_size=8)) if points else []
    order = draw(st.permutations([*points, *again]))
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(order) - 1)), max_size=5)))
    batches = [order[low:high] for low, high in zip([0, *cuts], [*cuts, len(order)], strict=True)]
    # Salted, so that no body is known by its hash.
    return [
        Delivery(body_of(batch, salt), draw(FATES)) for salt, batch in enumerate(batches) if batch
    ]  # fmt: skip


FATES = st.sampled_from(Fate)


def sums(points: Sequence[DataPoint]) -> tuple[dict[tuple[str, str], float], dict[str, float]]:
    """The truth about delta points: by series, and the lifetime totals that are not 0."""
    series: Counter[tuple[str, str]] = Counter()
    totals: Counter[str] = Counter()
    for each in points:
        assert isinstance(each.value, int | float)
        attributes = {key: str(value) for key, value in each.attributes}
        series[attributes.get("session.id", ""), attributes["type"]] += int(each.value)
        totals[f"tokens.{attributes['type']}"] += int(each.value)
    return dict(series), {name: total for name, total in totals.items() if total}


# --- (a) delta points ------------------------------------------------------------------------------------------


def delta_points(sessions: tuple[str, ...]) -> st.SearchStrategy[DataPoint]:
    """Few sessions and moments, so that windows touch, overlap, and share their start or end."""
    return st.builds(
        lambda type_, session, start, length, value: point(TOKENS, type_, session, start, start + length, value),
        st.sampled_from(TYPES), st.sampled_from(sessions), st.integers(1, 4), st.integers(0, 3), st.integers(0, 3),
    )  # fmt: skip


@st.composite
def deltas_with_a_writer(draw: st.DrawFn) -> tuple[list[DataPoint], list[Delivery]]:
    points = draw(st.lists(delta_points(("s1", "s2")), max_size=12, unique_by=repr))
    return points, draw(batches_of(points))


@LAWS
@given(deltas_with_a_writer())
def test_deltas_with_a_writer_count_once_in_any_batches(story: tuple[list[DataPoint], list[Delivery]]) -> None:
    points, deliveries = story
    with running_bridge() as bridge:
        deliver(bridge, deliveries)
        assert (bridge.shown, bridge.totals) == sums(points)


@st.composite
def bodies_without_a_writer(draw: st.DrawFn) -> tuple[list[Body], list[Delivery]]:
    """Distinct bodies, whose points may be equal; each is delivered once or more, byte for byte."""
    contents = draw(st.lists(st.lists(delta_points(("",)), min_size=1, max_size=4), max_size=6))
    bodies = [body_of(points, salt) for salt, points in enumerate(contents)]
    again = draw(st.lists(st.sampled_from(bodies), max_size=6)) if bodies else []
    order = draw(st.permutations([*bodies, *again]))
    return bodies, [Delivery(body, draw(FATES)) for body in order]


@LAWS
@given(bodies_without_a_writer())
def test_bodies_without_a_writer_count_once_each(story: tuple[list[Body], list[Delivery]]) -> None:
    bodies, deliveries = story
    with running_bridge() as bridge:
        deliver(bridge, deliveries)
        assert (bridge.shown, bridge.totals) == sums([each for body in bodies for each in body.batch.points])


# --- (b) delta = cumulative = truth ----------------------------------------------------------------------------


@st.composite
def one_truth_told_twice(draw: st.DrawFn) -> tuple[int, list[Delivery]]:
    """The same increments as deltas of one session and as a cumulative run of another, of which points are lost."""
    increments = draw(st.lists(st.integers(0, 5), min_size=1, max_size=8))
    end = len(increments)
    cuts = sorted(draw(st.sets(st.integers(1, end))) | {0, end})
    deltas = [
        point(TOKENS, "input", "deltas", 1000 + low, 1000 + high, sum(increments[low:high]))
        for low, high in pairwise(cuts)
    ]
    lost = draw(st.sets(st.integers(1, end - 1))) if end > 1 else set()
    run = [
        point(CUMULATIVE, "input", "cumulative", 1000, 1000 + at, total)
        for at, total in enumerate(accumulate(increments), 1)
        if at not in lost
    ]
    return sum(increments), draw(batches_of([*deltas, *run]))


@LAWS
@given(one_truth_told_twice())
def test_delta_and_cumulative_tell_the_same_truth(story: tuple[int, list[Delivery]]) -> None:
    truth, deliveries = story
    with running_bridge() as bridge:
        deliver(bridge, deliveries)
        assert bridge.shown == {("deltas", "input"): truth, ("cumulative", "input"): truth}
        assert bridge.totals == ({"tokens.input": 2 * truth} if truth else {})


# --- (c) several cumulative processes --------------------------------------------------------------------------


@st.composite
def cumulative_processes(draw: st.DrawFn) -> tuple[dict[int, int], list[Delivery]]:
    """The last count of each process, by its start; all write one stream, with a session or without."""
    session = draw(st.sampled_from(["", "s1"]))
    counts = st.lists(st.integers(0, 20), min_size=1, max_size=5).map(sorted)
    processes = draw(st.dictionaries(st.integers(1, 8), counts, min_size=1, max_size=4))
    points = [
        point(CUMULATIVE, "input", session, start, start + at, value)
        for start, values in processes.items()
        for at, value in enumerate(values, 1)
    ]
    return {start: values[-1] for start, values in processes.items()}, draw(batches_of(points))


@LAWS
@given(cumulative_processes())
def test_interleaved_cumulative_processes_add_up_to_the_sum_of_their_last_counts(
    story: tuple[dict[int, int], list[Delivery]],
) -> None:
    last_counts, deliveries = story
    with running_bridge() as bridge:
        deliver(bridge, deliveries)
        truth = sum(last_counts.values())
        assert [*bridge.shown.values()] == [truth]
        assert bridge.totals == ({"tokens.input": truth} if truth else {})


# --- (d) exact money -------------------------------------------------------------------------------------------

MOST_NANO_DOLLARS = 10**14
"""The largest cost that one export may hold, 100,000 USD."""


@st.composite
def costs_in_two_orders(draw: st.DrawFn) -> tuple[int, list[Delivery]]:
    """Costs as the doubles that clients send, by two sessions in different orders and batches; their exact sum."""
    small, any_size = st.integers(0, 10_000_000), st.integers(0, MOST_NANO_DOLLARS)
    costs = draw(st.lists(small | any_size, min_size=1, max_size=10))
    points = [
        point(COST, "x", session, 1000, 1000 + at, nano_dollars / 1e9)
        for session in ("s1", "s2")
        for at, nano_dollars in enumerate(costs)
    ]
    return sum(costs), draw(batches_of(points))


@LAWS
@given(costs_in_two_orders())
def test_costs_add_up_to_the_nano_dollar_in_any_order(story: tuple[int, list[Delivery]]) -> None:
    truth, deliveries = story
    with running_bridge() as bridge:
        deliver(bridge, deliveries)
        assert bridge.shown == {("s1", "x"): truth, ("s2", "x"): truth}
        assert bridge.totals == ({"usd": 2 * truth} if truth else {})


# --- many at once, and the end ---------------------------------------------------------------------------------


def test_many_senders_at_once_count_once_each() -> None:
    """More requests than share one commit, each sent by two at the same time."""
    bodies = [
        body_of([point(TOKENS, "input", session, 1000 + at, 1060 + at, 1)])
        for at in range(2 * MAX_GROUP)
        for session in ("", "s1")
    ]
    with running_bridge() as bridge:
        receipts = bridge.rig.post_together(bodies * 2)
        assert [receipt.accepted for receipt in receipts] == [1] * len(bodies) + [0] * len(bodies)
        assert bridge.totals == {"tokens.input": len(bodies)}
        assert bridge.rig.ledger.commits < 2 + len(bodies)


def test_what_waits_is_posted_before_the_stop() -> None:
    bodies = [body_of([point(TOKENS, "input", "s1", 1000 + at, 1060, 1)]) for at in range(20)]

    async def post_and_stop(ledger: Ledger) -> list[Receipt]:
        answers = [asyncio.ensure_future(ledger.post(body.batch, body.data)) for body in bodies]
        await asyncio.sleep(0)
        await ledger.stop()
        return await asyncio.gather(*answers)

    with running_bridge() as bridge:
        receipts = bridge.rig.call(post_and_stop(bridge.rig.ledger))
        assert [receipt.accepted for receipt in receipts] == [1] * len(bodies)
        bridge.rig.start()
        assert bridge.totals == {"tokens.input": len(bodies)}


# --- large bodies ----------------------------------------------------------------------------------------------


def large_body(session: str) -> Body:
    """Ten parts and a bit; without a session only the hash of the body tells its points from a second sending."""
    times = range(10 * MAX_PART + 7)
    return body_of([point(TOKENS, TYPES[at % 2], session, 1000 + at, 1060 + at, 1) for at in times])


@pytest.mark.parametrize("session", ["s1", ""])
@pytest.mark.parametrize("fate", [fate for fate in Fate if fate in UNANSWERED])
def test_what_is_missing_of_a_large_body_is_added_by_the_retry(fate: Fate, session: str) -> None:
    body = large_body(session)
    with running_bridge() as bridge:
        bridge.spared = 4
        receipt = bridge.send(body, fate)
        assert receipt.accepted + receipt.duplicate == len(body.batch.points)
        assert receipt.duplicate
        assert sum(bridge.totals.values()) == len(body.batch.points)
        bridge.rig.restart()
        assert bridge.rig.post(body).accepted == 0
        assert sum(bridge.totals.values()) == len(body.batch.points)


def test_a_large_body_is_posted_to_its_end_before_the_stop() -> None:
    """Also when its sender is cut off, as those are that take too long."""
    bodies = [large_body("s1"), large_body("")]

    async def post_and_stop(ledger: Ledger) -> None:
        answers = [asyncio.ensure_future(ledger.post(body.batch, body.data)) for body in bodies]
        await ledger.post(bodies[0].batch._replace(points=bodies[0].batch.points[:1]), b"")
        for answer in answers:
            answer.cancel()
        await asyncio.wait(answers)
        await ledger.stop()

    with running_bridge() as bridge:
        bridge.rig.call(post_and_stop(bridge.rig.ledger))
        bridge.rig.start()
        assert sum(bridge.totals.values()) == sum(len(body.batch.points) for body in bodies)


def test_a_small_body_does_not_wait_for_large_ones() -> None:
    small = body_of([point(TOKENS, "input", "s0", 1, 2, 1)])
    ends: list[int] = []

    async def post(ledger: Ledger, body: Body) -> None:
        await ledger.post(body.batch, body.data)
        ends.append(len(body.batch.points))

    async def post_all(ledger: Ledger) -> None:
        await asyncio.gather(*(post(ledger, body) for body in (large_body("s1"), large_body("s2"), small)))

    with running_bridge() as bridge:
        before = bridge.rig.ledger.commits
        bridge.rig.call(post_all(bridge.rig.ledger))
        assert ends[0] == 1
        assert bridge.rig.ledger.commits >= before + 20
        assert sum(bridge.totals.values()) == sum(ends)


# --- poison and bounds -----------------------------------------------------------------------------------------


def test_a_sum_of_large_doubles_stays_finite() -> None:
    large = msgspec.structs.replace(TOKENS, name="bytes.sent", unit="By")
    with running_bridge() as bridge:
        for time in range(3):
            bridge.send(body_of([point(large, "x", "s1", 1000, 2000 + time, 1.5e308)]))
        assert all(isfinite(value) for value in bridge.shown.values())


def test_lifetime_totals_stop_at_the_largest_integer() -> None:
    """A hundred processes, each of the most that one can plausibly report."""
    cumulative_cost = msgspec.structs.replace(COST, temporality=Temporality.CUMULATIVE)
    with running_bridge() as bridge:
        receipt = bridge.send(body_of([point(cumulative_cost, "x", "s1", 1 + at, 1000, 1e8) for at in range(100)]))
        assert receipt.accepted + len(receipt.refused) == 100
        assert 0 < bridge.totals["usd"] <= 2**63 - 1


def test_series_are_bounded_whatever_varies() -> None:
    """New sessions, new service instances, new services: above the limit all of them share one series."""

    def tokens_of(name: str, instance: str) -> Metric:
        resource = Resource((("service.instance.id", instance), ("service.name", name)))
        return msgspec.structs.replace(TOKENS, resource=resource)

    points = [point(TOKENS, "input", f"s{at}", 1000, 1060, 1) for at in range(20)]
    points += [point(tokens_of("claude-code", f"i{at}"), "input", "", 1000, 1060, 1) for at in range(20)]
    points += [point(tokens_of(f"service-{at}", ""), "input", "s", 1000, 1060, 1) for at in range(20)]
    with running_bridge(LedgerSettings(max_series=10)) as bridge:
        for salt in range(0, 60, 7):
            bridge.send(body_of(points[salt : salt + 7]))
        values = [value_of(row) for row in bridge.rig.ledger.rows()]
        assert len(values) == 11
        assert sum(values) == bridge.totals["tokens.input"] == 60


def test_streams_of_a_new_writer_may_be_known() -> None:
    """A setting that names service instances anew makes new writers, and series, of old streams."""
    resource = Resource((("service.instance.id", "i"), ("service.name", "claude-code")))
    metric = msgspec.structs.replace(TOKENS, resource=resource)
    with running_bridge() as bridge:
        bridge.send(body_of([point(metric, "input", "", 1000, 1060, 1)]))
        bridge.rig.settings = LedgerSettings(hashed=frozenset({"service.instance.id"}))
        bridge.rig.restart()
        again = body_of([point(metric, type_, "", 1000, 1120, 1) for type_ in ("output", "input")])
        assert (bridge.send(again).accepted, bridge.send(again).duplicate) == (2, 2)
        assert bridge.totals == {"tokens.input": 2, "tokens.output": 1}
        with closing(sqlite3.connect(bridge.rig.directory / DATABASE)) as connection:
            rows = connection.execute("select count(*), (select count(*) from writer) from stream").fetchall()
        assert rows == [(2, 2)]


@pytest.mark.parametrize("room", [2, 3])
def test_series_of_a_new_writer_may_be_known(room: int) -> None:
    """A session may be called what a longer one is cut to: two writers feed its series, with and without room."""
    with running_bridge(LedgerSettings(max_series=room)) as bridge:
        bridge.send(body_of([point(TOKENS, type_, "s" * 600, 1000, 1060, 1) for type_ in TYPES]))
        cut = dict(next(bridge.rig.ledger.rows()).labels)["session.id"]
        bridge.send(body_of([point(TOKENS, type_, cut, 1000, 1060, 1) for type_ in TYPES]))
        assert [value_of(row) for row in bridge.rig.ledger.rows()] == [2, 2]


# --- (e) against a model ---------------------------------------------------------------------------------------

RETENTION_MS, EXPIRY_MS = 7 * 24 * HOUR_MS, 24 * HOUR_MS
SeriesName = tuple[str, str]
Identity = tuple[str, int, int, float]


class Expected(NamedTuple):
    accepted: int
    too_old: int


class Oracle:
    """The rules of the ledger once more, in sets and dictionaries that never fail. Series by (session, type)."""

    def __init__(self, now: int) -> None:
        self.now = now
        self.known: defaultdict[str, set[Identity]] = defaultdict(set)
        self.latest: Counter[str] = Counter()
        self.mark: dict[str, int] = {}
        self.heard: dict[str, int] = {}
        self.bodies: dict[bytes, int] = {}
        self.runs: Counter[tuple[str, int]] = Counter()
        self.totals: Counter[str] = Counter()
        self.lifetime: Counter[SeriesName] = Counter()
        self.base: Counter[SeriesName] = Counter()
        self.touched: dict[SeriesName, int] = {}
        self.visible: set[SeriesName] = set()

    def post(self, body: Body) -> Expected:
        points = body.batch.points
        if any(is_delta(each) and not session_of(each) for each in points):
            if body.data in self.bodies:
                return Expected(0, 0)
            self.bodies[body.data] = self.now
        outcomes = Counter(self.post_point(each) for each in points)
        return Expected(outcomes["accepted"], outcomes["too old"])

    def post_point(self, each: DataPoint) -> str:
        session, type_ = session_of(each), type_of(each)
        assert isinstance(each.value, int)
        if not is_delta(each):
            run = (type_, each.start)
            self.add((session, type_), max(0, each.value - self.runs[run]))
            self.runs[run] = max(self.runs[run], each.value)
            return "cumulative"
        if session:
            identity = (type_, each.start, each.time, each.value)
            if each.time <= self.mark.get(session, -1):
                return "too old"
            if identity in self.known[session]:
                return "known"
            self.known[session].add(identity)
            self.latest[session] = max(self.latest[session], each.time)
            self.heard[session] = self.now
        self.add((session, type_), each.value)
        return "accepted"

    def add(self, series: SeriesName, amount: int) -> None:
        if self.has_expired(series):
            self.base[series] = self.lifetime[series]
        self.lifetime[series] += amount
        self.totals[f"tokens.{series[1]}"] += amount
        self.touched[series] = self.now
        self.visible.add(series)

    def has_expired(self, series: SeriesName) -> bool:
        session, _ = series
        return bool(session) and self.touched.get(series, self.now) < self.now - EXPIRY_MS

    def forget(self) -> None:
        before = self.now - RETENTION_MS
        self.bodies = {data: heard for data, heard in self.bodies.items() if heard >= before}
        for session in [session for session, heard in self.heard.items() if heard < before]:
            self.known[session].clear()
            self.mark[session] = self.latest[session]

    def expire(self) -> None:
        self.visible = {series for series in self.visible if not self.has_expired(series)}

    @property
    def shown(self) -> dict[SeriesName, int]:
        values = {series: self.lifetime[series] - self.base[series] for series in self.visible}
        return {series: value for series, value in values.items() if value}


def session_of(each: DataPoint) -> str:
    return next((str(value) for key, value in each.attributes if key == "session.id"), "")


def type_of(each: DataPoint) -> str:
    return next(str(value) for key, value in each.attributes if key == "type")


def is_delta(each: DataPoint) -> bool:
    return each.metric.temporality is Temporality.DELTA


PROCESS_POINTS = st.builds(
    lambda type_, start, length, value: point(CUMULATIVE, type_, "", start, start + length, value),
    st.sampled_from(TYPES), st.integers(1, 3), st.integers(0, 3), st.integers(0, 9),
)  # fmt: skip
POINTS = st.lists(delta_points(("s1", "s2", "s3", "")) | PROCESS_POINTS, min_size=1, max_size=5)
WHICH = st.integers(0, 10**6)


class LedgerMachine(RuleBasedStateMachine):
    """Senders, time, housekeeping and crashes in any order; after every step the ledger says what the oracle says."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.bridge = Bridge(Path(self.directory.name))
        self.oracle = Oracle(self.bridge.rig.now_ms)
        self.bodies: list[Body] = []
        self.with_a_writer: list[DataPoint] = []

    def send(self, body: Body, fate: Fate) -> None:
        if fate in REACHED_THE_DISK:
            self.oracle.post(body)
        if fate in UNANSWERED:
            self.oracle.expire()  # the state was read again
        was_known = body.data in self.oracle.bodies
        expected = self.oracle.post(body)
        if fate is Fate.KILLED_AFTER:
            self.oracle.expire()
        self.assert_received(body, self.bridge.send(body, fate), expected, was_known=was_known)

    def assert_received(self, body: Body, receipt: Receipt, expected: Expected, *, was_known: bool) -> None:
        points = body.batch.points
        assert receipt.accepted + receipt.duplicate + len(receipt.refused) == len(points)
        if all(map(is_delta, points)):
            assert receipt.accepted == expected.accepted
        if not was_known:
            assert [refusal.reason for refusal in receipt.refused] == [Drop.TOO_OLD] * expected.too_old

    @rule(points=POINTS, fate=FATES)
    def post(self, points: list[DataPoint], fate: Fate) -> None:
        body = body_of(points, salt=len(self.bodies))
        self.bodies.append(body)
        self.with_a_writer += [each for each in points if not is_delta(each) or session_of(each)]
        self.send(body, fate)

    @precondition(lambda self: self.bodies)
    @rule(which=WHICH, fate=FATES)
    def post_a_body_again(self, which: int, fate: Fate) -> None:
        self.send(self.bodies[which % len(self.bodies)], fate)

    @precondition(lambda self: self.with_a_writer)
    @rule(which=st.lists(WHICH, min_size=1, max_size=5), fate=FATES)
    def post_points_again_in_a_new_batch(self, which: list[int], fate: Fate) -> None:
        points = [self.with_a_writer[at % len(self.with_a_writer)] for at in which]
        self.send(body_of(points, salt=-1), fate)

    @precondition(lambda self: self.bodies)
    @rule(points=POINTS, which=st.lists(WHICH, min_size=1, max_size=3))
    def post_in_one_commit(self, points: list[DataPoint], which: list[int]) -> None:
        """A new body between old ones, and once more itself."""
        new = body_of(points, salt=len(self.bodies))
        bodies = [*(self.bodies[at % len(self.bodies)] for at in which), new, new]
        self.bodies.append(new)
        self.with_a_writer += [each for each in points if not is_delta(each) or session_of(each)]
        for body, receipt in zip(bodies, self.bridge.rig.post_together(bodies), strict=True):
            was_known = body.data in self.oracle.bodies
            self.assert_received(body, receipt, self.oracle.post(body), was_known=was_known)

    @rule(hours=st.sampled_from([1, 12, 24, 25, 100, 168]))
    def wait(self, hours: int) -> None:
        self.bridge.rig.now_ms += hours * HOUR_MS
        self.oracle.now += hours * HOUR_MS

    @rule()
    def forget(self) -> None:
        self.bridge.rig.forget()
        self.oracle.forget()

    @rule()
    def expire(self) -> None:
        self.bridge.rig.ledger.expire()
        self.oracle.expire()

    @rule()
    def restart(self) -> None:
        self.bridge.rig.restart()
        self.oracle.expire()

    @rule()
    def kill(self) -> None:
        self.bridge.rig.kill()
        self.oracle.expire()

    @invariant()
    def says_what_the_oracle_says(self) -> None:
        assert self.bridge.totals == +self.oracle.totals
        assert {series: value for series, value in self.bridge.shown.items() if value} == self.oracle.shown
        ledger = self.bridge.rig.ledger
        assert ledger.count == len([*ledger.rows()])

    def teardown(self) -> None:
        self.bridge.close()
        self.directory.cleanup()


TestAgainstTheOracle = LedgerMachine.TestCase
TestAgainstTheOracle.settings = settings(LAWS, max_examples=50, stateful_step_count=25)
