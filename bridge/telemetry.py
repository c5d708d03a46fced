"""The bridge's own metrics, and its log.

Metrics are prometheus_client's, named `bridge_*`, and stand last on /metrics; none of them on the XRG profile.
The log is one line a fact, on standard error, as text or JSON. Lines about what clients send come through
`Throttle`, so that no client can flood it; no attribute value and no body is ever logged.
"""

import json
import logging
import logging.handlers
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping, Set
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    exposition,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics_exposition
from prometheus_client.registry import Collector

from bridge import __version__, supervisor
from bridge.exposition import Format
from bridge.model import Observation
from bridge.tools import known

MAX_LOG_BYTES = 10 * 2**20
LOG_FILES = 3
MAX_NAMES = 100
"""Distinct event and span names that get a series of their own; the rest is `other`."""

log = logging.getLogger("bridge")

M = TypeVar("M", Counter, Gauge)


# --- metrics ---------------------------------------------------------------------------------------------------


class Telemetry:
    """The bridge's own metrics, in a registry of their own. `clock` gives Unix seconds."""

    def __init__(self, clock: Callable[[], float], throttle: "Throttle") -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # has no annotations
        registry = self.registry = CollectorRegistry(auto_describe=False)
        self._clock = clock
        self._throttle = throttle
        self._build = Gauge(
            "bridge_build_info", "Version of the bridge.", ["version", "python", "loop"], registry=registry
        )
        self.requests = Counter(
            "bridge_requests", "OTLP requests answered, by signal and HTTP code.", ["signal", "code"], registry=registry
        )
        self.refused = Counter(
            "bridge_http_refused", "Requests answered with an error, by HTTP code.", ["code"], registry=registry
        )
        self.denied = Counter(
            "bridge_http_denied", "Requests without a known token (401; 429 for many) or above an allowance (429).",
            ["code", "reason"],
            registry=registry,
        )  # fmt: skip
        self.stalls = Counter(
            "bridge_loop_stalls", "Times that the event loop did not turn for more than a second.", registry=registry
        )
        self.accepted = Counter("bridge_points_accepted", "Data points counted.", registry=registry)
        self.duplicate = Counter(
            "bridge_points_duplicate", "Data points that had been counted before.", registry=registry
        )
        self.dropped = Counter(
            "bridge_points_dropped", "Data points refused, by reason; each is also told to its sender.", ["reason"],
            registry=registry,
        )  # fmt: skip
        self.log_records = Counter(
            "bridge_log_records", "Log records received, by event name; their contents are not kept.", ["name"],
            registry=registry,
        )  # fmt: skip
        self.spans = Counter(
            "bridge_spans", "Spans received, by name; their contents are not kept.", ["name"], registry=registry
        )
        self.last_export = Gauge(
            "bridge_last_export_timestamp_seconds", "When a tool last sent a signal, Unix time.", ["tool", "signal"],
            registry=registry,
        )  # fmt: skip
        self.commit_seconds = Histogram(
            "bridge_commit_seconds", "Time of one durable transaction of the ledger.",
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5), registry=registry,
        )  # fmt: skip
        self.limited = Counter(
            "bridge_streams_limited", "Streams that met a limit when they were new, by its setting.", ["setting"],
            registry=registry,
        )  # fmt: skip
        self.series = Gauge("bridge_series", "Series shown on /metrics.", registry=registry)
        self.lost = Counter(
            "bridge_state_lost_commits", "Commits that had been served and that the state did not have at the start.",
            registry=registry,
        )  # fmt: skip
        self.held = Gauge(
            "bridge_held", "Totals and series shown at what they were before the state went back.", registry=registry
        )
        self.storage_ok = Gauge("bridge_storage_ok", "Whether the last commit succeeded.", registry=registry)
        self.grpc_attempts = Counter(
            "bridge_grpc_attempts", "Connections of gRPC clients, which this port cannot serve.", registry=registry
        )
        self.wrong_path = Counter(
            "bridge_wrong_path", "Requests posted to paths where nothing is served.", registry=registry
        )
        self.transcript_files = Gauge("bridge_transcript_files", "Transcripts that are followed.", registry=registry)
        self.transcript_bytes = Counter("bridge_transcript_bytes", "Bytes of transcripts read.", registry=registry)
        self.transcript_errors = Counter(
            "bridge_transcript_errors", "Transcripts that could not be read.", registry=registry
        )
        self.transcript_refused = Counter(
            "bridge_transcript_lines_refused", "Lines of transcripts refused, by reason.", ["reason"], registry=registry
        )
        self.joined = Gauge(
            "bridge_joined_tokens", "Tokens as each source adds up to them, and joined.", ["source"], registry=registry
        )
        self.conflicts = Gauge(
            "bridge_join_conflict_sessions", "Sessions that may be one under two ids: seen by one source alone while"
            " another is seen by the other alone.", registry=registry,
        )  # fmt: skip
        registry.register(_process_collector())
        self._names: dict[Counter, set[str]] = {}
        self._tools: set[str] = set()

    def count_names(self, counter: Counter, names: Mapping[str, int]) -> None:
        """Add counts by a name that a client chose; unusual names and those beyond MAX_NAMES become `other`."""
        known = self._names.setdefault(counter, set())
        for name, count in names.items():
            if name not in known and (len(known) >= MAX_NAMES or not _is_plain_name(name)):
                name = "other"
            known.add(name)
            _child(counter, name).inc(count)

    def note_build(self, loop: str) -> None:
        self._build.labels(__version__, platform.python_version(), loop).set(1)

    def note_export(self, service: str, signal: str) -> None:
        """Remember that a service sent something now."""
        tool = known.tool_of_service(service)
        if tool not in self._tools:
            tool = tool if len(self._tools) < MAX_NAMES and _is_plain_name(tool) else "other"
            self._tools.add(tool)
        _child(self.last_export, tool, signal).set(round(self._clock(), 3))

    def count_request(self, signal: str, code: int) -> None:
        """Count an OTLP request that was answered."""
        _child(self.requests, signal, str(code)).inc()

    def observe(self, observation: Observation) -> None:
        """Take note of a commit."""
        self.commit_seconds.observe(observation.seconds)
        for setting, count in observation.limited.items():
            self.limited.labels(setting).inc(count)
            self._throttle.warning(setting, "labels or series were limited; raise the setting", setting=setting)

    def render(self, wanted: Format, names: Set[str]) -> bytes:
        """The families of these names, or all, in one of the text formats; OpenMetrics ends with its `# EOF`."""
        registry = self.registry.restricted_registry(names) if names else self.registry
        if wanted.openmetrics:
            return bytes(openmetrics_exposition.generate_latest(registry))  # type: ignore[no-untyped-call]  # same
        return exposition.generate_latest(registry)


