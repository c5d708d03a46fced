"""What Claude Code's telemetry means: its metrics, their exact units, and the samples that XRG reads.

Source: https://code.claude.com/docs/en/monitoring-usage and recorded exports of clients 1.0.128 to 2.1.332,
checked 2026-11-29. All eight metrics are monotonic sums whose values are sent as doubles.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

from bridge.join import KINDS, Cell
from bridge.model import (
    Attributes,
    AttributeValue,
    DataPoint,
    Drop,
    Event,
    EventValue,
    Kind,
    Metric,
    ProfileFamily,
    ProfileSample,
    Resource,
    Scope,
    Source,
    Temporality,
    Usage,
    UsageCell,
    text_in,
)
from bridge.tools.claude_code_lines import TOOL, disjoint
from bridge.tools.events import called, plain, timed, told
from bridge.tools.fields import MAX_COUNT, digest, nano_dollars, number_of, text_of
from bridge.tools.tool import Quantity

__all__ = ["TOOL"]

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


def total_key(metric: str, attributes: Mapping[str, AttributeValue]) -> str | None:
    """The lifetime total that a point of this metric adds to; None where it has none, or a joined one."""
    if metric in _PLAIN_TOTALS:
        return _PLAIN_TOTALS[metric]
    if metric not in _TOTALS:
        return None
    attribute, totals = _TOTALS[metric]
    return totals.get(text_in(attributes, attribute))


def usage_cell(metric: Metric, attributes: Mapping[str, AttributeValue]) -> UsageCell | None:
    """What a point of the token or cost metric tells of; None for other metrics."""
    if metric.kind is not Kind.COUNTER or metric.name not in ("claude_code.token.usage", "claude_code.cost.usage"):
        return None
    kind = "usd" if metric.name == "claude_code.cost.usage" else _CELL_KINDS.get(text_in(attributes, "type"))
    if kind is None:
        return None
    return UsageCell(TOOL, text_in(attributes, "session.id"), text_in(attributes, "model"), kind)


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


def headers(token: str) -> str:
    """The value of OTEL_EXPORTER_OTLP_HEADERS that sends a token; SDKs take it as W3C baggage, where a space is %20."""
    return f"Authorization=Bearer%20{token}"


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


_PORTS = {"http": 80, "https": 443}
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def _leads_to(url: str, endpoint: str, path: str) -> bool:
    """Whether exports to `url` reach this path of the bridge at `endpoint`."""
    try:
        given, ours = urlsplit(url), urlsplit(endpoint)
        ports = given.port or _PORTS.get(given.scheme), ours.port or _PORTS.get(ours.scheme)
    except ValueError:
        return False
    both = given.hostname, ours.hostname
    same_host = both[0] == both[1] or all(host in _LOOPBACK for host in both)
    return given.scheme == ours.scheme and same_host and ports[0] == ports[1] and given.path.rstrip("/") == path


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


# --- events ------------------------------------------------------------------------------------------------------

_EVERY_EVENT = frozenset(
    {"event.name", "event.timestamp", "event.sequence", "session.id", "user.id", "user.account_uuid", "user.email"}
)
_CALL = frozenset({"model", "request_id", "client_request_id", "speed", "query_source", "duration_ms", "effort"})

_EVENT_COUNTS = (
    "input_tokens",
    "output_tokens",
    "cache_read_tokens",
    "cache_creation_tokens",
    "cache_creation_5m_tokens",
    "cache_creation_1h_tokens",
)

EVENT_KEYS: dict[str, frozenset[str]] = {
    "api_request": _EVERY_EVENT | _CALL | {*_EVENT_COUNTS, "cost_usd", "cost_usd_micros", "ttft_ms"},
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


def read_event(event: Event) -> Usage | Drop | None:
    """The API request that an event tells of; None if it tells of none. Old clients send all numbers as strings."""
    if event.name != "api_request":
        return None
    attributes, session, time_ms = event.attributes, plain(event, "session.id"), event.time // 1_000_000
    numbers = [number_of(attributes.get(key, 0)) for key in _EVENT_COUNTS]
    if any(number is None or not number.is_integer() for number in numbers):
        return Drop.MALFORMED
    new, output, read, written, written_5m, written_1h = (int(number or 0) for number in numbers)
    tokens = disjoint(new, output, read, written, written_5m, written_1h)
    if isinstance(tokens, Drop):
        return tokens
    model = text_of(attributes.get("model"))
    duration = number_of(attributes.get("duration_ms"))
    speed = text_of(attributes.get("speed"))
    return Usage(
        TOOL,
        Source.EVENT,
        _event_key(attributes, session, f"{model}\0{numbers}\0{duration}"),
        session,
        model,
        time_ms,
        *tokens,
        request_id=text_of(attributes.get("request_id")),
        order=time_ms,
        speed="standard" if speed == "normal" else speed,
        cost=_event_cost(attributes),
        duration_ms=None if duration is None or not 0 <= duration <= MAX_COUNT else round(duration),
        user=plain(event, "user.email") or plain(event, "user.id"),
    )


def _event_cost(attributes: Mapping[str, EventValue]) -> int | None:
    """The exact dollars rather than the rounded micro-dollars."""
    cost = nano_dollars(attributes.get("cost_usd"))
    if cost is not None:
        return cost
    micros = number_of(attributes.get("cost_usd_micros"))
    return None if micros is None else nano_dollars(micros / 1e6)


def _event_key(attributes: Mapping[str, EventValue], session: str, content: str) -> bytes:
    """Of the ids where there are any; else of the place in the process's sequence; else of all that it says."""
    request_id = text_of(attributes.get("request_id")) or text_of(attributes.get("client_request_id"))
    if request_id:
        return digest(f"request\0{request_id}")
    sequence, timestamp = attributes.get("event.sequence"), attributes.get("event.timestamp", "")
    if sequence is not None:
        return digest(f"sequence\0{session}\0{sequence}\0{timestamp}")
    return digest(f"content\0{session}\0{timestamp}\0{content}")


def event_points(event: Event) -> list[DataPoint]:
    """What an event adds to counters and histograms."""
    match event.name:
        case "api_request":
            return timed(event, TOOL, "ai.request.duration", "API requests, by duration.", model="model")
        case "api_error":
            text = "API requests that failed."
            return [told(event, TOOL, "ai.errors", text, model="model", status_code="status_code")]
        case "api_retries_exhausted":
            text = "API requests given up."
            return [told(event, TOOL, "ai.retries.exhausted", text, model="model", status_code="status_code")]
        case "api_refusal":
            return [told(event, TOOL, "ai.refusals", "API requests that the model refused.", model="model")]
        case "tool_result":
            return called(event, TOOL)
        case "tool_decision":
            labels = {key: key for key in ("tool_name", "decision", "source")}
            return [told(event, TOOL, "ai.tool.decisions", "Permissions asked for, by decision.", **labels)]
        case "compaction":
            text = "Compactions of a context."
            return [told(event, TOOL, "ai.compactions", text, trigger="trigger", success="success")]
        case "user_prompt":
            return [told(event, TOOL, "ai.prompts", "Prompts of users.")]
        case _:
            return []
