"""What /metrics says: names, labels, formats, limits, and each newborn counter at 0 first.

Most tests have a whole bridge in this process, without sockets and with a clock of their own; the last ones ask a
real one over HTTP. Every page that is read has to parse in prometheus_client, and no series may stand on it twice.
"""

import asyncio
import gzip
import json
import re
import sqlite3
import subprocess
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from prometheus_client import parser as text_parser
from prometheus_client.openmetrics import parser as openmetrics_parser

from bridge.config import Config, Labels, Limits
from bridge.daemon import ledger_settings
from bridge.database import DATABASE
from bridge.ledger import MAX_SCRAPERS, Ledger
from bridge.model import (
    Batch,
    DataPoint,
    Drop,
    Exemplar,
    ExponentialHistogram,
    Histogram,
    Kind,
    Metric,
    Resource,
    Scope,
    Summary,
    Temporality,
    Value,
)
from bridge.otlp import Encoding, decode_metrics
from bridge.store import Store
from bridge.telemetry import Telemetry, Throttle
from bridge.web.metrics import Views
from bridge.web.server import Refused
from tests.daemon import Daemon
from tests.prometheus import program
from tests.test_cases import SECOND, Body, Rig

HOUR_MS = 3_600_000
OPENMETRICS = "application/openmetrics-text;version=1.0.0"
TEXT_UTF8 = "text/plain;version=1.0.0;escaping=allow-utf-8"
OPENMETRICS_UTF8 = f"{OPENMETRICS};escaping=allow-utf-8"
FORMATS = (
    "",
    OPENMETRICS,
    TEXT_UTF8,
    OPENMETRICS_UTF8,
    f"{OPENMETRICS};escaping=values",
    "text/plain;version=1.0.0;escaping=dots",
)
OURS = ("#", "bridge_", "process_", "ai_")
"""How the lines begin that are not of clients' metrics."""
PROMETHEUS = {"X-Prometheus-Scrape-Timeout-Seconds": "10", "User-Agent": "Prometheus/3.0"}


# --- a bridge without sockets ----------------------------------------------------------------------------------


class Page(NamedTuple):
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        packed = self.headers.get("Content-Encoding") == "gzip"
        return (gzip.decompress(self.body) if packed else self.body).decode()


class Bridge(Rig):
    """The ledger with its views: `send` posts data points as one body, `get` asks for /metrics."""

    def __init__(self, directory: Path, name: str, config: Config) -> None:
        super().__init__(directory, ledger_settings(config), name=name)
        self.config = config
        self._bodies = count()
        self.start()

    def start(self) -> None:
        super().start()

        def clock() -> float:
            return self.now_ms / 1000

        telemetry = Telemetry(clock, Throttle(clock))
        self.ledger.observers.append(telemetry.observe)
        self.views = Views(self.ledger, self.config, telemetry, lambda: self.now_ms)

    def send(self, *points: DataPoint) -> tuple[Drop, ...]:
        """Post the points in a body like no other; why some of them were refused."""
        receipt = self.post(Body(Batch(list(points), []), str(next(self._bodies)).encode()))
        return tuple(refusal.reason for refusal in receipt.refused)

    def get(self, query: str = "", headers: Mapping[str, str] | None = None, method: str = "GET") -> Page:
        request = make_mocked_request(method, f"/metrics{query}", headers=headers)
        answer = self.call(_answered(self.views, request))
        assert isinstance(answer, web.Response)
        assert isinstance(answer.body, bytes)
        return Page(answer.headers, answer.body)

    def curl(self, query: str = "", accept: str = "") -> dict[str, str]:
        """What curl sees of the clients' series."""
        return read(self.get(query, {"Accept": accept}))

    def scrape(self, query: str = "") -> dict[str, str]:
        """What a Prometheus sees of the clients' series."""
        return read(self.get(query, PROMETHEUS))


async def _answered(views: Views, request: web.Request) -> web.StreamResponse:
    return await views.routes[request.path]["GET"](request)


def read(page: Page) -> dict[str, str]:
    """The clients' samples as written: `name{labels}` -> value. The usual job and no instance are left out."""
    parse(page)
    samples: dict[str, str] = {}
    for line in page.text.split("\n"):
        if not line or line.startswith(OURS):
            continue
        found = re.fullmatch(r"(.*?) (\S+)( # .*)?", line)
        assert found, line
        series = re.sub(r'job="svc",instance="",?', "", found[1]).replace(",}", "}").replace("{}", "")
        assert series not in samples
        samples[series] = found[2]
    return samples


def parse(page: Page) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """All samples of a page as prometheus_client reads them, each once."""
    families = (
        openmetrics_parser.text_string_to_metric_families(page.text)  # type: ignore[no-untyped-call]  # has no annotations
        if page.headers["Content-Type"].startswith("application/openmetrics-text")
        else text_parser.text_string_to_metric_families(page.text)
    )
    samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in families:
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in samples, f"{key} stands twice"
            samples[key] = sample.value
    return samples


class MakeBridge(Protocol):
    def __call__(self, config: Config = ...) -> Bridge: ...


@pytest.fixture
def make_bridge(tmp_path: Path) -> Iterator[MakeBridge]:
    """Makes bridges that end with the test."""
    made: list[Bridge] = []

    def make(config: Config = Config()) -> Bridge:  # noqa: B008  # frozen
        made.append(Bridge(tmp_path, f"bridge-{len(made)}", config))
        return made[-1]

    yield make
    for bridge in made:
        bridge.close()


@pytest.fixture
def bridge(make_bridge: MakeBridge) -> Bridge:
    return make_bridge()


def resource(**attributes: str) -> Resource:
    """A resource of the service `svc`; `__` stands for a dot."""
    named = {"service.name": "svc", **{key.replace("__", "."): text for key, text in attributes.items()}}
    return Resource(tuple(sorted((key, text) for key, text in named.items() if text)))


SERVICE = resource()


def metric(
    name: str, kind: Kind, unit: str = "", sender: Resource = SERVICE, *, temporality: Temporality = Temporality.DELTA
) -> Metric:
    return Metric(name, kind, temporality, unit, "", Scope("scope", "1.2"), sender)


def counter(name: str = "x", unit: str = "", sender: Resource = SERVICE) -> Metric:
    return metric(name, Kind.COUNTER, unit, sender)


def gauge(name: str = "g", unit: str = "", sender: Resource = SERVICE) -> Metric:
    return metric(name, Kind.GAUGE, unit, sender, temporality=Temporality.UNSPECIFIED)


def point(
    of: Metric,
    value: Value | None,
    attributes: Mapping[str, str] | None = None,
    *,
    time: int = 1,
    exemplar: Exemplar | None = None,
) -> DataPoint:
    """A data point that ends at `time` seconds."""
    return DataPoint(of, tuple(sorted((attributes or {}).items())), 0, time * SECOND, value, exemplar)


THREE = Histogram((1.0, 5.0), (1, 1, 1), 3, 9.5)
EXPONENTIAL = ExponentialHistogram(0, 2, 0.0, 0, (1, 3), 0, (), 6, 12.0)
SUMMARY = Summary(3, 9.5, ((0.5, 2.0), (0.99, 6.0)))


