"""Samples to bytes: the XRG profile, Prometheus text 0.0.4 and 1.0.0, OpenMetrics 1.0.

Law: integers are plain digits and money is a plain decimal, never an exponent, because XRG reads `1.2e+06` as 1;
every value can be read back exactly. Names and labels come in translated; only their values are escaped here.
prometheus_client is the oracle of the tests and writes the bridge's own metrics; it takes 9 to 20 microseconds a
series, this module well under one, for the part before the value is made once.
"""

import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from decimal import Decimal
from functools import lru_cache
from itertools import starmap
from typing import NamedTuple

from bridge.model import Exemplar, ExponentialHistogram, Histogram, ProfileFamily, Summary, Value
from bridge.values import classic

TEXT_0_0_4 = "text/plain; version=0.0.4; charset=utf-8"
XRG_CONTENT_TYPE = TEXT_0_0_4


# --- numbers and labels ----------------------------------------------------------------------------------------


def scaled_text(value: int, scale: int) -> str:
    """value/scale as a plain decimal without trailing zeros: 42396750, 10**9 -> `0.04239675`."""
    if scale == 1:
        return str(value)
    whole, part = divmod(abs(value), scale)
    digits = str(part).rjust(len(str(scale)) - 1, "0").rstrip("0")
    sign = "-" if value < 0 else ""
    return f"{sign}{whole}.{digits}" if digits else f"{sign}{whole}"


def number_text(value: int | float) -> str:
    """A number as Prometheus reads it: whole ones below 2**53 as plain digits, others so that they read back equal."""
    if isinstance(value, int):
        return str(value)
    if value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    if math.isfinite(value):
        return repr(value)
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


def escape_value(text: str) -> str:
    """A label value: backslash, quote and newline escaped, other control characters as U+FFFD."""
    if not text.isprintable() or "\\" in text or '"' in text:
        text = _CONTROL.sub("\ufffd", text)
        return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return text


def escape_help(text: str, *, openmetrics: bool) -> str:
    """The text of a HELP line; OpenMetrics escapes the quote as well."""
    text = _CONTROL.sub("\ufffd", text).replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if openmetrics else text


_LEGACY_METRIC = re.compile("[a-zA-Z_:][a-zA-Z0-9_:]*")
_LEGACY_LABEL = re.compile("[a-zA-Z_][a-zA-Z0-9_]*")


def name_text(name: str) -> str:
    """A metric name as it stands in HELP, TYPE and sample lines: quoted when it needs UTF-8."""
    return name if _LEGACY_METRIC.fullmatch(name) else f'"{escape_value(name)}"'


def _label_text(label: str) -> str:
    return label if _LEGACY_LABEL.fullmatch(label) else f'"{escape_value(label)}"'


def labels_text(labels: Iterable[tuple[str, str]]) -> str:
    """Labels as they stand between the braces of a sample: `a="1",b="2"`."""
    return ",".join(starmap(_pair_text, labels))


def labels_template(names: Iterable[str]) -> str:
    """The same as a format for their values, which are to be `plain`."""
    return ",".join(f'{_label_text(name).replace("%", "%%")}="%s"' for name in names)


def are_plain(values: Iterable[str]) -> bool:
    """Whether label values stand on a page as they are."""
    text = "".join(values)
    return text.isprintable() and "\\" not in text and '"' not in text


@lru_cache(maxsize=2**12)
def _pair_text(label: str, value: str) -> str:
    """One label; the series of a session have nearly all of them alike."""
    return f'{_label_text(label)}="{escape_value(value)}"'


def sample_prefix(name: str, labels: str) -> str:
    """A sample line up to and with the space before its value; `labels` as labels_text makes them."""
    opening, bare = _openings(name)
    return f"{opening}{labels}}} " if labels else bare


@lru_cache(maxsize=4096)
def _openings(name: str) -> tuple[str, str]:
    """How a sample line begins when labels follow, and when none do."""
    if _LEGACY_METRIC.fullmatch(name):
        return f"{name}{{", f"{name} "
    return f"{{{name_text(name)},", f"{{{name_text(name)}}} "


