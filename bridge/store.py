"""The state on disk: one SQLite file, and the only code that knows SQL.

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
import errno
import fcntl
import math
import os
import re
import shutil
import sqlite3
import stat
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from sys import intern
from typing import Any, NamedTuple

import msgspec

from bridge.database import DATABASE as DATABASE
from bridge.database import LOCK as LOCK
from bridge.database import MIGRATIONS as MIGRATIONS
from bridge.database import SCHEMA_VERSION as SCHEMA_VERSION
from bridge.database import is_open, open_to_read
from bridge.descriptors import ADVICE, ran_out
from bridge.model import ExponentialHistogram, Histogram, Summary, Value, shared
from bridge.temporality import Run

SERVED = "served.bin"
DISK_ERRORS = (sqlite3.Error, UnicodeDecodeError)
"""What reading and writing can raise; the second where a flipped bit has made text that is none."""
USUAL_CACHE = 2_000
"""Kilobytes of pages in memory."""
PATIENCE_MS = 100
"""How long a checkpoint that must not hold anybody up waits for readers."""
PAGE_BYTES, MIN_LOG_PAGES, LOG_PAGES = 4096, 16, 1000
"""Of the write-ahead log, which is emptied into the database when it is so long."""
THOROUGH_BYTES = 64 * 2**20
"""Up to this size a start compares every index with its table as well: a hundredth of a second for 20 MB."""
KEPT_COPIES, KEPT_DAYS = 3, 7
"""Of every schema version the newest copies stay, and the newest of each of as many days."""

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


class StoreUnavailable(Exception):
    """The disk or the database did not do what was asked. The text says why; the transaction may have reached the
    disk or not, except where the disk takes no writes now (full, over quota, read-only, no descriptor left), where it
    did not."""

    def __init__(self, message: str, *, disk_full: bool = False) -> None:
        super().__init__(message)
        self.disk_full = disk_full


class StateError(Exception):
    """The state cannot be used; `exit_code` is a sysexits code, the text says what, where and what to do."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Damaged(StateError):
    """The database is there and cannot be believed, or is gone although it was there. A copy may replace it: `finding`
    says what there is, the text also what can be done."""

    def __init__(self, finding: str, advice: str) -> None:
        super().__init__(f"{finding}; {advice}", os.EX_DATAERR)
        self.finding = finding


# --- the directory ---------------------------------------------------------------------------------------------


