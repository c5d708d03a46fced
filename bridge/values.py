"""Arithmetic of metric values: numbers, explicit and exponential histograms. Pure.

Histograms add like numbers. When the bounds of an explicit histogram change, the sum keeps both sets: a count moves
to the smallest bound that surely holds it, so sum, count and +Inf stay exact and no bucket ever falls. Exponential
histograms meet at the lower scale, where every second boundary of the higher one is a boundary too.
"""

import math
from bisect import bisect_left

from bridge.model import ExponentialHistogram, Histogram, Value

MAX_BOUNDS = 200
"""Bounds that a sum of histograms keeps; counts of further ones move to the next larger bound that it has."""
MAX_BUCKETS = 160
"""Buckets of one sign of an exponential histogram; a wider range lowers the scale, as the SDKs do."""
SHOWN_BUCKETS = 40
"""Buckets of one sign of an exponential histogram where only classic ones can be shown."""


def add(total: Value, amount: Value) -> Value:
    """total + amount. A plain 0 is the neutral element of every kind."""
    match total, amount:
        case (int() | float(), int() | float()):
            return total + amount
        case (_, 0):
            return total
        case (0, _):
            return amount
        case (Histogram(), Histogram()):
            return _add_histograms(total, amount)
        case (ExponentialHistogram(), ExponentialHistogram()):
            return _add_exponential(total, amount)
        case _:
            return amount


def subtract(value: Value, base: Value) -> Value:
    """value - base, no part below zero; `base` is an earlier state of `value`."""
    match value, base:
        case (_, 0):
            return value
        case (int() | float(), int() | float()):
            return max(0, value - base)
        case (Histogram(), Histogram()):
            counts = _rebucket(base, value.bounds)
            total = None if value.sum is None else value.sum - (base.sum or 0.0)
            left = tuple(max(0, ours - theirs) for ours, theirs in zip(value.counts, counts, strict=True))
            return Histogram(value.bounds, left, max(0, value.count - base.count), total)
        case (ExponentialHistogram(), ExponentialHistogram()):
            return _subtract_exponential(value, base)
        case _:
            return value


def _add_histograms(total: Histogram, amount: Histogram) -> Histogram:
    bounds = total.bounds
    if amount.bounds != bounds:
        union = tuple(sorted({*bounds, *amount.bounds}))
        bounds = union if len(union) <= MAX_BOUNDS else bounds
    counts = tuple(a + b for a, b in zip(_rebucket(total, bounds), _rebucket(amount, bounds), strict=True))
    return Histogram(bounds, counts, total.count + amount.count, _add_sums(total.sum, amount.sum))


