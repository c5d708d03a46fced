"""Exports whose worth is known before they are sent, and the books of what became of them.

A sender writes down what its exports are worth when it makes them, so the oracle owes nothing to the bridge. What was
acknowledged is certain; what was refused or never answered is possible; what XRG is shown lies between the two.
"""

import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from random import Random
from typing import NamedTuple, Protocol

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality, Sum

from tests.transcript_tree import response

SECOND = 10**9
NANO = 10**9
METRICS, LOGS = "/v1/metrics", "/v1/logs"
TYPES = {"input": "input", "output": "output", "cacheRead": "cache_read", "cacheCreation": "cache_creation"}
MODELS = ("claude-opus-4-5", "claude-sonnet-4-5", "claude-haiku-4-5")
COST = "claude_code_cost_usage"
REMEMBERED = 64
"""Acknowledged exports that a sender may send again."""
PER_SESSION = 150
"""Exports after which a sender begins a new session."""

Worth = Counter[str]
"""What is added to each line of the XRG profile: tokens, and nano-dollars for the cost."""


def line_of(kind: str) -> str:
    """The line of the XRG profile for a kind of token."""
    extra = ',xrg="cache_create"' if kind == "cache_creation" else ""
    return f'claude_code_token_usage{{type="{kind}"{extra}}}'


LINES = (*map(line_of, TYPES.values()), COST)


def shown_in(text: str) -> Worth:
    """What a scrape of the XRG profile shows in those lines, exactly."""
    shown: Worth = Counter()
    for line in text.splitlines():
        name, _, rest = line.rpartition(" ")[0].rpartition(" ")
        if name == COST:
            dollars, _, fraction = rest.partition(".")
            shown[name] = int(dollars) * NANO + int(fraction.ljust(9, "0"))
        elif name in LINES:
            shown[name] = int(rest)
    return shown


class Export(NamedTuple):
    """One request. `absolute` says that `worth` is all that its sender's run is worth, not what this one adds."""

    path: str
    body: bytes
    points: int
    worth: Worth
    pieces: tuple[bytes, ...] = ()
    """The same points in other batches, where every point has an identity of its own."""


class Sender(Protocol):
    """Makes exports, and keeps the books of them."""

    certain: Worth
    possible: Worth

    def make(self) -> Export: ...
    def acknowledge(self, export: Export) -> None: ...
    def open(self) -> Iterable[Export]:
        """What was not acknowledged, to be sent in the end."""
        ...


class _Books:
    """What all senders share. One thread writes it, others read sums that may lag."""

    def __init__(self) -> None:
        self.certain: Worth = Counter()
        self.possible: Worth = Counter()
        self.per_session = PER_SESSION
        self.past: deque[Export] = deque(maxlen=REMEMBERED)
        self._open: dict[bytes, Export] = {}
        self._lock = threading.Lock()

    def _attempt(self, export: Export) -> Export:
        with self._lock:
            self.possible.update(export.worth)
        self._open[export.body] = export
        return export

    def acknowledge(self, export: Export) -> None:
        """The bridge answered 200 to an export, for the first time or again."""
        if self._open.pop(export.body, None) is not None:
            with self._lock:
                self.certain.update(export.worth)
            self.past.append(export)

    def open(self) -> list[Export]:
        return list(self._open.values())

    def sums(self) -> tuple[Worth, Worth]:
        """Certain and possible, as of one moment."""
        with self._lock:
            return self.certain.copy(), self.possible.copy()


