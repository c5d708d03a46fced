"""What Claude Code's telemetry means: its metrics, their exact units, and the samples that XRG reads.

Source: https://code.claude.com/docs/en/monitoring-usage and recorded exports of clients 1.0.128 to 2.1.329,
checked 2026-11-21. All eight metrics are monotonic sums whose values are sent as doubles.
"""

import json
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import Annotated, Any, NamedTuple
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Raw, Struct, field
from msgspec.structs import replace

from bridge.join import KINDS, Cell
from bridge.model import (
    Attributes,
    DataPoint,
    Drop,
    Event,
    EventValue,
    Histogram,
    Kind,
    Metric,
    ProfileFamily,
    ProfileSample,
    Refusal,
    Resource,
    Scope,
    Source,
    Temporality,
    Usage,
    attribute_text,
)

TOOL = "claude_code"
PREFIX = "claude_code."


class Quantity(NamedTuple):
    """A metric whose sums are exact: kept as integers of 1/scale of its unit.

    `limit` is the most that one delta point can plausibly add, in the metric's own unit.
    """

    unit: str
    scale: int
    limit: float


_COUNT = Quantity("", 1, 1e9)

QUANTITIES: dict[str, Quantity] = {
    "claude_code.token.usage": Quantity("tokens", 1, 1e9),
    "claude_code.cost.usage": Quantity("USD", 10**9, 1e5),
    "claude_code.active_time.total": Quantity("s", 10**6, 1e6),
    "claude_code.session.count": _COUNT,
    "claude_code.lines_of_code.count": _COUNT,
    "claude_code.commit.count": _COUNT,
    "claude_code.pull_request.count": _COUNT,
    "claude_code.code_edit_tool.decision": _COUNT,
}
"""The units are pinned: a client that says `token` or `{token}` does not rename a series."""


# XRG looks for the words input, output, cache_read and cache_create anywhere in a line. `cache_creation` does not
# contain `cache_create`, hence the second label. No free text may stand in this profile.
XRG_PROFILE: tuple[ProfileFamily, ...] = (
    ProfileFamily(
        "claude_code_token_usage",
        "Tokens used by Claude Code since this bridge began to count.",
        1,
        (
            ProfileSample('{type="input"}', "tokens.input"),
            ProfileSample('{type="output"}', "tokens.output"),
            ProfileSample('{type="cache_read"}', "tokens.cache_read"),
            ProfileSample('{type="cache_creation",xrg="cache_create"}', "tokens.cache_creation"),
        ),
    ),
    ProfileFamily("claude_code_cost_usage", "US dollars.", 10**9, (ProfileSample("", "usd"),)),
    ProfileFamily("claude_code_session_count", "Sessions started.", 1, (ProfileSample("", "sessions"),)),
    ProfileFamily(
        "claude_code_lines_of_code_count",
        "Lines of code changed.",
        1,
        (ProfileSample('{type="added"}', "lines.added"), ProfileSample('{type="removed"}', "lines.removed")),
    ),
    ProfileFamily("claude_code_commit_count", "Git commits made.", 1, (ProfileSample("", "commits"),)),
    ProfileFamily("claude_code_pull_request_count", "Pull requests made.", 1, (ProfileSample("", "pull_requests"),)),
    ProfileFamily(
        "claude_code_code_edit_tool_decision",
        "Edits accepted and rejected.",
        1,
        (
            ProfileSample('{decision="accept"}', "decisions.accept"),
            ProfileSample('{decision="reject"}', "decisions.reject"),
        ),
    ),
    ProfileFamily(
        "claude_code_active_time_total",
        "Seconds of active use.",
        10**6,
        (ProfileSample('{type="user"}', "active.user"), ProfileSample('{type="cli"}', "active.cli")),
    ),
)