# --- names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "series"),
    [
        (
            "UnderscoreEscapingWithSuffixes",
            {
                'claude_code_token_usage_tokens_total{session_id="s"}': "5",
                "system_cpu_utilization_ratio": "0.25",
                "queue_depth": "-3",
                'http_request_duration_seconds_bucket{le="1"}': "1",
                'http_request_duration_seconds_bucket{le="5"}': "2",
                'http_request_duration_seconds_bucket{le="+Inf"}': "3",
                "http_request_duration_seconds_sum": "9.5",
                "http_request_duration_seconds_count": "3",
            },
        ),
        (
            "UnderscoreEscapingWithoutSuffixes",
            {
                'claude_code_token_usage{session_id="s"}': "5",
                "system_cpu_utilization": "0.25",
                "queue_depth": "-3",
                'http_request_duration_bucket{le="1"}': "1",
                'http_request_duration_bucket{le="5"}': "2",
                'http_request_duration_bucket{le="+Inf"}': "3",
                "http_request_duration_sum": "9.5",
                "http_request_duration_count": "3",
            },
        ),
        (
            "NoUTF8EscapingWithSuffixes",
            {
                '{"claude_code.token.usage_tokens_total","session.id"="s"}': "5",
                '{"system.cpu.utilization_ratio"}': "0.25",
                '{"queue.depth"}': "-3",
                '{"http.request.duration_seconds_bucket",le="1"}': "1",
                '{"http.request.duration_seconds_bucket",le="5"}': "2",
                '{"http.request.duration_seconds_bucket",le="+Inf"}': "3",
                '{"http.request.duration_seconds_sum"}': "9.5",
                '{"http.request.duration_seconds_count"}': "3",
            },
        ),
        (
            "NoTranslation",
            {
                '{"claude_code.token.usage","session.id"="s"}': "5",
                '{"system.cpu.utilization"}': "0.25",
                '{"queue.depth"}': "-3",
                '{"http.request.duration_bucket",le="1"}': "1",
                '{"http.request.duration_bucket",le="5"}': "2",
                '{"http.request.duration_bucket",le="+Inf"}': "3",
                '{"http.request.duration_sum"}': "9.5",
                '{"http.request.duration_count"}': "3",
            },
        ),
    ],
)
def test_each_strategy_has_its_names(make_bridge: MakeBridge, names: Any, series: dict[str, str]) -> None:
    bridge = make_bridge(Config(names=names))
    bridge.send(
        point(counter("claude_code.token.usage", "tokens"), 5, {"session.id": "s"}),
        point(gauge("system.cpu.utilization", "1"), 0.25),
        point(metric("queue.depth", Kind.UPDOWN, "1"), -3),
        point(metric("http.request.duration", Kind.HISTOGRAM, "s"), THREE),
    )
    assert bridge.curl(accept=TEXT_UTF8) == series


STRATEGIES = (
    "UnderscoreEscapingWithSuffixes",
    "UnderscoreEscapingWithoutSuffixes",
    "NoUTF8EscapingWithSuffixes",
    "NoTranslation",
)
HOSTILE = (
    *("a.b", "1st", "日x本", "🎉", "two words", 'quote"d', "back\\slash", "new\nline", "x{y=1}", "", "tab\t", "#"),
    "e" * 2000,
)


@pytest.mark.parametrize("names", STRATEGIES)
def test_whatever_clients_send_parses_and_adds_up(make_bridge: MakeBridge, names: Any) -> None:
    bridge = make_bridge(Config(names=names))
    sender = resource(service__version="1\n2")
    for number, name in enumerate(HOSTILE):
        labels = {"number": str(number), f"label {name}": name}
        bridge.send(
            point(counter(name, "By", sender), 7, labels),
            point(metric(f"h{name}", Kind.HISTOGRAM, "By", sender), THREE, labels),
            point(metric(f"e{name}", Kind.EXPONENTIAL, "By", sender), EXPONENTIAL, labels),
            point(metric(f"s{name}", Kind.SUMMARY, "By", sender), SUMMARY, labels),
        )
    for accept in FORMATS:
        samples = parse(bridge.get(headers={"Accept": accept}))
        ours = {key: value for key, value in samples.items() if dict(key[1]).get("job") == "svc"}
        assert sum(value == 7 for value in ours.values()) == len(HOSTILE)
        counts = [value for (name, _), value in ours.items() if name.endswith("_count")]
        assert sum(counts) == len(HOSTILE) * (3 + 6 + 3)


def test_promtool_finds_nothing_to_complain_about(bridge: Bridge) -> None:
    promtool = program("promtool")
    sender = resource(service__version="1", host__name='"\\\n')
    bridge.send(
        point(counter("claude_code.cost.usage", "USD", sender), 1.5, {"session.id": "s", "a-b": "1", "a.b": "2"}),
        point(gauge("system.cpu.utilization", "1", sender), float("nan")),
        point(metric("queue.depth", Kind.UPDOWN, "1", sender), -3),
        point(metric("gen_ai.client.operation.duration", Kind.HISTOGRAM, "s", sender), THREE, {"le": "1"}),
        point(metric("gen_ai.client.token.usage", Kind.EXPONENTIAL, "{token}", sender), EXPONENTIAL),
        point(metric("rpc.duration", Kind.SUMMARY, "s", sender), SUMMARY),
    )
    check = subprocess.run([promtool, "check", "metrics"], input=bridge.get().body, capture_output=True, timeout=30)
    assert (check.returncode, check.stdout, check.stderr) == (0, b"", b"")


def test_a_unit_of_claude_code_does_not_rename_its_series(bridge: Bridge) -> None:
    for unit in ("tokens", "token", "{token}", ""):
        bridge.send(point(counter("claude_code.token.usage", unit), 5))
    assert bridge.curl() == {"claude_code_token_usage_tokens_total": "20"}


def test_other_units_are_part_of_the_name(bridge: Bridge) -> None:
    for value, unit in ((1, "tokens"), (2, "{token}"), (4, "By")):
        bridge.send(point(counter("x", unit), value))
    assert bridge.curl() == {"x_tokens_total": "1", "x_total": "2", "x_bytes_total": "4"}


@pytest.mark.parametrize("names", STRATEGIES)
@pytest.mark.parametrize("accept", ["", OPENMETRICS, OPENMETRICS_UTF8])
def test_a_client_cannot_write_to_our_own_families(make_bridge: MakeBridge, names: Any, accept: str) -> None:
    bridge = make_bridge(Config(names=names))
    ours = ("bridge_series", "process_open_fds", "target_info", "ai_requests_total")
    theirs = [name for family in ours for name in (family, family.replace("_", "."))]
    for number, name in enumerate(theirs):
        bridge.send(point(gauge(name, sender=resource(host__name="h")), 12345, {"n": str(number)}))
    found = [name for (name, _), value in parse(bridge.get(headers={"Accept": accept})).items() if value == 12345]
    assert len(found) == len(theirs)
    assert not [name for name in found if name.startswith(("bridge_", "process_", "target_info", "ai_"))]


