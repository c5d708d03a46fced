"""The state on disk: one SQLite file, and the code that writes it.

Law: exactly one connection writes, the daemon's, from one thread; others open the file read-only. Every write
stands in a transaction that ends with a synced commit (WAL, synchronous=FULL), so after a crash the file holds
exactly the commits that returned, or one more. A commit number counts them.

Tables, with what bounds them:
  series       one row a counter or gauge: what stays of it; never deleted
  series_value one row a series: its lifetime value, and when it came; short, since each export writes many of them
  stream       one row an OTLP stream: which series it feeds and who writes it
  run          one row a cumulative run, for ever (24 bytes of payload)
  delta_point  one row (writer, end time): 8 bytes a point, until 7 days after the writer's last point
  writer       one row a session or service instance, for ever: the latest end that was forgotten
  request      body hashes of requests whose points have no identity of their own, 7 days
  total        the lifetime totals of the XRG profile
  target       resource attributes by job and instance

What is served (series, series_value, total, served) is proved: each row holds a checksum of itself, and every start
reads the whole file, so that a flipped bit is found before it is shown. Identities, names and requests have no
checksum: up to THOROUGH_BYTES those that stand in an index too are compared with it, and of any change between an
orderly stop and the next start the mark's checksum of the whole file tells.

Beside it stand the mark of what was served (bridge/mark.py) and copies, `state-v1-<time>.db`: one an hour while
something changes, and one before every migration. A migration is one transaction: a crash leaves the old schema or
the new one.
"""

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from bridge.copies import keep_copy, way_back
from bridge.database import DATABASE, MIGRATIONS, SCHEMA_VERSION, is_open, open_to_read
from bridge.rows import (
    PAIRS,
    SERIES,
    MetricRow,
    SeriesRow,
    Snapshot,
    StreamRow,
    TargetRow,
    WriterRow,
    fixed_of,
    proof,
    proved,
    proved_series,
    run_row,
    series_row,
    stored,
    value_proof,
)
from bridge.state import DISK_ERRORS, SERVED, Damaged, StateError, StoreUnavailable, refusal, unavailable, verdict
from bridge.temporality import Run

USUAL_CACHE = 2_000
"""Kilobytes of pages in memory."""
PATIENCE_MS = 100
"""How long a checkpoint that must not hold anybody up waits for readers."""
PAGE_BYTES, MIN_LOG_PAGES, LOG_PAGES = 4096, 16, 1000
"""Of the write-ahead log, which is emptied into the database when it is so long."""
THOROUGH_BYTES = 64 * 2**20
"""Up to this size a start compares every index with its table as well: a hundredth of a second for 20 MB."""