@lru_cache(256)
def _child(metric: M, *values: str) -> M:
    """The metric with these label values, which takes the library some microseconds to find."""
    return metric.labels(*values)


def _is_plain_name(name: str) -> bool:
    return 0 < len(name) <= 64 and all(c.isascii() and (c.isalnum() or c in "._-/ ") for c in name)


class _ResourceUsage(Collector):
    """process_* where there is no /proc (macOS): what getrusage knows."""

    def __init__(self) -> None:
        self._started = time.time()

    def collect(self) -> list[Metric]:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        bytes_per_unit = 1 if sys.platform == "darwin" else 1024
        return [
            CounterMetricFamily(
                "process_cpu_seconds", "Total user and system CPU time spent in seconds.",
                value=usage.ru_utime + usage.ru_stime,
            ),
            GaugeMetricFamily(
                "process_max_resident_memory_bytes", "Largest resident memory size in bytes.",
                value=usage.ru_maxrss * bytes_per_unit,
            ),
            GaugeMetricFamily(
                "process_start_time_seconds", "Start time of the process since unix epoch in seconds.",
                value=self._started,
            ),
        ]  # fmt: skip


def _process_collector() -> Collector:
    return ProcessCollector(registry=None) if Path("/proc/self/stat").exists() else _ResourceUsage()


