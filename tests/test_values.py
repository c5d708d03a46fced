"""Arithmetic of values against oracles that hold every single observation.

Observations are whole numbers, powers of two and whatever lies between; sums are whole numbers, so that they are the
same in any order. Where a bucket ends is worked out in exact arithmetic.
"""

import math
import tracemalloc
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bridge.model import ExponentialHistogram, Histogram, Summary, Value
from bridge.values import (
    MAX_BOUNDS,
    MAX_BUCKETS,
    MAX_COUNT,
    MAX_DOUBLE,
    SHOWN_BUCKETS,
    add,
    classic,
    coarsen,
    difference,
    downscale,
    fit,
    highest,
    subtract,
    zeroed,
)

LAWS = settings(derandomize=True, deadline=None, max_examples=100)


def cumulative(histogram: Histogram) -> dict[float, int]:
    """What Prometheus sees: `le` -> how many observations are not above it."""
    return dict(zip((*histogram.bounds, math.inf), accumulate(histogram.counts), strict=True))


def assert_nothing_fell(before: Histogram, after: Histogram) -> None:
    now = cumulative(after)
    fallen = {le: (count, now[le]) for le, count in cumulative(before).items() if now.get(le, count) < count}
    assert not fallen, f"from {before} to {after}"


# --- numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "amount", "result"), [(1, 2, 3), (0, 2.5, 2.5), (2**62, 1, 2**62 + 1), (5, -7, -2), (0.5, 0, 0.5)]
)
def test_numbers_add(total: float, amount: float, result: float) -> None:
    assert add(total, amount) == result
    assert type(add(total, amount)) is type(result)


@pytest.mark.parametrize(("value", "base", "result"), [(5, 0, 5), (5, 3, 2), (5, 7, 0), (2.5, 1, 1.5), (-3, 0, -3)])
def test_what_numbers_grew_by(value: float, base: float, result: float) -> None:
    assert subtract(value, base) == result


@pytest.mark.parametrize(
    ("value", "base", "result"),
    [(5, 0, 5), (5, 7, -2), (-3, -1, -2), (math.inf, 0, math.inf), (MAX_DOUBLE, -MAX_DOUBLE, MAX_DOUBLE)],
)
def test_what_numbers_changed_by(value: float, base: float, result: float) -> None:
    assert difference(value, base) == result


@pytest.mark.parametrize("sign", [1, -1])
def test_no_sum_is_infinite(sign: int) -> None:
    large = sign * MAX_DOUBLE
    assert add(large, large) == large
    assert difference(large, -large) == large
    some = Histogram((), (1,), 1, large)
    assert add(some, some) == Histogram((), (2,), 2, large)
    assert subtract(add(some, some), Histogram((), (1,), 1, -large)) == some


# --- explicit histograms ---------------------------------------------------------------------------------------


def explicit(bounds: Iterable[float], observations: Sequence[int], *, has_sum: bool = True) -> Histogram:
    """The histogram of these observations."""
    ordered = tuple(sorted(bounds))
    counts = [0] * (len(ordered) + 1)
    for observation in observations:
        counts[bisect_left(ordered, observation)] += 1
    return Histogram(ordered, tuple(counts), len(observations), float(sum(observations)) if has_sum else None)


OBSERVATIONS = st.lists(st.integers(-25, 25), max_size=12)
BOUNDS = st.frozensets(st.integers(-20, 20).map(float), max_size=6)
HISTOGRAMS = st.builds(explicit, BOUNDS, OBSERVATIONS, has_sum=st.sampled_from([True, True, True, False]))


@LAWS
@given(HISTOGRAMS, HISTOGRAMS, HISTOGRAMS)
def test_histograms_add_in_any_order(a: Histogram, b: Histogram, c: Histogram) -> None:
    assert add(a, b) == add(b, a)
    assert add(add(a, b), c) == add(a, add(b, c))
    assert add(0, a) == add(a, 0) == a


@LAWS
@given(BOUNDS, OBSERVATIONS, OBSERVATIONS)
def test_histograms_of_equal_bounds_add_as_if_observed_together(
    bounds: frozenset[float], some: list[int], others: list[int]
) -> None:
    assert add(explicit(bounds, some), explicit(bounds, others)) == explicit(bounds, some + others)


