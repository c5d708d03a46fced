"""What is written can be read: numbers, names and labels, whole families, and what a scraper asks for.

The oracle is prometheus_client, whose two parsers have to read every family with the values and labels that went in.
"""

import math
from collections.abc import Iterator, Sequence
from decimal import Decimal
from itertools import accumulate
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import parser as text_parser
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.openmetrics import parser as openmetrics_parser

from bridge.exposition import (
    Format,
    SampleStyle,
    are_plain,
    escape_help,
    header,
    labels_template,
    labels_text,
    name_text,
    negotiate,
    number_text,
    sample_lines,
    sample_prefix,
    scaled_text,
)
from bridge.model import Exemplar, ExponentialHistogram, Histogram, Summary, Value
from bridge.values import classic

LAWS = settings(derandomize=True, deadline=None, max_examples=150)
MEGABYTE = 2**20


# --- numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (-5, "-5"),
        (2**63 - 1, "9223372036854775807"),
        (1_200_000.0, "1200000"),
        (-0.5, "-0.5"),
        (0.1, "0.1"),
        (2.0**53 - 1, "9007199254740991"),
        (2.0**53, "9007199254740992.0"),
        (1e22, "1e+22"),
        (5e-324, "5e-324"),
        (math.inf, "+Inf"),
        (-math.inf, "-Inf"),
        (math.nan, "NaN"),
    ],
)
def test_numbers_are_written_as_prometheus_reads_them(value: float, text: str) -> None:
    assert number_text(value) == text


@LAWS
@given(st.floats() | st.integers(-(2**63), 2**63))
def test_numbers_read_back_equal(value: float) -> None:
    back = type(value)(number_text(value))
    assert back == value or (math.isnan(back) and math.isnan(value))


@pytest.mark.parametrize(
    ("value", "scale", "text"),
    [
        (42_396_750, 10**9, "0.04239675"),
        (-1, 1000, "-0.001"),
        (1500, 1000, "1.5"),
        (3 * 10**9, 10**9, "3"),
        (0, 10**9, "0"),
        (10**30, 1, "1" + 30 * "0"),
    ],
)
def test_scaled_integers_are_plain_decimals(value: int, scale: int, text: str) -> None:
    assert scaled_text(value, scale) == text


@LAWS
@given(st.integers(-(10**25), 10**25), st.sampled_from([1, 1000, 10**6, 10**9]))
def test_scaled_integers_read_back_equal(value: int, scale: int) -> None:
    text = scaled_text(value, scale)
    assert Decimal(text) * scale == value
    assert "e" not in text.lower()


@pytest.mark.parametrize(
    ("bound", "text", "openmetrics"),
    [
        (0.0, "0", "0.0"),
        (1.0, "1", "1.0"),
        (-2.0, "-2", "-2.0"),
        (0.005, "0.005", "0.005"),
        (100_000.0, "100000", "100000.0"),
        (67_108_864.0, "67108864", "67108864.0"),
        (0.00001, "0.00001", "0.00001"),
        (1e16, "10000000000000000", "10000000000000000.0"),
    ],
)
def test_bounds_are_written_without_exponent(bound: float, text: str, openmetrics: str) -> None:
    for wanted, is_openmetrics in ((text, False), (openmetrics, True)):
        written_as = style("h", "histogram", openmetrics=is_openmetrics)
        lines = sample_lines(written_as, "", Histogram((bound,), (1, 0), 1, None), None, 0)
        assert lines.splitlines()[0] == f'h_bucket{{le="{wanted}"}} 1'


# --- names and labels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ([], ""),
        ([("a", "1"), ("b_2", "")], 'a="1",b_2=""'),
        ([("a", 'say "hi"')], r'a="say \"hi\""'),
        ([("a", "C:\\new\nline")], r'a="C:\\new\nline"'),
        ([("a", "{b=1},#")], 'a="{b=1},#"'),
        ([("a", "tab\tnul\0bell\x07del\x7freturn\r")], 'a="tab\ufffdnul\ufffdbell\ufffddel\ufffdreturn\ufffd"'),
        ([("a", "字 🎉 \u2028")], 'a="字 🎉 \u2028"'),
        ([("a.b", "1"), ("1", "2"), ("字", "3")], '"a.b"="1","1"="2","字"="3"'),
        ([('quote"d\\\n', "1")], r'"quote\"d\\\n"="1"'),
        ([("a:b", "1")], '"a:b"="1"'),
    ],
)
def test_labels_are_escaped_and_odd_names_quoted(labels: list[tuple[str, str]], text: str) -> None:
    assert labels_text(labels) == text