def test_a_metric_called_target_is_not_the_info_of_that_name(bridge: Bridge) -> None:
    bridge.send(point(gauge("target", sender=resource(host__name="h")), 12345))
    assert "12345" in bridge.curl(accept=OPENMETRICS).values()


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_one_name_of_two_types_is_two_families(bridge: Bridge, accept: str) -> None:
    bridge.send(point(counter("x"), 1), point(gauge("x"), 2), point(metric("x", Kind.HISTOGRAM), THREE))
    values = bridge.curl(accept=accept).values()
    assert {"1", "2", "9.5"} <= set(values)
    assert len(values) == 1 + 1 + 5


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
@pytest.mark.parametrize("other", ["x.count", "x.sum", "x.bucket", "x.created"])
def test_no_name_is_that_of_another_familys_sample(bridge: Bridge, other: str, accept: str) -> None:
    bridge.send(point(metric("x", Kind.HISTOGRAM), THREE), point(gauge(other), 12345))
    shown = bridge.curl(accept=accept)
    assert "12345" in shown.values()
    assert shown["x_count"] == "3"
    assert shown["x_sum"] == "9.5"


def test_a_family_that_gets_its_type_as_suffix_does_not_meet_another(make_bridge: MakeBridge) -> None:
    bridge = make_bridge(Config(names="UnderscoreEscapingWithoutSuffixes"))
    bridge.send(point(metric("x.gauge", Kind.HISTOGRAM), THREE), point(counter("x"), 1), point(gauge("x"), 2))
    values = list(bridge.curl().values())
    assert {"1", "2", "9.5"} <= set(values)
    assert len(values) == 1 + 1 + 5


def test_a_family_keeps_its_name_when_another_one_of_that_name_is_gone(make_bridge: MakeBridge) -> None:
    bridge = make_bridge(Config(names="UnderscoreEscapingWithoutSuffixes"))
    bridge.send(point(counter("x"), 1, {"session.id": "s"}))
    bridge.send(point(gauge("x"), 2))
    before = bridge.curl()
    bridge.now_ms += 25 * HOUR_MS
    bridge.ledger.expire()
    assert bridge.curl().items() < before.items()
    bridge.restart()
    assert bridge.curl().items() < before.items()


# --- labels ----------------------------------------------------------------------------------------------------


def test_job_and_instance_come_from_the_service(bridge: Bridge) -> None:
    def f(sender: Resource, labels: str) -> None:
        bridge.send(point(counter(sender=sender), 1))
        assert f"x_total{labels} 1" in bridge.get().text.splitlines()

    f(resource(), '{job="svc",instance=""}')
    f(resource(service__namespace="shop"), '{job="shop/svc",instance=""}')
    f(resource(service__instance__id="i-1"), '{job="svc",instance="i-1"}')
    f(Resource(), "")


def test_target_info_has_the_rest_of_the_resource(bridge: Bridge) -> None:
    sender = resource(service__namespace="shop", service__instance__id="i-1", service__version="2", os__type="linux")
    bridge.send(
        point(counter(sender=sender), 1),
        point(counter(sender=resource()), 1),  # nothing is left to tell
        point(counter(sender=Resource((("os.type", "linux"),))), 1),  # nothing to join on
    )
    lines = [line for line in bridge.get().text.splitlines() if line.startswith("target_info")]
    assert lines == ['target_info{os_type="linux",service_version="2",job="shop/svc",instance="i-1"} 1']


def test_target_info_is_a_gauge_or_an_info(bridge: Bridge) -> None:
    bridge.send(point(counter(sender=resource(os__type="linux")), 1))
    assert "# TYPE target_info gauge\n" in bridge.get().text
    assert "# TYPE target info\n" in bridge.get(headers={"Accept": OPENMETRICS}).text


@pytest.mark.parametrize("names", STRATEGIES)
def test_no_label_stands_twice_whatever_is_escaped(make_bridge: MakeBridge, names: Any) -> None:
    odd = {"a.b": "1", "a_b": "2", "a-b": "3", "job": "4", "instance": "5", "..name..": "6", "__name__": "7", "le": "8"}
    bridge = make_bridge(Config(names=names))
    sender = Resource(tuple(sorted({"service.name": "svc", **odd}.items())))
    bridge.send(point(metric("x", Kind.HISTOGRAM, sender=sender), THREE, odd))
    for accept in FORMATS:
        page = bridge.get(headers={"Accept": accept})
        for line in page.text.splitlines():
            labels = [] if line.startswith("#") else re.findall(r'[{,]("?[^",{]+"?)="', line)
            assert len(labels) == len(set(labels)), line
            assert "__name__" not in labels
        parse(page)


def test_the_version_is_promoted_by_default_and_a_points_own_attribute_wins(make_bridge: MakeBridge) -> None:
    sender = resource(service__version="2", host__name="h")
    bridge = make_bridge()
    bridge.send(point(counter(sender=sender), 1), point(counter(sender=sender), 2, {"service.version": "own"}))
    shown = bridge.curl()
    assert shown['x_total{service_version="2"}'] == "1"
    assert shown['x_total{service_version="own"}'] == "2"
    other = make_bridge(Config(labels=Labels(promote=("host.name", "service.name"))))
    other.send(point(counter(sender=sender), 1))
    assert other.curl()['x_total{host_name="h",service_name="svc"}'] == "1"


@pytest.mark.parametrize(
    ("names", "accept"), [("UnderscoreEscapingWithSuffixes", ""), ("NoUTF8EscapingWithSuffixes", TEXT_UTF8)]
)
def test_scope_labels_are_there_by_setting(make_bridge: MakeBridge, names: Any, accept: str) -> None:
    bridge = make_bridge(Config(names=names, labels=Labels(scope=True)))
    bridge.send(point(counter(), 1))
    assert bridge.curl(accept=accept) == {'x_total{otel_scope_name="scope",otel_scope_version="1.2"}': "1"}


def test_senders_of_two_versions_may_share_a_body(bridge: Bridge) -> None:
    bridge.send(*[point(counter(sender=resource(service__version=version)), int(version)) for version in "124"])
    shown = bridge.curl("?name[]=x_total")
    assert shown == {f'x_total{{service_version="{version}"}}': version for version in "124"}


def test_series_that_differ_in_a_dropped_label_are_added_up(make_bridge: MakeBridge) -> None:
    bridge = make_bridge(Config(labels=Labels(drop=("session.id", "user.email"))))
    cumulative = metric("c", Kind.COUNTER, temporality=Temporality.CUMULATIVE)
    for number, session in enumerate(("a", "b"), 1):
        attributes = {"session.id": session, "type": "input"}
        bridge.send(point(counter(), number, attributes), point(cumulative, 10 * number, attributes))
        bridge.send(
            point(metric("h", Kind.HISTOGRAM), THREE, attributes), point(gauge(), number, attributes, time=number)
        )
    shown = bridge.curl()
    assert shown['x_total{type="input"}'] == "3"
    assert shown['c_total{type="input"}'] == "30"
    assert shown['h_count{type="input"}'] == "6"
    assert shown['g{type="input"}'] == "2"  # of gauges the later one stands


