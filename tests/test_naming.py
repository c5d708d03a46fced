"""Names: the tables of the reference library, row by row, and the laws that hold for any input."""
# ruff: noqa: E501 - a row of a table is one line

import re
from itertools import product
from random import Random
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.exposition import escape_label_name as oracle_label
from prometheus_client.openmetrics.exposition import escape_metric_name as oracle_metric

from bridge.naming import (
    CACHED_LENGTH,
    Escaping,
    LabelStyle,
    MetricType,
    NamingError,
    Strategy,
    arrangement,
    escape_name,
    is_legal_label_name,
    is_legal_metric_name,
    labels,
    metric_name,
)

C, N, G = MetricType.COUNTER, MetricType.UPDOWN, MetricType.GAUGE
H, S = MetricType.HISTOGRAM, MetricType.SUMMARY
WITH = Strategy.UNDERSCORE_ESCAPING_WITH_SUFFIXES
WITHOUT = Strategy.UNDERSCORE_ESCAPING_WITHOUT_SUFFIXES
UTF8 = Strategy.NO_UTF8_ESCAPING_WITH_SUFFIXES
AS_IS = Strategy.NO_TRANSLATION


def label_name(key: str, **options: Any) -> str:
    """The name of a label; "error" where the rules leave none, so that another is made up."""
    ((name, _),) = labels([(key, "")], **options)
    return "error" if name == "key_" + key.encode("utf-8", "surrogatepass").hex() else name


def named(name: str, unit: str, metric_type: MetricType, strategy: Strategy, namespace: str = "") -> str:
    """The name, or "error"."""
    try:
        return metric_name(name, unit, metric_type, strategy=strategy, namespace=namespace)
    except NamingError:
        return "error"


def f(
    name: str, unit: str, metric_type: MetricType, suffixed: str, escaped: str, utf8: str, *, namespace: str = ""
) -> None:
    """One row: the names with suffixes, without, and in UTF-8 with suffixes; untranslated it is what was given."""
    untranslated = (f"{namespace}_{name}" if namespace else name) or "error"
    found = {strategy.value: named(name, unit, metric_type, strategy, namespace) for strategy in Strategy}
    assert found == {WITH: suffixed, WITHOUT: escaped, UTF8: utf8, AS_IS: untranslated}


def test_default_strategy_escapes_and_adds_suffixes() -> None:
    assert metric_name("claude_code.token.usage", "tokens", C) == "claude_code_token_usage_tokens_total"
    assert label_name("session.id") == "session_id"
    assert labels([("session.id", "a")]) == (("session_id", "a"),)


# fmt: off
def test_names_of_the_tools() -> None:
    f("claude_code.token.usage", "tokens", C, "claude_code_token_usage_tokens_total", "claude_code_token_usage", "claude_code.token.usage_tokens_total")
    f("claude_code.cost.usage", "USD", C, "claude_code_cost_usage_USD_total", "claude_code_cost_usage", "claude_code.cost.usage_USD_total")
    for unit in "", "count", "1", "{session}":
        f("claude_code.session.count", unit, C, "claude_code_session_count_total", "claude_code_session_count", "claude_code.session.count_total")
    f("claude_code.active_time.total", "s", C, "claude_code_active_time_seconds_total", "claude_code_active_time_total", "claude_code.active_time_seconds_total")
    for unit in "", "count":
        f("claude_code.lines_of_code.count", unit, C, "claude_code_lines_of_code_count_total", "claude_code_lines_of_code_count", "claude_code.lines_of_code.count_total")
    f("claude_code.pull_request.count", "", C, "claude_code_pull_request_count_total", "claude_code_pull_request_count", "claude_code.pull_request.count_total")
    f("claude_code.commit.count", "", C, "claude_code_commit_count_total", "claude_code_commit_count", "claude_code.commit.count_total")
    f("claude_code.code_edit_tool.decision", "", C, "claude_code_code_edit_tool_decision_total", "claude_code_code_edit_tool_decision", "claude_code.code_edit_tool.decision_total")
    for kind in G, N:
        f("claude_code.token.usage", "tokens", kind, "claude_code_token_usage_tokens", "claude_code_token_usage", "claude_code.token.usage_tokens")
    f("claude_code.active_time.total", "s", G, "claude_code_active_time_total_seconds", "claude_code_active_time_total", "claude_code.active_time.total_seconds")
    f("claude_code.token.usage", "token", C, "claude_code_token_usage_total", "claude_code_token_usage", "claude_code.token.usage_token_total")
    f("claude_code.token.usage", "{token}", C, "claude_code_token_usage_total", "claude_code_token_usage", "claude_code.token.usage_total")
    f("codex.turn.token_usage", "", H, "codex_turn_token_usage", "codex_turn_token_usage", "codex.turn.token_usage")
    f("codex.turn.e2e_duration_ms", "ms", H, "codex_turn_e2e_duration_ms_milliseconds", "codex_turn_e2e_duration_ms", "codex.turn.e2e_duration_ms_milliseconds")
    f("gen_ai.client.token.usage", "{token}", H, "gen_ai_client_token_usage", "gen_ai_client_token_usage", "gen_ai.client.token.usage")
    f("gen_ai.client.operation.duration", "s", H, "gen_ai_client_operation_duration_seconds", "gen_ai_client_operation_duration", "gen_ai.client.operation.duration_seconds")
    f("gemini_cli.token.usage", "", C, "gemini_cli_token_usage_total", "gemini_cli_token_usage", "gemini_cli.token.usage_total")
    f("gemini_cli.tool.call.latency", "ms", H, "gemini_cli_tool_call_latency_milliseconds", "gemini_cli_tool_call_latency", "gemini_cli.tool.call.latency_milliseconds")
    f("http.server.request.duration", "s", H, "http_server_request_duration_seconds", "http_server_request_duration", "http.server.request.duration_seconds")


