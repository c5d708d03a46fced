"""The state on disk: one SQLite file, and the only code that knows SQL.

Law: exactly one connection writes, the daemon's, from one thread; others open the file read-only. Every write
stands in a transaction that ends with a synced commit (WAL, synchronous=FULL), so after a crash the file holds
exactly the commits that returned, or one more. A commit number counts them.

Tables, with what bounds them:
  series       one row a counter or gauge, its lifetime value; never deleted
  stream       one row an OTLP stream: which series it feeds and who writes it
  run          one row a cumulative run, for ever (24 bytes of payload)
  delta_point  one row (writer, end time): 8 bytes a point, until 7 days after the writer's last point
  writer       one row a session or service instance, for ever: the latest end that was forgotten
  request      body hashes of requests whose points have no identity of their own, 7 days
  total        the lifetime totals of the XRG profile
  target       resource attributes by job and instance
"""

import contextlib
import fcntl
import math
import os
import sqlite3
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from bridge.model import ExponentialHistogram, Histogram, Summary, Value
from bridge.temporality import Run

SCHEMA_VERSION = 1
DATABASE = "state.db"
LOCK = "lock"

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
    job text not null, instance text not null, labels text not null, value, base, time integer not null,
    born integer not null, birth integer not null, seen integer not null, expires integer not null
);
create table stream (
    id integer primary key, key blob not null unique, series integer not null, writer integer not null,
    labelled blob not null
);
create table run (
    stream integer not null, start integer not null, highest not null, first integer not null, last integer not null,
    inferred integer not null, primary key (stream, start, inferred)
) without rowid;
create table writer (
    id integer primary key, key blob not null unique, latest integer not null, forgotten integer not null,
    seen integer not null
);
create table delta_point (
    writer integer not null, time integer not null, members blob not null, primary key (writer, time)
) without rowid;
create table request (hash blob primary key, seen integer not null) without rowid;
create table total (name text primary key, value integer not null) without rowid;
create table target (
    job text not null, instance text not null, attributes text not null, seen integer not null,
    primary key (job, instance)
) without rowid;
create table scraper (
    key text primary key, shown integer not null, seen integer not null
) without rowid;
"""


class StoreUnavailable(Exception):
    """The disk or the database did not do what was asked. The text says why; the transaction may have reached the
    disk or not, except on a full disk, where it did not."""

    def __init__(self, message: str, *, disk_full: bool = False) -> None:
        super().__init__(message)
        self.disk_full = disk_full


class StateError(Exception):
    """The state cannot be used; `exit_code` is a sysexits code, the text says what, where and what to do."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


# --- the directory ---------------------------------------------------------------------------------------------