def test_hashed_labels_tell_apart_and_name_nothing(make_bridge: MakeBridge) -> None:
    hashing = Config(labels=Labels(hash=("user.email",)))
    bridge = make_bridge(hashing)
    for value, user in ((1, "ann"), (2, "bob"), (4, "ann")):
        bridge.send(point(counter(), value, {"user.email": user}))
    shown = bridge.curl()
    assert sorted(shown.values()) == ["2", "5"]
    assert not any("ann" in series or "bob" in series for series in shown)
    bridge.restart()
    assert bridge.curl() == shown
    another = make_bridge(hashing)
    another.send(point(counter(), 1, {"user.email": "ann"}))
    assert not another.curl().keys() & shown.keys()


@pytest.mark.parametrize("labels", [Labels(hash=("user.email",)), Labels(drop=("user.email",))], ids=["hash", "drop"])
def test_a_setting_of_labels_is_true_for_sessions_that_go_on(make_bridge: MakeBridge, labels: Labels) -> None:
    bridge = make_bridge()
    session = {"session.id": "s", "user.email": "ann"}
    bridge.send(point(counter(), 1, session))
    bridge.stop()
    bridge.config = Config(labels=labels)
    bridge.settings = ledger_settings(bridge.config)
    bridge.start()
    bridge.send(point(counter(), 10, session, time=2))
    assert sum(int(value) for series, value in bridge.curl().items() if "ann" not in series) == 10


def test_what_is_hashed_does_not_show_as_instance(make_bridge: MakeBridge) -> None:
    bridge = make_bridge(Config(labels=Labels(hash=("service.instance.id",))))
    bridge.send(point(counter(sender=resource(service__instance__id="anns-laptop")), 1))
    assert "anns-laptop" not in bridge.get().text


def test_what_is_denied_does_not_show_as_job(bridge: Bridge) -> None:
    denied = decode_metrics(json.dumps(export("x", 1, {})).encode(), Encoding.JSON, {"service.name"})
    bridge.send(*denied.points)
    assert "x_total 1" in bridge.get().text.splitlines()


def test_attributes_of_one_point_that_become_one_label_are_joined(bridge: Bridge) -> None:
    bridge.send(point(counter(), 1, {"a-b": "1", "a.b": "2", "a_b": "3"}))
    assert bridge.curl() == {'x_total{a_b="1;2;3"}': "1"}


def test_attribute_sets_that_become_one_series_are_added_up(bridge: Bridge) -> None:
    for number, key in enumerate(("a.b", "a_b", "a-b"), 1):
        bridge.send(
            point(counter(), number, {key: "1"}),
            point(metric("h", Kind.HISTOGRAM), THREE, {key: "1"}),
            point(gauge(), number, {key: "1"}, time=number),
        )
    shown = bridge.curl()
    assert shown['x_total{a_b="1"}'] == "6"
    assert shown['h_count{a_b="1"}'] == "9"
    assert shown['h_sum{a_b="1"}'] == "28.5"
    assert shown['g{a_b="1"}'] == "3"  # of gauges the later one stands


def test_up_and_down_sums_that_become_one_series_are_added_up(bridge: Bridge) -> None:
    for number, key in enumerate(("a.b", "a_b", "a-b"), 1):
        bridge.send(point(metric("u", Kind.UPDOWN), number, {key: "1"}))
    assert bridge.curl() == {'u{a_b="1"}': "6"}


def test_explicit_and_exponential_histograms_of_one_name_are_added_up(bridge: Bridge) -> None:
    for kind, value in ((Kind.HISTOGRAM, THREE), (Kind.EXPONENTIAL, EXPONENTIAL)):
        bridge.send(point(metric("h", kind), value))
    shown = bridge.curl()
    assert (shown["h_count"], shown["h_sum"], shown['h_bucket{le="+Inf"}']) == ("9", "21.5", "9")


def test_an_exact_counter_and_another_one_of_its_name_are_added_up(bridge: Bridge) -> None:
    bridge.send(
        point(counter("claude_code.cost.usage", "USD"), 0.25), point(counter("claude_code_cost_usage", "USD"), 0.5)
    )
    assert bridge.curl() == {"claude_code_cost_usage_USD_total": "0.75"}


def test_attributes_do_not_take_the_place_of_reserved_labels(bridge: Bridge) -> None:
    odd = {"job": "j", "instance": "i", "le": "7", "quantile": "8", "__name__": "n"}
    bridge.send(
        point(counter(), 1, odd),
        point(metric("h", Kind.HISTOGRAM), Histogram((), (1,), 1, 1.0), odd),
        point(metric("s", Kind.SUMMARY), SUMMARY, odd),
    )
    assert bridge.curl() == {
        'x_total{exported_instance="i",exported_job="j",le="7",quantile="8"}': "1",
        'h_bucket{exported_instance="i",exported_job="j",exported_le="7",quantile="8",le="+Inf"}': "1",
        'h_sum{exported_instance="i",exported_job="j",exported_le="7",quantile="8"}': "1",
        'h_count{exported_instance="i",exported_job="j",exported_le="7",quantile="8"}': "1",
        's{exported_instance="i",exported_job="j",exported_quantile="8",le="7",quantile="0.5"}': "2",
        's{exported_instance="i",exported_job="j",exported_quantile="8",le="7",quantile="0.99"}': "6",
        's_sum{exported_instance="i",exported_job="j",exported_quantile="8",le="7"}': "9.5",
        's_count{exported_instance="i",exported_job="j",exported_quantile="8",le="7"}': "3",
    }


# --- values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Kind.HISTOGRAM, Kind.EXPONENTIAL, Kind.SUMMARY, Kind.GAUGE, Kind.COUNTER])
def test_a_series_that_begins_without_a_value_is_well_formed(bridge: Bridge, kind: Kind) -> None:
    bridge.send(point(metric("x", kind), None))
    shown = bridge.curl(accept=OPENMETRICS)
    assert "x" not in shown
    bridge.restart()
    assert bridge.curl(accept=OPENMETRICS) == shown


def test_a_histogram_whose_only_points_were_refused_is_well_formed(bridge: Bridge) -> None:
    bridge.send(point(counter(), 1, {"session.id": "s"}, time=100))
    bridge.now_ms += 8 * 24 * HOUR_MS
    bridge.call(bridge.ledger.forget())
    refused = bridge.send(point(metric("h", Kind.HISTOGRAM), THREE, {"session.id": "s"}, time=100))
    assert refused == (Drop.TOO_OLD,)
    assert 'h{session_id="s"}' not in bridge.curl(accept=OPENMETRICS)


def test_counts_beyond_64_bits_do_not_end_the_bridge(bridge: Bridge) -> None:
    largest = Histogram((1.0,), (2**52, 2**52), 2**53, 1.0)
    bridge.send(*[point(metric("h", Kind.HISTOGRAM), largest)] * 2100)
    bridge.send(point(counter(), 1))
    assert bridge.curl()["x_total"] == "1"


def test_a_counter_stays_finite(bridge: Bridge) -> None:
    large = Histogram((), (1,), 1, 1.7e308)
    for time in (1, 2):
        bridge.send(point(counter(), 1.7e308, time=time), point(metric("h", Kind.HISTOGRAM), large, time=time))
    bridge.send(point(counter(), 1, time=3))
    shown = bridge.curl()
    assert "Inf" not in shown["x_total"]
    assert "Inf" not in shown["h_sum"]