def test_total_and_ratio_move_to_the_end() -> None:
    f("system.cpu.utilization", "1", G, "system_cpu_utilization_ratio", "system_cpu_utilization", "system.cpu.utilization_ratio")
    f("queue.depth", "1", N, "queue_depth", "queue_depth", "queue.depth")
    f("total.requests.total", "1", C, "requests_total", "total_requests_total", "total.requests_total")
    f("ratio.of.ratio", "1", G, "of_ratio", "ratio_of_ratio", "ratio.of_ratio")
    f("a_seconds_total", "s", C, "a_seconds_total", "a_seconds_total", "a_seconds_total")
    f("milliseconds.total.x", "ms", C, "milliseconds_x_total", "milliseconds_total_x", "milliseconds.total.x_milliseconds_total")
    f("subtotal", "", C, "subtotal_total", "subtotal", "su_total")
    f("total", "", C, "total", "total", "total_total")
    f("", "", C, "total", "error", "_total")
    f("rpc.latency", "s", S, "rpc_latency_seconds", "rpc_latency", "rpc.latency_seconds")


def test_units_are_spelled_out_and_not_said_twice() -> None:
    f("disk.io", "By/s", G, "disk_io_bytes_per_second", "disk_io", "disk.io_bytes_per_second")
    f("disk.io", "By/s", C, "disk_io_bytes_per_second_total", "disk_io", "disk.io_bytes_per_second_total")
    f("disk.io", "By/{op}", C, "disk_io_bytes_total", "disk_io", "disk.io_bytes_total")
    f("bytes.sent", "By", C, "bytes_sent_total", "bytes_sent", "bytes.sent_bytes_total")
    f("sent_seconds_count", "s", C, "sent_seconds_count_total", "sent_seconds_count", "sent_seconds_count_seconds_total")
    f("foo.bar", "By", C, "foo_bar_bytes_total", "foo_bar", "foo.bar_bytes_total")
    f("cost_usd", "USD", C, "cost_usd_USD_total", "cost_usd", "cost_usd_USD_total")
    f("cost_USD", "USD", C, "cost_USD_total", "cost_USD", "cost_USD_total")
    f("speed", "m/s", G, "speed_meters_per_second", "speed", "speed_meters_per_second")
    f("requests", "1/s", G, "requests_per_second", "requests", "requests_per_second")
    f("io_per_second", "By/s", G, "io_per_second_bytes_per_second", "io_per_second", "io_bytes_per_second")
    f("a.b", "By/By", G, "a_b_bytes_per_By", "a_b", "a.b_bytes_per_By")
    f("price", "USD/h", G, "price_USD_per_hour", "price", "price_USD_per_hour")
    f("net.speed", "By_/s", G, "net_speed_By_per_second", "net_speed", "net.speed_By__per_second")
    f("x", "a b", G, "x_a_b", "x", "x_a b")
    f("power", "KBy", G, "power_kilobytes", "power", "power_kilobytes")
    f("power", "kBy", G, "power_kBy", "power", "power_kBy")
    f("mem", "TiBy", G, "mem_tibibytes", "mem", "mem_tibibytes")
    f("temp", "Cel", G, "temp_celsius", "temp", "temp_celsius")
    f("load", "%", G, "load_percent", "load", "load_percent")
    f("foo", "$", C, "foo_total", "foo", "foo_$_total")
    f("foo", " By / s ", G, "foo_bytes_per_second", "foo", "foo_bytes_per_second")
    f("foo", "By/$", G, "foo_bytes", "foo", "foo_bytes_per_$")


