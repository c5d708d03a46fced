"""The nouns of the bridge: what crosses the waist between sources, ledger and followers.

Floor 0: imports nothing of the bridge and does nothing. Values are frozen; the ones made per data
point are msgspec Structs because a frozen dataclass costs eight times as much to make.
"""

from collections.abc import Iterable, Mapping
from enum import IntEnum, StrEnum
from functools import lru_cache
from itertools import starmap
from typing import NamedTuple

from msgspec import Struct


class Typed(NamedTuple):
    """An attribute value that is not a string: its OTLP type and its text as a Prometheus label value."""

    type: str
    text: str


AttributeValue = str | Typed
Attributes = tuple[tuple[str, AttributeValue], ...]
"""Sorted by key, each key once (the last of repeated ones)."""


def attribute_text(value: AttributeValue) -> str:
    """The value as a label value: strings as they are, other types as JSON would write them."""
    return value if isinstance(value, str) else value.text


def text_in(attributes: Mapping[str, AttributeValue], key: str) -> str:
    """The value of one of some attributes as a label value; empty where there is none."""
    return attribute_text(attributes.get(key, ""))


Labels = tuple[tuple[str, str], ...]
"""Names and values, sorted by name."""


def shared(labels: Iterable[tuple[str, str]]) -> Labels:
    """The same labels, of pairs that other series have as well: the series of a session differ in one or two."""
    return tuple(starmap(_pair, labels))


@lru_cache(maxsize=2**14)
def _pair(name: str, value: str) -> tuple[str, str]:
    return name, value


class Kind(StrEnum):
    """What an OTLP metric holds; sums are split by monotonicity since that decides what Prometheus sees."""

    COUNTER = "counter"
    UPDOWN = "updown"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"
    EXPONENTIAL = "exponential_histogram"
    SUMMARY = "summary"


class Temporality(IntEnum):
    """AggregationTemporality of opentelemetry/proto/metrics/v1, same numbers."""

    UNSPECIFIED = 0
    DELTA = 1
    CUMULATIVE = 2


class Drop(StrEnum):
    """Why a data point was refused: the metric label, the log field and the README row are this word."""

    NEGATIVE = "negative"
    NOT_FINITE = "not_finite"
    NO_VALUE = "no_value"
    NO_TEMPORALITY = "no_temporality"
    IMPLAUSIBLE = "implausible"
    MALFORMED = "malformed"
    TOO_OLD = "too_old"
    OVERFLOW = "overflow"


DROP_TEXT: dict[Drop, str] = {
    Drop.NEGATIVE: "a monotonic sum, count or bucket below zero",
    Drop.NOT_FINITE: "NaN or infinite where a counter needs a number",
    Drop.NO_VALUE: "no value, or two values at once",
    Drop.NO_TEMPORALITY: "aggregation temporality is neither delta nor cumulative",
    Drop.IMPLAUSIBLE: "larger than one export of this tool can be",
    Drop.MALFORMED: "parts of the point contradict each other",
    Drop.OVERFLOW: "more metric names than limits.metrics allows",
    Drop.TOO_OLD: "ends before identities that were already forgotten; it may have been counted",
}
"""One sentence for each reason, for partialSuccess and the README."""


class Resource(Struct, frozen=True):
    """Who sent: the resource attributes, content-like keys removed."""

    attributes: Attributes = ()

    def get(self, key: str) -> str:
        """The text of one attribute, empty if it is not there."""
        return next((attribute_text(value) for name, value in self.attributes if name == key), "")


class Scope(Struct, frozen=True):
    """The instrumentation scope of a metric."""

    name: str = ""
    version: str = ""


class Metric(Struct, frozen=True):
    """All that the points of one metric of one request share. One object is shared by its points."""

    name: str
    kind: Kind
    temporality: Temporality = Temporality.UNSPECIFIED
    unit: str = ""
    description: str = ""
    scope: Scope = Scope()
    resource: Resource = Resource()


