"""Golden stories of histograms, summaries, and values that end: what senders do, and what is known afterwards.

The files of tests/histogram_cases are written as those of tests/cases, in their steps and sections, with more values.
A point has one of these as well:

  delta_histogram, cumulative_histogram, untyped_histogram    1=2 5=3 inf=1 sum=14
  delta_exponential, cumulative_exponential                   scale=0 zero=1 p0=2 p1=3 n0=1 sum=14
  summary                                                     0.5=2 0.99=6 sum=14 count=3

`1=2` is a bucket that ends at 1 and holds 2, `p1=3` the positive bucket of index 1, `n0=1` a negative one, and in a
summary a quantile. `count` is the sum of the buckets where it is left out, `sum` is left out where none was sent, and
`threshold` is that of the zero bucket. Any value may be `stale`: the flag that says that none was recorded.

Under `out` stands what a series shows, in the same notation; empty exponential buckets and a zero bucket of nothing
are left out. A gauge that has ended says `ended`.
"""

import json
import math
from itertools import accumulate
from pathlib import Path

import pytest

from bridge import bookkeeper
from bridge.exposition import number_text
from bridge.model import ExponentialHistogram, Histogram, Summary, Value
from bridge.otlp import Encoding, decode_metrics
from bridge.rows import SeriesRow
from bridge.values import classic, subtract
from tests import test_cases
from tests.test_cases import SECOND, WAYS, Body, Rig, Telling, attributes_of, digits, number_of, read_story, rig_in

CASES = Path(__file__).parent / "histogram_cases"

# Of OTLP: the member that holds the points, and what it says about them.
FORMS: dict[str, tuple[str, dict[str, object]]] = {
    **test_cases.FORMS,
    "delta_histogram": ("histogram", {"aggregationTemporality": 1}),
    "cumulative_histogram": ("histogram", {"aggregationTemporality": 2}),
    "untyped_histogram": ("histogram", {}),
    "delta_exponential": ("exponentialHistogram", {"aggregationTemporality": 1}),
    "cumulative_exponential": ("exponentialHistogram", {"aggregationTemporality": 2}),
    "summary": ("summary", {}),
}


# --- from the notation to OTLP ---------------------------------------------------------------------------------


def body_of(points: list[dict[str, str]]) -> Body:
    """The OTLP request in JSON that brings these points, and what the decoder makes of it."""
    data = json.dumps({"resourceMetrics": [resource_metrics_of(dict(point)) for point in points]}).encode()
    return Body(decode_metrics(data, Encoding.JSON), data)


def resource_metrics_of(point: dict[str, str]) -> dict[str, object]:
    (form,) = FORMS.keys() & point.keys()
    member, description = FORMS[form]
    value = value_of(member, point.pop(form))
    times = {
        "startTimeUnixNano": str(int(point.pop("start", 0)) * SECOND),
        "timeUnixNano": str(int(point.pop("time", 0)) * SECOND),
    }
    name, session = point.pop("metric"), point.pop("session", "none")
    if session != "none":
        point["session.id"] = session
    data = {"dataPoints": [{**times, **value, "attributes": attributes_of(point)}], **description}
    return {
        "resource": {"attributes": attributes_of({"service.name": "claude-code"})},
        "scopeMetrics": [{"scope": {"name": "scope"}, "metrics": [{"name": name, member: data}]}],
    }


def value_of(member: str, text: str) -> dict[str, object]:
    """The members of a data point that hold its value."""
    if text == "stale":
        return {"flags": 1}
    if member in ("sum", "gauge"):
        return number_of(text)
    parts = dict(part.split("=") for part in text.split())
    total = {"sum": parts.pop("sum")} if "sum" in parts else {}
    count = parts.pop("count", "")
    match member:
        case "summary":
            quantiles = [{"quantile": quantile, "value": value} for quantile, value in parts.items()]
            return {"count": count, **total, "quantileValues": quantiles}
        case "histogram":
            counts = {"count": count or str(sum(map(int, parts.values())))}
            bounds = [float(bound) for bound in parts if bound != "inf"]
            return {**counts, **total, "explicitBounds": bounds, "bucketCounts": list(parts.values())}
        case _:
            settings = {
                "scale": int(parts.pop("scale")),
                "zeroThreshold": float(parts.pop("threshold", 0)),
                "zeroCount": parts.get("zero", "0"),
            }
            counts = {"count": count or str(sum(map(int, parts.values())))}
            return {**settings, **counts, **total, "positive": side_of(parts, "p"), "negative": side_of(parts, "n")}


