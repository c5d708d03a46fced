"""OTLP name, unit, attributes -> Prometheus name and labels (the translation strategies).

Law: a name is legal for its strategy or NamingError is raised; no attribute key, however odd, costs a point.

The rules are those of the OpenTelemetry specification "Prometheus and OpenMetrics Compatibility" as the library
prometheus/otlptranslator 1.0.0 applies them: Prometheus, the collector and Mimir share it, and dashboards query its
names. Where the library makes an illegal name this module does not follow, and a comment says so.

Pure: no clock, no I/O. The caches hold 4096 names of at most 256 characters each; longer names are translated anew.
"""

import re
from collections.abc import Iterable
from enum import StrEnum
from functools import lru_cache
from typing import Final, assert_never

CACHED_NAMES: Final = 4096
CACHED_LENGTH: Final = 256


class Strategy(StrEnum):
    """What becomes of OTLP names; values as `translation_strategy` is spelled in Prometheus and the collector."""

    UNDERSCORE_ESCAPING_WITH_SUFFIXES = "UnderscoreEscapingWithSuffixes"
    UNDERSCORE_ESCAPING_WITHOUT_SUFFIXES = "UnderscoreEscapingWithoutSuffixes"
    NO_UTF8_ESCAPING_WITH_SUFFIXES = "NoUTF8EscapingWithSuffixes"
    NO_TRANSLATION = "NoTranslation"

    @property
    def is_escaping(self) -> bool:
        """Whether names keep to the legacy characters of Prometheus."""
        return self in (Strategy.UNDERSCORE_ESCAPING_WITH_SUFFIXES, Strategy.UNDERSCORE_ESCAPING_WITHOUT_SUFFIXES)


DEFAULT_STRATEGY: Final = Strategy.UNDERSCORE_ESCAPING_WITH_SUFFIXES


class MetricType(StrEnum):
    """What a name is made for. `updown`, a non-monotonic sum, is served as a gauge but is never a ratio."""

    COUNTER = "counter"
    UPDOWN = "updown"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"
    SUMMARY = "summary"


class LabelStyle(StrEnum):
    """Whose defaults escape label names: the collector's (`a..b` -> `a_b`, `_x` stays) or Prometheus' own
    (`a..b` -> `a__b`, `_x` -> `key_x`)."""

    COLLECTOR = "collector"
    PROMETHEUS = "prometheus"


class Escaping(StrEnum):
    """The `escaping` parameter of Accept and Content-Type: what the scraper can read."""

    ALLOW_UTF_8 = "allow-utf-8"
    UNDERSCORES = "underscores"
    DOTS = "dots"
    VALUES = "values"


class NamingError(ValueError):
    """No legal name can be made: says of what, why, and what to do."""


# UCUM units as OTLP writes them. The specification says tebibytes and kBy; these are the library's spellings.
UNITS: Final = {
    "d": "days", "h": "hours", "min": "minutes",
    "s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds",
    "By": "bytes", "KiBy": "kibibytes", "MiBy": "mebibytes", "GiBy": "gibibytes", "TiBy": "tibibytes",
    "KBy": "kilobytes", "MBy": "megabytes", "GBy": "gigabytes", "TBy": "terabytes",
    "m": "meters", "V": "volts", "A": "amperes", "J": "joules", "W": "watts", "g": "grams",
    "Cel": "celsius", "Hz": "hertz", "1": "", "%": "percent",
}  # fmt: skip
PER_UNITS: Final = {"s": "second", "m": "minute", "h": "hour", "d": "day", "w": "week", "mo": "month", "y": "year"}


def is_legal_metric_name(name: str) -> bool:
    """Whether Prometheus took the name before it knew UTF-8 names."""
    return re.fullmatch("[a-zA-Z_:][a-zA-Z0-9_:]*", name) is not None


def is_legal_label_name(name: str) -> bool:
    """Whether Prometheus took the label name before it knew UTF-8 names."""
    return re.fullmatch("[a-zA-Z_][a-zA-Z0-9_]*", name) is not None


_SURROGATE: Final = re.compile(r"[\ud800-\udfff]")  # half a character: a str can hold it, UTF-8 cannot


# Metric names


def metric_name(
    name: str,
    unit: str,
    metric_type: MetricType,
    *,
    strategy: Strategy = DEFAULT_STRATEGY,
    namespace: str = "",
) -> str:
    """The Prometheus name of an OTLP metric, without the suffixes of single samples (`_bucket`, `_sum`, `_created`).

    `claude_code.token.usage`, `tokens`, counter -> `claude_code_token_usage_tokens_total`. A namespace goes in front,
    whatever the strategy. Raises NamingError if nothing legal is left.
    """
    translate = _metric_name if len(name) + len(unit) <= CACHED_LENGTH else _metric_name.__wrapped__
    return translate(name, unit, metric_type, strategy, namespace)


