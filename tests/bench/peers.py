"""The programs of the comparison: built or found outside the repository, started on one core, watched, ended.

The cache (`BRIDGE_BENCH_CACHE`, else `~/.cache/claude-otel-bridge-bench`) holds what was built: the OpenTelemetry
Collector, by its own builder, and Prometheus, both from Go modules. Linux only: what a process uses is read from /proc.
"""

import contextlib
import http.client
import importlib.metadata
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from bridge import __version__
from tests.daemon import free_port

COLLECTOR, CONTRIB, PROMETHEUS = "v0.165.0", "v0.165.1", "v0.316.0"
_CORE_MODULE = "go.opentelemetry.io/collector"
_CONTRIB_MODULE = "github.com/open-telemetry/opentelemetry-collector-contrib"
_MANIFEST = f"""\
dist: {{name: collector, output_path: ./build, description: the collector of the comparison}}
receivers: [{{gomod: {_CORE_MODULE}/receiver/otlpreceiver {COLLECTOR}}}]
processors: [{{gomod: {_CONTRIB_MODULE}/processor/deltatocumulativeprocessor {CONTRIB}}}]
exporters:
  - gomod: {_CONTRIB_MODULE}/exporter/prometheusexporter {CONTRIB}
  - gomod: {_CORE_MODULE}/exporter/otlphttpexporter {COLLECTOR}
extensions: [{{gomod: {_CONTRIB_MODULE}/extension/storage/filestorage {CONTRIB}}}]
"""
LIMITS = {"BRIDGE_LIMITS_SERIES": "1000000", "BRIDGE_LIMITS_SERIES_PER_METRIC": "1000000"}
"""Settings of the bridge that differ from its defaults, so that 100,000 series are shown one by one."""


class PeerMissing(Exception):
    """A peer could not be built here; the text says why."""


class Launch(NamedTuple):
    """How a peer is started, and where it takes exports and shows series: ports and paths."""

    command: list[str]
    ingest: tuple[int, str]
    scrape: tuple[int, str]
    environment: Mapping[str, str] = {}


class Peer(NamedTuple):
    """One program of the comparison. `live` is the page on which a user would look for a number; empty: the scrape."""

    name: str
    version: str
    launch: Callable[[Path], Launch]
    is_durable: bool = False
    live: str = ""


# --- what is compared ------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """One line of progress."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def cache() -> Path:
    """Where peers are built."""
    chosen = os.environ.get("BRIDGE_BENCH_CACHE")
    directory = Path(chosen) if chosen else Path.home() / ".cache" / "claude-otel-bridge-bench"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def bridge() -> Peer:
    """The bridge of this source tree."""

    def launch(directory: Path) -> Launch:
        port = free_port()
        state = directory / "state"
        command = [sys.executable, "-m", "bridge", "--listen", f"127.0.0.1:{port}", "--state-dir", str(state)]
        return Launch(command, (port, "/v1/metrics"), (port, "/metrics"), LIMITS)

    return Peer("bridge", __version__, launch, is_durable=True, live="/v1/metrics")


def naive() -> Peer:
    """A script of a hundred lines on aiohttp."""

    def launch(directory: Path) -> Launch:
        del directory
        port = free_port()
        command = [sys.executable, str(Path(__file__).with_name("naive.py")), str(port)]
        return Launch(command, (port, "/v1/metrics"), (port, "/v1/metrics"))

    return Peer("naive script", f"aiohttp {importlib.metadata.version('aiohttp')}", launch)


def collector() -> Peer:
    """The OpenTelemetry Collector: receiver, deltatocumulative, Prometheus exporter; all state in memory."""
    program = _built_collector()

    def launch(directory: Path) -> Launch:
        ingest, scrape = free_port(), free_port()
        config = {
            "receivers": {"otlp": _otlp_receiver(ingest)},
            "processors": {"deltatocumulative": {"max_stale": "24h"}},
            "exporters": {"prometheus": _exporter(scrape)},
            "service": {
                **_QUIET,
                "pipelines": {
                    "metrics": {
                        "receivers": ["otlp"],
                        "processors": ["deltatocumulative"],
                        "exporters": ["prometheus"],
                    }
                },
            },
        }
        return Launch(_collector_command(program, directory, config), (ingest, "/v1/metrics"), (scrape, "/metrics"))

    return Peer("collector", COLLECTOR, launch)


