"""The writer thread's side of the ledger: decides what each point adds, and writes it.

Law: a group of requests is one transaction. The caches here follow the transaction that is being made, not the
last commit, so they are thrown away when one fails; the database says what is true. Nothing here knows the event
loop, and nothing of the loop knows what stands here but the receipts and the change that a commit returns.
"""

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from hashlib import blake2b
from itertools import starmap
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace

from bridge.mark import Mark
from bridge.model import (
    Attributes,
    AttributeValue,
    Batch,
    DataPoint,
    Drop,
    Exemplar,
    ExponentialHistogram,
    Histogram,
    Kind,
    Metric,
    Receipt,
    Refusal,
    Temporality,
    TranscriptRow,
    Typed,
    UsageCell,
    Value,
    attribute_text,
    text_in,
)
from bridge.otlp import REDACTED
from bridge.rows import MetricRow, SeriesRow, Snapshot, StreamRow, TargetRow, WriterRow
from bridge.state import Damaged, StoreUnavailable
from bridge.store import Store
from bridge.temporality import IDENTITY_BYTES, Run, advance, begins_run, delta_identity, refusal
from bridge.tools import claude_code, known
from bridge.usage import UsageBooks, UsageChange
from bridge.values import add

MAX_CACHED = 60_000
"""Streams, series, writers or runs that the writer keeps in memory; beyond it they are read from disk again."""
MAX_CACHED_TEXT = 16_384
"""Characters of a metric's and its resource's texts beyond which it is worked out anew each time."""
MAX_CACHED_ATTRIBUTES = 2_048
"""Bytes of a point's attributes beyond which its stream is looked up by a digest of them each time."""
MAX_LABELS = 2**14
"""Attributes that the writer remembers as labels."""
MAX_INTEGER = 2**63 - 1
MAX_TARGETS = 1_000
MAX_UNIT = 64
MAX_DESCRIPTION = 1_000
MAX_JOINED = 1e9
"""Tokens that one delta histogram of a known tool can plausibly add."""
CUMULATIVE_FACTOR = 1_000
"""A cumulative value holds a whole process, so it may be this much larger than one delta."""
OVERFLOW = (("otel.metric.overflow", "true"),)
"""The labels of the series that takes what is above a limit."""
_NUMBER = (int, float)
FED = 1
"""The start of the run that says what transcripts have fed to a stream: no clock ever told it."""
SOURCE = "bridge.source"
"""Among the labels of a series: the token that it came with. No attribute of a client has this key."""
_IDENTIFYING = frozenset({"service.namespace", "service.name", "service.instance.id"})


Recover = Callable[[Damaged], bool]


class LedgerSettings(msgspec.Struct, frozen=True):
    """What the ledger needs to know. Durations in milliseconds, lengths in characters."""

    retention_ms: int = 7 * 86_400_000
    expiry_ms: int = 86_400_000
    max_series: int = 10_000
    max_series_per_metric: int = 5_000
    max_series_per_source: int = 5_000
    max_metrics: int = 1_000
    max_attributes: int = 40
    max_label_length: int = 512
    promoted: frozenset[str] = frozenset({"service.version"})
    dropped: frozenset[str] = frozenset()
    hashed: frozenset[str] = frozenset()
    scope_labels: bool = False
    hides_sessions: bool = False
    source: str = "auto"


class Post(NamedTuple):
    """One request to post: its points, the body that they came in and the token that it came with, empty for none;
    or what a transcript says, and its row."""

    batch: Batch
    body: bytes = b""
    transcript: TranscriptRow | None = None
    is_history: bool = False
    source: str = ""


class Change(NamedTuple):
    """What a commit changed, for the projection; `limited` counts the streams that met a limit, by its setting."""

    commits: int
    series: list[SeriesRow]
    metrics: list[MetricRow]
    totals: dict[str, int]
    targets: list[TargetRow]
    exemplars: dict[int, Exemplar]
    limited: Counter[str]
    usage: UsageChange


class _Origin(msgspec.Struct, frozen=True):
    """What the points of one Metric share, worked out once.

    `scale` is 0 where sums stay as sent. `identity` is the beginning of the streams' keys, `labelled` names the
    resource's part of the labels: a stream whose sender was upgraded feeds another series from then on. A number
    between 0 and `limit` needs no closer look; nothing is below a `limit` of -1. `streams` are those that were found.
    """

    row: MetricRow
    identity: Any
    labelled: bytes
    job: str
    instance: str
    added: tuple[tuple[str, str], ...]
    target: tuple[tuple[str, str], ...]
    scale: int
    limit: float
    source: str
    is_counting: bool
    is_delta: bool
    streams: dict[Attributes, "_Stream"]


