"""A disk that remembers in which order it was written to, and what it may hold after the power went.

`recorded` reads what `shim.c` has written down; `Disk` replays it call by call. Law of the model: what was synced is
there; of what was not, any 512-byte sector may be there or not, in any order, and a file's size may be the old or the
new one; names come into being, change and go in the order of the calls, up to any of them, unless their directory was
synced. What a failed sync was to bring may never come, even if a later sync succeeds.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from random import Random
from typing import NamedTuple

SECTOR = 512
_HEAD = struct.Struct("<biqI")
_CREATES, _EMPTIES = 0o100, 0o1000


class Call(IntEnum):
    OPEN = 1
    CLOSE = 2
    WRITE = 3
    TRUNCATE = 4
    SYNC = 5
    RENAME = 6
    UNLINK = 7
    MARK = 8


class Record(NamedTuple):
    """One call: a descriptor, an offset or size or result or flags, and data or paths."""

    call: Call
    descriptor: int
    number: int
    data: bytes


def recorded(file: Path) -> list[Record]:
    return [*_records(file.read_bytes())]


def _records(data: bytes) -> Iterator[Record]:
    at = 0
    while at < len(data):
        call, descriptor, number, length = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        yield Record(Call(call), descriptor, number, data[at : at + length])
        at += length


class _State(IntEnum):
    PENDING = 0
    DURABLE = 1
    DOUBTFUL = 2


@dataclass
class _Change:
    """A write of `data` at `at`, or with no data a change of the size to `at`."""

    at: int
    data: bytes | None
    state: _State = _State.PENDING

    def apply(self, content: bytearray) -> None:
        if self.data is None:
            del content[self.at :]
            content.extend(bytes(self.at - len(content)))
        else:
            content.extend(bytes(max(0, self.at - len(content))))
            content[self.at : self.at + len(self.data)] = self.data

    def sectors(self) -> "list[_Change]":
        """Its parts, as the disk writes them."""
        if self.data is None:
            return [self]
        cuts = [self.at, *range(self.at - self.at % SECTOR + SECTOR, self.at + len(self.data), SECTOR)]
        ends = [*cuts[1:], self.at + len(self.data)]
        return [_Change(at, self.data[at - self.at : end - self.at]) for at, end in zip(cuts, ends, strict=True)]


@dataclass
class _File:
    base: bytearray = field(default_factory=bytearray)
    changes: list[_Change] = field(default_factory=list)

    def sync(self, *, succeeded: bool) -> None:
        for change in self.changes:
            if change.state is _State.PENDING:
                change.state = _State.DURABLE if succeeded else _State.DOUBTFUL
        while self.changes and self.changes[0].state is _State.DURABLE:
            self.changes.pop(0).apply(self.base)

    def after_power_loss(self, choose: Random, *, keeps: float) -> bytes:
        """What the disk may hold; `keeps` is how probable a sector that was not synced is."""
        content = bytearray(self.base)
        unsynced: list[_Change] = []
        for change in self.changes:
            kept = [change] if change.state is _State.DURABLE else [
                part for part in change.sectors() if choose.random() < keeps
            ]  # fmt: skip
            if change.state is _State.PENDING:
                unsynced += kept
            else:
                for part in kept:
                    part.apply(content)
        if choose.random() < 0.3:
            choose.shuffle(unsynced)
        for part in unsynced:
            part.apply(content)
        return bytes(content)


class Disk:
    """The files of one directory. `marks` are the process's own marks so far."""

    def __init__(self, directory: Path) -> None:
        self._prefix = f"{directory}/"
        self._names: dict[str, _File] = {}
        self._synced_names: dict[str, _File] = {}
        self._steps: list[dict[str, _File]] = []
        self._open: dict[int, _File | None] = {}
        self.marks: list[str] = []

    def replay(self, record: Record) -> None:
        """Do one call."""
        file = self._open.get(record.descriptor)
        match record.call:
            case Call.OPEN:
                self._open[record.descriptor] = self._opened(record.data.decode(), record.number)
            case Call.CLOSE:
                self._open.pop(record.descriptor, None)
            case Call.WRITE if file is not None:
                file.changes.append(_Change(record.number, record.data))
            case Call.TRUNCATE if file is not None:
                file.changes.append(_Change(record.number, None))
            case Call.SYNC if file is not None:
                file.sync(succeeded=record.number == 0)
            case Call.SYNC if record.number == 0:  # a directory
                self._synced_names = dict(self._names)
                self._steps.clear()
            case Call.RENAME:
                old, new = record.data.decode().split("\0")
                self._names[self._name(new)] = self._names.pop(self._name(old))
                self._note_names()
            case Call.UNLINK:
                self._names.pop(self._name(record.data.decode()), None)
                self._note_names()
            case Call.MARK:
                self.marks.append(record.data.decode())

    def _name(self, path: str) -> str:
        return path.removeprefix(self._prefix)

    def _opened(self, path: str, flags: int) -> _File | None:
        if f"{path}/" == self._prefix:
            return None
        name = self._name(path)
        if name not in self._names:
            if not flags & _CREATES:
                return None  # a directory below
            self._names[name] = _File()
            self._note_names()
        elif flags & _EMPTIES:
            self._names[name].changes.append(_Change(0, None))
        return self._names[name]

    def _note_names(self) -> None:
        self._steps.append(dict(self._names))

    def lose_power(self, target: Path, choose: Random) -> None:
        """Write what may be left to a directory."""
        keeps = choose.choice((0.0, 0.2, 0.5, 0.8, 1.0))
        names = choose.choice([self._synced_names, *self._steps])
        if choose.random() < 0.5:
            names = self._synced_names
        self._write(target, {name: file.after_power_loss(choose, keeps=keeps) for name, file in names.items()})

    def lose_all(self, target: Path) -> None:
        """Write the least that can be left: what was synced."""
        files = {name: file.after_power_loss(Random(0), keeps=0.0) for name, file in self._synced_names.items()}
        self._write(target, files)

    def _write(self, target: Path, contents: dict[str, bytes]) -> None:
        target.mkdir()
        for name, content in contents.items():
            if not name.endswith("-shm") and "/" not in name:  # shared memory, which is no more
                (target / name).write_bytes(content)
