"""What Codex's telemetry means: its metrics and events.

Source: recorded exports of client 0.171.0, checked 2026-11-28. Metrics are delta histograms and sums, and name no
session; events have the thread's id as `conversation.id`, and no id of the response.
"""

from collections.abc import Mapping

from bridge.model import AttributeValue, DataPoint, Drop, Event, Kind, Metric, Source, Usage, UsageCell, text_in
from bridge.tools.codex_lines import TOOL, disjoint
from bridge.tools.events import called, plain, timed, told
from bridge.tools.fields import digest, milliseconds, number_of, text_of
from bridge.tools.tool import Quantity

__all__ = ["TOOL"]

QUANTITIES: dict[str, Quantity] = {}
"""Its token metric is a histogram: shown as sent, and only what is joined is exact."""

_TOKENS = "codex.turn.token_usage"
_CELL_KINDS = {"input": "prompt", "cached_input": "cached", "cache_write_input": "written", "output": "output"}
"""`total` and `reasoning_output` are in these already."""


def usage_cell(metric: Metric, attributes: Mapping[str, AttributeValue]) -> UsageCell | None:
    """What a point of the token metric tells of; None for other metrics."""
    if metric.name != _TOKENS or metric.kind not in (Kind.HISTOGRAM, Kind.EXPONENTIAL):
        return None
    kind = _CELL_KINDS.get(text_in(attributes, "token_type"))
    return None if kind is None else UsageCell(TOOL, "", text_in(attributes, "model"), kind)


def is_of_a_session(key: str, text: str) -> bool:
    """Whether an attribute of a metric ends with a session: that of subagents names the thread that spawned them."""
    return key == "session_source" and text.startswith("subagent_thread_spawn_")


# --- events ------------------------------------------------------------------------------------------------------

_EVERY_EVENT = frozenset({"event.name", "event.timestamp", "conversation.id", "model", "user.account_id", "user.email"})
_COUNTS = ("input_token_count", "cached_token_count", "cache_write_token_count", "output_token_count")

EVENT_KEYS: dict[str, frozenset[str]] = {
    "codex.sse_event": _EVERY_EVENT | {"event.kind", *_COUNTS},
    "codex.api_request": _EVERY_EVENT | {"duration_ms", "http.response.status_code", "endpoint"},
    "codex.websocket_request": _EVERY_EVENT | {"duration_ms", "success"},
    "codex.tool_result": _EVERY_EVENT | {"tool_name", "success", "duration_ms"},
    "codex.tool_decision": _EVERY_EVENT | {"tool_name", "decision", "source"},
    "codex.user_prompt": _EVERY_EVENT,
}
"""The events that are asked for anything, and the attributes of them that may leave the decoder: nothing that a user
or a model wrote, no arguments, no output, no error text."""


def read_event(event: Event) -> Usage | Drop | None:
    """The response that an event tells of; None if it tells of none. Its end is told twice, once without counts."""
    attributes = event.attributes
    if event.name != "codex.sse_event" or attributes.get("event.kind") != "response.completed":
        return None
    if "input_token_count" not in attributes:
        return None
    numbers = [number_of(attributes.get(key, 0)) for key in _COUNTS]
    if any(number is None or not number.is_integer() for number in numbers):
        return Drop.MALFORMED
    prompt, cached, written, output = (int(number or 0) for number in numbers)
    if min(prompt, cached, written, output) < 0:
        return Drop.NEGATIVE
    tokens = disjoint(prompt, cached, written, output)
    if isinstance(tokens, Drop):
        return tokens
    thread, timestamp = plain(event, "conversation.id"), plain(event, "event.timestamp")
    time_ms = milliseconds(timestamp) or event.time // 1_000_000
    return Usage(
        TOOL,
        Source.EVENT,
        digest(f"event\0{thread}\0{timestamp or event.time}\0{numbers}"),
        thread,
        text_of(attributes.get("model")),
        time_ms,
        *tokens,
        order=time_ms,
        user=plain(event, "user.email") or plain(event, "user.account_id"),
    )


def event_points(event: Event) -> list[DataPoint]:
    """What an event adds to counters and histograms."""
    match event.name:
        case "codex.api_request" if plain(event, "endpoint").startswith("/responses") or not plain(event, "endpoint"):
            return [*_requested(event), *_failed(event, is_failed=plain(event, _STATUS) != "200")]
        case "codex.websocket_request":
            return [*_requested(event), *_failed(event, is_failed=plain(event, "success") == "false")]
        case "codex.sse_event":
            return _failed(event, is_failed=plain(event, "event.kind") == "response.failed")
        case "codex.tool_result":
            return called(event, TOOL)
        case "codex.tool_decision":
            labels = {key: key for key in ("tool_name", "decision", "source")}
            return [told(event, TOOL, "ai.tool.decisions", "Permissions asked for, by decision.", **labels)]
        case "codex.user_prompt":
            return [told(event, TOOL, "ai.prompts", "Prompts of users.")]
        case _:
            return []


_STATUS = "http.response.status_code"


def _requested(event: Event) -> list[DataPoint]:
    return timed(event, TOOL, "ai.request.duration", "API requests, by duration.", model="model")


def _failed(event: Event, *, is_failed: bool) -> list[DataPoint]:
    if not is_failed:
        return []
    return [told(event, TOOL, "ai.errors", "API requests that failed.", model="model", status_code=_STATUS)]