def prepare_directory(directory: Path) -> str | None:
    """Create the state directory for its owner alone; one line for the log if its permissions were tightened.

    Raises StateError when it cannot be made (73), belongs to somebody else or is no real directory (77).
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.lstat()
    except FileExistsError:
        raise StateError(f"{directory} is not a directory; choose another with --state-dir", os.EX_NOPERM) from None
    except OSError as error:
        raise StateError(
            f"cannot create state directory {directory}: {error.strerror}; choose another with --state-dir",
            os.EX_CANTCREAT,
        ) from None
    if stat.S_ISLNK(found.st_mode):
        found = directory.stat()
    if found.st_uid != os.geteuid():
        raise StateError(
            f"state directory {directory} belongs to uid {found.st_uid}, not to this user; choose another with"
            " --state-dir",
            os.EX_NOPERM,
        )
    if stat.S_IMODE(found.st_mode) & 0o077:
        directory.chmod(0o700)
        return f"state directory {directory} was open to others; its mode is now 0700"
    return None


def lock(directory: Path) -> int:
    """Take the one lock of a state directory; the descriptor holds it until the process ends.

    Raises StateError 75 with the other bridge's process id, 73 when the directory cannot be written.
    """
    path = directory / LOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StateError(f"state directory is not writable: {path}: {error.strerror}", os.EX_CANTCREAT) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise StateError(
            f"state {directory} is in use by another bridge, pid {owner}; stop it or choose another --state-dir",
            os.EX_TEMPFAIL,
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


# --- rows ------------------------------------------------------------------------------------------------------


class MetricRow(NamedTuple):
    id: int
    name: str
    kind: str
    unit: str
    scale: int
    description: str


class SeriesRow(NamedTuple):
    """One series. Numbers are in 1/scale of the unit; what is shown is value - base. None: a gauge that has ended.

    `time` is the latest point's (gauges take the later one), `seen` the arrival of the last point in Unix
    milliseconds, `born` the commit in which the series appeared or came back and `birth` its time, `expires`
    whether it leaves when its sender is silent.
    """

    id: int
    metric: int
    job: str
    instance: str
    labels: tuple[tuple[str, str], ...]
    value: Value | None
    base: Value
    time: int
    born: int
    birth: int
    seen: int
    expires: bool


class StreamRow(NamedTuple):
    id: int
    series: int
    writer: int
    labelled: bytes


class WriterRow(NamedTuple):
    id: int
    latest: int
    forgotten: int


class TargetRow(NamedTuple):
    job: str
    instance: str
    attributes: tuple[tuple[str, str], ...]
    seen: int


class Snapshot(NamedTuple):
    """All that memory holds of the state, at one commit."""

    commits: int
    secret: bytes
    metrics: list[MetricRow]
    series: list[SeriesRow]
    totals: dict[str, int]
    targets: list[TargetRow]
    scrapers: dict[str, int]


_PAIRS = msgspec.json.Decoder(tuple[tuple[str, str], ...])
_SERIES_COLUMNS = "id, metric, job, instance, labels, value, base, time, born, birth, seen, expires"
_VALUES = msgspec.msgpack.Decoder(Histogram | ExponentialHistogram | Summary)


def _stored(value: Value | None) -> int | float | bytes | str | None:
    if isinstance(value, float) and math.isnan(value):
        return "NaN"  # SQLite would make it NULL
    return msgspec.msgpack.encode(value) if isinstance(value, msgspec.Struct) else value


def _value(stored: Any) -> Any:
    if isinstance(stored, bytes):
        return _VALUES.decode(stored)
    return math.nan if stored == "NaN" else stored


def _series_row(row: tuple[Any, ...]) -> SeriesRow:
    series_id, metric, job, instance, labels, value, base, time, born, birth, seen, expires = row
    return SeriesRow(
        series_id, metric, job, instance, _PAIRS.decode(labels), _value(value), _value(base), time, born, birth, seen,
        bool(expires),
    )  # fmt: skip


def _run(row: tuple[Any, ...]) -> Run:
    return Run(_value(row[0]), *row[1:])


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


class Store:
    """The database of one bridge. Not thread-safe: after `open`, one thread calls it.

    Every method raises StoreUnavailable where SQLite fails; the caller then calls `reopen`, because after a
    failed sync only the disk knows what is there.
    """

    def __init__(self, directory: Path, connect: Connect = connect) -> None:
        self.path = directory / DATABASE
        self._connect = connect
        self._connection: sqlite3.Connection

    # Foreign errors stop here.
    def _execute(self, sql: str, parameters: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        try:
            return self._connection.execute(sql, parameters)
        except sqlite3.Error as error:
            raise _unavailable(error) from error

    def _executemany(self, sql: str, rows: Iterable[tuple[Any, ...]]) -> None:
        try:
            self._connection.executemany(sql, rows)
        except sqlite3.Error as error:
            raise _unavailable(error) from error

    def open(self, now: int) -> None:
        """Open or create the database. StateError 65: newer schema or not ours; 74: cannot be read or written."""
        try:
            self._connection = self._connect(self.path)
            (version,) = self._connection.execute("pragma user_version").fetchone()
            (tables,) = self._connection.execute("select count(*) from sqlite_schema").fetchone()
            if version == 0 and tables == 0:
                self._create(now)
            elif version > SCHEMA_VERSION:
                raise StateError(
                    f"{self.path} has schema {version}, this version knows up to {SCHEMA_VERSION}; install the newer"
                    " version again",
                    os.EX_DATAERR,
                )
            elif version == 0:
                raise StateError(
                    f"{self.path} is not a database of this program; move it away or choose another --state-dir",
                    os.EX_DATAERR,
                )
            else:
                self._configure()
        except sqlite3.DatabaseError as error:
            damaged = "malformed" in str(error) or "not a database" in str(error)
            advice = "restore a backup or move it away" if damaged else "check the disk and its permissions"
            raise StateError(
                f"cannot open {self.path}: {error}; {advice}", os.EX_DATAERR if damaged else os.EX_IOERR
            ) from None
        with contextlib.suppress(OSError):
            for path in self.path.parent.glob(f"{DATABASE}*"):
                path.chmod(0o600)

    def _configure(self) -> None:
        for pragma in _PRAGMAS:
            self._connection.execute(f"pragma {pragma}")

    def _create(self, now: int) -> None:
        self._configure()
        self._connection.execute("begin immediate")
        for statement in _SCHEMA.split(";"):
            self._connection.execute(statement)
        self._connection.execute("insert into meta values (1, 0, ?, ?)", (now, os.urandom(16)))
        self._connection.execute(f"pragma user_version = {SCHEMA_VERSION}")
        self._connection.execute("commit")

    def reopen(self) -> None:
        """Drop the connection and take a new one: what the disk holds is the state."""
        try:
            self._connection.close()
            self._connection = self._connect(self.path)
            self._configure()
        except sqlite3.Error as error:
            raise _unavailable(error) from error

    def close(self) -> None:
        """Checkpoint and close; no WAL is left behind unless somebody reads or the disk refuses."""
        with contextlib.suppress(sqlite3.Error):
            self._connection.execute("pragma busy_timeout = 100")
            self._connection.execute("pragma wal_checkpoint(truncate)")
        self._connection.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Callable[[], bool]]:
        """One transaction: committed and synced at the end, rolled back on any exception.

        One that changed nothing costs no sync and gets no commit number; the function that is yielded tells
        afterwards whether there is one.
        """
        self._execute("begin immediate")
        try:
            before = self._connection.total_changes
            yield lambda: self._connection.total_changes > before
            if self._connection.total_changes > before:
                self._execute("update meta set commits = commits + 1")
            self._execute("commit")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                if self._connection.in_transaction:
                    self._connection.execute("rollback")
            raise

    def snapshot(self, expired_before: int) -> Snapshot:
        """What memory needs of the state; series that left before `expired_before` (Unix ms) stay on disk."""
        self._execute("begin")
        try:
            ((commits, secret),) = self._execute("select commits, secret from meta")
            return Snapshot(
                commits,
                secret,
                [MetricRow(*row) for row in self._execute("select * from metric")],
                [
                    _series_row(row)
                    for row in self._execute(
                        f"select {_SERIES_COLUMNS} from series where not expires or seen >= ?", (expired_before,)
                    )
                ],
                dict(self._execute("select name, value from total").fetchall()),
                [
                    TargetRow(job, instance, _PAIRS.decode(attributes), seen)
                    for job, instance, attributes, seen in self._execute("select * from target")
                ],
                dict(self._execute("select key, shown from scraper").fetchall()),
            )
        finally:
            self._execute("commit")

    # --- streams, series, metrics ---

    def stream(self, key: bytes) -> StreamRow | None:
        row = self._execute("select id, series, writer, labelled from stream where key = ?", (key,)).fetchone()
        return row and StreamRow(*row)

    def add_stream(self, key: bytes, series: int, writer: int, labelled: bytes) -> StreamRow:
        sql = "insert into stream (key, series, writer, labelled) values (?, ?, ?, ?)"
        return StreamRow(_rowid(self._execute(sql, (key, series, writer, labelled))), series, writer, labelled)

    def move_stream(self, stream: int, series: int, labelled: bytes) -> None:
        self._execute("update stream set series = ?, labelled = ? where id = ?", (series, labelled, stream))

    def series(self, key: bytes) -> SeriesRow | None:
        row = self._execute(f"select {_SERIES_COLUMNS} from series where key = ?", (key,)).fetchone()
        return row and _series_row(row)

    def series_by_id(self, series: int) -> SeriesRow:
        row = self._execute(f"select {_SERIES_COLUMNS} from series where id = ?", (series,)).fetchone()
        return _series_row(row)

    def add_series(self, key: bytes, row: SeriesRow) -> SeriesRow:
        """Insert a series; the id of `row` is ignored, the result has the right one."""
        labels = msgspec.json.encode(row.labels).decode()
        cursor = self._execute(
            "insert into series (key, metric, job, instance, labels, value, base, time, born, birth, seen, expires)"
            " values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (key, row.metric, row.job, row.instance, labels, _stored(row.value), _stored(row.base), *row[7:]),
        )
        return row._replace(id=_rowid(cursor))

    def write_series(self, rows: Iterable[SeriesRow]) -> None:
        """Update what can change of a series."""
        self._executemany(
            "update series set value = ?, base = ?, time = ?, born = ?, birth = ?, seen = ? where id = ?",
            ((_stored(row.value), _stored(row.base), row.time, row.born, row.birth, row.seen, row.id) for row in rows),
        )

    def metric(self, name: str, kind: str, unit: str) -> MetricRow | None:
        row = self._execute(
            "select * from metric where name = ? and kind = ? and unit = ?", (name, kind, unit)
        ).fetchone()
        return row and MetricRow(*row)

    def add_metric(self, row: MetricRow) -> MetricRow:
        """Insert a metric; the id of `row` is ignored, the result has the right one."""
        cursor = self._execute(
            "insert into metric (name, kind, unit, scale, description) values (?, ?, ?, ?, ?)", row[1:]
        )
        return row._replace(id=_rowid(cursor))

    # --- identities ---

    def writer(self, key: bytes, seen: int) -> WriterRow:
        """The writer of this key, made if there is none."""
        row = self._execute("select id, latest, forgotten from writer where key = ?", (key,)).fetchone()
        if row:
            return WriterRow(*row)
        cursor = self._execute(
            "insert into writer (key, latest, forgotten, seen) values (?, 0, -1, ?)", (key, seen)
        )  # fmt: skip
        return WriterRow(_rowid(cursor), 0, -1)

    def writer_by_id(self, writer: int) -> WriterRow:
        return WriterRow(
            *self._execute("select id, latest, forgotten from writer where id = ?", (writer,)).fetchone()
        )  # fmt: skip

    def write_writers(self, rows: Iterable[tuple[int, int, int]]) -> None:
        """Rows of (latest, seen, id)."""
        self._executemany("update writer set latest = ?, seen = ? where id = ?", rows)

    def delta_members(self, writer: int, time: int) -> bytes:
        row = self._execute("select members from delta_point where writer = ? and time = ?", (writer, time)).fetchone()
        return row[0] if row else b""

    def write_delta_members(self, rows: Iterable[tuple[int, int, bytes]]) -> None:
        self._executemany("insert or replace into delta_point (writer, time, members) values (?, ?, ?)", rows)

    def run(self, stream: int, start: int) -> Run | None:
        """The run of a stream that began at `start`."""
        row = self._execute(
            "select highest, first, last from run where stream = ? and start = ? and inferred = 0", (stream, start)
        ).fetchone()
        return row and _run(row)

    def run_at(self, stream: int, time: int) -> tuple[int, int, Run, bool] | None:
        """For a point whose start was not sent: the run that began last at or before `time`, else the earliest one.

        The run's start, whether that is inferred, the run, and whether it is the stream's current one.
        """
        row = self._execute(
            "select start, inferred, highest, first, last, first = (select max(first) from run where stream = ?1)"
            " from run where stream = ?1 order by first <= ?2 desc, abs(first - ?2) limit 1",
            (stream, time),
        ).fetchone()
        return row and (row[0], row[1], _run(row[2:5]), bool(row[5]))

    def write_runs(self, runs: Mapping[tuple[int, int, int], Run]) -> None:
        """Runs by (stream, start, whether the start is inferred)."""
        self._executemany(
            "insert or replace into run (stream, start, inferred, highest, first, last) values (?, ?, ?, ?, ?, ?)",
            ((*key, _stored(run.highest), run.first, run.last) for key, run in runs.items()),
        )

    def has_request(self, body_hash: bytes) -> bool:
        return self._execute("select 1 from request where hash = ?", (body_hash,)).fetchone() is not None

    def write_requests(self, hashes: Iterable[bytes], seen: int) -> None:
        self._executemany("insert into request values (?, ?)", ((body_hash, seen) for body_hash in hashes))

    def forget(self, before: int) -> int:
        """Delete the identities of writers that were silent since `before` (Unix ms); the number of writers.

        The mark stays: the latest end of each forgotten writer. Cumulative runs stay.
        """
        self._execute("delete from request where seen < ?", (before,))
        writers = self._execute(
            "select id from writer where seen < ? and forgotten < latest limit 1000", (before,)
        ).fetchall()
        for (writer,) in writers:
            self._execute("delete from delta_point where writer = ?", (writer,))
            self._execute("update writer set forgotten = latest where id = ?", (writer,))
        return len(writers)

    # --- totals, targets, scrapers ---

    def write_totals(self, totals: Iterable[tuple[str, int]]) -> None:
        self._executemany("insert or replace into total values (?, ?)", totals)

    def write_target(self, target: TargetRow) -> None:
        attributes = msgspec.json.encode(target.attributes).decode()
        self._execute(
            "insert or replace into target values (?, ?, ?, ?)",
            (target.job, target.instance, attributes, target.seen),
        )

    def write_scraper(self, key: str, shown: int, seen: int, keep: int) -> None:
        """Note the commit that a scraper was shown; only the `keep` latest scrapers are kept."""
        self._execute("insert or replace into scraper values (?, ?, ?)", (key, shown, seen))
        self._execute(
            "delete from scraper where key not in (select key from scraper order by seen desc limit ?)", (keep,)
        )


def _rowid(cursor: sqlite3.Cursor) -> int:
    return cursor.lastrowid or 0  # every caller has just inserted a row


def _unavailable(error: sqlite3.Error) -> StoreUnavailable:
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    return StoreUnavailable(f"{error} ({name})", disk_full=name == "SQLITE_FULL")