def collector_with_storage() -> Peer:
    """The closest that the collector has to durable: it answers when the batch stands in a synced queue on disk.

    Its Prometheus exporter has no queue, so the batch goes from the queue to a second receiver of the same process; the
    counters themselves stay in memory.
    """
    program = _built_collector()

    def launch(directory: Path) -> Launch:
        ingest, inner, scrape = free_port(), free_port(), free_port()
        (directory / "queue").mkdir(exist_ok=True)
        config = {
            "receivers": {"otlp": _otlp_receiver(ingest), "otlp/inner": _otlp_receiver(inner)},
            "processors": {"deltatocumulative": {"max_stale": "24h"}},
            "exporters": {
                "otlp_http": {
                    "endpoint": f"http://127.0.0.1:{inner}",
                    "compression": "none",
                    "sending_queue": {"storage": "file_storage", "num_consumers": 1, "queue_size": 100_000},
                },
                "prometheus": _exporter(scrape),
            },
            "extensions": {"file_storage": {"directory": str(directory / "queue"), "fsync": True}},
            "service": {
                **_QUIET,
                "extensions": ["file_storage"],
                "pipelines": {
                    "metrics/taken": {"receivers": ["otlp"], "exporters": ["otlp_http"]},
                    "metrics/counted": {
                        "receivers": ["otlp/inner"],
                        "processors": ["deltatocumulative"],
                        "exporters": ["prometheus"],
                    },
                },
            },
        }
        return Launch(_collector_command(program, directory, config), (ingest, "/v1/metrics"), (scrape, "/metrics"))

    return Peer("collector + file storage", COLLECTOR, launch, is_durable=True)


def prometheus() -> Peer:
    """Prometheus with its OTLP receiver and conversion of deltas; its series are read by federation."""
    program = _built_prometheus()

    def launch(directory: Path) -> Launch:
        port = free_port()
        # Sessions share target_info, so its samples come out of order; Prometheus recommends the window for OTLP.
        config = {"storage": {"tsdb": {"out_of_order_time_window": "30m"}}}
        (directory / "prometheus.yml").write_text(json.dumps(config))
        command = [
            str(program), f"--config.file={directory / 'prometheus.yml'}", f"--web.listen-address=127.0.0.1:{port}",
            f"--storage.tsdb.path={directory / 'data'}", "--web.enable-otlp-receiver",
            "--enable-feature=otlp-deltatocumulative", "--log.level=error",
        ]  # fmt: skip
        select = "/federate?match%5B%5D=%7B__name__%3D~%22claude.*%22%7D"
        return Launch(command, (port, "/api/v1/otlp/v1/metrics"), (port, select))

    return Peer("Prometheus", PROMETHEUS, launch)


ALL: dict[str, Callable[[], Peer]] = {
    "bridge": bridge,
    "collector": collector,
    "storage": collector_with_storage,
    "prometheus": prometheus,
    "naive": naive,
}


def _otlp_receiver(port: int) -> dict[str, object]:
    return {"protocols": {"http": {"endpoint": f"127.0.0.1:{port}"}}}


def _exporter(port: int) -> dict[str, object]:
    return {"endpoint": f"127.0.0.1:{port}", "metric_expiration": "24h"}


_QUIET: dict[str, object] = {"telemetry": {"logs": {"level": "error"}, "metrics": {"level": "none"}}}


def _collector_command(program: Path, directory: Path, config: Mapping[str, object]) -> list[str]:
    path = directory / "collector.json"
    path.write_text(json.dumps(config))
    return [str(program), f"--config={path}"]


def _built_collector() -> Path:
    directory = cache() / f"collector-{COLLECTOR}"
    program = directory / "build" / "collector"
    if not program.exists():
        directory.mkdir(exist_ok=True)
        (directory / "builder.yaml").write_text(_MANIFEST)
        _go(directory, "install", f"{_CORE_MODULE}/cmd/builder@{COLLECTOR}", GOBIN=str(directory))
        _build(["./builder", "--config", "builder.yaml"], directory, {"CGO_ENABLED": "0"})
    return program


def _built_prometheus() -> Path:
    directory = cache() / f"prometheus-{PROMETHEUS}"
    if not (directory / "prometheus").exists():
        directory.mkdir(exist_ok=True)
        _go(directory, "install", f"github.com/prometheus/prometheus/cmd/prometheus@{PROMETHEUS}", GOBIN=str(directory))
    return directory / "prometheus"


