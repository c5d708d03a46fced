"""Follows the transcripts of tools, a second source of usage: JSONL files that grow, or documents that are rewritten.

Law: what a file says and how far it was read are committed in one transaction, so a crash repeats nothing and loses
nothing; keys make a second reading harmless, so whatever looks new is read again from its start. What stands under a
root at the bridge's first look is history: it is read in the background, for the reports, and never served. What is
appended later, also while the bridge was down, counts. Files are only read, by one thread, and much history by
processes; symbolic links are not followed; a file that cannot be read is counted and tried again when it changes. A
document is read as a whole whenever it has changed; if that is before its history was read, the times of what it
tells say what is history. A packed file is immutable: it is unpacked from its start, and read once its end was
reached.

Changes are told by the file system's events; a slow scan finds what events miss, and replaces them where there are
none.
"""

import asyncio
import contextlib
import os
import stat
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from bridge.descriptors import ADVICE, ran_out
from bridge.file_events import Directory, Watcher
from bridge.ledger import Ledger, Unpostable
from bridge.model import TranscriptRow
from bridge.packed import Damaged, NoUnpacker
from bridge.readers import Readers
from bridge.reading import (
    CHUNK,
    Chunk,
    Wanted,
    begun,
    can_be_sent,
    files,
    first_row,
    is_packed,
    moved_row,
    pieces,
    read_live,
    read_old,
    skipped,
)
from bridge.state import StoreUnavailable
from bridge.telemetry import Telemetry, Throttle, log
from bridge.tools.tool import Transcripts
from bridge.tools.transcripts import TRANSCRIPTS

SCAN_SECONDS = 600.0
"""Between the scans that find what no event told; POLL_SECONDS where there are no events."""
POLL_SECONDS = 2.0
ROOT_SECONDS = 1.0
BATCH = 32 * 2**20
"""Bytes of history that are committed together, of at most BATCH_FILES files."""
BATCH_FILES = 256
PROCESS_BYTES = 64 * 2**20
"""Bytes of history above which processes read it; one takes as long to start as the bridge to read so much."""
T = TypeVar("T")


class Progress:
    """How far history is read, for people: `text` is empty when there is nothing to read."""

    def __init__(self) -> None:
        self.files = self.files_done = 0
        self.bytes = self.bytes_done = 0

    @property
    def text(self) -> str:
        if self.bytes_done >= self.bytes and self.files_done >= self.files:
            return ""
        percent = 100 * self.bytes_done // max(1, self.bytes)
        return f"reading history: {self.files_done} of {self.files} files, {percent} % of {self.bytes >> 20} MiB"


