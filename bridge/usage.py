"""Requests and metrics of AI tools, joined: the part of the books that knows of sessions, models and cost.

Law: what is served never falls; what is stored is the truth and may. A row that a source tells of is judged
together with the few rows that it may be the same request as; what the judgement changes goes to the row's cell,
from there to the model's truth, and a served counter is the larger of what it was and of the truth. All of it
happens in the transaction of whoever calls; after a failed one, `load` reads everything again.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from hashlib import blake2b
from typing import NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from bridge.join import (
    KINDS,
    Cell,
    Matching,
    Observed,
    Tokens,
    Verdict,
    Worth,
    add_cells,
    add_worth,
    beyond,
    has_metrics,
    has_metrics_alone,
    request_cell,
    settle,
    told_twice,
    worth,
)
from bridge.model import CostSource, Source, TranscriptRow, Usage, UsageCell
from bridge.otlp import redacted_text
from bridge.pricing import provider_of
from bridge.store import Store
from bridge.usage_store import (
    HISTORY,
    LOADING,
    MAX_INTEGER,
    MAX_QUARTER,
    METRICS,
    QUARTER_MS,
    REQUESTS,
    Columns,
    ModelRow,
    RollupKey,
    ServedRow,
    SessionRow,
    Sums,
    TruthRow,
    UsageRow,
    UsageStore,
)

MAX_TOOLS = 50
"""Tools, known ones and applications; further ones are counted as `other`."""
OTHER = "other"
MAX_MODELS = 200
"""Models of all tools together; what comes under further names is counted as `other`."""
MAX_CACHED = 10_000
MANY_ALIKE = 32
"""Rows that may be the same requests, from which on they are kept in memory, so that not all are judged for each."""
MAX_KEPT = 50_000
RECENT_MS = 600_000
"""History that is this new may still be told of by an event that was on its way at the first look."""

OWN_PROVIDER = "anthropic"
"""Who makes the models of the tools whose metrics tell of cost."""

ESTIMATED_TOKENS = 1_000
"""Tokens that a metric's are priced by: a sum of many requests must not look like a long one."""

Price = Callable[[Usage], int | None]
Normalise = Callable[[str], str]


_TOLD, _PRICED, _UNPRICED = (source.value for source in (CostSource.TOOL, CostSource.PRICE, CostSource.UNPRICED))


def no_price(usage: Usage) -> int | None:
    """The price table of those who have none."""
    del usage
    return None


class UsageChange(NamedTuple):
    """What a transaction changed for those who look: served counters, models, the truth by tool and kind, and the
    tokens of models that nobody knows the cost of."""

    served: list[ServedRow]
    models: list[ModelRow]
    truth: dict[tuple[str, str], int]
    unpriced: dict[int, int]


class Survey(NamedTuple):
    """How the sources agree: tokens as requests and as metrics add up to them, and sessions that may be one under two
    ids, since one source alone has seen each."""

    requests: int
    metrics: int
    conflicts: int


class _Report(Struct):
    """What points reported of one cell and quarter in a transaction: amounts by kind, and the earliest times of end
    and start."""

    amounts: dict[str, int]
    time_ms: int
    since_ms: int


