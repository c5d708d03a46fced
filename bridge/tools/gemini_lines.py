"""What Gemini CLI's chats say.

Old clients rewrote one JSON document for each session; newer ones append lines: the session's own members, messages,
and `$set` with members that replace them, all messages among them. A message is written again under its id when its
tool calls end, and the last one stands; a rewound one was billed all the same. Resuming turns `session-x.json` into
`session-x.jsonl` with the same messages and leaves both, so the file's name and the message's id name a request.

Source: the client itself, 0.61.0, checked 2026-11-28.
"""

import json
from collections.abc import Iterator, Mapping

import msgspec
from msgspec import Struct, field

from bridge.model import DataPoint, Drop, Source, Usage
from bridge.tools.fields import MAX_COUNT, digest, milliseconds, number_of, text_of
from bridge.tools.tool import Transcripts

TOOL = "gemini_cli"
MAX_REPAIR = 1024 * 1024
"""What is not UTF-8 is read with replacements, up to this many bytes."""

_COUNTS = ("input", "cached", "output", "thoughts", "tool")


# What has no field here, all content above all, is passed over by the decoder and never becomes an object.
class _Message(Struct, gc=False):
    id: object = None
    timestamp: object = None
    model: object = None
    tokens: object = None


class _Members(Struct, gc=False):
    session: object = field(default=None, name="sessionId")
    messages: list[_Message | None] | None = None


class _Record(_Message, gc=False):
    """A line, or a whole document: a message, or a session's members, or new values of them."""

    session: object = field(default=None, name="sessionId")
    messages: list[_Message | None] | None = None
    members: _Members | None = field(default=None, name="$set")


_RECORD = msgspec.json.Decoder(_Record)


def disjoint(prompt: int, cached: int, output: int, thoughts: int, tool: int) -> tuple[int, int, int] | Drop:
    """Input, output and cache read of a request. `prompt` holds what was cached, but not what tools added to it."""
    # One look for the usual case: a sign or a high bit of any count is in their union as well.
    if not 0 <= prompt | cached | output | thoughts | tool <= MAX_COUNT:
        counts = prompt, cached, output, thoughts, tool
        if min(counts) < 0:
            return Drop.NEGATIVE
        if max(counts) > MAX_COUNT:
            return Drop.IMPLAUSIBLE
    return max(0, prompt - cached) + tool, output + thoughts, min(cached, prompt)


class Chat:
    """Reads a chat, line by line or as one document.

    The state is the session, and how many lines spoke of tokens so far: a later one revises what came before.
    """

    def __init__(self, path: str, order: int, state: bytes) -> None:
        project, _, below = path.rpartition("/chats/")
        self._project = project.rpartition("/")[2]
        folder, _, name = below.rpartition("/")
        self._file = name.rpartition(".")[0]
        self._parent = folder.rpartition("/")[2]
        self._order = order
        self._is_document = path.endswith(".json")
        self._last: tuple[object, ...] = ()
        self._session: str
        self._lines: int
        self._session, self._lines = json.loads(state) if state else ("", 0)

    @property
    def state(self) -> bytes:
        return b"" if self._is_document else json.dumps([self._session, self._lines]).encode()

    def read(self, line: bytes) -> tuple[Usage | Drop, ...] | Drop:
        """What a line, or the document, says of API requests."""
        try:
            record = _decode(line)
        except (ValueError, RecursionError):
            return Drop.MALFORMED
        members = record.members
        self._session = text_of(record.session) or text_of(members and members.session) or self._session
        said = [record, *(record.messages or ()), *((members and members.messages) or ())]
        self._lines += not self._is_document
        return tuple(self._usages(said))

    def gauges(self) -> tuple[DataPoint, ...]:
        return ()

    def _usages(self, messages: list[_Message | None]) -> Iterator[Usage | Drop]:
        for message in messages:
            if message is None or not isinstance(message.tokens, dict):
                continue
            said = message.id, message.timestamp, message.model, message.tokens
            if said == self._last:
                continue  # its tool calls were added
            self._last = said
            tokens = _tokens(message.tokens)
            yield tokens if isinstance(tokens, Drop) else self._usage(message, *tokens)

    def _usage(self, message: _Message, new: int, output: int, read: int) -> Usage:
        timestamp, model = text_of(message.timestamp), text_of(message.model)
        name = text_of(message.id) or f"{timestamp}\0{model}\0{new}\0{read}"
        time_ms = milliseconds(timestamp)
        return Usage(
            TOOL,
            Source.TRANSCRIPT,
            digest(f"{self._file}\0{name}"),
            self._parent or self._session or self._file,
            model,
            self._order if time_ms is None else time_ms,
            new,
            output,
            read,
            0,
            0,
            order=self._order,
            project=self._project,
            revision=self._lines,
        )


def _tokens(said: dict[str, object]) -> tuple[int, int, int] | Drop:
    """The counts of a message; what is not there counts nothing."""
    counts: list[int] = []
    for name in _COUNTS:
        count = said.get(name) or 0
        if type(count) is not int:
            number = number_of(count)
            if number is None or not number.is_integer():
                return Drop.MALFORMED
            count = int(number)
        counts.append(count)
    return disjoint(*counts)


def _decode(line: bytes) -> _Record:
    try:
        return _RECORD.decode(line)
    except ValueError:
        if len(line) > MAX_REPAIR:
            raise
    return _RECORD.decode(line.decode("utf-8", "replace").encode())


def _roots(variables: Mapping[str, str], home: str) -> tuple[str, ...]:
    return (f"{(variables.get('GEMINI_CLI_HOME') or home).rstrip('/')}/.gemini/tmp",)


TRANSCRIPTS = Transcripts(
    _roots, (".jsonl",), (b'tokens"', b'projectHash"'), Chat, is_sequential=True, documents=(".json",), folder="chats"
)