def test_illegal_characters() -> None:
    f("a:b.c", "", G, "a:b_c", "a:b_c", "a:b.c")
    f("9lives", "", G, "_9lives", "_9lives", "9lives")
    f("foo__bar", "", G, "foo_bar", "foo__bar", "foo__bar")
    f(".foo.", "", G, "foo", "foo", ".foo.")
    f("_lead", "", G, "lead", "_lead", "_lead")
    f("___", "", G, "error", "___", "___")
    f("@_#_$_%", "", G, "error", "error", "@_#_$_%")
    f("日本", "", G, "error", "error", "日本")
    f("日本.tokens", "", C, "tokens_total", "tokens", "日本.tokens_total")
    f("", "", G, "error", "error", "error")


def test_namespaces() -> None:
    f("123.requests", "By", C, "app_123_requests_bytes_total", "app_123_requests", "app_123.requests_bytes_total", namespace="app")
    # Here the library makes illegal names: 9app_123_requests without suffixes, and my.app_x_total with them.
    f("123.requests", "By", C, "_9app_123_requests_bytes_total", "_9app_123_requests", "9app_123.requests_bytes_total", namespace="9app")
    f("x", "", C, "my_app_x_total", "my_app_x", "my.app_x_total", namespace="my.app")
    f("x", "", C, "x_total", "x", "字_x_total", namespace="字")


def test_a_character_is_never_cut_in_half() -> None:
    f("étotal", "", C, "total", "total", "étotal_total")  # the library takes one byte of é for a separator
    f("aétotal", "", C, "a_total", "a_total", "a_total")
# fmt: on


def test_names_that_are_not_unicode_are_refused_where_they_would_be_served() -> None:
    assert named("a\ud800.b", "", G, WITH) == "a_b"
    assert named("a\ud800.b", "", G, UTF8) == "error"
    assert named("a.b", "\ud800", G, UTF8) == "error"
    assert named("a\ud800.b", "", G, AS_IS) == "error"


def test_names_too_long_for_the_cache_follow_the_same_rules() -> None:
    long = "a." * CACHED_LENGTH
    assert metric_name(long, "s", C) == "a_" * CACHED_LENGTH + "seconds_total"
    assert label_name(long) == "a_" * CACHED_LENGTH


def test_errors_say_what_why_and_what_to_do() -> None:
    def f(name: str, strategy: Strategy, want: str) -> None:
        with pytest.raises(NamingError) as refused:
            metric_name(name, "", G, strategy=strategy)
        assert str(refused.value) == want

    f("日本", WITH, "metric '日本': UnderscoreEscapingWithSuffixes leaves no name; rename it with ASCII letters")
    f("", AS_IS, "metric '': NoTranslation leaves no name; rename it with ASCII letters")
    f(
        "._.",
        WITHOUT,
        "metric '._.': UnderscoreEscapingWithoutSuffixes leaves only underscores; rename it with ASCII letters",
    )
    f("\udcff", AS_IS, r"metric '\udcff': name or unit is not Unicode; send valid UTF-8")


def test_label_names() -> None:
    def f(key: str, collector: str, prometheus: str, utf8: str) -> None:
        for escaping in WITH, WITHOUT:
            assert label_name(key, strategy=escaping) == collector
            assert label_name(key, strategy=escaping, style=LabelStyle.PROMETHEUS) == prometheus
        for strategy, style in product((UTF8, AS_IS), LabelStyle):
            assert label_name(key, strategy=strategy, style=style) == utf8

    f("session.id", "session_id", "session_id", "session.id")
    f("service.name", "service_name", "service_name", "service.name")
    f("_private", "_private", "key_private", "_private")
    f("__x", "_x", "__x", "__x")
    f("__reserved__", "__reserved__", "__reserved__", "__reserved__")
    f("__reserved__label__name__", "__reserved_label_name__", "__reserved__label__name__", "__reserved__label__name__")
    f("123abc", "key_123abc", "key_123abc", "123abc")
    f("1", "key_1", "key_1", "1")
    f("a..b", "a_b", "a__b", "a..b")
    f("a__b", "a_b", "a__b", "a__b")
    f("a-b", "a_b", "a_b", "a-b")
    f("a:b", "a_b", "a_b", "a:b")
    f("foo.", "foo_", "foo_", "foo.")
    f(
        "label!with&special$chars)",
        "label_with_special_chars_",
        "label_with_special_chars_",
        "label!with&special$chars)",
    )
    f("字", "error", "key_", "字")
    f("字a", "_a", "key_a", "字a")
    f("ünïcode", "_n_code", "key_n_code", "ünïcode")
    f("_", "error", "key_", "error")
    f("___", "error", "error", "error")
    f("____", "error", "error", "error")
    f("", "error", "error", "error")
    f("a\ud800", "a_", "a_", "error")


