"""What Claude Code's telemetry means: its metrics, their exact units, and the samples that XRG reads.

Source: https://code.claude.com/docs/en/monitoring-usage and recorded exports of clients 1.0.128 to 2.1.329,
checked 2026-11-21. All eight metrics are monotonic sums whose values are sent as doubles.
"""

from typing import NamedTuple

from bridge.model import Attributes, ProfileFamily, ProfileSample, attribute_text

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
    "claude_code.token.usage": (
        "type",
        {
            "input": "tokens.input",
            "output": "tokens.output",
            "cacheRead": "tokens.cache_read",
            "cacheCreation": "tokens.cache_creation",
        },
    ),
    "claude_code.lines_of_code.count": ("type", {"added": "lines.added", "removed": "lines.removed"}),
    "claude_code.code_edit_tool.decision": (
        "decision",
        {"accept": "decisions.accept", "reject": "decisions.reject"},
    ),
    "claude_code.active_time.total": ("type", {"user": "active.user", "cli": "active.cli"}),
}
_PLAIN_TOTALS = {
    "claude_code.cost.usage": "usd",
    "claude_code.session.count": "sessions",
    "claude_code.commit.count": "commits",
    "claude_code.pull_request.count": "pull_requests",
}


def total_key(metric: str, attributes: Attributes) -> str | None:
    """The lifetime total that a point of this metric adds to; None where the profile has no line for it."""
    if metric in _PLAIN_TOTALS:
        return _PLAIN_TOTALS[metric]
    if metric not in _TOTALS:
        return None
    attribute, totals = _TOTALS[metric]
    return next((totals.get(attribute_text(value)) for key, value in attributes if key == attribute), None)
