"""What the GenAI semantic conventions mean: usage of any application that is instrumented after them.

Spans (and the one event that repeats a span's attributes) tell of requests, the token metrics of sums; both are of
the tool that `service.name` says. The same request can be told of by several spans: by those that sum up what is below
them, and by two instrumentations at once. Which of them counts is told apart by their places in the trace.

Sources: opentelemetry.io/docs/specs/semconv/gen-ai/ and what the instrumentations for the OpenAI and Anthropic SDKs
send, checked 2026-11-28. Prompts hold what was read from and written to caches, but in the spans of some older ones.
"""

import re
from collections.abc import Iterable, Mapping

from bridge.model import (
    AttributeValue,
    DataPoint,
    Drop,
    Event,
    EventValue,
    Kind,
    Metric,
    Place,
    Source,
    SpanRank,
    Usage,
    UsageCell,
    text_in,
)
from bridge.tools.fields import MAX_COUNT, digest, number_of, text_of
from bridge.tools.tool import Quantity

UNKNOWN = "unknown"
MAX_NAME = 64
"""Characters of a service.name that become the tool's name."""

_PROMPT = ("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens")
_OUTPUT = ("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens")
_READ = ("gen_ai.usage.cache_read.input_tokens", "gen_ai.usage.cache_read_input_tokens")
_WRITTEN = (
    "gen_ai.usage.cache_creation.input_tokens",
    "gen_ai.usage.cache_write.input_tokens",
    "gen_ai.usage.cache_creation_input_tokens",
)
_TOTAL = ("gen_ai.usage.total_tokens", "llm.usage.total_tokens")
_MODEL = ("gen_ai.response.model", "gen_ai.request.model")
_SESSION = ("gen_ai.conversation.id", "session.id")
SPAN_KEYS = frozenset(
    {*_PROMPT, *_OUTPUT, *_READ, *_WRITTEN, *_TOTAL, *_MODEL, *_SESSION}
    | {"gen_ai.operation.name", "gen_ai.response.id", "llm.request.type"}
)
"""The attributes of spans that may leave the decoder: numbers, models and ids, nothing that a user or a model wrote."""
EVENT_KEYS = {"gen_ai.client.inference.operation.details": SPAN_KEYS | {"event.name"}}

_INFERENCES = frozenset({"chat", "text_completion", "generate_content", "embeddings", "completion", "embedding"})
"""Operations that are one request, also as `llm.request.type` of older instrumentations."""
_ROLLUPS = frozenset({"invoke_agent", "invoke_workflow", "create_agent", "execute_tool"})
"""Operations whose spans sum up the requests below them."""

_TOKEN_USAGE = "gen_ai.client.token.usage"  # noqa: S105  # tokens of a model
_HISTOGRAM_KINDS = {"input": "prompt", "output": "output"}
_COUNTERS = {
    "gen_ai.client.inference.usage.input_tokens": "prompt",
    "gen_ai.client.inference.usage.output_tokens": "output",
    "gen_ai.client.inference.usage.cache_read.input_tokens": "cached",
    "gen_ai.client.inference.usage.cache_write.input_tokens": "cache_write",
}
"""As semantic-conventions-genai proposes them."""


COUNTERS = b"gen_ai.client.inference.usage."
"""In every body that holds one of them."""
QUANTITIES: dict[str, Quantity] = {}
TOOL = "genai"


