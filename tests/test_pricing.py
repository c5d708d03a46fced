"""Prices: equal to the client's own catalogue and bills, and to the table they come from, under names that last."""

import json
import random
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

from bridge import pricing
from bridge.model import Source, Usage
from bridge.pricing import Prices, load, normalise_model, provider_of
from tests.recordings import ASKED, EXPECTED, RUNS

TABLE = json.loads((Path(pricing.__file__).parent / "prices.json").read_text(), parse_float=Decimal)
VERSION = TABLE["source"].split()[1].rstrip(",")
PRICES = load()

try:
    INSTALLED = version("genai-prices")
except PackageNotFoundError:
    INSTALLED = "none"
needs_genai_prices = pytest.mark.skipif(
    INSTALLED != VERSION, reason=f"the prices are those of genai-prices {VERSION}; installed is {INSTALLED}"
)


def at(day: str) -> int:
    return int(datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp()) * 1000


TODAY = at("2026-11-21")


KINDS = ("input", "output", "cache_read", "cache_write_5m", "cache_write_1h", "web_searches")


def usage(model: str, **given: Any) -> Usage:
    """A request; the counts that are not given are 0."""
    needed = {"time_ms": given.pop("time", TODAY)} | dict.fromkeys(KINDS, 0) | given
    return Usage(tool="claude_code", source=Source.EVENT, key=b"", session="", model=model, **needed)


def total(used: Usage, prices: Prices = PRICES) -> int:
    cost = prices.cost(used)
    assert cost is not None, f"{used.model} is unpriced"
    return cost


# --- Names -----------------------------------------------------------------------------------------------------------

