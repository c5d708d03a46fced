"""What the lines of a Codex rollout mean.

A rollout is one thread: its `session_meta`, a `turn_context` for each turn, and after each response a `token_count`
with the thread's totals and the response's own counts; clients since 0.150 write a `token_usage_record` with the id of
the response before it. Forks, subagents and old resumes copy a thread's history into a file of their own, sometimes
without its turns or under new time stamps, and the same totals stand again wherever only rate limits changed.

So a line is a request only where the totals moved, and a request has several names, by which its copies are known in
whatever order files are read: of the response, of the turn and totals, and of the thread and totals. Equal work of two
subagents has equal counts: the name of a thread alone tells nothing, but where a line is known to be a copy.
"""

import re
from collections.abc import Mapping
from hashlib import blake2b
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta, Struct

from bridge.model import DataPoint, Drop, Source, Usage
from bridge.tools.fields import MAX_COUNT, MAX_TEXT, digest, milliseconds, text_of
from bridge.tools.limits import limit_points
from bridge.tools.tool import Transcripts

TOOL = "codex"

_Text = Annotated[str, Meta(max_length=MAX_TEXT)] | None
MAX_TOTAL = 1000 * MAX_COUNT
"""Tokens that one thread can plausibly add up to."""
_Counts = tuple[int, int, int, int]
"""Prompt, what of it was read from a cache, what of it was written to one, output: as Codex counts."""
_Tokens = tuple[int, int, int, int, int]
_ZERO: _Counts = (0, 0, 0, 0)
_Names = tuple[tuple[bytes, ...], tuple[bytes, ...]]
"""The names of a request, the best first; and names that others may have given to the same request."""


class _TokenUsage(Struct, gc=False):
    input_tokens: int | None = None
    cached_input_tokens: int | None = None
    cache_write_input_tokens: int | None = None
    output_tokens: int | None = None

    @property
    def counts(self) -> _Counts:
        return (
            self.input_tokens or 0,
            self.cached_input_tokens or 0,
            self.cache_write_input_tokens or 0,
            self.output_tokens or 0,
        )


class _TokenCount(Struct, gc=False):
    total_token_usage: _TokenUsage | None = None
    last_token_usage: _TokenUsage | None = None


class _Window(Struct, gc=False):
    used_percent: float | None = None
    window_minutes: int | None = None
    resets_at: float | None = None


class _RateLimits(Struct, gc=False):
    limit_id: _Text = None
    primary: _Window | None = None
    secondary: _Window | None = None


class _Settings(Struct, gc=False):
    model: _Text = None
    service_tier: _Text = None


class _Payload(Struct, gc=False):
    """Of all kinds of lines together: none of these keys means two things."""

    type: _Text = None
    id: _Text = None
    cwd: _Text = None
    forked_from_id: _Text = None
    parent_thread_id: _Text = None
    source: object = None
    model: _Text = None
    turn_id: _Text = None
    thread_id: _Text = None
    response_id: _Text = None
    info: _TokenCount | None = None
    usage: _TokenUsage | None = None
    thread_token_usage: _TokenUsage | None = None
    rate_limits: _RateLimits | None = None
    thread_settings: _Settings | None = None


class _Line(Struct, gc=False):
    type: _Text = None
    timestamp: _Text = None
    payload: _Payload | None = None


class _Kind(Struct, gc=False):
    type: _Text = None


class _State(Struct, array_like=True):
    """What a line means by the lines before it.

    `thread` is the file's own, `scope` the one whose requests are told of now; `parent` is the declared ancestor.
    `is_marked`: the scope was named by a further `session_meta`. `is_copy`: what is told of now is certainly a copy.
    """

    thread: str = ""
    scope: str = ""
    parent: str = ""
    turn: str = ""
    model: str = ""
    tier: str = ""
    cwd: str = ""
    total: _Counts | None = None
    is_marked: bool = False
    is_copy: bool = False
    has_records: bool = False


class _Place(NamedTuple):
    """Whose request is told of: a thread's, in which of its turns, and whether that is certainly a copy."""

    scope: str
    turn: str
    is_copy: bool


_LINE = msgspec.json.Decoder(_Line)
_KIND = msgspec.json.Decoder(_Kind)
_ENCODE = msgspec.msgpack.Encoder().encode
_STATE = msgspec.msgpack.Decoder(_State)
_ASKED = ("session_meta", "turn_context", "event_msg", "token_usage_record")
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