_TOTALS: dict[str, tuple[str, dict[str, str]]] = {
    "claude_code.lines_of_code.count": ("type", {"added": "lines.added", "removed": "lines.removed"}),
    "claude_code.code_edit_tool.decision": (
        "decision",
        {"accept": "decisions.accept", "reject": "decisions.reject"},
    ),
    "claude_code.active_time.total": ("type", {"user": "active.user", "cli": "active.cli"}),
}
_PLAIN_TOTALS = {
    "claude_code.session.count": "sessions",
    "claude_code.commit.count": "commits",
    "claude_code.pull_request.count": "pull_requests",
}
JOINED_TOTALS = {
    "input": "tokens.input",
    "output": "tokens.output",
    "cache_read": "tokens.cache_read",
    "cache_write": "tokens.cache_creation",
    "usd": "usd",
}
"""The totals that are joined of all sources, by the join's kinds."""
_CELL_KINDS = {"input": "input", "output": "output", "cacheRead": "cache_read", "cacheCreation": "cache_write"}


def total_key(metric: str, attributes: Attributes) -> str | None:
    """The lifetime total that a point of this metric adds to; None where it has none, or a joined one."""
    if metric in _PLAIN_TOTALS:
        return _PLAIN_TOTALS[metric]
    if metric not in _TOTALS:
        return None
    attribute, totals = _TOTALS[metric]
    return next((totals.get(attribute_text(value)) for key, value in attributes if key == attribute), None)


def usage_cell(metric: str, attributes: Attributes) -> tuple[str, str, str] | None:
    """The (session, model, kind) that a point of the token or cost metric tells of; None for other metrics."""
    if metric not in ("claude_code.token.usage", "claude_code.cost.usage"):
        return None
    texts = {key: attribute_text(value) for key, value in attributes if key in ("session.id", "model", "type")}
    kind = "usd" if metric == "claude_code.cost.usage" else _CELL_KINDS.get(texts.get("type", ""))
    return None if kind is None else (texts.get("session.id", ""), texts.get("model", ""), kind)


# --- how it is told to export here -----------------------------------------------------------------------------


def transcript_series(session: str, model: str, cell: Cell) -> Iterator[tuple[Metric, Attributes, int]]:
    """What a cell's transcripts are worth, as series of the tool's own families: metric, attributes, exact value."""
    common = (("model", model), ("session.id", session))
    for name, kind in _CELL_KINDS.items():
        count = cell.requests[KINDS.index(kind)]
        if count:
            yield _TOKENS, (*common, ("type", name)), count
    if cell.requests_cost:
        yield _COST, common, cell.requests_cost


_SENDER = Resource((("service.name", "claude-code"),))
_SCOPE = Scope("com.anthropic.claude_code")
_TOKENS, _COST = (
    Metric(name, Kind.COUNTER, Temporality.DELTA, QUANTITIES[name].unit, text, _SCOPE, _SENDER)
    for name, text in (
        ("claude_code.token.usage", "Number of tokens used"),
        ("claude_code.cost.usage", "Cost of the Claude Code session"),
    )
)


class Variable(NamedTuple):
    """One variable of the recommended environment, and why it is there. `{endpoint}` is the bridge's address."""

    name: str
    value: str
    why: str


ENVIRONMENT = (
    Variable("CLAUDE_CODE_ENABLE_TELEMETRY", "1", "nothing is exported without it"),
    Variable("OTEL_METRICS_EXPORTER", "otlp", "tokens, cost, sessions"),
    Variable("OTEL_LOGS_EXPORTER", "otlp", "events: each API request, within five seconds"),
    Variable("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf", "the bridge speaks HTTP, not gRPC"),
    Variable("OTEL_EXPORTER_OTLP_ENDPOINT", "{endpoint}", "this bridge"),
    Variable("OTEL_METRIC_EXPORT_INTERVAL", "10000", "milliseconds; the default is a minute"),
    Variable(
        "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "cumulative", "a lost export is made good by the next one"
    ),
)
OVERRIDES = tuple(
    f"OTEL_EXPORTER_OTLP_{signal}_{what}" for signal in ("METRICS", "LOGS") for what in ("ENDPOINT", "PROTOCOL")
)
"""Variables for one signal: they win over the general ones."""