NAMES = [
    # As sent by the vendor's API.
    ("claude-sonnet-4-5-20250929", "claude-sonnet-4-5"),
    ("claude-sonnet-4-5", "claude-sonnet-4-5"),
    ("claude-sonnet-4-20250514", "claude-sonnet-4"),
    ("claude-sonnet-4-0", "claude-sonnet-4"),
    ("claude-opus-4-20250514", "claude-opus-4"),
    ("claude-opus-4-1-20250805", "claude-opus-4-1"),
    ("claude-opus-4-6", "claude-opus-4-6"),
    ("claude-opus-5", "claude-opus-5"),
    ("claude-opus-5-latest", "claude-opus-5"),
    ("claude-opus-5-5", "claude-opus-5-5"),
    ("claude-haiku-4-5-20251001", "claude-haiku-4-5"),
    ("claude-3-5-haiku-20241022", "claude-3-5-haiku"),
    ("claude-3-5-haiku-latest", "claude-3-5-haiku"),
    ("claude-3-7-sonnet-20250219", "claude-3-7-sonnet"),
    ("claude-3-opus-20240229", "claude-3-opus"),
    ("claude-2.1", "claude-2.1"),
    ("claude-instant-1.2", "claude-instant-1.2"),
    ("claude-fable-5-1", "claude-fable-5-1"),
    # With options, in any order.
    ("claude-sonnet-4-5[1m]", "claude-sonnet-4-5"),
    ("claude-sonnet-4-5-20250929[1m]", "claude-sonnet-4-5"),
    ("Claude-Opus-4-6-Fast[1M]", "claude-opus-4-6"),
    ("claude-opus-5-fast-20260723", "claude-opus-5"),
    ("claude-opus-4-6[1m]-fast", "claude-opus-4-6"),
    # Bedrock.
    ("us.anthropic.claude-sonnet-4-5-20250929-v1:0", "claude-sonnet-4-5"),
    ("us.anthropic.claude-sonnet-4-5-20250929-v1:0[1m]", "claude-sonnet-4-5"),
    ("anthropic.claude-3-5-sonnet-20241022-v2:0", "claude-3-5-sonnet"),
    ("anthropic.claude-3-sonnet-20240229-v1:0:28k", "claude-3-sonnet"),
    ("global.anthropic.claude-opus-4-6-v1", "claude-opus-4-6"),
    ("us-gov.anthropic.claude-haiku-4-5-20251001-v1:0", "claude-haiku-4-5"),
    ("apac.anthropic.claude-sonnet-5-5", "claude-sonnet-5-5"),
    ("bedrock/us.anthropic.claude-opus-5", "claude-opus-5"),
    ("bedrock/converse/eu.anthropic.claude-opus-5-v1:0", "claude-opus-5"),
    ("amazon-bedrock/anthropic.claude-opus-5", "claude-opus-5"),
    (
        "arn:aws:bedrock:us-east-1:123456789012:inference-profile/us.anthropic.claude-opus-4-1-20250805-v1:0",
        "claude-opus-4-1",
    ),
    ("arn:aws:bedrock:us-east-1:123456789012:application-inference-profile/k3j9xq", "k3j9xq"),
    ("anthropic.claude-v2:1", "claude-v2:1"),
    ("amazon.nova-pro-v1:0", "amazon.nova-pro-v1:0"),
    # Vertex.
    ("claude-sonnet-4-5@20250929", "claude-sonnet-4-5"),
    ("claude-opus-5@default", "claude-opus-5"),
    ("vertex_ai/claude-3-7-sonnet@20250219", "claude-3-7-sonnet"),
    ("google-vertex-anthropic/claude-opus-5-5", "claude-opus-5-5"),
    ("publishers/anthropic/models/claude-opus-4-1@20250805", "claude-opus-4-1"),
    ("projects/p-1/locations/us-east5/publishers/anthropic/models/claude-haiku-5-5", "claude-haiku-5-5"),
    # Routers and other spellings.
    ("anthropic/claude-sonnet-4.5", "claude-sonnet-4-5"),
    ("openrouter/anthropic/claude-opus-4.8", "claude-opus-4-8"),
    ("anthropic/claude-3.7-sonnet:thinking", "claude-3-7-sonnet:thinking"),
    ("anthropic/claude-4.6-opus-fast-20260407", "claude-opus-4-6"),
    ("claude-4-sonnet", "claude-sonnet-4"),
    ("claude-4.5-sonnet-thinking", "claude-sonnet-4-5-thinking"),
    ("claude-sonnet-3-7", "claude-3-7-sonnet"),
    ("Claude Sonnet 4.5", "claude-sonnet-4-5"),
    # OpenAI.
    ("gpt-5", "gpt-5"),
    ("gpt-5-2025-08-07", "gpt-5"),
    ("openai/gpt-5.1-codex-max", "gpt-5.1-codex-max"),
    ("gpt-4.1-2025-04-14", "gpt-4.1"),
    ("gpt-5.2-20251211", "gpt-5.2"),
    ("gpt-6-sol", "gpt-6-sol"),
    ("gpt-4o-2024-08-06", "gpt-4o"),
    ("gpt-4o-2024-05-13", "gpt-4o-2024-05-13"),
    ("azure/gpt-4o-2024-05-13", "gpt-4o-2024-05-13"),
    ("gpt-4-0613", "gpt-4-0613"),
    ("gpt-4o:extended", "gpt-4o:extended"),
    ("gpt-5.5-fast", "gpt-5.5"),
    ("gpt-oss-120b-fast", "gpt-oss-120b-fast"),
    ("o3-2025-04-16", "o3"),
    ("o4-mini-2025-04-16", "o4-mini"),
    ("codex-mini-latest", "codex-mini-latest"),
    ("gpt-5-chat-latest", "gpt-5-chat"),
    ("ft:gpt-4o-2024-08-06:acme::a1b2", "ft:gpt-4o-2024-08-06:acme::a1b2"),
    # Google.
    ("gemini-2.5-pro", "gemini-2.5-pro"),
    ("models/gemini-2.5-pro", "gemini-2.5-pro"),
    ("google/gemini-3-pro-preview", "gemini-3-pro-preview"),
    ("publishers/google/models/gemini-2.5-flash", "gemini-2.5-flash"),
    ("gemini-2.5-pro-preview-06-05", "gemini-2.5-pro-preview-06-05"),
    ("gemini-2.5-flash-latest", "gemini-2.5-flash"),
    ("gemini-flash-latest", "gemini-flash-latest"),
    # Others: what looks like an option may be a model of its own price.
    ("x-ai/grok-4-fast", "grok-4-fast"),
    ("grok-4-latest", "grok-4"),
    ("grok-code-fast-1", "grok-code-fast-1"),
    ("ministral-8b-latest", "ministral-8b-latest"),
    ("fireworks/deepseek-v3.2", "fireworks/deepseek-v3.2"),
    ("deepseek/deepseek-chat", "deepseek/deepseek-chat"),
    ("GLM-4.5-Air", "glm-4.5-air"),
    ("kimi-k2-0711-preview", "kimi-k2-0711-preview"),
    ("qwen3-coder-plus", "qwen3-coder-plus"),
    # Hostile.
    ("", "unknown"),
    (" \t\n", "unknown"),
    ("\x00\x1b\u202e", "unknown"),
    ("[1m]", "[1m]"),
    ("-latest", "-latest"),
    ("anthropic/", "anthropic/"),
    ("models/models/models/", "models/"),
    ("<synthetic>", "<synthetic>"),
    ("claude-\x00opus-5\r\n", "claude-opus-5"),
    ("\ud800claude-opus-5", "claude-opus-5"),
    ("us.anthropic.us.anthropic.claude-opus-5-fast-fast", "claude-opus-5"),
    ('x"} 1\n# HELP', 'x"}-1-#-help'),
    ("claude-20250929", "claude"),
]


