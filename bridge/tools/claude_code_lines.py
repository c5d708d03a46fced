"""What a line of Claude Code's transcripts means.

Every content block of a response is a line of its own with the same ids; old clients wrote snapshots while they
streamed. Forks and old resumes copy lines into other files under a new session id, side questions replay a response
under a new request id, subagents have files of their own and, in old clients, also `progress` lines in the parent's.
So a line becomes a Usage whose key is the same in all copies; the bill is the copy with the highest output.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw, Struct, field
from msgspec.structs import replace

from bridge.model import DataPoint, Drop, Source, Usage
from bridge.tools.fields import MAX_COUNT, MAX_TEXT, digest, milliseconds, nano_dollars, text_of
from bridge.tools.tool import Transcripts

TOOL = "claude_code"
MAX_REPAIR = 1024 * 1024
"""A broken line above this many bytes is not tried again: repair holds all of it as objects."""

_SYNTHETIC = "<synthetic>"

_Text = Annotated[str, Meta(max_length=MAX_TEXT)] | None
_Tokens = tuple[int, int, int, int, int]
"""Input, output, cache read, cache written for 5 minutes and for 1 hour: disjoint, in the order of Usage."""


# What has no field here, all content above all, is passed over by the decoder and never becomes an object.
class _Split(Struct, gc=False):
    ephemeral_5m_input_tokens: int | None = None
    ephemeral_1h_input_tokens: int | None = None


class _Searches(Struct, gc=False):
    web_search_requests: int | None = None


class _Counts(Struct, gc=False):
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_creation: _Split | None = None


class _Iteration(_Counts, gc=False):
    type: _Text = None
    model: _Text = None


class _UsageObject(_Counts, gc=False):
    server_tool_use: _Searches | None = None
    service_tier: _Text = None
    speed: _Text = None
    inference_geo: _Text = None
    iterations: Raw = Raw()


class _Message(Struct, gc=False):
    id: _Text = None
    model: _Text = None
    usage: _UsageObject | None = None


class _Record(Struct, gc=False, rename="camel"):
    """A line of a transcript, or the line inside a `progress` line."""

    type: _Text = None
    message: _Message | None = None
    request_id: _Text = None
    timestamp: _Text = None
    session_id: _Text = None
    cwd: _Text = None
    uuid: _Text = None
    is_sidechain: object = None
    is_api_error_message: object = None
    cost_usd: object = field(default=None, name="costUSD")


class _Progress(Struct, gc=False):
    message: _Record | None = None


class _Line(_Record, gc=False, rename="camel"):
    data: _Progress | None = None


class _Kind(Struct, gc=False):
    type: _Text = None


_TEXTS = frozenset(
    {
        "type",
        "id",
        "model",
        "requestId",
        "timestamp",
        "sessionId",
        "cwd",
        "uuid",
        "service_tier",
        "speed",
        "inference_geo",
    }
)
_LINE = msgspec.json.Decoder(_Line)
_KIND = msgspec.json.Decoder(_Kind)
_ITERATIONS = msgspec.json.Decoder(tuple[_Iteration, ...])


def _said(line: _Line, order: int) -> tuple[Usage, ...] | Drop:
    """What one line of a transcript says of API requests: mostly one Usage, more with advisors, none, or a refusal.

    `order` is the Usage's, and its time where the line has none.
    """
    record = _nested(line) if line.type == "progress" else line
    return _usages(record, order) if record.type in _RESPONSES else ()


_RESPONSES = ("assistant", None)
_ASKED = ("assistant", "progress", None)


def _decode(line: bytes) -> _Line | Drop:
    """The fields of a line, or of a line of another kind just that kind, for its shapes may be unknown to us."""
    try:
        return _LINE.decode(line)
    except (ValueError, RecursionError):
        pass
    try:
        repaired = _repaired(line)
        kind = _KIND.decode(repaired).type
        return _LINE.decode(repaired) if kind in _ASKED else _Line(type=kind)
    except (ValueError, RecursionError):
        return Drop.MALFORMED


def _nested(line: _Line) -> _Record:
    """The subagent's line inside a `progress` line; the line itself if there is none."""
    if line.data is None or line.data.message is None:
        return line
    record = line.data.message
    record.is_sidechain = True
    record.session_id = line.session_id or record.session_id
    record.cwd = line.cwd or record.cwd
    record.timestamp = record.timestamp or line.timestamp
    return record


def _repaired(line: bytes) -> bytes:
    """The line with U+FFFD for what is not UTF-8, `?` for halves of surrogate pairs, and no text of another type."""
    if len(line) > MAX_REPAIR:
        return line
    content = json.loads(line.decode("utf-8", "replace"), strict=False, object_hook=_with_plain_texts)
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")


def _with_plain_texts(members: dict[str, Any]) -> dict[str, Any]:
    """Texts are wanted but not needed: a count is not refused because a new client writes one of them otherwise."""
    for key in _TEXTS & members.keys():
        members[key] = text_of(members[key]) or None
    return members


