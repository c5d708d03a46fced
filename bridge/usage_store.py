"""The request rows, cells and served counters in the database: the second half of the store.

Like the store, this knows SQL and nothing of what the rows mean; every call stands in a transaction of the store's.

Tables, with what bounds them:
  usage      one row a request and source, for `history_days`; its key stays for ever in `usage_key`, with other names
  span       one row a request that a span told of, as long as its row: where in a trace it stands
  session    one row a session of a tool, for ever
  model      one row a tool and normalised model, at most MAX_MODELS in all
  label      projects and users, each text once
  cell       one row a session and model: what requests and what metrics add up to
  truth      one row a model: what its cells are worth together
  served     one row a model and kind: the value that was shown, which never falls
  rollup     for ever, sums of a quarter of an hour: of the rows that count, and of what metrics say beyond them
  root, transcript   where transcripts lie, and how far each file is read
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from bridge.join import Cell, Worth
from bridge.model import Place, Source, SpanRank, TranscriptRow
from bridge.rows import proved
from bridge.store import Store

MAX_INTEGER = 2**63 - 1
_MAX_PARAMETERS = 500
MAX_OPEN_SPANS = 1_000
"""Spans around a request that are looked at for whether they sum it up: the latest."""
LOADING_CACHE = 8_000
"""Kilobytes of pages to keep in memory while history is loaded: keys fall anywhere, so each batch needs most pages of
the indexes."""
LOADING, LOADED = 1, 2
"""Values of `is_history`: read, and not yet summed up; and that done."""
REQUESTS, HISTORY, METRICS = 0, 1, 2
"""Values of `part` in rollups: requests; those of before the first look; what metrics add to the requests."""
QUARTER_MS = 900_000
"""Every time zone's days begin with a quarter of an hour."""
MAX_QUARTER = 281_523_071
"""That of the year 9998: what is later, by a broken clock, is counted there."""


class UsageRow(NamedTuple):
    """One row of `usage`. Flags as 0 and 1; times in Unix milliseconds; cost in nano-dollars."""

    id: int
    key: bytes
    source: int
    session: int
    model: int
    time: int
    input: int
    output: int
    cache_read: int
    cache_write_5m: int
    cache_write_1h: int
    request: bytes | None
    origin: int
    is_sidechain: int
    is_history: int
    is_counted: int
    shown_output: int
    cost: int | None
    cost_source: str
    duration: int | None
    project: int | None
    user: int | None
    revision: int = 0


Columns = tuple[Any, ...]
"""The columns of a UsageRow but for its id."""


class SessionRow(NamedTuple):
    id: int
    tool: str
    name: str
    has_metrics: bool
    has_requests: bool
    since: int = 0
    """When its metrics began to count, Unix ms; 0 where there are none."""
    project: int | None = None
    """The label of the first project that one of its requests told."""


class ModelRow(NamedTuple):
    id: int
    tool: str
    name: str


class TruthRow(NamedTuple):
    """What a model's cells of sessions with metrics are worth together, and the cell of all the others."""

    own: Worth
    requests: int
    pool: Cell


class ServedRow(NamedTuple):
    """A served counter: its value, and the commit and time (Unix ms) of its birth."""

    model: int
    kind: str
    value: int
    born: int
    birth: int


class RollupKey(NamedTuple):
    quarter: int
    model: int
    session: int
    project: int
    user: int
    part: int


Sums = tuple[int, int, int, int, int, int, int, int]
"""requests, input, output, cache_read, cache_write_5m, cache_write_1h, cost, unpriced."""

_COLUMNS = ", ".join(UsageRow._fields)
_INSERT = (
    f"insert into usage ({', '.join(UsageRow._fields[1:])}) values ({', '.join('?' * (len(UsageRow._fields) - 1))})"
)