def test_a_gauge_that_is_not_a_number_is_one_after_a_restart_too(bridge: Bridge) -> None:
    bridge.send(point(gauge(), float("nan")))
    assert bridge.curl() == {"g": "NaN"}
    bridge.restart()
    assert bridge.curl() == {"g": "NaN"}


def test_a_gauge_leaves_when_it_has_no_recorded_value(bridge: Bridge) -> None:
    bridge.send(point(gauge(), 5, {"a": "1"}), point(gauge(), 6, {"a": "2"}))
    bridge.send(point(gauge(), None, {"a": "1"}, time=2))
    assert bridge.curl() == {'g{a="2"}': "6"}
    bridge.send(point(gauge(), 7, {"a": "1"}, time=3))
    assert bridge.curl() == {'g{a="1"}': "7", 'g{a="2"}': "6"}


def test_an_up_and_down_sum_that_comes_back_may_be_below_what_it_was(bridge: Bridge) -> None:
    depth = metric("u", Kind.UPDOWN)
    bridge.send(point(depth, 5, {"session.id": "s"}))
    bridge.now_ms += 25 * HOUR_MS
    bridge.send(point(depth, -1, {"session.id": "s"}, time=2))
    # Its level, or what it changed by since it came back; not 0.
    assert bridge.curl()['u{session_id="s"}'] in ("4", "-1")


# --- formats ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", "text/plain; version=0.0.4; charset=utf-8"),
        ("text/plain;version=1.0.0", "text/plain; version=1.0.0; charset=utf-8; escaping=underscores"),
        (TEXT_UTF8, "text/plain; version=1.0.0; charset=utf-8; escaping=allow-utf-8"),
        (OPENMETRICS, "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=underscores"),
        (OPENMETRICS_UTF8, "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=allow-utf-8"),
    ],
)
@pytest.mark.parametrize("query", ["", "?name[]=x_total", "?name[]=none"])
def test_each_format_says_what_it_is(bridge: Bridge, query: str, accept: str, content_type: str) -> None:
    bridge.send(point(counter(), 1))
    page = bridge.get(query, {"Accept": accept})
    assert page.headers["Content-Type"] == content_type
    ends = [number for number, line in enumerate(page.text.splitlines(), 1) if line == "# EOF"]
    assert ends == ([len(page.text.splitlines())] if "openmetrics" in accept else [])
    parse(page)


@pytest.mark.parametrize(
    ("accept", "series"),
    [
        ("", 'a_b_total{c_d="1"}'),
        ("text/plain;version=0.0.4;escaping=allow-utf-8", 'a_b_total{c_d="1"}'),
        ("text/plain;version=1.0.0", 'a_b_total{c_d="1"}'),
        ("text/plain;version=1.0.0;escaping=dots", 'a_dot_b__total{c_dot_d="1"}'),
        ("text/plain;version=1.0.0;escaping=values", 'U__a_2e_b__total{U__c_2e_d="1"}'),
        (TEXT_UTF8, '{"a.b_total","c.d"="1"}'),
        (OPENMETRICS_UTF8, '{"a.b_total","c.d"="1"}'),
    ],
)
def test_names_are_escaped_as_the_scraper_asks(make_bridge: MakeBridge, accept: str, series: str) -> None:
    bridge = make_bridge(Config(names="NoUTF8EscapingWithSuffixes"))
    bridge.send(point(counter("a.b"), 1, {"c.d": "1"}))
    assert bridge.curl(accept=accept) == {series: "1"}


@pytest.mark.parametrize(
    ("accept_encoding", "is_packed"),
    [
        ("", False),
        ("identity", False),
        ("deflate, br", False),
        ("gzip", True),
        ("GZip", True),
        ("deflate, gzip;q=1.0, *;q=0.5", True),
        ("gzip;q=0.001", True),
        ("*", True),
        ("gzip;q=0", False),
        ("gzip; q=0.000", False),
        ("gzip;q=0.", False),
        ("gzip;q=0, *", False),
        # What is named goes before `*`, wherever it stands.
        ("*;q=0, gzip", True),
        ("*, gzip;q=0", False),
        ("identity, *;q=0", False),
        (",;q=;,", False),
    ],
)
def test_a_page_is_packed_for_those_who_take_it(bridge: Bridge, accept_encoding: str, is_packed: bool) -> None:
    bridge.send(point(counter(), 1))
    page = bridge.get(headers={"Accept-Encoding": accept_encoding})
    assert (page.headers.get("Content-Encoding") == "gzip") is is_packed
    assert "Accept-Encoding" in page.headers["Vary"]
    assert read(page) == {"x_total": "1"}


def test_a_large_page_is_packed_too(bridge: Bridge) -> None:
    bridge.send(*[point(counter(), 1, {"n": str(number)}) for number in range(1000)])
    page = bridge.get(headers={"Accept-Encoding": "gzip"})
    assert page.headers["Content-Encoding"] == "gzip"
    assert len(page.body) < len(page.text) / 5
    assert len(read(page)) == 1000


@pytest.mark.parametrize(
    ("query", "families"),
    [
        ("?name[]=x_total", {"x_total"}),
        ("?name%5B%5D=x_total&name[]=g", {"x_total", "g"}),
        ("?name[]=h", {"h"}),
        ("?name[]=h_bucket", {"h"}),
        ("?name[]=h_sum", {"h"}),
        ("?name[]=target_info", {"target_info"}),
        ("?name[]=bridge_series", {"bridge_series"}),
        ("?name[]=bridge_points_accepted_total&name[]=g", {"bridge_points_accepted_total", "g"}),
        ("?name[]=bridge_commit_seconds_bucket", {"bridge_commit_seconds"}),
        ("?name[]=none", set()),
        ("?name[]=", set()),
    ],
)
def test_some_families_can_be_asked_for(bridge: Bridge, query: str, families: set[str]) -> None:
    sender = resource(os__type="linux")
    bridge.send(point(counter(sender=sender), 1), point(gauge(), 2), point(metric("h", Kind.HISTOGRAM), THREE))
    text = bridge.get(query).text
    assert set(re.findall("^# TYPE (\\S+) ", text, re.MULTILINE)) == families


def test_utf8_names_can_be_asked_for(make_bridge: MakeBridge) -> None:
    bridge = make_bridge(Config(names="NoTranslation"))
    bridge.send(point(gauge("a.b"), 1), point(gauge("c.d"), 2))
    assert bridge.curl("?name[]=a.b", TEXT_UTF8) == {'{"a.b"}': "1"}


def test_our_own_metrics_stand_last(bridge: Bridge) -> None:
    bridge.send(point(counter(), 1))
    ours = [line.startswith(OURS) for line in bridge.get().text.splitlines() if line[0] != "#"]
    assert ours == sorted(ours)


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_creation_times_are_there_by_setting(make_bridge: MakeBridge, accept: str) -> None:
    for has_created in (False, True):
        bridge = make_bridge(Config(created_series=has_created))
        bridge.now_ms = 1_800_000_000_123
        bridge.send(point(counter(), 1), point(gauge(), 2), point(metric("h", Kind.HISTOGRAM), THREE))
        created = {series: value for series, value in bridge.curl(accept=accept).items() if "_created" in series}
        times = {"x_created": "1800000000.123", "h_created": "1800000000.123"}
        assert created == (times if has_created and accept else {})


