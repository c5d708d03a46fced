"""Official limits of a subscription as gauges: what tools tell of them, under the same names for all."""

from bridge.model import Attributes, DataPoint, Kind, Metric
from bridge.tools.events import SCOPE

_USED = Metric("ai.limit.used", Kind.GAUGE, unit="1", description="How much of a limit is used, 0 to 1.", scope=SCOPE)
_RESET = Metric(
    "ai.limit.reset.timestamp", Kind.GAUGE, unit="s", description="When a limit begins anew, Unix time.", scope=SCOPE
)


def limit_points(
    tool: str, window: str, used: float, resets_at: float | None, time_ms: int, limit: str | None = None
) -> tuple[DataPoint, ...]:
    """A limit over a window (`five_hour`, `seven_day`, ...): used as a ratio, the reset in Unix seconds.

    `limit` names one of several limits of a tool, where it is not the one named like the tool.
    """
    named = {"tool": tool, "window": window, **({"limit": limit} if limit and limit != tool else {})}
    labels: Attributes = tuple(sorted(named.items()))
    time = time_ms * 1_000_000
    points = (DataPoint(_USED, labels, 0, time, used),)
    return points if resets_at is None else (*points, DataPoint(_RESET, labels, 0, time, resets_at))