def tool_of(service: str) -> str:
    """A service.name as a label value."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", service)[:MAX_NAME].strip("_")
    return UNKNOWN if not name or name.startswith("unknown_service") else name


def repeats(points: Iterable[DataPoint]) -> frozenset[Metric]:
    """The histograms beside which the same instrumentation sends the counters that are proposed in their place."""
    metrics = {point.metric for point in points}
    counted = {(metric.resource, metric.scope) for metric in metrics if metric.name in _COUNTERS}
    return frozenset(
        metric for metric in metrics if metric.name == _TOKEN_USAGE and (metric.resource, metric.scope) in counted
    )


def usage_cell(metric: Metric, attributes: Mapping[str, AttributeValue]) -> UsageCell | None:
    """What a point of a token metric tells of; None for other metrics."""
    if metric.name == _TOKEN_USAGE and metric.kind in (Kind.HISTOGRAM, Kind.EXPONENTIAL):
        kind = _HISTOGRAM_KINDS.get(text_in(attributes, "gen_ai.token.type"))
    else:
        kind = _COUNTERS.get(metric.name) if metric.kind is Kind.COUNTER else None
    if kind is None:
        return None
    model, session = (
        next(filter(None, (text_in(attributes, key) for key in keys)), "") for keys in (_MODEL, _SESSION)
    )  # fmt: skip
    return UsageCell(tool_of(metric.resource.get("service.name")), session, model, kind)


def read_event(event: Event) -> Usage | Drop | None:
    """The request that an event tells of, which is what the span around it will tell."""
    return read_span(event)


def event_points(event: Event) -> list[DataPoint]:
    """Nothing: the conventions have metrics of their own for what else an event tells."""
    del event
    return []


def read_span(span: Event) -> Usage | Drop | None:
    """The request that a span, or the event that repeats one, tells of; None if it tells of none."""
    attributes = span.attributes
    if not any(key in attributes for key in (*_PROMPT, *_OUTPUT)):
        return None
    tokens = _tokens(attributes)
    if isinstance(tokens, Drop):
        return tokens
    new, output, read, written = tokens
    response, place = text_of(attributes.get("gen_ai.response.id")), _place(span)
    model, session = (_text(attributes, keys) for keys in (_MODEL, _SESSION))
    tool, time_ms = tool_of(span.resource.get("service.name")), span.time // 1_000_000
    name = f"{span.trace}\0{span.span}" if place else f"{response or f'{tokens}{model}{span.time}'}"
    return Usage(
        tool,
        Source.EVENT,
        digest(f"{tool}\0{name}"),
        session,
        model,
        time_ms,
        new,
        output,
        read,
        written,
        0,
        request_id=response,
        order=time_ms,
        duration_ms=(span.time - span.start) // 1_000_000 if 0 < span.start <= span.time else None,
        revision=1 if span.start else 0,  # a span knows more than the event that repeats it
        place=place,
    )


def _tokens(attributes: Mapping[str, EventValue]) -> tuple[int, int, int, int] | Drop:
    """Input, output, cache read and written: disjoint."""
    found = [_number(attributes, keys) for keys in (_PROMPT, _OUTPUT, _READ, _WRITTEN)]
    if any(count is None or not count.is_integer() for count in found):
        return Drop.MALFORMED
    prompt, output, read, written = (int(count or 0) for count in found)
    if min(prompt, output, read, written) < 0:
        return Drop.NEGATIVE
    if max(prompt, output, read, written) > MAX_COUNT:
        return Drop.IMPLAUSIBLE
    cached = read + written
    is_apart = prompt < cached or (cached > 0 and _number(attributes, _TOTAL) == prompt + cached + output)
    return prompt if is_apart else prompt - cached, output, read, written


def _number(attributes: Mapping[str, EventValue], keys: tuple[str, ...]) -> float | None:
    return number_of(next((attributes[key] for key in keys if key in attributes), 0))


def _text(attributes: Mapping[str, EventValue], keys: tuple[str, ...]) -> str:
    return next((text for key in keys if (text := text_of(attributes.get(key)))), "")


def _place(span: Event) -> Place | None:
    if len(span.trace) != 32 or len(span.span) != 16:
        return None
    parent = bytes.fromhex(span.parent) if len(span.parent) == 16 else b""
    operation = text_of(span.attributes.get("gen_ai.operation.name"))
    rank = SpanRank.UNKNOWN
    if operation in _INFERENCES or text_of(span.attributes.get("llm.request.type")) in _INFERENCES:
        rank = SpanRank.REQUEST
    elif operation in _ROLLUPS:
        rank = SpanRank.SUM
    trace = bytes.fromhex(span.trace)[8:]
    return Place(trace, bytes.fromhex(span.span), parent, span.start or span.time, span.time, rank)