def exemplar(value: float, seconds: int) -> Exemplar:
    return Exemplar(value, seconds * SECOND, f"{seconds:032x}", f"{seconds:016x}")


def exemplars(bridge: Bridge) -> list[str]:
    page = bridge.get(headers={"Accept": OPENMETRICS})
    parse(page)
    return [line.partition(" # ")[2] for line in page.text.splitlines() if " # {" in line]


def test_the_newest_exemplar_is_kept(bridge: Bridge) -> None:
    session = {"session.id": "s"}
    bridge.send(point(counter(), 1, session, time=1, exemplar=exemplar(1.0, 100)))
    bridge.send(point(counter(), 1, session, time=3, exemplar=exemplar(3.0, 300)))
    bridge.send(point(counter(), 1, session, time=4))
    newest = [f'{{trace_id="{300:032x}",span_id="{300:016x}"}} 3 300']
    assert exemplars(bridge) == newest
    bridge.send(point(counter(), 1, session, time=2, exemplar=exemplar(2.0, 200)))  # arrives late
    assert exemplars(bridge) == newest
    assert " # {" not in bridge.get().text


def test_exemplars_stand_only_where_openmetrics_has_them(bridge: Bridge) -> None:
    noted = exemplar(2.0, 100)
    bridge.send(
        point(gauge("g.total"), 1, exemplar=noted),
        point(metric("u.total", Kind.UPDOWN), 1, exemplar=noted),
        point(counter(), 1, exemplar=noted),
        point(metric("h", Kind.HISTOGRAM), THREE, exemplar=noted),
    )
    assert len(exemplars(bridge)) == 2


def test_a_gauge_has_no_creation_time_whatever_its_name(make_bridge: MakeBridge) -> None:
    bridge = make_bridge(Config(created_series=True))
    bridge.send(point(gauge("g.total"), 1))
    assert bridge.curl(accept=OPENMETRICS) == {"g_total": "1"}


