"""What Codex's lines and events mean, one by one; trees of rollouts stand in test_codex_rollouts.py."""

import json
from typing import Any

import pytest

from bridge.model import Drop, Event, Kind, Metric, Resource, Temporality, Usage, UsageCell
from bridge.tools import codex, known
from bridge.tools.codex_lines import TRANSCRIPTS, disjoint
from bridge.tools.tool import Reader

THREAD = "01a2234a-e816-7863-aa5d-d949e8487791"
TIME = "2026-11-28T17:54:01.541Z"


def counts(prompt: int, cached: int = 0, output: int = 0, written: int = 0) -> dict[str, int]:
    return {
        "input_tokens": prompt,
        "cached_input_tokens": cached,
        "cache_write_input_tokens": written,
        "output_tokens": output,
    }


def line(kind: str, **payload: Any) -> bytes:
    return json.dumps({"timestamp": TIME, "type": kind, "payload": payload}).encode()


def token_count(total: dict[str, int] | None, last: dict[str, int] | None = None, **limits: Any) -> bytes:
    said = {"total_token_usage": total, "last_token_usage": last}
    return line("event_msg", type="token_count", info=said, rate_limits=limits or None)


META = line("session_meta", id=THREAD, cwd="/home/u/work", cli_version="0.171.0", source="exec")
TURN = line("turn_context", turn_id="01a2234a-e857-7b41-86aa-5e596f3cd63d", model="gpt-5.5", approval_policy="never")


def told(reader: Reader, one: bytes) -> list[Usage]:
    said = reader.read(one)
    assert not isinstance(said, Drop)
    return [usage for usage in said if isinstance(usage, Usage)]


def read(*lines: bytes) -> list[tuple[int, int, int, int]]:
    """Input, output, read and written of each request that the lines of a rollout tell of."""
    reader = TRANSCRIPTS.reader(f"/home/u/.codex/sessions/rollout-2026-11-28T17-54-01-{THREAD}.jsonl", 1, b"")
    found = []
    for one in lines:
        found += [(usage.input, usage.output, usage.cache_read, usage.cache_write) for usage in told(reader, one)]
        reader = TRANSCRIPTS.reader("", 1, reader.state)  # as after a restart
    return found


def test_a_request_is_told_by_its_own_counts() -> None:
    assert read(META, TURN, token_count(counts(100, 40, 7, 10), counts(100, 40, 7, 10))) == [(50, 7, 40, 10)]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        pytest.param([token_count(counts(9)), token_count(counts(9))], [(9, 0, 0, 0)], id="only limits changed"),
        pytest.param(
            [token_count(counts(9, 3, 1)), token_count(counts(29, 5, 4))],
            [(6, 1, 3, 0), (18, 3, 2, 0)],
            id="totals alone grow",
        ),
        pytest.param(
            [token_count(counts(9, 3, 1)), token_count(counts(5, 2, 2))],
            [(6, 1, 3, 0), (3, 2, 2, 0)],
            id="totals begin anew",
        ),
        pytest.param([token_count(counts(5), counts(5, 9, 2))], [(0, 2, 5, 0)], id="more cached than asked"),
        pytest.param([token_count(counts(5), counts(5, -9, -2))], [(5, 0, 0, 0)], id="never negative"),
        pytest.param([line("event_msg", type="token_count", info=None)], [], id="no counts"),
        pytest.param([token_count(counts(5), counts(0))], [], id="nothing used"),
    ],
)  # fmt: skip
def test_totals(lines: list[bytes], expected: list[tuple[int, int, int, int]]) -> None:
    assert read(META, TURN, *lines) == expected


def test_a_record_goes_before_the_count_that_repeats_it() -> None:
    usage = counts(100, 40, 7)
    record = line(
        "token_usage_record", thread_id=THREAD, response_id="resp_1", usage=usage, thread_token_usage=usage
    )  # fmt: skip
    assert read(META, TURN, record, token_count(usage, usage)) == [(60, 7, 40, 0)]


def test_what_has_no_first_lines_is_named_by_its_file() -> None:
    reader = TRANSCRIPTS.reader(f"/x/rollout-2026-11-28T17-54-01-{THREAD}_{THREAD[::-1]}.jsonl", 1, b"")
    (usage,) = told(reader, token_count(counts(5), counts(5)))
    assert (usage.session, usage.model) == (THREAD, "")


def test_the_newest_limits_are_gauges() -> None:
    limits: dict[str, Any] = {
        "limit_id": "codex",
        "primary": {"used_percent": 12.5, "window_minutes": 300, "resets_at": 1795892041},
        "secondary": {"used_percent": 40.0, "window_minutes": 10080, "resets_at": None},
    }
    reader = TRANSCRIPTS.reader("", 1, b"")
    reader.read(token_count(counts(5), counts(5), **limits))
    reader.read(token_count(counts(5), counts(5), **{**limits, "primary": {"used_percent": 13, "window_minutes": 300}}))
    shown = [(point.metric.name, dict(point.attributes)["window"], point.value) for point in reader.gauges()]
    assert shown == [("ai.limit.used", "five_hour", 0.13), ("ai.limit.used", "seven_day", 0.4)]


