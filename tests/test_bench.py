"""The benchmark compares the same things: exports are equal in both encodings, and the table says who is ahead."""

import os
import sys
from typing import Any

import pytest

from bridge.otlp import Encoding, decode_metrics
from tests.bench.__main__ import table
from tests.bench.exports import POINTS, STEP_NS, TOKEN_POINTS, Session
from tests.bench.live import percentiles
from tests.bench.naive import page, take_json, take_protobuf, values
from tests.bench.peers import usage_of
from tests.bench.profile import PARTS, ingest

BEGIN = 1_800_000_000 * 10**9


def test_an_export_is_the_same_in_both_encodings_and_none_repeats_another() -> None:
    first, second = (
        [decode_metrics(body, encoding).points for body in Session(7, encoding).exports(BEGIN, 2, tokens=11)]
        for encoding in Encoding
    )
    assert first == second
    assert [len(points) for points in first] == [POINTS, POINTS]
    assert [(point.start, point.time) for points in first for point in points[:1]] == [
        (BEGIN, BEGIN + STEP_NS),
        (BEGIN + STEP_NS, BEGIN + 2 * STEP_NS),
    ]
    assert sum(point.value == 11 for point in first[0]) == TOKEN_POINTS


def test_the_naive_script_shows_the_last_value_of_each_series() -> None:
    values.clear()
    for encoding, take in ((Encoding.PROTOBUF, take_protobuf), (Encoding.JSON, take_json)):
        for body in Session(7, encoding).exports(BEGIN, 2, tokens=11):
            take(body)
        assert page(0).count(" 11.0 0\n") == TOKEN_POINTS
        assert len(values) == POINTS


@pytest.mark.parametrize(
    ("is_higher_better", "ours", "ratio"), [(True, 3.0, "1.50 (b)"), (True, 1.0, "0.50 (b)"), (False, 0.5, "2.00 (a)")]
)
def test_the_ratio_is_how_much_better_the_bridge_is_than_the_best_peer(
    is_higher_better: bool, ours: float, ratio: str
) -> None:
    row = {"label": "x", "unit": "u", "is_higher_better": is_higher_better}
    shown: dict[str, Any] = {"bridge": [9.0, ours, 0.0], "a": [1.0], "b": [2.0]}
    document = {
        "date": "d", "machine": "m", "commit": "c", "versions": {"bridge": "1", "a": "2", "b": "3"},
        "parts": {"p": [{**row, "values": shown}]},
    }  # fmt: skip
    assert f"| {ratio} |" in table(document).splitlines()[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_percentiles_are_of_the_sorted_times_and_usage_is_that_of_a_process() -> None:
    assert percentiles([at / 1000 for at in range(200, 0, -1)]) == "101 ms, p99 199 ms, at most 200 ms (200)"
    before, after = usage_of(os.getpid()), usage_of(os.getpid())
    assert after.cpu >= before.cpu > 0
    assert after.wakeups >= before.wakeups


def test_the_parts_of_an_export_are_those_of_as_many_as_were_asked_for() -> None:
    commits, points, first, parts = ingest(group=2, sessions=3, rounds=2)
    assert (commits, points) == (2 * 2, 2 * 3 * POINTS)
    assert tuple(parts) == PARTS
    assert min(first, *parts.values()) > 0
