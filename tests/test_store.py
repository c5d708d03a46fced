"""The state on disk: what may be opened, who may open it, and a disk that fails at any statement.

Law under test: a request is acknowledged only after its commit; a refused one may have reached the disk or not, and
its sender, who repeats it, is never counted twice; what is shown is committed and never falls.
"""

import errno
import os
import resource
import shutil
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import pytest

from bridge.database import DATABASE, LOCK, SCHEMA_VERSION, Unreadable, read
from bridge.model import Drop
from bridge.state import StateError, StoreUnavailable, lock, prepare_directory
from bridge.store import Connect, Store
from tests.test_cases import Body, Rig, body_of, read_point, rig_in, unsynced

T = TypeVar("T")

NOW = 1_800_000_000_000
NOBODY = 65_534
STOP_SECONDS = 2


# --- what may be opened ----------------------------------------------------------------------------------------


def refusal_to_open(directory: Path) -> StateError:
    """Why the state of a directory cannot be opened; what stands in it must not be touched."""
    path = directory / DATABASE
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(StateError) as refused:
        Store(directory).open(NOW)
    assert str(path) in str(refused.value)
    assert (path.read_bytes() if path.is_file() else b"") == before, "the file was written to"
    return refused.value


def opened_and_closed(directory: Path) -> None:
    store = Store(directory)
    store.open(NOW)
    store.close()


def test_a_new_state_is_created_and_opened_again(tmp_path: Path) -> None:
    opened_and_closed(tmp_path)
    store = Store(tmp_path)
    store.open(NOW)
    snapshot = store.snapshot(0)
    store.close()
    assert (snapshot.commits, snapshot.series, snapshot.totals) == (0, [], {})


def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    opened_and_closed(tmp_path)
    with closing(sqlite3.connect(tmp_path / DATABASE)) as connection:
        connection.execute(f"pragma user_version = {SCHEMA_VERSION + 1}")
    error = refusal_to_open(tmp_path)
    assert error.exit_code == os.EX_DATAERR
    assert f"schema {SCHEMA_VERSION + 1}" in str(error)
    assert f"up to {SCHEMA_VERSION}" in str(error)
    assert "newer version" in str(error)


@pytest.mark.parametrize("journal_mode", ["wal", "delete"])
def test_a_foreign_database_is_refused_and_left_alone(tmp_path: Path, journal_mode: str) -> None:
    with closing(sqlite3.connect(tmp_path / DATABASE)) as connection:
        connection.execute(f"pragma journal_mode = {journal_mode}")
        connection.execute("create table bookmark (url text)")
    error = refusal_to_open(tmp_path)
    assert error.exit_code == os.EX_DATAERR
    assert "not a database of this program" in str(error)


@pytest.mark.parametrize("size", [10, 5000])
def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path, size: int) -> None:
    (tmp_path / DATABASE).write_bytes(b"garbage. " * size)
    error = refusal_to_open(tmp_path)
    assert error.exit_code == os.EX_DATAERR
    assert "restore a backup" in str(error)


def test_half_a_database_is_refused(tmp_path: Path) -> None:
    opened_and_closed(tmp_path)
    path = tmp_path / DATABASE
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert refusal_to_open(tmp_path).exit_code == os.EX_DATAERR


def test_an_empty_file_is_a_first_start_that_was_killed(tmp_path: Path) -> None:
    """SQLite makes the file before anything stands in it."""
    (tmp_path / DATABASE).touch()
    opened_and_closed(tmp_path)


def test_a_directory_in_place_of_the_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / DATABASE).mkdir()
    error = refusal_to_open(tmp_path)
    assert error.exit_code == os.EX_IOERR
    assert "check the disk and its permissions" in str(error)


