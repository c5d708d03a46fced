"""The README's scrape configurations, in a real Prometheus: they scrape, and no series is lost or mislabelled."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.daemon import Daemon
from tests.prometheus import Prometheus, program, run_prometheus, wait_for

README = Path(__file__).parent.parent / "README.md"
DOCUMENTED = "localhost:4318"
SESSIONS = "claude_code_session_count_total"
SENDERS = {("claude-code", ""), ("claude-code", "laptop"), ("claude-code-desktop", "")}
"""service.name and service.instance.id of what sends; the points themselves are equal."""


class Snippet(NamedTuple):
    """A scrape configuration of the README, and what it says about `job` and `instance`."""

    text: str

    @property
    def job_name(self) -> str:
        (name,) = re.findall(r"job_name: (\S+)", self.text)
        return str(name)

    @property
    def honors_labels(self) -> bool:
        return "honor_labels: true" in self.text

    @property
    def replaced_job(self) -> str:
        found = re.search(r"target_label: job\s+replacement: (\S+)", self.text)
        return found[1] if found else ""

    def labels(self, sender: tuple[str, str], target: str) -> dict[str, str]:
        """The labels about its origin that a sender's series should have; an empty label is none."""
        job, instance = sender
        if self.honors_labels:
            own = {"job": self.replaced_job or job, "instance": instance}
        else:
            exported = {"exported_job": job, "exported_instance": instance}
            own = {"job": self.replaced_job or self.job_name, "instance": target, **exported}
        return {label: value for label, value in own.items() if value}


def snippets() -> list[Snippet]:
    text = README.read_text() if README.exists() else ""
    blocks: list[str] = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Snippet(block) for block in blocks if "scrape_configs:" in block]


class Scraped(NamedTuple):
    prometheus: Prometheus
    snippet: Snippet
    target: str


@pytest.fixture(scope="module", params=range(2), ids=["first", "second"])
def scraped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraped]:
    """A Prometheus with a snippet of the README as its configuration, once it holds what a bridge counted."""
    program("prometheus")
    found = snippets()
    if request.param >= len(found):
        pytest.skip(f"README.md has {len(found)} YAML blocks with scrape_configs; two are expected")
    directory = tmp_path_factory.mktemp("snippet")
    daemon = Daemon(directory)
    target = f"localhost:{daemon.port}"
    try:
        daemon.start()
        for sender in sorted(SENDERS):
            assert daemon.post("/v1/metrics", one_session(*sender)).status == 200
        with run_prometheus(directory / "prometheus", for_test(found[request.param], target)) as prometheus:
            wait_for(lambda: prometheus.query(SESSIONS), "the sessions to be stored")
            yield Scraped(prometheus, found[request.param], target)
    finally:
        daemon.close()


def for_test(snippet: Snippet, target: str) -> str:
    """The snippet with the bridge of the test for target, and scraping faster; the rest as it stands."""
    assert snippet.text.count(DOCUMENTED) == 1
    scraping = re.sub(r"scrape_interval: \S+", "scrape_interval: 500ms", snippet.text.replace(DOCUMENTED, target))
    return f"global: {{scrape_interval: 500ms, scrape_timeout: 500ms}}\n{scraping}"


def one_session(service: str, instance: str) -> dict[str, Any]:
    def attributes(**texts: str) -> list[dict[str, Any]]:
        return [{"key": key.replace("_", "."), "value": {"stringValue": text}} for key, text in texts.items() if text]

    times = {"startTimeUnixNano": "1000000000000000000", "timeUnixNano": "1000000060000000000"}
    point = {"attributes": attributes(session_id="s", start_type="fresh"), "asDouble": 1, **times}
    total = {"aggregationTemporality": 1, "isMonotonic": True, "dataPoints": [point]}
    scope = {"scope": {"name": "com.anthropic.claude_code"}}
    metrics = [{**scope, "metrics": [{"name": "claude_code.session.count", "sum": total}]}]
    resource = {"attributes": attributes(service_name=service, service_instance_id=instance, os_type="linux")}
    return {"resourceMetrics": [{"resource": resource, "scopeMetrics": metrics}]}


def origin(series: dict[str, str]) -> dict[str, str]:
    return {
        label: series[label] for label in ("job", "instance", "exported_job", "exported_instance") if label in series
    }


def test_a_snippet_is_a_valid_configuration(tmp_path: Path) -> None:
    promtool = program("promtool")
    for snippet in snippets():
        config = tmp_path / "prometheus.yml"
        config.write_text(snippet.text)
        check = subprocess.run([promtool, "check", "config", config], capture_output=True, text=True, timeout=30)
        assert check.returncode == 0, check.stdout + check.stderr


def test_one_snippet_keeps_the_labels_and_one_is_for_dashboards_that_select_otel_collector() -> None:
    found = snippets()
    if not found:
        pytest.skip("README.md has no YAML block with scrape_configs yet")
    assert any(snippet.honors_labels for snippet in found)
    assert any(snippet.labels(("claude-code", ""), "")["job"] == "otel-collector" for snippet in found)


def test_the_target_is_up(scraped: Scraped) -> None:
    (up,) = scraped.prometheus.query("up")
    assert up["value"][1] == "1"
    assert origin(up["metric"]) == {"job": scraped.snippet.job_name, "instance": scraped.target}


def test_every_sender_has_a_series_of_its_own(scraped: Scraped) -> None:
    stored = [origin(found["metric"]) for found in scraped.prometheus.query(f"{SESSIONS} == 1")]
    wanted = [scraped.snippet.labels(sender, scraped.target) for sender in SENDERS]
    assert sorted(stored, key=str) == sorted(wanted, key=str)


def test_the_bridge_s_own_metrics_are_the_target_s(scraped: Scraped) -> None:
    (build,) = scraped.prometheus.query("bridge_build_info")
    job = scraped.snippet.replaced_job or scraped.snippet.job_name
    assert {label: build["metric"][label] for label in ("job", "instance")} == {"job": job, "instance": scraped.target}


def test_target_info_can_be_joined(scraped: Scraped) -> None:
    """Where the labels are kept `job` and `instance` name a sender; elsewhere the exported ones do."""
    on = "job, instance" if scraped.snippet.honors_labels else "exported_job, exported_instance"
    joined = scraped.prometheus.query(f"{SESSIONS} * on ({on}) group_left (os_type) target_info")
    assert [found["metric"]["os_type"] for found in joined] == ["linux"] * len(SENDERS)