@pytest.mark.parametrize(("model", "name"), NAMES)
def test_names_are_normalised(model: str, name: str) -> None:
    assert normalise_model(model) == name
    assert normalise_model(name) == name


_PART = st.sampled_from([
    "us.anthropic.", "anthropic/", "models/", "openrouter/", "bedrock/", "claude-", "gpt-", "gemini-", "grok-", "opus",
    "sonnet-", "fast", "latest", "3", "4", "5", ".", "-", "-fast", "-latest", "-20250929", "@20250929", "-2025-04-14",
    "-v1:0", ":0", "[1m]", "@default", " ", "\n", "İ", "Σ", "\u200b", "0", "-0", "20250514", "/", "-4-5", "x" * 60,
])  # fmt: skip


@given(st.one_of(st.text(), st.lists(_PART, max_size=12).map("".join)))
def test_normalising_is_done_once_and_makes_a_label(model: str) -> None:
    name = normalise_model(model)
    assert normalise_model(name) == name
    assert 0 < len(name) <= pricing.NAME_LENGTH
    assert name.isprintable()
    assert " " not in name
    assert name.encode()
    assert provider_of(model) == provider_of(name)


def test_long_names_stay_apart_and_fill_no_cache() -> None:
    before = pricing._cached_name.cache_info().currsize  # type: ignore[attr-defined]
    assert normalise_model("a" * 300 + "b") != normalise_model("a" * 300 + "c")
    prices = load()
    assert prices.cost(usage("a" * 1_000_000)) is None
    assert pricing._cached_name.cache_info().currsize == before  # type: ignore[attr-defined]
    assert not prices._plans


@pytest.mark.parametrize("part", ["models/", "-v1", "-fast", "claude-1", "1", "[1m]", "us.anthropic.", "@20250929"])
def test_hostile_names_take_no_time(part: str) -> None:
    """Each would take hours if it were read to its end."""
    assert normalise_model(part * 500_000 + "\ud800")
    assert normalise_model("gpt-" + part * 40 + "-latest")
    assert PRICES.cost(usage(part * 500_000)) is None


def test_hostile_numbers_of_names_fill_no_cache() -> None:
    prices = load()
    for number in range(pricing.CACHED_NAMES + 100):
        prices.cost(usage(f"claude-opus-5-{number}"))
        prices.cost(usage("claude-opus-5", tier=str(number)))
    assert len(prices._plans) <= pricing.CACHED_NAMES
    assert len(prices._flat) <= pricing.CACHED_NAMES


PROVIDERS = [
    ("us.anthropic.claude-opus-5", "anthropic"),
    ("claude", "anthropic"),
    ("gpt-5-codex", "openai"),
    ("o3", "openai"),
    ("o4-mini", "openai"),
    ("openai/gpt-oss-120b", "openai"),
    ("gemini-3-pro-preview", "google"),
    ("gemma-3", "google"),
    ("grok-4", "x-ai"),
    ("kimi-k3", "moonshotai"),
    ("GLM-5.2", "zai"),
    ("qwen3-coder-plus", "alibaba"),
    ("devstral-2512", "mistral"),
    ("deepseek/deepseek-chat", "deepseek"),
    ("fireworks/deepseek-v3", "unknown"),
    ("o3x", "unknown"),
    ("<synthetic>", "unknown"),
    ("", "unknown"),
]


@pytest.mark.parametrize(("model", "provider"), PROVIDERS)
def test_providers(model: str, provider: str) -> None:
    assert provider_of(model) == provider


# --- The client's own figures ----------------------------------------------------------------------------------------