def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with rig_in(tmp_path) as rig:
            rig.post(BODIES[0])
            os.close(lock(rig.directory))
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in rig.directory.iterdir()}
    finally:
        os.umask(before)
    assert modes == dict.fromkeys([DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm", LOCK], 0o600)


def test_a_clean_stop_leaves_one_file(tmp_path: Path) -> None:
    with rig_in(tmp_path) as rig:
        rig.post(BODIES[0])
    assert [path.name for path in rig.directory.iterdir()] == [DATABASE]


def test_the_disk_is_asked_to_sync_every_commit(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.open(NOW)
    with closing(store._connection) as connection:
        settings = {
            name: connection.execute(f"pragma {name}").fetchone()[0]
            for name in ("journal_mode", "synchronous", "fullfsync", "checkpoint_fullfsync", "locking_mode")
        }
    full = 2
    assert settings == {
        "journal_mode": "wal", "synchronous": full, "fullfsync": 1, "checkpoint_fullfsync": 1,
        "locking_mode": "normal",
    }  # fmt: skip


def test_a_repeat_is_no_commit(tmp_path: Path) -> None:
    with rig_in(tmp_path) as rig:
        rig.post(BODIES[0])
        before = committed(rig)
        rig.post(BODIES[0])
        assert committed(rig) == before == projected(rig)


def test_series_share_their_labels_in_memory(tmp_path: Path) -> None:
    """A label's texts are most of a series' memory, and the 30 series of a session have nearly all of them alike."""
    session = "{session: %s, type: input, time: 1060, delta: 1}"
    with rig_in(tmp_path) as rig:
        rig.post(body(session % "s1", session.replace("input", "output") % "s1"))
        posted = list(rig.ledger.rows())
        rig.restart()
        for one, other in (posted, rig.ledger.rows()):
            assert dict(one.labels)["session.id"] == "s1"
            assert [a is b for a, b in zip(one.labels, other.labels, strict=True)] == [True, False]


def test_a_reader_does_not_hold_up_the_stop(tmp_path: Path) -> None:
    """Grafana may be in the middle of a query when the bridge is told to stop."""
    with rig_in(tmp_path) as rig:
        rig.post(BODIES[0])
        with closing(sqlite3.connect(f"file:{rig.directory / DATABASE}?mode=ro", uri=True)) as reader:
            reader.execute("begin")
            reader.execute("select count(*) from series").fetchone()
            rig.post(BODIES[1])
            began = time.monotonic()
            rig.stop()
            assert time.monotonic() - began < STOP_SECONDS
        rig.start()
        assert rig.totals == TRUTHS[-1]


def test_others_may_read_while_the_bridge_writes(tmp_path: Path) -> None:
    with rig_in(tmp_path) as rig:
        rig.post(BODIES[0])
        with closing(sqlite3.connect(f"file:{rig.directory / DATABASE}?mode=ro", uri=True)) as reader:
            read = dict(reader.execute("select name, value from total").fetchall())
        assert read == rig.totals


# --- the directory and its lock --------------------------------------------------------------------------------


@contextmanager
def somebody_else() -> Iterator[None]:
    """The block runs without root's rights; root may do everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that `somebody_else` may use as well, also where the ones above it are closed to them."""
    tmp_path.chmod(0o777)
    monkeypatch.chdir(tmp_path)
    return Path()


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_state_directory_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "b"
    assert prepare_directory(directory) is None
    assert mode_of(directory) == 0o700
    assert prepare_directory(directory) is None


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701, 0o777])
def test_a_directory_that_is_open_to_others_is_closed_with_one_line(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    note = prepare_directory(tmp_path)
    assert note is not None
    assert str(tmp_path) in note
    assert "0700" in note
    assert mode_of(tmp_path) == 0o700


@pytest.mark.parametrize(
    ("mode", "names", "is_refused"),
    [
        (0o1777, [], True),
        (0o1777, ["state.db"], True),
        (0o755, ["letter"], True),
        (0o777, ["letter"], True),
        (0o755, ["letter", "state.db"], False),
        (0o755, ["lost+found"], False),
        (0o700, ["letter"], False),
    ],
)
def test_a_directory_that_others_use_is_not_closed_to_them(
    tmp_path: Path, mode: int, names: list[str], is_refused: bool
) -> None:
    for name in names:
        (tmp_path / name).touch()
    tmp_path.chmod(mode)
    if is_refused:
        with pytest.raises(StateError, match=f"{tmp_path} is open to others .*{mode:04o}") as refused:
            prepare_directory(tmp_path)
        assert refused.value.exit_code == os.EX_NOPERM
    else:
        prepare_directory(tmp_path)
    assert mode_of(tmp_path) == (mode if is_refused else 0o700)


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    with pytest.raises(StateError, match="not a directory") as refused:
        prepare_directory(tmp_path / "state")
    assert refused.value.exit_code == os.EX_NOPERM


@pytest.mark.parametrize("name", ["lock", "state.db", "state.db-wal", "state.db-shm", "served.bin"])
@pytest.mark.parametrize("kind", ["symbolic", "dangling", "hard"])
def test_a_link_in_place_of_a_file_of_ours_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    precious, state = tmp_path / "precious", tmp_path / "state"
    precious.write_bytes(b"precious")
    prepare_directory(state)
    if kind == "hard":
        (state / name).hardlink_to(precious)
    else:
        (state / name).symlink_to(precious if kind == "symbolic" else tmp_path / "nowhere")
    with pytest.raises(StateError, match=f"{name} is a link") as refused:
        prepare_directory(state)
    assert refused.value.exit_code == os.EX_NOPERM
    assert precious.read_bytes() == b"precious"
    assert not (tmp_path / "nowhere").exists()


def test_a_place_where_anybody_could_exchange_the_state_is_refused(tmp_path: Path) -> None:
    public = tmp_path / "public"
    public.mkdir()
    public.chmod(0o777)
    with pytest.raises(StateError, match="may be written by everybody") as refused:
        prepare_directory(public / "a" / "state")
    assert refused.value.exit_code == os.EX_NOPERM
    public.chmod(0o1777)
    assert prepare_directory(public / "a" / "state") is None


def test_a_directory_of_another_user_is_refused() -> None:
    with somebody_else(), pytest.raises(StateError, match="belongs to uid 0") as refused:
        prepare_directory(Path("/"))
    assert refused.value.exit_code == os.EX_NOPERM


def test_a_directory_that_cannot_be_made_is_refused(open_directory: Path) -> None:
    with somebody_else():
        (open_directory / "closed").mkdir(mode=0o500)
        with pytest.raises(StateError, match=r"cannot create state directory closed/state: .*--state-dir") as refused:
            prepare_directory(open_directory / "closed" / "state")
    assert refused.value.exit_code == os.EX_CANTCREAT


def test_a_state_of_another_user_is_not_said_to_be_absent(open_directory: Path) -> None:
    (open_directory / "closed").mkdir(mode=0)
    with somebody_else(), pytest.raises(Unreadable, match=r"permission denied: closed/state\.db ") as refused:
        read("closed", lambda _: None)
    assert refused.value.exit_code == os.EX_NOPERM


def test_a_read_only_directory_is_refused(open_directory: Path) -> None:
    with somebody_else():
        (open_directory / "closed").mkdir(mode=0o500)
        with pytest.raises(StateError, match="not writable: closed/lock") as refused:
            lock(open_directory / "closed")
    assert refused.value.exit_code == os.EX_CANTCREAT


def test_a_second_bridge_is_refused_with_the_first_ones_pid(tmp_path: Path) -> None:
    held = lock(tmp_path)
    try:
        with pytest.raises(StateError, match=rf"another bridge, pid {os.getpid()};") as refused:
            lock(tmp_path)
        assert refused.value.exit_code == os.EX_TEMPFAIL
        assert (tmp_path / LOCK).read_text() == f"{os.getpid()}\n"
    finally:
        os.close(held)
    os.close(lock(tmp_path))


def test_the_lock_of_a_bridge_that_died_is_free(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("4194304999\n")
    held = lock(tmp_path)
    assert (tmp_path / LOCK).read_text() == f"{os.getpid()}\n"
    os.close(held)


def test_a_lock_that_is_a_link_is_refused_and_its_target_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(StateError):
        lock(tmp_path)
    assert (tmp_path / "precious").read_text() == "precious"


# --- a disk that fails -----------------------------------------------------------------------------------------


class Watched:
    """A connection of which every statement passes `around(sql, run)`, which may fail before or after `run()`."""

    def __init__(self, connection: sqlite3.Connection, around: "Around") -> None:
        self._connection, self._around = connection, around

    def execute(self, sql: str, parameters: Any = ()) -> sqlite3.Cursor:
        cursor: sqlite3.Cursor = self._around(sql, lambda: self._connection.execute(sql, parameters))
        return cursor

    def executemany(self, sql: str, rows: Any) -> sqlite3.Cursor:
        cursor: sqlite3.Cursor = self._around(sql, lambda: self._connection.executemany(sql, rows))
        return cursor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


Around = Callable[[str, Callable[[], Any]], Any]


def watched(around: Around) -> Connect:
    """A `connect` whose connections ask `around`; that one is asked for the connecting itself, too."""

    def connect(path: Path) -> sqlite3.Connection:
        connection: sqlite3.Connection = around("connect", lambda: unsynced(path))
        return cast("sqlite3.Connection", Watched(connection, around))

    return connect


def io_error() -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorname = "SQLITE_IOERR_FSYNC"
    return error


def disk_full() -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorname = "SQLITE_FULL"
    return error


class FailingDisk:
    """Fails some statements, once `fail_at` has said when."""

    def __init__(self, fault: "Fault") -> None:
        self.fault = fault
        self.calls = 0
        self.failing: set[int] = set()
        self.connections: list[sqlite3.Connection] = []
        self.before_commit: Callable[[], None] = lambda: None

    def fail_at(self, nth: int) -> None:
        """Fail from the n-th statement on, counted from here."""
        self.failing = {self.calls + nth + statement for statement in self.fault.statements}

    @property
    def has_failed(self) -> bool:
        return self.calls >= min(self.failing)

    def __call__(self, sql: str, run: Callable[[], T]) -> T:
        self.calls += 1
        if sql == "commit":
            self.before_commit()
        fails = self.calls in self.failing
        if fails and not self.fault.after:
            raise self.fault.error()
        result = run()
        if isinstance(result, sqlite3.Connection):
            self.connections.append(result)
        if fails:
            if isinstance(result, sqlite3.Cursor):
                result.close()  # no half-read rows stay behind
            raise self.fault.error()
        return result

    def end_of_process(self) -> None:
        """What the end of a process does to its connections: nothing more is written through them."""
        while self.connections:
            self.connections.pop().close()


class Shown(NamedTuple):
    """What the counters say, in the projection or on disk."""

    commits: int
    totals: dict[str, int]
    values: dict[int, Any]


def projected(rig: Rig) -> Shown:
    values = {row.id: row.value for row in rig.ledger.rows()}
    return Shown(rig.ledger.commits, dict(rig.ledger.totals), values)


def committed(rig: Rig) -> Shown:
    """What a reader of the file finds."""
    with closing(sqlite3.connect(f"file:{rig.directory / DATABASE}?mode=ro", uri=True)) as reader:
        ((commits,),) = reader.execute("select commits from meta")
        totals = dict(reader.execute("select name, value from total").fetchall())
        return Shown(commits, totals, dict(reader.execute("select id, value from series_value").fetchall()))


def assert_no_less(shown: Shown, earlier: Shown) -> None:
    fell = [name for name, value in earlier.totals.items() if shown.totals[name] < value]
    fell += [f"series {series}" for series, value in earlier.values.items() if shown.values[series] < value]
    assert not fell, f"{fell} fell from {earlier} to {shown}"
    assert shown.commits >= earlier.commits


def body(*points: str) -> Body:
    return body_of([read_point(point) for point in points])


# Every way a point can be known; then repeats, news, a new version of the sender and a new metric. All values rise.
BODIES = [
    body(
        "{session: s1, type: input, start: 1000, time: 1060, delta: 1}",
        "{type: output, start: 1000, time: 1060, delta: 10}",
        "{type: input, start: 1000, time: 1060, cumulative: 100}",
        "{type: output, time: 1060, cumulative: 1000}",
        "{metric: load, time: 1060, gauge: 1}",
    ),
    body(
        "{session: s1, type: input, start: 1000, time: 1060, delta: 1}",
        "{session: s1, type: input, start: 1060, time: 1120, delta: 2, resource.service.version: 2.0}",
        "{type: input, start: 1000, time: 1120, cumulative: 300}",
        "{type: output, time: 1120, cumulative: 500}",
        "{metric: claude_code.cost.usage, session: s2, start: 1000, time: 1120, delta: 0.25}",
        "{metric: load, time: 1120, gauge: 2}",
    ),
]
TRUTHS: list[dict[str, int]] = [
    {"tokens.input": 101, "tokens.output": 1010},
    {"tokens.input": 303, "tokens.output": 1510, "usd": 250_000_000},
]
TRUE_SERIES = {
    'claude_code.token.usage{session.id="s1",type="input"}': 1,
    'claude_code.token.usage{service.version="2.0",session.id="s1",type="input"}': 2,
    'claude_code.token.usage{type="input"}': 300,
    'claude_code.token.usage{type="output"}': 1510,
    'claude_code.cost.usage{session.id="s2"}': 250_000_000,
    "load": 2,
}
ATTEMPTS = 20


class Sender:
    """Repeats each body until it is acknowledged, and looks at the counters all the while."""

    def __init__(self, rig: Rig, disk: FailingDisk) -> None:
        self.rig, self.disk = rig, disk
        self.last = Shown(0, {}, {})

    def send(self, body: Body) -> None:
        for _ in range(ATTEMPTS):
            self.disk.before_commit = self.assert_not_ahead
            try:
                receipt = self.rig.post(body)
            except StoreUnavailable:
                assert not self.rig.ledger.healthy
                self.look()
            else:
                assert self.rig.ledger.healthy or not receipt.accepted
                self.look()
                assert projected(self.rig) == committed(self.rig)
                return
        raise AssertionError("never acknowledged")

    def assert_not_ahead(self) -> None:
        assert projected(self.rig) == self.last, "shown before it was committed"

    def look(self) -> None:
        """What is shown is committed and did not fall."""
        self.disk.before_commit = lambda: None
        shown = projected(self.rig)
        assert_no_less(shown, self.last)
        assert_no_less(committed(self.rig), shown)
        self.last = shown


class Fault(NamedTuple):
    """How a disk fails: which statements from the n-th on, with which error, before or after doing what they say."""

    error: Callable[[], sqlite3.OperationalError]
    statements: frozenset[int]
    after: bool = False


FAULTS = {
    "one": frozenset({0}),
    "two": frozenset({0, 1}),
    "five": frozenset({0, 1, 2, 3, 4}),
    # After a failed statement come rollback, connect, begin, select: the recovery fails as well.
    "one and the fourth after it": frozenset({0, 4}),
}


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault(io_error, FAULTS["one"]), id="I/O error"),
        pytest.param(Fault(io_error, FAULTS["one"], after=True), id="I/O error though it was done"),
        pytest.param(Fault(io_error, FAULTS["five"]), id="I/O errors of five statements"),
        pytest.param(Fault(io_error, FAULTS["one and the fourth after it"]), id="I/O error, also of the recovery"),
        pytest.param(Fault(disk_full, FAULTS["one"]), id="disk full"),
        pytest.param(Fault(disk_full, FAULTS["one"], after=True), id="disk full though it was done"),
        pytest.param(Fault(disk_full, FAULTS["two"]), id="disk full for two statements"),
        pytest.param(Fault(disk_full, FAULTS["five"], after=True), id="disk full for five statements"),
    ],
)
def test_the_nth_statement_fails(fault: Fault, tmp_path: Path) -> None:
    """For n = 1, 2, 3 ... until a run passes without a failure."""
    for nth in count(1):
        disk = FailingDisk(fault)
        with closing(Rig(tmp_path, name=str(nth), connect=watched(disk))) as rig:
            rig.start()
            disk.fail_at(nth)
            sender = Sender(rig, disk)
            for body, truth in zip(BODIES, TRUTHS, strict=True):
                sender.send(body)
                assert rig.totals == truth, f"statement {nth}"
            assert rig.shown == TRUE_SERIES, f"statement {nth}"
        assert committed(rig) == sender.last, f"statement {nth}"
        if not disk.has_failed:
            assert nth > 60, "few statements passed the failing disk"
            return