@pytest.mark.parametrize("path", ["/metrics", "/v1/metrics", "/-/ready"])
def test_nothing_is_shown_before_the_state_is_loaded(
    tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.web.metrics.LOAD_SECONDS", 0)
    config = Config()
    ledger = Ledger(Store(tmp_path), ledger_settings(config), lambda: 0, lambda *_: None)
    views = Views(ledger, config, Telemetry(lambda: 0.0, Throttle(lambda: 0.0)), lambda: 0)
    with pytest.raises(Refused) as refused:
        asyncio.run(_answered(views, make_mocked_request("GET", path)))
    assert refused.value.code == 503


# --- limits ----------------------------------------------------------------------------------------------------


def limited(bridge: Bridge) -> dict[str, str]:
    """bridge_streams_limited_total by its setting."""
    page = bridge.get("?name[]=bridge_streams_limited_total").text
    return dict(re.findall(r'^bridge_streams_limited_total\{setting="(.*)"\} (.*)\.0$', page, re.MULTILINE))


def settings_logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [vars(record)["setting"] for record in caplog.records if "setting" in vars(record)]


def test_above_the_limit_of_a_metric_its_sums_stay_right(
    make_bridge: MakeBridge, caplog: pytest.LogCaptureFixture
) -> None:
    bridge = make_bridge(Config(limits=Limits(series_per_metric=2)))
    for number in range(5):
        attributes = {"n": str(number)}
        bridge.send(point(counter(), 2**number, attributes), point(metric("h", Kind.HISTOGRAM), THREE, attributes))
    bridge.send(point(counter(), 100, {"n": "0"}), point(counter(), 1000, {"n": "4"}))
    shown = {series: value for series, value in bridge.curl().items() if series.startswith("x") or "h_count" in series}
    assert shown == {
        'x_total{n="0"}': "101",
        'x_total{n="1"}': "2",
        'x_total{otel_metric_overflow="true"}': "1028",
        'h_count{n="0"}': "3",
        'h_count{n="1"}': "3",
        'h_count{otel_metric_overflow="true"}': "9",
    }
    assert limited(bridge) == {"limits.series_per_metric": "6"}
    assert settings_logged(caplog) == ["limits.series_per_metric"]
    bridge.restart()
    bridge.send(point(counter(), 10_000, {"n": "3"}))
    assert bridge.curl()['x_total{otel_metric_overflow="true"}'] == "11028"


def test_above_the_limit_of_all_series_the_sums_stay_right(
    make_bridge: MakeBridge, caplog: pytest.LogCaptureFixture
) -> None:
    bridge = make_bridge(Config(limits=Limits(series=3)))
    bridge.send(*[point(counter("x"), 1, {"n": str(number)}) for number in range(3)])
    bridge.send(*[point(counter("y"), 1, {"n": str(number)}) for number in range(7)])
    assert bridge.curl()['y_total{otel_metric_overflow="true"}'] == "7"
    assert limited(bridge) == {"limits.series": "7"}
    assert settings_logged(caplog) == ["limits.series"]


def test_metrics_beyond_the_limit_are_refused_and_the_others_go_on(
    make_bridge: MakeBridge, caplog: pytest.LogCaptureFixture
) -> None:
    bridge = make_bridge(Config(limits=Limits(metrics=2)))
    refused = bridge.send(*[point(counter(name), 1) for name in ("a", "b", "c", "d", "a")])
    assert refused == (Drop.OVERFLOW, Drop.OVERFLOW)
    assert bridge.curl() == {"a_total": "2", "b_total": "1"}
    assert limited(bridge) == {"limits.metrics": "2"}
    assert settings_logged(caplog) == ["limits.metrics"]


def test_attributes_beyond_the_limit_are_no_labels(make_bridge: MakeBridge, caplog: pytest.LogCaptureFixture) -> None:
    bridge = make_bridge(Config(limits=Limits(attributes=3)))
    bridge.send(*[point(counter(), 1, {f"a{key}": "1" for key in range(number)}) for number in range(6)])
    assert bridge.curl() == {
        "x_total": "1",
        'x_total{a0="1"}': "1",
        'x_total{a0="1",a1="1"}': "1",
        'x_total{a0="1",a1="1",a2="1"}': "3",
    }
    assert limited(bridge) == {"limits.attributes": "2"}
    assert settings_logged(caplog) == ["limits.attributes"]


def test_long_names_and_values_are_cut_and_stay_apart(
    make_bridge: MakeBridge, caplog: pytest.LogCaptureFixture
) -> None:
    bridge = make_bridge(Config(limits=Limits(label_length=40)))
    for end in "12":
        bridge.send(point(counter(), 1, {"value": "v" * 40 + end}), point(counter(), 1, {"n" * 40 + end: "1"}))
    bridge.send(point(counter(), 1, {"value": "v" * 40}))
    labels = [dict(labels) for (name, labels) in parse(bridge.get()) if name == "x_total"]
    assert len(labels) == 5
    assert all(len(name) <= 40 and len(value) <= 40 for found in labels for name, value in found.items())
    assert {"job": "svc", "instance": "", "value": "v" * 40} in labels
    assert limited(bridge) == {"limits.label_length": "4"}
    assert settings_logged(caplog) == ["limits.label_length"]


def test_no_text_of_a_client_is_long(make_bridge: MakeBridge) -> None:
    bridge = make_bridge(Config(labels=Labels(scope=True, promote=("promoted",))))
    long = "x" * 2**20
    sender = Resource(tuple((key, long) for key in ("promoted", "service.instance.id", "service.name", "z" + long)))
    named = Metric(long, Kind.COUNTER, Temporality.DELTA, long, long, Scope(long, long), sender)
    bridge.send(DataPoint(named, (("a", long), ("b" + long, "1")), 0, SECOND, 1))
    assert max(map(len, bridge.get().text.splitlines())) < 8 * 2**10


# --- increase(): every newborn counter is shown at 0 first -----------------------------------------------------


def test_an_unknown_scraper_sees_history_as_it_stands(bridge: Bridge) -> None:
    bridge.send(point(counter(), 5))
    assert bridge.scrape() == {"x_total": "5"}
    assert bridge.scrape() == {"x_total": "5"}


def test_a_series_born_between_two_scrapes_is_shown_at_0_once(bridge: Bridge) -> None:
    bridge.scrape()
    bridge.send(point(counter(), 5, {"n": "1"}))
    assert bridge.scrape() == {'x_total{n="1"}': "0"}
    bridge.send(point(counter(), 7, {"n": "2"}), point(counter(), 1, {"n": "1"}))
    assert bridge.scrape() == {'x_total{n="1"}': "6", 'x_total{n="2"}': "0"}
    assert bridge.scrape() == {'x_total{n="1"}': "6", 'x_total{n="2"}': "7"}


def test_what_grows_before_its_0_is_shown_is_not_lost(bridge: Bridge) -> None:
    bridge.scrape()
    bridge.send(point(counter(), 5))
    bridge.send(point(counter(), 5))
    assert bridge.scrape() == {"x_total": "0"}
    bridge.send(point(counter(), 5))
    assert bridge.scrape() == {"x_total": "15"}


def test_whoever_does_not_scrape_sees_values_at_once(bridge: Bridge) -> None:
    bridge.scrape()
    bridge.send(point(counter(), 5))
    assert bridge.curl() == {"x_total": "5"}
    assert read(bridge.get(headers={"User-Agent": "Prometheus/3.0"})) == {"x_total": "5"}
    assert bridge.scrape() == {"x_total": "0"}
    assert bridge.scrape() == {"x_total": "5"}


@pytest.mark.parametrize(
    ("kind", "value", "born_at_zero"),
    [
        (Kind.COUNTER, 5, True),
        (Kind.HISTOGRAM, THREE, True),
        (Kind.EXPONENTIAL, EXPONENTIAL, True),
        (Kind.GAUGE, 5, False),
        (Kind.UPDOWN, 5, False),
        (Kind.SUMMARY, SUMMARY, False),
    ],
)
def test_what_is_a_counter_to_prometheus_begins_at_0_in_all_its_series(
    bridge: Bridge, kind: Kind, value: Value, born_at_zero: bool
) -> None:
    bridge.scrape()
    bridge.send(point(metric("x", kind), value))
    now = bridge.curl()
    assert bridge.scrape() == (dict.fromkeys(now, "0") if born_at_zero else now)
    assert bridge.scrape() == now


def test_two_scrapers_do_not_disturb_each_other(bridge: Bridge) -> None:
    bridge.scrape()
    bridge.scrape("?scraper=b")
    bridge.send(point(counter(), 5))
    assert bridge.scrape() == {"x_total": "0"}
    assert bridge.scrape() == {"x_total": "5"}
    assert bridge.scrape("?scraper=b") == {"x_total": "0"}
    assert bridge.scrape("?scraper=b") == {"x_total": "5"}
    assert bridge.scrape("?scraper=c") == {"x_total": "5"}
    vmagent = {**PROMETHEUS, "User-Agent": "vm_promscrape"}
    assert read(bridge.get(headers=vmagent)) == {"x_total": "5"}


def test_whoever_scrapes_some_families_sees_their_newborns_at_0_first(bridge: Bridge) -> None:
    bridge.scrape()
    bridge.scrape("?name[]=x_total")
    bridge.send(point(counter(), 5), point(counter("y"), 7))
    assert bridge.scrape("?name[]=x_total") == {"x_total": "0"}
    assert bridge.scrape("?name[]=x_total") == {"x_total": "5"}
    # The same server may scrape all of them, too.
    assert bridge.scrape() == {"x_total": "0", "y_total": "0"}
    assert bridge.scrape() == {"x_total": "5", "y_total": "7"}


def test_a_new_version_of_prometheus_is_the_same_scraper(bridge: Bridge) -> None:
    bridge.scrape()
    bridge.send(point(counter(), 5))
    assert read(bridge.get(headers={**PROMETHEUS, "User-Agent": "Prometheus/4.0"})) == {"x_total": "0"}


@pytest.mark.parametrize("way", [Bridge.restart, Bridge.kill])
def test_a_restart_changes_nothing(bridge: Bridge, way: Callable[[Bridge], None]) -> None:
    bridge.send(point(counter(), 3, {"n": "history"}))
    way(bridge)
    bridge.scrape()
    bridge.send(point(counter(), 5, {"n": "born before"}))
    way(bridge)
    assert bridge.scrape() == {'x_total{n="history"}': "3", 'x_total{n="born before"}': "0"}
    way(bridge)
    bridge.send(point(counter(), 7, {"n": "born after"}))
    assert bridge.scrape() == {
        'x_total{n="history"}': "3",
        'x_total{n="born before"}': "5",
        'x_total{n="born after"}': "0",
    }
    way(bridge)
    assert bridge.scrape()['x_total{n="born after"}'] == "7"


def test_scrapes_that_show_no_newborn_are_no_commits(bridge: Bridge) -> None:
    bridge.send(point(counter(), 5))
    bridge.scrape()
    before = commits(bridge)
    for _ in range(3):
        bridge.scrape()
    assert commits(bridge) == before


def commits(bridge: Bridge) -> int:
    with sqlite3.connect(bridge.directory / DATABASE) as database:
        (found,) = database.execute("select commits from meta").fetchone()
    database.close()
    return int(found)


@pytest.mark.parametrize("is_swept", [False, True])
@pytest.mark.parametrize(
    ("kind", "value"), [(Kind.COUNTER, 5), (Kind.HISTOGRAM, THREE), (Kind.EXPONENTIAL, EXPONENTIAL)]
)
def test_a_series_that_expired_and_returns_is_a_new_counter(
    bridge: Bridge, kind: Kind, value: Value, is_swept: bool
) -> None:
    session = {"session.id": "s"}
    bridge.scrape()
    bridge.send(point(metric("x", kind), value, session))
    bridge.scrape()
    first = bridge.scrape()
    bridge.now_ms += 25 * HOUR_MS
    if is_swept:
        bridge.ledger.expire()
        assert bridge.scrape() == {}
    bridge.send(point(metric("x", kind), value, session, time=2))
    assert bridge.scrape() == dict.fromkeys(first, "0")
    assert bridge.scrape() == first
    bridge.restart()
    assert bridge.scrape() == first


def test_series_of_no_session_stay(bridge: Bridge) -> None:
    bridge.send(point(counter(), 5), point(counter("y"), 5, {"session.id": "s"}))
    bridge.now_ms += 23 * HOUR_MS
    bridge.ledger.expire()
    assert bridge.curl() == {"x_total": "5", 'y_total{session_id="s"}': "5"}
    bridge.now_ms += 2 * HOUR_MS
    bridge.ledger.expire()
    assert bridge.curl() == {"x_total": "5"}


def test_a_newborn_that_joins_an_older_series_adds_its_value_one_scrape_later(bridge: Bridge) -> None:
    bridge.scrape()
    bridge.send(point(counter(), 5, {"a.b": "1"}))
    bridge.scrape()
    bridge.send(point(counter(), 7, {"a_b": "1"}))
    assert bridge.scrape() == {'x_total{a_b="1"}': "5"}
    assert bridge.scrape() == {'x_total{a_b="1"}': "12"}


def test_only_an_answer_with_a_body_shows_anything(bridge: Bridge) -> None:
    bridge.scrape()
    bridge.send(point(counter(), 5))
    bridge.get(headers=PROMETHEUS, method="HEAD")
    assert bridge.scrape() == {"x_total": "0"}


def test_a_limited_number_of_scrapers_is_known(bridge: Bridge) -> None:
    for number in range(MAX_SCRAPERS + 1):
        bridge.now_ms += 1000
        bridge.scrape(f"?scraper={number}")
    assert len(bridge.ledger.scrapers) == MAX_SCRAPERS
    bridge.send(point(counter(), 5))
    assert bridge.scrape("?scraper=1") == {"x_total": "0"}
    assert bridge.scrape("?scraper=0") == {"x_total": "5"}  # forgotten
    bridge.restart()
    assert len(bridge.ledger.scrapers) == MAX_SCRAPERS
    long = bridge.scrape(f"?scraper={'x' * 10_000}")
    assert long == {"x_total": "5"}
    assert max(map(len, bridge.ledger.scrapers)) < 1000


def test_a_scraper_that_comes_regularly_is_not_forgotten_for_those_that_came_once(bridge: Bridge) -> None:
    bridge.scrape()
    for number in range(MAX_SCRAPERS - 1):
        bridge.now_ms += 1000
        bridge.scrape(f"?scraper={number}")
    bridge.scrape()
    bridge.scrape("?scraper=new")
    bridge.send(point(counter(), 5))
    assert bridge.scrape() == {"x_total": "0"}


# --- over HTTP -------------------------------------------------------------------------------------------------


def attributes_of(values: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"key": key, "value": {"stringValue": text}} for key, text in values.items()]


