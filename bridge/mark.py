"""The mark of what was served: a small file beside the database that says what the last answers showed.

Law: where the database has gone back (a restored backup, a lost end of the WAL, a damaged file), the mark is the
floor: a total or a counter shows the larger of both until the database has caught up, and nothing is added to it.
The file is replaced as a whole, synced, at most every few seconds and when the bridge stops; a crash leaves the
older one. 10,000 series take 0.26 MB and 3 ms.
"""

import contextlib
import os
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import msgspec

from bridge.database import is_open
from bridge.model import Value
from bridge.rows import MetricRow, SeriesRow
from bridge.state import SERVED, StoreUnavailable, sync
from bridge.store import THOROUGH_BYTES
from bridge.values import highest, subtract

_MAGIC = b"served 1\n"
_DIGEST_BYTES = 16


class Shown(NamedTuple):
    """What a counter showed, which is value - base, and when its last point arrived (Unix ms)."""

    value: Value
    base: Value
    seen: int


class Mark(msgspec.Struct, frozen=True, array_like=True):
    """What was served at a commit: the lifetime totals, the joined counters by tool, model and kind, the counters
    of /metrics by name, and who had scraped. `database`: its checksum, of an orderly stop."""

    commits: int
    totals: dict[str, int]
    joined: tuple[tuple[str, str, str, int], ...]
    series: dict[bytes, Shown]
    scrapers: tuple[str, ...]
    database: int = 0


class MarkUnreadable(Exception):
    """The mark is there and says nothing."""


_DECODER = msgspec.msgpack.Decoder(Mark)


def checksum(database: Path) -> int:
    """Of a database that nobody has open, never 0; 0 where a log belongs to it, or it is large, or cannot be read."""
    found = 0
    with contextlib.suppress(OSError):
        if not is_open(str(database)) and database.stat().st_size <= THOROUGH_BYTES:
            with database.open("rb") as file:
                while block := file.read(2**20):
                    found = crc32(block, found)
            return found or 1
    return 0


def series_name(metric: MetricRow, row: SeriesRow) -> bytes:
    """What names a series in the mark. Row numbers do not: after a restore they can mean something else."""
    identity = (metric.name, metric.kind, metric.unit, row.job, row.instance, row.labels)
    return blake2b(msgspec.msgpack.encode(identity), digest_size=12).digest()


def is_held(row: SeriesRow, floor: Shown) -> bool:
    """Whether a series has not caught up with what it showed.

    One with a higher base has left and come back since: it is another counter, which owes the floor nothing.
    """
    if row.value is None or _size(row.base) > _size(floor.base):
        return False
    return row.base != floor.base or highest(row.value, floor.value) != row.value


def state_of(row: SeriesRow, floor: Shown | None) -> Shown:
    """What a counter shows, for the mark."""
    value = row.value or 0
    if floor is None:
        return Shown(value, row.base, row.seen)
    return Shown(highest(value, floor.value), floor.base, row.seen)


def held_up(value: Value, floor: Shown) -> Value:
    """What a series shows that has not caught up."""
    return subtract(highest(value, floor.value), floor.base)


class Floors:
    """What a mark holds up of a database that has gone back; nothing when it has not.

    `seen` of a series that the database knows nothing of decides how long it is remembered here: as long as it would
    have stayed on /metrics. After that it may come back as a new counter.
    """

    def __init__(self, mark: Mark | None) -> None:
        self._totals = dict(mark.totals) if mark else {}
        self._series = dict(mark.series) if mark else {}
        self._found: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._totals) + len(self._series)

    def lift(self, totals: Mapping[str, int]) -> Mapping[str, int]:
        """What to show for the totals that the database has."""
        return {**totals, **self._totals} if self._totals else totals

    def reach(self, totals: Mapping[str, int]) -> None:
        """Forget the floors that these totals are not below."""
        for name, floor in [*self._totals.items()]:
            if totals.get(name, 0) >= floor:
                del self._totals[name]

    def knows(self, metric: MetricRow, row: SeriesRow) -> bool:
        """Whether a series that the database lacks was shown. Also called from the writer thread."""
        return bool(self._series) and series_name(metric, row) in self._series

    @property
    def has_series(self) -> bool:
        """Whether any series is known that may need a floor."""
        return bool(self._series)

    def find(self, name: bytes, row: SeriesRow) -> Shown | None:
        """The floor that a series of this name needs; one that it has reached is forgotten."""
        floor = self._series.get(name)
        if floor is not None and not is_held(row, floor):
            self.drop(name)
            return None
        if floor is not None:
            self._found.add(name)
        return floor

    def drop(self, name: bytes) -> None:
        self._series.pop(name, None)
        self._found.discard(name)

    def forget(self, before: int) -> None:
        """Give up the series that did not come back, last seen before a time (Unix ms)."""
        # A new one: the old one keeps the room that it once took.
        self._series = {
            name: floor for name, floor in self._series.items() if floor.seen >= before or name in self._found
        }

    @property
    def lost(self) -> dict[bytes, Shown]:
        """The series that the database knows nothing of."""
        return {name: floor for name, floor in self._series.items() if name not in self._found}


def _size(value: Value) -> int | float:
    return value if isinstance(value, int | float) else value.count


def read_mark(directory: Path) -> Mark | None:
    """The mark of a state directory, None where there is none. Raises MarkUnreadable."""
    try:
        data = (directory / SERVED).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise MarkUnreadable(f"cannot read {directory / SERVED}: {error.strerror}") from None
    digest, body = data[len(_MAGIC) :][:_DIGEST_BYTES], data[len(_MAGIC) + _DIGEST_BYTES :]
    if not data.startswith(_MAGIC) or blake2b(body, digest_size=_DIGEST_BYTES).digest() != digest:
        raise MarkUnreadable(f"{directory / SERVED} is damaged")
    try:
        return _DECODER.decode(body)
    except msgspec.DecodeError as error:
        raise MarkUnreadable(f"{directory / SERVED} is damaged: {error}") from None


def write_mark(directory: Path, mark: Mark) -> None:
    """Replace the mark. Raises StoreUnavailable."""
    body = msgspec.msgpack.encode(mark)
    new = directory / f"{SERVED}.new"
    try:
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(_MAGIC + blake2b(body, digest_size=_DIGEST_BYTES).digest() + body)
            file.flush()
            os.fsync(descriptor)
        new.replace(directory / SERVED)
        sync(directory)
    except OSError as error:
        raise StoreUnavailable(f"cannot write {directory / SERVED}: {error.strerror}") from None