def environment(endpoint: str) -> dict[str, str]:
    """The recommended environment for a bridge at `endpoint`."""
    return {variable.name: variable.value.format(endpoint=endpoint) for variable in ENVIRONMENT}


def fits(name: str, value: str, endpoint: str) -> bool:
    """Whether a value that is there already does as well as the recommended one."""
    match name:
        case "CLAUDE_CODE_ENABLE_TELEMETRY":
            return value.strip().lower() in ("1", "true", "yes", "on")
        case "OTEL_METRICS_EXPORTER" | "OTEL_LOGS_EXPORTER":
            return "otlp" in (part.strip() for part in value.split(","))
        case "OTEL_METRIC_EXPORT_INTERVAL":
            return value.isascii() and value.isdecimal() and 0 < int(value[:9]) <= 10_000 and len(value) < 9
        case _ if name.endswith("_PROTOCOL"):
            return value in ("http/protobuf", "http/json")
        case "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT":
            return _leads_to(value, endpoint, "/v1/metrics")
        case "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT":
            return _leads_to(value, endpoint, "/v1/logs")
        case "OTEL_EXPORTER_OTLP_ENDPOINT":
            return _leads_to(value, endpoint, "")
        case _:
            return value == environment(endpoint).get(name)


_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def _leads_to(url: str, endpoint: str, path: str) -> bool:
    """Whether exports to `url` reach this path of the bridge at `endpoint`."""
    try:
        given, ours = urlsplit(url), urlsplit(endpoint)
        ports = given.port or 80, ours.port or 80
    except ValueError:
        return False
    both = given.hostname, ours.hostname
    same_host = both[0] == both[1] or all(host in _LOOPBACK for host in both)
    return given.scheme == "http" and same_host and ports[0] == ports[1] and given.path.rstrip("/") == path


def misfits(variables: Mapping[str, str], endpoint: str) -> dict[str, str]:
    """What of these variables keeps exports from this bridge: name -> value, empty where one is missing."""
    wrong = {
        name: variables.get(name, "")
        for name in environment(endpoint)
        if not fits(name, variables.get(name, ""), endpoint)
    }
    overrides = {name: variables[name] for name in OVERRIDES if variables.get(name)}
    for name, value in overrides.items():
        if not fits(name, value, endpoint):
            wrong[name] = value
        elif name.startswith("OTEL_EXPORTER_OTLP_METRICS_"):  # metrics go right; the general one does not matter then
            wrong.pop(name.replace("_METRICS_", "_"), None)
    return wrong


# --- transcripts -------------------------------------------------------------------------------------------------
#
# Every content block of a response is a line of its own with the same ids; old clients wrote snapshots while they
# streamed. Forks and old resumes copy lines into other files under a new session id, side questions replay a response
# under a new request id, subagents have files of their own and, in old clients, also `progress` lines in the parent's.
# So a line becomes a Usage whose key is the same in all copies; the bill is the copy with the highest output.

MAX_COUNT = 10**12
"""Tokens of one kind that one request can plausibly have."""
MAX_COST = 1e5
"""US dollars that one request can plausibly cost."""
MAX_TEXT = 1024
MAX_REPAIR = 1024 * 1024
"""A broken line above this many bytes is not tried again: repair holds all of it as objects."""

_SYNTHETIC = "<synthetic>"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)

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


def read_line(line: bytes, order: int) -> tuple[Usage, ...] | Drop:
    """What one line of a transcript says of API requests: mostly one Usage, more with advisors, none, or a refusal.

    `order` is the Usage's, and its time where the line has none.
    """
    decoded = _decode(line)
    if isinstance(decoded, Drop):
        return decoded
    record = _nested(decoded) if decoded.type == "progress" else decoded
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
        members[key] = _text(members[key]) or None
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
    time_ms = _milliseconds(record.timestamp)
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
        _digest(message.id, 8) if message.id else b"",
        order,
        record.is_sidechain is True,
        searches,
        usage.speed or "",
        usage.inference_geo or "",
        usage.service_tier or "",
        None if record.cost_usd is None else _nano_dollars(record.cost_usd),
        None,
        record.cwd or "",
    )
    iterations = bytes(usage.iterations)
    return _with_advisors(main, iterations) if b"advisor_message" in iterations else (main,)


