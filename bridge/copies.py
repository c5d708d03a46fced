"""Copies of the database: made of one transaction, read again, and kept as long as they are of use."""

import contextlib
import os
import re
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from bridge.database import DATABASE, open_to_read
from bridge.rows import check_rows
from bridge.state import DISK_ERRORS, StateError, StoreUnavailable, sync, verdict

KEPT_COPIES, KEPT_DAYS = 3, 7
"""Of every schema version the newest copies stay, and the newest of each of as many days."""


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
            reason, code = verdict(error)
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


def way_back(directory: Path, version: int) -> str:
    """What to do when the database cannot be used: the newest copy that this version can read, if there is one."""
    usable = next((path for path in copies(directory) if _copy_name(path)[0] <= version), None)
    return f"restore the newest copy, {usable}, as the README says" if usable else "restore a backup"
