"""The state directory: whose it is, who has it, and what can be wrong with it."""

import contextlib
import errno
import fcntl
import os
import sqlite3
import stat
import tempfile
from pathlib import Path

from bridge.database import DATABASE, LOCK
from bridge.descriptors import ADVICE, ran_out

SERVED = "served.bin"
DISK_ERRORS = (sqlite3.Error, UnicodeDecodeError)
"""What reading and writing can raise; the second where a flipped bit has made text that is none."""


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


def verdict(error: Exception, way_out: str = "restore a backup") -> tuple[str, int]:
    """What to do about an error that keeps a database from being used, and the exit code."""
    if any(text in str(error) for text in ("malformed", "not a database", "no such table", "Could not decode")):
        return f"{way_out}, or move it away", os.EX_DATAERR
    return "check the disk and its permissions", os.EX_IOERR


def refusal(directory: Path) -> str:
    """Why the file system takes no writes now, although nothing is broken; empty when it does."""
    try:
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            file.write(bytes(65_536))
    except OSError as error:
        if ran_out(error):
            return ADVICE
        return error.strerror or "" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) else ""
    return ""


def unavailable(error: Exception) -> StoreUnavailable:
    """What an error of SQLite, or text that is none, says of the database."""
    if isinstance(error, UnicodeDecodeError):
        return StoreUnavailable(f"database disk image is malformed: text that is none: {error.reason}")
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    return StoreUnavailable(f"{error} ({name})", disk_full=name == "SQLITE_FULL")


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


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
