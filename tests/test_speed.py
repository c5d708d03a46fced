"""A guard against gross slowness: CPU time beside that of the naive script on the same bodies, in one process.

Both take turns, the smallest of several counts, and the bounds are two and a half times what was measured, so that a
busy machine does not matter. How fast the bridge is stands in tests/bench.
"""

import time
from collections.abc import Callable

import pytest

from bridge.config import Config, Limits
from bridge.database import DATABASE
from bridge.otlp import Encoding, Known, decode_metrics
from tests.bench import naive
from tests.bench.exports import Session
from tests.test_cases import Body
from tests.test_views import MakeBridge, make_bridge

__all__ = ["make_bridge"]  # a fixture

SESSIONS, ROUNDS, TURNS = 20, 3, 5
BEGIN = 1_800_000_000 * 10**9


def cpu(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def ratio(ours: Callable[[], object], theirs: Callable[[], object]) -> float:
    """The CPU time of one as a multiple of the other's."""
    turns = [(cpu(ours), cpu(theirs)) for _ in range(TURNS)]
    return min(turn[0] for turn in turns) / min(turn[1] for turn in turns)


def exports(encoding: Encoding, rounds: int) -> list[bytes]:
    sessions = [Session(number, encoding) for number in range(SESSIONS)]
    made = [list(session.exports(BEGIN, rounds)) for session in sessions]
    return [bodies[number] for number in range(rounds) for bodies in made]


def plainly(take: Callable[[bytes], None], bodies: list[bytes]) -> None:
    for body in bodies:
        take(body)


@pytest.mark.parametrize(
    ("encoding", "take", "bound"),
    [(Encoding.PROTOBUF, naive.take_protobuf, 0.7), (Encoding.JSON, naive.take_json, 1.05)],
)
def test_what_was_seen_before_is_decoded_faster_than_by_a_plain_walk(
    encoding: Encoding, take: Callable[[bytes], None], bound: float
) -> None:
    bodies, known = exports(encoding, 1), Known()
    found = ratio(
        lambda: [decode_metrics(body, encoding, known=known) for body in bodies],
        lambda: plainly(take, bodies),
    )
    assert found < bound


def test_an_export_is_counted_for_a_few_times_the_cost_of_a_plain_walk(make_bridge: MakeBridge) -> None:
    bridge, known = make_bridge(), Known()
    rounds = iter(range(TURNS + 1))

    def bodies() -> list[bytes]:
        begin = BEGIN + next(rounds) * 10**12
        return [session.export(begin, begin + 10**9, 7) for session in sessions]

    def post() -> None:
        decoded = [Body(decode_metrics(body, Encoding.PROTOBUF, known=known), body) for body in bodies()]
        receipts = bridge.post_together(decoded)
        assert sum(receipt.accepted for receipt in receipts) == 30 * SESSIONS

    sessions = [Session(number, Encoding.PROTOBUF) for number in range(SESSIONS)]
    post()
    plain = exports(Encoding.PROTOBUF, 1)
    assert ratio(post, lambda: plainly(naive.take_protobuf, plain)) < 4


def test_an_export_writes_few_pages(make_bridge: MakeBridge) -> None:
    """What its series are worth and its identities, one page each but for splits, and a few that a commit shares."""
    bridge = make_bridge()
    log = bridge.directory / f"{DATABASE}-wal"
    sizes = []
    sessions = [Session(number, Encoding.PROTOBUF) for number in range(SESSIONS)]
    for begin in range(BEGIN, BEGIN + 3 * 10**9, 10**9):
        bodies = [session.export(begin, begin + 10**9, 7) for session in sessions]
        bridge.post_together([Body(decode_metrics(body, Encoding.PROTOBUF), body) for body in bodies])
        sizes.append(log.stat().st_size)
    assert 0 < sizes[2] - sizes[1] < 5 * 4_096 * SESSIONS


def test_a_scrape_of_what_has_not_changed_costs_less_than_writing_it(make_bridge: MakeBridge) -> None:
    bridge = make_bridge(Config(limits=Limits(series=10_000)))
    naive.values.clear()
    sessions = [Session(number, Encoding.PROTOBUF) for number in range(100)]
    for session in sessions:
        body = session.export(BEGIN, BEGIN + 10**9, 7)
        naive.take_protobuf(body)
        bridge.post(Body(decode_metrics(body, Encoding.PROTOBUF), body))
    page = bridge.get()
    assert page.text.count("session_id=") == 3_000
    assert ratio(bridge.get, lambda: naive.page(0)) < 1.4