class UsageBooks:
    """Adds usage in the transaction of its caller. `price` gives nano-dollars or None, `normalise` a model's name.

    `reporting` are the tools whose metrics tell of cost; what the metrics of others are worth is estimated.
    `followed` are those whose transcripts are read, all without it; of others one source alone tells of each request.
    `asked` are those whose transcripts know which model was asked, and events which answered.
    `hides_sessions`: requests' sessions are stored as what the metrics' decoder makes of a denied attribute.
    """

    def __init__(
        self,
        store: Store,
        price: Price,
        normalise: Normalise,
        reporting: Set[str],
        *,
        followed: Set[str] | None = None,
        asked: Set[str] = frozenset(),
        hides_sessions: bool = False,
    ) -> None:
        self._store = UsageStore(store)
        self._price = price
        self._normalise = normalise
        self._reporting = reporting
        self._followed = followed
        self._asked = asked
        self._hides_sessions = hides_sessions
        self._recent: dict[bytes, None] = {}
        self._models: dict[tuple[str, str], ModelRow] = {}
        self._tools: dict[int, str] = {}
        self._foreign: set[int] = set()
        self._tool_names: set[str] = set()
        self._truths: dict[int, TruthRow] = {}
        self._served: dict[tuple[int, str], ServedRow] = {}
        self._newest_history = 0
        self._clear()

    def _clear(self) -> None:
        self._sessions: dict[tuple[str, str], SessionRow] = {}
        self._labels: dict[str, int] = {}
        self._model_ids: dict[tuple[str, str], int] = {}
        self._matchings: dict[tuple[int, ...], Matching] = {}
        self._cells: dict[tuple[int, int], Cell] = {}
        self._values_of: dict[tuple[int, int], tuple[Cell, tuple[Worth, Worth]]] = {}
        self._mixed: dict[int, bool] = {}
        self._begin()

    def _begin(self) -> None:
        self._reports: dict[tuple[str, str, str, int], _Report] = {}
        self._dirty_cells: set[tuple[int, int]] = set()
        self._dirty_truths: set[int] = set()
        self._rollups: dict[RollupKey, list[int]] = {}
        self._beyond: dict[tuple[int, int], dict[int, Worth]] = {}

    def load(self) -> UsageChange:
        """Read what is kept in memory; all that is served."""
        self._clear()
        self._models = {(row.tool, row.name): row for row in self._store.models()}
        self._truths = self._store.truths()
        self._served = {(row.model, row.kind): row for row in self._store.served()}
        self._tools = {row.id: row.tool for row in self._models.values()}
        self._foreign = {row.id for row in self._models.values() if self._is_foreign(row)}
        self._tool_names = set(self._tools.values()).union(self._followed or (), self._reporting)
        self._newest_history = self._store.newest_history()
        unpriced = {model: self._total(model).unpriced for model in self._truths}
        return UsageChange(list(self._served.values()), list(self._models.values()), {}, unpriced)

    def survey(self) -> Survey:
        """How the sources agree, over all that is kept."""
        requests, metrics = self._store.sum_cells()
        return Survey(requests, metrics, min(self._store.count_sessions()))

    # --- metrics ---

    def add_metric(self, cell: UsageCell, amount: int, time_ms: int, since_ms: int) -> None:
        """Tokens, or nano-dollars, that a metric reported at a time; it counts `since` (Unix ms).

        What is not estimated is added up until something depends on it: an export tells of one cell many times.
        """
        if cell.tool not in self._reporting:
            delta = self._estimated(_reported({cell.kind: amount}), cell, amount, time_ms)
            self._add_reported(cell.tool, cell.session, cell.model, delta, time_ms, since_ms)
            return
        tool, session, model, kind = cell
        key = (tool, session, model, time_ms // QUARTER_MS)
        report = self._reports.get(key)
        if report is None:
            self._reports[key] = _Report({kind: amount}, time_ms, since_ms)
            return
        report.amounts[kind] = report.amounts.get(kind, 0) + amount
        if time_ms < report.time_ms:
            report.time_ms = time_ms
        if since_ms < report.since_ms:
            report.since_ms = since_ms

    def _book_reports(self) -> None:
        """Book what metrics reported."""
        if not self._reports:
            return
        reports, self._reports = self._reports, {}
        for (tool, session, model, _), report in reports.items():
            self._add_reported(tool, session, model, _reported(report.amounts), report.time_ms, report.since_ms)

    def _add_reported(self, tool: str, session: str, model: str, delta: Cell, time_ms: int, since_ms: int) -> None:
        self._add_to_cell(self._session(tool, session), self._model(tool, model), delta, time_ms)
        self._note_since(self._session(tool, session), since_ms)

    def _estimated(self, delta: Cell, cell: UsageCell, amount: int, time_ms: int) -> Cell:
        """The delta with what the table says that its tokens cost."""
        match cell.kind:
            case "prompt":
                price = self._price_of(cell, "input", time_ms)
            case "cached" | "written":  # the prompt's sum holds it at the price of input
                own = "cache_read" if cell.kind == "cached" else "cache_write"
                part, new = (self._price_of(cell, kind, time_ms) for kind in (own, "input"))
                return delta if part is None or new is None else _costing(delta, amount, part - new)
            case kind:
                price = self._price_of(cell, kind, time_ms)
        return delta._replace(metrics_unpriced=amount) if price is None else _costing(delta, amount, price)

    def _price_of(self, cell: UsageCell, kind: str, time_ms: int) -> int | None:
        counts = _of_kind(kind, ESTIMATED_TOKENS)
        return self._price(
            Usage(cell.tool, Source.EVENT, b"", cell.session, cell.model, time_ms, *counts[:3], counts[3], 0)
        )

    def _note_since(self, session: SessionRow, since_ms: int) -> None:
        if 0 < since_ms < session.since or not session.since:
            session = session._replace(since=since_ms)
            self._write_session(session)
            if since_ms <= self._newest_history:
                self._cover(session)

    def _cover(self, session: SessionRow) -> None:
        """Note which requests of history the metrics of a session have counted as well."""
        for model, covered in self._store.covered(session).items():
            known = self._cell(session.id, model)
            found = Cell(covered=covered.tokens, covered_cost=covered.cost, covered_unpriced=covered.unpriced)
            old = Cell(covered=known.covered, covered_cost=known.covered_cost, covered_unpriced=known.covered_unpriced)
            self._add_to_cell(session, model, add_cells(found, old, -1), session.since)

    # --- requests ---

    def add(self, usage: Usage) -> bool:
        """One request as one source tells of it; whether that was news."""
        self._book_reports()
        for named in self._by_known_names((usage,)):
            return self._add(named)
        return False

    def _add(self, usage: Usage) -> bool:
        candidate = self._row(usage, is_history=False)
        known = self._store.by_key(candidate.key)
        if known is None:
            if self._store.is_forgotten(candidate.key) or candidate.request in self._recent:
                return False
            candidate = self._without_parts(usage, candidate)
            added = self._store.add(candidate._replace(is_counted=0))
            if usage.place is not None:
                self._store.note_place(added, usage.place)
            self._judge(added, None)
            self._take_from_whole(usage, added.cost or 0)
            return True
        # An event is told of once, but for the span that knows more than the event in it.
        is_repeat = usage.source is Source.EVENT and candidate.revision == known.revision
        if is_repeat or _rank(candidate) <= _rank(known):
            return False
        changed = candidate._replace(id=known.id, is_history=known.is_history, is_counted=known.is_counted)
        self._store.write([changed])
        if usage.place is not None:
            self._store.note_place(changed, usage.place)
        self._judge(changed, known)
        self._take_from_whole(usage, (changed.cost or 0) - (known.cost or 0))
        return True

    def _without_parts(self, usage: Usage, row: UsageRow) -> UsageRow:
        """An event's row without the cost of requests that are told of beside it."""
        if usage.source != Source.EVENT or row.cost is None or row.request is None or usage.tool not in self._reporting:
            return row
        parts = self._store.by_request(_part_key(usage.request_id))
        return row._replace(cost=max(0, row.cost - sum(part.cost or 0 for part in parts))) if parts else row

    def _take_from_whole(self, usage: Usage, cost: int) -> None:
        """Take the cost of a part out of that of the request which an event has told of."""
        if not usage.part_of or not cost:
            return
        for row in self._store.by_request(_request_key(usage.part_of)):
            if row.source == Source.EVENT and row.cost is not None:
                changed = row._replace(cost=max(0, row.cost - cost))
                self._store.write([changed])
                self._judge(changed, row)

    def load_history(self, usages: Sequence[Usage], now: int) -> None:
        """Requests of before the first look, in bulk: stored for the reports, never served."""
        named = self._by_known_names(usages)
        self._recent |= dict.fromkeys(
            _request_key(usage.request_id) for usage in named if usage.time_ms > now - RECENT_MS and usage.request_id
        )
        self._store.load_history([self._columns(usage, is_history=True) for usage in named])

    def _by_known_names(self, usages: Sequence[Usage]) -> Sequence[Usage]:
        """Requests of one tool under the keys that they have rows by; without those known by a name whose row is
        another's or gone. All names are remembered."""
        if not usages or not usages[0].twins:
            return usages
        known = self._store.known_keys({name for usage in usages for name in (usage.key, *usage.twins)})
        kept: list[Usage] = []
        names: set[bytes] = set()
        for usage in usages:
            found = [name for name in (usage.key, *usage.twins) if name in known]
            key = next((name for name in found if known[name]), None if found else usage.key)
            names |= {*usage.names} if key == usage.key else {usage.key, *usage.names}
            if key is not None:
                kept.append(usage if key == usage.key else replace(usage, key=key))
                known[key] = True
            known.update((name, False) for name in (usage.key, *usage.names) if name not in known)
        self._store.remember(names)
        return kept

    def finish_history(self) -> None:
        """All history is loaded."""
        self._store.finish_history()
        self._store.finish_roots()
        self._sessions.clear()
        self._newest_history = self._store.newest_history()
        for session in self._store.sessions_since(self._newest_history):
            self._cover(session)
        self._write_sums()
        self._begin()

    # --- transcripts ---

    def roots(self) -> dict[str, bool]:
        """The roots that were looked at, and whether their history is read."""
        return self._store.roots()

    def add_root(self, path: str, rows: Iterable[TranscriptRow]) -> list[TranscriptRow]:
        """Remember a first look: what stands in `rows` is history."""
        written = [self._store.write_transcript(row) for row in rows]
        self._store.add_root(path, looked=not any(row.history_end for row in written))
        return written

    def transcripts(self) -> list[TranscriptRow]:
        return self._store.transcripts()

    def write_transcript(self, row: TranscriptRow) -> TranscriptRow:
        return self._store.write_transcript(row)

    def forget_rows(self, before: int, most: int) -> int:
        """Delete old rows; their keys and sums stay. The number of rows deleted."""
        self._matchings.clear()
        return self._store.forget_rows(before, most)

    def _row(self, usage: Usage, *, is_history: bool) -> UsageRow:
        return UsageRow(0, *self._columns(usage, is_history=is_history))

    def _columns(self, usage: Usage, *, is_history: bool) -> Columns:
        """The row of a request without its id: of history there are too many to make more of each than that, or to ask
        a method for what is known."""
        tool, name, project, user = usage.tool, usage.session, usage.project, usage.user
        cost, cost_source = usage.cost, _TOLD
        if cost is None:
            cost = self._price(usage)
            cost_source = _UNPRICED if cost is None else _PRICED
        if cost is not None and cost > MAX_INTEGER:
            cost = MAX_INTEGER
        if self._hides_sessions and name:
            name = redacted_text(name)
        session = self._sessions.get((tool, name)) or self._session(tool, name)
        model = self._model_ids.get((tool, usage.model)) or self._model(tool, usage.model)
        label = self._labels.get(project) or self._label(project)
        if label and session.project is None and not is_history and not self._hides_sessions:
            self._write_session(session._replace(project=label))
        request = _request_key(usage.request_id) if usage.request_id else None
        if usage.part_of:
            request = _part_key(usage.part_of)
        key = usage.message + usage.key[:8] if usage.message else usage.key
        # Flags and the source as plain integers: SQLite's module looks for an adapter of any other type.
        return (
            key, int(usage.source), session.id, model, usage.time_ms, usage.input,
            usage.output, usage.cache_read, usage.cache_write_5m, usage.cache_write_1h, request, usage.order,
            1 if usage.is_sidechain else 0, 1 if is_history else 0, 1, usage.output, cost, cost_source,
            usage.duration_ms, label, self._label(user) if user else None, usage.revision,
        )  # fmt: skip

    def _judge(self, row: UsageRow, before: UsageRow | None) -> None:
        """Judge all rows anew that a changed row may be the same request as, and book the differences."""
        states: dict[int, UsageRow] = {row.id: row}
        if row.is_history:
            if row.is_history != LOADING:
                self._book(before, row)
            return
        seeds = [row, *([before] if before is not None else []), *self._relatives(row, before)]
        groups: dict[tuple[int, ...], list[UsageRow]] = {}
        known: dict[tuple[int, ...], list[UsageRow]] = {}
        for seed in seeds:
            if self._group_key(seed) in self._matchings:
                known.setdefault(self._group_key(seed), []).append(seed)
            elif not self._may_pair(seed):
                if seed is before:
                    continue  # what it was before concerns no other row
                groups.setdefault((seed.id,), [seed])
            elif self._group_key(seed) not in groups:
                groups[self._group_key(seed)] = self._group(seed)
        olds = {found.id: found for members in groups.values() for found in members}
        olds[row.id] = before if before is not None else row
        for key, members in groups.items():
            matching = Matching(self._observed(member) for member in members)
            verdicts = matching.news()
            for member in members:
                states[member.id] = _judged(states.get(member.id, member), verdicts[member.id])
            if len(members) >= MANY_ALIKE:
                self._keep(key, matching)
        for key, members in known.items():
            verdicts = self._judged_again(key, members, row)
            for member in (row, *self._store.by_ids(verdicts.keys() - {row.id})):
                if member.id in verdicts:
                    olds.setdefault(member.id, member)
                    states[member.id] = _judged(states.get(member.id, member), verdicts[member.id])
        changed = [state for state in states.values() if state != olds[state.id] or state.id == row.id]
        self._store.write(changed)
        for state in changed:
            is_new = state.id == row.id and before is None
            self._book(None if is_new else olds[state.id], state)

    def _judged_again(self, key: tuple[int, ...], members: Sequence[UsageRow], row: UsageRow) -> dict[int, Verdict]:
        """What changes in a group that is kept, by some of its members or by `row`, which may have left it."""
        matching = self._matchings.pop(key)
        for member in members:
            if member.id != row.id:
                matching.put(self._observed(member))
        if self._group_key(row) == key:
            matching.put(self._observed(row))
        else:
            matching.remove(row.id)
        self._keep(key, matching)
        return matching.news()

    def _keep(self, key: tuple[int, ...], matching: Matching) -> None:
        """Keep a group in memory, and no more than MAX_KEPT rows of others."""
        self._matchings[key] = matching
        while len(self._matchings) > 1 and sum(map(len, self._matchings.values())) > MAX_KEPT:
            del self._matchings[next(iter(self._matchings))]

    def _group_key(self, row: UsageRow) -> tuple[int, ...]:
        model = 0 if self._tools[row.model] in self._asked else row.model
        return row.session, model, row.input, row.cache_read, row.cache_write_5m + row.cache_write_1h

    def _group(self, row: UsageRow) -> list[UsageRow]:
        """The rows that a row may be the same request as; of any model where transcripts do not know which answered."""
        tool = self._tools[row.model]
        if tool not in self._asked:
            return self._store.group(row)
        models = [model.id for model in self._models.values() if model.tool == tool]
        return [found for model in models for found in self._store.group(row._replace(model=model))]

    def _is_united(self, row: UsageRow) -> bool:
        """Whether several sources tell of a row's tool."""
        return self._followed is None or self._tools[row.model] in self._followed

    def _may_pair(self, row: UsageRow) -> bool:
        """Whether a row may be the same request as one of another source that has another name or none."""
        return self._is_united(row) and (self._tools[row.model] in self._asked or self._store.has_counterpart(row))

    def _relatives(self, row: UsageRow, before: UsageRow | None) -> list[UsageRow]:
        """Rows whose judgement depends on this one: of the same request id, or side-chain copies of its response; or
        spans that it tells of in more detail."""
        if not self._is_united(row):
            return self._store.told_by(row.id)
        requests = {state.request for state in (row, before) if state is not None and state.request}
        relatives = [found for request in requests for found in self._store.by_request(request)]
        if row.source == Source.TRANSCRIPT and any(_is_original(state) for state in (row, before)):
            relatives += self._store.copies(row.key[:8])
        return [found for found in relatives if found.id != row.id]

    def _observed(self, row: UsageRow) -> Observed:
        if not self._is_united(row):
            is_retold = self._store.is_retold(row.id)
            return Observed(row.id, row.key, Source(row.source), row.output, False, False, is_retold)
        partners = self._store.by_request(row.request) if row.request else []
        is_copy = bool(row.is_sidechain) and self._store.has_original(row.key[:8])
        return Observed(
            row.id, row.key, Source(row.source), row.output, row.request is not None,
            any(found.source != row.source for found in partners), is_copy,
        )  # fmt: skip

    def _book(self, before: UsageRow | None, after: UsageRow) -> None:
        """Take a row's old contribution out of its cell and quarter, and put the new one in."""
        for row, sign in ((before, -1), (after, 1)):
            if row is None or not row.is_counted:
                continue
            sums = _sums(row)
            part = HISTORY if row.is_history else REQUESTS
            key = RollupKey(_quarter(row.time), row.model, row.session, row.project or 0, row.user or 0, part)
            rollup = self._rollups.setdefault(key, [0] * len(sums))
            for at, count in enumerate(sums):
                rollup[at] += sign * count
            if not row.is_history:
                written = row.cache_write_5m + row.cache_write_1h
                tokens = (row.input, row.shown_output, row.cache_read, written)
                cell = request_cell(tokens, row.cost, is_estimated=row.cost_source == _PRICED)
                session = self._session_by_id(row.session)
                self._add_to_cell(session, row.model, add_cells(Cell(), cell, sign), row.time)
                truth = self._truths[row.model]
                self._truths[row.model] = truth._replace(requests=truth.requests + sign)

    # --- cells, truth, what is served ---

    def _add_to_cell(self, session: SessionRow, model: int, delta: Cell, time_ms: int) -> None:
        session = self._note_sources(session, delta, time_ms)
        old = self._cell(session.id, model)
        new = self._cells[session.id, model] = add_cells(old, delta)
        self._dirty_cells.add((session.id, model))
        truth = self._truth(model)
        if session.has_metrics:
            (before, told_before), (after, told_after) = (self._valued(session, model, cell) for cell in (old, new))
            own = add_worth(truth.own, add_worth(after, before, -1))
            self._truths[model] = TruthRow(own, truth.requests, truth.pool)
            self._note_beyond(session, model, add_worth(told_after, told_before, -1), time_ms)
            if self._foreign and session.tool in self._reporting and self._is_mixed(session, model):
                self._note_names(session, model, old, time_ms)
        else:
            self._set_pool(session.tool, model, add_cells(truth.pool, delta), time_ms)

    def _set_pool(self, tool: str, model: int, pool: Cell, time_ms: int) -> None:
        truth = self._truth(model)
        self._truths[model] = truth._replace(pool=pool)
        if has_metrics(pool):
            change = add_worth(self._told_beyond(tool, pool), self._told_beyond(tool, truth.pool), -1)
            self._note_beyond(self._session(tool, ""), model, change, time_ms)

    def _note_beyond(self, session: SessionRow, model: int, change: Worth, time_ms: int) -> None:
        """Book what metrics now say beyond the requests of a cell, more than before."""
        if any(change.tokens) or change.cost or change.unpriced:
            quarters = self._beyond.setdefault((session.id, model), {})
            quarter = _quarter(time_ms)
            quarters[quarter] = add_worth(quarters.get(quarter, Worth()), change)

    def _is_mixed(self, session: SessionRow, model: int) -> bool:
        """Whether a session, of which a cell has changed, has had models of another maker; asked of the store once."""
        if model in self._foreign:
            self._mixed[session.id] = True
        elif session.id not in self._mixed:
            self._mixed[session.id] = not self._foreign.isdisjoint(self._cells_of(session))
        return self._mixed[session.id]

    def _note_names(self, session: SessionRow, model: int, old: Cell, time_ms: int) -> None:
        """Take out what a session's sources tell of under two names, since one of its cells is no longer `old`."""
        cells = self._cells_of(session)
        before = {**cells, model: old}
        for asked, change in self._told_twice(before, cells, with_history=False):
            truth = self._truth(asked)
            self._truths[asked] = truth._replace(own=add_worth(truth.own, change, -1))
        for asked, change in self._told_twice(before, cells, with_history=True):
            self._note_beyond(session, asked, add_worth(Worth(), change, -1), time_ms)

    def _told_twice(
        self, before: Mapping[int, Cell], after: Mapping[int, Cell], *, with_history: bool
    ) -> Iterator[tuple[int, Worth]]:
        """How that has changed, by model. Where all models are of the tool's maker, each is what it is called."""
        old, new = (
            told_twice(cells, with_history=with_history)
            if any(model in self._foreign and cell != Cell() for model, cell in cells.items())
            else {}
            for cells in (before, after)
        )
        for model in old.keys() | new.keys():
            yield model, add_worth(new.get(model, Worth()), old.get(model, Worth()), -1)

    def _cells_of(self, session: SessionRow) -> dict[int, Cell]:
        """All cells of a session, by model."""
        cells = self._store.cells(session.id)
        for model in self._tools:
            cell = self._cells.get((session.id, model))
            if cell is not None:
                cells[model] = cell
        return cells

    def _note_sources(self, session: SessionRow, delta: Cell, time_ms: int) -> SessionRow:
        """A session with metrics of its own leaves the pool of those without; all its cells move."""
        has_metrics = session.has_metrics or (
            bool(session.name) and (any(delta.metrics) or delta.prompt > 0 or delta.metrics_cost > 0)
        )
        has_requests = session.has_requests or any(delta.requests)
        if (has_metrics, has_requests) == (session.has_metrics, session.has_requests):
            return session
        if has_metrics and not session.has_metrics:
            for model, cell in self._cells_of(session).items():
                truth = self._truth(model)
                self._truths[model] = truth._replace(own=add_worth(truth.own, self._worth(session.tool, cell)))
                self._set_pool(session.tool, model, add_cells(truth.pool, cell, -1), time_ms)
                self._note_beyond(session, model, self._told_beyond(session.tool, cell), time_ms)
        session = session._replace(has_metrics=has_metrics, has_requests=has_requests)
        self._write_session(session)
        return session

    def _write_session(self, session: SessionRow) -> None:
        self._store.write_session(session)
        self._sessions[session.tool, session.name] = session

    def _worth(self, tool: str, cell: Cell) -> Worth:
        return worth(cell, reports_cost=tool in self._reporting)

    def _told_beyond(self, tool: str, cell: Cell) -> Worth:
        return beyond(cell, reports_cost=tool in self._reporting)

    def _valued(self, session: SessionRow, model: int, cell: Cell) -> tuple[Worth, Worth]:
        """What a cell is worth, and what its metrics say beyond its requests; remembered, as it is asked for again
        when the cell changes."""
        key = (session.id, model)
        known = self._values_of.get(key)
        if known is not None and known[0] is cell:
            return known[1]
        found = self._worth(session.tool, cell)
        values = (found, found if has_metrics_alone(cell) else self._told_beyond(session.tool, cell))
        self._values_of[key] = (cell, values)
        return values

    def touched(self) -> list[tuple[SessionRow, str, Cell, Cell]]:
        """The cells that changed since the last flush: session, model, the cell and what it was."""
        self._book_reports()
        sessions = {row.id: row for row in self._sessions.values()}
        models = {row.id: row.name for row in self._models.values()}
        return [
            (sessions[key[0]], models[key[1]], self._cells[key], self._store.cell(*key)) for key in self._dirty_cells
        ]

    def flush(self, commit: int, now: int) -> UsageChange:
        """Write what changed since the last flush; `commit` is the number that the transaction will get."""
        self._book_reports()
        self._write_sums()
        changed: list[ServedRow] = []
        for model in self._dirty_truths:
            for kind, worth_now in self._values(model).items():
                value = min(worth_now, MAX_INTEGER)
                known = self._served.get((model, kind))
                if value > (known.value if known else 0):
                    row = known._replace(value=value) if known else ServedRow(model, kind, value, commit, now)
                    self._served[model, kind] = row
                    changed.append(row)
        self._store.write_served(changed)
        tools = {self._tools[model] for model in self._dirty_truths}
        unpriced = {model: self._total(model).unpriced for model in self._dirty_truths}
        models = list(self._models.values()) if self._dirty_truths else []
        change = UsageChange(changed, models, self._truth_of(tools), unpriced)
        self._begin()
        if max(len(self._cells), len(self._sessions), len(self._labels), len(self._model_ids)) > MAX_CACHED:
            self._clear()
        return change

    def _write_sums(self) -> None:
        self._store.write_cells((*key, self._cells[key]) for key in self._dirty_cells)
        self._store.write_truths((model, self._truths[model]) for model in self._dirty_truths)
        self._store.add_to_rollups((key, _as_sums(sums)) for key, sums in self._rollups.items() if any(sums))
        booked = [
            (RollupKey(quarter, model, session, 0, 0, METRICS), _sums_of(part))
            for (session, model), changes in self._beyond.items()
            for quarter, part in settle(self._store.metric_rollups(session, model), changes).items()
        ]
        self._store.add_to_rollups(booked)
        self._store.forget_empty_rollups(key for key, sums in booked if min(sums) < 0)

    def _truth_of(self, tools: set[str]) -> dict[tuple[str, str], int]:
        """The truth of whole tools, by (tool, kind)."""
        totals: dict[tuple[str, str], int] = {}
        for row in self._models.values():
            if row.tool in tools and row.id in self._truths:
                for kind, value in self._values(row.id).items():
                    totals[row.tool, kind] = totals.get((row.tool, kind), 0) + value
        return totals

    def _total(self, model: int) -> Worth:
        truth = self._truths[model]
        return add_worth(truth.own, self._worth(self._tools[model], truth.pool))

    def _values(self, model: int) -> dict[str, int]:
        total = self._total(model)
        tokens = dict(zip(KINDS, total.tokens, strict=True))
        return {**tokens, "usd": total.cost, "requests": self._truths[model].requests}

    # --- lookups ---

    def _truth(self, model: int) -> TruthRow:
        self._dirty_truths.add(model)
        if model not in self._truths:
            self._truths[model] = TruthRow(Worth(), 0, Cell())
        return self._truths[model]

    def _cell(self, session: int, model: int) -> Cell:
        cell = self._cells.get((session, model))
        if cell is None:
            cell = self._cells[session, model] = self._store.cell(session, model)
        return cell

    def _tool(self, tool: str) -> str:
        """A tool's name, or `other` when there are too many."""
        if tool not in self._tool_names:
            if len(self._tool_names) >= MAX_TOOLS:
                return OTHER
            self._tool_names.add(tool)
        return tool

    def _session(self, tool: str, name: str) -> SessionRow:
        tool = self._tool(tool)
        row = self._sessions.get((tool, name))
        if row is None:
            row = self._sessions[tool, name] = self._store.session(tool, name)
        return row

    def _session_by_id(self, session: int) -> SessionRow:
        row = self._store.session_by_id(session)
        return self._sessions.setdefault((row.tool, row.name), row)

    def _model(self, tool: str, model: str) -> int:
        tool = self._tool(tool)
        known = self._model_ids.get((tool, model))
        if known is None:
            known = self._model_ids[tool, model] = self._named_model(tool, model)
        return known

    def _named_model(self, tool: str, model: str) -> int:
        name = self._normalise(model) or "unknown"
        row = self._models.get((tool, name))
        if row is None:
            if len(self._models) >= MAX_MODELS and name != OTHER:
                return self._named_model(tool, OTHER)
            row = self._models[tool, name] = self._store.add_model(tool, name)
            self._tools[row.id] = tool
            if self._is_foreign(row):
                self._foreign.add(row.id)
        return row.id

    def _is_foreign(self, row: ModelRow) -> bool:
        """Whether a model is another maker's than the tool, whose metrics name the model that was asked."""
        return row.tool in self._reporting and provider_of(row.name) != OWN_PROVIDER

    def _label(self, text: str) -> int | None:
        if not text:
            return None
        label = self._labels.get(text)
        if label is None:
            label = self._labels[text] = self._store.label(text[:1_000])
        return label


def _request_key(request_id: str) -> bytes:
    return blake2b(request_id.encode(), digest_size=8).digest()


def _part_key(request_id: str) -> bytes:
    return _request_key(f"{request_id}\0part")


def _reported(amounts: Mapping[str, int]) -> Cell:
    """The cell of what metrics reported, by the kinds of UsageCell."""
    of = amounts.get
    tokens = (
        of("input", 0),
        of("output", 0),
        of("cache_read", 0) + of("cached", 0),
        of("cache_write", 0) + of("written", 0),
    )
    return Cell(metrics=tokens, metrics_cost=of("usd", 0), prompt=of("prompt", 0))


def _is_original(row: UsageRow | None) -> bool:
    """Whether side-chain copies of a response do not count because of this row."""
    return row is not None and not row.is_sidechain and row.request is not None


def _rank(row: UsageRow) -> tuple[int, int, int, int]:
    """Which of two lines of one response stands: the later revision, then the larger output, the original, the older
    file's."""
    return row.revision, row.output, -row.is_sidechain, -row.origin


def _judged(row: UsageRow, verdict: Verdict) -> UsageRow:
    return row._replace(is_counted=int(verdict.is_counted), shown_output=verdict.output)


def _sums(row: UsageRow) -> Sums:
    tokens = (row.input, row.shown_output, row.cache_read, row.cache_write_5m, row.cache_write_1h)
    return 1, *tokens, row.cost or 0, sum(tokens) if row.cost is None else 0


def _quarter(time_ms: int) -> int:
    return max(0, min(time_ms // QUARTER_MS, MAX_QUARTER))


def _sums_of(worth: Worth) -> Sums:
    """What metrics alone say: no requests, and cache writes of no known life time."""
    return 0, *worth.tokens, 0, worth.cost, worth.unpriced


def _as_sums(counts: list[int]) -> Sums:
    requests, first, output, read, short, long, cost, unpriced = counts
    return requests, first, output, read, short, long, cost, unpriced


def _of_kind(kind: str, amount: int) -> Tokens:
    """Tokens of one kind alone."""
    first, second, third, fourth = (amount if name == kind else 0 for name in KINDS)
    return first, second, third, fourth


def _costing(delta: Cell, amount: int, price: int) -> Cell:
    """The delta with the cost of its tokens; `price` is that of ESTIMATED_TOKENS."""
    return delta._replace(metrics_cost=amount * price // ESTIMATED_TOKENS)
