"""Tells of what changes below directories, by the file system's events through watchfiles.

Law: what is not told of here is named, so that somebody looks at it: `has_events` is false where nothing is told, and
`unwatched` are directories in which something has a name that is no text. watchfiles ends at the first event of such a
name, also in what it watches recursively; so then each directory is watched alone, but for those.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from bridge.telemetry import log

STEP_MS = 100
"""What changed is told one step later, or two while it goes on; each step is a wake-up of the watching thread."""
RETRY_SECONDS = 2.0
"""Before names are looked at again that were no text and are gone."""


class Directory(NamedTuple):
    """A root that is there: where it really lies, since events tell of real paths, and which directory it is."""

    path: str
    device: int
    inode: int


class Watcher:
    """Tells of changed paths below directories, from a thread of its own.

    It tells of the directories themselves once it watches them: what changed before that is known to nobody else.
    `is_stale` says that one of them is no more, or is another one.
    """

    def __init__(self, directories: tuple[Directory, ...], tell: Callable[[set[str]], object]) -> None:
        self.directories = directories
        self.has_events = self.is_stale = False
        self.unwatched: frozenset[str] = frozenset()
        self._tell = tell
        self._roots = {directory.path for directory in directories}
        self._stop = threading.Event()
        try:
            import watchfiles  # noqa: F401  # whether there is one
        except ImportError:
            log.warning("watchfiles is not installed; transcripts are looked at every two seconds")
            return
        self.has_events = True  # without directories there is nothing to miss; one that appears makes another watcher
        if directories:
            threading.Thread(target=self._run, name="watch", daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        try:
            ended = self._pump(self._roots, is_recursive=True)
            while not self._stop.is_set():
                watched, unwatched = apart(self._roots)
                if unwatched != self.unwatched:
                    names = ", ".join(sorted(map(ascii, unwatched)))
                    log.warning("names that are no text; looked at every two seconds", extra={"below": names})
                elif ended and self._stop.wait(RETRY_SECONDS):
                    return
                self.unwatched = unwatched
                if not watched:
                    raise OSError("no directory has names that are all text")
                ended = self._pump(watched, is_recursive=False)
        except (OSError, RuntimeError) as error:
            self.has_events = False
            log.warning("no file system events; transcripts are looked at every two seconds", extra={"why": error})

    def _pump(self, paths: Iterable[str], *, is_recursive: bool) -> bool:
        """Tell of changes until it is stopped or, where each directory is watched alone, there is a new one; or until
        watchfiles ends, which the result says."""
        import watchfiles

        unseen = self._roots
        seen = _modified(self.unwatched)
        changes = watchfiles.watch(
            *paths, watch_filter=None, debounce=STEP_MS, step=STEP_MS, stop_event=self._stop, rust_timeout=1000,
            yield_on_timeout=True, raise_interrupt=False, ignore_permission_denied=True, recursive=is_recursive,
        )  # fmt: skip
        try:
            for change in changes:
                told = {path for _, path in change}
                self.is_stale |= not told.isdisjoint(self._roots)
                if told or unseen:
                    self._tell(told | unseen)
                unseen = set()
                is_new = not is_recursive and any(Path(path).is_dir() for path in told)
                if is_new or _modified(self.unwatched) != seen:
                    break
        except FileNotFoundError:  # of one by one, one is gone
            if is_recursive:
                raise
        except RuntimeError as error:
            if "decode" not in str(error):
                raise
        else:
            return False
        return True


def apart(roots: Iterable[str]) -> tuple[list[str], frozenset[str]]:
    """The directories below some that can be watched one by one, and the uppermost of those that cannot."""
    watched: list[str] = []
    unwatched: list[str] = []
    for path, directories, files in (found for root in roots for found in os.walk(root)):
        is_text = all(map(_is_text, (path, *directories, *files)))
        if is_text:
            watched.append(path)
        elif not any(path.startswith(f"{above}/") for above in unwatched):
            unwatched.append(path)
    return watched, frozenset(unwatched)


def _modified(directories: Iterable[str]) -> dict[str, int]:
    """When something was last made, removed or renamed in each."""
    found = {}
    for directory in directories:
        with contextlib.suppress(OSError):
            found[directory] = Path(directory).stat().st_mtime_ns
    return found


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