@LAWS
@given(st.lists(st.tuples(st.text() | st.sampled_from(["a", "100%", "%s"]), st.text() | st.sampled_from(["%d", "\\"]))))
def test_a_template_makes_the_same_text_of_plain_values(labels: list[tuple[str, str]]) -> None:
    values = tuple(value for _, value in labels)
    made = labels_template(name for name, _ in labels) % values
    assert made == labels_text(labels) or not are_plain(values)


@pytest.mark.parametrize(
    ("name", "text"),
    [("a_b:c", "a_b:c"), ("_1", "_1"), ("1a", '"1a"'), ("a.b", '"a.b"'), ('"', r'"\""'), ("a\nb", r'"a\nb"')],
)
def test_odd_metric_names_are_quoted(name: str, text: str) -> None:
    assert name_text(name) == text


@pytest.mark.parametrize(
    ("name", "labels", "prefix"),
    [
        ("a", "", "a "),
        ("a", 'b="1"', 'a{b="1"} '),
        ("a.b", "", '{"a.b"} '),
        ("a.b", 'c="1"', '{"a.b",c="1"} '),
    ],
)
def test_samples_begin_with_name_and_labels(name: str, labels: str, prefix: str) -> None:
    assert sample_prefix(name, labels) == prefix


@pytest.mark.parametrize(
    ("name", "kind", "text", "openmetrics"),
    [
        ("a_total", "counter", "# TYPE a_total counter", "# TYPE a counter"),
        ("a", "counter", "# TYPE a counter", "# TYPE a unknown"),
        ("a_total", "gauge", "# TYPE a_total gauge", "# TYPE a_total gauge"),
        ("target_info", "info", "# TYPE target_info gauge", "# TYPE target info"),
        ("a.b_total", "counter", '# TYPE "a.b_total" counter', '# TYPE "a.b" counter'),
    ],
)
def test_families_are_typed_as_the_format_calls_them(name: str, kind: str, text: str, openmetrics: str) -> None:
    assert header(name, kind, "help", openmetrics=False).splitlines()[1] == text
    assert header(name, kind, "help", openmetrics=True).splitlines()[1] == openmetrics


def test_help_stays_on_its_line() -> None:
    assert escape_help('a\nb\\c "d"\r', openmetrics=False) == 'a\\nb\\\\c "d"\ufffd'
    assert escape_help('a\nb\\c "d"\r', openmetrics=True) == 'a\\nb\\\\c \\"d\\"\ufffd'


# --- whole families --------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One series: its labels, its value, and the newest exemplar."""

    labels: tuple[tuple[str, str], ...]
    value: Value
    exemplar: Exemplar | None = None


class Sent(NamedTuple):
    """A family as it is rendered."""

    name: str
    kind: str
    help: str
    rows: list[Row]


Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
BIRTH_MS = 1_800_000_000_123


def style(name: str, kind: str, *, openmetrics: bool, has_created: bool = False) -> SampleStyle:
    return SampleStyle(name, kind, 0, openmetrics, has_created)


def render(families: Sequence[Sent], *, openmetrics: bool, has_created: bool = False) -> str:
    lines = []
    for family in families:
        lines.append(header(family.name, family.kind, family.help, openmetrics=openmetrics))
        written_as = style(family.name, family.kind, openmetrics=openmetrics, has_created=has_created)
        lines += [
            sample_lines(written_as, labels_text(row.labels), row.value, row.exemplar, BIRTH_MS) for row in family.rows
        ]
    return "".join(lines) + ("# EOF\n" if openmetrics else "")


def parsed(text: str, *, openmetrics: bool) -> list[Family]:
    if openmetrics:
        return list(openmetrics_parser.text_string_to_metric_families(text))  # type: ignore[no-untyped-call]  # has no annotations
    return list(text_parser.text_string_to_metric_families(text))


def samples_of(families: Sequence[Family]) -> Samples:
    """All samples; none stands twice. How `le` and `quantile` are spelled is not told apart here."""
    samples: Samples = {}
    for family in families:
        for sample in family.samples:
            labels: dict[str, str] = dict(sample.labels)
            labels.update({name: repr(float(labels[name])) for name in ("le", "quantile") if name in labels})
            key = sample.name, frozenset(labels.items())
            assert key not in samples
            samples[key] = sample.value
    return samples