@lru_cache(maxsize=CACHED_NAMES)
def _metric_name(name: str, unit: str, metric_type: MetricType, strategy: Strategy, namespace: str) -> str:
    match strategy:
        case Strategy.UNDERSCORE_ESCAPING_WITH_SUFFIXES:
            translated = _escaped_with_suffixes(name, unit, metric_type, namespace)
        case Strategy.UNDERSCORE_ESCAPING_WITHOUT_SUFFIXES:
            translated = _legal_start(_joined(_cut(namespace), _cut(name)))
        case Strategy.NO_UTF8_ESCAPING_WITH_SUFFIXES:
            translated = _with_suffixes(_joined(namespace, name), unit, metric_type)
        case Strategy.NO_TRANSLATION:
            translated = _joined(namespace, name)
        case _:
            assert_never(strategy)
    if not translated:
        raise NamingError(f"metric {_shown(name)}: {strategy} leaves no name; rename it with ASCII letters")
    if strategy.is_escaping and translated != name and not translated.strip("_"):
        raise NamingError(f"metric {_shown(name)}: {strategy} leaves only underscores; rename it with ASCII letters")
    if not strategy.is_escaping and _SURROGATE.search(translated):
        raise NamingError(f"metric {_shown(name)}: name or unit is not Unicode; send valid UTF-8")
    return translated


def _escaped_with_suffixes(name: str, unit: str, metric_type: MetricType, namespace: str) -> str:
    """A name is a list of tokens: a unit that is one of them is not said twice, `total` and `ratio` move to the end."""
    tokens = re.findall("[a-zA-Z0-9:]+", name)
    main, per = (re.sub("[^a-zA-Z0-9:]+", "_", half).removeprefix("_") for half in _unit_suffixes(unit))
    per = "" if per == "per_" else per.removesuffix("_")
    if main in tokens:
        main = ""
    if per:
        main = main.removesuffix("_")
    suffix = _type_suffix(unit, metric_type)
    tokens = [token for token in (*tokens, main, per) if token != suffix]
    return _legal_start("_".join(filter(None, (_cut(namespace), *tokens, suffix))))


def _with_suffixes(name: str, unit: str, metric_type: MetricType) -> str:
    """Suffixes that the name already ends with are taken off, each with the character before it, and put back."""
    main, per = _unit_suffixes(unit)
    suffix = _type_suffix(unit, metric_type)
    for present in filter(None, (suffix, per)):
        # That character is taken for a separator, hence `su_total` for a counter `subtotal`, as in the library;
        # but a character here is never half of one, which in the library leaves invalid UTF-8.
        if name.endswith(present) and len(name) > len(present) + 1:
            name = name[: -len(present) - 1]
    if name.endswith(main):
        main = ""
    return "_".join([name, *filter(None, (main, per, suffix))])


def _unit_suffixes(unit: str) -> tuple[str, str]:
    """`By/s` -> bytes, per_second. A half that is missing or an annotation like `{token}` is empty."""
    main, _, per = ("" if "{" in half or "}" in half else half.strip() for half in unit.partition("/"))
    return UNITS.get(main, main), f"per_{PER_UNITS.get(per, per)}" if per else ""


def _type_suffix(unit: str, metric_type: MetricType) -> str:
    if metric_type is MetricType.COUNTER:
        return "total"
    return "ratio" if metric_type is MetricType.GAUGE and unit == "1" else ""


def _joined(namespace: str, name: str) -> str:
    return f"{namespace}_{name}" if namespace else name


def _cut(text: str) -> str:
    """The text cut where it is illegal; its own underscores stay. The library leaves a namespace uncut: `my.app_x`."""
    return "_".join(re.findall("[a-zA-Z0-9:_]+", text))


def _legal_start(name: str) -> str:
    """Legal characters made a legal name. The library does not look at the namespace without suffixes: `9app_x`."""
    return f"_{name}" if name[:1].isdigit() else name


# Labels