_SUMMED = (
    "input",
    "shown_output",
    "cache_read",
    "cache_write_5m",
    "cache_write_1h",
    "coalesce(cost, 0)",
    "case when cost is null then input + shown_output + cache_read + cache_write_5m + cache_write_1h else 0 end",
)
_SUMS = ("requests", "input", "output", "cache_read", "cache_write_5m", "cache_write_1h", "cost", "unpriced")
_ADD_TO_ROLLUP = " on conflict do update set " + ", ".join(
    f"{name} = min({name} + excluded.{name}, {MAX_INTEGER})" for name in _SUMS
)


def _bounded_sum(column: str) -> str:
    # sum() fails where 64 bits do not suffice; total() does not, and is exact up to 2**53.
    return f"cast(min(total({column}), {MAX_INTEGER}) as integer)"


class UsageStore:
    """The tables of usage in a store's database."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._is_loading = False

    # --- names ---

    def session(self, tool: str, name: str) -> SessionRow:
        """The session of this name, made if there is none."""
        row = self._store.execute("select * from session where tool = ? and name = ?", (tool, name)).fetchone()
        if row is None:
            cursor = self._store.execute(
                "insert into session (tool, name, has_metrics, has_requests, since) values (?, ?, 0, 0, 0)",
                (tool, name),
            )
            return SessionRow(cursor.lastrowid or 0, tool, name, False, False)
        return _session(row)

    def session_by_id(self, session: int) -> SessionRow:
        return _session(self._store.execute("select * from session where id = ?", (session,)).fetchone())

    def write_session(self, row: SessionRow) -> None:
        self._store.execute(
            "update session set has_metrics = ?, has_requests = ?, since = ?, project = ? where id = ?",
            (*row[3:], row.id),
        )

    def models(self) -> list[ModelRow]:
        return [ModelRow(*row) for row in self._store.execute("select id, tool, name from model")]

    def add_model(self, tool: str, name: str) -> ModelRow:
        cursor = self._store.execute("insert into model (tool, name) values (?, ?)", (tool, name))
        return ModelRow(cursor.lastrowid or 0, tool, name)

    def label(self, text: str) -> int:
        """The id of a text, made if there is none."""
        row = self._store.execute("select id from label where text = ?", (text,)).fetchone()
        if row:
            return int(row[0])
        return self._store.execute("insert into label (text) values (?)", (text,)).lastrowid or 0

    # --- request rows ---

    def by_key(self, key: bytes) -> UsageRow | None:
        row = self._store.execute(f"select {_COLUMNS} from usage where key = ?", (key,)).fetchone()
        return row and UsageRow(*row)

    def is_forgotten(self, key: bytes) -> bool:
        """Whether a row of this key was there once and was deleted for its age."""
        return self._store.execute("select 1 from usage_key where key = ?", (key,)).fetchone() is not None

    def known_keys(self, keys: Iterable[bytes]) -> dict[bytes, bool]:
        """Those of some keys that name a request, and whether a row stands under them."""
        known: dict[bytes, bool] = {}
        remaining = tuple(sorted(keys))  # neighbours stand on one page
        while remaining:
            some, remaining = remaining[:_MAX_PARAMETERS], remaining[_MAX_PARAMETERS:]
            marks = ", ".join("?" * len(some))
            for table, has_row in (("usage_key", False), ("usage", True)):
                rows = self._store.execute(f"select key from {table} where key in ({marks})", some)
                known.update((row[0], has_row) for row in rows)
        return known

    def remember(self, keys: Iterable[bytes]) -> None:
        """Remember keys without a row."""
        self._store.executemany("insert or ignore into usage_key values (?)", ((key,) for key in sorted(keys)))

    def by_ids(self, ids: Iterable[int]) -> list[UsageRow]:
        return [
            UsageRow(*row)
            for row_id in ids
            for row in self._store.execute(f"select {_COLUMNS} from usage where id = ?", (row_id,))
        ]

    def by_request(self, request: bytes) -> list[UsageRow]:
        sql = f"select {_COLUMNS} from usage where request = ? and not is_history"
        return [UsageRow(*row) for row in self._store.execute(sql, (request,))]

    def copies(self, message: bytes) -> list[UsageRow]:
        """The side-chain rows of one response, not of history: the first half of their key names it."""
        sql = f"select {_COLUMNS} from usage where key >= ? and key <= ? and is_sidechain and not is_history"
        return [UsageRow(*row) for row in self._store.execute(sql, _of_message(message))]

    def has_original(self, message: bytes) -> bool:
        """Whether a response stands outside side-chains, with a request id."""
        sql = "select 1 from usage where key >= ? and key <= ? and not is_sidechain and request is not null limit 1"
        return self._store.execute(sql, _of_message(message)).fetchone() is not None

    def group(self, row: UsageRow) -> list[UsageRow]:
        """The rows, not of history, that are alike but for source, output and identity."""
        sql = (
            f"select {_COLUMNS} from usage where session = ? and model = ? and input = ? and cache_read = ?"
            " and cache_write_5m + cache_write_1h = ? and not is_history"
        )
        written = row.cache_write_5m + row.cache_write_1h
        values = (row.session, row.model, row.input, row.cache_read, written)
        return [UsageRow(*found) for found in self._store.execute(sql, values)]

    def has_counterpart(self, row: UsageRow) -> bool:
        """Whether a row of the other source in its group may be the same request: one of them knows no request id."""
        other = Source.EVENT if row.source == Source.TRANSCRIPT else Source.TRANSCRIPT
        sql = (
            "select 1 from usage where session = ? and model = ? and input = ? and cache_read = ? and source = ?"
            f"{' and request is null' if row.request else ''}"
            " and cache_write_5m + cache_write_1h = ? and not is_history limit 1"
        )
        values = (
            row.session,
            row.model,
            row.input,
            row.cache_read,
            int(other),
            row.cache_write_5m + row.cache_write_1h,
        )
        return self._store.execute(sql, values).fetchone() is not None

    # --- spans ---

    def note_place(self, row: UsageRow, place: Place) -> None:
        """Remember where in a trace a request was told of."""
        response = row.request and place.trace + row.request
        values = (row.id, *place[:5], int(place.rank), response)
        self._store.execute("insert or replace into span values (?, ?, ?, ?, ?, ?, ?, ?)", values)

    def is_retold(self, usage: int) -> bool:
        """Whether another span of the trace tells of a span's request, or of the parts of it, in more detail.

        That is a child; a request that was made while a span was open that is none and not its sibling; and the same
        response, told of by a span that was opened later.
        """
        sql = (
            "select 1 from span as outer_, span as inner_ where outer_.usage = ?1 and inner_.parent = outer_.span"
            " and inner_.trace = outer_.trace"
            " union all select 1 from span as outer_, span as inner_ where outer_.usage = ?1"
            " and inner_.trace = outer_.trace and inner_.rank > outer_.rank and inner_.begun >= outer_.begun"
            f" and outer_.rank < {int(SpanRank.REQUEST)} and inner_.begun <= outer_.ended"
            " and inner_.ended <= outer_.ended and inner_.parent != outer_.parent"
            " union all select 1 from span as outer_, span as inner_ where outer_.usage = ?1"
            " and inner_.response = outer_.response and inner_.begun <= outer_.ended"
            " and inner_.ended >= outer_.begun"
            " and (inner_.begun, inner_.span) > (outer_.begun, outer_.span) limit 1"
        )
        return self._store.execute(sql, (usage,)).fetchone() is not None

    def told_by(self, usage: int) -> list[UsageRow]:
        """The rows of spans that may be retold by this one."""
        sql = (
            "select outer_.usage from span as inner_, span as outer_ where inner_.usage = ?1"
            " and outer_.span = inner_.parent and outer_.trace = inner_.trace"
            " union select usage from (select outer_.usage from span as inner_, span as outer_ where inner_.usage = ?1"
            f" and outer_.trace = inner_.trace and outer_.rank in ({int(SpanRank.SUM)}, {int(SpanRank.UNKNOWN)})"
            " and outer_.rank < inner_.rank and outer_.begun <= inner_.begun and outer_.ended >= inner_.ended"
            f" order by outer_.begun desc limit {MAX_OPEN_SPANS})"
            " union select outer_.usage from span as inner_, span as outer_ where inner_.usage = ?1"
            " and outer_.response = inner_.response and outer_.begun <= inner_.ended"
            " and outer_.ended >= inner_.begun and outer_.usage != ?1"
        )
        found = self._store.execute(f"select {_COLUMNS} from usage where id in ({sql})", (usage,))
        return [UsageRow(*row) for row in found]

    def add(self, row: UsageRow) -> UsageRow:
        return row._replace(id=self._store.execute(_INSERT, row[1:]).lastrowid or 0)

    def write(self, rows: Iterable[UsageRow]) -> None:
        """Replace rows by those of the same id."""
        assigned = ", ".join(f"{name} = ?" for name in UsageRow._fields[1:])
        self._store.executemany(f"update usage set {assigned} where id = ?", ((*row[1:], row.id) for row in rows))

    def load_history(self, rows: Iterable[Columns]) -> None:
        """Add rows of history in bulk; of equal keys the larger output stays, then the original, then the older."""
        if not self._is_loading:
            self._store.cache(LOADING_CACHE)
            self._is_loading = True
        self._store.executemany(
            _INSERT + " on conflict (key) do update set session = excluded.session, model = excluded.model,"
            " time = excluded.time, input = excluded.input, output = excluded.output, cache_read = excluded.cache_read,"
            " cache_write_5m = excluded.cache_write_5m, cache_write_1h = excluded.cache_write_1h,"
            " request = excluded.request, origin = excluded.origin, is_sidechain = excluded.is_sidechain,"
            " shown_output = excluded.shown_output, cost = excluded.cost, cost_source = excluded.cost_source,"
            " project = excluded.project, revision = excluded.revision"
            f" where is_history = {LOADING}"
            " and (excluded.revision, excluded.output, -excluded.is_sidechain, -excluded.origin)"
            " > (revision, output, -is_sidechain, -origin)",
            rows,
        )

    def finish_history(self) -> None:
        """Once all history is loaded: side-chain copies do not count, and the rest is summed up."""
        self._is_loading = False
        self._store.cache()
        self._store.execute(
            f"update usage set is_counted = 0 where is_history = {LOADING} and is_sidechain and is_counted and exists ("
            # || makes text, and every blob is greater than any text.
            "select 1 from usage as original"
            " where original.key >= cast(substr(usage.key, 1, 8) || x'0000000000000000' as blob)"
            " and original.key <= cast(substr(usage.key, 1, 8) || x'ffffffffffffffff' as blob)"
            " and not original.is_sidechain"
            " and original.request is not null)"
        )
        self._store.execute(
            f"insert into rollup select max(0, min(time / {QUARTER_MS}, {MAX_QUARTER})), model, session,"
            f" coalesce(project, 0), coalesce(user, 0), {HISTORY}, count(*), {', '.join(map(_bounded_sum, _SUMMED))}"
            f" from usage where is_history = {LOADING} and is_counted group by 1, 2, 3, 4, 5"
            f"{_ADD_TO_ROLLUP}"
        )
        self._store.execute(f"update usage set is_history = {LOADED} where is_history = {LOADING}")
        self._store.execute(
            "update session set project = found.project from ("
            f" select session, min(project) as project from rollup where part = {HISTORY} and project group by session"
            " having min(project) = max(project)) as found where found.session = session.id and session.project is null"
        )

    def newest_history(self) -> int:
        """When the last request of history was made, Unix ms; 0 where there is none."""
        sql = f"select max(quarter) from rollup where part = {HISTORY}"
        ((quarter,),) = self._store.execute(sql)
        return 0 if quarter is None else (quarter + 1) * QUARTER_MS - 1

    def sessions_since(self, before: int) -> list[SessionRow]:
        """The sessions whose metrics began to count at or before a time (Unix ms)."""
        rows = self._store.execute("select * from session where since > 0 and since <= ?", (before,))
        return [_session(row) for row in rows]

    def covered(self, session: SessionRow) -> dict[int, Worth]:
        """By model, the requests of history that were made after the metrics of a session began to count.

        Metrics that name no session count those of all sessions without metrics of their own.
        """
        whose = "usage.session = ?" if session.name else "session.tool = ? and not session.has_metrics"
        sql = (
            f"select model, {', '.join(map(_bounded_sum, _SUMMED))}"
            " from usage join session on session.id = usage.session"
            f" where time >= ? and is_history = {LOADED} and is_counted and {whose} group by model"
        )
        rows = self._store.execute(sql, (session.since, session.id if session.name else session.tool))
        return {
            model: Worth((first, output, read, short + long), cost, unpriced)
            for model, first, output, read, short, long, cost, unpriced in rows
        }

    def add_to_rollups(self, changes: Iterable[tuple[RollupKey, Sums]]) -> None:
        self._store.executemany(
            f"insert into rollup values ({', '.join('?' * 14)}){_ADD_TO_ROLLUP}",
            ((*key, *_bounded(sums)) for key, sums in changes),
        )

    def metric_rollups(self, session: int, model: int) -> Iterator[tuple[int, Worth]]:
        """What metrics say beyond the requests of a cell, by quarter, the latest first; asked for when it is needed."""
        rows = self._store.execute(
            "select quarter, input, output, cache_read, cache_write_5m, cost, unpriced from rollup"
            f" where part = {METRICS} and session = ? and model = ?"
            " and max(input, output, cache_read, cache_write_5m, cost, unpriced) > 0 order by quarter desc",
            (session, model),
        )
        for quarter, *tokens, cost, unpriced in rows:
            yield quarter, Worth(tuple(tokens), cost, unpriced)

    def forget_empty_rollups(self, keys: Iterable[RollupKey]) -> None:
        """Delete those of these rollups that have come to nothing."""
        named = " and ".join(f"{name} = ?" for name in RollupKey._fields)
        empty = " and ".join(f"{name} = 0" for name in _SUMS)
        self._store.executemany(f"delete from rollup where {named} and {empty}", keys)

    def forget_rows(self, before: int, most: int) -> int:
        """Delete up to `most` rows older than `before` (Unix ms), keeping their keys; their number."""
        old = self._store.execute("select id, key from usage where time < ? limit ?", (before, most)).fetchall()
        self.remember(key for _, key in old)
        for table, name in (("usage", "id"), ("span", "usage")):
            self._store.executemany(f"delete from {table} where {name} = ?", ((row_id,) for row_id, _ in old))
        return len(old)

    # --- sums ---

    def cell(self, session: int, model: int) -> Cell:
        sql = "select * from cell where session = ? and model = ?"
        row = self._store.execute(sql, (session, model)).fetchone()
        return _cell(row[2:]) if row else Cell()

    def cells(self, session: int) -> dict[int, Cell]:
        """All cells of a session, by model."""
        rows = self._store.execute("select * from cell where session = ?", (session,))
        return {row[1]: _cell(row[2:]) for row in rows}

    def write_cells(self, cells: Iterable[tuple[int, int, Cell]]) -> None:
        self._store.executemany(
            f"insert or replace into cell values ({', '.join('?' * 23)})",
            ((session, model, *_bounded(_flat(cell))) for session, model, cell in cells),
        )

    def truths(self) -> dict[int, TruthRow]:
        rows = self._store.execute("select * from truth")
        return {row[0]: TruthRow(Worth(row[1:5], row[5], row[6]), row[7], _cell(row[8:])) for row in rows}

    def write_truths(self, truths: Iterable[tuple[int, TruthRow]]) -> None:
        self._store.executemany(
            f"insert or replace into truth values ({', '.join('?' * 29)})",
            (
                (model, *_bounded((*row.own.tokens, row.own.cost, row.own.unpriced, row.requests, *_flat(row.pool))))
                for model, row in truths
            ),
        )

    def served(self) -> list[ServedRow]:
        sql = "select model, kind, value, born, birth, proof from served"
        return [ServedRow(*proved(row)) for row in self._store.execute(sql)]

    def write_served(self, rows: Iterable[ServedRow]) -> None:
        self._store.write_served(rows)

    def sum_cells(self) -> tuple[int, int]:
        """Tokens of all cells, as requests and as metrics add up to them."""
        sql = (
            "select sum(input + output + cache_read + cache_write),"
            " sum(metric_output + max(metric_prompt, metric_input + metric_cache_read + metric_cache_write)) from cell"
        )
        row = self._store.execute(sql).fetchone()
        return int(row[0] or 0), int(row[1] or 0)

    def count_sessions(self) -> tuple[int, int]:
        """Sessions that only metrics, and that only requests have seen."""
        sql = "select sum(has_metrics and not has_requests), sum(has_requests and not has_metrics) from session"
        row = self._store.execute(sql).fetchone()
        return int(row[0] or 0), int(row[1] or 0)

    # --- transcripts ---

    def roots(self) -> dict[str, bool]:
        """The roots that were looked at, and whether their history is read."""
        return {path: bool(looked) for path, looked in self._store.execute("select path, looked from root")}

    def add_root(self, path: str, *, looked: bool) -> None:
        self._store.execute("insert or replace into root values (?, ?)", (path, looked))

    def finish_roots(self) -> None:
        self._store.execute("update root set looked = 1")

    def transcripts(self) -> list[TranscriptRow]:
        rows = self._store.execute("select * from transcript")
        return [TranscriptRow(row_id, os.fsdecode(path), *rest) for row_id, path, *rest in rows]

    def write_transcript(self, row: TranscriptRow) -> TranscriptRow:
        """Insert or replace by path; the result has its id."""
        self._store.execute(
            "insert into transcript (path, device, inode, head, history, history_end, live, origin, state)"
            " values (?, ?, ?, ?, ?, ?, ?, ?, ?) on conflict (path) do update set device = excluded.device,"
            " inode = excluded.inode, head = excluded.head, history = excluded.history,"
            " history_end = excluded.history_end, live = excluded.live, origin = excluded.origin,"
            " state = excluded.state",
            (_path(row.path), *row[2:]),
        )
        (row_id,) = self._store.execute("select id from transcript where path = ?", (_path(row.path),)).fetchone()
        return row._replace(id=row_id)


def _of_message(message: bytes) -> tuple[bytes, bytes]:
    """The least and the greatest key of a response."""
    return message + b"\x00" * 8, message + b"\xff" * 8


def _path(path: str) -> str | bytes:
    """A path as text, or as the bytes that it is where they are no text."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return os.fsencode(path)
    return path


def _session(row: tuple[Any, ...]) -> SessionRow:
    return SessionRow(row[0], row[1], row[2], bool(row[3]), bool(row[4]), row[5], row[6])


def _cell(row: tuple[Any, ...]) -> Cell:
    return Cell._make((tuple(row[:4]), *row[4:6], tuple(row[6:10]), *row[10:13], tuple(row[13:17]), *row[17:]))


def _bounded(numbers: Sequence[int]) -> Sequence[int]:
    """Numbers as SQLite can hold them."""
    if max(numbers) <= MAX_INTEGER and min(numbers) >= -MAX_INTEGER:
        return numbers
    return [number if -MAX_INTEGER <= number <= MAX_INTEGER else _bound(number) for number in numbers]


def _bound(number: int) -> int:
    return MAX_INTEGER if number > 0 else -MAX_INTEGER


def _flat(cell: Cell) -> tuple[int, ...]:
    tokens, metrics, covered = cell.requests, cell.metrics, cell.covered
    return (*tokens, *cell[1:3], *metrics, *cell[4:7], *covered, *cell[8:])
