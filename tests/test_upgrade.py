"""Old databases in a new version, and new ones in an old version.

Law under test: every database that a released version has left opens with all it holds; a migration that is cut
short leaves the old schema or the new one, and a copy of the old one beside it; what is too new is not touched.
"""

import os
import shutil
import sqlite3
import stat
from collections.abc import Callable
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from bridge.copies import copies, superfluous
from bridge.daemon import Copies
from bridge.database import DATABASE, MIGRATIONS, SCHEMA_VERSION
from bridge.state import StateError
from bridge.store import Store, connect
from tests.databases import HERE
from tests.test_cases import Rig, Telling, body_of, lines_of, read_point, read_story, rig_in, unsynced
from tests.test_store import Around, io_error, no_descriptors, watched

NOW = 1_800_000_000_000
HOUR_MS = 3_600_000
NEXT = SCHEMA_VERSION + 1
AFTER_NEXT = (
    *MIGRATIONS,
    "alter table total add column unit text not null default 'unknown'; create table extra (name text primary key)",
    (
        "insert into extra select name || '!' from total; create index extra_name on extra (name); drop table target;"
        " update total set unit = 'tokens' where name like 'tokens.%'"
    ),
)
"""Two migrations of a future that shall not come: they add, move, change and delete."""
VERSIONS = sorted(HERE.glob("v*.db"))


def schema_of(path: Path) -> list[tuple[str, str, str | None]]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as reader:
        return reader.execute("select type, name, sql from sqlite_schema order by type, name").fetchall()


def version_of(path: Path) -> int:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as reader:
        ((version,),) = reader.execute("pragma user_version")
        return int(version)