def labels(
    attributes: Iterable[tuple[str, str]],
    *,
    strategy: Strategy = DEFAULT_STRATEGY,
    style: LabelStyle = LabelStyle.COLLECTOR,
    reserved: frozenset[str] = frozenset(),
) -> tuple[tuple[str, str], ...]:
    """The label set of a point: sorted, each name once, the same for any order of the attributes. Never raises.

    - Attributes that become one label are joined: `a-b`=1, `a.b`=2 -> `a_b`="1;2", in the order of the keys.
    - A key without a label name becomes `key_` and the hex of its UTF-8 bytes: `字` -> `key_e5ad97`.
    - What becomes `__name__` is dropped: it would replace the metric's name.
    - What becomes a `reserved` label (`le`, `job`, ...) is `exported_le`, once more prefixed while that is taken, as
      Prometheus does with `honor_labels: false`.
    """
    values: dict[str, str] = {}
    for key, value in sorted(attributes):
        name = _label_name(key, strategy, style) or "key_" + key.encode("utf-8", "surrogatepass").hex()
        values[name] = f"{values[name]};{value}" if name in values else value
    values.pop("__name__", None)
    for name in sorted(reserved.intersection(values), key=lambda name: (len(name), name)):
        exported = f"exported_{name}"
        while exported in reserved or exported in values:
            exported = f"exported_{exported}"
        values[exported] = values.pop(name)
    return tuple(sorted(values.items()))


def arrangement(
    keys: Iterable[str], *, strategy: Strategy = DEFAULT_STRATEGY, reserved: frozenset[str] = frozenset()
) -> list[tuple[str, int]] | None:
    """The label names that `labels` gives to attributes with these keys, each with the place of its value; None where
    two of them become one label."""
    named = labels(((key, str(at)) for at, key in enumerate(keys)), strategy=strategy, reserved=reserved)
    if any(";" in place for _, place in named):
        return None
    return [(name, int(place)) for name, place in named]


def _label_name(key: str, strategy: Strategy, style: LabelStyle) -> str:
    """`session.id` -> `session_id`; `__x__` keeps both its ends. Empty where nothing is left but underscores."""
    translate = _translated_key if len(key) <= CACHED_LENGTH else _translated_key.__wrapped__
    return translate(key, strategy, style)


@lru_cache(maxsize=CACHED_NAMES)
def _translated_key(key: str, strategy: Strategy, style: LabelStyle) -> str:
    if not strategy.is_escaping:
        name = "" if _SURROGATE.search(key) else key
    elif style is LabelStyle.PROMETHEUS:
        name = re.sub("[^a-zA-Z0-9_]", "_", key)
        if re.match("_(?!_)", name):
            name = f"key{name}"
    else:
        ends = "__" if len(key) >= 4 and key.startswith("__") and key.endswith("__") else ""
        name = ends + re.sub("[^a-zA-Z0-9]+", "_", key.removeprefix(ends).removesuffix(ends)) + ends
    if strategy.is_escaping and name[:1].isdigit():
        name = f"key_{name}"
    return name if name.strip("_") else ""


# Content negotiation

_SPECIAL_IN_METRIC: Final = re.compile("^[0-9]|[^a-zA-Z0-9:]")  # underscore is special, too: it opens an escape
_SPECIAL_IN_LABEL: Final = re.compile("^[0-9]|[^a-zA-Z0-9]")


def escape_name(name: str, scheme: Escaping, *, is_label: bool = False) -> str:
    """A name as a scraper of that scheme reads it; colons are for metric names alone.

    Rules as in Prometheus' client libraries. With `values` a name can be read back and stays unique, except that legal
    names stay as they are, also one that looks escaped (`U__...`). `allow-utf-8` changes nothing: quoting is for the
    exposition.
    """
    if scheme is Escaping.ALLOW_UTF_8 or not name:
        return name
    special = _SPECIAL_IN_LABEL if is_label else _SPECIAL_IN_METRIC
    match scheme:
        case Escaping.UNDERSCORES:
            return special.sub("_", name)
        case Escaping.DOTS:
            # The specification has one underscore for the rest; Prometheus and its client libraries write two.
            return special.sub(lambda found: "_dot_" if found[0] == "." else "__", name)
        case Escaping.VALUES:
            is_legal = is_legal_label_name(name) if is_label else is_legal_metric_name(name)
            return name if is_legal else "U__" + special.sub(_code_point, name)
        case _:
            assert_never(scheme)


def _code_point(found: re.Match[str]) -> str:
    match found[0]:
        case "_":
            return "__"
        case half if _SURROGATE.match(half):
            return "_FFFD_"
        case other:
            return f"_{ord(other):x}_"


def _shown(name: str) -> str:
    return repr(name[:CACHED_LENGTH])
