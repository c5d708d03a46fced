"""Follows the transcripts of tools, a second source of usage: JSONL files that grow, or documents that are rewritten.

Law: what a file says and how far it was read are committed in one transaction, so a crash repeats nothing and loses
nothing; keys make a second reading harmless, so whatever looks new is read again from its start. What stands under a
root at the bridge's first look is history: it is read in the background, for the reports, and never served. What is
appended later, also while the bridge was down, counts. Files are only read, in blocks, by one thread; symbolic links
are not followed; a file that cannot be read is counted and tried again when it changes. A document is read as a whole
whenever it has changed; if that is before its history was read, the times of what it tells say what is history. A
packed file is immutable: it is unpacked from its start, and read once its end was reached.

Changes are told by the file system's events, through watchfiles, which saves one such implementation for each
platform; a slow scan finds what events miss, and replaces them where there are none.
"""

import asyncio
import contextlib
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, TypeVar

from bridge.jsonl import Lines
from bridge.ledger import Ledger
from bridge.model import DataPoint, Drop, Usage
from bridge.packed import Damaged, NoUnpacker, unpacked
from bridge.store import StoreUnavailable
from bridge.telemetry import Telemetry, Throttle, log
from bridge.tools.tool import Transcripts
from bridge.usage_store import TranscriptRow

BLOCK = 256 * 2**10
CHUNK = 8 * 2**20
"""Bytes of a file that are read for one transaction; of history several files together, at most FILES."""
FILES = 64
HEAD = 1024
MAX_DOCUMENT = 64 * 2**20
"""Bytes of a document above which it is passed over and counted, since all of it is in memory at once."""
SCAN_SECONDS = 600.0
"""Between the scans that find what no event told; POLL_SECONDS where there are no events."""
POLL_SECONDS = 2.0
ROOT_SECONDS = 1.0
PROGRESS_SECONDS = 5.0
T = TypeVar("T")
_TIMESTAMP = re.compile(rb'"timestamp"\s*:\s*"([^"]{10,40})"')


