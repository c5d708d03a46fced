"""A real Prometheus for tests: found, started on a free port, asked, ended."""

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

from tests.daemon import free_port

T = TypeVar("T")

PATIENCE_SECONDS = 20
"""How long a test waits for what should happen within a scrape or two."""


def program(name: str) -> str:
    """The path of prometheus or promtool; skips the test where it is not installed."""
    if found := shutil.which(name, path=os.environ.get("BRIDGE_TEST_PROMETHEUS")):
        return found
    missing = f"needs {name}: install Prometheus, or set BRIDGE_TEST_PROMETHEUS to the directory that holds it"
    if os.environ.get("BRIDGE_TEST_REQUIRE_ALL") == "1":
        pytest.fail(missing)
    pytest.skip(missing)


class Sample(NamedTuple):
    """A stored sample; the time in Unix seconds."""

    time: float
    value: float


class Prometheus:
    """A running Prometheus."""

    def __init__(self, url: str, log_path: Path) -> None:
        self.url = url
        self.log_path = log_path

    def get(self, path: str, parameters: Mapping[str, str]) -> Any:
        """The data of an answer of its API; an error answer is an AssertionError with its text."""
        try:
            with urlopen(f"{self.url}/api/v1/{path}?{urlencode(parameters)}", timeout=30) as reply:
                return json.load(reply)["data"]
        except HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def query(self, expression: str, at: float | None = None) -> list[dict[str, Any]]:
        """The vector or matrix that an expression answers with, now or at a Unix time."""
        time_parameter = {} if at is None else {"time": f"{at:.3f}"}
        data = self.get("query", {"query": expression, **time_parameter})
        result: list[dict[str, Any]] = data["result"]
        return result if data["resultType"] != "scalar" else [{"metric": {}, "value": result}]

    def samples(self, selector: str, at: float | None = None) -> list[Sample]:
        """The raw samples of the one series that a selector names; none while there is no such series."""
        series = self.query(f"{selector}[1d]", at)
        assert len(series) <= 1, f"{selector} selects {len(series)} series"
        return [Sample(time, float(value)) for found in series for time, value in found["values"]]

    def wait_for_scrape(self, job: str) -> float:
        """Wait until a scrape of this job that began after this call is stored; its time."""
        called = time.time()

        def later() -> list[float]:
            # Prometheus rounds a scrape's time to its interval by up to 1 %.
            samples = self.samples(f'up{{job="{job}"}}')
            return [sample.time for sample in samples if sample.value == 1 and sample.time > called + 0.01]

        return wait_for(later, f"another scrape of {job}")[0]


@contextlib.contextmanager
def run_prometheus(directory: Path, config: str, *options: str) -> Iterator[Prometheus]:
    """A Prometheus with this configuration (YAML, so JSON will do) and its data under `directory`, ready."""
    directory.mkdir(parents=True, exist_ok=True)
    config_path, log_path = directory / "prometheus.yml", directory / "prometheus.log"
    config_path.write_text(config)
    address = f"127.0.0.1:{free_port()}"
    command = [
        program("prometheus"),
        f"--config.file={config_path}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address={address}",
        *options,
    ]
    with log_path.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        running = Prometheus(f"http://{address}", log_path)
        wait_for(lambda: _is_ready(running, process), "Prometheus to be ready")
        yield running
    finally:
        process.kill()
        process.wait(10)


def _is_ready(prometheus: Prometheus, process: "subprocess.Popen[bytes]") -> bool:
    if process.poll() is not None:
        raise AssertionError(f"Prometheus ended:\n{prometheus.log_path.read_text()}")
    with contextlib.suppress(OSError), urlopen(f"{prometheus.url}/-/ready", timeout=5) as reply:
        return bool(reply.status == 200)
    return False


def scrape_config(ports: Mapping[str, int], *, interval: str, params: Mapping[str, list[str]] | None = None) -> str:
    """A configuration that scrapes /metrics of bridges, a job each, and keeps the labels as they are exposed."""
    jobs = [
        {
            "job_name": job,
            "honor_labels": True,
            "params": params or {},
            "static_configs": [{"targets": [f"localhost:{port}"]}],
        }
        for job, port in ports.items()
    ]
    return json.dumps({"global": {"scrape_interval": interval, "scrape_timeout": interval}, "scrape_configs": jobs})


def wait_for(read: Callable[[], T], what: str, timeout: float = PATIENCE_SECONDS) -> T:
    """The first true answer of `read`."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if answer := read():
            return answer
        time.sleep(0.02)
    raise AssertionError(f"waited {timeout} s for {what}")
