"""A campaign of forged session ids: the bridge's memory is bounded, no token is lost, and scrapes stay fast.

Each id is a new label set, so from a limit on they share one series a metric, `otel_metric_overflow="true"`. On disk
every session keeps a few hundred bytes, for that is how a repeat of it is known.

30,000 sessions, in a campaign a million; --log-level=info shows the figures.
"""

import logging
import re
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality

from tests.daemon import PROTOBUF, Daemon
from tests.recordings import delta_body

BODY_POINTS = 10_000
RETRY_EVERY = 10
MAX_RSS_MIB = 150
"""A million sessions in bodies of 10,000, one body at a time, were seen to need 97."""
MAX_SERIES_OF_METRIC = 5_000
MAX_SCRAPE_RATIO = 4
"""Of the fastest of several scrapes before and after; they show the same number of series."""

TYPES = {"input": "input", "output": "output", "cacheRead": "cache_read", "cacheCreation": "cache_creation"}
PLACEHOLDER = b"<campaign>"
SAMPLE = re.compile(r"^claude_code_token_usage_tokens_total\{(.*)\} (\d+)$", re.MULTILINE)

log = logging.getLogger(__name__)


def value_of(session: int) -> int:
    return 1 + session % 997


def template() -> bytes:
    """A body of many sessions of one point each, all of whose ids begin with the placeholder."""
    request = ExportMetricsServiceRequest()
    resource = request.resource_metrics.add()
    resource.resource.attributes.add(key="service.name").value.string_value = "claude-code"
    scope = resource.scope_metrics.add()
    scope.scope.name = "com.anthropic.claude_code"
    total = scope.metrics.add(name="claude_code.token.usage", unit="tokens").sum
    total.aggregation_temporality = AggregationTemporality.AGGREGATION_TEMPORALITY_DELTA
    total.is_monotonic = True
    kinds = list(TYPES)
    for session in range(BODY_POINTS):
        point = total.data_points.add(start_time_unix_nano=10**18, time_unix_nano=10**18 + 60 * 10**9)
        point.as_double = value_of(session)
        point.attributes.add(key="session.id").value.string_value = f"{PLACEHOLDER.decode()}-4a5b-8c6d-{session:012d}"
        point.attributes.add(key="type").value.string_value = kinds[session % len(kinds)]
        point.attributes.add(key="model").value.string_value = "claude-opus-5-5"
    return request.SerializeToString()


def bodies(count: int) -> Iterator[bytes]:
    """Bodies of BODY_POINTS sessions; no two ids are equal."""
    whole = template()
    for number in range(count):
        yield whole.replace(PLACEHOLDER, b"%0*d" % (len(PLACEHOLDER), number))


def tokens_sent(bodies: int) -> dict[str, int]:
    """The truth, by type."""
    per_body = {
        kind: sum(map(value_of, islice(range(BODY_POINTS), offset, None, len(TYPES))))
        for offset, kind in enumerate(TYPES)
    }
    return {kind: value * bodies for kind, value in per_body.items()}


def memory_mib(daemon: Daemon) -> dict[str, float]:
    """Resident memory of the process: now (VmRSS) and at its peak (VmHWM)."""
    assert daemon.process is not None
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return {name: int(kib) / 1024 for name, kib in re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB$", status, re.MULTILINE)}


def scrape_seconds(daemon: Daemon) -> float:
    """The fastest of some scrapes: what others do on this machine only makes one slower."""

    def once() -> float:
        began = time.perf_counter()
        assert daemon.get("/metrics").status == 200
        return time.perf_counter() - began

    return min(once() for _ in range(7))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from /proc")
def test_forged_sessions_fill_neither_memory_nor_scrapes(daemon: Daemon, campaign: bool) -> None:
    count = 100 if campaign else 3
    following = bodies(count)
    first = next(following)
    assert daemon.post("/v1/metrics", first, PROTOBUF).status == 200
    scrape_before = scrape_seconds(daemon)
    peak = 0.0
    began = time.monotonic()
    for number, body in enumerate(following):
        assert daemon.post("/v1/metrics", body, PROTOBUF).status == 200
        if number % RETRY_EVERY == 0:
            assert daemon.post("/v1/metrics", body, PROTOBUF).status == 200
        peak = max(peak, memory_mib(daemon)["VmRSS"])
    seconds = time.monotonic() - began
    scrape_after = scrape_seconds(daemon)
    on_disk = sum(file.stat().st_size for file in daemon.state_dir.iterdir()) / 2**20
    facts = memory_mib(daemon) | {
        "sessions": count * BODY_POINTS,
        "posting seconds": seconds,
        "highest VmRSS": peak,
        "disk MiB": on_disk,
    }
    facts |= {"scrape seconds before": scrape_before, "scrape seconds after": scrape_after}
    log.info("%s", {name: round(value, 4) for name, value in facts.items()})

    assert_shows_what_was_sent(daemon, count)
    assert peak < MAX_RSS_MIB
    assert scrape_after < MAX_SCRAPE_RATIO * scrape_before

    daemon.restart()
    assert_shows_what_was_sent(daemon, count)
    assert daemon.post("/v1/metrics", first, PROTOBUF).status == 200
    assert_shows_what_was_sent(daemon, count)
    assert memory_mib(daemon)["VmRSS"] < MAX_RSS_MIB


def test_sessions_that_come_back_stay_within_the_limit(make_daemon: Callable[..., Daemon]) -> None:
    limit, expiry_seconds = 20, 1.0
    expiry = {"BRIDGE_SERIES_EXPIRY_HOURS": str(expiry_seconds / 3600)}
    daemon = make_daemon(env={"BRIDGE_LIMITS_SERIES": str(limit), **expiry}).start()

    def everyone_commits(generation: str, time_seconds: int) -> None:
        for number in range(limit):
            attributes = {"session.id": f"{generation}-{number}"}
            body = delta_body("claude_code.commit.count", [1], attributes, time_seconds * 10**9)
            assert daemon.post("/v1/metrics", body, PROTOBUF).status == 200

    everyone_commits("old", 10**9)
    time.sleep(expiry_seconds + 0.1)
    daemon.restart()  # what has expired is not loaded
    everyone_commits("new", 10**9)
    everyone_commits("old", 10**9 + 60)
    samples = daemon.samples("/metrics").items()
    values = [int(value) for sample, value in samples if sample.startswith("claude_code_commit_count_total")]
    assert len(values) <= limit + 1
    assert sum(values) == 2 * limit
    assert daemon.samples()["claude_code_commit_count"] == str(3 * limit)


def assert_shows_what_was_sent(daemon: Daemon, bodies: int) -> None:
    sent = tokens_sent(bodies)
    totals = daemon.samples("/v1/metrics")
    for kind, word in TYPES.items():
        (shown,) = [value for sample, value in totals.items() if f'type="{word}"' in sample]
        assert shown == str(sent[kind]), kind
    series = SAMPLE.findall(daemon.get("/metrics").text)
    assert len(series) == MAX_SERIES_OF_METRIC + 1
    (overflow,) = [labels for labels, _ in series if "otel_metric_overflow" in labels]
    assert overflow == 'otel_metric_overflow="true"'
    assert sum(int(value) for _, value in series) == sum(sent.values())
