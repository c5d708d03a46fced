"""Gemini CLI's telemetry: what its metrics and events mean, alone and together with its chats."""

import asyncio
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from bridge.model import Batch, DataPoint, Drop, Event, Kind, Metric, Resource, Temporality
from bridge.tools import gemini, known
from bridge.tools.gemini_lines import TOOL, TRANSCRIPTS
from tests.following import following
from tests.gemini_tree import FLASH, Step, lines, members, message, path_of, tokens

RESOURCE = Resource((("service.name", "gemini-cli"),))
COUNTS = {"input": 1000, "cached": 600, "output": 50, "thoughts": 70, "tool": 9}
SOURCES = ("metrics", "events", "chats")


def event(name: str, prefix: str = "gemini_cli", **attributes: str | float) -> Event:
    shared = {"session.id": "s", "prompt_id": "s########0", "event.timestamp": "2026-11-28T10:00:00.123Z"}
    return Event(f"{prefix}.{name}", {**shared, **attributes}, 5 * 10**9, RESOURCE)


def api_response(**changes: str | float) -> Event:
    counts = dict(zip(gemini._COUNTS, (1000, 600, 50, 70, 9), strict=True))
    return event("api_response", "gemini_cli", **{"model": FLASH, "duration_ms": 812, **counts, **changes})


def points(temporality: Temporality, *values: dict[str, int], prefix: str = "gemini_cli") -> list[DataPoint]:
    """Exports of the token metric, one after the other."""
    metric = Metric(f"{prefix}.token.usage", Kind.COUNTER, temporality, resource=RESOURCE)
    told = []
    for at, counts in enumerate(values, 1):
        start = at * 10**9 if temporality is Temporality.DELTA else 10**9
        for kind, count in counts.items():
            attributes = (("model", FLASH), ("session.id", "s"), ("type", kind))
            told.append(DataPoint(metric, attributes, start, start + at * 10**9, count))
    return told


EXPORT = {"input": 1000, "cache": 600, "output": 50, "thought": 70, "tool": 9}
TRUTH = {FLASH: {"input": 409, "output": 120, "cache_read": 600}}


@pytest.mark.parametrize("sources", [s for n in (1, 2, 3) for s in combinations(SOURCES, n)], ids="+".join)
def test_each_source_alone_and_all_together_say_the_same(tmp_path: Path, sources: tuple[str, ...]) -> None:
    root = tmp_path / "tmp"
    root.mkdir()

    async def tell() -> None:
        async with following(tmp_path / "state", {str(root): TRANSCRIPTS}) as bridge:
            for source in sources:
                match source:
                    case "metrics":
                        await bridge.tell(Batch(points(Temporality.CUMULATIVE, EXPORT), []))
                    case "events":
                        await bridge.tell_events([api_response()])
                        await bridge.tell_events([api_response()])
                    case "chats":
                        said = message("m", 1, tokens(1000, 50, 600, 70, 9))
                        Step(path_of("s"), lines(members("s"), said)).do(root)
                        await bridge.until_read()
            served = bridge.served(TOOL)
            found = {model: {k: v for k, v in counts.items() if k != "requests"} for model, counts in served.items()}
            assert found == TRUTH

    asyncio.run(tell())


def test_a_chat_knows_the_model_that_was_asked_and_the_event_the_one_that_answered(tmp_path: Path) -> None:
    roots = [tmp_path / "first", tmp_path / "second"]
    for root in roots:
        root.mkdir()

    async def tell() -> None:
        for order, root in enumerate(roots):
            async with following(tmp_path / f"state-{order}", {str(root): TRANSCRIPTS}) as bridge:
                for turn in (order, 1 - order):
                    if turn:
                        await bridge.tell_events([api_response()])
                        await bridge.tell(Batch(points(Temporality.CUMULATIVE, EXPORT), []))
                    else:
                        said = message("m", 1, tokens(1000, 50, 600, 70, 9), "gemini-flash-latest")
                        Step(path_of("s"), lines(members("s"), said)).do(root)
                        await bridge.until_read()
                counted = {("s", FLASH): Counter({"requests": 1, "input": 409, "output": 120, "read": 600})}
                assert await bridge.requests() == counted
                if order:  # else the other name was served before
                    served = bridge.served(TOOL)
                    assert {kind: served[FLASH][kind] for kind in TRUTH[FLASH]} == TRUTH[FLASH]
                    assert "gemini-flash-latest" not in served

    asyncio.run(tell())


@pytest.mark.parametrize("prefix", ["gemini_cli", "qwen-code"])
@pytest.mark.parametrize(
    ("temporality", "exports"),
    [
        (Temporality.DELTA, [EXPORT, {"input": 10, "output": 1}]),
        (Temporality.CUMULATIVE, [EXPORT, {"input": 1010, "output": 51}]),
    ],
)
def test_the_token_metric_of_either_temporality(
    tmp_path: Path, prefix: str, temporality: Temporality, exports: list[dict[str, int]]
) -> None:
    async def tell() -> None:
        async with following(tmp_path / "state") as bridge:
            for _ in range(2):
                await bridge.tell(Batch(points(temporality, *exports, prefix=prefix), []))
            assert bridge.served(gemini.TOOLS[prefix]) == {FLASH: {"input": 419, "output": 121, "cache_read": 600}}

    asyncio.run(tell())


@pytest.mark.parametrize(
    ("change", "given"),
    [
        ({"input_token_count": -1}, Drop.NEGATIVE),
        ({"output_token_count": 1e13}, Drop.IMPLAUSIBLE),
        ({"input_token_count": "many"}, Drop.MALFORMED),
        ({"thoughts_token_count": 0.5}, Drop.MALFORMED),
    ],
)
def test_an_event_with_impossible_counts_is_refused(change: dict[str, str | float], given: Drop) -> None:
    _, _, refused = known.read_events([api_response(**change)])
    assert [(refusal.reason, refusal.metric) for refusal in refused] == [(given, "gemini_cli.api_response")]


def test_events_become_the_counters_of_all_tools() -> None:
    told = [
        api_response(),
        event("api_error", model=FLASH, status_code=429),
        event("chat.content_retry_failure", model=FLASH),
        event("tool_call", function_name="shell", success=True, decision="accept", duration_ms=40),
        event("chat_compression"),
        event("user_prompt"),
        event("user_prompt", prefix="qwen-code"),
    ]
    _, found, _ = known.read_events(told)
    assert [(point.metric.name, dict(point.attributes)) for point in found] == [
        ("ai.request.duration", {"model": FLASH, "tool": TOOL}),
        ("ai.errors", {"model": FLASH, "status_code": "429", "tool": TOOL}),
        ("ai.retries.exhausted", {"model": FLASH, "tool": TOOL}),
        ("ai.tool.calls", {"success": "true", "tool": TOOL, "tool_name": "shell"}),
        ("ai.tool.duration", {"tool": TOOL, "tool_name": "shell"}),
        ("ai.tool.decisions", {"decision": "accept", "tool": TOOL, "tool_name": "shell"}),
        ("ai.compactions", {"tool": TOOL}),
        ("ai.prompts", {"tool": TOOL}),
        ("ai.prompts", {"tool": "qwen_code"}),
    ]


def test_no_content_may_leave_the_decoder() -> None:
    content = {"prompt", "response_text", "function_args", "error", "error.message", "metadata", "error_type"}
    for keys in gemini.EVENT_KEYS.values():
        assert not keys & content