def _go(directory: Path, *arguments: str, **environment: str) -> None:
    if shutil.which("go") is None:
        raise PeerMissing("needs Go to be built")
    _build(["go", *arguments], directory, environment)


def _build(command: list[str], directory: Path, environment: Mapping[str, str]) -> None:
    say(f"building in {directory}: {' '.join(command)}")
    done = subprocess.run(
        ["nice", "-n", "10", *command], cwd=directory, env={**os.environ, "GOFLAGS": "-mod=mod", **environment},
        capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    if done.returncode:
        raise PeerMissing(f"{' '.join(command)}: {done.stderr[-600:]}")


# --- a running peer --------------------------------------------------------------------------------------------


class Usage(NamedTuple):
    """What a process has used so far: CPU seconds, wake-ups, bytes sent to the disk."""

    cpu: float
    wakeups: int
    written: int


def usage_of(process: int) -> Usage:
    """What a process has used since it began."""
    directory = Path(f"/proc/{process}")
    nanoseconds = wakeups = 0
    for task in directory.glob("task/*"):
        with contextlib.suppress(OSError):  # a thread may end meanwhile
            nanoseconds += int((task / "schedstat").read_text().split()[0])
            wakeups += int((task / "status").read_text().partition("voluntary_ctxt_switches:")[2].split()[0])
    written = int((directory / "io").read_text().partition("\nwrite_bytes:")[2].split()[0])
    return Usage(nanoseconds / 1e9, wakeups, written)


def memory_of(process: int) -> float:
    """Resident memory in MB."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1000


class Running:
    """A peer that runs in `directory`, pinned to one core."""

    def __init__(self, peer: Peer, directory: Path, preload: Path | None = None) -> None:
        self.peer = peer
        self.directory = directory
        directory.mkdir(exist_ok=True)
        launch = self._launch = peer.launch(directory)
        self.ingest_port, self.ingest_path = launch.ingest
        self.scrape_port, self.scrape_path = launch.scrape
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("BRIDGE_", "OTEL_", "XDG_"))}
        extra = {"LD_PRELOAD": str(preload)} if preload else {}
        self._environment = {**kept, "HOME": str(directory), **launch.environment, **extra}
        # Imports must not depend on where the benchmark was started.
        self._environment["PYTHONPATH"] = str(Path(__file__).parents[2])
        self.start_seconds = 0.0

    def start(self) -> "Running":
        """Start it and wait until it answers a scrape; how long that took is in `start_seconds`."""
        log_path = self.directory / "log"
        with log_path.open("ab") as log:
            began = time.perf_counter()
            self._process = subprocess.Popen(
                self._launch.command, stdout=log, stderr=log, env=self._environment, cwd=self.directory,
                preexec_fn=lambda: os.sched_setaffinity(0, {SERVER_CORE}),
            )  # fmt: skip
        while not self._answers():
            if self._process.poll() is not None or time.perf_counter() > began + 60:
                raise SystemExit(f"{self.peer.name} does not start:\n{log_path.read_text()[-2000:]}")
            time.sleep(0.002)
        self.start_seconds = time.perf_counter() - began
        return self

    def _answers(self) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            with socket.create_connection(("127.0.0.1", self.ingest_port), 1):
                pass
            return self.get(self.scrape_path)[0] == 200
        return False

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
        """One GET of the scrape port over a connection of its own: code and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.scrape_port, timeout=60)
        try:
            connection.request("GET", path, headers={"Accept-Encoding": "identity", **(headers or {})})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    @property
    def memory(self) -> float:
        """Resident memory in MB."""
        return memory_of(self._process.pid)

    @property
    def usage(self) -> Usage:
        """What the process has used since it began."""
        return usage_of(self._process.pid)

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait(10)

    def stop(self) -> None:
        """An orderly end; after ten seconds the other one."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()


_CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
SERVER_CORE, CLIENT_CORE = _CORES[0], _CORES[-1]


@contextlib.contextmanager
def running(peer: Peer, directory: Path, preload: Path | None = None) -> Iterator[Running]:
    """A started peer with a directory of its own, stopped at the end."""
    one = Running(peer, directory, preload).start()
    try:
        yield one
    finally:
        one.stop()
