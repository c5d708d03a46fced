"""Recorded requests of the real Claude Code client, what they add up to, and what a bridge shows of it.

`recordings/` holds the bodies as sent by clients 2.1.332 (`v332-`), 2.1.329, 2.1.197, 2.0.77 and 1.0.128 to servers
that answered 200, or refused some of them and got them again. `index.json` lists the requests of each run in order of
arrival; `expected.json` has the tokens and the cost that the client itself knew of. The truth for the other metrics
is computed here from the bodies, with nothing of the bridge: every distinct delta point once, of every cumulative
run the highest value, in exact fractions.
"""

import base64
import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality

from tests.daemon import PROTOBUF, Daemon, Reply

DIRECTORY = Path(__file__).with_suffix("")
MESSAGES: dict[str, type[Message]] = {
    "/v1/metrics": ExportMetricsServiceRequest,
    "/v1/logs": ExportLogsServiceRequest,
    "/v1/traces": ExportTraceServiceRequest,
}


class Request(NamedTuple):
    """One request as it goes over the wire; `body` is compressed if `encoding` says so."""

    path: str
    content_type: str
    body: bytes
    encoding: str | None = None
    chunked: bool = False

    @property
    def decoded(self) -> bytes:
        return gzip.decompress(self.body) if self.encoding == "gzip" else self.body

    @property
    def message(self) -> Message:
        """The body as protobuf, whatever it came as."""
        kind = MESSAGES[self.path]
        if self.content_type == PROTOBUF:
            return kind.FromString(self.decoded)
        return ParseDict(_with_base64_ids(json.loads(self.decoded)), kind(), ignore_unknown_fields=True)

    def post(self, daemon: Daemon) -> Reply:
        headers = {"Content-Encoding": self.encoding} if self.encoding else {}
        return daemon.post(self.path, self.body, self.content_type, headers, chunked=self.chunked)


def _with_base64_ids(value: Any) -> Any:
    """OTLP's JSON has trace and span ids in hex; protobuf's own JSON, which json_format reads, in base64."""
    if isinstance(value, list):
        return [_with_base64_ids(element) for element in value]
    if not isinstance(value, dict):
        return value
    ids = ("traceId", "spanId", "parentSpanId")
    return {
        key: base64.b64encode(bytes.fromhex(member)).decode() if key in ids else _with_base64_ids(member)
        for key, member in value.items()
    }


def _load_runs() -> dict[str, list[Request]]:
    index = json.loads((DIRECTORY / "index.json").read_text())
    return {
        run: [
            Request(
                entry["path"],
                entry["content_type"],
                (DIRECTORY / entry["body"]).read_bytes(),
                entry["content_encoding"],
                entry["chunked"],
            )
            for entry in entries
        ]
        for run, entries in index.items()
    }


RUNS: dict[str, list[Request]] = _load_runs()
EXPECTED: dict[str, Any] = json.loads((DIRECTORY / "expected.json").read_text(), parse_float=Decimal)
ALL_REQUESTS = [request for requests in RUNS.values() for request in requests]

Totals = Mapping[tuple[str, str, str], Decimal]
"""OTLP metric name, its `type` or `decision`, its `model` -> the true sum, rounded to what the bridge counts in."""

DIGITS = Counter({"claude_code.cost.usage": 9, "claude_code.active_time.total": 6})


class Point(NamedTuple):
    metric: str
    attributes: frozenset[tuple[str, str]]
    is_delta: bool
    start: int
    time: int
    value: Fraction


def points(requests: Iterable[Request]) -> Iterator[Point]:
    """Every data point of the metrics requests, repeats included."""
    for request in requests:
        if request.path != "/v1/metrics":
            continue
        message = request.message
        assert isinstance(message, ExportMetricsServiceRequest)
        for resource in message.resource_metrics:
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    is_delta = (
                        metric.sum.aggregation_temporality == AggregationTemporality.AGGREGATION_TEMPORALITY_DELTA
                    )
                    for point in metric.sum.data_points:
                        pairs = ((a.key, a.value.string_value or str(a.value.bool_value)) for a in point.attributes)
                        start, end = point.start_time_unix_nano, point.time_unix_nano
                        yield Point(metric.name, frozenset(pairs), is_delta, start, end, Fraction(point.as_double))