def prepare_directory(directory: Path) -> str | None:
    """Create the state directory for its owner alone; one line for the log if its permissions were tightened.

    Raises StateError when it cannot be made (73), belongs to somebody else or is no real directory, when others could
    exchange it, when it is shared or holds what is not ours, so that it must not be closed to others, or when a file
    in it is a link (77).
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
    _require_own_files(directory)
    if stat.S_IMODE(found.st_mode) & 0o077:
        _require_own_directory(directory, found.st_mode)
        directory.chmod(0o700)
        return f"state directory {directory} was open to others; its mode is now 0700"
    return None


def _require_own_directory(directory: Path, mode: int) -> None:
    """Refuse a directory that others use, before it is closed to them."""
    names = {path.name for path in directory.iterdir()} - {"lost+found"}
    if mode & stat.S_ISVTX:
        what = f"is shared with others; choose a directory of its own, as in {directory / 'claude-otel-bridge'}"
    elif names and names.isdisjoint((DATABASE, SERVED)):
        what = f"holds other files; choose a directory of its own with --state-dir, or chmod 700 {directory}"
    else:
        return
    raise StateError(
        f"state directory {directory} is open to others (mode {stat.S_IMODE(mode):04o}) and {what}", os.EX_NOPERM
    )


def _require_own_files(directory: Path) -> None:
    """Refuse files that somebody else has put in our place, or could: our writes would go where he wants."""
    for parent in directory.resolve().parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise StateError(
                f"{parent} may be written by everybody, so that anybody could exchange the state; chmod o-w {parent},"
                " or choose another --state-dir",
                os.EX_NOPERM,
            )
    for name in (LOCK, DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm", SERVED):
        path = directory / name
        with contextlib.suppress(FileNotFoundError):
            found = path.lstat()
            is_link = stat.S_ISLNK(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_nlink != 1)
            if is_link or found.st_uid != os.geteuid():
                raise StateError(
                    f"{path} is a link or belongs to another user; see where it leads, and move it away",
                    os.EX_NOPERM,
                )


def lock(directory: Path, instance: str = "") -> int:
    """Take the one lock of a state directory; the descriptor holds it until the process ends.

    The file names the process and, for `doctor`, what this run of the bridge calls itself.

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
        owner = os.read(descriptor, 64).decode(errors="replace").partition("\n")[0].strip() or "unknown"
        os.close(descriptor)
        raise StateError(
            f"state {directory} is in use by another bridge, pid {owner}; stop it or choose another --state-dir",
            os.EX_TEMPFAIL,
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n{instance}".encode(), 0)
    return descriptor


def holder(directory: Path) -> tuple[str, str]:
    """The process and the name of the bridge that took the lock last; empty where none did."""
    try:
        process, _, instance = (directory / LOCK).read_text().partition("\n")
    except (OSError, UnicodeDecodeError):
        return "", ""
    return process.strip(), instance.strip()


# --- copies ----------------------------------------------------------------------------------------------------


class Copy(NamedTuple):
    """A copy of the database: its schema version, the commit that it stands at, and its size in bytes."""

    path: Path
    version: int
    commits: int
    size: int


_COPY_NAME = re.compile(r"state-v(\d+)-((\d{8})T\d{9})Z\.db")


def back_up(directory: Path, target: Path) -> Copy:
    """Copy the database of a state directory, as of one transaction, to a new file, synced and read again.

    It only reads, whether a bridge runs there or not; nobody waits for it. Raises StateError: 66 when there is no
    database, 65 when it is damaged, 73 when the target exists or cannot be made, 74 when the disk fails.
    """
    source = directory / DATABASE
    if not source.exists():
        raise StateError(f"there is no state in {directory}; name its place with --state-dir", os.EX_NOINPUT)
    try:
        # The name is taken first: O_EXCL overwrites nothing and follows no link.
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        raise StateError(f"{target} exists already; choose another name", os.EX_CANTCREAT) from None
    except OSError as error:
        raise StateError(f"cannot create {target}: {error.strerror}", os.EX_CANTCREAT) from None
    partial: Path | None = None
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(descriptor)
        partial = Path(name)
        with contextlib.closing(open_to_read(str(source))) as connection:
            connection.execute("vacuum into ?", (str(partial.absolute()),))
        copy = _read_copy(partial)
        sync(partial)
        partial.replace(target)
        sync(target.parent)
    except BaseException as error:
        for leftover in (partial, target):
            if leftover is not None:
                leftover.unlink(missing_ok=True)
        if isinstance(error, sqlite3.Error):
            reason, code = _verdict(error)
            raise StateError(f"cannot copy {source} to {target}: {error}; {reason}", code) from None
        if isinstance(error, OSError):
            raise StateError(f"cannot write {target}: {error.strerror}", os.EX_IOERR) from None
        raise
    return copy._replace(path=target)


def whole_copies(directory: Path, version: int) -> Iterator[Copy]:
    """The copies that a program of this schema can go on from, newest first, each read to its last row."""
    for path in copies(directory):
        with contextlib.suppress(*DISK_ERRORS, StoreUnavailable):
            if _copy_name(path)[0] <= version:
                copy = _read_copy(path)
                with contextlib.closing(open_to_read(str(path))) as connection:
                    check_rows(connection)
                yield copy


def _read_copy(path: Path) -> Copy:
    """What stands in a copy; raises sqlite3.DatabaseError when it is not whole or not ours."""
    with contextlib.closing(open_to_read(str(path))) as connection:
        ((finding,),) = connection.execute("pragma quick_check(1)")
        if finding != "ok":
            raise sqlite3.DatabaseError(f"database disk image is malformed: {finding}")
        ((version,),) = connection.execute("pragma user_version")
        ((commits,),) = connection.execute("select commits from meta")
    return Copy(path, version, commits, path.stat().st_size)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copies(directory: Path) -> list[Path]:
    """The copies that a bridge made of its database, newest first."""
    found = (path for path in directory.glob("state-v*.db") if _COPY_NAME.fullmatch(path.name))
    return sorted((path for path in found if path.stat().st_size), key=lambda path: _copy_name(path)[1], reverse=True)


def _copy_name(path: Path) -> tuple[int, str, str]:
    """Schema version, time and day, as the name says."""
    version, time, day = _COPY_NAME.fullmatch(path.name).groups()  # type: ignore[union-attr]  # copies() has matched
    return int(version), time, day


def newest_copy_time(directory: Path) -> int:
    """When the newest copy was made, Unix ms; 0 where there is none."""
    newest = next(iter(copies(directory)), None)
    if newest is None:
        return 0
    return int(datetime.strptime(_copy_name(newest)[1] + "000Z", "%Y%m%dT%H%M%S%f%z").timestamp() * 1000)


def time_in_names(now: int) -> str:
    """A time (Unix ms) as file names have it."""
    return f"{datetime.fromtimestamp(now // 1000, UTC):%Y%m%dT%H%M%S}{now % 1000:03d}"


def keep_copy(directory: Path, version: int, now: int) -> Copy:
    """Copy the database beside itself and remove the copies that this one makes superfluous. Raises StateError."""
    size = (directory / DATABASE).stat().st_size
    if shutil.disk_usage(directory).free < 4 * size:
        raise StateError(f"no room for a copy of {directory / DATABASE}, {size} bytes; free some space", os.EX_IOERR)
    for found in (*directory.glob(".state-v*"), *directory.glob("state-v*.db")):
        if found.name.startswith(".") or not found.stat().st_size:  # left by a copy that was cut short
            found.unlink(missing_ok=True)
    while (target := directory / f"state-v{version}-{time_in_names(now)}Z.db").exists():
        now += 1
    copy = back_up(directory, target)
    for path in superfluous(copies(directory)):
        path.unlink(missing_ok=True)
    return copy


def superfluous(newest_first: Iterable[Path]) -> list[Path]:
    """Which copies need not stay."""
    kept: Counter[int] = Counter()
    days: dict[int, set[str]] = {}
    result = []
    for path in newest_first:
        version, _, day = _copy_name(path)
        of_version = days.setdefault(version, set())
        is_new_day = day not in of_version and len(of_version) < KEPT_DAYS
        if kept[version] < KEPT_COPIES or is_new_day:
            kept[version] += 1
            of_version.add(day)
        else:
            result.append(path)
    return result


def _way_out(directory: Path, version: int) -> str:
    """What to do when the database cannot be used: the newest copy that this version can read, if there is one."""
    usable = next((path for path in copies(directory) if _copy_name(path)[0] <= version), None)
    return f"restore the newest copy, {usable}, as the README says" if usable else "restore a backup"


# --- rows ------------------------------------------------------------------------------------------------------


class MetricRow(NamedTuple):
    id: int
    name: str
    kind: str
    unit: str
    scale: int
    description: str


class SeriesRow(msgspec.Struct, frozen=True, gc=False):
    """One series. Numbers are in 1/scale of the unit; what is shown is value - base. None: a gauge that has ended.

    One is made for nearly every point, which as a named tuple would take five times as long; so `fixed` keeps the
    checksum of all that a point leaves as it is.
    `expires` says whether it leaves when its sender is silent, `born` is the commit in which it appeared or came back
    and `birth` its time, `time` is the latest point's (gauges take the later one), `seen` the arrival of the last
    point in Unix milliseconds.
    """

    id: int
    metric: int
    job: str
    instance: str
    labels: tuple[tuple[str, str], ...]
    expires: bool
    base: Value
    born: int
    birth: int
    value: Value | None
    time: int
    seen: int
    fixed: int = 0


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
_SERIES = (
    "select series.id, metric, job, instance, labels, expires, base, born, birth, value, time, seen, series.proof,"
    " series_value.proof from series left join series_value on series_value.id = series.id"
)


def proof(row: tuple[Any, ...]) -> int:
    """The checksum that stands in a row beside what it proves."""
    return zlib.crc32(msgspec.msgpack.encode(row))


def proved(row: tuple[Any, ...]) -> tuple[Any, ...]:
    """A row without its checksum, which stands last. Raises StoreUnavailable when it is not what was written."""
    if proof(row[:-1]) != row[-1]:
        raise StoreUnavailable(f"database disk image is malformed: a row was changed: {row[:2]}")
    return row[:-1]


_VALUES = msgspec.msgpack.Decoder(Histogram | ExponentialHistogram | Summary)


def _stored(value: Value | None) -> int | float | bytes | str | None:
    if type(value) is int:
        return value
    if isinstance(value, float) and math.isnan(value):
        return "NaN"  # SQLite would make it NULL
    return msgspec.msgpack.encode(value) if isinstance(value, msgspec.Struct) else value


def _value(stored: Any) -> Any:
    if isinstance(stored, bytes):
        return _VALUES.decode(stored)
    return math.nan if stored == "NaN" else stored


def _series_row(row: tuple[Any, ...]) -> SeriesRow:
    """A row of `_SERIES` without its checksums."""
    series_id, metric, job, instance, labels, expires, base, born, birth, value, time, seen = row
    pairs = shared(_PAIRS.decode(labels))
    fixed = (metric, intern(job), intern(instance), pairs, bool(expires), _value(base), born, birth)
    return SeriesRow(series_id, *fixed, _value(value), time, seen, proof(fixed))


def _schema_of(connection: sqlite3.Connection) -> list[tuple[str, str | None]]:
    return connection.execute("select name, sql from sqlite_schema order by name").fetchall()


def check_rows(connection: sqlite3.Connection) -> None:
    """Read what is served, and compare each row with its checksum. Raises StoreUnavailable."""
    for row in connection.execute(_SERIES):
        _proved_series(row)
    for row in connection.execute("select name, value, proof from total"):
        proved(row)
    for row in connection.execute("select model, kind, value, born, birth, proof from served"):
        proved(row)


def _proved_series(row: tuple[Any, ...]) -> SeriesRow:
    """A row of `_SERIES`. Raises StoreUnavailable when it is not what was written, or has no value."""
    try:
        series = _series_row(row[:-2])
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise StoreUnavailable(f"database disk image is malformed: series {row[0]} cannot be read") from None
    if (series.fixed, _value_proof(series)) != row[-2:]:
        raise StoreUnavailable(f"database disk image is malformed: a row was changed: series {row[0]}")
    return series


def _fixed(row: SeriesRow) -> tuple[Any, ...]:
    """What a point leaves as it is."""
    return row.metric, row.job, row.instance, row.labels, row.expires, row.base, row.born, row.birth


def _value_proof(row: SeriesRow) -> int:
    """The checksum of what a point changes, going on from that of the rest: a value of another series fails it."""
    return zlib.crc32(msgspec.msgpack.encode((row.value, row.time, row.seen)), row.fixed)


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
        found = _unavailable(error)
        name = getattr(error, "sqlite_errorname", "")
        if name.startswith(("SQLITE_IOERR_WRITE", "SQLITE_CANTOPEN")) and (why := _refusal(self.path.parent)):
            return StoreUnavailable(f"{found}; {why}", disk_full=True)
        return found

    def open(self, now: int, *, may_begin: bool = False) -> bool:
        """Open, upgrade or create the database, and read all of it; whether a WAL was left, which is to be settled.

        Raises Damaged, also where it is gone although the mark beside it says that there was one, unless it
        `may_begin` at 0. StateError 65: newer schema or not ours; 74: cannot be read or written."""
        directory = self.path.parent
        has_log = is_open(str(self.path))
        way_out = _way_out(directory, self.version)
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
            raise self.unusable(_unavailable(error)) from None
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
        advice, code = _verdict(error, _way_out(self.path.parent, self.version))
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
                    for row in map(_proved_series, self.execute(_SERIES))
                    if not row.expires or row.seen >= expired_before
                ],
                dict(map(proved, self.execute("select name, value, proof from total"))),
                [
                    TargetRow(job, instance, _PAIRS.decode(attributes), seen)
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
        row = self.execute(f"{_SERIES} where key = ?", (key,)).fetchone()
        return row and _series_row(row[:-2])

    def series_by_id(self, series: int) -> SeriesRow:
        row = self.execute(f"{_SERIES} where series.id = ?", (series,)).fetchone()
        return _series_row(row[:-2])

    def add_series(self, key: bytes, row: SeriesRow) -> tuple[SeriesRow, bool]:
        """Insert what stays of a series, with an id of its own; its value is written by `write_series`. The one of
        this key, if there is one already; and whether it is new."""
        labels, fixed = msgspec.json.encode(row.labels).decode(), proof(_fixed(row))
        cursor = self.execute(
            "insert into series (key, metric, job, instance, labels, expires, base, born, birth, proof)"
            " values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) on conflict do nothing",
            (
                key, row.metric, row.job, row.instance, labels, int(row.expires), _stored(row.base), row.born,
                row.birth, fixed,
            ),
        )  # fmt: skip
        known = None if cursor.rowcount else self.series(key)
        if known is not None:
            return known, False
        return msgspec.structs.replace(row, id=_rowid(cursor), fixed=fixed), True

    def restart_series(self, row: SeriesRow) -> SeriesRow:
        """Update what changes when a series comes back; its value is written by `write_series`."""
        fixed = proof(_fixed(row))
        sql = "update series set base = ?, born = ?, birth = ?, proof = ? where id = ?"
        self.execute(sql, (_stored(row.base), row.born, row.birth, fixed, row.id))
        return msgspec.structs.replace(row, fixed=fixed)

    def write_series(self, rows: Iterable[SeriesRow]) -> None:
        """Write what points change of series."""
        self.executemany(
            "insert or replace into series_value (id, value, time, seen, proof) values (?, ?, ?, ?, ?)",
            [(row.id, _stored(row.value), row.time, row.seen, _value_proof(row)) for row in rows],
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
        return row and _run(row)

    def run_at(self, stream: int, time: int) -> tuple[int, int, Run, bool] | None:
        """For a point whose start was not sent: the run that began last at or before `time`, else the earliest one.

        The run's start, whether that is inferred, the run, and whether it is the stream's current one.
        """
        row = self.execute(
            "select start, inferred, highest, first, last, first = (select max(first) from run where stream = ?1)"
            " from run where stream = ?1 order by first <= ?2 desc, abs(first - ?2) limit 1",
            (stream, time),
        ).fetchone()
        return row and (row[0], row[1], _run(row[2:5]), bool(row[5]))

    def write_runs(self, runs: Mapping[tuple[int, int, int], Run]) -> None:
        """Runs by (stream, start, whether the start is inferred)."""
        self.executemany(
            "insert or replace into run (stream, start, inferred, highest, first, last) values (?, ?, ?, ?, ?, ?)",
            ((*key, _stored(run.highest), run.first, run.last) for key, run in runs.items()),
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


def _verdict(error: Exception, way_out: str = "restore a backup") -> tuple[str, int]:
    """What to do about an error that keeps a database from being used, and the exit code."""
    if any(text in str(error) for text in ("malformed", "not a database", "no such table", "Could not decode")):
        return f"{way_out}, or move it away", os.EX_DATAERR
    return "check the disk and its permissions", os.EX_IOERR


def _rowid(cursor: sqlite3.Cursor) -> int:
    return cursor.lastrowid or 0  # every caller has just inserted a row


def _refusal(directory: Path) -> str:
    """Why the file system takes no writes now, although nothing is broken; empty when it does."""
    try:
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            file.write(bytes(65_536))
    except OSError as error:
        if ran_out(error):
            return ADVICE
        return error.strerror or "" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) else ""
    return ""


def _unavailable(error: Exception) -> StoreUnavailable:
    if isinstance(error, UnicodeDecodeError):
        return StoreUnavailable(f"database disk image is malformed: text that is none: {error.reason}")
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    return StoreUnavailable(f"{error} ({name})", disk_full=name == "SQLITE_FULL")


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
        raise _unavailable(error) from error
    except OSError as error:
        raise StoreUnavailable(f"{path}: {error.strerror}") from error