@pytest.mark.parametrize("error", [io_error, disk_full])
def test_the_nth_statement_of_the_start_fails(
    error: Callable[[], sqlite3.OperationalError], tmp_path: Path
) -> None:  # fmt: skip
    """The bridge ends with an exit code and says why; the next start finds a state that it can use."""
    for nth in count(1):
        disk = FailingDisk(Fault(error, FAULTS["one"]))
        disk.fail_at(nth)
        with closing(Rig(tmp_path, name=str(nth), connect=watched(disk))) as rig:
            refused = refusal_to_start(rig)
            if not disk.has_failed:
                assert nth > 20, "few statements passed the failing disk"
                return
            disk.end_of_process()
            assert refused is not None
            assert refused.exit_code == os.EX_IOERR
            assert str(rig.directory / DATABASE) in str(refused)
            rig.start()
            rig.post(BODIES[0])
            assert rig.totals == TRUTHS[0]


def refusal_to_start(rig: Rig) -> StateError | None:
    try:
        rig.start()
    except StateError as refused:
        return refused
    return None


@pytest.mark.parametrize("error", [io_error, disk_full])
def test_the_nth_statement_of_forgetting_fails(
    error: Callable[[], sqlite3.OperationalError], tmp_path: Path
) -> None:  # fmt: skip
    for nth in count(1):
        disk = FailingDisk(Fault(error, FAULTS["one"]))
        with closing(Rig(tmp_path, name=str(nth), connect=watched(disk))) as rig:
            rig.start()
            rig.post(FORGOTTEN)
            rig.now_ms += 8 * 86_400_000
            disk.fail_at(nth)
            failed = False
            try:
                rig.forget()
            except StoreUnavailable:
                failed = True
                rig.forget()
            disk.failing = set()
            receipt = rig.post(FORGOTTEN)
            assert [refusal.reason for refusal in receipt.refused] == [Drop.TOO_OLD]
            assert rig.totals == {"tokens.input": 1}
        if not failed:
            assert nth > 3, "few statements passed the failing disk"
            return


