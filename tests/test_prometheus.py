"""A real Prometheus scrapes both endpoints, and its promtool finds nothing to say about the exposition."""

import contextlib
import http.client
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

from tests.daemon import Daemon, free_port
from tests.recordings import DIGITS, PROMETHEUS_NAMES, RUNS, Totals, true_totals, xrg_samples


class Prometheus(NamedTuple):
    """A running Prometheus."""

    url: str
    log_path: Path

    def query(self, expression: str) -> list[dict[str, Any]]:
        with urlopen(f"{self.url}/api/v1/query?{urlencode({'query': expression})}", timeout=10) as reply:
            result: list[dict[str, Any]] = json.load(reply)["data"]["result"]
            return result


def program(name: str) -> str:
    """The path of prometheus or promtool; skips the test where it is not installed."""
    if found := shutil.which(name, path=os.environ.get("BRIDGE_TEST_PROMETHEUS")):
        return found
    missing = f"needs {name}: install Prometheus, or set BRIDGE_TEST_PROMETHEUS to the directory that holds it"
    if os.environ.get("BRIDGE_TEST_REQUIRE_ALL") == "1":
        pytest.fail(missing)
    pytest.skip(missing)


@pytest.fixture
def prometheus(daemon: Daemon, tmp_path: Path) -> Iterator[Prometheus]:
    """Scrapes /metrics as job `bridge` and /v1/metrics as job `xrg`, each once a second."""
    paths = {"bridge": "/metrics", "xrg": "/v1/metrics"}
    targets = [{"targets": [f"localhost:{daemon.port}"]}]
    jobs = [{"job_name": job, "metrics_path": path, "static_configs": targets} for job, path in paths.items()]
    config = {"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}, "scrape_configs": jobs}
    config_path = tmp_path / "prometheus.yml"
    config_path.write_text(json.dumps(config))
    address = f"127.0.0.1:{free_port()}"
    running = Prometheus(f"http://{address}", tmp_path / "prometheus.log")
    options = [
        f"--config.file={config_path}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address={address}",
    ]
    with running.log_path.open("w") as log:
        process = subprocess.Popen([program("prometheus"), *options], stdout=log, stderr=log)
    try:
        yield running
    finally:
        process.kill()
        process.wait(10)


def wait_until_equal(read: Callable[[], object], wanted: object) -> None:
    deadline = time.monotonic() + 20
    seen = None
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if (seen := read()) == wanted:
                return
        time.sleep(0.1)
    assert seen == wanted


def test_prometheus_reads_the_truth_from_both_endpoints(daemon: Daemon, prometheus: Prometheus) -> None:
    """Every series is born while Prometheus scrapes, so each must be seen at 0 before it has a value."""
    wait_until_equal(lambda: targets_up(prometheus), {"bridge": "1", "xrg": "1"})
    requests = RUNS["v329-tty"] + RUNS["v329-resume-cumulative"] + RUNS["v2077-json"]
    for request in requests:
        assert request.post(daemon).status == 200
    totals = true_totals(requests)
    wait_until_equal(lambda: scraped_totals(prometheus), totals)
    wait_until_equal(lambda: scraped_xrg_samples(prometheus), xrg_samples(totals))
    assert first_values(prometheus) == {"0"}, "increase() misses what a series is born with"
    assert targets_up(prometheus) == {"bridge": "1", "xrg": "1"}


def targets_up(prometheus: Prometheus) -> dict[str, str]:
    return {found["metric"]["job"]: found["value"][1] for found in prometheus.query("up")}


def scraped_totals(prometheus: Prometheus) -> Totals:
    sums: dict[tuple[str, str, str], Decimal] = {}
    for found in prometheus.query('{job="bridge",__name__=~"claude_code_.*"}'):
        labels = found["metric"]
        key = (
            PROMETHEUS_NAMES[labels["__name__"]],
            labels.get("type", labels.get("decision", "")),
            labels.get("model", ""),
        )
        sums[key] = sums.get(key, Decimal()) + Decimal(found["value"][1])
    return {key: value.quantize(Decimal(1).scaleb(-DIGITS[key[0]])) for key, value in sums.items()}


def first_values(prometheus: Prometheus) -> set[str]:
    return {found["values"][0][1] for found in prometheus.query('{job="bridge",__name__=~"claude_code_.*"}[5m]')}


def scraped_xrg_samples(prometheus: Prometheus) -> dict[str, Decimal]:
    samples = {}
    for found in prometheus.query('{job="xrg",__name__=~"claude_code_.*"}'):
        labels = {key: value for key, value in found["metric"].items() if key not in ("__name__", "job", "instance")}
        text = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
        samples[found["metric"]["__name__"] + (f"{{{text}}}" if text else "")] = Decimal(found["value"][1])
    return samples


def test_promtool_finds_nothing_to_complain_about(daemon: Daemon) -> None:
    promtool = program("promtool")
    for requests in RUNS.values():
        for request in requests:
            assert request.post(daemon).status == 200
    exposition = daemon.get("/metrics").body
    check = subprocess.run([promtool, "check", "metrics"], input=exposition, capture_output=True, timeout=30)
    assert (check.returncode, check.stdout, check.stderr) == (0, b"", b"")
