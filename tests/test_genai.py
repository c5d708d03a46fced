"""The GenAI semantic conventions: requests once, however many spans, events and metrics tell of them, in any order."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from google.protobuf import json_format
from msgspec.structs import replace as struct_replace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from bridge.model import Batch, DataPoint, Drop, Event, Histogram, Kind, Metric, Resource, Scope, Temporality
from bridge.otlp import Encoding, decode_traces
from bridge.tools import genai, known
from bridge.usage import MAX_TOOLS
from tests.following import Following, following

SECOND = 10**9
APP = Resource((("service.name", "my-app"),))
TRACE = "0af7651916cd43dd8448eb211c80319c"


def span(
    at: int,
    parent: int = 0,
    times: tuple[int, int] = (1, 2),
    *,
    resource: Resource = APP,
    trace: str = TRACE,
    **members: Any,
) -> Event:
    """The span `at`; `usage_x` and `response_id` are attributes of gen_ai, `operation` its name."""
    attributes: dict[str, Any] = {"gen_ai.request.model": "gpt-4o"}
    for name, value in members.items():
        if value is not None:
            key = {"operation": "operation.name", "response_id": "response.id"}.get(name, name)
            attributes[f"gen_ai.{key.replace('usage_', 'usage.').replace('cache_read_', 'cache_read.')}"] = value
    ids = f"{at:016x}", f"{parent:016x}" if parent else ""
    start, end = ((1_000 + time) * SECOND for time in times)
    return Event("x", attributes, end, resource, trace, *ids, start)


def usage(prompt: int, output: int, operation: str | None = "chat", **members: Any) -> dict[str, Any]:
    return {"usage_input_tokens": prompt, "usage_output_tokens": output, "operation": operation, **members}


# --- one span ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attributes", "counted"),
    [
        ({"input_tokens": 100, "output_tokens": 20}, (100, 20, 0, 0)),
        ({"input_tokens": 100}, (100, 0, 0, 0)),
        ({"prompt_tokens": 100, "completion_tokens": 20}, (100, 20, 0, 0)),
        ({"input_tokens": 100, "prompt_tokens": 7, "output_tokens": "20"}, (100, 20, 0, 0)),
        ({"input_tokens": 100, "output_tokens": 20, "cache_read.input_tokens": 60}, (40, 20, 60, 0)),
        (
            {
                "input_tokens": 100,
                "output_tokens": 20,
                "cache_read.input_tokens": 60,
                "cache_creation.input_tokens": 30,
            },
            (10, 20, 60, 30),
        ),
        ({"input_tokens": 100, "cache_write.input_tokens": 30}, (70, 0, 0, 30)),
        ({"input_tokens": 100, "cache_read_input_tokens": 60, "cache_creation_input_tokens": 30}, (10, 0, 60, 30)),
        # Older instrumentations send a prompt without what is cached: it is less than that, or the total says so.
        ({"input_tokens": 10, "output_tokens": 20, "cache_read_input_tokens": 60}, (10, 20, 60, 0)),
        (
            {"input_tokens": 100, "output_tokens": 20, "cache_read_input_tokens": 60, "total_tokens": 180},
            (100, 20, 60, 0),
        ),
        ({"input_tokens": 100, "output_tokens": 20, "total_tokens": 120}, (100, 20, 0, 0)),
    ],
)
def test_what_a_span_counts(attributes: dict[str, Any], counted: tuple[int, ...]) -> None:
    given = Event("", {f"gen_ai.usage.{key}": value for key, value in attributes.items()}, 5, APP, TRACE, "1" * 16)
    told = genai.read_span(given)
    assert told is not None
    assert not isinstance(told, Drop)
    assert (told.input, told.output, told.cache_read, told.cache_write) == counted


@pytest.mark.parametrize(
    ("attributes", "given"),
    [
        ({"input_tokens": -1}, Drop.NEGATIVE),
        ({"output_tokens": 10**13}, Drop.IMPLAUSIBLE),
        ({"input_tokens": "many"}, Drop.MALFORMED),
        ({"input_tokens": 1.5}, Drop.MALFORMED),
        ({"cache_read.input_tokens": 5}, None),
    ],
)
def test_what_a_span_must_not_count(attributes: dict[str, Any], given: Drop | None) -> None:
    told = Event("", {f"gen_ai.usage.{key}": value for key, value in attributes.items()}, 5, APP, TRACE, "1" * 16)
    assert genai.read_span(told) is given


@pytest.mark.parametrize(
    ("service", "tool"),
    [
        ("my-app", "my-app"),
        ("", "unknown"),
        ("unknown_service:python", "unknown"),
        ("a b/c\n", "a_b_c"),
        ("x" * 100, "x" * 64),
        ("日本", "unknown"),
    ],
)
def test_a_service_is_a_safe_label(service: str, tool: str) -> None:
    assert genai.tool_of(service) == tool


@pytest.mark.parametrize("service", ["claude-code", "claude_code", "codex_exec", "gemini-cli", "qwen-code"])
def test_tools_that_are_known_are_not_counted_again(service: str) -> None:
    resource = Resource((("service.name", service),))
    assert known.read_spans([span(1, resource=resource, **usage(1, 2))]) == ([], [])
    event = Event("gen_ai.client.inference.operation.details", {"gen_ai.usage.input_tokens": 5}, 5, resource)
    assert known.read_events([event]) == ([], [], [])
    metric = Metric("gen_ai.client.token.usage", Kind.HISTOGRAM, Temporality.DELTA, resource=resource)
    assert known.usage_cell(metric, {"gen_ai.token.type": "input"}) is None


def test_spans_of_claude_code_are_not_counted_again_under_a_name_of_the_users() -> None:
    """OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES rename the client; its spans have gen_ai.usage since 2.1.332."""
    told = span(1, resource=Resource((("service.name", "my-team"),)), **usage(1, 2))
    assert known.read_spans([struct_replace(told, name="claude_code.llm_request")]) == ([], [])
    assert len(known.read_spans([told])[0]) == 1


# --- traces --------------------------------------------------------------------------------------------------------


class Tree(NamedTuple):
    """Spans of traces, and what they add up to: requests, input and output."""

    spans: list[Event]
    total: tuple[int, int, int]


TREES = {
    "requests beside each other": Tree(
        [span(1, times=(0, 9)), span(2, 1, **usage(10, 1)), span(3, 1, (1, 2), **usage(10, 1))], (2, 20, 2)
    ),
    "an agent sums up what is below it": Tree(
        [
            span(1, 0, (0, 9), **usage(30, 3, "invoke_agent")),
            span(2, 1, (1, 2), **usage(10, 1)),
            span(3, 1, (3, 4), **usage(20, 2)),
        ],
        (2, 30, 3),
    ),
    "an agent in a workflow, with plain spans between": Tree(
        [
            span(1, 0, (0, 99), **usage(10, 1, "invoke_workflow")),
            span(2, 1, (1, 98)),
            span(3, 2, (2, 90), **usage(10, 1, "invoke_agent")),
            span(4, 3, (3, 80)),
            span(5, 4, (4, 5), **usage(10, 1)),
            span(6, 4, (6, 7), **usage(10, 1, "execute_tool")),
            span(7, 6, (6, 7), **usage(10, 1)),
        ],
        (2, 20, 2),
    ),
    "an agent that is somewhere else has no requests here": Tree(
        [
            span(1, 0, (0, 99)),
            span(2, 1, (1, 20), **usage(50, 5, "invoke_agent")),
            span(3, 1, (2, 10), **usage(10, 1)),
        ],
        (2, 60, 6),
    ),
    "a parent of another kind repeats its child": Tree(
        [span(1, 0, (0, 9), **usage(10, 1, None)), span(2, 1, (1, 2), **usage(10, 1))], (1, 10, 1)
    ),
    "a parent that calls itself a request sums up its children": Tree(
        [
            span(1, 0, (0, 9), **usage(30, 3)),
            span(2, 1, (1, 2), **usage(10, 1)),
            span(3, 1, (3, 4), **usage(20, 2)),
        ],
        (2, 30, 3),
    ),
    "a wrapper that does not say what it is": Tree(
        [span(1, 0, (0, 9), **usage(10, 1, None)), span(2, 1, (1, 8)), span(3, 2, (2, 3), **usage(10, 1))], (1, 10, 1)
    ),
    "requests at once that do not say what they are": Tree(
        [
            span(1, 0, (0, 9), **usage(10, 1, None)),
            span(2, 0, (1, 2), **usage(10, 1, None)),
            span(3, 0, (1, 12), **usage(10, 1, None)),
        ],
        (3, 30, 3),
    ),
    "two instrumentations of one request": Tree(
        [
            span(1, 9, (0, 9), **usage(10, 2, response_id="msg_1")),
            span(2, 9, (1, 8), **usage(10, 1, response_id="msg_1")),
        ],
        (1, 10, 1),
    ),
    "a gateway that gives all responses one id": Tree(
        [span(at, 9, (at, at + 1), **usage(10, 1, response_id="x")) for at in (1, 3, 5)], (3, 30, 3)
    ),
    "equal ids in two traces": Tree(
        [span(1, 0, (0, 9), **usage(10, 1)), span(1, 0, (0, 9), trace="f" * 32, **usage(10, 1))], (2, 20, 2)
    ),
    "no ids at all": Tree(
        [span(1, 0, (0, 9), trace="", **usage(10, 1, response_id="a")), span(1, 0, (2, 3), trace="", **usage(10, 1))],
        (2, 20, 2),
    ),
}


def batches(spans: list[Event], choose: random.Random) -> Iterator[list[Event]]:
    cuts = sorted(choose.sample(range(len(spans) + 1), min(2, len(spans))))
    yield from (spans[start:end] for start, end in pairwise([0, *cuts, len(spans)]))


async def tell(bridge: Following, spans: list[Event]) -> None:
    usages, refused = known.read_spans(spans)
    await bridge.tell(Batch([], refused, tuple(usages)))


def total(sums: dict[tuple[str, str], Counter[str]]) -> tuple[int, int, int]:
    whole: Counter[str] = sum(sums.values(), Counter())
    return whole["requests"], whole["input"], whole["output"]


@pytest.mark.parametrize("name", TREES)
def test_each_request_of_a_trace_counts_once_in_any_order(tmp_path: Path, name: str) -> None:
    tree = TREES[name]

    async def all_orders() -> None:
        for seed in range(6):
            choose = random.Random(seed)
            spans = choose.sample(tree.spans, len(tree.spans)) if seed else tree.spans[::-1]
            async with following(tmp_path / str(seed)) as bridge:
                for batch in batches([*spans, *spans[:2]], choose):
                    await tell(bridge, batch)
                assert total(await bridge.requests()) == tree.total, seed
                served = bridge.served("my-app")["gpt-4o"]
                assert served["input"] >= tree.total[1]
                if not seed:  # children end before their parents, so nothing has to be taken back
                    assert (served["input"], served["output"]) == tree.total[1:]

    asyncio.run(all_orders())


def test_the_event_of_a_request_is_its_span(tmp_path: Path) -> None:
    """They come in different requests, in either order; the span knows of the cache."""
    told = span(2, 1, (1, 9), **usage(100, 7, usage_cache_read_input_tokens=60, response_id="r"))
    plain = {key: value for key, value in told.attributes.items() if "cache" not in key}
    event = Event("gen_ai.client.inference.operation.details", plain, told.time - 1, APP, TRACE, told.span)
    above = span(1, 0, (0, 20), **usage(100, 7, "invoke_agent"))

    async def both_ways() -> None:
        for order in range(2):
            async with following(tmp_path / str(order)) as bridge:
                for turn in (order, 1 - order, order):
                    await (bridge.tell_events([event]) if turn else tell(bridge, [told]))
                await tell(bridge, [above])
                assert await bridge.requests() == {
                    ("", "gpt-4o"): Counter({"requests": 1, "input": 40, "output": 7, "read": 60})
                }

    asyncio.run(both_ways())


def test_a_conversation_is_a_session(tmp_path: Path) -> None:
    told = span(1, **usage(10, 1))
    told.attributes["gen_ai.conversation.id"] = "c-1"

    async def look() -> None:
        async with following(tmp_path / "state") as bridge:
            await tell(bridge, [told])
            assert [*await bridge.requests()] == [("c-1", "gpt-4o")]

    asyncio.run(look())


def test_many_requests_of_one_trace_take_no_longer_each(tmp_path: Path) -> None:
    """Rows looked at, not seconds: equal requests of a trace are not compared with one another."""
    spans = [span(at, 1, (at, at + 1), **usage(10, 1)) for at in range(2, 1_502)]
    spans.append(span(1, 0, (0, 2_000), **usage(15_000, 1_500, "invoke_agent")))

    async def look() -> None:
        async with following(tmp_path / "state") as bridge:
            await tell(bridge, spans)
            assert total(await bridge.requests()) == (1_500, 15_000, 1_500)

    asyncio.run(look())


def test_there_is_an_end_to_applications(tmp_path: Path) -> None:
    names = [f"app-{at}" for at in range(MAX_TOOLS + 20)]

    async def look() -> None:
        async with following(tmp_path / "state") as bridge:
            for name in names:
                resource = Resource((("service.name", name),))
                await tell(bridge, [span(names.index(name) + 1, resource=resource, **usage(10, 1))])
            tools = {row.tool for row in bridge.ledger.models.values()}
            assert len(tools) <= MAX_TOOLS + 1
            assert sum(bridge.served(tool)["gpt-4o"]["input"] for tool in tools) == 10 * len(names)

    asyncio.run(look())


# --- metrics -------------------------------------------------------------------------------------------------------


def histogram(kind: str, tokens: float, at: int = 1, temporality: Temporality = Temporality.CUMULATIVE) -> DataPoint:
    metric = Metric("gen_ai.client.token.usage", Kind.HISTOGRAM, temporality, "{token}", resource=APP)
    attributes = (("gen_ai.request.model", "gpt-4o"), ("gen_ai.token.type", kind))
    return DataPoint(metric, attributes, SECOND, SECOND * (1 + at), Histogram((), (at,), at, tokens))


def counter(name: str, tokens: int) -> DataPoint:
    metric = Metric(f"gen_ai.client.inference.usage.{name}", Kind.COUNTER, Temporality.CUMULATIVE, resource=APP)
    return DataPoint(metric, (("gen_ai.response.model", "gpt-4o"),), SECOND, 2 * SECOND, tokens)


SPANS = [
    span(1, 9, (1, 2), **usage(100, 7, usage_cache_read_input_tokens=60)),
    span(2, 9, (3, 4), **usage(50, 3)),
]
METRICS = [histogram("input", 150.0), histogram("output", 10.0)]


@pytest.mark.parametrize(
    ("spans", "points", "counted"),
    [
        (SPANS, [], (90, 10, 60)),
        ([], METRICS, (150, 10, 0)),
        (SPANS, METRICS, (90, 10, 60)),
        (SPANS[:1], METRICS, (90, 10, 60)),
        ([], [histogram("input", 100.0), histogram("input", 150.0, 2), *METRICS], (150, 10, 0)),
        (
            [],
            [
                counter("input_tokens", 150), counter("output_tokens", 10), counter("cache_read.input_tokens", 60),
                counter("reasoning.output_tokens", 5),
            ],
            (90, 10, 60),
        ),
    ],
)  # fmt: skip
def test_spans_and_metrics_of_the_same_requests_count_once(
    tmp_path: Path, spans: list[Event], points: list[DataPoint], counted: tuple[int, int, int]
) -> None:
    async def look() -> None:
        for order in range(2):
            async with following(tmp_path / str(order)) as bridge:
                for turn in (order, 1 - order, order):
                    await (bridge.tell(Batch(points, [])) if turn else tell(bridge, spans))
                found = bridge.served("my-app")["gpt-4o"]
                assert found["output"] == counted[1]
                assert found["cache_read"] == counted[2]
                # A prompt that is not divided yet is served as input: that stands still until the truth is there.
                assert found["input"] == (counted[0] if not order or not spans or not points else 150)

    asyncio.run(look())


def test_a_histogram_beside_the_counters_that_replace_it_counts_nothing(tmp_path: Path) -> None:
    """An instrumentation sends both while the conventions change; another scope's histogram is of other requests."""
    counters = [counter("input_tokens", 150), counter("output_tokens", 10)]
    other = [struct_replace(point, metric=struct_replace(point.metric, scope=Scope("other"))) for point in METRICS]

    async def look() -> None:
        async with following(tmp_path / "state") as bridge:
            for points in ([*METRICS, *counters], [*counters, *METRICS], other):
                await bridge.tell(known.without_repeats(Batch(points, []), genai.COUNTERS))
            found = bridge.served("my-app")["gpt-4o"]
            assert (found["input"], found["output"]) == (300, 20)

    asyncio.run(look())