def coarsen(histogram: Histogram) -> Histogram:
    """The histogram over at most MAX_BOUNDS of its bounds."""
    step = -(-len(histogram.bounds) // MAX_BOUNDS)
    if step <= 1:
        return histogram
    bounds = histogram.bounds[step - 1 :: step]
    return Histogram(bounds, _rebucket(histogram, bounds), histogram.count, histogram.sum)


def _rebucket(histogram: Histogram, bounds: tuple[float, ...]) -> tuple[int, ...]:
    """The counts over other bounds; each moves to the smallest bound that is not below its own."""
    if histogram.bounds == bounds:
        return histogram.counts
    counts = [0] * (len(bounds) + 1)
    for bound, count in zip(histogram.bounds, histogram.counts, strict=False):
        counts[bisect_left(bounds, bound)] += count
    counts[-1] += histogram.counts[-1]
    return tuple(counts)


def _add_sums(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


def _add_exponential(a: ExponentialHistogram, b: ExponentialHistogram) -> ExponentialHistogram:
    scale = min(a.scale, b.scale)
    a, b = downscale(a, a.scale - scale), downscale(b, b.scale - scale)
    positive_offset, positive = _add_buckets(a.positive_offset, a.positive, b.positive_offset, b.positive, 1)
    negative_offset, negative = _add_buckets(a.negative_offset, a.negative, b.negative_offset, b.negative, 1)
    total = ExponentialHistogram(
        scale, a.zero_count + b.zero_count, max(a.zero_threshold, b.zero_threshold), positive_offset, positive,
        negative_offset, negative, a.count + b.count, _add_sums(a.sum, b.sum),
    )  # fmt: skip
    return fit(total, MAX_BUCKETS)


def _subtract_exponential(value: ExponentialHistogram, base: ExponentialHistogram) -> ExponentialHistogram:
    scale = min(value.scale, base.scale)
    value, base = downscale(value, value.scale - scale), downscale(base, base.scale - scale)
    positive_offset, positive = _add_buckets(
        value.positive_offset, value.positive, base.positive_offset, base.positive, -1
    )
    negative_offset, negative = _add_buckets(
        value.negative_offset, value.negative, base.negative_offset, base.negative, -1
    )
    total = None if value.sum is None else value.sum - (base.sum or 0.0)
    return ExponentialHistogram(
        scale, max(0, value.zero_count - base.zero_count), value.zero_threshold, positive_offset, positive,
        negative_offset, negative, max(0, value.count - base.count), total,
    )  # fmt: skip


def _add_buckets(
    a_offset: int, a: tuple[int, ...], b_offset: int, b: tuple[int, ...], sign: int
) -> tuple[int, tuple[int, ...]]:
    """a + sign * b, no count below zero, over the range of both."""
    if not b:
        return a_offset, a
    if not a:
        return (b_offset, b) if sign > 0 else (a_offset, a)
    low, high = min(a_offset, b_offset), max(a_offset + len(a), b_offset + len(b))
    counts = [0] * (high - low)
    for index, count in enumerate(a, a_offset - low):
        counts[index] += count
    for index, count in enumerate(b, b_offset - low):
        counts[index] = max(0, counts[index] + sign * count)
    return low, tuple(counts)


def downscale(histogram: ExponentialHistogram, steps: int) -> ExponentialHistogram:
    """The same observations at a scale lower by `steps`: 2**steps neighbours become one bucket."""
    if steps <= 0:
        return histogram
    positive_offset, positive = _merge_buckets(histogram.positive_offset, histogram.positive, steps)
    negative_offset, negative = _merge_buckets(histogram.negative_offset, histogram.negative, steps)
    return ExponentialHistogram(
        histogram.scale - steps, histogram.zero_count, histogram.zero_threshold, positive_offset, positive,
        negative_offset, negative, histogram.count, histogram.sum,
    )  # fmt: skip


def _merge_buckets(offset: int, counts: tuple[int, ...], steps: int) -> tuple[int, tuple[int, ...]]:
    if not counts:
        return 0, ()
    low = offset >> steps
    merged = [0] * (((offset + len(counts) - 1) >> steps) - low + 1)
    for index, count in enumerate(counts, offset):
        merged[(index >> steps) - low] += count
    return low, tuple(merged)


def fit(histogram: ExponentialHistogram, most: int) -> ExponentialHistogram:
    """The histogram at the highest scale at which no sign has more than `most` buckets."""
    while max(len(histogram.positive), len(histogram.negative)) > most:
        histogram = downscale(histogram, 1)
    return histogram


def classic(value: ExponentialHistogram) -> Histogram:
    """An exponential histogram as explicit buckets: its own boundaries, at a scale that leaves at most 40 a sign.

    As the range grows the scale falls, and the boundaries that remain are among those shown before, so no
    bucket's count ever falls.
    """
    shown = fit(value, SHOWN_BUCKETS)
    counts: dict[float, int] = {}
    for index, count in enumerate(shown.negative, shown.negative_offset):
        # Bucket i of the negative side is [-base**(i+1), -base**i).
        bound = -_boundary(shown.scale, index)
        counts[bound] = counts.get(bound, 0) + count
    if shown.zero_count or shown.negative:
        counts[shown.zero_threshold] = counts.get(shown.zero_threshold, 0) + shown.zero_count
    for index, count in enumerate(shown.positive, shown.positive_offset):
        bound = _boundary(shown.scale, index + 1)
        counts[bound] = counts.get(bound, 0) + count
    bounds = tuple(sorted(bound for bound in counts if math.isfinite(bound)))
    finite = tuple(counts[bound] for bound in bounds)
    return Histogram(bounds, (*finite, value.count - sum(finite)), value.count, value.sum)


def _boundary(scale: int, index: int) -> float:
    """base**index with base = 2**(2**-scale); infinite where a double cannot hold it."""
    try:
        return math.ldexp(2.0 ** math.fmod(math.ldexp(index, -scale), 1), int(math.ldexp(index, -scale)))
    except OverflowError:
        return math.inf
