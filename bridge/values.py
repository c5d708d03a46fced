"""Arithmetic of metric values: numbers, explicit and exponential histograms. Pure.

Law: what histograms are is consistent whatever they were made of: no bucket is below zero, the buckets add up to the
count, sums are finite, and a count stops at MAX_COUNT. So all arithmetic is done on cumulative counts, the ones that
Prometheus sees as `le`, over buckets that both histograms can be counted in:

- Explicit ones keep both sets of bounds: a count moves to the smallest bound that surely holds it.
- Exponential ones meet at the lower scale, where every second boundary of the higher one is a boundary too, and at
  the wider zero bucket, which takes the buckets that it covers and widens to the end of one that it reaches into.
- An explicit and an exponential one meet in the classic buckets of the latter. Those become fewer when its scale
  falls, and the sum can then be lower at bounds that are not among them; count, sum and +Inf stay exact.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from functools import partial
from itertools import accumulate, islice, pairwise
from typing import NamedTuple

from bridge.model import Drop, ExponentialHistogram, Histogram, Summary, Value

MAX_BOUNDS = 200
"""Bounds that a sum of histograms keeps; counts of further ones move to the next larger bound that it has."""
MAX_BUCKETS = 160
"""Buckets of one sign of an exponential histogram; a wider range lowers the scale, as the SDKs do."""
SHOWN_BUCKETS = 40
"""Buckets of one sign of an exponential histogram where only classic ones can be shown."""
MAX_COUNT = 2**63 - 1
"""The largest count of a histogram: what an integer on disk holds."""
MAX_SCALE = 20
MIN_SCALE = -10
"""Scales of exponential histograms that the data model's SDKs use."""
MAX_TOLD_COUNT = 2**53
"""The largest count of a histogram that a client may tell of."""
MAX_QUANTILES = 100
MAX_DOUBLE = math.nextafter(math.inf, 0.0)

_AnyHistogram = Histogram | ExponentialHistogram


def add(total: Value, amount: Value) -> Value:
    """total + amount. A plain 0 is the neutral element of every kind. Raises TypeError for what has no sum."""
    if isinstance(total, int) and isinstance(amount, int):
        return total + amount
    match total, amount:
        case (int() | float(), int() | float()):
            return _finite(total + amount)
        case (_, 0):
            return total
        case (0, _):
            return amount
        case (Histogram() | ExponentialHistogram(), Histogram() | ExponentialHistogram()):
            return _combine(total, amount, _SUM)
        case _:
            raise _unlike(total, amount)


def subtract(value: Value, base: Value) -> Value:
    """value - base, no part below zero; `base` is an earlier state of `value`. Raises TypeError as `add`."""
    match value, base:
        case (int() | float(), int() | float()) if base:
            return max(0, _finite(value - base))
        case (_, 0) | (0, _):
            return value
        case (Histogram() | ExponentialHistogram(), Histogram() | ExponentialHistogram()):
            return _combine(value, base, _GROWTH)
        case _:
            raise _unlike(value, base)


def difference(value: Value, base: Value) -> Value:
    """value - base as `subtract`, but the difference of numbers may be below zero."""
    if base and isinstance(value, int | float) and isinstance(base, int | float):
        return _finite(value - base)
    return subtract(value, base)


def highest(value: Value, floor: Value) -> Value:
    """Of two states of one counter the larger of every sample that they show; `value` itself where it is larger.

    Raises TypeError as `add`.
    """
    if value == floor:
        return value
    match value, floor:
        case (int() | float(), int() | float()):
            return max(value, floor)
        case (_, 0):
            return value
        case (0, _):
            return floor
        case (Histogram() | ExponentialHistogram(), Histogram() | ExponentialHistogram()):
            return _combine(value, floor, _HIGHEST)
        case _:
            raise _unlike(value, floor)


def zeroed(value: Value) -> Value:
    """The value with all counts and sums 0, and as many samples as it shows."""
    match value:
        case Histogram():
            return Histogram(value.bounds, (0,) * len(value.counts), 0, None if value.sum is None else 0.0)
        case ExponentialHistogram():
            return zeroed(classic(value))
        case Summary():
            return Summary(0, 0.0, value.quantiles)
        case _:
            return 0


def _unlike(a: Value, b: Value) -> TypeError:
    return TypeError(f"{type(a).__name__} and {type(b).__name__} cannot be values of one counter")


# --- sums ------------------------------------------------------------------------------------------------------


def _finite(number: float) -> float:
    """The number, or the largest of its sign: what reaches infinity never leaves it."""
    if isinstance(number, float) and math.isinf(number):
        return math.copysign(MAX_DOUBLE, number)
    return number