def readable(text: str) -> str:
    """What is left of a text: control characters but the newline are replaced."""
    return "".join("\ufffd" if (c < " " and c != "\n") or c == "\x7f" else c for c in text)


def expected_of(families: Sequence[Sent], *, openmetrics: bool, has_created: bool = False) -> Samples:
    samples: Samples = {}
    for family in families:
        for row in family.rows:
            labels = frozenset((readable(name), readable(value)) for name, value in row.labels)
            for suffix, extra, value in expected_samples(family, row.value, openmetrics=openmetrics):
                samples[readable(family.name) + suffix, labels | extra] = value
            if has_created and family.kind in ("counter", "histogram"):
                samples[readable(family.name).removesuffix("_total") + "_created", labels] = BIRTH_MS / 1000
    return samples


def expected_samples(
    family: Sent, value: Value, *, openmetrics: bool
) -> Iterator[tuple[str, frozenset[tuple[str, str]], float]]:
    """The samples of one series: suffix of the name, further labels, value."""
    match value:
        case int() | float():
            # The text parser calls all counters x_total.
            needs_suffix = family.kind == "counter" and not family.name.endswith("_total") and not openmetrics
            yield "_total" if needs_suffix else "", frozenset(), value
        case Summary():
            for quantile, at in value.quantiles:
                yield "", frozenset({("quantile", repr(quantile))}), at
            yield "_sum", frozenset(), value.sum
            yield "_count", frozenset(), value.count
        case _:
            shown = classic(value) if isinstance(value, ExponentialHistogram) else value
            for bound, count in zip((*shown.bounds, math.inf), accumulate(shown.counts), strict=True):
                yield "_bucket", frozenset({("le", repr(bound))}), count
            if shown.sum is not None:
                yield "_sum", frozenset(), shown.sum
            yield "_count", frozenset(), shown.count


SYNTAX = "\"\\\n{}#,=' \t\r\0\x7f\x85\u2028\ufeffé字🎉aZ_"
HOSTILE = st.text(st.sampled_from(SYNTAX) | st.characters(codec="utf-8"), max_size=12)
LEGACY = st.from_regex("[a-zA-Z_][a-zA-Z0-9_]{0,8}", fullmatch=True)
# prometheus_client refuses names that begin with two underscores, Prometheus does not.
RESERVED_LABELS = ("le", "quantile", "__")
LABEL_SETS = st.lists(
    st.tuples(LEGACY | HOSTILE.filter(str.strip), HOSTILE), max_size=4, unique_by=lambda label: readable(label[0])
).map(lambda labels: tuple(label for label in labels if not label[0].startswith(RESERVED_LABELS)))
EXEMPLARS = st.none() | st.builds(
    Exemplar,
    st.floats(0, 1e6),
    st.integers(0, 2**62),
    st.sampled_from(["", "0af7651916cd43dd8448eb211c80319c"]),
    st.sampled_from(["", "b7ad6b7169203331"]),
)
COUNTS = st.integers(0, 2**53)
# Bounds that are exact in decimal; classic buckets of exponential histograms have all others.
BOUNDS = st.frozensets(st.integers(0, 4000).map(lambda number: number / 4), max_size=5).map(sorted).map(tuple)
NUMBERS = st.integers(0, 2**62) | st.floats(0, allow_nan=False, allow_infinity=False)


@st.composite
def histograms(draw: st.DrawFn) -> Histogram:
    bounds = draw(BOUNDS)
    counts = draw(st.tuples(*[COUNTS] * (len(bounds) + 1)))
    return Histogram(bounds, counts, sum(counts), draw(st.floats(0, 1e300)))


@st.composite
def exponential_histograms(draw: st.DrawFn) -> ExponentialHistogram:
    positive = tuple(draw(st.lists(COUNTS, max_size=8)))
    zero = draw(COUNTS)
    return ExponentialHistogram(
        draw(st.integers(-10, 4)), zero, 0.0, draw(st.integers(-40, 40)), positive, 0, (), zero + sum(positive), 1.5
    )  # fmt: skip


PERCENTILES = st.dictionaries(st.integers(0, 100), st.floats(0, 1e300), max_size=3)
QUANTILES = PERCENTILES.map(lambda found: tuple((percent / 100, value) for percent, value in sorted(found.items())))
VALUES: dict[str, st.SearchStrategy[Value]] = {
    "counter": NUMBERS,
    "gauge": st.integers(-(2**63), 2**63) | st.floats(allow_nan=False),
    "histogram": histograms() | exponential_histograms(),
    "summary": st.builds(Summary, COUNTS, st.floats(0, 1e300), QUANTILES),
}