def _with_advisors(main: Usage, iterations: bytes) -> tuple[Usage, ...] | Drop:
    """The request and its calls of another model, which are not in its own counts and have no request id."""
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
            key=_digest(f"{main.key.hex()}{index}"),
            model=step.model or "",
            **dict(zip(_TOKEN_FIELDS, tokens, strict=True)),
            request_id="",
            web_searches=0,
            speed="",
            cost=None,
        )
        usages.append(advisor)
    return tuple(usages)


_TOKEN_FIELDS = ("input", "output", "cache_read", "cache_write_5m", "cache_write_1h")


def _tokens(usage: _Counts) -> _Tokens | Drop:
    split = usage.cache_creation
    return _disjoint(
        usage.input_tokens or 0,
        usage.output_tokens or 0,
        usage.cache_read_input_tokens or 0,
        usage.cache_creation_input_tokens or 0,
        (split and split.ephemeral_5m_input_tokens) or 0,
        (split and split.ephemeral_1h_input_tokens) or 0,
    )


def _disjoint(new: int, output: int, read: int, written: int, written_5m: int, written_1h: int) -> _Tokens | Drop:
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
        return _digest(f"{message}\0{request_id}")
    # Some gateways give every message the same id; output is left out because it grows while a response is streamed.
    new, _, read, written_5m, written_1h = tokens
    return _digest(f"{message}\0\0{model}\0{new}\0{read}\0{written_5m}\0{written_1h}")


def _digest(text: str, size: int = 16) -> bytes:
    return blake2b(text.encode(), digest_size=size).digest()


def _text(value: object) -> str:
    return value[:MAX_TEXT] if isinstance(value, str) else ""


def _milliseconds(timestamp: str | None) -> int | None:
    """Unix milliseconds of an ISO 8601 time after 1970, taken for UTC where it names no zone; None if it is none."""
    try:
        time = datetime.fromisoformat(timestamp or "")
    except ValueError:
        return None
    if time.tzinfo is None:
        time = time.replace(tzinfo=UTC)
    elapsed = (time - _EPOCH) // _MILLISECOND
    return elapsed if elapsed > 0 else None


def _nano_dollars(value: object) -> int | None:
    """A price in dollars, as a number or its text, in whole nano-dollars; None if it is none."""
    dollars = _number(value)
    return None if dollars is None or not 0 <= dollars <= MAX_COST else round(dollars * 1e9)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


class Transcripts(NamedTuple):
    """Where a tool's transcripts lie and how they are read: `roots` takes the environment and the home directory."""

    roots: Callable[[Mapping[str, str], str], tuple[str, ...]]
    pattern: str
    key: bytes
    read: Callable[[bytes, int], tuple[Usage, ...] | Drop]


def _roots(variables: Mapping[str, str], home: str) -> tuple[str, ...]:
    """CLAUDE_CONFIG_DIR may list several directories; without it both places that clients ever used count."""
    named = [part.strip() for part in variables.get("CLAUDE_CONFIG_DIR", "").split(",")]
    configuration = variables.get("XDG_CONFIG_HOME") or f"{home}/.config"
    directories = [part for part in named if part] or [f"{home}/.claude", f"{configuration}/claude"]
    expanded = (home + part[1:] if part == "~" or part.startswith("~/") else part for part in directories)
    return tuple(dict.fromkeys(f"{part.rstrip('/')}/projects" for part in expanded))


# `cache_read_input_tokens` and its like end so as well: there is no usage without this key.
TRANSCRIPTS = Transcripts(_roots, "**/*.jsonl", b'input_tokens"', read_line)


# --- events ------------------------------------------------------------------------------------------------------