class Chunk(NamedTuple):
    """What a piece of a file says, and the file's row after it. `more`: the file goes on."""

    row: TranscriptRow
    usages: tuple[Usage, ...]
    points: tuple[DataPoint, ...]
    refused: dict[Drop, int]
    too_long: int
    bytes_read: int
    more: bool


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
        self._is_unpacking = False
        self._wake = asyncio.Event()
        self._reader = ThreadPoolExecutor(1, "transcripts")
        self._scanned_at = -SCAN_SECONDS
        self._has_history = False
        self._watcher: Watcher | None = None
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
        finally:
            if self._watcher is not None:
                self._watcher.stop()
            self._reader.shutdown(wait=False, cancel_futures=True)

    async def _load(self) -> None:
        self._files = {row.path: row for row in await self._ledger.transcripts()}
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
        return _files(directory, tool) if tool else []

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
        rows = [row for path, _ in found if (row := await self._in_reader(partial(_first_row, tool, path)))]
        rows = await self._ledger.add_root(root, rows)
        self._has_history |= any(row.history_end for row in rows)
        self._files.update((row.path, row) for row in rows)
        self.progress.files += len(rows)
        self.progress.bytes += sum(row.history_end for row in rows)
        if rows:
            size = sum(row.history_end for row in rows) >> 20
            log.info("first look at transcripts", extra={"root": root, "files": len(rows), "MiB": size})

    # --- what they say ---

    async def _follow_changes(self) -> None:
        changed, self._changed = self._changed, set()
        paths = {path for path in changed if (tool := self._tool_of(path)) and tool.holds(path)}
        for directory in changed - paths:  # it may have had files before it was watched
            found = await self._in_reader(partial(self._files_below, directory))
            paths |= {path for path, size in found if self._is_news(path, size)}
        # The oldest first: a fork that is read before what it copies would be served, and then be a copy.
        for path in await self._in_reader(lambda: sorted(paths, key=self._begun)):
            await self._follow(path)

    async def _follow(self, path: str) -> None:
        tool = self._tool_of(path)
        if tool is None:
            return
        if _is_packed(path):
            await self._unpack(tool, path)
            return
        more = True
        while more:
            row = self._files.get(path)
            if row is not None and row.history < row.history_end and (tool.is_sequential or tool.is_document(path)):
                await self._read_history_of([row])
                continue
            try:
                chunk = await self._in_reader(partial(self._read_live, tool, path, row))
            except OSError as error:
                if not isinstance(error, FileNotFoundError):
                    self._note_unreadable(path, error.strerror)
                return
            if chunk is None:
                return
            await self._commit(chunk, is_history=False)
            more = chunk.more

    async def _read_history(self) -> bool:
        """Read a piece of history, of one file or of several small ones in one transaction; whether there was any."""
        rows: list[TranscriptRow] = []
        size = 0
        for row in self._files.values():
            if row.history < row.history_end and row.path not in self._unreadable:
                if _is_packed(row.path) and (tool := self._tool_of(row.path)):
                    await self._unpack(tool, row.path)
                    return True
                if size < CHUNK and len(rows) < FILES:
                    rows.append(row)
                    size += row.history_end - row.history
        if not rows:
            return await self._finish_history()
        await self._read_history_of(rows)
        return True

    async def _unpack(self, tool: Transcripts, path: str) -> None:
        """Read a packed file if it is not read yet. What else changes meanwhile is followed between its pieces."""
        row = self._files.get(path)
        is_history = row is not None and row.history < row.history_end
        if self._is_unpacking or path in self._unreadable:
            self._changed |= {path} - self._unreadable
            return
        pieces = self._pieces(tool, path, row, is_history=is_history)
        self._is_unpacking = True
        try:
            while chunk := await self._in_reader(lambda: next(pieces, None)):
                await self._commit(chunk, is_history=is_history)
                if is_history:
                    self._note_history(chunk)
                if chunk.more and not self._changed <= {path}:
                    await self._follow_changes()
        except NoUnpacker:
            self._unreadable.add(path)  # it stays what it is, history or new, for a bridge that can
            self._note_unreadable(path, "backports.zstd is not installed")
            if row is not None and is_history:
                self._note_history(_skipped(row))
        except (Damaged, OSError) as error:
            if not isinstance(error, FileNotFoundError):
                self._note_unreadable(path, str(error))
            row = self._files.get(path)
            if row is not None and row.history < row.history_end:
                await self._commit(_skipped(row), is_history=True)
        finally:
            self._is_unpacking = False

    async def _read_history_of(self, rows: list[TranscriptRow]) -> None:
        chunks = await self._in_reader(lambda: [self._read_old_or_skip(row) for row in rows])
        await asyncio.gather(*(self._commit(chunk, is_history=True) for chunk in chunks))
        for chunk in chunks:
            self._note_history(chunk)

    def _note_history(self, chunk: Chunk) -> None:
        self.progress.bytes_done += chunk.bytes_read
        self.progress.files_done += chunk.row.history >= chunk.row.history_end
        if text := self.progress.text:
            self._throttle.info("history", text)

    async def _finish_history(self) -> bool:
        if self._has_history:
            await self._ledger.finish_history()
            self._has_history = False
            log.info("history is read", extra={"files": self.progress.files})
        return False

    async def _commit(self, chunk: Chunk, *, is_history: bool) -> None:
        row = await self._ledger.post_transcript(chunk.row, chunk.usages, chunk.points, is_history=is_history)
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
        if row is not None:
            return row.origin, path
        with contextlib.suppress(OSError), _opened(path) as descriptor:
            return _origin(_beginning(path, descriptor), os.fstat(descriptor).st_mtime_ns), path
        return 0, path

    def _read_live(self, tool: Transcripts, path: str, row: TranscriptRow | None) -> Chunk | None:
        """What was appended to a file; None if nothing was. A file that was replaced or cut is read from its start."""
        with _opened(path) as descriptor:
            found = os.fstat(descriptor)
            if tool.is_document(path):
                origin = row.origin if row else _origin(os.pread(descriptor, 64 * 1024, 0), found.st_mtime_ns)
                row = row or TranscriptRow(0, path, 0, 0, b"", 0, 0, 0, origin)
                return None if row.head == _version(found) else _read_document(tool, descriptor, row, found)
            if row is None or not _is_same(descriptor, found, row):
                head = os.pread(descriptor, HEAD, 0)
                origin = _origin(os.pread(descriptor, 64 * 1024, 0), found.st_mtime_ns)
                row = TranscriptRow(
                    row.id if row else 0, path, found.st_dev, found.st_ino, _head(head), 0, 0, 0, origin
                )  # fmt: skip
            if found.st_size <= row.live:
                return None
            chunk = self._read(tool, descriptor, row, row.live, found.st_size)
            if chunk.row.live == row.live and row.id:
                return None  # a line that is not complete yet
            if _head_size(row) < HEAD:
                chunk = chunk._replace(row=chunk.row._replace(head=_head(os.pread(descriptor, HEAD, 0))))
            return chunk

    def _read_old_or_skip(self, row: TranscriptRow) -> Chunk:
        """A piece of a file's history. Of a file that is gone or replaced there is none: it is followed as new."""
        with contextlib.suppress(OSError):
            if chunk := self._read_old(row):
                return chunk
        self._changed.add(row.path)
        return _skipped(row)

    def _read_old(self, row: TranscriptRow) -> Chunk | None:
        tool = self._tool_of(row.path)
        if tool is None:
            return None
        with _opened(row.path) as descriptor:
            if tool.is_document(row.path):
                return self._read_old_document(tool, descriptor, row)
            if not _is_same(descriptor, os.fstat(descriptor), row):
                return None
            chunk = self._read(tool, descriptor, row, row.history, row.history_end)
            read_to = chunk.row.live if chunk.row.live > row.history else row.history_end
            return chunk._replace(row=row._replace(history=min(read_to, row.history_end), state=chunk.row.state))

    def _read_old_document(self, tool: Transcripts, descriptor: int, row: TranscriptRow) -> Chunk | None:
        """What stood in a document at the first look; when it has changed since, by the times of what it tells."""
        found = os.fstat(descriptor)
        chunk = _read_document(tool, descriptor, row, found)
        if chunk is None:
            return None
        usages = chunk.usages
        if row.head != _version(found):
            usages = tuple(usage for usage in usages if usage.time_ms <= int(row.state))
            self._changed.add(row.path)  # what came later is read again, and counts
        return chunk._replace(row=row._replace(history=row.history_end), usages=usages, points=())

    def _read(self, tool: Transcripts, descriptor: int, row: TranscriptRow, start: int, end: int) -> Chunk:
        """Up to CHUNK bytes of complete lines from `start`; the row's `live` is where they end."""
        lines = Lines(tool.keys, offset=start)
        reader = tool.reader(row.path, row.origin, row.state)
        usages: list[Usage] = []
        refused: dict[Drop, int] = {}
        position = start
        while position < end and (position < start + CHUNK or lines.offset == start):
            block = os.pread(descriptor, min(BLOCK, end - position), position)
            if not block:
                break
            position += len(block)
            for line in lines.feed(block):
                _take(reader.read(line), usages, refused)
        more = position < end
        row = row._replace(live=lines.offset, state=reader.state)
        return Chunk(row, tuple(usages), reader.gauges(), refused, lines.too_long, position - start, more)

    def _pieces(self, tool: Transcripts, path: str, row: TranscriptRow | None, *, is_history: bool) -> Iterator[Chunk]:
        """What a packed file says, in pieces of about CHUNK bytes; its row says that it is read with the last alone."""
        with _opened(path) as descriptor:
            found = os.fstat(descriptor)
            version, size = _version(found), found.st_size
            if row is None:
                origin = _origin(_beginning(path, descriptor), found.st_mtime_ns)
                row = TranscriptRow(0, path, found.st_dev, found.st_ino, b"", 0, 0, 0, origin)
            elif is_history and row.head != version:
                self._changed.add(path)
                yield _skipped(row)._replace(row=row._replace(history=row.history_end, head=b""))
                return
            elif not is_history and row.head == version:
                return
            done = row._replace(head=version, history=row.history_end, live=size)
            lines, reader = Lines(tool.keys), tool.reader(path, row.origin, b"")
            position = taken = passed = 0

            def read(count: int) -> bytes:
                nonlocal position
                block = os.pread(descriptor, count, position)
                position += len(block)
                return block

            said = Chunk(row, (), (), {}, 0, 0, more=True)
            usages: list[Usage] = []
            damage: Damaged | None = None
            try:
                for block in unpacked(read):
                    for line in lines.feed(block):
                        _take(reader.read(line), usages, said.refused)
                    if lines.offset - passed >= CHUNK:
                        yield said._replace(usages=tuple(usages), too_long=lines.too_long, bytes_read=position - taken)
                        passed, taken, lines.too_long = lines.offset, position, 0
                        usages, said = [], said._replace(refused={})
            except Damaged as error:
                damage = error  # what stands before it counts
            yield Chunk(done, tuple(usages), reader.gauges(), said.refused, lines.too_long, size - taken, more=False)
            if damage is not None:
                raise damage