def true_totals(requests: Iterable[Request]) -> Totals:
    """What the metrics of these requests add up to, in whatever order and however often they are sent."""
    sums: dict[tuple[str, str, str], Fraction] = {}
    for (metric, kind, decision, model), value in _sums(requests, "type", "decision", "model").items():
        key = (metric, kind or decision, model)
        sums[key] = sums.get(key, Fraction()) + value
    return {key: rounded(value, DIGITS[key[0]]) for key, value in sums.items()}


def _sums(requests: Iterable[Request], *keys: str) -> dict[tuple[str, ...], Fraction]:
    """The sums of distinct points by metric and the values of some attributes."""
    deltas: set[Point] = set()
    highest: dict[Point, Fraction] = {}
    for point in points(requests):
        if point.is_delta:
            deltas.add(point)
        else:
            run = point._replace(time=0, value=Fraction())
            highest[run] = max(point.value, highest.get(run, Fraction()))
    sums: dict[tuple[str, ...], Fraction] = {}
    for point, value in [*((point, point.value) for point in deltas), *highest.items()]:
        attributes = dict(point.attributes)
        key = (point.metric, *(attributes.get(name, "") for name in keys))
        sums[key] = sums.get(key, Fraction()) + value
    return sums


ASKED = {"glm-4.6": "claude-opus-5"}
"""Models that answered for others, whose names the metrics have: `v332-gateway`."""

KINDS = {
    "input": "input_tokens",
    "output": "output_tokens",
    "cacheRead": "cache_read_tokens",
    "cacheCreation": "cache_creation_tokens",
}


def api_requests(requests: Iterable[Request]) -> dict[tuple[str, ...], dict[str, str]]:
    """The api_request events of the logs requests, each once: by request id, or by all that an old client tells."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for request in requests:
        if request.path != "/v1/logs":
            continue
        message = request.message
        assert isinstance(message, ExportLogsServiceRequest)
        for resource in message.resource_logs:
            for scope in resource.scope_logs:
                for record in scope.log_records:
                    values = ((a.key, a.value, a.value.WhichOneof("value")) for a in record.attributes)
                    event = {key: str(getattr(value, which)) for key, value, which in values if which}
                    if event.get("event.name") == "api_request":
                        told = tuple(sorted(event.items()))
                        found[(event["request_id"],) if "request_id" in event else tuple(map(str, told))] = event
    return found


def joined_totals(requests: Iterable[Request]) -> Totals:
    """The truth with events beside metrics: for each session, model and type the larger of both sums."""
    requests = list(requests)
    metrics: dict[tuple[str, str], dict[str, Fraction]] = defaultdict(lambda: defaultdict(Fraction))
    for (name, session, model, kind), value in _sums(requests, "session.id", "model", "type").items():
        if name in ("claude_code.token.usage", "claude_code.cost.usage"):
            metrics[session, model][kind or "cost"] = value
    events: dict[tuple[str, str], dict[str, Fraction]] = defaultdict(lambda: defaultdict(Fraction))
    for event in api_requests(requests).values():
        told = events[event["session.id"], ASKED.get(event["model"], event["model"])]
        told["cost"] += Fraction(event["cost_usd"])
        for kind, attribute in KINDS.items():
            told[kind] += int(event[attribute])
    totals = dict(true_totals(requests))
    for cell in events:
        metric, told = metrics[cell], events[cell]
        beyond = {kind: max(Fraction(), told[kind] - metric[kind]) for kind in KINDS}
        for kind, count in beyond.items():
            if count:
                key = ("claude_code.token.usage", kind, cell[1])
                totals[key] = totals.get(key, Decimal()) + Decimal(int(count))
        if any(beyond.values()) and all(told[kind] >= metric[kind] for kind in KINDS):
            key = ("claude_code.cost.usage", "", cell[1])
            extra = rounded(max(Fraction(), told["cost"] - metric["cost"]), 9)
            totals[key] = totals.get(key, Decimal()) + extra
    return totals


def rounded(value: Fraction, digits: int) -> Decimal:
    return Decimal(round(value * 10**digits)).scaleb(-digits)


XRG_SAMPLES: dict[str, tuple[str, str]] = {
    'claude_code_token_usage{type="input"}': ("claude_code.token.usage", "input"),
    'claude_code_token_usage{type="output"}': ("claude_code.token.usage", "output"),
    'claude_code_token_usage{type="cache_read"}': ("claude_code.token.usage", "cacheRead"),
    'claude_code_token_usage{type="cache_creation",xrg="cache_create"}': ("claude_code.token.usage", "cacheCreation"),
    "claude_code_cost_usage": ("claude_code.cost.usage", ""),
    "claude_code_session_count": ("claude_code.session.count", ""),
    'claude_code_lines_of_code_count{type="added"}': ("claude_code.lines_of_code.count", "added"),
    'claude_code_lines_of_code_count{type="removed"}': ("claude_code.lines_of_code.count", "removed"),
    "claude_code_commit_count": ("claude_code.commit.count", ""),
    "claude_code_pull_request_count": ("claude_code.pull_request.count", ""),
    'claude_code_code_edit_tool_decision{decision="accept"}': ("claude_code.code_edit_tool.decision", "accept"),
    'claude_code_code_edit_tool_decision{decision="reject"}': ("claude_code.code_edit_tool.decision", "reject"),
    'claude_code_active_time_total{type="user"}': ("claude_code.active_time.total", "user"),
    'claude_code_active_time_total{type="cli"}': ("claude_code.active_time.total", "cli"),
}
PROMETHEUS_NAMES = {
    "claude_code_token_usage_tokens_total": "claude_code.token.usage",
    "claude_code_cost_usage_USD_total": "claude_code.cost.usage",
    "claude_code_session_count_total": "claude_code.session.count",
    "claude_code_lines_of_code_count_total": "claude_code.lines_of_code.count",
    "claude_code_commit_count_total": "claude_code.commit.count",
    "claude_code_pull_request_count_total": "claude_code.pull_request.count",
    "claude_code_code_edit_tool_decision_total": "claude_code.code_edit_tool.decision",
    "claude_code_active_time_seconds_total": "claude_code.active_time.total",
}
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_PLAIN = re.compile(r"\d+(\.\d+)?")


def xrg_samples(totals: Totals) -> dict[str, Decimal]:
    """The samples of /v1/metrics that these totals make: all fourteen, models added up."""
    return {
        sample: sum((value for (name, kind, _), value in totals.items() if (name, kind) == key), Decimal())
        for sample, key in XRG_SAMPLES.items()
    }


def shown_to_xrg(daemon: Daemon) -> dict[str, Decimal]:
    """The samples of /v1/metrics; every value must be plain digits."""
    return {sample: _plain(value) for sample, value in daemon.samples("/v1/metrics").items()}


def shown_to_prometheus(daemon: Daemon) -> Totals:
    """Claude Code's families of /metrics, added up over all labels but type, decision and model."""
    sums: dict[tuple[str, str, str], Decimal] = {}
    for sample, value in daemon.samples("/metrics").items():
        name = PROMETHEUS_NAMES.get(sample.partition("{")[0])
        if name:
            labels: dict[str, str] = dict(_LABEL.findall(sample))
            key = (name, labels.get("type", labels.get("decision", "")), labels.get("model", ""))
            sums[key] = sums.get(key, Decimal()) + _plain(value)
    return sums


