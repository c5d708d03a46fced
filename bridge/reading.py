"""Reads pieces of transcripts: which files there are, which file is which, and what a piece of one says.

Law: files are only read, in blocks, and never reached through links. A piece depends on the file and its row alone, so
it may be read anywhere: in the follower's thread, or in a process of its own, which is how long history is read
without holding up the bridge. `python -m bridge.reading` is such a process: it takes requests from its standard
input, gives pieces to its standard output in the same order, and ends with its input.

Memory: CHUNK bytes of a file say a few MB at most; a line or document may be as long as MAX_LINE or MAX_DOCUMENT.
"""

import contextlib
import os
import re
import signal
import stat
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from hashlib import blake2b
from typing import BinaryIO, NamedTuple

import msgspec

from bridge.descriptors import passing_over
from bridge.jsonl import Lines
from bridge.model import DataPoint, Drop, TranscriptRow, Usage
from bridge.packed import Damaged, NoUnpacker, unpacked
from bridge.tools.tool import Transcripts
from bridge.tools.transcripts import TRANSCRIPTS

BLOCK = 256 * 2**10
CHUNK = 8 * 2**20
"""Bytes of a file that are read for one transaction."""
MAX_DOCUMENT = 64 * 2**20
"""Bytes of a document above which it is passed over and counted, since all of it is in memory at once."""
HEAD = 1024
_REAL: dict[str, tuple[int, int]] = {}
MAX_REAL = 4096
"""Directories that are known to be reached without links, with their device and inode."""
_BEGINNING = 64 * 2**10
_TIMESTAMP = re.compile(rb'"timestamp"\s*:\s*"([^"]{10,40})"')


class Chunk(NamedTuple):
    """What a piece of a file says, and the file's row after it.

    `more`: the file goes on. `again`: it is not, or no more, the file that the row tells of, and has to be looked at.
    """

    row: TranscriptRow
    usages: tuple[Usage, ...]
    refused: dict[Drop, int]
    too_long: int
    bytes_read: int
    more: bool
    again: bool = False
    points: tuple[DataPoint, ...] = ()


# --- files -----------------------------------------------------------------------------------------------------


