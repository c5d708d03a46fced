"""The database for those who only read it: where it is, what it is called, and how it is opened.

Law: light, since a status line that is drawn several times a second begins here: nothing of the bridge, and of the
standard library only what starts fast, which pathlib does not. Readers change nothing, whether a bridge runs or not.
"""

import os
import sqlite3
from collections.abc import Callable
from typing import TypeVar

MIGRATIONS: tuple[str, ...] = ()
"""SQL that leads from one schema version to the next: the first from 1 to 2. A new database takes the same way, so
that an old one that was upgraded and a new one are equal."""
SCHEMA_VERSION = 1 + len(MIGRATIONS)
DATABASE = "state.db"
LOCK = "lock"

T = TypeVar("T")


class Unreadable(Exception):
    """The database cannot be read; `exit_code` is a sysexits code, the text says what, where and what to do."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def open_to_read(path: str, mode: str = "mode=ro") -> sqlite3.Connection:
    """A connection that cannot write; `mode` is a URI parameter. Raises sqlite3.Error."""
    name = os.path.abspath(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")  # noqa: PTH100  # see above
    return sqlite3.connect(f"file:{name}?{mode}", uri=True, isolation_level=None, timeout=5)


def is_open(path: str) -> bool:
    """Whether somebody may have the database open: there is a write-ahead log then, also after a crash."""
    return os.path.exists(f"{path}-wal")  # noqa: PTH110  # see above


def is_running(directory: str) -> bool:
    """Whether the bridge that locked a state directory last still runs; of another user's it is taken for granted."""
    try:
        with open(f"{directory}/{LOCK}", "rb") as file:  # noqa: PTH123  # see above
            os.kill(int(file.readline()), 0)
    except PermissionError:
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return True


def read(directory: str, ask: Callable[[sqlite3.Connection], T]) -> T:
    """What `ask` finds in the database of a state directory, as of one commit. Raises Unreadable."""
    path = f"{directory}/{DATABASE}"
    try:
        with open(path, "rb"):  # noqa: PTH123  # see above
            pass
    except PermissionError:
        raise Unreadable(
            f"permission denied: {path} is its owner's alone; ask as the user that the bridge runs as",
            os.EX_NOPERM,
        ) from None
    except OSError:
        raise Unreadable(
            f"there is no state in {directory}; run claude-otel-bridge first, or name its place with --state-dir",
            os.EX_NOINPUT,
        ) from None
    try:
        if not is_open(path):
            # Reading in the usual way would leave files behind. A bridge that starts meanwhile writes a log first.
            found = _ask(path, "immutable=1", ask)
            if not is_open(path):
                return found
        return _ask(path, "mode=ro", ask)
    except sqlite3.Error as error:
        raise Unreadable(
            f"cannot read {path}: {error}; `claude-otel-bridge doctor` says more", os.EX_IOERR
        ) from None  # fmt: skip


def _ask(path: str, mode: str, ask: Callable[[sqlite3.Connection], T]) -> T:
    connection = open_to_read(path, mode)
    try:
        connection.execute("begin")
        ((version,),) = connection.execute("pragma user_version")
        if version == 0:
            raise Unreadable(
                f"{path} is empty, or no database of this program; run claude-otel-bridge first, or name the place of"
                " its state with --state-dir",
                os.EX_NOINPUT,
            )
        if version != SCHEMA_VERSION:
            age = "an older" if version < SCHEMA_VERSION else "a newer"
            raise Unreadable(
                f"{path} has schema {version}, that of {age} version, and this one reads {SCHEMA_VERSION};"
                " start the version that is to be used from now on",
                os.EX_DATAERR,
            )
        return ask(connection)
    finally:
        connection.close()