class Follower:
    """Follows roots, each with how its tool's transcripts are read, until it is cancelled."""

    def __init__(
        self, ledger: Ledger, roots: Mapping[str, Transcripts], telemetry: Telemetry, throttle: Throttle
    ) -> None:
        self._ledger = ledger
        self._roots = dict(roots)
        self._tools: dict[str, Transcripts] = {}
        self._telemetry = telemetry
        self._throttle = throttle
        self._files: dict[str, TranscriptRow] = {}
        self._changed: set[str] = set()
        self._unreadable: set[str] = set()
        self._held: set[str] = set()
        self._looked_ms = 0
        self._is_unpacking = False
        self._wake = asyncio.Event()
        self._reader = ThreadPoolExecutor(1, "transcripts")
        self._scanned_at = -SCAN_SECONDS
        self._polled_at = -POLL_SECONDS
        self._has_history = False
        self._watcher: Watcher | None = None
        self._readers: Readers | None = None
        self._may_start = True
        self._reading: dict[asyncio.Task[list[Chunk]], frozenset[str]] = {}
        self.progress = Progress()

    async def run(self) -> None:
        """Look at the roots, follow what changes, read history in between."""
        loop = asyncio.get_running_loop()
        is_loaded = False
        try:
            while True:
                try:
                    if not is_loaded:
                        await self._load()
                        is_loaded = True
                    self._wake.clear()
                    await self._look(loop)
                    await self._follow_changes()
                    if not await self._read_history():
                        with contextlib.suppress(TimeoutError):
                            async with asyncio.timeout(ROOT_SECONDS):
                                await self._wake.wait()
                except StoreUnavailable:
                    self._scanned_at = -SCAN_SECONDS  # finds again what was about to be read
                    await asyncio.sleep(ROOT_SECONDS)  # exports are refused too; the log says why
                except OSError as error:
                    if not ran_out(error):
                        raise
                    self._throttle.warning("descriptors", f"cannot read transcripts now: {ADVICE}")
                    self._scanned_at = -SCAN_SECONDS
                    await asyncio.sleep(ROOT_SECONDS)
        finally:
            if self._watcher is not None:
                self._watcher.stop()
            for task in self._reading:
                task.cancel()
            await self._stop_readers()
            self._reader.shutdown(wait=False, cancel_futures=True)

    async def _load(self) -> None:
        self._files = {row.path: row for row in await self._ledger.transcripts()}
        self._looked_ms = self._ledger.now_ms()
        looked = (await self._ledger.roots()).values()
        self._has_history = not all(looked) or any(row.history < row.history_end for row in self._files.values())

    # --- which files there are ---

    async def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """Watch the roots that exist, and scan them when it is time."""
        present = {root: found for root in self._roots if (found := _directory(root))}
        self._tools = {f"{found.path}/": self._roots[root] for root, found in present.items()}
        watched = tuple(present.values())
        if self._watcher is None or self._watcher.directories != watched or self._watcher.is_stale:
            if self._watcher is not None:
                self._watcher.stop()
            self._watcher = Watcher(watched, lambda paths: loop.call_soon_threadsafe(self._note, paths))
            self._scanned_at = -SCAN_SECONDS
        if loop.time() >= self._scanned_at + (SCAN_SECONDS if self._watcher.has_events else POLL_SECONDS):
            self._scanned_at = loop.time()
            await self._scan(present)
        elif self._watcher.unwatched and loop.time() >= self._polled_at + POLL_SECONDS:
            self._polled_at = loop.time()
            self._changed |= self._watcher.unwatched

    def _note(self, paths: set[str]) -> None:
        self._changed |= paths
        self._wake.set()

    async def _scan(self, present: "dict[str, Directory]") -> None:
        known = await self._ledger.roots()
        for root in self._roots:
            found = await self._in_reader(partial(self._files_below, present[root].path)) if root in present else []
            if root not in known:
                await self._first_look(root, found)
            self._changed |= {path for path, size in found if self._is_news(path, size)}
        self._telemetry.transcript_files.set(len(self._files))

    def _files_below(self, directory: str) -> list[tuple[str, int]]:
        tool = self._tool_of(f"{directory}/")
        return files(directory, tool) if tool else []

    def _tool_of(self, path: str) -> Transcripts | None:
        """The tool of the innermost root that a path is below."""
        roots = [root for root in self._tools if path.startswith(root)]
        return self._tools[max(roots, key=len)] if roots else None

    def _is_news(self, path: str, size: int) -> bool:
        row = self._files.get(path)
        return row is None or size != row.live

    async def _first_look(self, root: str, found: list[tuple[str, int]]) -> None:
        """All that stands there now is history; a root that is not there yet has none."""
        tool = self._roots[root]
        if self._may_start and sum(size for path, size in found if not is_packed(path)) > PROCESS_BYTES:
            await self._start_readers()  # so that they are ready when it is known what there is to read
        rows = await self._in_reader(lambda: [row for path, _ in found if (row := first_row(tool, path))])
        rows = await self._ledger.add_root(root, rows)
        self._has_history |= any(row.history_end for row in rows)
        self._looked_ms = self._ledger.now_ms()
        self._files.update((row.path, row) for row in rows)
        self.progress.files += len(rows)
        self.progress.bytes += sum(row.history_end for row in rows)
        if rows:
            size = sum(row.history_end for row in rows) >> 20
            log.info("first look at transcripts", extra={"root": root, "files": len(rows), "MiB": size})

    # --- what they say ---

    async def _follow_changes(self) -> None:
        changed, self._changed = self._changed, set()
        if not changed:
            return
        paths = {path for path in changed if (tool := self._tool_of(path)) and tool.holds(path)}
        for directory in changed - paths:  # it may have had files before it was watched
            found = await self._in_reader(partial(self._files_below, directory))
            paths |= {path for path, size in found if self._is_news(path, size)}
        # The oldest first: a fork that is read before what it copies would be served, and then be a copy.
        for begin, path in await self._in_reader(lambda: sorted(map(self._begun, paths))):
            if self._has_history and path not in self._files and begin < self._looked_ms:
                await self._hold(path)
            else:
                await self._follow(path)

    async def _hold(self, path: str) -> None:
        """Keep a file that may copy history until that is read, for nobody knows yet what it copies. One that history
        has under another name is known under both from now on."""
        moved = await self._in_reader(lambda: moved_row(path, self._files.values()))
        if moved is None:
            self._held.add(path)
        else:
            self._files[path] = await self._ledger.post_transcript(moved, (), (), is_history=True)
            await self._follow(path)

    async def _follow(self, path: str) -> None:
        tool = self._tool_of(path)
        if tool is None:
            return
        if is_packed(path):
            await self._unpack(tool, path)
            return
        more = True
        while more:
            row = self._files.get(path)
            if row is not None and row.history < row.history_end and (tool.is_sequential or tool.is_document(path)):
                while self._reading:
                    await self._commit_next()
                await self._commit_history(await self._in_reader(partial(self._read_here, [row])))
                continue
            try:
                chunk = await self._in_reader(partial(read_live, tool, path, row))
            except OSError as error:
                if ran_out(error):
                    raise
                if not isinstance(error, FileNotFoundError):
                    self._note_unreadable(path, error.strerror)
                return
            if chunk is None:
                return
            await self._commit(chunk, is_history=False)
            more = chunk.more

    async def _read_history(self) -> bool:
        """Have history read and commit what is ready of it; whether there is more."""
        if not (self._has_history or self._reading):
            return False
        if self._may_start and self._left() > PROCESS_BYTES:
            await self._start_readers()
        while len(self._reading) < (2 * self._readers.count if self._readers else 1) and (rows := self._next_rows()):
            self._reading[asyncio.create_task(self._read(rows))] = frozenset(row.path for row in rows)
        if not self._reading:
            return await self._unpack_history() or await self._finish_history()
        await self._commit_next()
        return True

    async def _unpack(self, tool: Transcripts, path: str) -> None:
        """Read a packed file if it is not read yet. What else changes meanwhile is followed between its pieces."""
        row = self._files.get(path)
        is_history = row is not None and row.history < row.history_end
        if self._is_unpacking or path in self._unreadable:
            self._changed |= {path} - self._unreadable
            return
        chunks = pieces(tool, path, row, is_history=is_history)
        self._is_unpacking = True
        try:
            while chunk := await self._in_reader(lambda: next(chunks, None)):
                await self._commit(chunk, is_history=is_history)
                if is_history:
                    self._note_history(chunk)
                if chunk.again:
                    self._changed.add(path)
                if chunk.more and not self._changed <= {path}:
                    await self._follow_changes()
        except NoUnpacker:
            self._unreadable.add(path)  # it stays what it is, history or new, for a bridge that can
            self._note_unreadable(path, "backports.zstd is not installed")
            if row is not None and is_history:
                self._note_history(skipped(row))
        except (Damaged, OSError) as error:
            if ran_out(error):
                raise
            if not isinstance(error, FileNotFoundError):
                self._note_unreadable(path, str(error))
            row = self._files.get(path)
            if row is not None and row.history < row.history_end:
                await self._commit(skipped(row), is_history=True)
        finally:
            self._is_unpacking = False

    async def _unpack_history(self) -> bool:
        for row in self._files.values():
            if self._has_more(row) and is_packed(row.path) and (tool := self._tool_of(row.path)):
                await self._unpack(tool, row.path)
                return True
        return False

    def _has_more(self, row: TranscriptRow) -> bool:
        return row.history < row.history_end and row.path not in self._unreadable

    def _left(self) -> int:
        """Bytes of history that processes may read."""
        rows = (row for row in self._files.values() if self._has_more(row) and not is_packed(row.path))
        return sum(row.history_end - row.history for row in rows)

    async def _start_readers(self) -> None:
        self._may_start = False
        try:
            self._readers = await Readers.start()
        except OSError as error:
            log.warning("no process can be started to read history; the bridge reads it", extra={"why": error})

    async def _stop_readers(self) -> None:
        if self._readers is not None:
            readers, self._readers = self._readers, None
            await readers.close()

    def _next_rows(self) -> list[TranscriptRow]:
        """The files of which a piece is to be read next: one, or several small ones."""
        rows: list[TranscriptRow] = []
        size = 0
        busy = frozenset[str]().union(*self._reading.values())
        for row in self._files.values():
            if size >= BATCH or len(rows) >= BATCH_FILES:
                break
            if self._has_more(row) and row.path not in busy and not is_packed(row.path):
                rows.append(row)
                size += min(CHUNK, row.history_end - row.history)
        return rows

    async def _read(self, rows: list[TranscriptRow]) -> list[Chunk]:
        tools = [self._tool_of(row.path) for row in rows]
        if self._readers and all(tool and can_be_sent(tool, row) for tool, row in zip(tools, rows, strict=True)):
            names = [_NAMES[tool.roots] for tool in tools if tool]
            try:
                return await self._readers.read([*map(Wanted, names, rows)])
            except (OSError, EOFError, ValueError) as error:
                self._throttle.warning("readers", "a process that reads history has failed", why=repr(error))
                await self._stop_readers()
        return await self._in_reader(partial(self._read_here, rows))

    def _read_here(self, rows: list[TranscriptRow]) -> list[Chunk]:
        return [read_old(self._tool_of(row.path), row) for row in rows]

    async def _commit_next(self) -> None:
        """Commit what is read first; return when something else has changed, or may have: nobody waits for two."""
        waking = asyncio.create_task(self._wake.wait())
        done, _ = await asyncio.wait(
            (*self._reading, waking), timeout=ROOT_SECONDS, return_when=asyncio.FIRST_COMPLETED
        )
        waking.cancel()
        for task in [task for task in self._reading if task in done]:
            del self._reading[task]
            await self._commit_history(await task)
            if self._wake.is_set():
                break

    async def _commit_history(self, chunks: list[Chunk]) -> None:
        kept = [piece for chunk in chunks if (piece := self._kept(chunk))]
        answers = self._ledger.post_history((piece.row, piece.usages) for piece in kept)
        for piece, outcome in zip(kept, await asyncio.gather(*answers, return_exceptions=True), strict=True):
            row = piece.row
            if isinstance(outcome, Unpostable):
                row = await self._pass_over(piece, outcome, is_history=True)
            elif isinstance(outcome, BaseException):
                raise outcome
            self._note_commit(piece, row)
        for chunk in chunks:
            self._note_history(chunk)
            if chunk.again:
                self._changed.add(chunk.row.path)

    def _note_history(self, chunk: Chunk) -> None:
        self.progress.bytes_done += chunk.bytes_read
        self.progress.files_done += chunk.row.history >= chunk.row.history_end
        if text := self.progress.text:
            self._throttle.info("history", text)

    def _kept(self, chunk: Chunk) -> Chunk | None:
        """A piece beside what was followed of its file meanwhile; None if the file was replaced."""
        read, row = chunk.row, self._files[chunk.row.path]
        if (read.device, read.inode, read.history_end) != (row.device, row.inode, row.history_end):
            return None
        return chunk._replace(row=row._replace(history=read.history, state=read.state))

    async def _finish_history(self) -> bool:
        await self._stop_readers()
        self._may_start = True
        if self._has_history:
            await self._ledger.finish_history()
            self._has_history = False
            self._note(self._held)
            self._held = set()
            log.info("history is read", extra={"files": self.progress.files})
        return False

    async def _commit(self, chunk: Chunk, *, is_history: bool) -> None:
        try:
            row = await self._ledger.post_transcript(chunk.row, chunk.usages, chunk.points, is_history=is_history)
        except Unpostable as error:
            row = await self._pass_over(chunk, error, is_history=is_history)
        self._note_commit(chunk, row)

    async def _pass_over(self, chunk: Chunk, error: Unpostable, *, is_history: bool) -> TranscriptRow:
        self._note_unreadable(chunk.row.path, f"a fault of the bridge, please report it: {error}")
        return await self._ledger.post_transcript(chunk.row, (), (), is_history=is_history)

    def _note_commit(self, chunk: Chunk, row: TranscriptRow) -> None:
        self._files[row.path] = row
        self._telemetry.transcript_files.set(len(self._files))
        self._telemetry.transcript_bytes.inc(chunk.bytes_read)
        for reason, count in chunk.refused.items():
            self._telemetry.transcript_refused.labels(reason.value).inc(count)
        if chunk.too_long:
            self._telemetry.transcript_refused.labels("too_long").inc(chunk.too_long)

    def _note_unreadable(self, path: str, why: str | None) -> None:
        self._telemetry.transcript_errors.inc()
        self._throttle.warning("transcript", "cannot read a transcript", path=path, error=why)

    async def _in_reader(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._reader, work)

    # --- in the reader's thread ---

    def _begun(self, path: str) -> tuple[int, str]:
        row = self._files.get(path)
        return (begun(path) if row is None else row.origin), path


_NAMES = {tool.roots: name for name, tool in TRANSCRIPTS.items()}


# --- files -----------------------------------------------------------------------------------------------------


def _directory(root: str) -> Directory | None:
    with contextlib.suppress(OSError):
        found = os.stat(root)  # noqa: PTH116  # this and the next are asked every second, and pathlib takes longer
        if stat.S_ISDIR(found.st_mode):
            return Directory(os.path.realpath(root), found.st_dev, found.st_ino)
    return None