FORGOTTEN = body("{session: s1, type: input, start: 1000, time: 1060, delta: 1}")


@pytest.fixture
def disk() -> FailingDisk:
    """A disk that fails one statement with an I/O error: which one, is left to the test."""
    return FailingDisk(Fault(io_error, FAULTS["one"]))


def test_housekeeping_that_fails_and_then_works_is_healthy_again(disk: FailingDisk, tmp_path: Path) -> None:
    with rig_in(tmp_path, connect=watched(disk)) as rig:
        disk.fail_at(1)
        with pytest.raises(StoreUnavailable):
            rig.forget()
        assert not rig.ledger.healthy
        rig.forget()
        assert not rig.ledger.healthy, "nothing was written, which proves nothing"
        rig.call(rig.ledger.probe())
        assert rig.ledger.healthy


@pytest.mark.parametrize(("error", "gives_up"), [(io_error, True), (disk_full, False)])
def test_a_disk_that_fails_three_times_in_a_minute_is_given_up_and_a_full_one_never(
    error: Callable[[], sqlite3.OperationalError], gives_up: bool, tmp_path: Path
) -> None:
    disk = FailingDisk(Fault(error, frozenset(range(1000))))
    with rig_in(tmp_path, connect=watched(disk)) as rig:
        disk.fail_at(1)
        for attempt in range(1, 5):
            with pytest.raises(StoreUnavailable):
                rig.post(BODIES[0])
            assert bool(rig.given_up) is (gives_up and attempt >= 3), attempt
        disk.failing = {0}
        rig.post(BODIES[0])
        assert rig.totals == TRUTHS[0]