class _Stream(msgspec.Struct):
    """A stream as its row has it, the lifetime total that it adds to, and the cell where it belongs in the join."""

    id: int
    series: int
    writer: int
    labelled: bytes
    total: str | None
    cell: UsageCell | None


class _Cycle(msgspec.Struct):
    """The delta identities of one writer and end time, as keys in their order; the first `stored` are on disk."""

    members: dict[bytes, None]
    stored: int


class _Books(msgspec.Struct):
    """What one transaction changed so far. `cycles` are the delta identities by (writer, end time)."""

    series: dict[int, SeriesRow] = {}
    runs: dict[tuple[int, int, int], Run] = {}
    cycles: dict[tuple[int, int], _Cycle] = {}
    requests: set[bytes] = set()
    totals: dict[str, int] = {}
    targets: dict[tuple[str, str], TargetRow] = {}
    metrics: list[MetricRow] = []
    exemplars: dict[int, Exemplar] = {}
    limited: Counter[str] = msgspec.field(default_factory=Counter)
    new_writers: set[int] = set()
    new_in_all: int = 0
    new_series: Counter[int] = msgspec.field(default_factory=Counter)
    new_of_source: Counter[str] = msgspec.field(default_factory=Counter)


class Bookkeeper:
    """Posts groups of requests. `live` tells how many series are shown: of a metric, of a source, and in all;
    `recover` replaces a damaged database, and says whether by nothing at all, to begin anew."""

    def __init__(
        self,
        store: Store,
        settings: LedgerSettings,
        clock_ms: Callable[[], int],
        live: Callable[[int, str], tuple[int, int, int]],
        usage: UsageBooks,
        recover: "Recover",
    ) -> None:
        self._store = store
        self._usage = usage
        self._recover = recover
        self._settings = settings
        self._is_fed = settings.source == "transcripts"
        self._clock_ms = clock_ms
        self._live = live
        self.is_lost = False
        self._must_reopen = self._is_cramped = False
        self.lost = 0
        self._commits = 0
        self._now = self._expired_before = 0
        self._secret = b""
        # Streams find their series anew when a setting that decides about series has changed.
        self._labelling = [
            sorted(settings.dropped), sorted(settings.hashed), settings.scope_labels, settings.max_attributes,
            settings.max_label_length, settings.max_series, settings.max_series_per_metric,
            settings.max_series_per_source,
        ]  # fmt: skip
        self._metrics = 0
        self._books = _Books()
        self._repeats: frozenset[Metric] = frozenset()
        self._clear()

    def _clear(self) -> None:
        self._origins: dict[tuple[str, Metric], _Origin] = {}
        self._streams: dict[bytes, _Stream] = {}
        self._labels_of: dict[tuple[str, AttributeValue], tuple[str, str]] = {}
        self._series: dict[int, SeriesRow] = {}
        self._writers: dict[int, WriterRow] = {}
        self._writer_ids: dict[tuple[str, ...], int] = {}
        self._runs: dict[tuple[int, int, int], Run] = {}
        self._totals: dict[str, int] = {}
        self._targets: dict[tuple[str, str], TargetRow] = {}

    def open(
        self, mark: Mark | None, was_shown: Callable[[MetricRow, SeriesRow], bool]
    ) -> tuple[Snapshot, UsageChange]:
        """Open the state, and go on from the mark if that is ahead of it. Raises StateError.

        `was_shown` tells of a series that is new to the state whether it was served before the state went back.
        """
        self._was_shown = was_shown
        try:
            return self._open(mark)
        except Damaged as damage:
            begins = self._recover(damage)
            self._store.abandon()
        return self._open(mark, may_begin=begins)

    def _open(self, mark: Mark | None, *, may_begin: bool = False) -> tuple[Snapshot, UsageChange]:
        if self._store.open(self._clock_ms(), may_begin=may_begin):
            try:
                self._store.settle()
            except StoreUnavailable:  # what is there can be shown; nothing is acknowledged before it is on disk
                self.is_lost = self._must_reopen = True
        try:
            if mark is not None:
                self.lost = self._store.resume(mark.commits, mark.scrapers, mark.joined, self._clock_ms())
            return self._snapshot()
        except StoreUnavailable as error:
            raise self._store.unusable(error) from error

    def _snapshot(self) -> tuple[Snapshot, UsageChange]:
        snapshot = self._store.snapshot(self._clock_ms() - self._settings.expiry_ms)
        self._clear()
        with self._store.reading():
            usage = self._usage.load()
        self._commits = snapshot.commits
        self._secret = snapshot.secret
        self._metrics = len(snapshot.metrics)
        self._totals = dict(snapshot.totals)
        self._targets = {(row.job, row.instance): row for row in snapshot.targets}
        return snapshot, usage

    @property
    def commits(self) -> int:
        """The number of the last commit."""
        return self._commits

    def lose(self, error: StoreUnavailable) -> None:
        """After a failed transaction: what stands here is worth nothing until `restore` has returned.

        A full disk has rolled back and still reads, so the connection stays: a new one would need space.
        """
        self.forget()
        self._must_reopen |= not error.disk_full

    def forget(self) -> None:
        """After a transaction that was given up: the disk is sound, but what stands here is ahead of it."""
        self.is_lost = True

    def restore(self) -> tuple[Snapshot, UsageChange]:
        """Take the state from the disk again. Raises StoreUnavailable."""
        if self._must_reopen:
            self._store.reopen()
        else:
            self._is_cramped = True
            self._make_room()
        loaded = self._snapshot()
        self.is_lost = self._must_reopen = False
        return loaded

    def _make_room(self) -> None:
        """After the disk was full: what room there is goes to the database first, else the WAL would take all of it
        and could never be emptied."""
        if self._is_cramped:
            self._is_cramped = not self._store.make_room()

    def do(self, work: Callable[[], Any]) -> Any:
        """One transaction of somebody else's making; what it changes is read again."""
        self._make_room()
        with self._store.transaction() as committed:
            result = work()
        self._commits += committed()
        self._writers.clear()
        return result

    def post(self, group: list[Post]) -> tuple[list[Receipt], Change | None]:
        """Post a group of requests in one transaction: a receipt for each, and what the projection must learn."""
        self._make_room()
        self._now = self._clock_ms()
        self._expired_before = self._now - self._settings.expiry_ms
        if max(len(self._streams), len(self._series), len(self._runs), len(self._origins)) > MAX_CACHED:
            totals, targets = self._totals, self._targets
            self._clear()
            self._totals, self._targets = totals, targets
        books = self._books = _Books()
        with self._store.transaction() as committed:
            receipts = [self._post(request) for request in group]
            if self._is_fed:
                self._feed_from_transcripts()
            usage = self._usage.flush(self._commits + 1, self._now)
            for (tool, kind), value in usage.truth.items():
                if tool == claude_code.TOOL and kind in claude_code.JOINED_TOTALS:
                    self._set_total(claude_code.JOINED_TOTALS[kind], value)
            self._write(books)
        if not committed():
            return receipts, None
        self._commits += 1
        change = Change(
            self._commits, list(books.series.values()), books.metrics, books.totals, list(books.targets.values()),
            books.exemplars, books.limited, usage,
        )  # fmt: skip
        return receipts, change

    def _write(self, books: _Books) -> None:
        store = self._store
        store.write_series(books.series.values())
        store.write_runs(books.runs)
        grown = [(key, cycle) for key, cycle in books.cycles.items() if len(cycle.members) > cycle.stored]
        store.write_delta_members((*key, b"".join(cycle.members)) for key, cycle in grown)
        store.write_writers((row.latest, self._now, row.id) for row in self._extend_writers(key for key, _ in grown))
        store.write_totals(books.totals.items())
        store.write_requests(books.requests, self._now)
        for target in books.targets.values():
            store.write_target(target)

    def _extend_writers(self, cycles: Iterable[tuple[int, int]]) -> list[WriterRow]:
        """The writers of some cycles, each with its latest end."""
        extended: dict[int, WriterRow] = {}
        for writer, time in cycles:
            row = self._writers[writer]
            extended[writer] = self._writers[writer] = row._replace(latest=max(row.latest, time))
        return list(extended.values())

    def _post(self, request: Post) -> Receipt:
        # What transcripts told of limits before the first look is not how they stand now.
        points = () if request.is_history else request.batch.points
        refused = list(request.batch.refused)
        metric: Metric | None = None
        origin: _Origin | Drop
        posted: list[tuple[_Origin, _Stream, int, DataPoint]] = []
        needs_hash = False
        for point in points:
            if point.metric is not metric:
                metric = point.metric
                origin = self._origin(metric, request.source)
                if isinstance(origin, _Origin):
                    self._note_target(origin)
            if isinstance(origin, Drop):
                refused.append(Refusal(origin, metric.name))
                continue
            value = point.value
            is_plain = isinstance(value, _NUMBER) and 0 <= value <= origin.limit
            if not is_plain and (reason := _refusal(origin, point)):
                refused.append(Refusal(reason, metric.name))
                continue
            stream = self._stream(origin, point)
            posted.append((origin, stream, stream.series, point))
            if not needs_hash and not (origin.is_counting and origin.is_delta and stream.writer and point.time):
                needs_hash = _needs_body_hash(origin, stream, point)
        if needs_hash and request.transcript is None:
            # Equal bodies of two sources are two.
            body_hash = blake2b(request.body, digest_size=16, key=request.source.encode()).digest()
            if body_hash in self._books.requests or self._store.has_request(body_hash):
                return Receipt(0, len(posted), tuple(refused))
            self._books.requests.add(body_hash)
        if request.transcript is not None:
            self._usage.write_transcript(request.transcript)
        if request.is_history:
            self._usage.load_history(request.batch.usages, self._now)
            return Receipt(len(request.batch.usages), 0, ())
        accepted = duplicate = 0
        is_foreign = request.transcript is None and self._is_fed
        for told in () if is_foreign else request.batch.usages:
            if self._usage.add(told):
                accepted += 1
            else:
                duplicate += 1
        self._repeats = request.batch.repeats
        for origin, stream, series, point in posted:
            stream.series = series  # points of one body may move a stream from series to series
            outcome = self._post_point(origin, stream, point)
            if isinstance(outcome, Drop):
                refused.append(Refusal(outcome, point.metric.name))
            elif outcome:
                accepted += 1
                if point.exemplar is not None:
                    known = self._books.exemplars.get(stream.series, point.exemplar)
                    self._books.exemplars[stream.series] = max(known, point.exemplar, key=lambda e: e.time)
            else:
                duplicate += 1
        return Receipt(accepted, duplicate, tuple(refused))

    def _post_point(self, origin: _Origin, stream: _Stream, point: DataPoint) -> bool | Drop:
        """Count one point: whether it was new, or why it is refused."""
        value = point.value
        if value is None or not origin.is_counting:
            return self._set(origin, stream, point)
        if origin.scale and isinstance(value, _NUMBER):
            value = round(value * origin.scale)
        if not origin.is_delta:
            return self._advance(origin, stream, value, point)
        writer, time = stream.writer, point.time
        if writer and time:
            cycle = self._books.cycles.get((writer, time)) or self._open_cycle(writer, time)
            if isinstance(cycle, Drop):
                return cycle
            identity = delta_identity(stream.id, point)
            if identity in cycle.members:
                return False
            cycle.members[identity] = None
        self._count(origin, stream, value, point)
        return True

    def _count(self, origin: _Origin, stream: _Stream, amount: Value, point: DataPoint) -> None:
        """Add to the series, and to what is joined or shown to XRG."""
        cell = None if self._repeats and point.metric in self._repeats else stream.cell
        if cell is not None and self._is_fed:
            if cell.tool == claude_code.TOOL:  # transcripts feed these
                return
            cell = None
        self._add(origin, stream, amount, point.time)
        if stream.total is not None and isinstance(amount, int) and amount:
            self._set_total(stream.total, self._totals.get(stream.total, 0) + amount)
        if cell is not None and (tokens := amount if isinstance(amount, int) else _whole(amount)):
            time_ms = point.time // 1_000_000 or self._now
            self._usage.add_metric(cell, tokens, time_ms, point.start // 1_000_000 or time_ms)

    def _feed_from_transcripts(self) -> None:
        """With transcripts as the only source, they feed the tool's own families; OTLP stays out of those.

        What a session is worth is one run of its stream. Before its first feed a series of its own may show what OTLP
        told of the session, and stands still until the transcripts are worth more; in one that it shares with others
        only what comes from now on is added.
        """
        for session, model, cell, before in self._usage.touched():
            if session.tool != claude_code.TOOL:
                continue
            known = {told[:2]: told[2] for told in claude_code.transcript_series(session.name, model, before)}
            for metric, attributes, worth in claude_code.transcript_series(session.name, model, cell):
                origin = self._origin(metric)
                if isinstance(origin, Drop):
                    continue
                stream = self._stream(origin, DataPoint(metric, attributes, 0, 0, worth))
                key = (stream.id, FED, 0)
                run = self._runs.get(key) or self._store.run(stream.id, FED)
                if run is None:
                    row = self._series_row(stream.series)
                    is_own = any(name == "session.id" for name, _ in row.labels)
                    run = Run(row.value or 0 if is_own else known.get((metric, attributes), 0), 0, 0)
                amount, after = advance(run, worth, 0)
                self._books.runs[key] = self._runs[key] = after
                if amount:
                    self._add(origin, stream, amount, 0)

    # --- what a point changes ---

    def _set(self, origin: _Origin, stream: _Stream, point: DataPoint) -> bool:
        """The later value wins. A counter that has ended keeps what it counted."""
        row = self._series_row(stream.series)
        if point.time < row.time or (point.value is None and origin.is_counting):
            return False
        is_news = point.time > row.time or point.value != row.value
        self._books.series[row.id] = self._series[row.id] = replace(
            row, value=point.value, time=point.time, seen=self._now
        )
        return is_news

    def _add(self, origin: _Origin, stream: _Stream, amount: Value, time: int) -> None:
        row = self._series.get(stream.series) or self._series_row(stream.series)
        has_left = row.expires and row.seen < self._expired_before
        if has_left and not self._was_shown(origin.row, row):
            row = self._return(origin, stream, row)
        total = add(row.value or 0, amount)
        if isinstance(total, int) and not -MAX_INTEGER <= total <= MAX_INTEGER:
            total = MAX_INTEGER if total > 0 else -MAX_INTEGER
        latest = max(row.time, time)
        self._books.series[row.id] = self._series[row.id] = replace(row, value=total, time=latest, seen=self._now)

    def _return(self, origin: _Origin, stream: _Stream, row: SeriesRow) -> SeriesRow:
        """A series that had left comes back as a new counter; above a limit, its stream feeds the overflow series."""
        setting = self._limit_met(origin)
        if setting is None:
            self._count_new(origin.row.id, origin.source)
            row = replace(row, base=row.value or 0, born=self._commits + 1, birth=self._now)
            return self._store.restart_series(row)
        series = self._overflow_of(origin, setting)
        self._store.move_stream(stream.id, series, stream.labelled)
        stream.series = series
        return self._series_row(series)

    def _set_total(self, key: str, value: int) -> None:
        """Totals never fall."""
        if value > MAX_INTEGER:
            value = MAX_INTEGER
        if value > self._totals.get(key, 0):
            self._totals[key] = self._books.totals[key] = value

    def _advance(self, origin: _Origin, stream: _Stream, value: Value, point: DataPoint) -> bool:
        key, run = self._run_of(stream.id, value, point)
        amount, after = advance(run, value, point.time)
        if after == run:
            return False
        self._books.runs[key] = self._runs[key] = after
        self._count(origin, stream, amount, point)
        return True

    def _run_of(self, stream: int, value: Value, point: DataPoint) -> tuple[tuple[int, int, int], Run | None]:
        """The key of the run that a cumulative point belongs to, and the run if there is one already."""
        if point.start:
            key = (stream, point.start, 0)
            return key, self._runs.get(key) or self._store.run(stream, point.start)
        # Without a start time the runs decide; the store has to know those of this transaction.
        self._store.write_runs({key: run for key, run in self._books.runs.items() if key[0] == stream})
        found = self._store.run_at(stream, point.time)
        if found is None or (found[3] and begins_run(found[2], value, point.time)):
            return (stream, point.time, 1), None
        start, inferred, run, _ = found
        return (stream, start, inferred), run

    def _open_cycle(self, writer: int, time: int) -> _Cycle | Drop:
        """The delta identities of a writer and an end time; TOO_OLD where they were forgotten."""
        row = self._writers.get(writer)
        if row is None:
            row = self._writers[writer] = self._store.writer_by_id(writer)
        if time <= row.forgotten:
            return Drop.TOO_OLD
        # Beyond the writer's latest end nothing can be on disk.
        stored = self._store.delta_members(writer, time) if time <= row.latest else b""
        members = dict.fromkeys(stored[at : at + IDENTITY_BYTES] for at in range(0, len(stored), IDENTITY_BYTES))
        cycle = self._books.cycles[writer, time] = _Cycle(members, len(members))
        return cycle

    # --- lookups ---

    def _origin(self, metric: Metric, source: str = "") -> _Origin | Drop:
        known = self._origins.get((source, metric))
        if known is not None:
            return known
        origin = self._make_origin(metric, source)
        if not isinstance(origin, Drop) and _text_length(metric) <= MAX_CACHED_TEXT:
            self._origins[source, metric] = origin
        return origin

    def _make_origin(self, metric: Metric, source: str) -> _Origin | Drop:
        resource = metric.resource
        namespace, name = resource.get("service.namespace"), resource.get("service.name")
        instance = resource.get("service.instance.id")
        shown = dict(self._shown(resource.attributes).values())
        parts = [shown[key] for key in ("service.namespace", "service.name") if shown.get(key)]
        job, shown_instance = self._cut("/".join(parts)), shown.get("service.instance.id", "")
        quantity = known.quantity(metric)
        unit = quantity.unit if quantity else metric.unit
        scale = quantity.scale if quantity else 0
        shown_name, unit = self._cut(metric.name), unit[:MAX_UNIT]
        row = self._store.metric(shown_name, metric.kind.value, unit)
        if row is None:
            if self._metrics >= self._settings.max_metrics:
                self._books.limited["limits.metrics"] += 1
                return Drop.OVERFLOW
            self._metrics += 1
            description = metric.description[:MAX_DESCRIPTION]
            row = self._store.add_metric(MetricRow(0, shown_name, metric.kind.value, unit, scale, description))
        self._books.metrics.append(row)
        promoted = self._settings.promoted
        target = tuple((key, text) for key, text in shown.items() if key not in _IDENTIFYING)
        added = [(key, text) for key, text in shown.items() if key in promoted]
        if self._settings.scope_labels:
            scope = metric.scope
            added += [("otel_scope_name", self._cut(scope.name)), ("otel_scope_version", self._cut(scope.version))]
        named = (metric.name, metric.kind.value, metric.scope.name, namespace, name, instance)
        # Two sources never write one stream, whatever they call themselves.
        identity = blake2b(msgspec.msgpack.encode(named), digest_size=16, key=source.encode())
        labelled = _digest((row.id, job, shown_instance, added, self._labelling))
        is_delta = metric.temporality is Temporality.DELTA
        limit = sys.float_info.max
        if quantity:
            limit = quantity.limit if is_delta else quantity.limit * CUMULATIVE_FACTOR
        if metric.temporality is Temporality.UNSPECIFIED:
            limit = -1.0
        return _Origin(
            row, identity, labelled, job, shown_instance, tuple(added), target, scale, limit, source,
            _is_counting(metric), is_delta, {},
        )  # fmt: skip

    def _note_target(self, origin: _Origin) -> None:
        """Remember the resource attributes of a job and instance, as the last export had them."""
        key = (origin.job, origin.instance)
        known = self._targets.get(key)
        if not origin.target or not any(key) or (known is not None and known.attributes == origin.target):
            return
        if known is None and len(self._targets) >= MAX_TARGETS:
            return
        self._targets[key] = self._books.targets[key] = TargetRow(*key, origin.target, self._now)

    def _stream(self, origin: _Origin, point: DataPoint) -> _Stream:
        stream = origin.streams.get(point.attributes)
        if stream is None:
            stream = self._find_stream(origin, point)
        if stream.labelled != origin.labelled:
            stream.series, stream.labelled = self._find_series(origin, point.attributes), origin.labelled
            self._store.move_stream(stream.id, stream.series, stream.labelled)
        return stream

    def _find_stream(self, origin: _Origin, point: DataPoint) -> _Stream:
        hasher = origin.identity.copy()
        encoded = msgspec.msgpack.encode(point.attributes)
        hasher.update(encoded)
        key: bytes = hasher.digest()
        stream = self._streams.get(key)
        if stream is None:
            attributes = dict(point.attributes)
            whose = _whose(origin, text_in(attributes, "session.id"))
            # What nobody has written until now is hardly there; where it is nevertheless, as after other settings,
            # adding it finds that out.
            is_new = self._writer_ids.get(whose) in self._books.new_writers
            row = None if is_new else self._store.stream(key)
            if row is None:
                row = self._add_stream(key, origin, point.attributes, whose, is_new=is_new)
            total = claude_code.total_key(point.metric.name, attributes) if origin.scale else None
            cell = known.usage_cell(point.metric, attributes)
            stream = self._streams[key] = _Stream(*row, total, cell)
        if len(encoded) <= MAX_CACHED_ATTRIBUTES:
            origin.streams[point.attributes] = stream
        return stream

    def _add_stream(
        self, key: bytes, origin: _Origin, attributes: Attributes, whose: tuple[str, ...], *, is_new: bool
    ) -> StreamRow:
        writer = (self._writer_ids.get(whose) or self._writer_id(whose)) if whose else 0
        series = self._find_series(origin, attributes, is_new=is_new)
        return self._store.add_stream(key, series, writer, origin.labelled)

    def _writer_id(self, whose: tuple[str, ...]) -> int:
        """The writer with this identity, made if there is none."""
        row, is_new = self._store.writer(_digest(whose), self._now)
        self._writers.setdefault(row.id, row)
        self._writer_ids[whose] = row.id
        if is_new:
            self._books.new_writers.add(row.id)
        return row.id

    def _find_series(self, origin: _Origin, attributes: Attributes, *, is_new: bool = False) -> int:
        """The series of these labels, made if there is none; above a limit, the metric's overflow series."""
        setting = self._limit_met(origin)
        labels = self._labels(origin, attributes)
        return self._series_of(origin, origin.job, origin.instance, labels, setting, is_new=is_new)

    def _overflow_of(self, origin: _Origin, setting: str) -> int:
        """The series that takes what is above the limit of a setting: one a metric and source."""
        self._books.limited[setting] += 1
        return self._series_of(origin, "", "", tuple(sorted([*_label_of(origin.source), *OVERFLOW])))

    def _limit_met(self, origin: _Origin) -> str | None:
        """The setting that forbids one more series of a metric and source; None when there is room."""
        metric, source = origin.row.id, origin.source
        of_metric, of_source, in_all = self._live(metric, source)
        books, settings = self._books, self._settings
        if in_all + books.new_in_all >= settings.max_series:
            return "limits.series"
        if of_metric + books.new_series[metric] >= settings.max_series_per_metric:
            return "limits.series_per_metric"
        if source and of_source + books.new_of_source[source] >= settings.max_series_per_source:
            return "limits.series_per_source"
        return None

    def _count_new(self, metric: int, source: str) -> None:
        """One more series is shown than before this transaction."""
        self._books.new_in_all += 1
        self._books.new_series[metric] += 1
        self._books.new_of_source[source] += 1

    def _series_of(
        self, origin: _Origin, job: str, instance: str, labels: tuple[tuple[str, str], ...], setting: str | None = None,
        *, is_new: bool = False,
    ) -> int:  # fmt: skip
        """The series of these labels, made if there is none and no `setting` forbids it; `is_new` when there is
        hardly one."""
        metric = origin.row
        key = _digest((metric.id, job, instance, labels))
        row = None if is_new and setting is None else self._store.series(key)
        if row is None and setting is not None:
            return self._overflow_of(origin, setting)
        if row is None:
            row = self._add_series(key, origin, job, instance, labels)
        self._series.setdefault(row.id, row)
        return row.id

    def _add_series(
        self, key: bytes, origin: _Origin, job: str, instance: str, labels: tuple[tuple[str, str], ...]
    ) -> SeriesRow:  # fmt: skip
        metric, now = origin.row, self._now
        expires = bool(instance) or any(starmap(known.is_of_a_session, labels))
        new = SeriesRow(0, metric.id, job, instance, labels, expires, 0, self._commits + 1, now, 0, 0, now)
        if self._was_shown(metric, new):
            new = replace(new, born=0)
        row, is_new = self._store.add_series(key, new)
        if is_new:
            self._count_new(metric.id, origin.source)
            self._books.series[row.id] = row
        return row

    def _labels(self, origin: _Origin, attributes: Attributes) -> tuple[tuple[str, str], ...]:
        """The labels of a point: its own attributes, and what its resource and scope add where they have none."""
        labels = self._shown(attributes)
        for pair in origin.added:
            labels.setdefault(pair[0], pair)
        return tuple(sorted([*labels.values(), *_label_of(origin.source)]))

    def _shown(self, attributes: Attributes) -> dict[str, tuple[str, str]]:
        """What of some attributes may be shown, in OTLP's spelling, and how long; by its name."""
        most = self._settings.max_attributes
        shown: dict[str, tuple[str, str]] = {}
        for attribute in attributes:
            label = self._labels_of.get(attribute)
            if label is None and self._is_hidden(attribute):
                continue
            if len(shown) >= most:
                self._books.limited["limits.attributes"] += 1
                break
            if label is None:
                label = self._label(attribute)
            shown[label[0]] = label
        return shown

    def _is_hidden(self, attribute: tuple[str, AttributeValue]) -> bool:
        key, value = attribute
        return key in self._settings.dropped or key == SOURCE or _is_redacted(value)

    def _label(self, attribute: tuple[str, AttributeValue]) -> tuple[str, str]:
        """An attribute as it is shown, which the series of a session share; what was cut is counted each time."""
        key, value = attribute
        text = attribute_text(value)
        if key in self._settings.hashed:
            text = blake2b(text.encode(), digest_size=8, key=self._secret).hexdigest()
        label = (self._cut(key), self._cut(text))
        if label == attribute:
            label = attribute  # one object less
        if label == (key, text):
            if len(self._labels_of) >= MAX_LABELS:
                self._labels_of.clear()
            self._labels_of[attribute] = label
        return label

    def _cut(self, text: str) -> str:
        """Text of at most the limit; what was longer ends in a digest, so that different texts stay different."""
        most = self._settings.max_label_length
        if len(text) <= most:
            return text
        self._books.limited["limits.label_length"] += 1
        return f"{text[: most - 17]}~{blake2b(text.encode(), digest_size=8).hexdigest()}"

    def _series_row(self, series: int) -> SeriesRow:
        row = self._series.get(series)
        if row is None:
            row = self._series[series] = self._store.series_by_id(series)
        return row


def _whose(origin: _Origin, session: str) -> tuple[str, ...]:
    """Who writes a stream: a session or a service instance; empty for nobody."""
    if not session and not origin.instance:
        return ()
    return origin.job, origin.instance, session, *([origin.source] if origin.source else [])


def source_of(row: SeriesRow) -> str:
    """The token that a series came with; empty for none."""
    return next((text for key, text in row.labels if key == SOURCE), "")


def _label_of(source: str) -> list[tuple[str, str]]:
    return [(SOURCE, source)] if source else []


def _text_length(metric: Metric) -> int:
    """About how much text a metric holds on to."""
    return len(metric.name) + len(metric.description) + len(metric.scope.name) + _length(metric.resource.attributes)


def _length(attributes: Attributes) -> int:
    return sum(len(key) + len(attribute_text(value)) for key, value in attributes)


def _refusal(origin: _Origin, point: DataPoint) -> Drop | None:
    """Why a point must not be counted, as far as the point itself tells."""
    value = point.value
    if value is None:
        return None
    if origin.scale and isinstance(value, _NUMBER) and math.isfinite(value) and value > origin.limit >= 0:
        return Drop.IMPLAUSIBLE
    if isinstance(value, Histogram | ExponentialHistogram) and (value.sum or 0) > MAX_JOINED:
        most = MAX_JOINED if point.metric.temporality is Temporality.DELTA else MAX_JOINED * CUMULATIVE_FACTOR
        if (value.sum or 0) > most and known.usage_cell(point.metric, dict(point.attributes)) is not None:
            return Drop.IMPLAUSIBLE
    return refusal(point.metric, value)


def _whole(amount: Value) -> int:
    """An amount of tokens: a histogram's is its sum."""
    match amount:
        case int():
            return amount
        case Histogram() | ExponentialHistogram() if amount.sum is not None:
            return round(min(amount.sum, MAX_INTEGER))
        case float():
            return round(min(amount, MAX_INTEGER))
        case _:
            return 0


def _needs_body_hash(origin: _Origin, stream: _Stream, point: DataPoint) -> bool:
    """Whether nothing but the body's hash tells a repeat of this point from a second one."""
    if not origin.is_counting:
        return True
    return not (stream.writer and point.time if origin.is_delta else point.start)


def _is_counting(metric: Metric) -> bool:
    """Whether the values of a metric are summed up; the others replace each other."""
    return metric.kind not in (Kind.GAUGE, Kind.SUMMARY) and not (
        metric.kind is Kind.UPDOWN and metric.temporality is Temporality.CUMULATIVE
    )


def _digest(value: Any) -> bytes:
    """16 bytes that name a value; msgpack keeps the parts apart."""
    return blake2b(msgspec.msgpack.encode(value), digest_size=16).digest()


def _is_redacted(value: str | Typed) -> bool:
    return isinstance(value, Typed) and value.type == REDACTED
