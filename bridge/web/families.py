"""What the ledger's series are called and labelled on /metrics, and which of them are one series there.

Law: a page is well-formed whatever clients send. Names are given in the order in which metrics were first seen, also
to those that show nothing now, so a name never changes hands; none is that of one of the bridge's own families, nor
of a sample of another family. Two attribute sets that become one label set are one series: what counts is added up.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from operator import itemgetter
from typing import NamedTuple

from bridge import exposition, naming
from bridge.bookkeeper import SOURCE, source_of
from bridge.ledger import Ledger, Series
from bridge.mark import held_up
from bridge.model import Histogram, Kind, Value
from bridge.naming import Escaping, MetricType, NamingError, Strategy
from bridge.rows import MetricRow
from bridge.values import add, difference, zeroed

_TYPES = {
    Kind.COUNTER: (MetricType.COUNTER, "counter"),
    Kind.UPDOWN: (MetricType.UPDOWN, "gauge"),
    Kind.GAUGE: (MetricType.GAUGE, "gauge"),
    Kind.HISTOGRAM: (MetricType.HISTOGRAM, "histogram"),
    Kind.EXPONENTIAL: (MetricType.HISTOGRAM, "histogram"),
    Kind.SUMMARY: (MetricType.SUMMARY, "summary"),
}
_ADDED_UP = frozenset({Kind.COUNTER, Kind.UPDOWN, Kind.HISTOGRAM, Kind.EXPONENTIAL})
_BORN_AT_ZERO = frozenset({Kind.COUNTER, Kind.HISTOGRAM, Kind.EXPONENTIAL})
_OUR_PREFIXES = ("bridge_", "process_")
_OUR_NAMES = frozenset(
    {"target", "target_info", "ai_tokens", "ai_tokens_total", "ai_cost_usd", "ai_cost_usd_total", "ai_requests",
     "ai_requests_total", "ai_unpriced_tokens"}
)  # fmt: skip
"""Names that a client must not write to; its metric of such a name gets `exported_` in front."""
RESERVED = frozenset({"job", "instance"})
SOURCE_LABEL = "source"
"""The token that a series came with. Where there are tokens no attribute of a client gets this name."""
_RESERVED_OF = {"histogram": frozenset({"le"}), "summary": frozenset({"quantile"})}
_KINDS = {kind.value: kind for kind in Kind}


@cache
def _reserved(kind: str, *, has_sources: bool) -> frozenset[str]:
    """Label names that no attribute of a client gets in families of a Prometheus type."""
    return RESERVED | _RESERVED_OF.get(kind, frozenset()) | ({SOURCE_LABEL} if has_sources else frozenset())


class Family(NamedTuple):
    """A family as it is shown: name, Prometheus type, help text, and the metrics that it is made of."""

    name: str
    kind: str
    text: str
    metrics: list[MetricRow]


class Shown(NamedTuple):
    """One series as it is shown. `scale` is 0 where the value stands as it is; `is_newborn`: it stands at 0 because
    the scraper has not seen it before."""

    labels: str
    value: Value
    scale: int
    series: Series
    is_newborn: bool


class Families:
    """The families of a ledger in one naming strategy. `has_sources` tells whether there are tokens."""

    def __init__(self, ledger: Ledger, strategy: Strategy, has_sources: Callable[[], bool]) -> None:
        self._ledger = ledger
        self._strategy = strategy
        self._has_sources = has_sources
        self._named: dict[Escaping | None, tuple[int, list[Family]]] = {}
        self._distinct: dict[str, tuple[int, bool]] = {}

    @property
    def reserved(self) -> frozenset[str]:
        """Label names that no attribute of a client gets."""
        return _reserved("", has_sources=self._has_sources())

    def families(self, escaping: Escaping | None) -> list[Family]:
        """All families, in the order of their first metric; also those that show nothing now."""
        count = len(self._ledger.metrics)
        known = self._named.get(escaping)
        if known is None or known[0] != count:
            known = self._named[escaping] = (count, self._name_all(escaping))
        return known[1]

    def _name_all(self, escaping: Escaping | None) -> list[Family]:
        families: dict[str, Family] = {}
        owners: dict[str, str] = {}
        for metric in sorted(self._ledger.metrics.values()):
            metric_type, kind = _TYPES[Kind(metric.kind)]
            plain = self._plain_name(metric, metric_type, escaping)
            for name in (plain, f"{plain}_{kind}", f"{plain}_{kind}_{metric.id}"):
                taken = _taken_names(name, kind)
                if all(owners.get(part, name) == name for part in taken) and families.get(name, _ANY).kind in (
                    kind,
                    "",
                ):
                    break
            owners.update(dict.fromkeys(taken, name))
            text = f"{metric.description} (OTLP {metric.name})" if metric.description else f"OTLP {metric.name}"
            families.setdefault(name, Family(name, kind, text, [])).metrics.append(metric)
        return list(families.values())

    def _plain_name(self, metric: MetricRow, metric_type: MetricType, escaping: Escaping | None) -> str:
        try:
            name = naming.metric_name(metric.name, metric.unit, metric_type, strategy=self._strategy)
        except NamingError:
            name = naming.escape_name(metric.name or "unnamed", Escaping.VALUES)
        if escaping is not None:
            name = naming.escape_name(name, escaping)
        kind = _TYPES[Kind(metric.kind)][1]
        is_ours = name.startswith(_OUR_PREFIXES) or not _OUR_NAMES.isdisjoint(_taken_names(name, kind))
        return f"exported_{name}" if is_ours else name

    def members(self, family: Family) -> Iterator[tuple[MetricRow, Series]]:
        """The series of a family, with their metrics."""
        for metric in family.metrics:
            for series in self._ledger.families.get(metric.id, {}).values():
                yield metric, series

    def is_distinct(self, family: Family) -> bool:
        """Whether no two series of a family have the same labels, where names are not escaped for each scraper."""
        appeared = self._ledger.appeared
        known = self._distinct.get(family.name)
        if known is None or known[0] != appeared:
            labels = [series.labels or self._labels(series, family.kind, None) for _, series in self.members(family)]
            known = self._distinct[family.name] = (appeared, len(set(labels)) == len(labels))
        return known[1]

    def shown(self, family: Family, scraper: int, escaping: Escaping | None) -> Iterator[Shown]:
        """The series of a family for a scraper that was shown commit `scraper` last."""
        merged: dict[str, Shown] = {}
        for metric, series in self.members(family):
            one = self.shown_one(family, metric, series, scraper, escaping)
            if one is not None:
                known = merged.get(one.labels)
                merged[one.labels] = _merge(known, one, Kind(metric.kind)) if known is not None else one
        yield from merged.values()

    def shown_one(
        self, family: Family, metric: MetricRow, series: Series, scraper: int, escaping: Escaping | None
    ) -> Shown | None:
        """One series by itself; None where it shows nothing."""
        value, is_newborn = _value(series, _KINDS[metric.kind], scraper)
        if value is None:
            return None
        labels = (series.labels if escaping is None else "") or self._labels(series, family.kind, escaping)
        return Shown(labels, value, metric.scale, series, is_newborn)

    def _labels(self, series: Series, kind: str, escaping: Escaping | None) -> str:
        row = series.row
        reserved = _reserved(kind, has_sources=self._has_sources())
        if escaping is None and (row.job or row.instance):
            keys, values = zip(*row.labels, ("job", row.job), ("instance", row.instance), strict=True)
            arranged = _arranged(keys, self._strategy, reserved)
            if arranged is not None and exposition.are_plain(values):
                series.labels = arranged.template % arranged.pick(values)
                return series.labels
        source = source_of(row)
        pairs = self.pairs(tuple(pair for pair in row.labels if pair[0] != SOURCE), reserved, escaping)
        if source:
            pairs = (*pairs, (SOURCE_LABEL, source))
        is_overflow = not row.job and not row.instance
        text = exposition.labels_text(pairs if is_overflow else (*pairs, ("job", row.job), ("instance", row.instance)))
        if escaping is None:
            series.labels = text
        return text

    def pairs(
        self, labels: tuple[tuple[str, str], ...], reserved: frozenset[str], escaping: Escaping | None
    ) -> tuple[tuple[str, str], ...]:
        """Labels under their final names, each once."""
        pairs = naming.labels(labels, strategy=self._strategy, reserved=reserved)
        if escaping is None:
            return pairs
        escaped = [(naming.escape_name(label, escaping, is_label=True), value) for label, value in pairs]
        return naming.labels(escaped, strategy=Strategy.NO_TRANSLATION, reserved=reserved)


class _Arranged(NamedTuple):
    """How series with the same keys are labelled: their labels without the values, and what takes these in order."""

    template: str
    pick: Callable[[Sequence[str]], tuple[str, ...]]


@lru_cache(maxsize=256)
def _arranged(keys: tuple[str, ...], strategy: Strategy, reserved: frozenset[str]) -> _Arranged | None:
    """For series with these keys, of which the last two are their job and instance; None where two become one."""
    own = [(key, at) for at, key in enumerate(keys[:-2]) if key != SOURCE]
    found = naming.arrangement([key for key, _ in own], strategy=strategy, reserved=reserved)
    if found is None:
        return None
    places = [(name, own[at][1]) for name, at in found]
    places += [(SOURCE_LABEL, at) for at, key in enumerate(keys) if key == SOURCE]
    places += [("job", len(keys) - 2), ("instance", len(keys) - 1)]
    return _Arranged(exposition.labels_template(name for name, _ in places), itemgetter(*(at for _, at in places)))


_ANY = Family("", "", "", [])


def _taken_names(name: str, kind: str) -> tuple[str, ...]:
    """The names of a family's samples, and its name in OpenMetrics."""
    match kind:
        case "counter" if name.endswith("_total"):
            base = name.removesuffix("_total")
            return name, base, f"{base}_created"
        case "histogram":
            return name, *(f"{name}_{part}" for part in ("bucket", "sum", "count", "created"))
        case "summary":
            return name, f"{name}_sum", f"{name}_count", f"{name}_created"
        case _:
            return (name,)


