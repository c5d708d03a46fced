"""What Gemini CLI's telemetry means; Qwen Code's is the same under another name.

Source: the client itself, 0.61.0, checked 2026-11-28. It tells of the same tokens four times: as
`gemini_cli.token.usage` and as `gen_ai.client.token.usage`, in the event `gemini_cli.api_response` and in one of the
GenAI conventions. The first of each pair is read: it is the one that knows of caches and thoughts. `input` holds what
was read from a cache.
"""

from collections.abc import Mapping

from bridge.model import AttributeValue, DataPoint, Drop, Event, Kind, Metric, Source, Usage, UsageCell, text_in
from bridge.tools.events import called, plain, timed, told
from bridge.tools.fields import MAX_COUNT, digest, number_of, text_of
from bridge.tools.gemini_lines import TOOL, disjoint
from bridge.tools.tool import Quantity

TOOLS = {"gemini_cli": TOOL, "qwen-code": "qwen_code"}
"""The tools by what the names of their telemetry begin with."""

SERVICES = {"gemini-cli": TOOL, "qwen-code": "qwen_code"}
"""The tools by what their service.name begins with."""

QUANTITIES = {f"{prefix}.token.usage": Quantity("", 1, 1e9) for prefix in TOOLS}
_CELL_KINDS = {"input": "prompt", "tool": "prompt", "cache": "cached", "output": "output", "thought": "output"}

_EVERY_EVENT = frozenset({"event.name", "event.timestamp", "session.id", "prompt_id", "user.email"})
_COUNTS = (
    "input_token_count",
    "cached_content_token_count",
    "output_token_count",
    "thoughts_token_count",
    "tool_token_count",
)
_KEYS: dict[str, frozenset[str]] = {
    "api_response": _EVERY_EVENT.union(_COUNTS, {"model", "duration_ms"}),
    "api_error": _EVERY_EVENT | {"model", "duration_ms", "status_code"},
    "chat.content_retry_failure": _EVERY_EVENT | {"model"},
    "tool_call": _EVERY_EVENT | {"function_name", "success", "decision", "duration_ms"},
    "chat_compression": _EVERY_EVENT,
    "user_prompt": _EVERY_EVENT,
}
EVENT_KEYS = {f"{prefix}.{name}": keys for prefix in TOOLS for name, keys in _KEYS.items()}
"""The events that are asked for anything, and the attributes of them that may leave the decoder: nothing that a user
or a model wrote, no arguments, no error text, though by default the client sends all of it."""


def usage_cell(metric: Metric, attributes: Mapping[str, AttributeValue]) -> UsageCell | None:
    """What a point of the token metric tells of; None for other metrics."""
    if metric.kind is not Kind.COUNTER or metric.name not in QUANTITIES:
        return None
    kind = _CELL_KINDS.get(text_in(attributes, "type"))
    if kind is None:
        return None
    tool = TOOLS[metric.name.partition(".")[0]]
    return UsageCell(tool, text_in(attributes, "session.id"), text_in(attributes, "model"), kind)


def read_event(event: Event) -> Usage | Drop | None:
    """The API request that an event tells of; None if it tells of none."""
    prefix, _, name = event.name.partition(".")
    if name != "api_response":
        return None
    attributes, session, time_ms = event.attributes, plain(event, "session.id"), event.time // 1_000_000
    counts = [number_of(attributes.get(key, 0)) for key in _COUNTS]
    if any(count is None or not count.is_integer() for count in counts):
        return Drop.MALFORMED
    tokens = disjoint(*(int(count or 0) for count in counts))
    if isinstance(tokens, Drop):
        return tokens
    new, output, read = tokens
    model, duration = text_of(attributes.get("model")), number_of(attributes.get("duration_ms"))
    # It has no id of its own: all that it says names it.
    place = f"{session}\0{plain(event, 'prompt_id')}\0{plain(event, 'event.timestamp')}"
    return Usage(
        TOOLS[prefix],
        Source.EVENT,
        digest(f"{prefix}\0{place}\0{model}\0{counts}\0{duration}"),
        session,
        model,
        time_ms,
        new,
        output,
        read,
        0,
        0,
        order=time_ms,
        duration_ms=None if duration is None or not 0 <= duration <= MAX_COUNT else round(duration),
        user=plain(event, "user.email"),
    )


def event_points(event: Event) -> list[DataPoint]:
    """What an event adds to counters and histograms."""
    prefix, _, name = event.name.partition(".")
    tool = TOOLS[prefix]
    match name:
        case "api_response":
            return timed(event, tool, "ai.request.duration", "API requests, by duration.", model="model")
        case "api_error":
            text = "API requests that failed."
            return [told(event, tool, "ai.errors", text, model="model", status_code="status_code")]
        case "chat.content_retry_failure":
            return [told(event, tool, "ai.retries.exhausted", "API requests given up.", model="model")]
        case "tool_call":
            points = called(event, tool, "function_name")
            if "decision" in event.attributes:
                labels = {"tool_name": "function_name", "decision": "decision"}
                points.append(told(event, tool, "ai.tool.decisions", "Permissions asked for, by decision.", **labels))
            return points
        case "chat_compression":
            return [told(event, tool, "ai.compactions", "Compactions of a context.")]
        case "user_prompt":
            return [told(event, tool, "ai.prompts", "Prompts of users.")]
        case _:
            return []