class Histogram(Struct, frozen=True, tag=True, array_like=True):
    """An explicit-bucket histogram: counts has one more entry than bounds; sum is None when not sent."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    count: int
    sum: float | None


class ExponentialHistogram(Struct, frozen=True, tag=True, array_like=True):
    """An exponential histogram: bucket i of offset o covers (base**(o+i), base**(o+i+1)], base = 2**(2**-scale)."""

    scale: int
    zero_count: int
    zero_threshold: float
    positive_offset: int
    positive: tuple[int, ...]
    negative_offset: int
    negative: tuple[int, ...]
    count: int
    sum: float | None


class Summary(Struct, frozen=True, tag=True, array_like=True):
    """A summary: quantiles as sent, sorted."""

    count: int
    sum: float
    quantiles: tuple[tuple[float, float], ...]


Value = int | float | Histogram | ExponentialHistogram | Summary


class Exemplar(Struct, frozen=True):
    """One exemplar of a point: its value, time in Unix nanoseconds, and trace and span ids in hex."""

    value: float
    time: int
    trace_id: str
    span_id: str


class DataPoint(Struct, frozen=True, gc=False):
    """One OTLP data point. Times are Unix nanoseconds, 0 where the sender gave none.

    The value None is OTLP's "no recorded value": the series has ended for now.
    """

    metric: Metric
    attributes: Attributes
    start: int
    time: int
    value: Value | None
    exemplar: Exemplar | None = None


class Refusal(NamedTuple):
    """One data point that was refused, and why."""

    reason: Drop
    metric: str


class Source(IntEnum):
    """Who told of an API request."""

    EVENT = 1
    TRANSCRIPT = 2


class CostSource(StrEnum):
    """Where the cost of a request is from: the tool itself, or the price table. UNPRICED: nobody knows."""

    TOOL = "tool"
    PRICE = "price"
    UNPRICED = "unpriced"


class SpanRank(IntEnum):
    """What a span that tells of usage is: the sum of others, nobody knows, or one request."""

    SUM = 0
    UNKNOWN = 1
    REQUEST = 2


class Place(NamedTuple):
    """Where in a trace a request was told of. Ids of 8 bytes, `parent` empty for none; times in Unix nanoseconds."""

    trace: bytes
    span: bytes
    parent: bytes
    start: int
    end: int
    rank: SpanRank


class Usage(Struct, frozen=True, gc=False, array_like=True):
    """One API request as one source tells of it. Token counts are disjoint; `output` includes reasoning.

    `key` names the observation for ever (16 bytes); `request_id` is the API's, empty where the source has none;
    `message` (8 bytes, or empty) names the response among copies of it; `order` (Unix ms) says which of several
    copies is the original: the least; of copies with another `revision` the greatest stands. `cost` is in nano-dollars,
    None where the source does not tell it. `names` are further names of the request, remembered like its key; `twins`
    are what others may have named it by. `part_of` is the request whose cost, as the tool tells it, holds this one's.
    """

    tool: str
    source: Source
    key: bytes
    session: str
    model: str
    time_ms: int
    input: int
    output: int
    cache_read: int
    cache_write_5m: int
    cache_write_1h: int
    request_id: str = ""
    message: bytes = b""
    order: int = 0
    is_sidechain: bool = False
    web_searches: int = 0
    speed: str = ""
    geo: str = ""
    tier: str = ""
    cost: int | None = None
    duration_ms: int | None = None
    project: str = ""
    user: str = ""
    revision: int = 0
    place: Place | None = None
    names: tuple[bytes, ...] = ()
    twins: tuple[bytes, ...] = ()
    part_of: str = ""

    @property
    def standing(self) -> tuple[int, int, bool, int]:
        """Of several copies of one response, the one with the largest of these stands."""
        return self.revision, self.output, not self.is_sidechain, -self.order

    @property
    def cache_write(self) -> int:
        """Tokens written to caches of any life time."""
        return self.cache_write_5m + self.cache_write_1h


class UsageCell(NamedTuple):
    """Where the points of a stream belong in the join: a tool's session and model, and what they count.

    `kind` is input, output, cache_read or cache_write, whose tokens are disjoint; or `prompt`, all of a prompt, and
    `cached` and `written`, what of it was read from and written to a cache; or `usd`, the tool's own cost in
    nano-dollars.
    """

    tool: str
    session: str
    model: str
    kind: str


class TranscriptRow(NamedTuple):
    """A transcript's file: which it is, how far its history [0, history_end) and its live rest are read, and when it
    was begun (Unix ms).

    `state` is what its reader has to remember of the lines before.
    """

    id: int
    path: str
    device: int
    inode: int
    head: bytes
    history: int
    history_end: int
    live: int
    origin: int
    state: bytes = b""


EventValue = str | int | float | bool


class Event(Struct, frozen=True):
    """One log record of a known name, or one span: only the attributes that may be looked at.

    Times in Unix nanoseconds: when it was or ended, and when a span began. `trace`, `span` and `parent` are ids in
    lower-case hexadecimal, empty where there are none.
    """

    name: str
    attributes: dict[str, EventValue]
    time: int
    resource: Resource
    trace: str = ""
    span: str = ""
    parent: str = ""
    start: int = 0


class Batch(NamedTuple):
    """What one request body holds: the points, the ones refused for what they are, and requests that events tell of.

    `repeats` are metrics that say again what others of the body say of usage.
    """

    points: list[DataPoint]
    refused: list[Refusal]
    usages: tuple[Usage, ...] = ()
    repeats: frozenset[Metric] = frozenset()


class Receipt(NamedTuple):
    """What became of one posted batch, known once it is on disk."""

    accepted: int
    duplicate: int
    refused: tuple[Refusal, ...]


class Observation(NamedTuple):
    """What the telemetry learns of a commit: its duration, and how many streams met which limit."""

    seconds: float
    limited: Mapping[str, int]


class ProfileSample(NamedTuple):
    """One sample of the XRG profile: its labels, and the key of the lifetime total that it shows."""

    labels: str
    total: str


class ProfileFamily(NamedTuple):
    """One family of the XRG profile; `scale` is that of its totals."""

    name: str
    help: str
    scale: int
    samples: tuple[ProfileSample, ...]