def side_of(parts: dict[str, str], sign: str) -> dict[str, object]:
    counts = {int(index[1:]): count for index, count in parts.items() if index[0] == sign}
    if not counts:
        return {}
    indexes = range(min(counts), max(counts) + 1)
    return {"offset": indexes[0], "bucketCounts": [counts.get(index, "0") for index in indexes]}


# --- from the ledger to the notation ---------------------------------------------------------------------------


def lines_of(rig: Rig) -> list[str]:
    """What the rig shows, as lines of a story."""
    return sorted(f"{rig.name_of(row)} {text_of(row, rig.scale_of(row))}" for row in rig.ledger.rows())


def text_of(row: SeriesRow, scale: int) -> str:
    if row.value is None:
        return "ended"
    value = subtract(row.value, row.base)
    if isinstance(value, int | float):
        return digits(value, scale)
    return " ".join(f"{key}={number_text(number)}" for key, number in parts_of(value).items() if number is not None)


def parts_of(value: Value) -> dict[str, float | None]:
    match value:
        case Histogram():
            buckets = zip((*map(number_text, value.bounds), "inf"), value.counts, strict=True)
            return {**dict(buckets), "sum": value.sum, "count": value.count}
        case ExponentialHistogram():
            zero = {"threshold": value.zero_threshold, "zero": value.zero_count}
            positive = {f"p{index}": count for index, count in enumerate(value.positive, value.positive_offset)}
            negative = {f"n{index}": count for index, count in enumerate(value.negative, value.negative_offset)}
            filled = {key: number for key, number in {**zero, **positive, **negative}.items() if number}
            return {"scale": value.scale, **filled, "sum": value.sum, "count": value.count}
        case Summary():
            quantiles = {number_text(quantile): at for quantile, at in value.quantiles}
            return {**quantiles, "sum": value.sum, "count": value.count}
        case _:
            raise AssertionError(f"a number: {value}")


def cumulative_of(row: SeriesRow) -> dict[float, int]:
    """`le` -> what it shows, of histograms."""
    if not isinstance(row.value, Histogram | ExponentialHistogram):
        return {}
    value = subtract(row.value, row.base)
    shown = classic(value) if isinstance(value, ExponentialHistogram) else value
    assert isinstance(shown, Histogram)
    assert sum(shown.counts) == shown.count
    return dict(zip((*shown.bounds, math.inf), accumulate(shown.counts), strict=True))


# --- telling them ----------------------------------------------------------------------------------------------


class HistogramTelling(Telling):
    """As for the other stories; besides no bucket may fall."""

    shown: dict[tuple[int, int, float], int]

    def send_points(self) -> None:
        if self.points:
            body = body_of(self.points)
            self.points = []
            self.bodies.append(body)
            self.send(body)

    def assert_nothing_fell(self) -> None:
        super().assert_nothing_fell()
        now = {
            (row.id, row.born, le): count for row in self.rig.ledger.rows() for le, count in cumulative_of(row).items()
        }
        before = getattr(self, "shown", {})
        assert all(now.get(key, count) >= count for key, count in before.items()), f"from {before} to {now}"
        self.shown = now


STORIES = sorted(CASES.glob("*.txt"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("path", STORIES, ids=[path.stem for path in STORIES])
def test_story(path: Path, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    story = read_story(path)
    if way == "without a cache":
        monkeypatch.setattr(bookkeeper, "MAX_CACHED", 0)
    with rig_in(tmp_path, story.settings) as rig:
        telling = HistogramTelling(rig, story, way)
        telling.tell()
        assert lines_of(rig) == story.out
        assert rig.totals == story.totals
        assert telling.dropped == story.dropped
        assert telling.duplicate == story.duplicate
        rig.restart()
        assert lines_of(rig) == story.out


def test_there_are_stories() -> None:
    assert len(STORIES) > 15