def state_with(golden: Path, directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    shutil.copy(golden, directory / DATABASE)
    return directory


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A state directory with the golden database of the current schema."""
    return state_with(HERE / f"v{SCHEMA_VERSION}.db", tmp_path / "old")


def open_and_close(directory: Path, migrations: tuple[str, ...] = MIGRATIONS) -> None:
    store = Store(directory, unsynced, migrations)
    store.open(NOW)
    store.close()


# --- golden databases ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("golden", VERSIONS, ids=[path.stem for path in VERSIONS])
def test_a_database_of_every_version_holds_what_it_held(golden: Path, tmp_path: Path) -> None:
    story = read_story(golden.with_suffix(".txt"))
    with closing(Rig(tmp_path, story.settings)) as rig:
        state_with(golden, rig.directory)
        rig.start()
        assert lines_of(rig) == story.out
        assert rig.totals == story.totals

        again = Telling(rig, story, "as written")
        again.tell()
        assert again.accepted == 0, "it has forgotten what it counted"
        assert lines_of(rig) == story.out
        assert rig.totals == story.totals

        rig.post(body_of([read_point("{session: s1, start: 3000, time: 3060, type: input, delta: 1000}")]))
        assert rig.totals["tokens.input"] == story.totals["tokens.input"] + 1000


def test_there_is_one_of_every_schema_and_the_latest_is_up_to_date(tmp_path: Path) -> None:
    assert [path.stem for path in VERSIONS] == [f"v{number}" for number in range(1, SCHEMA_VERSION + 1)]
    open_and_close(tmp_path)
    assert schema_of(HERE / f"v{SCHEMA_VERSION}.db") == schema_of(tmp_path / DATABASE), (
        "the schema is not that of the golden database: of a released schema add a migration, of one that is not"
        " released write the database anew with `python -m tests.databases`"
    )


# --- migrations ------------------------------------------------------------------------------------------------


def test_a_migration_keeps_the_data_and_a_copy_of_what_was(old: Path) -> None:
    before = (old / DATABASE).read_bytes()
    open_and_close(old, AFTER_NEXT)
    with closing(sqlite3.connect(old / DATABASE)) as reader:
        assert reader.execute("select value, unit from total where name = 'tokens.input'").fetchall() == [
            (126, "tokens")
        ]
        assert reader.execute("select count(*) from extra where name = 'tokens.input!'").fetchall() == [(1,)]
    assert version_of(old / DATABASE) == SCHEMA_VERSION + 2
    (copy,) = copies(old)
    assert copy.name.startswith(f"state-v{SCHEMA_VERSION}-")
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600

    shutil.copy(copy, old / DATABASE)
    open_and_close(old)
    assert schema_of(old / DATABASE) == schema_of(HERE / f"v{SCHEMA_VERSION}.db")
    assert len((old / DATABASE).read_bytes()) <= len(before)


def test_a_second_start_migrates_nothing(old: Path) -> None:
    open_and_close(old, AFTER_NEXT)
    open_and_close(old, AFTER_NEXT)
    assert len(copies(old)) == 1


def test_a_new_database_has_the_schema_of_an_upgraded_one(old: Path, tmp_path: Path) -> None:
    open_and_close(old, AFTER_NEXT)
    (tmp_path / "new").mkdir()
    open_and_close(tmp_path / "new", AFTER_NEXT)
    assert schema_of(old / DATABASE) == schema_of(tmp_path / "new" / DATABASE)


def test_a_migration_that_is_killed_at_any_statement_leaves_the_old_or_the_new_schema(
    old: Path, tmp_path: Path
) -> None:
    images: list[Path] = []

    def take_image(sql: str, run: Callable[[], Any]) -> Any:
        image = tmp_path / f"image-{len(images)}"
        shutil.copytree(old, image)
        images.append(image)
        return run()

    store = Store(old, watched(take_image), AFTER_NEXT)
    store.open(NOW)
    take_image("after the last one", lambda: None)
    store.close()
    wanted = schema_of(old / DATABASE)
    found = {}
    for image in images:
        version = version_of(image / DATABASE)
        found[version] = schema_of(image / DATABASE)
        open_and_close(image, AFTER_NEXT)
        assert schema_of(image / DATABASE) == wanted
    assert len(images) > 15
    assert found == {SCHEMA_VERSION: schema_of(HERE / f"v{SCHEMA_VERSION}.db"), SCHEMA_VERSION + 2: wanted}


def test_a_migration_that_fails_at_any_statement_changes_nothing(old: Path, tmp_path: Path) -> None:
    for nth in range(1, 100):
        directory = tmp_path / f"failing-{nth}"
        shutil.copytree(old, directory)
        refused = refusal_to_open(Store(directory, watched(failing_at(nth)), AFTER_NEXT))
        if refused is None:
            assert nth > 15
            return
        assert refused.exit_code == os.EX_IOERR
        assert version_of(directory / DATABASE) == SCHEMA_VERSION
        open_and_close(directory, AFTER_NEXT)


def failing_at(nth: int) -> Around:
    """A disk that fails the n-th statement."""
    numbers = count(1)

    def around(sql: str, run: Callable[[], Any]) -> Any:
        if next(numbers) == nth:
            raise io_error()
        return run()

    return around


def refusal_to_open(store: Store) -> StateError | None:
    try:
        store.open(NOW)
    except StateError as refused:
        return refused
    store.close()
    return None


def test_no_room_for_the_copy_is_no_migration(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(old)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(StateError, match="no room for a copy") as refused:
        Store(old, connect, AFTER_NEXT).open(NOW)
    assert refused.value.exit_code == os.EX_IOERR
    assert version_of(old / DATABASE) == SCHEMA_VERSION


def test_a_newer_schema_is_refused_with_the_copy_that_goes_back(old: Path) -> None:
    open_and_close(old, AFTER_NEXT)
    with pytest.raises(StateError) as refused:
        Store(old).open(NOW)
    assert refused.value.exit_code == os.EX_DATAERR
    assert f"has schema {SCHEMA_VERSION + 2}, this version knows up to {SCHEMA_VERSION}" in str(refused.value)
    assert f"restore the newest copy, {copies(old)[0]}," in str(refused.value)


def test_a_damaged_database_is_refused_with_the_newest_copy(old: Path) -> None:
    open_and_close(old, AFTER_NEXT)
    (old / DATABASE).write_bytes(b"garbage. " * 5000)
    (old / f"state-v{NEXT + 7}-20990101T000000000Z.db").write_bytes(b"of a version that this one cannot read")
    with pytest.raises(StateError, match=f"restore the newest copy, .*state-v{SCHEMA_VERSION}-") as refused:
        Store(old).open(NOW)
    assert refused.value.exit_code == os.EX_DATAERR


# --- copies ----------------------------------------------------------------------------------------------------


def test_copies_are_made_once_an_hour_while_something_changes(tmp_path: Path) -> None:
    with rig_in(tmp_path) as rig:
        hourly = Copies(rig.directory, rig.ledger, lambda: rig.now_ms)
        made = []
        for minute in range(5):
            rig.post(body_of([read_point(f"{{session: s1, start: {minute}, time: {minute + 1}, delta: 1}}")]))
            rig.call(hourly.keep())
            rig.call(hourly.keep())
            made.append(len(copies(rig.directory)))
            rig.now_ms += HOUR_MS // 2
        assert made == [1, 1, 2, 2, 3]
        rig.now_ms += 5 * HOUR_MS
        rig.call(hourly.keep())
        assert len(copies(rig.directory)) == 3, "nothing had changed"


def test_a_copy_that_failed_is_made_at_the_next_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with rig_in(tmp_path) as rig:
        rig.post(body_of([read_point("{session: s1, start: 1, time: 2, delta: 1}")]))
        hourly = Copies(rig.directory, rig.ledger, lambda: rig.now_ms)
        with no_descriptors(), pytest.raises(OSError, match="Too many open files"):
            rig.call(hourly.keep())
        with monkeypatch.context() as full:
            full.setattr("bridge.store.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
            rig.call(hourly.keep())
        assert copies(rig.directory) == []
        rig.call(hourly.keep())
        assert len(copies(rig.directory)) == 1


def test_a_copy_that_was_cut_short_is_none_and_goes(tmp_path: Path) -> None:
    with rig_in(tmp_path) as rig:
        leftovers = [rig.directory / ".state-v1-x.db.abcd", rig.directory / "state-v1-20990101T000000000Z.db"]
        for leftover in leftovers:
            leftover.touch()
        assert copies(rig.directory) == []
        rig.post(body_of([read_point("{session: s1, start: 1, time: 2, delta: 1}")]))
        rig.call(Copies(rig.directory, rig.ledger, lambda: rig.now_ms).keep())
        assert len(copies(rig.directory)) == 1
        assert not any(leftover.exists() for leftover in leftovers)


def test_the_newest_three_and_one_a_day_of_every_schema_stay() -> None:
    def name(version: int, day: int, hour: int) -> Path:
        return Path(f"state-v{version}-202611{day:02}T{hour:02}0000000Z.db")

    made = [name(2, day, hour) for day in range(20, 10, -1) for hour in (20, 15, 10, 5)]
    made += [name(1, 1, hour) for hour in (9, 8, 7, 6)]
    kept = [path for path in made if path not in superfluous(made)]
    assert kept == [
        name(2, 20, 20), name(2, 20, 15), name(2, 20, 10),
        *(name(2, day, 20) for day in range(19, 13, -1)),
        name(1, 1, 9), name(1, 1, 8), name(1, 1, 7),
    ]  # fmt: skip