def _add_sums(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else _finite(a + b)


def _subtract_sums(value: float | None, base: float | None) -> float | None:
    return None if value is None else _finite(value - (base or 0.0))


def _highest_sum(value: float | None, floor: float | None) -> float | None:
    return value if value is None or floor is None else max(value, floor)


# --- two histograms --------------------------------------------------------------------------------------------


class _Rule(NamedTuple):
    """What becomes of the cumulative counts of two histograms at one bound, and of their sums."""

    counts: Callable[[int, int], int]
    sums: Callable[[float | None, float | None], float | None]


_SUM = _Rule(lambda a, b: min(a + b, MAX_COUNT), _add_sums)
_GROWTH = _Rule(lambda value, base: max(value - base, 0), _subtract_sums)
_HIGHEST = _Rule(max, _highest_sum)


def _combine(a: _AnyHistogram, b: _AnyHistogram, rule: _Rule) -> _AnyHistogram:
    if isinstance(a, ExponentialHistogram) and isinstance(b, ExponentialHistogram):
        return _combine_exponential(a, b, rule)
    return _combine_explicit(_explicit(a), _explicit(b), rule)


def _explicit(value: _AnyHistogram) -> Histogram:
    return classic(value) if isinstance(value, ExponentialHistogram) else value


def _combine_explicit(a: Histogram, b: Histogram, rule: _Rule) -> Histogram:
    bounds = a.bounds
    if b.bounds != bounds:
        union = tuple(sorted({*bounds, *b.bounds}))
        bounds = union if len(union) <= MAX_BOUNDS else bounds
    counts = _combine_counts(_rebucket(a, bounds), _rebucket(b, bounds), rule)
    return Histogram(bounds, counts, sum(counts), rule.sums(a.sum, b.sum))


def _combine_exponential(a: ExponentialHistogram, b: ExponentialHistogram, rule: _Rule) -> ExponentialHistogram:
    threshold = _common_threshold(a, b)
    a, b = _widen_zero(a, threshold), _widen_zero(b, threshold)
    scale = _common_scale(a, b)
    a, b = downscale(a, a.scale - scale), downscale(b, b.scale - scale)
    negative_offset, *negative = _align(a.negative_offset, a.negative, b.negative_offset, b.negative)
    positive_offset, *positive = _align(a.positive_offset, a.positive, b.positive_offset, b.positive)
    counts = _combine_counts(
        (*reversed(negative[0]), a.zero_count, *positive[0]),
        (*reversed(negative[1]), b.zero_count, *positive[1]),
        rule,
    )
    zero = len(negative[0])
    return ExponentialHistogram(
        scale, counts[zero], threshold, positive_offset, counts[zero + 1 :], negative_offset, counts[:zero][::-1],
        sum(counts), rule.sums(a.sum, b.sum),
    )  # fmt: skip


def _combine_counts(a: tuple[int, ...], b: tuple[int, ...], rule: _Rule) -> tuple[int, ...]:
    """The counts of buckets in the order of their bounds."""
    at_most = [*map(rule.counts, accumulate(a), accumulate(b))]
    # Of two states with other bounds a part can have grown more than the whole, which knows better:
    # from 5 up to 1 to 3 up to 0.5 and 6 up to 2, growth 3 up to 0.5, 0 up to 1, 1 up to 2 is 0, 0, 1.
    cumulative = [*accumulate(reversed(at_most), min)][::-1]
    return tuple(after - before for before, after in pairwise((0, *cumulative)))


# --- explicit histograms ---------------------------------------------------------------------------------------


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


# --- exponential histograms ------------------------------------------------------------------------------------


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


def _common_scale(a: ExponentialHistogram, b: ExponentialHistogram) -> int:
    """The highest scale at which no sign of both together takes more than MAX_BUCKETS buckets.

    Known before any bucket is made: two single observations can be 2**32 buckets apart.
    """
    scale = min(a.scale, b.scale)
    positive, negative = [], []
    for part in (a, b):
        steps = part.scale - scale
        positive += [index >> steps for index in _ends(part.positive_offset, part.positive)]
        negative += [index >> steps for index in _ends(part.negative_offset, part.negative)]
    while any(side and max(side) - min(side) >= MAX_BUCKETS for side in (positive, negative)):
        scale -= 1
        positive, negative = [index >> 1 for index in positive], [index >> 1 for index in negative]
    return scale


def _ends(offset: int, counts: tuple[int, ...]) -> tuple[int, ...]:
    """The first and the last index of one sign."""
    return (offset, offset + len(counts) - 1) if counts else ()


def _align(
    a_offset: int, a: tuple[int, ...], b_offset: int, b: tuple[int, ...]
) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Two ranges of buckets over the range of both: its offset, and the counts of each."""
    ends = (*_ends(a_offset, a), *_ends(b_offset, b))
    low, high = min(ends, default=0), max(ends, default=-1)

    def widened(offset: int, counts: tuple[int, ...]) -> tuple[int, ...]:
        before = (0,) * (offset - low) if counts else ()
        return (*before, *counts, *(0,) * (high + 1 - low - len(before) - len(counts)))

    return low, widened(a_offset, a), widened(b_offset, b)


def _common_threshold(a: ExponentialHistogram, b: ExponentialHistogram) -> float:
    """The end of the least zero bucket that holds those of both, and no bucket of the narrower one in part."""
    threshold = max(a.zero_threshold, b.zero_threshold)
    while (reached := max(_reach(a, threshold), _reach(b, threshold))) > threshold:
        threshold = reached
    return threshold


def _reach(histogram: ExponentialHistogram, threshold: float) -> float:
    """Where the filled bucket ends that a zero bucket would reach into when it widens up to `threshold`."""
    if histogram.zero_threshold == threshold:
        return threshold
    scale = histogram.scale
    for offset, counts in (
        (histogram.positive_offset, histogram.positive),
        (histogram.negative_offset, histogram.negative),
    ):
        covered = _covered(scale, offset, counts, threshold)
        if any(counts[covered : covered + 1]) and _boundary(scale, offset + covered) < threshold:
            return min(_boundary(scale, offset + covered + 1), MAX_DOUBLE)
    return threshold


def _widen_zero(histogram: ExponentialHistogram, threshold: float) -> ExponentialHistogram:
    """The histogram with a zero bucket up to `threshold`; the buckets that it covers are counted there."""
    if not threshold:
        return histogram
    positive_offset, positive = histogram.positive_offset, histogram.positive
    negative_offset, negative = histogram.negative_offset, histogram.negative
    above = _covered(histogram.scale, positive_offset, positive, threshold)
    below = _covered(histogram.scale, negative_offset, negative, threshold)
    return ExponentialHistogram(
        histogram.scale, histogram.zero_count + sum(positive[:above]) + sum(negative[:below]), threshold,
        positive_offset + above, positive[above:], negative_offset + below, negative[below:],
        histogram.count, histogram.sum,
    )  # fmt: skip


def _covered(scale: int, offset: int, counts: tuple[int, ...], threshold: float) -> int:
    """How many buckets end within a zero bucket."""
    ends = range(offset + 1, offset + 1 + len(counts))
    return bisect_right(ends, threshold, key=partial(_boundary, scale))


def classic(value: ExponentialHistogram) -> Histogram:
    """An exponential histogram as explicit buckets: its own boundaries, at a scale that leaves at most 40 a sign.

    The end of the zero bucket is always among the bounds. As the range grows the scale falls, and the boundaries that
    remain are among those shown before, so no bucket's count ever falls.
    """
    shown = fit(value, SHOWN_BUCKETS)
    counts = {shown.zero_threshold: shown.zero_count}
    for index, count in enumerate(shown.negative, shown.negative_offset):
        # Bucket i of the negative side is [-base**(i+1), -base**i). What of it the zero bucket covers is counted there.
        end = _boundary(shown.scale, index)
        bound = -end if end >= shown.zero_threshold else shown.zero_threshold
        counts[bound] = counts.get(bound, 0) + count
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


# --- what clients tell -----------------------------------------------------------------------------------------


def explicit_histogram(
    bounds: tuple[float, ...], counts: tuple[int, ...], count: int, total: float | None
) -> Histogram | Drop:
    """A consistent explicit histogram, or why it is none. One without buckets is one bucket up to +Inf."""
    if bounds and bounds[-1] == math.inf:
        bounds = bounds[:-1]
    if not counts and not bounds:
        counts = (count,)
    if len(counts) != len(bounds) + 1 or sum(counts) != count or count > MAX_TOLD_COUNT:
        return Drop.MALFORMED
    if any(not low < high for low, high in pairwise((*bounds, math.inf))):
        return Drop.MALFORMED
    return coarsen(Histogram(bounds, counts, count, total))


def exponential_histogram(
    scale: int, zero_count: int, zero_threshold: float, positive_offset: int, positive: tuple[int, ...],
    negative_offset: int, negative: tuple[int, ...], count: int, total: float | None,
) -> ExponentialHistogram | Drop:  # fmt: skip
    """A consistent exponential histogram without empty buckets at its ends, or why it is none."""
    positive_offset, positive = _trim(positive_offset, positive)
    negative_offset, negative = _trim(negative_offset, negative)
    if (
        not MIN_SCALE <= scale <= MAX_SCALE
        or zero_count + sum(positive) + sum(negative) != count
        or count > MAX_TOLD_COUNT
    ):
        return Drop.MALFORMED
    if not 0 <= zero_threshold < math.inf:
        return Drop.MALFORMED
    histogram = ExponentialHistogram(
        scale, zero_count, zero_threshold, positive_offset, positive, negative_offset, negative, count, total
    )  # fmt: skip
    return fit(histogram, MAX_BUCKETS)


def quantiles_of(found: Iterable[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Quantiles in order, each once, at most MAX_QUANTILES."""
    return tuple(sorted(dict(islice(found, MAX_QUANTILES)).items()))


def _trim(offset: int, counts: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    filled = [index for index, count in enumerate(counts) if count]
    if not filled:
        return 0, ()
    return offset + filled[0], counts[filled[0] : filled[-1] + 1]