# The price catalogue built into Claude Code 2.1.329: name, the API's name, USD per million tokens of input, output,
# cache reads, writes for 5 minutes and for 1 hour, USD per web search; then the same above so many tokens of prompt.
CATALOGUE = [
    line
    for line in """
claude-3-5-haiku claude-3-5-haiku-20241022 0.8 4 0.08 1 1.6 0.01
claude-haiku-4-5 claude-haiku-4-5-20251001 1 5 0.1 1.25 2 0.01
claude-haiku-5-5 claude-haiku-5-5 0.1 0.5 0.01 0.125 0.2 0.01 100000 0.5 2.5 0.05 0.625 1
claude-3-5-sonnet claude-3-5-sonnet-20241022 3 15 0.3 3.75 6 0.01
claude-3-7-sonnet claude-3-7-sonnet-20250219 3 15 0.3 3.75 6 0.01
claude-sonnet-4-0 claude-sonnet-4-20250514 3 15 0.3 3.75 6 0.01
claude-sonnet-4-5 claude-sonnet-4-5-20250929 3 15 0.3 3.75 6 0.01
claude-sonnet-4-6 claude-sonnet-4-6 3 15 0.3 3.75 6 0.01
claude-sonnet-5 claude-sonnet-5 2 10 0.2 2.5 4 0.01
claude-sonnet-5-5 claude-sonnet-5-5 2 10 0.1 2.5 4 0.01
claude-opus-4-0 claude-opus-4-20250514 15 75 1.5 18.75 30 0.01
claude-opus-4-1 claude-opus-4-1-20250805 15 75 1.5 18.75 30 0.01
claude-opus-4-5 claude-opus-4-5-20251101 5 25 0.5 6.25 10 0.01
claude-opus-4-6 claude-opus-4-6 5 25 0.5 6.25 10 0.01
claude-opus-4-7 claude-opus-4-7 5 25 0.5 6.25 10 0.01
claude-opus-4-8 claude-opus-4-8 5 25 0.5 6.25 10 0.01
claude-opus-5 claude-opus-5 5 25 0.5 6.25 10 0.01
claude-opus-5-5 claude-opus-5-5 4 20 0.2 5 8 0.01
claude-fable-5 claude-fable-5 10 50 1 12.5 20 0.01
claude-fable-5-1 claude-fable-5-1 10 50 0.25 12.5 20 0.01
claude-fable-5-2 claude-fable-5-2 8 40 0.2 10 16 0.01
claude-mythos-5 claude-mythos-5 10 50 1 12.5 20 0.01
claude-mythos-5-1 claude-mythos-5-1 10 50 0.25 12.5 20 0.01
claude-mythos-5-2 claude-mythos-5-2 8 40 0.2 10 16 0.01
""".splitlines()
    if line
]

# Their windows of 1M tokens cost more above 200k by the vendor's list; the client's catalogue does not know it.
PREMIUM_IN_LIST_ONLY = ("claude-sonnet-4-0", "claude-sonnet-4-5")


@pytest.mark.parametrize("line", CATALOGUE, ids=lambda line: line.split()[0])
def test_the_clients_catalogue_is_reproduced(line: str) -> None:
    name, api_name, *columns = line.split()
    dollars = [Decimal(column) for column in columns]
    short = [*(price * 1000 for price in dollars[:5]), dollars[5] * 10**9]
    for model in (name, api_name):
        for kind, price in zip(KINDS, short, strict=True):
            for count in (1, 1000, 99_999, 100_000):
                assert total(usage(model, **{kind: count})) == round_half_even(price * count)
        if len(dollars) > 6:
            threshold = int(dollars[6])
            for kind, price in zip(KINDS[:5], dollars[7:], strict=True):
                beyond = usage(model, **{kind: threshold + 1})
                rate = dollars[1] if kind == "output" else price  # the answer is no prompt
                assert total(beyond) == round_half_even(rate * 1000 * (threshold + 1))
            whole = usage(model, input=threshold, cache_read=1, output=10)
            assert total(whole) == round_half_even((dollars[7] * threshold + dollars[9] + dollars[8] * 10) * 1000)
        elif name in PREMIUM_IN_LIST_ONLY:
            assert total(usage(model, input=200_000)) == 200_000 * short[0]
            assert total(usage(model, input=200_001, output=2)) == 200_001 * 2 * short[0] + 3 * short[1]
        else:
            assert total(usage(model, input=999_999)) == 999_999 * short[0]


def round_half_even(nano_dollars: Decimal) -> int:
    return int(nano_dollars.to_integral_value(ROUND_HALF_EVEN))


@pytest.mark.parametrize("run", RUNS)
def test_recorded_runs_cost_what_the_client_says(run: str) -> None:
    """No request of these runs is dearer for its length, so that a model's sums cost what its requests do."""
    for model, tokens in EXPECTED[run]["tokens"].items():
        assert tokens["input"] + tokens["cacheRead"] + tokens["cacheCreation"] <= 200_000
        used = usage(
            model,
            input=int(tokens["input"]),
            output=int(tokens["output"]),
            cache_read=int(tokens["cacheRead"]),
            cache_write_5m=int(tokens["cacheCreation"]),
        )
        assert abs(Decimal(total(used)).scaleb(-9) - EXPECTED[run]["cost_usd"][model]) <= Decimal("1e-9")


def requests_in_events(run: str) -> Iterator[dict[str, Any]]:
    for request in RUNS[run]:
        if request.path != "/v1/logs":
            continue
        message = request.message
        assert isinstance(message, ExportLogsServiceRequest)
        for resource in message.resource_logs:
            for scope in resource.scope_logs:
                for record in scope.log_records:
                    attributes = {a.key: getattr(a.value, a.value.WhichOneof("value") or "") for a in record.attributes}
                    if attributes.get("event.name") == "api_request":
                        yield {**attributes, "client": scope.scope.version}