class Rollout:
    """Reads the lines of one rollout."""

    def __init__(self, path: str, order: int, state: bytes) -> None:
        self._state = _STATE.decode(state) if state else _State()
        self._order = order
        self._path = path
        self._limits: tuple[_RateLimits, str | None] | None = None

    @property
    def state(self) -> bytes:
        return msgspec.msgpack.encode(self._state)

    def gauges(self) -> tuple[DataPoint, ...]:
        if self._limits is None:
            return ()
        limits, timestamp = self._limits
        return _gauges(limits, milliseconds(timestamp) or self._order)

    def read(self, line: bytes) -> tuple[Usage, ...] | Drop:
        decoded = _decode(line)
        if decoded is None:
            return Drop.MALFORMED
        payload = decoded.payload
        if payload is None:
            return ()
        match decoded.type:
            case "session_meta":
                self._begin(payload)
            case "turn_context":
                self._turn(payload)
            case "token_usage_record" if payload.usage is not None:
                return self._record(payload, payload.usage.counts, decoded.timestamp)
            case "event_msg" if payload.type == "token_count":
                return self._count(payload, decoded.timestamp)
            case "event_msg" if payload.thread_settings is not None:
                self._state.model = payload.thread_settings.model or self._state.model
                self._state.tier = payload.thread_settings.service_tier or ""
        return ()

    def _begin(self, meta: _Payload) -> None:
        state = self._state
        if state.thread:
            state.scope = meta.id or state.scope
            state.is_marked, state.is_copy = True, state.scope != state.thread
            state.total, state.turn = None, ""
            return
        state.thread = meta.id or self._thread_of_path()
        state.parent = meta.forked_from_id or meta.parent_thread_id or _parent_of(meta.source)
        state.scope = state.parent or state.thread
        state.is_copy = bool(state.parent)
        state.cwd = meta.cwd or ""

    def _turn(self, context: _Payload) -> None:
        state = self._state
        state.thread = state.thread or self._thread_of_path()
        state.turn = context.turn_id or ""
        state.model = context.model or state.model
        state.cwd = context.cwd or state.cwd
        begun, forked = _made_at(state.turn), _made_at(state.thread)
        if begun is None or forked is None:  # nothing says whose turn it is: of a fork the first that it tells of
            if not state.is_marked:
                state.scope = state.thread
            state.is_copy = False
        elif begun >= forked:
            state.scope, state.is_copy = state.thread, False
        else:
            if not state.is_marked:
                state.scope = state.parent or state.thread
            state.is_copy = state.scope != state.thread

    def _thread_of_path(self) -> str:
        """A rollout is named by its thread; the newest put a session behind it."""
        found = _UUID.search(self._path.rpartition("/")[2])
        return found[0] if found else self._path

    def _record(self, payload: _Payload, counts: _Counts, timestamp: str | None) -> tuple[Usage, ...] | Drop:
        """A response by its id; the same names as of its `token_count`, for copies that have only that."""
        state = self._state
        state.has_records = True
        state.thread = state.thread or self._thread_of_path()
        scope = payload.thread_id or state.scope or state.thread
        total = payload.thread_token_usage.counts if payload.thread_token_usage is not None else None
        turn, response = payload.turn_id or state.turn, payload.response_id or ""
        return self._usage(counts, total, _Place(scope, turn, scope != state.thread), timestamp, response)

    def _count(self, payload: _Payload, timestamp: str | None) -> tuple[Usage, ...] | Drop:
        state, said = self._state, payload.info
        if payload.rate_limits is not None:
            self._limits = payload.rate_limits, timestamp
        if said is None or state.has_records:
            return ()
        state.thread = state.thread or self._thread_of_path()
        state.scope = state.scope or state.thread
        total = said.total_token_usage.counts if said.total_token_usage is not None else None
        if total is not None and not _is_plausible(total):
            return Drop.IMPLAUSIBLE
        before, state.total = state.total, total or state.total
        if total is not None and total == before:
            return ()
        if said.last_token_usage is not None:
            counts = said.last_token_usage.counts
        elif total is not None:
            counts = _growth(before or _ZERO, total)
        else:
            return ()
        return self._usage(counts, total, _Place(state.scope, state.turn, state.is_copy), timestamp)

    def _usage(
        self, counts: _Counts, total: _Counts | None, place: _Place, timestamp: str | None, response: str = ""
    ) -> tuple[Usage, ...] | Drop:
        tokens = disjoint(*counts)
        if isinstance(tokens, Drop):
            return tokens
        if not _is_plausible(counts) or (total is not None and not _is_plausible(total)):
            return Drop.IMPLAUSIBLE
        if not any(tokens):
            return ()
        state, time_ms = self._state, milliseconds(timestamp)
        own, others = _names(state.thread, place, total or timestamp, counts)
        if response:
            own, others = (digest(f"response\0{response}"), *own), (own[0], *others)
        usage = Usage(
            TOOL,
            Source.TRANSCRIPT,
            own[0],
            place.scope,
            state.model,
            self._order if time_ms is None else time_ms,
            *tokens,
            request_id=response,
            order=self._order,
            tier=state.tier,
            project=state.cwd,
            names=own[1:],
            twins=others,
        )
        return (usage,)