# --- the log ---------------------------------------------------------------------------------------------------

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


def _one_line(text: str) -> str:
    """Control characters escaped, so that a line stays a line."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class TextFormatter(logging.Formatter):
    """`2026-11-21T09:30:00.123Z warning message key=value`."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        when = f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03d}Z"
        return f"{when} {self.undated(record)}"

    def undated(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {key}={_quoted(value)}" for key, value in _fields(record).items())
        return f"{record.levelname.lower()} {_one_line(record.getMessage())}{fields}{_trace(self, record)}"


def _quoted(value: object) -> str:
    text = _one_line(str(value))
    return f'"{text}"' if " " in text or not text else text


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, message, and the fields."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        return self._object(record, time=f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03d}Z")

    def undated(self, record: logging.LogRecord) -> str:
        return self._object(record)

    def _object(self, record: logging.LogRecord, **when: str) -> str:
        entry = {
            **when,
            "level": record.levelname.lower(),
            "message": record.getMessage() + _trace(self, record),
            **_fields(record),
        }
        return json.dumps(entry, default=str, ensure_ascii=False)


class JournalFormatter(logging.Formatter):
    """A line for the systemd journal: `<4>` for its priority in syslog's numbers, and no time, which it knows."""

    def __init__(self, line: TextFormatter | JsonFormatter) -> None:
        super().__init__()
        self._line = line

    def format(self, record: logging.LogRecord) -> str:
        level = record.levelno
        priority = 7 if level < logging.INFO else 6 if level < logging.WARNING else 4 if level < logging.ERROR else 3
        return f"<{priority}>{self._line.undated(record)}"


class _RotatedFile(logging.handlers.RotatingFileHandler):
    """The log in files of our own: MAX_LOG_BYTES each, LOG_FILES old ones. A symbolic link is not followed."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, maxBytes=MAX_LOG_BYTES, backupCount=LOG_FILES, encoding="utf-8")

    def _open(self) -> Any:
        return open(self.baseFilename, self.mode, encoding=self.encoding, opener=_open_no_link)


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    """Where an error was raised: its type and place, never its text, which could quote what a client sent."""
    if record.exc_info is None or record.exc_info[0] is None:
        return ""
    kind, _, trace = record.exc_info
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else ""
    del formatter
    return f": {kind.__name__}{place}"


def configure_log(kind: str, level: str, file: str) -> None:
    """Send the log to a file that is rotated, if one is named, else to standard error. `kind` is `text` or `json`."""
    line = JsonFormatter() if kind == "json" else TextFormatter()
    handler: logging.Handler
    if file:
        path = Path(file).expanduser()
        handler = _RotatedFile(path)
    else:
        handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JournalFormatter(line) if not file and supervisor.is_journal(2) else line)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it has a line for every change


class Throttle:
    """At most one log line a reason in ten seconds; the next one says how many were left out."""

    def __init__(self, clock: Callable[[], float], seconds: float = 10) -> None:
        self._clock = clock
        self._seconds = seconds
        self._last: dict[str, float] = {}
        self._left_out: dict[str, int] = {}

    def warning(self, reason: str, message: str, **fields: object) -> None:
        """A line about something that an operator may want to change."""
        self._log(logging.WARNING, reason, message, fields)

    def info(self, reason: str, message: str, **fields: object) -> None:
        """A line about how something gets on."""
        self._log(logging.INFO, reason, message, fields)

    def _log(self, level: int, reason: str, message: str, fields: dict[str, object]) -> None:
        now = self._clock()
        if now - self._last.get(reason, -self._seconds) < self._seconds:
            self._left_out[reason] = self._left_out.get(reason, 0) + 1
            return
        self._last[reason] = now
        if count := self._left_out.pop(reason, 0):
            fields["left_out"] = count
        log.log(level, message, extra=fields)