def test_after_an_io_error_nothing_is_acknowledged_on_a_log_that_may_not_be_there(
    disk: FailingDisk, tmp_path: Path
) -> None:
    """While somebody reads, the WAL cannot be emptied into the database; what it holds may not survive power loss."""
    with rig_in(tmp_path, connect=watched(disk)) as rig:
        rig.post(BODIES[0])
        with closing(sqlite3.connect(f"file:{rig.directory / DATABASE}?mode=ro", uri=True)) as reader:
            reader.execute("begin")
            reader.execute("select count(*) from series").fetchone()
            disk.fail_at(1)
            with pytest.raises(StoreUnavailable):
                rig.post(BODIES[1])
            assert (rig.directory / f"{DATABASE}-wal").stat().st_size
            with pytest.raises(StoreUnavailable, match="a reader holds the WAL"):
                rig.post(BODIES[1])
        rig.post(BODIES[1])
        assert rig.totals == TRUTHS[1]


def test_what_a_killed_process_left_is_brought_to_the_disk(tmp_path: Path) -> None:
    """It may have been killed before its sync, and a repeat of what reading finds is acknowledged without a commit."""
    with rig_in(tmp_path) as rig:
        rig.post(BODIES[0])
        before = committed(rig)
        rig.kill()
        (tmp_path / "alone").mkdir()
        shutil.copy(rig.directory / DATABASE, tmp_path / "alone" / DATABASE)
        with closing(sqlite3.connect(f"file:{tmp_path / 'alone' / DATABASE}?mode=ro", uri=True)) as reader:
            assert reader.execute("select commits from meta").fetchone() == (before.commits,)