def test_labels() -> None:
    def f(attributes: dict[str, str], want: dict[str, str], *reserved: str, strategy: Strategy = WITH) -> None:
        assert dict(labels(attributes.items(), strategy=strategy, reserved=frozenset(reserved))) == want

    f({}, {})
    f({"type": "input", "model.name": "opus"}, {"model_name": "opus", "type": "input"})
    f({"otel.metric.overflow": "true"}, {"otel_metric_overflow": "true"})

    # Names that become equal: joined in the order of the keys.
    f({"a_b": "3", "a.b": "2", "a-b": "1"}, {"a_b": "1;2;3"})
    f({"a_b": "3", "a.b": "2", "a-b": "1"}, {"a_b": "3", "a.b": "2", "a-b": "1"}, strategy=UTF8)

    # __name__ would be the metric's.
    f({"__name__": "x", "a": "1"}, {"a": "1"})
    f({"__name__": "x", "a": "1"}, {"a": "1"}, strategy=AS_IS)

    # Keys without a label name keep their values, apart from each other.
    f({"字": "1", "名": "2", "_": "3", "": "4"}, {"key_e5ad97": "1", "key_e5908d": "2", "key_5f": "3", "key_": "4"})
    f({"字": "1", "_": "3", "a\ud800": "4"}, {"字": "1", "key_5f": "3", "key_61eda080": "4"}, strategy=AS_IS)

    # Labels that are not the attribute's to set.
    f({"le": "5", "type": "x"}, {"exported_le": "5", "type": "x"}, "le")
    f({"le": "5"}, {"le": "5"}, "quantile")
    f({"job": "1", "exported.job": "2"}, {"exported_exported_job": "1", "exported_job": "2"}, "job", "instance")
    f({"job": "1"}, {"exported_exported_job": "1"}, "job", "exported_job")
    f(
        {"job": "1", "exported_job": "2"},
        {"exported_exported_job": "1", "exported_exported_exported_job": "2"},
        "job",
        "exported_job",
    )
    f({"l.e": "1", "l_e": "2"}, {"exported_l_e": "1;2"}, "l_e")

    # In Prometheus' own style other keys become __name__, too.
    assert labels([("--name--", "x"), ("a..b", "1")], style=LabelStyle.PROMETHEUS) == (("a__b", "1"),)


def test_escaped_names() -> None:
    def f(name: str, underscores: str, dots: str, values: str, *, is_label: bool = False) -> None:
        want = {"allow-utf-8": name, "underscores": underscores, "dots": dots, "values": values}
        assert {scheme.value: escape_name(name, scheme, is_label=is_label) for scheme in Escaping} == want

    f("foo.bar_bytes_total", "foo_bar_bytes_total", "foo_dot_bar__bytes__total", "U__foo_2e_bar__bytes__total")
    f("foo.bar", "foo_bar", "foo_dot_bar", "U__foo_2e_bar")
    f("foo_bar", "foo_bar", "foo__bar", "foo_bar")
    f(
        "mysystem.prod.west.cpu.load",
        "mysystem_prod_west_cpu_load",
        "mysystem_dot_prod_dot_west_dot_cpu_dot_load",
        "U__mysystem_2e_prod_2e_west_2e_cpu_2e_load",
    )
    f("http.status:sum", "http_status:sum", "http_dot_status:sum", "U__http_2e_status:sum")
    f(
        "metric.name/with/slashes",
        "metric_name_with_slashes",
        "metric_dot_name__with__slashes",
        "U__metric_2e_name_2f_with_2f_slashes",
    )
    f("label with 😱", "label_with__", "label__with____", "U__label_20_with_20__1f631_")
    f("花火", "__", "____", "U___82b1__706b_")
    f("9lives", "_lives", "__lives", "U___39_lives")
    f("l9", "l9", "l9", "l9")
    f("a\ud800", "a_", "a__", "U__a_FFFD_")
    f("", "", "", "")
    f("a:b", "a:b", "a:b", "a:b")
    f("a:b", "a_b", "a__b", "U__a_3a_b", is_label=True)
    f("session.id", "session_id", "session_dot_id", "U__session_2e_id", is_label=True)


# Laws. Names are drawn from the characters that the rules treat differently, among any others.