def test_recorded_requests_cost_what_the_client_says() -> None:
    """Clients 1.0 and 2.0 price every write as one for 5 minutes. The events of 2.1.197 and older do not say for how
    long a write was; those recorded were all for 5 minutes, so that both rules agree on them."""
    compared = 0
    for run in RUNS:
        for event in requests_in_events(run):
            written, for_1h = int(event["cache_creation_tokens"]), int(event.get("cache_creation_1h_tokens", 0))
            used = usage(
                ASKED.get(event["model"], event["model"]),
                input=int(event["input_tokens"]),
                output=int(event["output_tokens"]),
                cache_read=int(event["cache_read_tokens"]),
                cache_write_5m=written - for_1h,
                cache_write_1h=for_1h,
                speed=event.get("speed", ""),
            )
            assert abs(Decimal(total(used)).scaleb(-9) - Decimal(str(event["cost_usd"]))) <= Decimal("1e-9")
            compared += 1
    assert compared > 100


# --- Rules -----------------------------------------------------------------------------------------------------------

SONNET = "claude-sonnet-4-5"


def test_each_kind_has_its_price() -> None:
    used = usage("claude-opus-5", input=1, output=2, cache_read=3, cache_write_5m=4, cache_write_1h=5, web_searches=6)
    assert PRICES.cost(used) == 60_131_500


def test_unknown_models_are_unpriced() -> None:
    for model in ("gpt-99", "claude-opus-9", "<synthetic>", "", "llama-4", "fireworks/glm-5", "whisper-1", "gemma-3"):
        assert PRICES.cost(usage(model, input=1)) is None


def test_no_model_has_its_neighbours_price() -> None:
    for model in (
        "claude-opus-4-10", "claude-opus-5-6", "gpt-5-giant", "anthropic/claude-opus-4.8:batch",
        "deepseek-r1-distill-qwen-7b", "gemini-2.5-pro-tts-x", "gemini-1.5-flash-8b",
        "mistral-large-2599", "grok-4-heavy", "qwen3-coder-plus",
    ):  # fmt: skip
        assert PRICES.cost(usage(model, input=1)) is None, model


SAME_PRICE = [
    ("gemini-2.5-pro-preview-06-05", "gemini-2.5-pro"),
    ("gemini-2.5-pro-exp-03-25", "gemini-2.5-pro"),
    ("gemini-2.0-flash-001", "gemini-2.0-flash"),
    ("gemini-3.1-pro-preview-customtools", "gemini-3.1-pro-preview"),
    ("claude-4.5-opus-thinking", "claude-opus-4-5"),
    ("gemini-2.5-flash-preview-05-20", "gemini-2.5-flash-preview"),
]


@pytest.mark.parametrize(("model", "like"), SAME_PRICE)
def test_previews_and_revisions_cost_the_same(model: str, like: str) -> None:
    assert total(usage(model, input=7, output=1)) == total(usage(like, input=7, output=1))


def test_nothing_costs_nothing() -> None:
    assert PRICES.cost(usage("claude-opus-5")) == 0