def files(root: str, tool: Transcripts) -> list[tuple[str, int]]:
    """The transcripts below a root with their sizes; links and what cannot be read are left out. Raises OSError where
    descriptors have run out, as all here do."""
    found: list[tuple[str, int]] = []
    pending = [root]
    while pending:
        with passing_over(), os.scandir(pending.pop()) as entries:
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
    if not _is_real(os.path.dirname(path)):  # noqa: PTH120  # pathlib takes five times as long
        raise FileNotFoundError(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FileNotFoundError(path)
        yield descriptor
    finally:
        os.close(descriptor)


def _is_real(directory: str) -> bool:
    """Whether no part of a directory's path is a link; once known, it holds for as long as it is the same directory."""
    found = os.stat(directory)  # noqa: PTH116  # as above
    identity = found.st_dev, found.st_ino
    if _REAL.get(directory) != identity:
        if os.path.realpath(directory) != directory:
            return False
        if len(_REAL) >= MAX_REAL:
            _REAL.clear()
        _REAL[directory] = identity
    return True


def first_row(tool: Transcripts, path: str) -> TranscriptRow | None:
    """A file at the first look: its complete lines are history, or all of a document."""
    with passing_over(), _opened(path) as descriptor:
        found = os.fstat(descriptor)
        beginning = _beginning(path, descriptor)
        origin = _origin(beginning, found.st_mtime_ns)
        if tool.is_document(path) or is_packed(path):
            size, changed = found.st_size, str(found.st_mtime_ns // 1_000_000).encode()
            return TranscriptRow(0, path, found.st_dev, found.st_ino, version(found), 0, size, size, origin, changed)
        end = _last_line_end(descriptor, found.st_size)
        return TranscriptRow(0, path, found.st_dev, found.st_ino, _head(beginning[:HEAD]), 0, end, end, origin)
    return None


def moved_row(path: str, rows: Iterable[TranscriptRow]) -> TranscriptRow | None:
    """The row of a file that is known under another path where it is no more, with history that is not read yet."""
    with passing_over(), _opened(path) as descriptor:
        found = os.fstat(descriptor)
        for row in rows:
            if row.history < row.history_end and _is_same(descriptor, found, row) and not os.path.exists(row.path):  # noqa: PTH110
                return row._replace(id=0, path=path)
    return None


def begun(path: str) -> int:
    """When a file was begun, in Unix ms; 0 of one that cannot be read."""
    with passing_over(), _opened(path) as descriptor:
        return _origin(_beginning(path, descriptor), os.fstat(descriptor).st_mtime_ns)
    return 0


def is_packed(path: str) -> bool:
    """Whether a file has to be unpacked, which `pieces` does."""
    return path.endswith(".zst")


def _beginning(path: str, descriptor: int) -> bytes:
    """The first bytes of a file's text; none where it cannot be unpacked."""
    beginning = os.pread(descriptor, _BEGINNING, 0)
    if not is_packed(path):
        return beginning
    packed = iter((beginning,))
    with contextlib.suppress(NoUnpacker, Damaged):
        return next(unpacked(lambda _: next(packed, b"")), b"")
    return b""


def _last_line_end(descriptor: int, size: int) -> int:
    """Where the last complete line of a file ends."""
    end, step = size, 4096
    while end > 0:
        start = max(0, end - step)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end, step = start, min(2 * step, BLOCK)
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


def version(found: os.stat_result) -> bytes:
    """What changes when a document or a packed file does."""
    return blake2b(f"{found.st_ino} {found.st_size} {found.st_mtime_ns}".encode(), digest_size=16).digest()


def _origin(beginning: bytes, modified_ns: int) -> int:
    """When a file was begun, in Unix ms: its first time stamp. A fork's own first line is newer than what it copies."""
    found = _TIMESTAMP.search(beginning)
    if found is not None:
        with contextlib.suppress(ValueError):
            when = datetime.fromisoformat(found[1].decode())
            when = when if when.tzinfo else when.replace(tzinfo=UTC)
            return int(when.timestamp() * 1000)
    return modified_ns // 1_000_000


# --- what they say ---------------------------------------------------------------------------------------------


def read_live(tool: Transcripts, path: str, row: TranscriptRow | None) -> Chunk | None:
    """What was appended to a file; None if nothing was. A file that was replaced or cut is read from its start."""
    with _opened(path) as descriptor:
        found = os.fstat(descriptor)
        if tool.is_document(path):
            origin = row.origin if row else _origin(os.pread(descriptor, _BEGINNING, 0), found.st_mtime_ns)
            row = row or TranscriptRow(0, path, 0, 0, b"", 0, 0, 0, origin)
            return None if row.head == version(found) else _read_document(tool, descriptor, row, found)
        if row is None or not _is_same(descriptor, found, row):
            beginning = os.pread(descriptor, _BEGINNING, 0)
            origin = _origin(beginning, found.st_mtime_ns)
            number, head = row.id if row else 0, _head(beginning[:HEAD])
            row = TranscriptRow(number, path, found.st_dev, found.st_ino, head, 0, 0, 0, origin)
        if found.st_size <= row.live:
            return None
        chunk = _read(tool, descriptor, row, row.live, found.st_size)
        if chunk.row.live == row.live and row.id:
            return None  # a line that is not complete yet
        if _head_size(row) < HEAD:
            chunk = chunk._replace(row=chunk.row._replace(head=_head(os.pread(descriptor, HEAD, 0))))
        return chunk


def read_old(tool: Transcripts | None, row: TranscriptRow) -> Chunk:
    """A piece of a file's history. Of a file that is gone or replaced there is none: it is followed as new."""
    with passing_over():
        if tool is not None and (chunk := _read_old(tool, row)):
            return chunk
    return skipped(row)._replace(again=True)


def skipped(row: TranscriptRow) -> Chunk:
    """Nothing of the rest of a file's history."""
    return Chunk(row._replace(history=row.history_end), (), {}, 0, row.history_end - row.history, more=False)


def _read_old(tool: Transcripts, row: TranscriptRow) -> Chunk | None:
    with _opened(row.path) as descriptor:
        found = os.fstat(descriptor)
        if tool.is_document(row.path):
            return _read_old_document(tool, descriptor, row, found)
        if not _is_same(descriptor, found, row):
            return None
        chunk = _read(tool, descriptor, row, row.history, row.history_end)
        read_to = chunk.row.live if chunk.row.live > row.history else row.history_end
        row = row._replace(history=min(read_to, row.history_end), state=chunk.row.state)
        return chunk._replace(row=row, usages=_settled(chunk.usages))


def _settled(usages: Iterable[Usage]) -> tuple[Usage, ...]:
    """Each response once: it may stand there several times, and further each time."""
    best: dict[tuple[object, ...], Usage] = {}
    for usage in usages:
        response = usage.message, usage.key, usage.names
        known = best.get(response)
        if known is None or usage.standing > known.standing:
            best[response] = usage
    return tuple(best.values())


def _read_old_document(tool: Transcripts, descriptor: int, row: TranscriptRow, found: os.stat_result) -> Chunk | None:
    """What stood in a document at the first look; when it has changed since, by the times of what it tells."""
    chunk = _read_document(tool, descriptor, row, found)
    if chunk is None:
        return None
    usages, has_changed = chunk.usages, row.head != version(found)
    if has_changed:  # what came later is read again, and counts
        usages = tuple(usage for usage in usages if usage.time_ms <= int(row.state))
    return chunk._replace(row=row._replace(history=row.history_end), usages=usages, points=(), again=has_changed)


def _read(tool: Transcripts, descriptor: int, row: TranscriptRow, start: int, end: int) -> Chunk:
    """Up to CHUNK bytes of complete lines from `start`; the row's `live` is where they end."""
    lines = Lines(tool.keys, tool.types, offset=start)
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
            if said := reader.read(line):
                _take(said, usages, refused)
    more = position < end
    row = row._replace(live=lines.offset, state=reader.state)
    return Chunk(
        row, tuple(usages), refused, lines.too_long, position - start, more, points=reader.gauges()
    )  # fmt: skip


def _read_document(tool: Transcripts, descriptor: int, row: TranscriptRow, found: os.stat_result) -> Chunk | None:
    """All that a document says, and its row; None while it is being written, which will be told of."""
    row = row._replace(device=found.st_dev, inode=found.st_ino, head=version(found), live=found.st_size)
    if found.st_size > MAX_DOCUMENT:
        return Chunk(row, (), {}, 1, 0, more=False)
    content = os.pread(descriptor, found.st_size, 0)  # at once: putting pieces together would hold them twice
    if len(content) != found.st_size or version(os.fstat(descriptor)) != row.head:
        return None
    reader = tool.reader(row.path, row.origin, b"")
    usages: list[Usage] = []
    refused: dict[Drop, int] = {}
    if content:
        _take(reader.read(content), usages, refused)
    return Chunk(row, tuple(usages), refused, 0, len(content), more=False, points=reader.gauges())


def pieces(tool: Transcripts, path: str, row: TranscriptRow | None, *, is_history: bool) -> Iterator[Chunk]:
    """What a packed file says, in pieces of about CHUNK bytes; its row says that it is read with the last alone.

    Raises OSError, NoUnpacker, and Damaged after what stands before the damage.
    """
    with _opened(path) as descriptor:
        found = os.fstat(descriptor)
        current, size = version(found), found.st_size
        if row is None:
            origin = _origin(_beginning(path, descriptor), found.st_mtime_ns)
            row = TranscriptRow(0, path, found.st_dev, found.st_ino, b"", 0, 0, 0, origin)
        elif is_history and row.head != current:
            yield skipped(row)._replace(row=row._replace(history=row.history_end, head=b""), again=True)
            return
        elif not is_history and row.head == current:
            return
        done = row._replace(head=current, history=row.history_end, live=size)
        lines, reader = Lines(tool.keys, tool.types), tool.reader(path, row.origin, b"")
        position = taken = passed = 0

        def read(count: int) -> bytes:
            nonlocal position
            block = os.pread(descriptor, count, position)
            position += len(block)
            return block

        said = Chunk(row, (), {}, 0, 0, more=True)
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
        yield Chunk(done, tuple(usages), said.refused, lines.too_long, size - taken, more=False, points=reader.gauges())
        if damage is not None:
            raise damage


def _take(said: tuple[Usage | Drop, ...] | Drop, usages: list[Usage], refused: dict[Drop, int]) -> None:
    for one in (said,) if isinstance(said, Drop) else said:
        if isinstance(one, Drop):
            refused[one] = refused.get(one, 0) + 1
        else:
            usages.append(one)


# --- in a process of its own -----------------------------------------------------------------------------------


class Wanted(NamedTuple):
    """A piece of history to read: the name of its tool, and the file's row."""

    tool: str
    row: TranscriptRow


_Told = tuple[TranscriptRow, tuple[Usage, ...], dict[Drop, int], int, int, bool, bool]
_WANTED = msgspec.msgpack.Decoder(list[Wanted])
_TOLD = msgspec.msgpack.Decoder(list[_Told])
LENGTH_BYTES = 4


def can_be_sent(tool: Transcripts, row: TranscriptRow) -> bool:
    """Whether a process may read a file's history: one that means something piece by piece, or is no larger than a
    piece, and has a name in text."""
    try:
        row.path.encode()
    except UnicodeEncodeError:
        return False
    return not is_packed(row.path) and (not tool.is_document(row.path) or row.history_end <= CHUNK)


def request(wanted: list[Wanted]) -> bytes:
    """What to write to a process."""
    return _framed(msgspec.msgpack.encode(wanted))


def answer(body: bytes) -> list[Chunk]:
    """What a process wrote, without its length. Raises msgspec.DecodeError."""
    return [Chunk(*told) for told in _TOLD.decode(body)]


def _framed(body: bytes) -> bytes:
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def serve(source: BinaryIO, target: BinaryIO) -> None:
    """Read what is asked for until the source ends."""
    while len(length := source.read(LENGTH_BYTES)) == LENGTH_BYTES:
        wanted = _WANTED.decode(source.read(int.from_bytes(length, "big")))
        chunks = [read_old(TRANSCRIPTS.get(tool), row) for tool, row in wanted]
        target.write(_framed(msgspec.msgpack.encode([chunk[:-1] for chunk in chunks])))
        target.flush()


def main() -> None:
    """Serve the bridge that started this process; its end is told by the end of the input, not by signals."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(BrokenPipeError):
        serve(sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main()
