"""What a tool module tells of its tool: the shapes that the rest of the bridge asks for."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from bridge.model import DataPoint, Drop, Usage


class Quantity(NamedTuple):
    """A metric whose sums are exact: kept as integers of 1/scale of its unit.

    `limit` is the most that one delta point can plausibly add, in the metric's own unit.
    """

    unit: str
    scale: int
    limit: float


class Reader(Protocol):
    """Reads the lines of one file in their order."""

    @property
    def state(self) -> bytes:
        """What a later reader of the same file has to be told of the lines that were read."""

    def read(self, line: bytes) -> tuple[Usage | Drop, ...] | Drop:
        """What one line, or a whole document, says of API requests, or why it is refused."""

    def gauges(self) -> tuple[DataPoint, ...]:
        """What the lines read so far say of things that have a current value."""


class Transcripts(NamedTuple):
    """Where a tool's transcripts lie and how they are read.

    `roots` takes the environment and the home directory. Only lines that hold one of `keys` as the end of a JSON key
    (with its closing quote) are read, and of `types` (as jsonl.Lines has them) if there are any. `reader` takes a
    file's path, its order (Unix ms of its beginning) and the state of the reader before, empty at the start of a file.
    `is_sequential`: a line means nothing without those before it. Files that end as `documents` say are no lines but
    one JSON value each, which is rewritten as a whole. With a `folder` only what lies below a directory of that name is
    a transcript.
    """

    roots: Callable[[Mapping[str, str], str], tuple[str, ...]]
    suffixes: tuple[str, ...]
    keys: tuple[bytes, ...]
    reader: Callable[[str, int, bytes], Reader]
    is_sequential: bool = False
    documents: tuple[str, ...] = ()
    folder: str = ""
    types: tuple[bytes, ...] = ()

    def holds(self, path: str) -> bool:
        """Whether a file below a root is a transcript."""
        return path.endswith(self.suffixes + self.documents) and (not self.folder or f"/{self.folder}/" in path)

    def is_document(self, path: str) -> bool:
        """Whether a transcript is one JSON value."""
        return bool(self.documents) and path.endswith(self.documents)