_EVERY_EVENT = frozenset(
    {"event.name", "event.timestamp", "event.sequence", "session.id", "user.id", "user.account_uuid", "user.email"}
)
_CALL = frozenset({"model", "request_id", "client_request_id", "speed", "query_source", "duration_ms", "effort"})

EVENT_KEYS: dict[str, frozenset[str]] = {
    "api_request": _EVERY_EVENT
    | _CALL
    | {
        "input_tokens",
        "output_tokens",
        "cache_read_tokens",
        "cache_creation_tokens",
        "cache_creation_5m_tokens",
        "cache_creation_1h_tokens",
        "cost_usd",
        "cost_usd_micros",
        "ttft_ms",
    },
    "api_error": _EVERY_EVENT | _CALL | {"status_code", "attempt"},
    "api_retries_exhausted": _EVERY_EVENT | _CALL | {"status_code", "total_attempts", "total_retry_duration_ms"},
    "api_refusal": _EVERY_EVENT | _CALL | {"attempt", "server_fallback_hop"},
    "tool_result": _EVERY_EVENT
    | {"tool_name", "success", "duration_ms", "decision_type", "decision_source", "tool_use_id"},
    "tool_decision": _EVERY_EVENT | {"tool_name", "decision", "source", "tool_source", "tool_use_id"},
    "compaction": _EVERY_EVENT | {"trigger", "success", "duration_ms", "pre_tokens", "post_tokens"},
    "user_prompt": _EVERY_EVENT,
}
"""The events that are asked for anything, and the attributes of them that may leave the decoder: nothing that a user
or a model wrote, no command, no path, no error text."""

SESSION_KEY = "session.id"


def event_keys(denied: Set[str]) -> dict[str, frozenset[str]]:
    """EVENT_KEYS without what is denied, but for the session: sources are joined by it, so the ledger replaces it."""
    return {name: keys - (denied - {SESSION_KEY}) for name, keys in EVENT_KEYS.items()}


_EVENT_COUNTS = (
    "input_tokens",
    "output_tokens",
    "cache_read_tokens",
    "cache_creation_tokens",
    "cache_creation_5m_tokens",
    "cache_creation_1h_tokens",
)


def read_event(
    name: str, attributes: Mapping[str, EventValue], session: str, user: str, time_ms: int
) -> Usage | Drop | None:
    """The API request that an event tells of; None if it tells of none. Old clients send all numbers as strings."""
    if name != "api_request":
        return None
    numbers = [_number(attributes.get(key, 0)) for key in _EVENT_COUNTS]
    if any(number is None or not number.is_integer() for number in numbers):
        return Drop.MALFORMED
    new, output, read, written, written_5m, written_1h = (int(number or 0) for number in numbers)
    tokens = _disjoint(new, output, read, written, written_5m, written_1h)
    if isinstance(tokens, Drop):
        return tokens
    model = _text(attributes.get("model"))
    duration = _number(attributes.get("duration_ms"))
    speed = _text(attributes.get("speed"))
    return Usage(
        TOOL,
        Source.EVENT,
        _event_key(attributes, session, f"{model}\0{numbers}\0{duration}"),
        session,
        model,
        time_ms,
        *tokens,
        request_id=_text(attributes.get("request_id")),
        order=time_ms,
        speed="standard" if speed == "normal" else speed,
        cost=_event_cost(attributes),
        duration_ms=None if duration is None or not 0 <= duration <= MAX_COUNT else round(duration),
        user=user,
    )


def _event_cost(attributes: Mapping[str, EventValue]) -> int | None:
    """The exact dollars rather than the rounded micro-dollars."""
    cost = _nano_dollars(attributes.get("cost_usd"))
    if cost is not None:
        return cost
    micros = _number(attributes.get("cost_usd_micros"))
    return None if micros is None else _nano_dollars(micros / 1e6)


