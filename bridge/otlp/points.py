"""What the points of both encodings have in common: what repeats in them, and what their metrics are."""

from typing import NamedTuple

from bridge.model import Attributes, AttributeValue, Drop, Exemplar, Kind, Metric, Resource, Scope, Temporality, Value

MAX_KNOWN = 32 * 2**20
"""Bytes of exports whose meaning is remembered, with KNOWN_OVERHEAD for each part: about 40,000 points, as of a
thousand sessions."""
KNOWN_OVERHEAD = 300
MAX_KNOWN_POINT = 4_096
"""Bytes of a point beyond which it is not remembered."""
NO_RECORDED_VALUE = 1
"""The flag of a point without a value."""

RawPoint = tuple[Metric, Attributes, int, int, Value | Drop | None, Exemplar | None]


class Sender(NamedTuple):
    """One resource and scope, and their metrics by name, description, unit, temporality and monotonicity."""

    resource: Resource
    scope: Scope
    metrics: dict[tuple[str, str, str, int, bool], Metric]


class KnownResource(NamedTuple):
    """One resource, and its scopes by their bytes."""

    resource: Resource
    senders: dict[bytes, Sender]


class Known:
    """What repeats from export to export, decoded once and looked up by its bytes; for one set of content keys.

    At most MAX_KNOWN bytes are remembered, and equal attributes share their memory; beyond that it begins anew.
    """

    def __init__(self) -> None:
        self.attributes: dict[bytes, Attributes] = {}
        self.pairs: dict[bytes, tuple[str, AttributeValue]] = {}
        self.resources: dict[bytes, KnownResource] = {}
        self._pairs: dict[tuple[str, AttributeValue], tuple[str, AttributeValue]] = {}
        self._size = 0

    def note_attributes(self, raw: bytes, attributes: Attributes) -> Attributes:
        """Remember what some bytes mean."""
        self._take(len(raw))
        self.attributes[raw] = attributes
        return attributes

    def share(self, attributes: Attributes) -> Attributes:
        """The same attributes, sharing what is known of them."""
        return tuple([self._pairs.setdefault(pair, pair) for pair in attributes])

    def note_pair(self, raw: bytes, pair: tuple[str, AttributeValue]) -> tuple[str, AttributeValue]:
        """Remember what the bytes of one attribute mean; the points of a session differ in one or two."""
        self._take(len(raw))
        noted = self.pairs[raw] = self._pairs.setdefault(pair, pair)
        return noted

    def note_resource(self, raw: bytes, resource: Resource) -> KnownResource:
        """Remember what the bytes of a resource mean."""
        self._take(len(raw))
        noted = self.resources[raw] = KnownResource(resource, {})
        return noted

    def note_scope(self, owner: KnownResource, raw: bytes, scope: Scope) -> Sender:
        """Remember what the bytes of a scope of a resource mean."""
        self._take(len(raw))
        sender = owner.senders[raw] = Sender(owner.resource, scope, {})
        return sender

    def note_metric(self, sender: Sender, key: tuple[str, str, str, int, bool], metric: Metric) -> None:
        """Remember a metric of a sender."""
        self._take(len(key[0]) + len(key[1]) + len(key[2]))
        sender.metrics[key] = metric

    def _take(self, size: int) -> None:
        self._size += size + KNOWN_OVERHEAD
        if self._size > MAX_KNOWN:
            self.attributes.clear()
            self.pairs.clear()
            self.resources.clear()
            self._pairs.clear()
            self._size = size


_KINDS = {
    "gauge": Kind.GAUGE,
    "histogram": Kind.HISTOGRAM,
    "exponentialHistogram": Kind.EXPONENTIAL,
    "exponential_histogram": Kind.EXPONENTIAL,
    "summary": Kind.SUMMARY,
}


def kind_of(data_kind: str, temporality: int, is_monotonic: bool) -> tuple[Kind, Temporality]:
    """What a metric is, by the name of its data in either spelling, and what its points count from."""
    known = Temporality(temporality) if temporality in (1, 2) else Temporality.UNSPECIFIED
    if data_kind == "sum":
        return (Kind.COUNTER if is_monotonic else Kind.UPDOWN), known
    return _KINDS[data_kind], known