RULES = [
    # Fast mode.
    (usage("claude-opus-5-5", input=1, speed="fast"), 8_000),
    (usage("claude-opus-5-5-fast", input=1), 8_000),
    (usage("claude-opus-5", output=1, speed="fast"), 50_000),
    (usage("claude-opus-4-8", cache_read=1, speed="fast"), 1_000),
    (usage("claude-opus-4-7", cache_write_1h=1, speed="fast"), 60_000),
    (usage("claude-opus-4-6", input=1, speed="fast"), 30_000),
    (usage("claude-opus-4-6-thinking", input=1, speed="fast"), 30_000),
    (usage("claude-opus-4-6", input=200_001, speed="fast", time=at("2026-03-01")), 200_001 * 60_000),
    (usage("claude-opus-5", input=1, speed="normal"), 5_000),
    (usage("claude-opus-5", input=1, speed="standard", tier="standard", geo="not_available"), 5_000),
    (usage("claude-sonnet-5", input=1, speed="fast"), 2_000),
    # Places. Web searches cost the same everywhere.
    (usage("claude-opus-5", input=1, geo="us"), 5_500),
    (usage("claude-opus-5", web_searches=1, geo="us"), 10_000_000),
    (usage("claude-opus-5", input=1, geo="us", speed="fast"), 11_000),
    (usage("us.anthropic.claude-opus-5", input=1), 5_500),
    (usage("global.anthropic.claude-opus-5", input=1), 5_000),
    (usage("us.anthropic.claude-3-5-haiku-20241022-v1:0", input=1), 800),
    (usage("gpt-5", input=1, geo="us"), 1_250),
    # Tiers of service.
    (usage("claude-opus-5", input=1, tier="batch"), 2_500),
    (usage("claude-opus-4-1", input=1, tier="batch"), 7_500),
    (usage("claude-opus-5", input=1, tier="batch", time=at("2026-08-01")), 2_500),
    (usage("claude-mythos-5", cache_write_1h=1, tier="batch"), 10_000),
    (usage("claude-opus-5", input=1, tier="priority"), 5_000),
    (usage("gpt-5.5", input=1, tier="priority"), 12_500),
    (usage("gpt-5.5", input=1, speed="fast"), 12_500),
    (usage("gpt-5.5-fast", input=1), 12_500),
    (usage("gpt-4.1", output=1, tier="priority", time=at("2026-01-01")), 14_000),
    (usage("gpt-5.6-luna", input=1, tier="flex", time=at("2026-07-01")), 500),
    (usage("gpt-5.6-luna", input=1, tier="flex"), 100),
    (usage("gpt-5.3", input=10, tier="flex"), 8_750),
    (usage("gpt-6-sol", input=1, tier="default"), 2_000),
    # Long prompts: the whole request, and what was read from or written to a cache is prompt.
    (usage(SONNET, input=200_000, output=1), 200_000 * 3_000 + 15_000),
    (usage(SONNET, input=1, cache_read=199_999, cache_write_1h=1), 6_000 + 199_999 * 600 + 12_000),
    (usage(SONNET, input=200_001, tier="batch"), 200_001 * 3_000),
    (usage("claude-sonnet-4", cache_read=200_001, output=1), 200_001 * 600 + 22_500),
    (usage("claude-opus-5", input=900_000), 900_000 * 5_000),
    (usage("gpt-6-sol", input=272_001, output=1), 272_001 * 4_000 + 15_000),
    (usage("gemini-2.5-pro", cache_read=200_001, output=1), 200_001 * 250 + 15_000),
    (usage("gpt-5.4", input=272_001, tier="priority"), 272_001 * 5_000),
    # Prices of the day, in UTC.
    (usage("claude-opus-4-6", input=200_001, time=at("2026-03-13") - 1), 200_001 * 10_000),
    (usage("claude-opus-4-6", input=200_001, time=at("2026-03-13")), 200_001 * 5_000),
    (usage("o3", input=1, time=at("2025-06-09")), 10_000),
    (usage("o3", input=1, time=0), 10_000),
    (usage("o3", input=1), 2_000),
    (usage("deepseek-chat", input=1000, time=TODAY), 135_000),
    (usage("deepseek-chat", input=1000, time=TODAY + 30 * 60_000), 270_000),
    (usage("deepseek-chat", input=1000, time=TODAY + 990 * 60_000), 135_000),
    # Caches of those who do not charge for them apart: what is written is input.
    (usage("gpt-4.1", cache_write_5m=1, cache_write_1h=1), 4_000),
    (usage("o1-pro", cache_read=1), 150_000),
    (usage("gpt-6-sol", cache_write_1h=2), 5_000),
    # Half to even.
    (usage("claude-3-haiku", cache_read=1), 30),
    (usage("gpt-5.4-nano", cache_read=1, tier="batch"), 10),
    (usage("gpt-5.4-mini", cache_read=1, tier="batch"), 38),
    (usage("gpt-5-mini", cache_read=1, tier="flex"), 12),
    (usage("gpt-5-mini", cache_read=3, tier="flex"), 38),
]


@pytest.mark.parametrize(("used", "nano_dollars"), RULES)
def test_rules(used: Usage, nano_dollars: int) -> None:
    assert total(used) == nano_dollars


def test_modifiers_are_the_named_ones() -> None:
    """A price that is in the table is not repeated beside it."""
    for name, option in pricing.MODIFIERS:
        entry = PRICES._entries.get(name)
        assert entry is None or not getattr(entry, option), f"{name}: the table has {option}"
    for name in msgspec.json.decode(pricing.ADDITIONS):
        assert name == "claude-sonnet-4" or name not in TABLE["providers"]["anthropic"], f"{name}: the table has it"


_COUNT = st.integers(0, 10**12)


@given(
    st.sampled_from(["claude-opus-5", "gpt-5-mini", "o3", "us.anthropic.claude-opus-5", "thirds"]),
    st.tuples(_COUNT, _COUNT, _COUNT, _COUNT, _COUNT, _COUNT),
    st.sampled_from(["", "batch", "flex", "priority"]),
)
def test_a_request_costs_what_its_kinds_cost(model: str, counts: tuple[int, ...], tier: str) -> None:
    prices = Prices.from_json(PRICES_TEXT, {"thirds": {"input": 0.00037, "output": 0.0011, "cache_read": 0.000013}})
    given = dict(zip(KINDS, counts, strict=True))
    cost = total(usage(model, tier=tier, **given), prices)
    # A million times each, so that nothing is rounded but the sum; these models cost the same however long the prompt.
    million = [total(usage(model, tier=tier, **{kind: count * 10**6}), prices) for kind, count in given.items()]
    assert type(cost) is int
    assert abs(10**6 * cost - sum(million)) <= 10**6 // 2 + len(million)