def _plain(value: str) -> Decimal:
    assert _PLAIN.fullmatch(value), f"not plain digits: {value}"
    return Decimal(value)


def own_metric(daemon: Daemon, name: str) -> Decimal:
    """One of the bridge's own counters, added up over its labels."""
    samples = daemon.samples("/metrics").items()
    return sum((Decimal(value) for sample, value in samples if sample.partition("{")[0] == name), Decimal())


def assert_shows(daemon: Daemon, totals: Totals, joined: Totals | None = None) -> None:
    """Both views show exactly these totals, XRG's the joined ones, and no point was dropped."""
    assert shown_to_xrg(daemon) == xrg_samples(totals if joined is None else joined)
    assert shown_to_prometheus(daemon) == totals
    assert own_metric(daemon, "bridge_points_dropped_total") == 0


def delta_body(metric: str, values: Iterable[float], attributes: Mapping[str, str], start: int = 10**18) -> bytes:
    """A protobuf body of one delta sum of Claude Code, its points one after the other, each a second long."""
    request = ExportMetricsServiceRequest()
    resource = request.resource_metrics.add()
    resource.resource.attributes.add(key="service.name").value.string_value = "claude-code"
    scope = resource.scope_metrics.add()
    scope.scope.name = "com.anthropic.claude_code"
    total = scope.metrics.add(name=metric).sum
    total.aggregation_temporality = AggregationTemporality.AGGREGATION_TEMPORALITY_DELTA
    total.is_monotonic = True
    for at, value in enumerate(values):
        begin = start + at * 10**9
        point = total.data_points.add(start_time_unix_nano=begin, time_unix_nano=begin + 10**9, as_double=value)
        for key, text in attributes.items():
            point.attributes.add(key=key).value.string_value = text
    return request.SerializeToString()