# --- the decoder ---------------------------------------------------------------------------------------------------


def test_only_what_was_asked_for_leaves_the_decoder() -> None:
    texts = {"gen_ai.input.messages": "canary", "gen_ai.request.model": "m", "gen_ai.prompt.0.content": "canary"}
    items: list[dict[str, Any]] = [{"key": key, "value": {"stringValue": text}} for key, text in texts.items()]
    items.append({"key": "gen_ai.usage.input_tokens", "value": {"intValue": "12"}})
    spans = [
        {
            "name": "chat m", "traceId": TRACE, "spanId": "1" * 16, "parentSpanId": "2" * 16,
            "startTimeUnixNano": "5", "endTimeUnixNano": "9", "attributes": items,
        },
        {"name": "GET /", "traceId": TRACE, "spanId": "3" * 16, "attributes": [items[0]]},
    ]  # fmt: skip
    body = {"resourceSpans": [{"resource": {"attributes": []}, "scopeSpans": [{"spans": spans}]}]}
    for each in spans:  # protobuf's own JSON has ids in base64
        assert isinstance(each["traceId"], str)
    encoded = json.dumps(body).encode()
    records = decode_traces(encoded, Encoding.JSON, known.span_keys(frozenset()))
    message = ExportTraceServiceRequest()
    json_format.Parse(json.dumps(body), message)
    for read, each in zip(message.resource_spans[0].scope_spans[0].spans, spans, strict=True):
        read.trace_id, read.span_id = bytes.fromhex(TRACE), bytes.fromhex(str(each["spanId"]))
        read.parent_span_id = bytes.fromhex(str(each.get("parentSpanId", "")))
    again = decode_traces(message.SerializeToString(), Encoding.PROTOBUF, known.span_keys(frozenset()))
    kept: dict[str, str | int | float | bool] = {"gen_ai.request.model": "m", "gen_ai.usage.input_tokens": 12}
    assert records.events == again.events == [
        Event("chat m", kept, 9, Resource(), TRACE, "1" * 16, "2" * 16, 5)
    ]  # fmt: skip
    assert records.counts == again.counts == {"chat m": 1, "GET /": 1}
    assert not any("content" in key or "messages" in key for key in genai.SPAN_KEYS)