class DeltaSender(_Books):
    """Deltas of sessions, as Claude Code sends them; without `has_session` only the body's hash tells repeats apart."""

    def __init__(self, name: str, seed: int, points: tuple[int, int], *, has_session: bool = True) -> None:
        super().__init__()
        self._choose = Random(seed)
        self._name, self._points, self._has_session = name, points, has_session
        self._time = 1_700_000_000 * SECOND + seed
        self._made = 0

    def make(self) -> Export:
        count = self._choose.randint(*self._points)
        self._made += 1
        session = f"{self._name}-{self._made // self.per_session}" if self._has_session else ""
        rows = [self._row() for _ in range(count)]
        worth: Worth = Counter()
        for kind, _, value, _ in rows:
            worth[line_of(TYPES[kind]) if kind else COST] += value
        pieces: tuple[bytes, ...] = ()
        if self._has_session:
            cut = self._choose.randint(1, count - 1) if count > 1 else 1
            shuffled = self._choose.sample(rows, count)
            pieces = tuple(delta_body(session, part) for part in (shuffled[:cut], shuffled[cut:]) if part)
        return self._attempt(Export(METRICS, delta_body(session, rows), count, worth, pieces))

    def _row(self) -> tuple[str, str, int, int]:
        self._time += self._choose.randint(1, 2 * SECOND)
        kind = self._choose.choice(("", *TYPES))
        value = self._choose.randint(0, 5_000) if kind else self._choose.randint(0, 10**8)
        model = self._choose.choice(MODELS) if self._has_session else "pool-model"
        return kind, model, value, self._time


def delta_body(session: str, rows: Iterable[tuple[str, str, int, int]]) -> bytes:
    """Rows of (type or "" for cost, model, value in tokens or nano-dollars, end)."""
    request = ExportMetricsServiceRequest()
    sums = sums_in(request, AggregationTemporality.AGGREGATION_TEMPORALITY_DELTA)
    for kind, model, value, time in rows:
        point = (sums["tokens"] if kind else sums["cost"]).data_points.add(
            start_time_unix_nano=time - SECOND,
            time_unix_nano=time,
            as_double=float(value) if kind else value / NANO,
        )
        attributes = {"session.id": session, "type": kind, "model": model}
        for key, text in attributes.items():
            if text:
                point.attributes.add(key=key).value.string_value = text
    return request.SerializeToString()


def sums_in(request: ExportMetricsServiceRequest, temporality: "AggregationTemporality.ValueType") -> dict[str, Sum]:
    resource = request.resource_metrics.add()
    resource.resource.attributes.add(key="service.name").value.string_value = "claude-code"
    scope = resource.scope_metrics.add()
    scope.scope.name = "com.anthropic.claude_code"
    sums = {}
    for name, unit in (("tokens", "tokens"), ("cost", "USD")):
        metric = scope.metrics.add(name=f"claude_code.{'token' if name == 'tokens' else name}.usage", unit=unit)
        metric.sum.aggregation_temporality = temporality
        metric.sum.is_monotonic = True
        sums[name] = metric.sum
    return sums


class CumulativeSender(_Books):
    """Cumulative runs: each export has the whole run, so an acknowledged one makes all before it certain."""

    def __init__(self, name: str, seed: int) -> None:
        super().__init__()
        self._choose = Random(seed)
        self._name = name
        self._start = 1_700_000_000 * SECOND + seed
        self._time = self._start
        self._made = 0
        self._run: Counter[tuple[str, str]] = Counter()
        self._since_certain: Worth = Counter()

    def make(self) -> Export:
        if self._made % self.per_session == 0 and not self._open:
            self._start = self._time = self._time + SECOND
            self._run.clear()
            self._session = f"{self._name}-{self._made // self.per_session}"
        self._made += 1
        self._time += self._choose.randint(1, SECOND)
        worth: Worth = Counter()
        for kind in ("", *TYPES):
            for model in MODELS:
                value = self._choose.randint(0, 5_000 if kind else 10**8)
                self._run[kind, model] += value
                worth[line_of(TYPES[kind]) if kind else COST] += value
        self._since_certain.update(worth)
        body = self._body()
        self._open.clear()  # the newest export heals what the earlier ones lost
        return self._attempt(Export(METRICS, body, len(self._run), worth))

    def acknowledge(self, export: Export) -> None:
        if self._open.pop(export.body, None) is not None:
            with self._lock:
                self.certain.update(self._since_certain)
            self._since_certain = Counter()
            self.past.append(export)

    def _body(self) -> bytes:
        request = ExportMetricsServiceRequest()
        sums = sums_in(request, AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE)
        for (kind, model), value in self._run.items():
            point = (sums["tokens"] if kind else sums["cost"]).data_points.add(
                start_time_unix_nano=self._start,
                time_unix_nano=self._time,
                as_double=float(value) if kind else value / NANO,
            )
            for key, text in {"session.id": self._session, "type": kind, "model": model}.items():
                if text:
                    point.attributes.add(key=key).value.string_value = text
        return request.SerializeToString()