def export(name: str, value: int, attributes: Mapping[str, str]) -> dict[str, Any]:
    """An OTLP request in JSON with one delta point."""
    time = {"startTimeUnixNano": "1000000000", "timeUnixNano": "2000000000"}
    data_point = {**time, "asInt": str(value), "attributes": attributes_of(attributes)}
    sums = {"aggregationTemporality": 1, "isMonotonic": True, "dataPoints": [data_point]}
    scope = {"scope": {"name": "scope"}, "metrics": [{"name": name, "sum": sums}]}
    sender = {"attributes": attributes_of({"service.name": "svc"})}
    return {"resourceMetrics": [{"resource": sender, "scopeMetrics": [scope]}]}


def scraped(daemon: Daemon, query: str = "", headers: Mapping[str, str] = PROMETHEUS) -> dict[str, str]:
    reply = daemon.get(f"/metrics{query}", headers)
    assert reply.status == 200
    page = Page({"Content-Type": reply.headers["content-type"]}, reply.body)
    return {re.sub(r".*session_id=\"(.*?)\".*", r"\1", series): value for series, value in read(page).items()}


def test_newborns_are_shown_at_0_first_over_http_and_over_crashes(daemon: Daemon) -> None:
    def born(session: str, value: int) -> None:
        assert daemon.post("/v1/metrics", export("x", value, {"session.id": session})).status == 200

    born("history", 3)
    assert scraped(daemon) == {"history": "3"}
    born("a", 5)
    assert scraped(daemon, headers={}) == {"history": "3", "a": "5"}
    daemon.kill()
    daemon.start()
    assert scraped(daemon) == {"history": "3", "a": "0"}
    assert scraped(daemon, "?scraper=b") == {"history": "3", "a": "5"}
    born("b", 7)
    daemon.kill()
    daemon.start()
    assert scraped(daemon) == {"history": "3", "a": "5", "b": "0"}
    daemon.restart()
    assert scraped(daemon) == {"history": "3", "a": "5", "b": "7"}
    assert scraped(daemon, "?scraper=b") == {"history": "3", "a": "5", "b": "0"}


def test_head_has_the_headers_of_get_and_no_body(daemon: Daemon) -> None:
    daemon.post("/v1/metrics", export("x", 5, {}))
    for headers in ({}, {"Accept": OPENMETRICS}, {"Accept-Encoding": "gzip"}):
        # The process's own metrics change from page to page.
        got = daemon.get("/metrics?name[]=x_total", headers)
        head = daemon.request("HEAD", "/metrics?name[]=x_total", headers=headers)
        assert (head.status, head.body) == (200, b"")
        assert int(head.headers["content-length"]) == len(got.body)
        for name in ("content-type", "content-encoding", "vary"):
            assert head.headers.get(name) == got.headers.get(name)
    assert daemon.request("HEAD", "/metrics").headers["content-length"] != "0"


def test_settings_decide_what_becomes_a_label_and_what_is_kept(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(
        env={
            "BRIDGE_LABELS_DENY": "user.email, secret",
            "BRIDGE_LABELS_DROP": "organization.id",
            "BRIDGE_LABELS_HASH": "user.id",
            "BRIDGE_LABELS_PROMOTE": "",
            "BRIDGE_LIMITS_SERIES_PER_METRIC": "2",
        }
    ).start()
    for number in range(1, 6):
        attributes = {
            "user.email": "ann@example.org", "secret": "kanarienvogel", "organization.id": f"o{number}",
            "user.id": "account-5", "type": f"t{number // 2}",
        }  # fmt: skip
        assert daemon.post("/v1/metrics", export("x", 10**number, attributes)).json == {}
    samples = {series: value for series, value in daemon.samples("/metrics").items() if series.startswith("x_total")}
    hidden = [re.sub('user_id="[0-9a-f]{16}"', "HASH", series) for series in samples]
    assert dict(zip(hidden, samples.values(), strict=True)) == {
        'x_total{type="t0",HASH,job="svc",instance=""}': "10",
        'x_total{type="t1",HASH,job="svc",instance=""}': "1100",
        'x_total{otel_metric_overflow="true"}': "110000",
    }
    assert daemon.log.count("limits.series_per_metric") == 1
    daemon.kill()
    stored = b"".join(path.read_bytes() for path in daemon.state_dir.iterdir())
    for denied in (b"ann@example.org", b"kanarienvogel", b"account-5"):
        assert denied not in stored