def test_nothing_is_acknowledged_before_what_was_left_is_on_the_disk(tmp_path: Path) -> None:
    is_broken = False

    def around(sql: str, run: Callable[[], Any]) -> Any:
        if is_broken and "wal_checkpoint" in sql:
            raise io_error()
        return run()

    with rig_in(tmp_path, connect=watched(around)) as rig:
        rig.post(BODIES[0])
        before = projected(rig)
        image = rig.image()
        is_broken = True
        rig.kill(image)
        assert projected(rig) == before
        with pytest.raises(StoreUnavailable):
            rig.post(BODIES[0])
        is_broken = False
        assert rig.post(BODIES[0]).accepted == 0
        assert projected(rig) == before


def test_on_a_full_disk_the_log_makes_room(tmp_path: Path) -> None:
    disk = FailingDisk(Fault(disk_full, FAULTS["one"]))
    with rig_in(tmp_path, connect=watched(disk)) as rig:
        rig.post(BODIES[0])
        wal = rig.directory / f"{DATABASE}-wal"
        assert wal.stat().st_size
        disk.fail_at(1)
        with pytest.raises(StoreUnavailable):
            rig.post(BODIES[1])
        assert not wal.stat().st_size
        rig.post(BODIES[1])
        assert rig.totals == TRUTHS[1]