def header(name: str, kind: str, text: str, *, openmetrics: bool) -> str:
    """The HELP and TYPE lines of a family. `kind` is the Prometheus type.

    In OpenMetrics a counter family is named without `_total`; one whose samples have no `_total` is `unknown`
    there, because the name that was asked for counts more than the type.
    """
    if openmetrics and kind == "counter":
        kind, name = ("counter", name.removesuffix("_total")) if name.endswith("_total") else ("unknown", name)
    if openmetrics and kind == "info":
        name = name.removesuffix("_info")
    elif kind == "info":
        kind = "gauge"
    shown = name_text(name)
    return f"# HELP {shown} {escape_help(text, openmetrics=openmetrics)}\n# TYPE {shown} {kind}\n"


# --- values ----------------------------------------------------------------------------------------------------


class SampleStyle(NamedTuple):
    """How the samples of one family are written. `scale` is 0 where values stand as they are."""

    name: str
    kind: str
    scale: int
    openmetrics: bool
    has_created: bool


def sample_lines(style: SampleStyle, labels: str, value: Value, exemplar: Exemplar | None, birth_ms: int) -> str:
    """The lines of one series: one for a number, several for histograms and summaries."""
    if isinstance(value, int | float) and not style.openmetrics:
        text = scaled_text(int(value), style.scale) if style.scale else number_text(value)
        return f"{sample_prefix(style.name, labels)}{text}\n"
    noted = exemplar_text(exemplar) if exemplar is not None and style.openmetrics else ""
    match value:
        case int() | float():
            text = scaled_text(int(value), style.scale) if style.scale else number_text(value)
            is_total = style.kind == "counter" and style.name.endswith("_total")
            created = _created(style, style.name.removesuffix("_total"), labels, birth_ms) if is_total else ""
            return f"{sample_prefix(style.name, labels)}{text}{noted if is_total else ''}\n{created}"
        case Histogram():
            return _histogram_lines(style, labels, value, exemplar, noted, birth_ms)
        case ExponentialHistogram():
            return _histogram_lines(style, labels, classic(value), exemplar, noted, birth_ms)
        case Summary():
            return _summary_lines(style, labels, value)


def exemplar_text(exemplar: Exemplar) -> str:
    """OpenMetrics: ` # {trace_id="..."} value seconds`."""
    ids = [("trace_id", exemplar.trace_id), ("span_id", exemplar.span_id)]
    labels = labels_text((name, text) for name, text in ids if text)
    when = f" {scaled_text(exemplar.time // 10**6, 1000)}" if exemplar.time else ""
    return f" # {{{labels}}} {number_text(exemplar.value)}{when}"


def _created(style: SampleStyle, name: str, labels: str, birth_ms: int) -> str:
    if not (style.openmetrics and style.has_created):
        return ""
    return f"{sample_prefix(f'{name}_created', labels)}{scaled_text(birth_ms, 1000)}\n"


def _bound_text(bound: float, *, openmetrics: bool) -> str:
    """`le` and `quantile`, without exponent: `1` in the text format, `1.0` in OpenMetrics."""
    if not math.isfinite(bound):
        return number_text(bound)
    text = format(Decimal(repr(float(bound))), "f")
    if openmetrics:
        return text if "." in text else f"{text}.0"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _histogram_lines(
    style: SampleStyle, labels: str, value: Histogram, exemplar: Exemplar | None, noted: str, birth_ms: int
) -> str:
    comma = "," if labels else ""
    lines: list[str] = []
    running = 0
    bounds = (*value.bounds, math.inf)
    marked = bisect_left(bounds, exemplar.value) if noted and exemplar is not None else -1
    for index, (bound, count) in enumerate(zip(bounds, value.counts, strict=True)):
        running += count
        le = f'{labels}{comma}le="{_bound_text(bound, openmetrics=style.openmetrics)}"'
        lines.append(
            f"{sample_prefix(f'{style.name}_bucket', le)}{running}{noted if index == marked else ''}\n"
        )  # fmt: skip
    # OpenMetrics has a sum only where it is a counter, and a count only beside a sum; +Inf says the same.
    has_sum = value.sum is not None and not (value.bounds and value.bounds[0] < 0) and value.sum >= 0
    if value.sum is not None and (has_sum or not style.openmetrics):
        lines.append(f"{sample_prefix(f'{style.name}_sum', labels)}{number_text(value.sum)}\n")
    if has_sum or not style.openmetrics:
        lines.append(f"{sample_prefix(f'{style.name}_count', labels)}{value.count}\n")
    lines.append(_created(style, style.name, labels, birth_ms))
    return "".join(lines)