@st.composite
def sent_families(draw: st.DrawFn) -> list[Sent]:
    """Families of all kinds; their names cannot be taken for a sample of another one."""
    families = []
    for number in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(sorted(VALUES)))
        ending = draw(st.sampled_from(["_total", "_x"])) if kind == "counter" else "_x"
        name = f"f{number}{draw(st.just('') | HOSTILE)}{ending}"
        has_exemplar = kind == "histogram" or ending == "_total"
        rows = [
            Row(labels, draw(VALUES[kind]), draw(EXEMPLARS) if has_exemplar else None)
            for labels in draw(st.lists(LABEL_SETS, min_size=1, max_size=3))
        ]
        unique = {frozenset((readable(name), readable(value)) for name, value in row.labels): row for row in rows}
        families.append(Sent(name, kind, f"help {draw(HOSTILE)}.", list(unique.values())))
    return families


@LAWS
@given(sent_families())
def test_the_text_format_reads_back(families: list[Sent]) -> None:
    read = parsed(render(families, openmetrics=False), openmetrics=False)
    assert samples_of(read) == expected_of(families, openmetrics=False)
    assert [family.type for family in read] == [family.kind for family in families]
    assert [family.documentation for family in read] == [readable(family.help) for family in families]


@LAWS
@given(sent_families(), st.booleans())
def test_openmetrics_reads_back(families: list[Sent], has_created: bool) -> None:
    # A counter that is not called x_total is `unknown` in OpenMetrics, and has no creation time.
    typed = [
        family._replace(kind="unknown") if family.kind == "counter" and not family.name.endswith("_total") else family
        for family in families
    ]
    read = parsed(render(families, openmetrics=True, has_created=has_created), openmetrics=True)
    assert samples_of(read) == expected_of(typed, openmetrics=True, has_created=has_created)
    assert [family.type for family in read] == [family.kind for family in typed]
    assert [family.documentation for family in read] == [readable(family.help) for family in families]
    noted = [
        (sample.exemplar.labels, sample.exemplar.value, milliseconds_of(sample.exemplar.timestamp))
        for family in read
        for sample in family.samples
        if sample.exemplar
    ]
    exemplars = (row.exemplar for family in families for row in family.rows if row.exemplar)
    assert noted == [
        (
            {k: v for k, v in (("trace_id", exemplar.trace_id), ("span_id", exemplar.span_id)) if v},
            exemplar.value,
            exemplar.time // 10**6,
        )
        for exemplar in exemplars
    ]


def milliseconds_of(timestamp: object) -> int:
    return 0 if timestamp is None else round(1000 * float(timestamp))  # type: ignore[arg-type]  # prometheus_client's own type


@pytest.mark.parametrize("openmetrics", [False, True])
def test_a_label_value_of_a_megabyte_reads_back(openmetrics: bool) -> None:
    value = '"\\\n}' + "字" * MEGABYTE + '\\"'
    family = Sent("a_total", "counter", "help", [Row((("b", value), ("c", "1")), 7)])
    read = parsed(render([family], openmetrics=openmetrics), openmetrics=openmetrics)
    assert samples_of(read) == {("a_total", frozenset({("b", value), ("c", "1")})): 7}


def test_an_exemplar_stands_at_the_bucket_that_holds_it() -> None:
    def f(value: float, le: str) -> None:
        row = Row((), Histogram((1.0, 5.0), (1, 1, 1), 3, 9.0), Exemplar(value, 0, "ab", ""))
        text = render([Sent("h", "histogram", "help", [row])], openmetrics=True)
        (noted,) = [line for line in text.splitlines() if " # {" in line]
        assert noted.startswith(f'h_bucket{{le="{le}"}}')
        parsed(text, openmetrics=True)

    f(0.5, "1.0")
    f(1.0, "1.0")
    f(1.5, "5.0")
    f(7.0, "+Inf")


@pytest.mark.parametrize(
    "histogram",
    [
        pytest.param(Histogram((1.0,), (2, 1), 3, None), id="no sum"),
        pytest.param(Histogram((-1.0, 1.0), (2, 1, 1), 4, 0.5), id="negative bounds"),
        pytest.param(ExponentialHistogram(0, 0, 0.0, 0, (1,), 0, (2,), 3, 0.5), id="negative observations"),
    ],
)
def test_openmetrics_has_sum_and_count_together_and_only_where_the_sum_counts(histogram: Value) -> None:
    text = render([Sent("h", "histogram", "help", [Row((), histogram)])], openmetrics=True)
    parsed(text, openmetrics=True)