def new_series(number: int) -> Body:
    """A body that takes about 70 kB of the log."""
    return body(f"{{session: n{number}, type: input, start: 1000, time: 1060, delta: 1}}")


def test_room_on_a_full_disk_goes_to_the_database_first(tmp_path: Path) -> None:
    """The log could not be emptied while there was no room; what is freed then must not be eaten by the log."""
    is_full = False

    def around(sql: str, run: Callable[[], T]) -> T:
        if is_full and ("update meta" in sql or "checkpoint(" in sql):
            raise disk_full()
        return run()

    with rig_in(tmp_path, connect=watched(around)) as rig:
        for number in range(10):
            rig.post(new_series(number))
        wal = rig.directory / f"{DATABASE}-wal"
        before = wal.stat().st_size
        is_full = True
        with pytest.raises(StoreUnavailable):
            rig.post(new_series(10))
        assert wal.stat().st_size >= before
        is_full = False
        rig.post(new_series(10))
        assert wal.stat().st_size < before / 2
        assert rig.totals == {"tokens.input": 11}


def test_on_a_small_disk_the_log_leaves_room_to_empty_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=2 * 2**20))
    with rig_in(tmp_path) as rig:
        for number in range(40):
            rig.post(new_series(number))
        assert (rig.directory / f"{DATABASE}-wal").stat().st_size < 2**20


def test_a_quota_and_a_read_only_file_system_are_no_broken_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite takes both for an I/O error; a write beside the database tells them apart."""
    disk = FailingDisk(Fault(write_error, FAULTS["one"]))
    with rig_in(tmp_path, connect=watched(disk)) as rig:
        for number, is_refused in ((errno.EDQUOT, True), (errno.EROFS, True), (errno.EIO, False)):
            monkeypatch.setattr("tempfile.TemporaryFile", raising(OSError(number, os.strerror(number))))
            disk.fail_at(1)
            with pytest.raises(StoreUnavailable) as refused:
                rig.post(BODIES[0])
            assert refused.value.disk_full is is_refused
            assert (os.strerror(number) in str(refused.value)) is is_refused


def write_error() -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorname = "SQLITE_IOERR_WRITE"
    return error


def raising(error: OSError) -> Callable[..., Any]:
    def fail(**_: Any) -> Any:
        raise error

    return fail


@contextmanager
def no_descriptors() -> Iterator[None]:
    """This process opens no file in the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_database_that_no_descriptor_is_left_for_is_not_given_up(disk: FailingDisk, tmp_path: Path) -> None:
    """After an I/O error it has to be opened again; until it can be, what is shown stays and exports are refused."""
    with rig_in(tmp_path, connect=watched(disk)) as rig:
        rig.post(BODIES[0])
        with no_descriptors():
            disk.fail_at(1)
            for words in ("disk I/O error", *["too many open files"] * 4):
                with pytest.raises(StoreUnavailable, match=words):
                    rig.post(BODIES[1])
            assert rig.totals == TRUTHS[0]
        assert not rig.given_up
        rig.post(BODIES[1])
        assert rig.totals == TRUTHS[1]


def test_a_failure_says_what_the_disk_said(disk: FailingDisk, tmp_path: Path) -> None:
    with rig_in(tmp_path, connect=watched(disk)) as rig:
        for error, is_full in ((io_error, False), (disk_full, True)):
            disk.fault = Fault(error, FAULTS["one"])
            disk.fail_at(1)
            with pytest.raises(StoreUnavailable) as refused:
                rig.post(BODIES[0])
            assert str(refused.value) == f"{error()} ({error().sqlite_errorname})"
            assert refused.value.disk_full is is_full