def test_fractions_are_rounded_in_the_sum_alone() -> None:
    prices = Prices.from_json(PRICES_TEXT, {"m": dict.fromkeys(("input", "output", "cache_read"), 0.0005)})
    assert prices.cost(usage("m", input=1, output=1, cache_read=1)) == 2
    assert prices.cost(usage("m", input=1)) == 0
    assert prices.cost(usage("m", input=3)) == 2


# --- The user's prices -----------------------------------------------------------------------------------------------

PRICES_TEXT = (Path(pricing.__file__).parent / "prices.json").read_text()


def test_overrides_win_over_the_table() -> None:
    prices = load({"claude-opus-5": {"input": 1, "output": 2.5, "cache_read": 0}})
    assert prices.cost(usage("us.anthropic.claude-opus-5", input=1, output=1)) == 3_500
    assert total(usage("claude-opus-5", cache_read=1), prices) == 0
    assert total(usage("claude-opus-5", cache_write_5m=1, cache_write_1h=1), prices) == 3_250
    assert total(usage("claude-opus-5", input=1, speed="fast"), prices) == 2_000
    assert total(usage("claude-opus-5", input=1, tier="batch", geo="us"), prices) == 550
    assert total(usage("claude-opus-5-5", input=1), prices) == 4_000
    assert total(usage("claude-opus-5-thinking", input=1), prices) == 1_000


def test_overrides_have_no_tiers() -> None:
    prices = load({SONNET: {"input": 3, "output": 15}, "claude-opus-4-6": {"input": 5, "output": 25}})
    assert total(usage(SONNET, input=300_000), prices) == 300_000 * 3_000
    assert total(usage("claude-opus-4-6", input=300_000, time=at("2026-01-01")), prices) == 300_000 * 5_000


def test_overrides_price_the_unknown() -> None:
    prices = load({"Fireworks/GLM-5": {"input": 0.1, "output": 1e-6, "cache_write_5m": Decimal("0.3")}})
    assert total(usage("fireworks/glm-5", input=3, cache_read=1, cache_write_1h=1), prices) == 700
    assert total(usage("fireworks/glm-5", output=1_000_000), prices) == 1_000


WRONG_OVERRIDES: list[tuple[dict[str, Any], str]] = [
    ({"m": {"inptu": 1, "output": 1}}, "prices.m.inptu: unknown key; did you mean input?"),
    ({"m": {"input": 1, "output": 1, "zzz": 1}}, "prices.m.zzz: unknown key; known are input, output, cache_read"),
    ({"m": {"input": 1}}, "prices.m.output: missing; give it"),
    ({"m": {}}, "prices.m.input: missing"),
    ({"m": {"input": "3", "output": 1}}, "prices.m.input: expected a number of USD per million tokens, got '3'"),
    ({"m": {"input": True, "output": 1}}, "prices.m.input: expected a number"),
    ({"m": {"input": -1, "output": 1}}, "prices.m.input: expected USD per million tokens from 0 to 1000000, got -1"),
    ({"m": {"input": float("nan"), "output": 1}}, "prices.m.input: expected USD per million tokens from 0"),
    ({"m": {"input": float("inf"), "output": 1}}, "prices.m.input: expected USD per million tokens from 0"),
    ({"m": {"input": 10**7, "output": 1}}, "got 10000000"),
    ({"m": 3}, "prices.m: expected a table with input and output, got 3"),
    ({" ": {"input": 1, "output": 1}}, "prices: a model's name is empty"),
    ({"claude-opus-5-fast": {"input": 1, "output": 1}}, "give that as [prices.claude-opus-5]"),
    (
        {"claude-opus-5": {"input": 1, "output": 1}, "anthropic/claude-opus-5": {"input": 2, "output": 2}},
        "prices.anthropic/claude-opus-5: the same model as prices.claude-opus-5; keep one of them",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), WRONG_OVERRIDES)