def _usages(record: _Record, order: int) -> tuple[Usage, ...] | Drop:
    message = record.message
    if message is None or message.usage is None or message.model == _SYNTHETIC or record.is_api_error_message is True:
        return ()
    usage, model, request_id = message.usage, message.model or "", record.request_id or ""
    tokens = _tokens(usage)
    searches = (usage.server_tool_use and usage.server_tool_use.web_search_requests) or 0
    if isinstance(tokens, Drop):
        return tokens
    if not 0 <= searches <= MAX_COUNT:
        return Drop.NEGATIVE if searches < 0 else Drop.IMPLAUSIBLE
    time_ms = milliseconds(record.timestamp)
    name = message.id or ("" if request_id else record.uuid or record.timestamp or "")
    main = Usage(
        TOOL,
        Source.TRANSCRIPT,
        _line_key(name, request_id, model, tokens),
        record.session_id or "",
        model,
        order if time_ms is None else time_ms,
        *tokens,
        request_id,
        digest(message.id, 8) if message.id else b"",
        order,
        record.is_sidechain is True,
        searches,
        usage.speed or "",
        usage.inference_geo or "",
        usage.service_tier or "",
        None if record.cost_usd is None else nano_dollars(record.cost_usd),
        None,
        record.cwd or "",
    )
    iterations = bytes(usage.iterations)
    return _with_advisors(main, iterations) if b"advisor_message" in iterations else (main,)


def _with_advisors(main: Usage, iterations: bytes) -> tuple[Usage, ...] | Drop:
    """The request and its calls of another model, which are not in its own counts and have no request id. An event has
    the tokens of the request alone and the cost of all."""
    try:
        steps = _ITERATIONS.decode(iterations)
    except (ValueError, RecursionError):
        return Drop.MALFORMED
    usages = [main]
    for index, step in enumerate(steps):
        if step.type != "advisor_message":
            continue
        tokens = _tokens(step)
        if isinstance(tokens, Drop):
            return tokens
        advisor = replace(
            main,
            key=digest(f"{main.key.hex()}{index}"),
            model=step.model or "",
            **dict(zip(_TOKEN_FIELDS, tokens, strict=True)),
            request_id="",
            part_of=main.request_id,
            web_searches=0,
            speed="",
            cost=None,
        )
        usages.append(advisor)
    return tuple(usages)


_TOKEN_FIELDS = ("input", "output", "cache_read", "cache_write_5m", "cache_write_1h")


def _tokens(usage: _Counts) -> _Tokens | Drop:
    split = usage.cache_creation
    return disjoint(
        usage.input_tokens or 0,
        usage.output_tokens or 0,
        usage.cache_read_input_tokens or 0,
        usage.cache_creation_input_tokens or 0,
        (split and split.ephemeral_5m_input_tokens) or 0,
        (split and split.ephemeral_1h_input_tokens) or 0,
    )


def disjoint(new: int, output: int, read: int, written: int, written_5m: int, written_1h: int) -> _Tokens | Drop:
    """Old clients send no split and some gateways zeros: what the sum has above the split was written for 5 minutes."""
    # One look for the usual case: a sign or a high bit of any count is in their union as well.
    if not 0 <= new | output | read | written | written_5m | written_1h <= MAX_COUNT:
        counts = new, output, read, written, written_5m, written_1h
        if min(counts) < 0:
            return Drop.NEGATIVE
        if max(counts) > MAX_COUNT:
            return Drop.IMPLAUSIBLE
    return new, output, read, max(written_5m, written - written_1h), written_1h


def _line_key(message: str, request_id: str, model: str, tokens: _Tokens) -> bytes:
    if request_id:
        return digest(f"{message}\0{request_id}")
    # Some gateways give every message the same id; output is left out because it grows while a response is streamed.
    new, _, read, written_5m, written_1h = tokens
    return digest(f"{message}\0\0{model}\0{new}\0{read}\0{written_5m}\0{written_1h}")


def _roots(variables: Mapping[str, str], home: str) -> tuple[str, ...]:
    """CLAUDE_CONFIG_DIR may list several directories; without it both places that clients ever used count."""
    named = [part.strip() for part in variables.get("CLAUDE_CONFIG_DIR", "").split(",")]
    configuration = variables.get("XDG_CONFIG_HOME") or f"{home}/.config"
    directories = [part for part in named if part] or [f"{home}/.claude", f"{configuration}/claude"]
    expanded = (home + part[1:] if part == "~" or part.startswith("~/") else part for part in directories)
    return tuple(dict.fromkeys(f"{part.rstrip('/')}/projects" for part in expanded))


class Lines:
    """Reads the lines of one file; each is understood by itself.

    Most lines repeat the response of the one before for another block of its content, and say nothing new.
    """

    state = b""

    def __init__(self, path: str, order: int, state: bytes) -> None:
        del path, state
        self._order = order
        self._last = _Record()

    def read(self, line: bytes) -> tuple[Usage, ...] | Drop:
        record = _decode(line)
        if isinstance(record, Drop):
            return record
        last = self._last
        if record.request_id and record.request_id == last.request_id and _is_repeat(record, last):
            return ()
        said = _said(record, self._order)
        if isinstance(said, tuple):
            self._last = record
        return said

    def gauges(self) -> tuple[DataPoint, ...]:
        return ()


def _is_repeat(record: _Record, last: _Record) -> bool:
    """Whether a line tells of the same response as the last one, with the same counts."""
    return (
        record.message == last.message
        and record.is_sidechain == last.is_sidechain
        and record.type == last.type == "assistant"
        and record.is_api_error_message == last.is_api_error_message
    )


# `cache_read_input_tokens` and its like end so as well: there is no usage without this key.
TRANSCRIPTS = Transcripts(
    _roots, (".jsonl",), (b'input_tokens"',), Lines, types=(b'assistant"', b'progress"')
)  # fmt: skip