def _summary_lines(style: SampleStyle, labels: str, value: Summary) -> str:
    comma = "," if labels else ""
    lines = [
        f"{sample_prefix(style.name, f'{labels}{comma}quantile={chr(34)}{text}{chr(34)}')}{number_text(at)}\n"
        for quantile, at in value.quantiles
        for text in [_bound_text(quantile, openmetrics=style.openmetrics)]
    ]
    lines.append(f"{sample_prefix(f'{style.name}_sum', labels)}{number_text(value.sum)}\n")
    lines.append(f"{sample_prefix(f'{style.name}_count', labels)}{value.count}\n")
    return "".join(lines)


# --- the XRG profile -------------------------------------------------------------------------------------------


def xrg_profile(profile: Iterable[ProfileFamily], totals: Mapping[str, int], time_ms: int) -> bytes:
    """The samples that XRG reads, all of them always, as `name{labels} value timestamp`."""
    lines: list[str] = []
    for family in profile:
        lines.append(f"# HELP {family.name} {family.help}\n# TYPE {family.name} counter\n")
        lines.extend(
            f"{family.name}{sample.labels} {scaled_text(totals.get(sample.total, 0), family.scale)} {time_ms}\n"
            for sample in family.samples
        )
    return "".join(lines).encode()


# --- content negotiation ---------------------------------------------------------------------------------------


class Format(NamedTuple):
    """An exposition format that a scraper asked for."""

    openmetrics: bool = False
    version: str = "0.0.4"
    escaping: str = ""

    @property
    def content_type(self) -> str:
        kind = "application/openmetrics-text" if self.openmetrics else "text/plain"
        escaping = f"; escaping={self.escaping}" if self.escaping else ""
        return f"{kind}; version={self.version}; charset=utf-8{escaping}"


_PARAMETER = re.compile(r'\s*([^=\s]+)\s*=\s*"?([^"]*?)"?\s*$')


def negotiate(accept: str) -> Format:
    """The format for an Accept header: the media range with the highest q that can be served, else text 0.0.4.

    RFC 9110, 12.5.1; of equal ones the first. Versions and `escaping` as Prometheus sends them: the escaping is
    told only to a scraper that asks for a version from 1.0.0 on.
    """
    best, best_q = Format(), -1.0
    for media_range in accept.split(","):
        kind, *rest = media_range.split(";")
        parameters = {found[1].lower(): found[2] for part in rest if (found := _PARAMETER.match(part))}
        offered = _offered(kind.strip().lower(), parameters)
        q = quality(parameters.get("q", "1"))
        if offered is not None and q > max(best_q, 0.0):
            best, best_q = offered, q
    return best


def _offered(kind: str, parameters: Mapping[str, str]) -> Format | None:
    version, escaping = parameters.get("version", ""), parameters.get("escaping", "underscores")
    escaping = escaping if escaping in ("allow-utf-8", "underscores", "dots", "values") else "underscores"
    match kind:
        case "application/openmetrics-text" if version in ("", "0.0.1"):
            return Format(True, version or "1.0.0")
        case "application/openmetrics-text" if version == "1.0.0":
            return Format(True, "1.0.0", escaping)
        case "text/plain" if version == "1.0.0":
            return Format(False, "1.0.0", escaping)
        case "text/plain" | "text/*" | "*/*":
            return Format()
        case _:
            return None


def quality(text: str) -> float:
    """The weight of an offer in an Accept header, between 0 and 1; 0 for what is no number."""
    try:
        return min(max(float(text), 0.0), 1.0)
    except ValueError:
        return 0.0