def test_wrong_overrides_are_named(overrides: dict[str, Mapping[str, object]], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        load(overrides)
    assert message in str(raised.value)


# --- The table -------------------------------------------------------------------------------------------------------


def test_the_table_names_its_source_and_is_small() -> None:
    assert f"genai-prices {VERSION}, https://github.com/pydantic/genai-prices, {TABLE['date']}" == PRICES.source
    assert "MIT" in TABLE["license"]
    assert len(PRICES_TEXT) < 60_000


@needs_genai_prices
def test_the_table_is_what_genai_prices_gives() -> None:
    from tests.compile_prices import compiled

    assert compiled(TABLE["date"]) == PRICES_TEXT, "run python -m tests.compile_prices"


# Where we and genai-prices differ on purpose, and why.
DIFFERENCES = {
    "claude-2": "no price for caches: by the vendor's rule here, as input there",
    "claude-v1": "no price for caches: by the vendor's rule here, as input there",
    "claude-sonnet-4-0": "the premium above 200k tokens is missing there",
}
# And beyond models: web searches cost 0.01 USD where the table does not say (0 there); a variant of the price counts
# before the day since which they know it (the standard price there); fast, batch, flex and priority where they have no
# such price; a model of which they know no price for text is unpriced here (0 there, or an error).


class Listed(NamedTuple):
    """A name in genai-prices with one of its prices: in which context, and when."""

    provider: str
    name: str
    context: dict[str, str]
    option: str
    moment: datetime
    has_searches: bool


DAYS = [datetime.fromisoformat(f"{day}T00:15+00:00") for day in (
    "2024-06-01", "2025-06-10", "2026-03-01", "2026-08-01", "2026-10-15", "2027-06-01",
)]  # fmt: skip


def listed() -> Iterator[Listed]:
    """Every name that stands there, in every context that it has a price for, over the years."""
    from tests.compile_prices import OPTIONS, PROVIDERS, is_priced, periods, spelled, table

    for provider in PROVIDERS:
        for model in filter(is_priced, table(provider)):
            if model.id in DIFFERENCES:
                continue
            variants = [variant for variant in model.price_variants or () if len(variant.when) == 1]
            has_searches = all(price.web_searches_kcount is not None for _, price in periods(model.prices))
            whole = [name for name in spelled(model.match, "^$~") if PRICES.cost(usage(name))]
            for name in (*spelled(model.match, "="), *whole):
                if provider_of(name) != provider:
                    continue
                for moment in DAYS:
                    yield Listed(provider, name, {}, "", moment, has_searches)
                    for variant in variants:
                        option = OPTIONS.get(next(iter(variant.when.items())), "")
                        if variant.constraint is None or variant.constraint.active(moment):
                            yield Listed(provider, name, variant.when, option, moment, has_searches)


@needs_genai_prices
def test_prices_agree_with_genai_prices() -> None:
    from genai_prices import Usage as TheirUsage
    from genai_prices import calc_price

    seed = random.Random(4)
    compared = 0
    for case in listed():
        for most in (10, 60_000, 400_000):
            plain, out, read, write_5m, write_1h = (seed.randrange(most) for _ in range(5))
            searches = seed.randrange(3) if case.has_searches else 0
            theirs = calc_price(
                TheirUsage(
                    input_tokens=plain + read + write_5m + write_1h,
                    output_tokens=out,
                    cache_read_tokens=read,
                    cache_write_tokens=write_5m + write_1h,
                    cache_write_1h_tokens=write_1h,
                    web_searches=searches,
                ),
                model_ref=case.name,
                provider_id=case.provider,
                genai_request_timestamp=case.moment,
                price_context=case.context,
            )
            counts = dict(zip(KINDS, (plain, out, read, write_5m, write_1h, searches), strict=True))
            time = int(case.moment.timestamp()) * 1000
            ours = total(usage(case.name, tier=case.option, time=time, **counts))
            assert ours == round_half_even(theirs.total_price.scaleb(9)), (case, counts, theirs.model_price)
            compared += 1
    assert compared > 5000


@needs_genai_prices
def test_regional_endpoints_of_bedrock_agree_with_genai_prices() -> None:
    from genai_prices import Usage as TheirUsage
    from genai_prices import calc_price

    from tests.compile_prices import is_priced, table

    compared = 0
    for model in table("aws"):
        if model.id.startswith("regional.anthropic.") and is_priced(model):
            for place in ("us", "global"):
                name = model.id.replace("regional", place)
                if normalise_model(name) not in TABLE["regional"]:
                    continue
                theirs = calc_price(TheirUsage(input_tokens=1000, output_tokens=10), model_ref=name, provider_id="aws")
                assert total(usage(name, input=1000, output=10)) == round_half_even(theirs.total_price.scaleb(9)), name
                compared += 1
    assert compared == 2 * len(TABLE["regional"])


def test_no_two_models_share_a_name() -> None:
    seen: dict[str, str] = {}
    for provider, models in TABLE["providers"].items():
        for name, entry in models.items():
            for each in (name, *entry.get("names", ())):
                assert seen.setdefault(each, name) == name
                assert normalise_model(each) == each
                assert provider_of(each) == provider


def test_rates_are_exact() -> None:
    """No price of the table is finer than a pico-dollar per token, so that tokens alone never need more digits."""
    for models in TABLE["providers"].values():
        for entry in models.values():
            for _, rows in entry["prices"]:
                for row in rows:
                    assert all((Fraction(price or 0) * 10**6).denominator == 1 for price in row[1:6])