fast = settings(derandomize=True, max_examples=150, deadline=None)
texts = st.text(st.sampled_from("ab9AZ_.:-/{}$ é字\ud800\n") | st.characters(), max_size=12)
names = texts | st.lists(texts | st.sampled_from(["total", "ratio", "bytes", "seconds", "per_second", "__", "1"])).map(
    ".".join
)
units = texts | st.sampled_from(["", "1", "s", "By", "By/s", "{token}", "1/s", "$", "a$/b$"])
attributes = st.dictionaries(names, texts, max_size=6).map(lambda found: list(found.items()))
escaping = st.sampled_from([WITH, WITHOUT])


@fast
@given(names, units, st.sampled_from(MetricType), escaping, st.sampled_from(["", "app", "9app", "my.app", "@", "_"]))
def test_any_metric_gets_a_legal_name_or_a_naming_error(
    name: str, unit: str, metric_type: MetricType, strategy: Strategy, namespace: str
) -> None:
    found = named(name, unit, metric_type, strategy, namespace)
    assert found == "error" or is_legal_metric_name(found)


@fast
@given(names, units, st.sampled_from(MetricType), st.sampled_from([UTF8, AS_IS]))
def test_any_unescaped_name_is_valid_utf8_or_a_naming_error(
    name: str, unit: str, metric_type: MetricType, strategy: Strategy
) -> None:
    assert named(name, unit, metric_type, strategy).encode()


@fast
@given(
    attributes, escaping, st.sampled_from(LabelStyle), st.frozensets(st.sampled_from(["a", "_", "exported_a", "key_"]))
)
def test_labels_are_legal_unique_sorted_and_not_reserved(
    attributes: list[tuple[str, str]], strategy: Strategy, style: LabelStyle, reserved: frozenset[str]
) -> None:
    found = [name for name, _ in labels(attributes, strategy=strategy, style=style, reserved=reserved)]
    assert all(is_legal_label_name(name) for name in found)
    assert found == sorted(set(found))
    assert not reserved.intersection(found)


@fast
@given(attributes, st.sampled_from(Strategy), st.sampled_from(LabelStyle), st.randoms(use_true_random=False))
def test_labels_do_not_depend_on_the_order_of_attributes(
    attributes: list[tuple[str, str]], strategy: Strategy, style: LabelStyle, random: Random
) -> None:
    shuffled = random.sample(attributes, len(attributes))
    assert labels(shuffled, strategy=strategy, style=style) == labels(attributes, strategy=strategy, style=style)


@fast
@given(attributes, st.sampled_from(Strategy))
def test_labels_are_arranged_by_their_keys_alone(attributes: list[tuple[str, str]], strategy: Strategy) -> None:
    reserved = frozenset({"a", "_", "exported_a"})
    expected = labels(attributes, strategy=strategy, reserved=reserved)
    arranged = arrangement([key for key, _ in attributes], strategy=strategy, reserved=reserved)
    if arranged is None:
        assert len(expected) < len(attributes)
    else:
        assert tuple((name, attributes[at][1]) for name, at in arranged) == expected


@fast
@given(attributes, st.sampled_from(Strategy), st.sampled_from(LabelStyle))
def test_labels_keep_every_value(attributes: list[tuple[str, str]], strategy: Strategy, style: LabelStyle) -> None:
    assume(not any("name" in key for key, _ in attributes))  # what becomes __name__ is dropped
    found = ";".join(value for _, value in labels(attributes, strategy=strategy, style=style)).split(";")
    assert sorted(found) == sorted(";".join(value for _, value in attributes).split(";"))


@fast
@given(st.lists(names, unique=True), st.booleans())
def test_escaping_by_values_keeps_names_apart(found: list[str], is_label: bool) -> None:
    unambiguous = [name for name in found if not name.startswith("U__") and not re.search("[\ud800-\udfff]", name)]
    escaped = [escape_name(name, Escaping.VALUES, is_label=is_label) for name in unambiguous]
    assert len(set(escaped)) == len(unambiguous)


@fast
@given(names.filter(bool), st.sampled_from([Escaping.UNDERSCORES, Escaping.DOTS, Escaping.VALUES]))
def test_escaped_names_are_legal_and_those_of_the_python_client(name: str, scheme: Escaping) -> None:
    assume(not name.endswith("\n"))  # the client takes "a\n" for a legal name
    assert is_legal_metric_name(escape_name(name, scheme))
    assert escape_name(name, scheme) == oracle_metric(name, scheme)
    assume(not name.startswith("__"))  # the client escapes reserved labels as if they were illegal
    assert is_legal_label_name(escape_name(name, scheme, is_label=True))
    assert escape_name(name, scheme, is_label=True) == oracle_label(name, scheme)