_SCHEMA = """
create table meta (
    id integer primary key check (id = 1), commits integer not null, created integer not null, secret blob not null
);
create table metric (
    id integer primary key, name text not null, kind text not null, unit text not null, scale integer not null,
    description text not null, unique (name, kind, unit)
);
create table series (
    id integer primary key, key blob not null unique, metric integer not null references metric,
    job text not null, instance text not null, labels text not null, expires integer not null, base,
    born integer not null, birth integer not null, proof integer not null
);
create table series_value (
    id integer primary key, value, time integer not null, seen integer not null, proof integer not null
);
create table stream (
    id integer primary key, key blob not null unique, series integer not null, writer integer not null,
    labelled blob not null
);
create table run (
    stream integer not null, start integer not null, inferred integer not null, highest not null,
    first integer not null, last integer not null, primary key (stream, start, inferred)
) without rowid;
create table writer (
    id integer primary key, key blob not null unique, latest integer not null, forgotten integer not null,
    seen integer not null
);
create table delta_point (
    writer integer not null, time integer not null, members blob not null, primary key (writer, time)
) without rowid;
create table request (hash blob primary key, seen integer not null) without rowid;
create table total (name text primary key, value integer not null, proof integer not null) without rowid;
create table target (
    job text not null, instance text not null, attributes text not null, seen integer not null,
    primary key (job, instance)
) without rowid;
create table scraper (
    key text primary key, shown integer not null, seen integer not null
);
create table usage (
    id integer primary key, key blob not null unique, source integer not null, session integer not null,
    model integer not null, time integer not null, input integer not null, output integer not null,
    cache_read integer not null, cache_write_5m integer not null, cache_write_1h integer not null,
    request blob, origin integer not null, is_sidechain integer not null, is_history integer not null,
    is_counted integer not null, shown_output integer not null, cost integer, cost_source text not null,
    duration integer, project integer, user integer, revision integer not null
);
create index usage_time on usage (time);
create index usage_request on usage (request) where request is not null and not is_history;
create index usage_group on usage (session, model, input, cache_read, source, request) where not is_history;
create table span (
    usage integer primary key, trace blob not null, span blob not null, parent blob not null, begun integer not null,
    ended integer not null, rank integer not null, response blob
);
create index span_id on span (span);
create index span_parent on span (parent) where parent != x'';
create index span_time on span (trace, rank, begun);
create index span_response on span (response, begun) where response is not null;
create table usage_key (key blob primary key) without rowid;
create table session (
    id integer primary key, tool text not null, name text not null, has_metrics integer not null,
    has_requests integer not null, since integer not null, project integer, unique (tool, name)
);
create table model (id integer primary key, tool text not null, name text not null, unique (tool, name));
create table label (id integer primary key, text text not null unique);
create table cell (
    session integer not null, model integer not null, input integer not null, output integer not null,
    cache_read integer not null, cache_write integer not null, cost integer not null, unpriced integer not null,
    metric_input integer not null, metric_output integer not null, metric_cache_read integer not null,
    metric_cache_write integer not null, metric_cost integer not null, metric_prompt integer not null,
    metric_unpriced integer not null, covered_input integer not null, covered_output integer not null,
    covered_cache_read integer not null, covered_cache_write integer not null, covered_cost integer not null,
    covered_unpriced integer not null, estimated_cost integer not null, estimated_weight integer not null,
    primary key (session, model)
) without rowid;
create table truth (
    model integer primary key, input integer not null, output integer not null, cache_read integer not null,
    cache_write integer not null, cost integer not null, unpriced integer not null, requests integer not null,
    pool_input integer not null, pool_output integer not null, pool_cache_read integer not null,
    pool_cache_write integer not null, pool_cost integer not null, pool_unpriced integer not null,
    pool_metric_input integer not null, pool_metric_output integer not null, pool_metric_cache_read integer not null,
    pool_metric_cache_write integer not null, pool_metric_cost integer not null, pool_metric_prompt integer not null,
    pool_metric_unpriced integer not null, pool_covered_input integer not null, pool_covered_output integer not null,
    pool_covered_cache_read integer not null, pool_covered_cache_write integer not null,
    pool_covered_cost integer not null, pool_covered_unpriced integer not null,
    pool_estimated_cost integer not null, pool_estimated_weight integer not null
);
create table served (
    model integer not null, kind text not null, value integer not null, born integer not null, birth integer not null,
    proof integer not null, primary key (model, kind)
) without rowid;
create table rollup (
    quarter integer not null, model integer not null, session integer not null, project integer not null,
    user integer not null, part integer not null, requests integer not null, input integer not null,
    output integer not null, cache_read integer not null, cache_write_5m integer not null,
    cache_write_1h integer not null, cost integer not null, unpriced integer not null,
    primary key (quarter, model, session, project, user, part)
) without rowid;
create index rollup_metrics on rollup (session, model, quarter) where part = 2;
create view usage_sums as
    select rollup.quarter * 900 as time, model.tool, model.name as model, session.name as session,
        coalesce(project.text, '') as project, coalesce(user.text, '') as user,
        case part when 0 then 'requests' when 1 then 'history' else 'metrics' end as part, requests, input, output,
        cache_read, cache_write_5m + cache_write_1h as cache_write, cache_write_1h,
        input + output + cache_read + cache_write_5m + cache_write_1h as tokens, cost / 1e9 as cost_usd,
        unpriced as unpriced_tokens
    from rollup join model on model.id = rollup.model join session on session.id = rollup.session
        left join label as project on project.id = coalesce(nullif(rollup.project, 0), session.project)
        left join label as user on user.id = rollup.user;
create view usage_requests as
    select usage.time / 1000 as time, model.tool, model.name as model, session.name as session,
        coalesce(project.text, '') as project, coalesce(user.text, '') as user,
        case when is_history then 'history' else 'requests' end as part, input, shown_output as output, cache_read,
        cache_write_5m + cache_write_1h as cache_write, cache_write_1h,
        input + shown_output + cache_read + cache_write_5m + cache_write_1h as tokens, cost / 1e9 as cost_usd,
        cost_source, duration / 1e3 as duration_seconds
    from usage join model on model.id = usage.model join session on session.id = usage.session
        left join label as project on project.id = usage.project left join label as user on user.id = usage.user
    where is_counted and is_history <> 1;
create table root (path text primary key, looked integer not null) without rowid;
create table transcript (
    id integer primary key, path text not null unique, device integer not null, inode integer not null,
    head blob not null, history integer not null, history_end integer not null, live integer not null,
    origin integer not null, state blob not null
);
"""


