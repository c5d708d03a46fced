"""Public Claude Code dashboards work unchanged: their PromQL over a day of traffic, in a real Prometheus.

`promql/expressions.tsv` holds 187 expressions of nine public dashboards, Grafana's variables filled in. The day is
made up from a seed: eight people, their sessions with models, tools, skills and versions, sent to a real bridge as
OTLP in simulated time and scraped after each round as Prometheus scrapes. What it answered becomes blocks of a
Prometheus, with the labels that each of two scrape configurations would give the series.
"""

import csv
import random
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality

from tests.daemon import PROTOBUF, Daemon
from tests.prometheus import Prometheus, program, run_prometheus
from tests.recordings import PROMETHEUS_NAMES

SEED = 20260115
DAY = 1_768_435_200
"""Unix seconds; 2026-01-15, 00:00 UTC."""
END = DAY + 86_400
ROUND_SECONDS, LAST_ROUND_SECONDS = 120, 15
"""Rates over one minute need several scrapes in it; the last ten minutes have them."""
DENSE_FROM = END - 600
UNITS = {"claude_code.token.usage": "tokens", "claude_code.cost.usage": "USD", "claude_code.active_time.total": "s"}
SCALES = Counter({"claude_code.cost.usage": 10**9, "claude_code.active_time.total": 10**6})
"""Amounts are whole numbers of 1/scale of the unit, so that the truth is exact; 1 where nothing stands here."""

UNKNOWN_LABELS = {"tool": "Claude Code's attribute is tool_name; all tools stand in one group"}
"""Labels that dashboards group by and no Claude Code sends."""


# --- a day of traffic ------------------------------------------------------------------------------------------

Attributes = tuple[tuple[str, str], ...]
Truth = Counter[tuple[str, str]]
"""OTLP metric name, `type` or `decision` -> the sum of all amounts."""


class Person(NamedTuple):
    name: str
    organization: str
    version: str
    terminal: str
    environment: str
    is_cumulative: bool


PEOPLE = (
    Person("ada", "analytical", "2.1.329", "iTerm.app", "laptop", is_cumulative=False),
    Person("grace", "navy", "2.1.329", "xterm-256color", "laptop", is_cumulative=False),
    Person("linus", "kernel", "2.1.197", "tmux", "workstation", is_cumulative=False),
    Person("barbara", "analytical", "2.1.197", "vscode", "workstation", is_cumulative=True),
    Person("ken", "kernel", "2.0.77", "non-interactive", "ci", is_cumulative=False),
    Person("margaret", "navy", "2.1.329", "WarpTerminal", "laptop", is_cumulative=True),
    Person("dennis", "kernel", "2.1.329", "tmux", "ci", is_cumulative=False),
    Person("radia", "navy", "2.1.197", "iTerm.app", "laptop", is_cumulative=False),
)
REQUESTS: tuple[Attributes, ...] = (
    (("model", "claude-opus-5-5"), ("query_source", "main"), ("effort", "high")),
    (("model", "claude-haiku-5-5"), ("query_source", "auxiliary")),
    (("model", "claude-sonnet-5"), ("query_source", "subagent"), ("agent.name", "Explore")),
    (("model", "claude-sonnet-5"), ("query_source", "main"), ("skill.name", "pdf"), ("plugin.name", "docs")),
)
TOKENS = (("input", 900), ("output", 2_000), ("cacheRead", 60_000), ("cacheCreation", 7_000))
EDITS = (
    (("tool_name", "Edit"), ("decision", "accept"), ("source", "user_temporary"), ("language", "Python")),
    (("tool_name", "Write"), ("decision", "accept"), ("source", "config"), ("language", "Markdown")),
    (("tool_name", "Edit"), ("decision", "reject"), ("source", "user_reject"), ("language", "Go")),
)


class Amount(NamedTuple):
    metric: str
    attributes: Attributes
    value: int

    @property
    def key(self) -> tuple[str, str]:
        own = dict(self.attributes)
        return self.metric, own.get("type", own.get("decision", ""))