def _take(said: tuple[Usage | Drop, ...] | Drop, usages: list[Usage], refused: dict[Drop, int]) -> None:
    for one in (said,) if isinstance(said, Drop) else said:
        if isinstance(one, Drop):
            refused[one] = refused.get(one, 0) + 1
        else:
            usages.append(one)


def _read_document(tool: Transcripts, descriptor: int, row: TranscriptRow, found: os.stat_result) -> Chunk | None:
    """All that a document says, and its row; None while it is being written, which will be told of."""
    row = row._replace(device=found.st_dev, inode=found.st_ino, head=_version(found), live=found.st_size)
    if found.st_size > MAX_DOCUMENT:
        return Chunk(row, (), (), {}, 1, 0, more=False)
    content = bytearray()
    while block := os.pread(descriptor, BLOCK, len(content)):
        content += block
        if len(content) > found.st_size:
            return None
    if _version(os.fstat(descriptor)) != row.head:
        return None
    reader = tool.reader(row.path, row.origin, b"")
    usages: list[Usage] = []
    refused: dict[Drop, int] = {}
    if content:
        _take(reader.read(bytes(content)), usages, refused)
    return Chunk(row, tuple(usages), reader.gauges(), refused, 0, len(content), more=False)


def _skipped(row: TranscriptRow) -> Chunk:
    """Nothing of the rest of a file's history."""
    return Chunk(row._replace(history=row.history_end), (), (), {}, 0, row.history_end - row.history, more=False)


