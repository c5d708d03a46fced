"""Points of metrics out of events: what people otherwise need a log database for.

All are delta points without a writer, so they are protected by the hash of the body that brought them.
"""

from bisect import bisect_left

from bridge.model import Attributes, DataPoint, Event, Histogram, Kind, Metric, Scope, Temporality
from bridge.tools.fields import MAX_COUNT, MAX_TEXT, number_of

_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
SCOPE = Scope("claude-otel-bridge")


def told(event: Event, tool: str, name: str, text: str, **labels: str) -> DataPoint:
    """One more of a counter. `labels` are attributes of the event by the label that each becomes."""
    metric = Metric(name, Kind.COUNTER, Temporality.DELTA, "", text, SCOPE, event.resource)
    return DataPoint(metric, _labels(event, tool, labels), event.time, event.time, 1)


def timed(event: Event, tool: str, name: str, text: str, **labels: str) -> list[DataPoint]:
    """One observation of the event's `duration_ms`, in seconds; none where it has none."""
    milliseconds = number_of(event.attributes.get("duration_ms"))
    if milliseconds is None or not 0 <= milliseconds <= MAX_COUNT:
        return []
    seconds = milliseconds / 1000
    counts = [0] * (len(_SECONDS) + 1)
    counts[bisect_left(_SECONDS, seconds)] = 1
    metric = Metric(name, Kind.HISTOGRAM, Temporality.DELTA, "s", text, SCOPE, event.resource)
    value = Histogram(_SECONDS, tuple(counts), 1, seconds)
    return [DataPoint(metric, _labels(event, tool, labels), event.time, event.time, value)]


def called(event: Event, tool: str, name: str = "tool_name") -> list[DataPoint]:
    """One call of a tool and how long it took; the attribute `name` names the tool."""
    labels = {"tool_name": name}
    count = told(event, tool, "ai.tool.calls", "Tool calls, by outcome.", **labels, success="success")
    return [count, *timed(event, tool, "ai.tool.duration", "Tool calls, by duration.", **labels)]


def _labels(event: Event, tool: str, labels: dict[str, str]) -> Attributes:
    found = {label: plain(event, key) for label, key in labels.items() if key in event.attributes}
    return tuple(sorted({**found, "tool": tool}.items()))


def plain(event: Event, key: str) -> str:
    """An attribute as text, empty if it is not there."""
    value = event.attributes.get(key, "")
    return str(value).lower() if isinstance(value, bool) else str(value)[:MAX_TEXT]