class Session:
    """One run of Claude Code from `start` to `end`: what it has used in each round."""

    def __init__(self, person: Person, start: int, end: int, chance: random.Random) -> None:
        self.person = person
        self.start = start
        self.end = end
        self._chance = chance
        self._exported = start
        self._totals: Counter[tuple[str, Attributes]] = Counter()
        identity = f"{chance.getrandbits(128):032x}"
        self._common: Attributes = (
            ("user.id", f"{person.name:0<64}"),
            ("session.id", f"{identity[:8]}-{identity[8:12]}-{identity[12:16]}-{identity[16:20]}-{identity[20:]}"),
            ("organization.id", person.organization),
            ("user.email", f"{person.name}@example.com"),
            ("terminal.type", person.terminal),
            ("environment", person.environment),
            ("client_id", f"{person.name}-1"),
        )

    def use(self, now: int, *, thoroughly: bool) -> Iterator[Amount]:
        """What was used since the last round; a thorough one leaves nothing out."""
        chance = self._chance

        def happens(probability: float) -> bool:
            return thoroughly or chance.random() < probability

        if self._exported == self.start:
            yield Amount("claude_code.session.count", (("start_type", "fresh"),), 1)
        for request in REQUESTS:
            if not happens(0.4):
                continue
            for kind, typical in TOKENS:
                yield Amount("claude_code.token.usage", (("type", kind), *request), chance.randint(1, typical))
            yield Amount("claude_code.cost.usage", request, chance.randint(10**6, 4 * 10**8))
        if happens(0.3):
            yield Amount("claude_code.lines_of_code.count", (("type", "added"),), chance.randint(60, 120))
            yield Amount("claude_code.lines_of_code.count", (("type", "removed"),), chance.randint(1, 50))
        for edit in EDITS:
            if happens(0.2):
                yield Amount("claude_code.code_edit_tool.decision", edit, chance.randint(1, 4))
        if happens(0.1):
            yield Amount("claude_code.commit.count", (), 1)
        if happens(0.03):
            yield Amount("claude_code.pull_request.count", (), 1)
        for kind, share in (("user", 3), ("cli", 2)):
            micros = chance.randint(1, (now - self._exported) * 10**6 // share)
            yield Amount("claude_code.active_time.total", (("type", kind),), micros)

    def export(self, now: int, amounts: list[Amount]) -> bytes:
        """The OTLP body that reports them."""
        request = ExportMetricsServiceRequest()
        resource = request.resource_metrics.add()
        for key, text in (
            ("service.name", "claude-code"),
            ("service.version", self.person.version),
            ("os.type", "linux"),
            ("host.arch", "amd64"),
        ):
            resource.resource.attributes.add(key=key).value.string_value = text
        scope = resource.scope_metrics.add()
        scope.scope.name = "com.anthropic.claude_code"
        sums: dict[str, Any] = {}
        for metric, attributes, value in self._reported(amounts):
            if metric not in sums:
                sums[metric] = scope.metrics.add(name=metric, unit=UNITS.get(metric, "")).sum
                sums[metric].is_monotonic = True
                sums[metric].aggregation_temporality = (
                    AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
                    if self.person.is_cumulative
                    else AggregationTemporality.AGGREGATION_TEMPORALITY_DELTA
                )
            start = self.start if self.person.is_cumulative else self._exported
            point = sums[metric].data_points.add(
                start_time_unix_nano=start * 10**9, time_unix_nano=now * 10**9, as_double=value / (SCALES[metric] or 1)
            )
            for key, text in (*self._common, *attributes):
                point.attributes.add(key=key).value.string_value = text
        self._exported = now
        return request.SerializeToString()

    def _reported(self, amounts: list[Amount]) -> Iterator[Amount]:
        if not self.person.is_cumulative:
            yield from amounts
            return
        for metric, attributes, value in amounts:
            self._totals[metric, attributes] += value
        for (metric, attributes), total in self._totals.items():
            yield Amount(metric, attributes, total)


def sessions_of_the_day() -> list[Session]:
    """Two short sessions a person in the course of the day, and one that is still running at its end."""
    chance = random.Random(SEED)
    sessions = []
    for person in PEOPLE:
        for earliest, latest in ((7, 11), (12, 18)):
            start = DAY + chance.randrange(earliest * 3600, latest * 3600, ROUND_SECONDS)
            sessions.append(Session(person, start, start + chance.randrange(600, 5400), chance))
        sessions.append(Session(person, END - chance.randrange(1200, 3000, ROUND_SECONDS), END, chance))
    return sessions


def rounds() -> list[int]:
    return [*range(DAY, DENSE_FROM, ROUND_SECONDS), *range(DENSE_FROM, END + 1, LAST_ROUND_SECONDS)]


# --- through the bridge ----------------------------------------------------------------------------------------

SCRAPE_HEADERS = {
    "X-Prometheus-Scrape-Timeout-Seconds": "10",
    "User-Agent": "Prometheus/2.42.0",
    "Accept": "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
}
EXPOSED = re.compile(r'^((?:claude_code_|target_info)[^ ]*\{.*),job="claude-code",instance=""\} (\S+)$', re.MULTILINE)


class Snippet(NamedTuple):
    """What a scrape configuration makes of `job="claude-code",instance=""`. An empty label is no label."""

    job: str
    labels: str


SNIPPETS = {
    "honor_labels: true": Snippet("claude-code", 'job="claude-code"'),
    "job_name: otel-collector": Snippet(
        "otel-collector", 'exported_job="claude-code",job="otel-collector",instance="localhost:4318"'
    ),
}


class Day(NamedTuple):
    """A day as the bridge exposed it: the time of a scrape, a sample without its last labels, the value."""

    samples: list[tuple[int, str, str]]
    truth: Truth


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Day]:
    program("promtool")  # without it there is nothing to be asked
    daemon = Daemon(tmp_path_factory.mktemp("bridge"))
    try:
        yield live_through(daemon.start())
    finally:
        daemon.close()