Connect = Callable[[Path], sqlite3.Connection]


def connect(path: Path) -> sqlite3.Connection:
    """A connection that has changed nothing yet. Its caller keeps it to one thread at a time."""
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5)


_PRAGMAS = (
    "journal_mode = wal",
    "synchronous = full",
    "fullfsync = 1",
    "checkpoint_fullfsync = 1",
    "journal_size_limit = 67108864",
    "trusted_schema = 0",
    "cell_size_check = 1",
)


def _schema_of(connection: sqlite3.Connection) -> list[tuple[str, str | None]]:
    return connection.execute("select name, sql from sqlite_schema order by name").fetchall()


class Store:
    """The database of one bridge. Not thread-safe: after `open`, one thread calls it.

    Every method raises StoreUnavailable where SQLite fails; the caller then calls `reopen`, because after a
    failed sync only the disk knows what is there.
    """

    def __init__(
        self, directory: Path, connect: Connect = connect, migrations: tuple[str, ...] = MIGRATIONS
    ) -> None:  # fmt: skip
        self.path = directory / DATABASE
        self._connect = connect
        self._migrations = migrations
        self.version = 1 + len(migrations)
        self._connection: sqlite3.Connection

    # Foreign errors stop here.
    def execute(self, sql: str, parameters: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        """One statement. Raises StoreUnavailable."""
        try:
            return self._connection.execute(sql, parameters)
        except DISK_ERRORS as error:
            raise self._unavailable(error) from error

    def executemany(self, sql: str, rows: Iterable[tuple[Any, ...]]) -> None:
        """One statement for each row. Raises StoreUnavailable."""
        try:
            self._connection.executemany(sql, rows)
        except sqlite3.Error as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> StoreUnavailable:
        """SQLite tells of a full disk; quotas, read-only file systems and a want of descriptors it takes for faults."""
        found = unavailable(error)
        name = getattr(error, "sqlite_errorname", "")
        if name.startswith(("SQLITE_IOERR_WRITE", "SQLITE_CANTOPEN")) and (why := refusal(self.path.parent)):
            return StoreUnavailable(f"{found}; {why}", disk_full=True)
        return found

    def open(self, now: int, *, may_begin: bool = False) -> bool:
        """Open, upgrade or create the database, and read all of it; whether a WAL was left, which is to be settled.

        Raises Damaged, also where it is gone although the mark beside it says that there was one, unless it
        `may_begin` at 0. StateError 65: newer schema or not ours; 74: cannot be read or written."""
        directory = self.path.parent
        has_log = is_open(str(self.path))
        way_out = way_back(directory, self.version)
        is_missed = (directory / SERVED).exists() and not may_begin
        if is_missed and not (self.path.exists() and self.path.stat().st_size):
            raise self._is_gone(way_out)
        try:
            self._connection = self._connect(self.path)
            (version,) = self._connection.execute("pragma user_version").fetchone()
            (tables,) = self._connection.execute("select count(*) from sqlite_schema").fetchone()
            if version == 0 and tables == 0 and is_missed:
                raise self._is_gone(way_out)
            if version > self.version:
                raise StateError(
                    f"{self.path} has schema {version}, this version knows up to {self.version}; install the newer"
                    f" version again, or {way_out}",
                    os.EX_DATAERR,
                )
            if version == 0 and tables:
                raise StateError(
                    f"{self.path} is not a database of this program; move it away or choose another --state-dir",
                    os.EX_DATAERR,
                )
            if version:
                self._verify(version)
            if 0 < version < self.version:
                keep_copy(directory, version, now)
            self._configure()
            if version < self.version:
                self._upgrade(version, now)
        except DISK_ERRORS as error:
            raise self.unusable(unavailable(error)) from None
        with contextlib.suppress(OSError):
            for path in directory.glob(f"{DATABASE}*"):
                path.chmod(0o600)
        return has_log

    def _verify(self, version: int) -> None:
        """Read the whole file. Raises sqlite3.DatabaseError when its structure is damaged."""
        if version == self.version and _schema_of(self._connection) != self._schema():
            raise sqlite3.DatabaseError("database disk image is malformed: its schema was changed")
        check = "quick_check" if self.path.stat().st_size > THOROUGH_BYTES else "integrity_check"
        ((finding,),) = self._connection.execute(f"pragma {check}(1)")
        if finding != "ok":
            raise sqlite3.DatabaseError(f"database disk image is malformed: {finding}")

    def _schema(self) -> list[tuple[str, str | None]]:
        """The schema that a new database gets."""
        with contextlib.closing(sqlite3.connect(":memory:")) as new:
            for script in (_SCHEMA, *self._migrations):
                new.executescript(script)
            return _schema_of(new)

    def unusable(self, error: Exception) -> StateError:
        """What to say of an error that keeps the database from being used."""
        advice, code = verdict(error, way_back(self.path.parent, self.version))
        finding = f"cannot open {self.path}: {error}"
        return Damaged(finding, advice) if code == os.EX_DATAERR else StateError(f"{finding}; {advice}", code)

    def _is_gone(self, way_out: str) -> StateError:
        return Damaged(
            f"{self.path} is gone or empty, but {SERVED} beside it says that there was one",
            f"{way_out}; or remove {SERVED} to begin at 0",
        )

    def _configure(self) -> None:
        for pragma in _PRAGMAS:
            self._connection.execute(f"pragma {pragma}")
        self._limit_log()

    def _limit_log(self) -> None:
        """Let the WAL grow to a quarter of what is free, four megabytes at most, for it takes room to empty it."""
        pages = LOG_PAGES
        with contextlib.suppress(OSError):
            quarter = shutil.disk_usage(self.path.parent).free // 4
            pages = min(max(quarter // PAGE_BYTES, MIN_LOG_PAGES), LOG_PAGES)
        self._connection.execute(f"pragma wal_autocheckpoint = {pages}")

    def _upgrade(self, version: int, now: int) -> None:
        """From an empty database, or from an older schema, to this one, in one transaction."""
        execute = self._connection.execute
        execute("begin immediate")
        try:
            for number, script in enumerate((_SCHEMA, *self._migrations), 1):
                if number > version:
                    for statement in script.split(";"):
                        execute(statement)
            if version == 0:
                execute("insert into meta values (1, 0, ?, ?)", (now, os.urandom(16)))
            execute(f"pragma user_version = {self.version}")
            execute("commit")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                if self._connection.in_transaction:
                    execute("rollback")
            raise

    def reopen(self) -> None:
        """Drop the connection and take a new one: what the disk holds is the state. Raises StoreUnavailable."""
        try:
            self._connection.close()
            self._connection = self._connect(self.path)
            self._configure()
        except sqlite3.Error as error:
            raise self._unavailable(error) from error
        if not self.settle():
            raise StoreUnavailable("a reader holds the WAL, which cannot be trusted after the last failure")

    def settle(self) -> bool:
        """Bring to the disk what stands in the WAL; whether all of it is in the database itself, which a reader can
        keep it from. Raises StoreUnavailable.

        What a sync that failed, or that a killed process did not come to, was to bring may be missing on disk although
        reading shows it, and a repeat of it would be acknowledged without a commit. A later sync does not bring it
        back, so it is written once more; then a synced commit begins the WAL anew, for of one that was only cut the
        older pages could come back and hide what is in the database.
        """
        try:
            is_busy = self._checkpoint()
        except sqlite3.Error as error:
            raise self._unavailable(error) from error
        self.touch()
        return not is_busy

    def touch(self) -> None:
        """Write something that changes nothing, to see whether the disk takes it. Raises StoreUnavailable."""
        self.execute(f"pragma user_version = {self.version}")

    def make_room(self) -> bool:
        """On a full disk: the WAL, which grows up to four megabytes, is worth more as free space. Whether it is
        empty; it takes some room to empty it."""
        try:
            return not self._checkpoint()
        except sqlite3.Error:
            return False

    def cache(self, kilobytes: int = 0) -> None:
        """How much of the database to keep in memory, as usual without a number. Raises StoreUnavailable."""
        self.execute(f"pragma cache_size = {-(kilobytes or USUAL_CACHE)}")
        if not kilobytes:
            self.execute("pragma shrink_memory")

    def _checkpoint(self) -> bool:
        """Empty the WAL into the database; whether readers kept it from that."""
        self._connection.execute(f"pragma busy_timeout = {PATIENCE_MS}")
        ((is_busy, *_),) = self._connection.execute("pragma wal_checkpoint(truncate)")
        self._connection.execute("pragma busy_timeout = 5000")
        self._limit_log()
        return bool(is_busy)

    def abandon(self) -> None:
        """Let go of a database whose files were moved away."""
        with contextlib.suppress(AttributeError, sqlite3.Error):
            self._connection.close()

    def close(self) -> None:
        """Checkpoint and close; no WAL is left behind unless somebody reads or the disk refuses."""
        with contextlib.suppress(sqlite3.Error):
            self._checkpoint()
        self._connection.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Callable[[], bool]]:
        """One transaction: committed and synced at the end, rolled back on any exception.

        One that changed nothing costs no sync and gets no commit number; the function that is yielded tells
        afterwards whether there is one.
        """
        try:
            self.execute("begin immediate")
            before = self._connection.total_changes
            yield lambda: self._connection.total_changes > before
            if self._connection.total_changes > before:
                self.execute("update meta set commits = commits + 1")
            self.execute("commit")
        except BaseException as error:
            with contextlib.suppress(sqlite3.Error):
                if self._connection.in_transaction:
                    self._connection.execute("rollback")
            if isinstance(error, DISK_ERRORS):  # of a row that was being read
                raise self._unavailable(error) from error
            raise

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """What the block reads is of one commit. Raises StoreUnavailable."""
        self.execute("begin")
        try:
            yield
        except DISK_ERRORS as error:
            raise self._unavailable(error) from error
        finally:
            self.execute("commit")

    def resume(
        self, commits: int, scrapers: Iterable[str], joined: Iterable[tuple[str, str, str, int]], now: int
    ) -> int:  # fmt: skip
        """After a return to an older state: go on numbering where `commits` were; how many of them are gone.

        What is here was seen by every scraper that was ever answered; it must not be shown at 0 first again. The
        joined counters, by tool, model and kind, are at least what they were: their rows hold what was served.
        """
        ((found,),) = self.execute("select commits from meta")
        if found >= commits:
            return 0
        with self.transaction():
            self.execute("update meta set commits = ?", (commits,))
            self.executemany("insert or replace into scraper values (?, 0, ?)", ((key, now) for key in scrapers))
            self.execute("update scraper set shown = ?", (commits + 1,))
            for tool, model, kind, value in joined:
                self.execute("insert or ignore into model (tool, name) values (?, ?)", (tool, model))
                ((number,),) = self.execute("select id from model where tool = ? and name = ?", (tool, model))
                sql = "select value, born, birth from served where model = ? and kind = ?"
                shown, born, birth = self.execute(sql, (number, kind)).fetchone() or (0, commits + 1, now)
                self.write_served([(number, kind, max(value, shown), born, birth)])
        return commits - int(found)

    def snapshot(self, expired_before: int) -> Snapshot:
        """What memory needs of the state; series that left before `expired_before` (Unix ms) stay on disk."""
        with self.reading():
            ((commits, secret),) = self.execute("select commits, secret from meta")
            return Snapshot(
                commits,
                secret,
                [MetricRow(*row) for row in self.execute("select * from metric")],
                [
                    row
                    for row in map(proved_series, self.execute(SERIES))
                    if not row.expires or row.seen >= expired_before
                ],
                dict(map(proved, self.execute("select name, value, proof from total"))),
                [
                    TargetRow(job, instance, PAIRS.decode(attributes), seen)
                    for job, instance, attributes, seen in self.execute("select * from target")
                ],
                dict(self.execute("select key, shown from scraper order by rowid").fetchall()),
            )

    # --- streams, series, metrics ---

    def stream(self, key: bytes) -> StreamRow | None:
        row = self.execute("select id, series, writer, labelled from stream where key = ?", (key,)).fetchone()
        return row and StreamRow(*row)

    def add_stream(self, key: bytes, series: int, writer: int, labelled: bytes) -> StreamRow:
        """Insert a stream; the one of this key, if there is one already."""
        sql = "insert into stream (key, series, writer, labelled) values (?, ?, ?, ?) on conflict do nothing"
        cursor = self.execute(sql, (key, series, writer, labelled))
        known = None if cursor.rowcount else self.stream(key)
        return known or StreamRow(_rowid(cursor), series, writer, labelled)

    def move_stream(self, stream: int, series: int, labelled: bytes) -> None:
        self.execute("update stream set series = ?, labelled = ? where id = ?", (series, labelled, stream))

    def series(self, key: bytes) -> SeriesRow | None:
        row = self.execute(f"{SERIES} where key = ?", (key,)).fetchone()
        return row and series_row(row[:-2])

    def series_by_id(self, series: int) -> SeriesRow:
        row = self.execute(f"{SERIES} where series.id = ?", (series,)).fetchone()
        return series_row(row[:-2])

    def add_series(self, key: bytes, row: SeriesRow) -> tuple[SeriesRow, bool]:
        """Insert what stays of a series, with an id of its own; its value is written by `write_series`. The one of
        this key, if there is one already; and whether it is new."""
        labels, fixed = msgspec.json.encode(row.labels).decode(), proof(fixed_of(row))
        cursor = self.execute(
            "insert into series (key, metric, job, instance, labels, expires, base, born, birth, proof)"
            " values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) on conflict do nothing",
            (
                key, row.metric, row.job, row.instance, labels, int(row.expires), stored(row.base), row.born,
                row.birth, fixed,
            ),
        )  # fmt: skip
        known = None if cursor.rowcount else self.series(key)
        if known is not None:
            return known, False
        return msgspec.structs.replace(row, id=_rowid(cursor), fixed=fixed), True

    def restart_series(self, row: SeriesRow) -> SeriesRow:
        """Update what changes when a series comes back; its value is written by `write_series`."""
        fixed = proof(fixed_of(row))
        sql = "update series set base = ?, born = ?, birth = ?, proof = ? where id = ?"
        self.execute(sql, (stored(row.base), row.born, row.birth, fixed, row.id))
        return msgspec.structs.replace(row, fixed=fixed)

    def write_series(self, rows: Iterable[SeriesRow]) -> None:
        """Write what points change of series."""
        self.executemany(
            "insert or replace into series_value (id, value, time, seen, proof) values (?, ?, ?, ?, ?)",
            [(row.id, stored(row.value), row.time, row.seen, value_proof(row)) for row in rows],
        )

    def metric(self, name: str, kind: str, unit: str) -> MetricRow | None:
        row = self.execute(
            "select * from metric where name = ? and kind = ? and unit = ?", (name, kind, unit)
        ).fetchone()
        return row and MetricRow(*row)

    def add_metric(self, row: MetricRow) -> MetricRow:
        """Insert a metric; the id of `row` is ignored, the result has the right one."""
        cursor = self.execute(
            "insert into metric (name, kind, unit, scale, description) values (?, ?, ?, ?, ?)", row[1:]
        )
        return row._replace(id=_rowid(cursor))

    # --- identities ---

    def writer(self, key: bytes, seen: int) -> tuple[WriterRow, bool]:
        """The writer of this key, made if there is none, and whether it was."""
        row = self.execute("select id, latest, forgotten from writer where key = ?", (key,)).fetchone()
        if row:
            return WriterRow(*row), False
        cursor = self.execute(
            "insert into writer (key, latest, forgotten, seen) values (?, 0, -1, ?)", (key, seen)
        )  # fmt: skip
        return WriterRow(_rowid(cursor), 0, -1), True

    def writer_by_id(self, writer: int) -> WriterRow:
        return WriterRow(
            *self.execute("select id, latest, forgotten from writer where id = ?", (writer,)).fetchone()
        )  # fmt: skip

    def write_writers(self, rows: Iterable[tuple[int, int, int]]) -> None:
        """Rows of (latest, seen, id)."""
        self.executemany("update writer set latest = ?, seen = ? where id = ?", rows)

    def delta_members(self, writer: int, time: int) -> bytes:
        row = self.execute("select members from delta_point where writer = ? and time = ?", (writer, time)).fetchone()
        return row[0] if row else b""

    def write_delta_members(self, rows: Iterable[tuple[int, int, bytes]]) -> None:
        self.executemany("insert or replace into delta_point (writer, time, members) values (?, ?, ?)", rows)

    def run(self, stream: int, start: int) -> Run | None:
        """The run of a stream that began at `start`."""
        row = self.execute(
            "select highest, first, last from run where stream = ? and start = ? and inferred = 0", (stream, start)
        ).fetchone()
        return row and run_row(row)

    def run_at(self, stream: int, time: int) -> tuple[int, int, Run, bool] | None:
        """For a point whose start was not sent: the run that began last at or before `time`, else the earliest one.

        The run's start, whether that is inferred, the run, and whether it is the stream's current one.
        """
        row = self.execute(
            "select start, inferred, highest, first, last, first = (select max(first) from run where stream = ?1)"
            " from run where stream = ?1 order by first <= ?2 desc, abs(first - ?2) limit 1",
            (stream, time),
        ).fetchone()
        return row and (row[0], row[1], run_row(row[2:5]), bool(row[5]))

    def write_runs(self, runs: Mapping[tuple[int, int, int], Run]) -> None:
        """Runs by (stream, start, whether the start is inferred)."""
        self.executemany(
            "insert or replace into run (stream, start, inferred, highest, first, last) values (?, ?, ?, ?, ?, ?)",
            ((*key, stored(run.highest), run.first, run.last) for key, run in runs.items()),
        )

    def has_request(self, body_hash: bytes) -> bool:
        return self.execute("select 1 from request where hash = ?", (body_hash,)).fetchone() is not None

    def write_requests(self, hashes: Iterable[bytes], seen: int) -> None:
        self.executemany("insert into request values (?, ?)", ((body_hash, seen) for body_hash in hashes))

    def forget(self, before: int) -> int:
        """Delete the identities of writers that were silent since `before` (Unix ms); the number of writers.

        The mark stays: the latest end of each forgotten writer. Cumulative runs stay.
        """
        self.execute("delete from request where seen < ?", (before,))
        writers = self.execute(
            "select id from writer where seen < ? and forgotten < latest limit 1000", (before,)
        ).fetchall()
        for (writer,) in writers:
            self.execute("delete from delta_point where writer = ?", (writer,))
            self.execute("update writer set forgotten = latest where id = ?", (writer,))
        return len(writers)

    # --- totals, targets, scrapers ---

    def write_totals(self, totals: Iterable[tuple[str, int]]) -> None:
        self.executemany(
            "insert or replace into total (name, value, proof) values (?, ?, ?)", ((*row, proof(row)) for row in totals)
        )

    def write_served(self, rows: Iterable[tuple[int, str, int, int, int]]) -> None:
        """Rows of (model, kind, value, born, birth)."""
        self.executemany(
            "insert or replace into served (model, kind, value, born, birth, proof) values (?, ?, ?, ?, ?, ?)",
            ((*row, proof(row)) for row in rows),
        )

    def write_target(self, target: TargetRow) -> None:
        attributes = msgspec.json.encode(target.attributes).decode()
        self.execute(
            "insert or replace into target values (?, ?, ?, ?)",
            (target.job, target.instance, attributes, target.seen),
        )

    def write_scrapers(self, scrapers: Iterable[tuple[str, int]], seen: int) -> None:
        """Note the commits that scrapers were shown, from the one that scraped longest ago to the latest."""
        self.execute("delete from scraper")
        self.executemany("insert into scraper values (?, ?, ?)", ((key, shown, seen) for key, shown in scrapers))


def _rowid(cursor: sqlite3.Cursor) -> int:
    return cursor.lastrowid or 0  # every caller has just inserted a row


# --- a look from outside ---------------------------------------------------------------------------------------


class Inspection(NamedTuple):
    """What `doctor` asks of a database. Only `version` is set where the schema is not this program's."""

    version: int
    commits: int = 0
    has_deltas: bool = False
    has_runs: bool = False
    scrapers: tuple[tuple[str, int], ...] = ()


def inspect(directory: Path) -> Inspection | None:
    """A look at the database, also while a bridge writes it; None where there is none. Raises StoreUnavailable."""
    path = directory / DATABASE
    try:
        if not path.exists():
            return None
        # Without a WAL nobody has it open, and reading it in the usual way would leave files behind.
        mode = "mode=ro" if is_open(str(path)) else "immutable=1"
        with contextlib.closing(open_to_read(str(path), mode)) as connection:
            (version,) = connection.execute("pragma user_version").fetchone()
            if version != SCHEMA_VERSION:
                return Inspection(version)
            row = connection.execute(
                "select commits, exists (select 1 from delta_point), exists (select 1 from run) from meta"
            ).fetchone()
            scrapers = connection.execute("select key, seen from scraper order by seen desc").fetchall()
            return Inspection(version, row[0], bool(row[1]), bool(row[2]), tuple(scrapers))
    except sqlite3.Error as error:
        raise unavailable(error) from error
    except OSError as error:
        raise StoreUnavailable(f"{path}: {error.strerror}") from error
