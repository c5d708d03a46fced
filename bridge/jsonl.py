"""Lines of JSON out of the blocks of a growing file, without a look at most of them.

Law: which lines come out, and `offset`, depend on the bytes alone, never on where the blocks are cut. Only complete
lines that hold the key are handed out; the key is looked for in whole blocks, so that other lines cost a memory scan
and no Python. A last line without its newline is not written to its end yet and stays for later: after a restart
reading goes on at `offset`, which belongs into the same transaction as what the lines said.

Memory: one block, the lines handed out of it, and at most `limit` bytes of one unfinished line (twice while it is put
together). Longer lines are counted, not held. Speed: about 0.5 CPU-seconds per GB where a third of the lines have
the key, in blocks of 256 KiB to 1 MiB.
"""

import heapq
import re
from collections.abc import Iterator

MAX_LINE = 16 * 1024 * 1024
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_COLON = re.compile(rb"[ \t\r]*:")
_BRACE = ord("{")


class Lines:
    """The complete lines of one file that hold a key; `offset` is where the first line not yet complete begins.

    Each of `keys` is the end of a JSON key with its closing quote, such as `b'output_tokens"'`: inside a string the
    quote would have a backslash before it, so quoted JSON does not match. The longer and fewer, the faster the search.
    """

    def __init__(self, keys: tuple[bytes, ...], *, offset: int = 0, limit: int = MAX_LINE) -> None:
        self.offset = offset
        self.too_long = 0
        """Lines above the limit that were passed over, whatever they held."""
        self._keys = keys
        self._limit = limit
        self._held: list[bytes] = []
        self._held_size = 0

    @property
    def position(self) -> int:
        """Where the next block has to begin: behind `offset` as long as the beginning of a line is held."""
        return self.offset + self._held_size

    def feed(self, block: bytes) -> list[bytes]:
        """The lines that this block completes, without newline, byte order mark and NULs."""
        found: list[bytes] = []
        # No piece is above the limit, so that every line above it spans pieces and is seen while it is held.
        for start in range(0, len(block), self._limit):
            self._feed(block[start : start + self._limit], found)
        return found

    def _feed(self, piece: bytes, found: list[bytes]) -> None:
        start = 0
        if self._held_size:
            start = piece.find(b"\n") + 1
            if not start:
                self._hold(piece)
                return
            self._finish(piece[: start - 1], found)
        end = piece.rfind(b"\n", start) + 1
        if end:
            self.offset += end - start
            found += self._lines(piece, start, end)
        self._hold(piece[end or start :])

    def _lines(self, piece: bytes, start: int, end: int) -> Iterator[bytes]:
        """The lines in a part of a piece, which begins and ends with a line's, that hold a key."""
        has_nuls = b"\0" in piece
        for position in self._places(piece, start, end):
            if position < start:
                continue  # another key in the line before
            start = piece.rfind(b"\n", start, position) + 1 or start
            newline = piece.find(b"\n", position)
            line = piece[start:newline]
            yield line if line[0] == _BRACE and not has_nuls else _clean(line)
            start = newline + 1

    def _places(self, piece: bytes, start: int, end: int) -> Iterator[int]:
        """Where keys stand, in order, each at most once a line."""
        return heapq.merge(*(_places(key, piece, start, end) for key in self._keys))

    def _hold(self, part: bytes) -> None:
        self._held_size += len(part)
        if self._held_size > self._limit:
            self._held.clear()
        elif part:
            self._held.append(part)

    def _finish(self, rest: bytes, found: list[bytes]) -> None:
        """End the held line with what was missing of it."""
        size = self._held_size + len(rest)
        if size > self._limit:
            self.too_long += 1
        else:
            line = b"".join((*self._held, rest))
            if any(True for key in self._keys for _ in _places(key, line, 0, size)):
                found.append(_clean(line))
        self.offset += size + 1
        self._held.clear()
        self._held_size = 0


def _places(key: bytes, data: bytes, start: int, end: int) -> Iterator[int]:
    """Where a key stands as a key, that is with a colon after it, for the first time in each line."""
    length = len(key)
    while (position := data.find(key, start, end)) >= 0:
        after = position + length
        if data.startswith(b":", after, end) or _COLON.match(data, after, end):
            yield position
            after = data.find(b"\n", after)
        start = after


def _clean(line: bytes) -> bytes:
    # A crash of the machine can leave a run of NULs where data was not yet written.
    return (line.replace(b"\0", b"") if b"\0" in line else line).removeprefix(BYTE_ORDER_MARK)