def _value(series: Series, kind: Kind, scraper: int) -> tuple[Value | None, bool]:
    """What a series shows, and whether that is a newborn's 0. None: it has ended, or has not begun."""
    row = series.row
    if kind is Kind.COUNTER and series.floor is None and row.born <= scraper and not row.base:
        return row.value, False  # nearly all there is
    if row.value is None or (kind in (Kind.HISTOGRAM, Kind.EXPONENTIAL, Kind.SUMMARY) and isinstance(row.value, int)):
        return None, False
    # A held series was shown before, whatever its row says.
    if series.floor is not None:
        return held_up(row.value, series.floor), False
    if kind in _BORN_AT_ZERO and row.born > scraper:
        return zeroed(row.value), True
    return difference(row.value, row.base), False


def _merge(a: Shown, b: Shown, kind: Kind) -> Shown:
    if kind not in _ADDED_UP:
        return max(a, b, key=lambda shown: shown.series.row.time)
    if a.scale != b.scale:
        a, b = _unscaled(a), _unscaled(b)
    return a._replace(value=add(a.value, b.value), is_newborn=a.is_newborn or b.is_newborn)


def _unscaled(shown: Shown) -> Shown:
    if not shown.scale or isinstance(shown.value, Histogram) or not isinstance(shown.value, int | float):
        return shown._replace(scale=0)
    return shown._replace(value=shown.value / shown.scale, scale=0)