class EventSender(_Books):
    """api_request events of a session that sends no metrics; each is known by its request id."""

    def __init__(self, name: str, seed: int, records: tuple[int, int]) -> None:
        super().__init__()
        self._choose = Random(seed)
        self._name, self._records = name, records
        self._made = 0

    def make(self) -> Export:
        rows = [self._row() for _ in range(self._choose.randint(*self._records))]
        worth: Worth = Counter()
        for row in rows:
            for kind, key in EVENT_KEYS.items():
                worth[line_of(kind)] += int(row[key])
            worth[COST] += int(row["nano"])
        cut = len(rows) // 2
        pieces = tuple(self._body(part) for part in (rows[:cut], rows[cut:]) if part)
        return self._attempt(Export(LOGS, self._body(rows), len(rows), worth, pieces))

    def _row(self) -> dict[str, str]:
        self._made += 1
        tokens = {key: str(self._choose.randint(0, 5_000)) for key in EVENT_KEYS.values()}
        return {**tokens, "nano": str(self._choose.randint(0, 10**8)), "request_id": f"req_{self._name}_{self._made}"}

    def _body(self, rows: Iterable[Mapping[str, str]]) -> bytes:
        request = ExportLogsServiceRequest()
        resource = request.resource_logs.add()
        resource.resource.attributes.add(key="service.name").value.string_value = "claude-code"
        records = resource.scope_logs.add().log_records
        for row in rows:
            time = 1_700_000_000 * SECOND + int(row["request_id"].rpartition("_")[2]) * SECOND
            record = records.add(time_unix_nano=time)
            nano = int(row["nano"])
            told = {key: text for key, text in row.items() if key != "nano"}
            told |= {
                "event.name": "api_request", "session.id": self._name, "model": "event-model",
                "cost_usd": f"{nano // NANO}.{nano % NANO:09}",
            }  # fmt: skip
            for key, text in told.items():
                record.attributes.add(key=key).value.string_value = text
        return request.SerializeToString()


EVENT_KEYS = {
    "input": "input_tokens",
    "output": "output_tokens",
    "cache_read": "cache_read_tokens",
    "cache_creation": "cache_creation_tokens",
}


class TranscriptWriter(_Books):
    """Lines of a session that neither metrics nor events tell of; nobody acknowledges them, and none may be lost."""

    def __init__(self, name: str, seed: int) -> None:
        super().__init__()
        self._choose = Random(seed)
        self._name = name
        self._made = 0

    def line(self) -> bytes:
        """The next line, to be appended; its model has no price."""
        self._made += 1
        counts = {
            "input_tokens": self._choose.randint(0, 5_000),
            "output_tokens": self._choose.randint(0, 5_000),
            "cache_read_input_tokens": self._choose.randint(0, 5_000),
        }
        name = f"{self._name}_{self._made}"
        worth = Counter(
            {
                line_of("input"): counts["input_tokens"],
                line_of("output"): counts["output_tokens"],
                line_of("cache_read"): counts["cache_read_input_tokens"],
            }
        )
        with self._lock:
            self.possible.update(worth)
        return response(f"msg_{name}", f"req_{name}", counts, sessionId=self._name, model="transcript-model")


def added(worths: Iterable[Worth]) -> Worth:
    """The sum of some worths."""
    total: Worth = Counter()
    for worth in worths:
        total.update(worth)
    return total


def differences(shown: Mapping[str, int], least: Mapping[str, int], most: Mapping[str, int]) -> Iterator[str]:
    """The lines that do not lie between two worths."""
    for line in LINES:
        if not least.get(line, 0) <= shown.get(line, 0) <= most.get(line, 0):
            yield f"{line} shows {shown.get(line, 0)}, not {least.get(line, 0)} to {most.get(line, 0)}"
