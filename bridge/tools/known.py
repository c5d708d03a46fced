"""The tools that are known: whose telemetry is whose, and what it says of usage.

Law: this and `transcripts` beside it are the only lists of tools. Each module says what its tool's names mean, and
nothing here does.
"""

from collections.abc import Iterable, Mapping, Set

from bridge.model import (
    AttributeValue,
    Batch,
    DataPoint,
    Drop,
    Event,
    Kind,
    Metric,
    Refusal,
    Usage,
    UsageCell,
)
from bridge.tools import claude_code, codex, gemini, gemini_lines, genai
from bridge.tools.tool import Quantity

REPORTING = frozenset({claude_code.TOOL})
"""Tools whose metrics tell of cost."""
ASKED = frozenset({gemini_lines.TOOL})
"""Tools whose transcripts know which model was asked, and events which one answered."""
EVENT_KEYS = {**claude_code.EVENT_KEYS, **codex.EVENT_KEYS, **gemini.EVENT_KEYS, **genai.EVENT_KEYS}
"""The events that are asked for anything, and the attributes of them that may leave the decoder."""
SESSION_KEYS = frozenset({"session.id", "conversation.id", "gen_ai.conversation.id"})
"""Attributes that name a tool's session, by which sources are joined."""
_METRICS = {"claude_code": claude_code, "codex": codex, **dict.fromkeys(gemini.TOOLS, gemini), "gen_ai": genai}
"""By the first part of a metric's name."""
_EVENTS = {name: module for module in (claude_code, codex, gemini, genai) for name in module.EVENT_KEYS}
_SERVICES = {"claude-code": claude_code.TOOL, "codex": codex.TOOL, **gemini.SERVICES}
"""By what a service.name begins with."""
_OWN_SPANS = "claude_code."
"""What the names of spans begin with that repeat what a known tool's events say."""


def tool_of_service(service: str) -> str:
    """The tool of a service.name: `claude-code` and `claude-code-desktop` are one, as `codex_exec` and `codex_tui`."""
    return next((tool for start, tool in _SERVICES.items() if service.lower().startswith(start)), service)


def is_of_a_session(key: str, text: str) -> bool:
    """Whether an attribute of a metric's points ends with a session, and its series with it."""
    return key == "session.id" or codex.is_of_a_session(key, text)


def quantity(metric: Metric) -> Quantity | None:
    """How a metric is counted exactly; None where its values stay as sent."""
    module = _METRICS.get(metric.name.partition(".")[0])
    return module.QUANTITIES.get(metric.name) if module and metric.kind is Kind.COUNTER else None


def _is_repeated(service: str) -> bool:
    """Whether what a service says after the GenAI conventions is said in its own telemetry as well."""
    return service.lower().replace("_", "-").startswith(tuple(_SERVICES))


def usage_cell(metric: Metric, attributes: Mapping[str, AttributeValue]) -> UsageCell | None:
    """What a point of this metric tells of usage; None if it tells of none."""
    module = _METRICS.get(metric.name.partition(".")[0])
    if module is None or (module is genai and _is_repeated(metric.resource.get("service.name"))):
        return None
    cell: UsageCell | None = module.usage_cell(metric, attributes)
    return cell


def without_repeats(batch: Batch, body: bytes) -> Batch:
    """A body's points, with the metrics named that say again what others of them say of usage."""
    return batch._replace(repeats=genai.repeats(batch.points)) if genai.COUNTERS in body else batch


def event_keys(denied: Set[str]) -> dict[str, frozenset[str]]:
    """EVENT_KEYS without what is denied, but for sessions: sources are joined by them, so the ledger replaces them."""
    return {name: keys - (denied - SESSION_KEYS) for name, keys in EVENT_KEYS.items()}


def span_keys(denied: Set[str]) -> frozenset[str]:
    """The attributes of spans that may leave the decoder, without what is denied."""
    return genai.SPAN_KEYS - (denied - SESSION_KEYS)


def read_spans(spans: Iterable[Event]) -> tuple[list[Usage], list[Refusal]]:
    """What spans tell of API requests, and requests that had to be refused."""
    usages: list[Usage] = []
    refused: list[Refusal] = []
    for span in spans:
        # Claude Code's service.name is the user's to choose, the names of its spans are not.
        is_repeat = span.name.startswith(_OWN_SPANS) or _is_repeated(span.resource.get("service.name"))
        usage = None if is_repeat else genai.read_span(span)
        if isinstance(usage, Drop):
            refused.append(Refusal(usage, "gen_ai.usage"))
        elif usage is not None:
            usages.append(usage)
    return usages, refused


def read_events(events: Iterable[Event]) -> tuple[list[Usage], list[DataPoint], list[Refusal]]:
    """What events tell: API requests, points of counters and histograms, and requests that had to be refused."""
    usages: list[Usage] = []
    points: list[DataPoint] = []
    refused: list[Refusal] = []
    for event in events:
        module = _EVENTS[event.name]
        if module is genai and _is_repeated(event.resource.get("service.name")):
            continue
        usage = module.read_event(event)
        if isinstance(usage, Drop):
            name = event.name if "." in event.name else f"{module.TOOL}.{event.name}"
            refused.append(Refusal(usage, name))
        elif usage is not None:
            usages.append(usage)
        points += module.event_points(event)
    return usages, points, refused