def live_through(daemon: Daemon) -> Day:
    sessions = sessions_of_the_day()
    truth: Truth = Counter()
    samples = []
    for now in rounds():
        if now == DAY + 43_200:
            daemon.kill()
            daemon.start()
        for session in sessions:
            if session.start < now <= session.end:
                amounts = list(session.use(now, thoroughly=now >= DENSE_FROM))
                for amount in amounts:
                    truth[amount.key] += amount.value
                assert daemon.post("/v1/metrics", session.export(now, amounts), PROTOBUF).status == 200
        exposed = daemon.get("/metrics", SCRAPE_HEADERS).text
        found = EXPOSED.findall(exposed)
        assert len(found) == sum(line.startswith(("claude_code_", "target_info")) for line in exposed.splitlines())
        samples += [(now, sample, value) for sample, value in found]
    return Day(samples, truth)


class Dashboards(NamedTuple):
    """A Prometheus that has scraped the day, and the job that it gave the series."""

    prometheus: Prometheus
    job: str


@pytest.fixture(scope="module", params=SNIPPETS)
def dashboards(
    request: pytest.FixtureRequest, day: Day, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Dashboards]:
    promtool = program("promtool")
    directory = tmp_path_factory.mktemp("promql")
    snippet = SNIPPETS[request.param]
    scrapes = directory / "day.om"
    with scrapes.open("w") as file:
        file.writelines(f"{sample},{snippet.labels}}} {value} {now}\n" for now, sample, value in day.samples)
        file.write("# EOF\n")
    load = [promtool, "tsdb", "create-blocks-from", "openmetrics", "--max-block-duration=168h"]
    subprocess.run([*load, scrapes, directory / "data"], check=True, capture_output=True, timeout=60)
    with run_prometheus(directory, "{}", "--storage.tsdb.retention.time=100y") as prometheus:
        yield Dashboards(prometheus, snippet.job)


# --- the dashboards --------------------------------------------------------------------------------------------


def expressions() -> list[str]:
    with (Path(__file__).parent / "promql" / "expressions.tsv").open(newline="") as file:
        return [row["expression"] for row in csv.DictReader(file, dialect="excel-tab", quoting=csv.QUOTE_NONE)]


def without_fallback(expression: str) -> str:
    """`x or vector(0)` has data when x has."""
    return re.sub(r" or vector\(\d+\)", "", expression)


def selecting_job(expression: str, job: str) -> str:
    """The expression as a dashboard writes it that selects the job as well."""
    narrowed = re.sub(r"(claude_code_\w+_total)\b(?!\{)", r"\1{}", expression)
    return re.sub(r"(claude_code_\w+_total)\{", rf'\1{{job="{job}",', narrowed)


def is_zero(vector: list[dict[str, Any]]) -> bool:
    return not any(abs(float(found["value"][1])) > 0 for found in vector)


def test_every_expression_answers_with_data_that_is_not_zero(dashboards: Dashboards) -> None:
    asked = expressions()
    assert len(asked) == 187
    for narrow in (asked, [selecting_job(expression, dashboards.job) for expression in asked]):
        answers = {each: dashboards.prometheus.query(without_fallback(each), END) for each in narrow}
        assert [expression for expression, vector in answers.items() if not vector] == []
        assert [expression for expression, vector in answers.items() if is_zero(vector)] == []


def test_what_dashboards_group_by_is_there(dashboards: Dashboards) -> None:
    """A label that does not exist would give data too: everything in one group."""
    labels: dict[str, set[str]] = {}
    matcher = {"match[]": '{__name__=~"claude_code_.+"}', "start": f"{DAY}", "end": f"{END}"}
    for series in dashboards.prometheus.get("series", matcher):
        labels.setdefault(series["__name__"], set()).update(series)
    missing = set()
    for expression in expressions():
        metrics = re.findall(r"claude_code_\w+_total", expression)
        groups = re.findall(r"\bby ?\(([^)]*)\)", expression)
        wanted = {label.strip() for group in groups for label in group.split(",")}
        missing |= {label for label in wanted for metric in metrics if label not in labels[metric]}
    assert missing == set(UNKNOWN_LABELS)


def test_what_prometheus_holds_is_what_was_used(dashboards: Dashboards, day: Day) -> None:
    last: Truth = Counter()
    for found in dashboards.prometheus.query('{__name__=~"claude_code_.+_total"}', END):
        labels = found["metric"]
        metric = PROMETHEUS_NAMES[labels["__name__"]]
        value = Decimal(found["value"][1]) * (SCALES[metric] or 1)
        last[metric, labels.get("type", labels.get("decision", ""))] += round(value)
    assert last == day.truth


def test_the_increase_over_the_day_is_what_was_used(dashboards: Dashboards, day: Day) -> None:
    """The first scrape came before the first session, so every series began at 0, and nothing is extrapolated."""
    increases = {}
    for name, metric in PROMETHEUS_NAMES.items():
        for found in dashboards.prometheus.query(f"sum by (type, decision) (increase({name}[1d]))", END):
            own = found["metric"].get("type", found["metric"].get("decision", ""))
            increases[metric, own] = float(found["value"][1]) * (SCALES[metric] or 1)
    assert increases == pytest.approx(dict(day.truth), rel=1e-9)