def _event_key(attributes: Mapping[str, EventValue], session: str, content: str) -> bytes:
    """Of the ids where there are any; else of the place in the process's sequence; else of all that it says."""
    request_id = _text(attributes.get("request_id")) or _text(attributes.get("client_request_id"))
    if request_id:
        return _digest(f"request\0{request_id}")
    sequence, timestamp = attributes.get("event.sequence"), attributes.get("event.timestamp", "")
    if sequence is not None:
        return _digest(f"sequence\0{session}\0{sequence}\0{timestamp}")
    return _digest(f"content\0{session}\0{timestamp}\0{content}")


# --- events as metrics -------------------------------------------------------------------------------------------
#
# What people otherwise need a log database for. All are delta points without a writer, so they are protected by the
# hash of the body that brought them.

_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_EVENT_SCOPE = Scope("claude-otel-bridge")


def read_events(events: Iterable[Event]) -> tuple[list[Usage], list[DataPoint], list[Refusal]]:
    """What events tell: API requests, points of counters and histograms, and requests that had to be refused."""
    usages: list[Usage] = []
    points: list[DataPoint] = []
    refused: list[Refusal] = []
    for event in events:
        session, user = _plain(event, SESSION_KEY), _plain(event, "user.email") or _plain(event, "user.id")
        usage = read_event(event.name, event.attributes, session, user, event.time // 1_000_000)
        if isinstance(usage, Drop):
            refused.append(Refusal(usage, f"{PREFIX}{event.name}"))
        elif usage is not None:
            usages.append(usage)
        points += _event_points(event)
    return usages, points, refused


def _event_points(event: Event) -> list[DataPoint]:
    match event.name:
        case "api_request":
            return _timed(event, "ai.request.duration", "API requests, by duration.", "model")
        case "api_error":
            return [_told(event, "ai.errors", "API requests that failed.", "model", "status_code")]
        case "api_retries_exhausted":
            return [_told(event, "ai.retries.exhausted", "API requests given up.", "model", "status_code")]
        case "api_refusal":
            return [_told(event, "ai.refusals", "API requests that the model refused.", "model")]
        case "tool_result":
            called = _told(event, "ai.tool.calls", "Tool calls, by outcome.", "tool_name", "success")
            return [called, *_timed(event, "ai.tool.duration", "Tool calls, by duration.", "tool_name")]
        case "tool_decision":
            text = "Permissions asked for, by decision."
            return [_told(event, "ai.tool.decisions", text, "tool_name", "decision", "source")]
        case "compaction":
            return [_told(event, "ai.compactions", "Compactions of a context.", "trigger", "success")]
        case "user_prompt":
            return [_told(event, "ai.prompts", "Prompts of users.")]
        case _:
            return []


def _told(event: Event, name: str, text: str, *keys: str) -> DataPoint:
    metric = Metric(name, Kind.COUNTER, Temporality.DELTA, "", text, _EVENT_SCOPE, event.resource)
    return DataPoint(metric, _labels(event, keys), event.time, event.time, 1)


def _timed(event: Event, name: str, text: str, *keys: str) -> list[DataPoint]:
    milliseconds = _number(event.attributes.get("duration_ms"))
    if milliseconds is None or not 0 <= milliseconds <= MAX_COUNT:
        return []
    seconds = milliseconds / 1000
    counts = [0] * (len(_SECONDS) + 1)
    counts[bisect_left(_SECONDS, seconds)] = 1
    metric = Metric(name, Kind.HISTOGRAM, Temporality.DELTA, "s", text, _EVENT_SCOPE, event.resource)
    value = Histogram(_SECONDS, tuple(counts), 1, seconds)
    return [DataPoint(metric, _labels(event, keys), event.time, event.time, value)]


def _labels(event: Event, keys: tuple[str, ...]) -> Attributes:
    labels = {key: _plain(event, key) for key in keys if key in event.attributes}
    return tuple(sorted({**labels, "tool": TOOL}.items()))


def _plain(event: Event, key: str) -> str:
    value = event.attributes.get(key, "")
    return str(value).lower() if isinstance(value, bool) else str(value)[:MAX_TEXT]