MANY_BOUNDS = st.frozensets(st.integers(-500, 500).map(float), max_size=120)


@LAWS
@given(st.lists(st.tuples(MANY_BOUNDS, OBSERVATIONS), min_size=1, max_size=5))
def test_no_bucket_falls_when_bounds_change(sent: list[tuple[frozenset[float], list[int]]]) -> None:
    (first_bounds, seen), *rest = sent
    total: Value = explicit(first_bounds, seen)
    for bounds, observations in rest:
        before, total, seen = total, add(total, explicit(bounds, observations)), seen + observations
        assert isinstance(before, Histogram)
        assert isinstance(total, Histogram)
        assert_nothing_fell(before, total)
        assert (total.count, total.sum, sum(total.counts)) == (len(seen), sum(seen), len(seen))
        assert len(total.bounds) <= MAX_BOUNDS
        # A count moves only to a bound that surely holds it.
        assert all(count <= sum(at <= le for at in seen) for le, count in cumulative(total).items())


@LAWS
@given(st.integers(0, 1000), OBSERVATIONS)
def test_a_histogram_of_too_many_bounds_keeps_some_of_them(number: int, observations: list[int]) -> None:
    histogram = explicit((bound / 10 for bound in range(-number // 2, number // 2)), observations)
    coarse = coarsen(histogram)
    assert len(coarse.bounds) <= MAX_BOUNDS
    assert (coarse.count, coarse.sum) == (histogram.count, histogram.sum)
    assert cumulative(coarse).items() <= cumulative(histogram).items()


@LAWS
@given(BOUNDS, BOUNDS, OBSERVATIONS, OBSERVATIONS)
def test_what_is_left_of_a_sum_is_what_was_added(
    bounds: frozenset[float], other_bounds: frozenset[float], some: list[int], others: list[int]
) -> None:
    a, b = explicit(bounds, some), explicit(other_bounds, others)
    left = subtract(add(a, b), a)
    assert isinstance(left, Histogram)
    assert (left.count, left.sum, sum(left.counts)) == (b.count, b.sum, b.count)
    assert cumulative(b).items() <= cumulative(left).items()
    if bounds == other_bounds:
        assert left == b


# --- exponential histograms ------------------------------------------------------------------------------------


def bucket_of(value: float, scale: int) -> int:
    """The i with base**i < value <= base**(i+1), where base = 2**(2**-scale)."""
    times: int = 2 ** max(scale, 0)
    power = Fraction(value) ** times
    exponent = power.numerator.bit_length() - power.denominator.bit_length()
    while power > Fraction(2) ** exponent:
        exponent += 1
    while power <= Fraction(2) ** (exponent - 1):
        exponent -= 1
    return (exponent - 1) >> max(-scale, 0)


class Buckets(NamedTuple):
    """The filled buckets of an exponential histogram by their index."""

    zero: int
    positive: Counter[int]
    negative: Counter[int]

    @property
    def width(self) -> int:
        """How many buckets the wider sign takes, empty ones between filled ones included."""
        return max(max(side) - min(side) + 1 if side else 0 for side in (self.positive, self.negative))


def observed(scale: int, observations: Iterable[float], zero_threshold: float = 0.0) -> Buckets:
    """The oracle: every observation put into its bucket."""
    buckets = Buckets(0, Counter(), Counter())
    for value in observations:
        if abs(value) <= zero_threshold:
            buckets = buckets._replace(zero=buckets.zero + 1)
        else:
            (buckets.positive if value > 0 else buckets.negative)[bucket_of(abs(value), scale)] += 1
    return buckets


def buckets_of(histogram: ExponentialHistogram) -> Buckets:
    positive = Counter(dict(enumerate(histogram.positive, histogram.positive_offset)))
    negative = Counter(dict(enumerate(histogram.negative, histogram.negative_offset)))
    return Buckets(histogram.zero_count, +positive, +negative)  # the plus leaves out empty ones


def exponential(scale: int, observations: Sequence[float], zero_threshold: float = 0.0) -> ExponentialHistogram:
    """The histogram of these observations, as an SDK sends it; the sum is of their whole parts."""
    buckets = observed(scale, observations, zero_threshold)
    positive_offset, positive = _dense(buckets.positive)
    negative_offset, negative = _dense(buckets.negative)
    return ExponentialHistogram(
        scale,
        buckets.zero,
        zero_threshold,
        positive_offset,
        positive,
        negative_offset,
        negative,
        len(observations),
        float(sum(map(int, observations))),
    )


def _dense(side: Counter[int]) -> tuple[int, tuple[int, ...]]:
    return (min(side), tuple(side[index] for index in range(min(side), max(side) + 1))) if side else (0, ())


def fitting_scale(scale: int, observations: Sequence[float], most: int) -> int:
    """The highest scale, from `scale` down, at which no sign takes more than `most` buckets."""
    while observed(scale, observations).width > most:
        scale -= 1
    return scale


SIZES = st.integers(-12, 12).map(lambda power: 2.0**power) | st.floats(1e-4, 1e4)
SIGNED = st.lists(SIZES | SIZES.map(float.__neg__) | st.just(0.0), max_size=8)
SCALES = st.integers(-10, 6)


@LAWS
@given(SCALES, SIGNED, SCALES, SIGNED)
def test_exponential_histograms_meet_at_the_lower_scale(
    a_scale: int, a: list[float], b_scale: int, b: list[float]
) -> None:
    total = add(exponential(a_scale, a), exponential(b_scale, b))
    assert isinstance(total, ExponentialHistogram)
    assert total.scale == fitting_scale(min(a_scale, b_scale), a + b, MAX_BUCKETS)
    assert buckets_of(total) == observed(total.scale, a + b)
    assert (total.count, total.sum) == (len(a + b), sum(map(int, a + b)))


@LAWS
@given(*[st.builds(exponential, SCALES, SIGNED)] * 3)
def test_exponential_histograms_add_in_any_order(
    a: ExponentialHistogram, b: ExponentialHistogram, c: ExponentialHistogram
) -> None:
    assert add(a, b) == add(b, a)
    assert add(add(a, b), c) == add(a, add(b, c))
    assert add(0, a) == add(a, 0) == a


@LAWS
@given(st.integers(7, 10), st.lists(st.integers(-8, 8).map(lambda power: 2.0**power), max_size=5), st.integers(0, 25))
def test_powers_of_two_stay_in_their_buckets_at_every_scale(scale: int, powers: list[float], steps: int) -> None:
    lower = downscale(exponential(scale, powers), steps)
    assert lower.scale == scale - steps
    assert buckets_of(lower) == observed(lower.scale, powers)


@LAWS
@given(SCALES, SIGNED, st.integers(2, 60))
def test_a_histogram_is_fitted_into_a_number_of_buckets(scale: int, observations: list[float], most: int) -> None:
    fitted = fit(exponential(scale, observations), most)
    assert fitted.scale == fitting_scale(scale, observations, most)
    assert buckets_of(fitted) == observed(fitted.scale, observations)
    assert (fitted.count, fitted.sum) == (len(observations), sum(map(int, observations)))


@pytest.mark.parametrize("offset", [2**17, 2**31 - 1])
def test_far_apart_observations_take_no_room_between_them(offset: int) -> None:
    # An SDK sends a single observation at scale 20, where 1 and 2 are a million buckets apart.
    low = ExponentialHistogram(20, 0, 0.0, -offset, (1,), 0, (), 1, 1.0)
    high = ExponentialHistogram(20, 0, 0.0, offset, (1,), 0, (), 1, 1.0)
    tracemalloc.start()
    try:
        total = add(low, high)
        subtract(high, low)
        highest(high, low)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(total, ExponentialHistogram)
    assert (total.count, sum(total.positive)) == (2, 2)
    assert peak < 256 * 2**10


@LAWS
@given(SCALES, SIGNED, SCALES, SIGNED)
def test_what_is_left_of_an_exponential_sum_is_what_was_added(
    a_scale: int, a: list[float], b_scale: int, b: list[float]
) -> None:
    sent = exponential(a_scale, a)
    left = subtract(add(sent, exponential(b_scale, b)), sent)
    assert isinstance(left, ExponentialHistogram)
    assert buckets_of(left) == observed(left.scale, b)
    assert (left.count, left.sum) == (len(b), sum(map(int, b)))


# --- exponential histograms as classic ones --------------------------------------------------------------------


@LAWS
@given(SCALES, SIGNED)
def test_classic_buckets_hold_what_was_observed(scale: int, observations: list[float]) -> None:
    shown = classic(exponential(scale, observations))
    assert len(shown.bounds) <= 2 * SHOWN_BUCKETS + 1
    assert list(shown.bounds) == sorted(set(shown.bounds))
    assert min(shown.counts) >= 0
    assert (shown.count, sum(shown.counts)) == (len(observations), len(observations))
    for le, count in cumulative(shown).items():
        # Most boundaries are irrational, and a negative bucket does not hold its upper end.
        slack = abs(le) * 1e-12 if math.isfinite(le) else 0.0
        surely = sum(value < le - slack for value in observations)
        assert surely <= count <= sum(value <= le + slack for value in observations)


@LAWS
@given(st.lists(st.tuples(SCALES, SIGNED), min_size=1, max_size=6))
def test_no_classic_bucket_falls_as_observations_are_added(sent: list[tuple[int, list[float]]]) -> None:
    total: Value = exponential(*sent[0])
    for scale, observations in sent[1:]:
        before, total = total, add(total, exponential(scale, observations))
        assert isinstance(before, ExponentialHistogram)
        assert isinstance(total, ExponentialHistogram)
        assert_nothing_fell(classic(before), classic(total))


def test_no_classic_bucket_falls_when_the_zero_bucket_widens() -> None:
    before = exponential(0, [0.0] * 5 + [0.4] * 3)
    after = add(before, exponential(0, [0.5, 3.0], zero_threshold=1.0))
    assert isinstance(after, ExponentialHistogram)
    assert_nothing_fell(classic(before), classic(after))
    assert cumulative(classic(after))[1.0] == 9


def test_classic_buckets_end_where_doubles_end() -> None:
    shown = classic(ExponentialHistogram(0, 0, 0.0, 1022, (1, 2), -1080, (3,), 6, 1.0))
    assert cumulative(shown) == {0.0: 3, 2.0**1023: 4, math.inf: 6}


WIDE = st.lists(SIZES | SIZES.map(float.__neg__) | st.just(0.0), max_size=20)
THRESHOLDS = st.just(0.0) | SIZES


@LAWS
@given(st.lists(st.tuples(SCALES, WIDE, THRESHOLDS), min_size=1, max_size=6))
@example([(0, [2.0], 0.0), (-1, [], 2.0)])  # the zero bucket reaches into a bucket of the lower scale
def test_no_classic_bucket_falls_whatever_the_zero_buckets_are(sent: list[tuple[int, list[float], float]]) -> None:
    total: Value = exponential(*sent[0])
    shown = [in_buckets(total)]
    for one in sent[1:]:
        total = add(total, exponential(*one))
        shown.append(in_buckets(total))
        for before in shown:
            assert_nothing_fell(before, shown[-1])
    assert shown[-1].count == sum(len(observations) for _, observations, _ in sent)


@LAWS
@given(SCALES, SIGNED, THRESHOLDS)
def test_a_zero_bucket_is_always_shown(scale: int, observations: list[float], threshold: float) -> None:
    histogram = fit(exponential(scale, observations, threshold), MAX_BUCKETS)
    assert threshold in classic(histogram).bounds
    empty = in_buckets(zeroed(histogram))
    assert empty.bounds == classic(histogram).bounds
    assert (set(empty.counts), empty.count, empty.sum) == ({0}, 0, 0.0)
    # What a series shows that has just come back has the same samples.
    assert in_buckets(subtract(histogram, histogram)) == empty


# --- the larger of two states ----------------------------------------------------------------------------------


@LAWS
@given(HISTOGRAMS, HISTOGRAMS)
def test_the_highest_of_two_histograms_is_below_neither(a: Histogram, b: Histogram) -> None:
    top = highest(a, b)
    assert isinstance(top, Histogram)
    assert_nothing_fell(a, top)
    assert_nothing_fell(b, top)
    assert (top.count, sum(top.counts)) == (max(a.count, b.count), max(a.count, b.count))
    assert min(top.counts) >= 0
    assert highest(a, a) == highest(a, 0) == highest(0, a) == a


@LAWS
@given(*[st.builds(exponential, SCALES, SIGNED)] * 2)
def test_the_highest_of_two_exponential_histograms_is_below_neither(
    a: ExponentialHistogram, b: ExponentialHistogram
) -> None:
    top = highest(a, b)
    assert isinstance(top, ExponentialHistogram)
    shown = classic(top)
    assert_nothing_fell(classic(a), shown)
    assert_nothing_fell(classic(b), shown)
    assert (shown.count, sum(shown.counts)) == (max(a.count, b.count), max(a.count, b.count))
    assert min(shown.counts) >= 0
    assert highest(a, a) == highest(a, 0) == highest(0, a) == a


# --- all kinds of histograms -----------------------------------------------------------------------------------


def in_buckets(value: Value) -> Histogram:
    """A histogram as it is shown; it adds up."""
    shown = classic(value) if isinstance(value, ExponentialHistogram) else value
    assert isinstance(shown, Histogram)
    assert min(shown.counts) >= 0
    assert sum(shown.counts) == shown.count
    return shown


ANY = HISTOGRAMS | st.builds(exponential, SCALES, SIGNED, THRESHOLDS)


@LAWS
@given(ANY, ANY)
def test_whatever_two_histograms_are_what_is_made_of_them_adds_up(a: Histogram, b: Histogram) -> None:
    total, top = in_buckets(add(a, b)), in_buckets(highest(a, b))
    assert (total.count, top.count) == (a.count + b.count, max(a.count, b.count))
    for part in (a, b):
        assert_nothing_fell(in_buckets(part), total)
        assert_nothing_fell(in_buckets(part), top)
    assert in_buckets(subtract(a, b)).count == max(0, a.count - b.count)
    assert in_buckets(difference(a, b)) == in_buckets(subtract(a, b))
    assert in_buckets(subtract(add(a, b), a)).count == b.count


def test_explicit_and_exponential_histograms_add() -> None:
    some, others = explicit([1.0, 3.0], [1, 2, 5]), exponential(0, [1.0, 4.0, 4.0, 0.0])
    total = in_buckets(add(some, others))
    assert cumulative(total) == {0.0: 1, 1.0: 3, 2.0: 3, 3.0: 4, 4.0: 6, math.inf: 7}
    assert total.sum == 17
    assert add(others, some) == total
    assert cumulative(in_buckets(subtract(total, others))).items() >= cumulative(some).items()
    assert_nothing_fell(classic(others), in_buckets(highest(some, others)))


@pytest.mark.parametrize("kind", [explicit([1.0], [0, 2]), exponential(0, [0.0, 0.5, -3.0])], ids=["explicit", "exp"])
def test_counts_end_where_integers_end(kind: Histogram | ExponentialHistogram) -> None:
    total: Value = kind
    for _ in range(70):
        before, total = total, add(total, total)
        assert_nothing_fell(in_buckets(before), in_buckets(total))
    assert in_buckets(total).count == MAX_COUNT
    assert in_buckets(add(total, kind)).counts == in_buckets(total).counts


@pytest.mark.parametrize("arithmetic", [add, subtract, difference, highest])
@pytest.mark.parametrize("other", [1, Summary(1, 1.0, ())])
def test_a_histogram_and_what_is_none_have_nothing_in_common(
    arithmetic: Callable[[Value, Value], Value], other: Value
) -> None:
    with pytest.raises(TypeError, match="cannot be values of one counter"):
        arithmetic(explicit([], [1]), other)


# --- histograms that cannot be earlier states of each other ----------------------------------------------------


@pytest.mark.parametrize(
    ("value", "base"),
    [
        pytest.param(explicit([0.5, 2.0], [0, 0, 0, 1, 1, 1]), explicit([1.0], [0, 0, 0, 1, 1]), id="other bounds"),
        pytest.param(exponential(0, [0.4] * 3 + [0.0], 1.0), exponential(0, [0.4] * 3), id="wider zero bucket"),
    ],
)
def test_what_a_histogram_grew_by_is_a_histogram(value: Histogram | ExponentialHistogram, base: Value) -> None:
    grown = subtract(value, base)
    shown = classic(grown) if isinstance(grown, ExponentialHistogram) else grown
    assert isinstance(shown, Histogram)
    assert shown.count == 1
    assert sum(shown.counts) == shown.count
    assert min(shown.counts) >= 0