def _version(found: os.stat_result) -> bytes:
    """What changes when a document or a packed file does."""
    return blake2b(f"{found.st_ino} {found.st_size} {found.st_mtime_ns}".encode(), digest_size=16).digest()


# --- files -----------------------------------------------------------------------------------------------------


class Directory(NamedTuple):
    """A root that is there: where it really lies, since events tell of real paths, and which directory it is."""

    path: str
    device: int
    inode: int


def _directory(root: str) -> Directory | None:
    with contextlib.suppress(OSError):
        found = Path(root).stat()
        if stat.S_ISDIR(found.st_mode):
            return Directory(str(Path(root).resolve()), found.st_dev, found.st_ino)
    return None


def _files(root: str, tool: Transcripts) -> list[tuple[str, int]]:
    """The transcripts below a root with their sizes; links and what cannot be read are left out."""
    found: list[tuple[str, int]] = []
    pending = [root]
    while pending:
        with contextlib.suppress(OSError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                elif tool.holds(entry.path) and entry.is_file(follow_symlinks=False):
                    with contextlib.suppress(OSError):
                        found.append((entry.path, entry.stat(follow_symlinks=False).st_size))
    return found


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    """A regular file, reached without any link: events also tell of what lies behind links to directories."""
    directory = Path(path).parent
    if directory.resolve() != directory:
        raise FileNotFoundError(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FileNotFoundError(path)
        yield descriptor
    finally:
        os.close(descriptor)


def _first_row(tool: Transcripts, path: str) -> TranscriptRow | None:
    """A file at the first look: its complete lines are history, or all of a document."""
    try:
        with _opened(path) as descriptor:
            found = os.fstat(descriptor)
            origin = _origin(_beginning(path, descriptor), found.st_mtime_ns)
            if tool.is_document(path) or _is_packed(path):
                size, changed = found.st_size, str(found.st_mtime_ns // 1_000_000).encode()
                return TranscriptRow(
                    0, path, found.st_dev, found.st_ino, _version(found), 0, size, size, origin, changed
                )  # fmt: skip
            end = _last_line_end(descriptor, found.st_size)
            head = _head(os.pread(descriptor, HEAD, 0))
            return TranscriptRow(0, path, found.st_dev, found.st_ino, head, 0, end, end, origin)
    except OSError:
        return None


def _is_packed(path: str) -> bool:
    return path.endswith(".zst")


def _beginning(path: str, descriptor: int) -> bytes:
    """The first bytes of a file's text; none where it cannot be unpacked."""
    beginning = os.pread(descriptor, 64 * 1024, 0)
    if not _is_packed(path):
        return beginning
    packed = iter((beginning,))
    with contextlib.suppress(NoUnpacker, Damaged):
        return next(unpacked(lambda _: next(packed, b"")), b"")
    return b""


def _last_line_end(descriptor: int, size: int) -> int:
    """Where the last complete line of a file ends."""
    end = size
    while end > 0:
        start = max(0, end - BLOCK)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _head(beginning: bytes) -> bytes:
    """What a file begins with: how many bytes of it were there, and their hash."""
    return len(beginning).to_bytes(2, "big") + blake2b(beginning, digest_size=16).digest()


def _head_size(row: TranscriptRow) -> int:
    return int.from_bytes(row.head[:2], "big")


def _is_same(descriptor: int, found: os.stat_result, row: TranscriptRow) -> bool:
    """Whether a file is the one that was read before, only longer."""
    if (found.st_dev, found.st_ino) != (row.device, row.inode) or found.st_size < max(row.live, row.history_end):
        return False
    return _head(os.pread(descriptor, _head_size(row), 0)) == row.head


def _origin(beginning: bytes, modified_ns: int) -> int:
    """When a file was begun, in Unix ms: its first time stamp. A fork's own first line is newer than what it copies."""
    found = _TIMESTAMP.search(beginning)
    if found is not None:
        with contextlib.suppress(ValueError):
            when = datetime.fromisoformat(found[1].decode())
            when = when if when.tzinfo else when.replace(tzinfo=UTC)
            return int(when.timestamp() * 1000)
    return modified_ns // 1_000_000


# --- events ----------------------------------------------------------------------------------------------------


class Watcher:
    """Tells of changed paths below directories, from a thread of its own. `has_events` is false where it cannot.

    It tells of the directories themselves once it watches them: what changed before that is known to nobody else.
    `is_stale` says that one of them is no more, or is another one.
    """

    def __init__(self, directories: tuple[Directory, ...], tell: Callable[[set[str]], object]) -> None:
        self.directories = directories
        self.has_events = self.is_stale = False
        self._stop = threading.Event()
        try:
            import watchfiles
        except ImportError:
            log.warning("watchfiles is not installed; transcripts are looked at every two seconds")
            return
        if not directories:
            self.has_events = True  # there is nothing to miss; a root that appears makes another watcher
            return
        paths = {directory.path for directory in directories}
        changes = watchfiles.watch(
            *paths, watch_filter=None, debounce=100, step=50, stop_event=self._stop, rust_timeout=1000,
            yield_on_timeout=True, raise_interrupt=False, ignore_permission_denied=True,
        )  # fmt: skip
        self.has_events = True

        def pump() -> None:
            try:
                unseen = paths
                for change in changes:
                    told = {path for _, path in change}
                    self.is_stale |= not told.isdisjoint(paths)
                    if told or unseen:
                        tell(told | unseen)
                    unseen = set()
            except (OSError, RuntimeError) as error:
                self.has_events = False
                log.warning("no file system events; transcripts are looked at every two seconds", extra={"why": error})

        threading.Thread(target=pump, name="watch", daemon=True).start()

    def stop(self) -> None:
        self._stop.set()