@pytest.mark.parametrize(
    "bad", [b"{", b'{"type":"session_meta","payload":[]}', b'{"type":"event_msg","payload":{"info":7}}']
)
def test_what_cannot_be_read_is_refused(bad: bytes) -> None:
    assert TRANSCRIPTS.reader("", 1, b"").read(bad) is Drop.MALFORMED


def test_other_lines_are_passed_over_whatever_their_shape() -> None:
    assert TRANSCRIPTS.reader("", 1, b"").read(b'{"type":"response_item","payload":{"id":7,"info":[]}}') == ()


def test_absurd_counts_are_refused() -> None:
    assert disjoint(10**13, 0, 0, 0) is Drop.IMPLAUSIBLE
    for total, last in ((10**30, 5), (5, 10**30), (5, -(10**30))):
        reader = TRANSCRIPTS.reader("", 1, b"")
        assert reader.read(token_count(counts(total), counts(last))) is Drop.IMPLAUSIBLE
        assert told(TRANSCRIPTS.reader("", 1, reader.state), token_count(counts(7), counts(7)))


@pytest.mark.parametrize(
    ("home", "roots"),
    [
        ({}, ("/home/u/.codex/sessions", "/home/u/.codex/archived_sessions")),
        ({"CODEX_HOME": "~/c/"}, ("/home/u/c/sessions", "/home/u/c/archived_sessions")),
    ],
)
def test_roots(home: dict[str, str], roots: tuple[str, ...]) -> None:
    assert TRANSCRIPTS.roots(home, "/home/u") == roots


# --- telemetry -------------------------------------------------------------------------------------------------


def event(name: str, **attributes: str) -> Event:
    dotted = {key.replace("__", "."): value for key, value in attributes.items()}
    return Event(
        name, {"conversation.id": THREAD, "event.timestamp": TIME, "model": "gpt-5.5", **dotted}, 0, Resource()
    )


def completed(**changed: str) -> Event:
    counts = {"input_token_count": "1200", "output_token_count": "52", "cached_token_count": "20"}
    return event("codex.sse_event", event__kind="response.completed", **{**counts, **changed})


def test_the_end_of_a_response_is_a_request() -> None:
    (usage,), _, _ = known.read_events([completed(), event("codex.sse_event", event__kind="response.completed")])
    assert (usage.tool, usage.session, usage.model) == ("codex", THREAD, "gpt-5.5")
    assert (usage.input, usage.output, usage.cache_read, usage.time_ms) == (1180, 52, 20, 1795888441541)


def test_bad_counts_of_events_are_refused() -> None:
    _, _, refused = known.read_events([completed(input_token_count="x"), completed(output_token_count="-1")])
    assert [(one.reason, one.metric) for one in refused] == [
        (Drop.MALFORMED, "codex.sse_event"),
        (Drop.NEGATIVE, "codex.sse_event"),
    ]


@pytest.mark.parametrize(
    ("said", "names"),
    [
        (event("codex.api_request", duration_ms="30", http__response__status_code="200", endpoint="/responses"),
         ["ai.request.duration"]),
        (event("codex.api_request", duration_ms="30", http__response__status_code="429"),
         ["ai.request.duration", "ai.errors"]),
        (event("codex.api_request", duration_ms="30", endpoint="/models"), []),
        (event("codex.websocket_request", duration_ms="30", success="false"), ["ai.request.duration", "ai.errors"]),
        (event("codex.sse_event", event__kind="response.failed"), ["ai.errors"]),
        (event("codex.tool_result", tool_name="exec_command", success="true", duration_ms="62"),
         ["ai.tool.calls", "ai.tool.duration"]),
        (event("codex.tool_decision", tool_name="exec_command", decision="approved", source="Config"),
         ["ai.tool.decisions"]),
        (event("codex.user_prompt"), ["ai.prompts"]),
    ],
)  # fmt: skip
def test_other_events_are_counted(said: Event, names: list[str]) -> None:
    assert [point.metric.name for point in known.read_events([said])[1]] == names


@pytest.mark.parametrize(
    ("kind", "cell"),
    [("input", "prompt"), ("cached_input", "cached"), ("cache_write_input", "written"), ("output", "output"),
     ("total", None), ("reasoning_output", None)],
)  # fmt: skip
def test_the_token_metric(kind: str, cell: str | None) -> None:
    metric = Metric("codex.turn.token_usage", Kind.HISTOGRAM, Temporality.DELTA)
    attributes = (("model", "gpt-5.5"), ("token_type", kind))
    expected = cell and UsageCell(codex.TOOL, "", "gpt-5.5", cell)
    assert known.usage_cell(metric, dict(attributes)) == expected


@pytest.mark.parametrize("service", ["codex_cli_rs", "codex_exec", "codex_tui", "codex-app-server"])
def test_services(service: str) -> None:
    assert known.tool_of_service(service) == "codex"


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        (("session.id", "x"), True),
        (("session_source", f"subagent_thread_spawn_{THREAD}_d1"), True),
        (("session_source", "exec"), False),
    ],
)
def test_series_of_one_session(attribute: tuple[str, str], expected: bool) -> None:
    """They leave some time after it; those of subagents name the thread that spawned them."""
    assert known.is_of_a_session(*attribute) is expected