# --- content negotiation ---------------------------------------------------------------------------------------

TEXT = Format()
OPENMETRICS = Format(True, "1.0.0", "underscores")
PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
"""What Prometheus 2.42 sends."""
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,application/openmetrics-text;version=0.0.1;"
    "q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
PROTOBUF = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited;q=0.7"


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("", TEXT),
        ("*/*", TEXT),
        ("text/*", TEXT),
        ("text/plain", TEXT),
        ("text/plain;version=0.0.4", TEXT),
        ("text/plain;version=1.0.0", Format(False, "1.0.0", "underscores")),
        ("application/openmetrics-text", Format(True, "1.0.0", "")),
        ("application/openmetrics-text;version=0.0.1", Format(True, "0.0.1", "")),
        ("application/openmetrics-text; version=1.0.0; charset=utf-8", OPENMETRICS),
        ('application/openmetrics-text; version="1.0.0"', OPENMETRICS),
        ("Application/OpenMetrics-Text;Version=1.0.0", OPENMETRICS),
        (PROMETHEUS_2, OPENMETRICS),
        (PROMETHEUS_3, Format(True, "1.0.0", "allow-utf-8")),
        (f"{PROTOBUF},{PROMETHEUS_3}", Format(True, "1.0.0", "allow-utf-8")),
        # Native histograms alone: whatever we have.
        (f"{PROTOBUF},*/*;q=0.1", TEXT),
        # The highest q, of equal ones the first.
        ("application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.9", TEXT),
        ("text/plain;q=0.5,application/openmetrics-text;version=1.0.0;q=0.9", OPENMETRICS),
        ("text/plain,application/openmetrics-text;version=1.0.0", TEXT),
        ("application/openmetrics-text;version=1.0.0;q=0,text/plain;q=0.1", TEXT),
        ("application/openmetrics-text;version=1.0.0;q=0", TEXT),
        ("application/openmetrics-text;version=1.0.0;q=nonsense,text/plain;q=0.001", TEXT),
        ("application/openmetrics-text;version=1.0.0;q=nan,text/plain;q=0.001", TEXT),
        ("application/openmetrics-text;version=1.0.0 ; q=0.9 , */* ; q=0.1", OPENMETRICS),
        # Escaping.
        ("text/plain;version=1.0.0;escaping=dots", Format(False, "1.0.0", "dots")),
        ("text/plain;version=1.0.0;escaping=values", Format(False, "1.0.0", "values")),
        ("text/plain;version=1.0.0;escaping=nonsense", Format(False, "1.0.0", "underscores")),
        ("text/plain;version=0.0.4;escaping=allow-utf-8", TEXT),
        # What cannot be served, or read.
        ("text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8", TEXT),
        ("application/json", TEXT),
        ("application/openmetrics-text;version=9.9.9", TEXT),
        (",,;;=;q=,application/;/;text", TEXT),
        ("\x00\xff;version", TEXT),
        ("a," * 10_000, TEXT),
    ],
)
def test_what_a_scraper_asks_for(accept: str, wanted: Format) -> None:
    assert negotiate(accept) == wanted


@LAWS
@given(st.text(max_size=60) | st.lists(st.sampled_from([*",;=q0.1/* ", "text/plain", "version", "1.0.0"])).map("".join))
def test_any_accept_header_gets_a_format(accept: str) -> None:
    assert negotiate(accept).content_type.startswith(("text/plain; version=", "application/openmetrics-text; version="))


@pytest.mark.parametrize(
    "accept",
    [
        "",
        "*/*",
        "text/plain",
        "text/plain;version=0.0.4",
        "text/plain;version=1.0.0",
        "text/plain;version=1.0.0;escaping=allow-utf-8",
        "text/plain;version=1.0.0;escaping=dots",
        "text/plain;version=1.0.0;escaping=nonsense",
        "application/openmetrics-text",
        "application/openmetrics-text;version=1.0.0",
        "application/openmetrics-text; version=1.0.0; escaping=allow-utf-8",
        "application/openmetrics-text;version=1.0.0;escaping=values,text/plain;version=0.0.4",
        "application/json,application/openmetrics-text;version=1.0.0,*/*",
        "application/json",
    ],
)
def test_without_q_the_format_is_that_of_prometheus_client(accept: str) -> None:
    _, content_type = choose_encoder(accept)
    assert negotiate(accept).content_type == content_type