def _names(thread: str, place: _Place, total: object, counts: _Counts) -> _Names:
    """What a request is called by the turn, by the history that it stands in, and by copies of that history.

    Its own thread looks for copies of it, but not in its own history: equal work there has other totals, and where a
    thread is mistaken for another's, equal work of both must not be one.
    """
    by_turn = (_name("turn", place.turn, total, counts),) if place.turn else ()
    history = _name("history", place.scope, total, counts)
    copied = _of_copy(history)
    if not place.is_copy:
        return (*by_turn, history), (copied,)
    own = _name("history", thread, total, counts)
    return (*by_turn, copied, own), (history, copied, _of_copy(own))


def _is_plausible(counts: _Counts) -> bool:
    return min(counts) >= -MAX_TOTAL and max(counts) <= MAX_TOTAL


def _name(kind: str, name: str, total: object, counts: _Counts) -> bytes:
    return blake2b(_ENCODE((kind, name, total, counts)), digest_size=16).digest()


def _of_copy(history: bytes) -> bytes:
    """What copies of a history name what the history itself names so."""
    return bytes((history[0] ^ 0x80,)) + history[1:]


def disjoint(prompt: int, cached: int, written: int, output: int) -> _Tokens | Drop:
    """Tokens in the order of Usage: what is new, output, read and written. The parts never exceed the prompt."""
    if max(prompt, cached, written, output) > MAX_COUNT:
        return Drop.IMPLAUSIBLE
    prompt, output = max(prompt, 0), max(output, 0)
    cached = min(max(cached, 0), prompt)
    written = min(max(written, 0), prompt - cached)
    return prompt - cached - written, output, cached, written, 0


def _growth(before: _Counts, after: _Counts) -> _Counts:
    """What totals grew by; totals that fell have begun anew."""
    if any(new < old for old, new in zip(before, after, strict=True)):
        return after
    first, second, third, fourth = (new - old for old, new in zip(before, after, strict=True))
    return first, second, third, fourth


def _parent_of(source: object) -> str:
    """The thread that a subagent was spawned by; `source` is mostly a word."""
    spawned = source.get("subagent") if isinstance(source, dict) else None
    spawn = spawned.get("thread_spawn") if isinstance(spawned, dict) else None
    return text_of(spawn.get("parent_thread_id")) if isinstance(spawn, dict) else ""


def _made_at(name: str) -> int | None:
    """When a UUID of version 7 was made, Unix ms; None for other names."""
    if len(name) != len("01a2234a-e816-7863-aa5d-d949e8487791") or name[14] != "7":
        return None
    try:
        return int(name[:8] + name[9:13], 16)
    except ValueError:
        return None


def _decode(line: bytes) -> _Line | None:
    """The fields of a line, or of a line of another kind just that kind, for its shapes may be unknown to us."""
    try:
        return _LINE.decode(line)
    except (ValueError, RecursionError):
        pass
    try:
        kind = _KIND.decode(line.decode("utf-8", "replace")).type
    except (ValueError, RecursionError):
        return None
    return None if kind in _ASKED else _Line()


def _gauges(limits: _RateLimits, time_ms: int) -> tuple[DataPoint, ...]:
    found: list[DataPoint] = []
    for window in (limits.primary, limits.secondary):
        if window is not None and window.used_percent is not None and window.window_minutes is not None:
            name = _WINDOWS.get(window.window_minutes, f"{window.window_minutes}_minutes")
            found += limit_points(TOOL, name, window.used_percent / 100, window.resets_at, time_ms, limits.limit_id)
    return tuple(found)


_WINDOWS = {300: "five_hour", 10_080: "seven_day"}


def _roots(variables: Mapping[str, str], home: str) -> tuple[str, ...]:
    place = variables.get("CODEX_HOME") or f"{home}/.codex"
    if place == "~" or place.startswith("~/"):
        place = home + place[1:]
    return tuple(f"{place.rstrip('/')}/{directory}" for directory in ("sessions", "archived_sessions"))


# `input_tokens` ends the keys of all counts, `cli_version` stands in a session's first line, `approval_policy` in turns
# and settings.
TRANSCRIPTS = Transcripts(
    _roots,
    (".jsonl", ".jsonl.zst"),
    (b'input_tokens"', b'cli_version"', b'approval_policy"'),
    Rollout,
    is_sequential=True,
    types=tuple(f'{kind}"'.encode() for kind in _ASKED),
)
