"""Real clients: what they sent and wrote adds up to what their APIs billed, whichever of it arrives, in any order.

Recordings are replayed in every run. `--campaign` runs the clients themselves, once more against a whole bridge; where
they are is said in `tests/real_clients.py`.
"""

import asyncio
import os
import random
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from bridge.model import Batch
from bridge.otlp import Encoding, decode_logs, decode_metrics, decode_traces
from bridge.pricing import normalise_model
from bridge.tools import known
from bridge.tools.gemini_lines import TRANSCRIPTS
from tests.daemon import Daemon
from tests.following import Following, following
from tests.model_apis import Billed, model_apis
from tests.real_clients import CLIENTS, Recording, Sent, load, record, run_gemini, run_genai
from tests.test_transcripts import eventually

SOURCES = {"gemini-cli": ("metrics", "logs", "chats"), "genai-python": ("metrics", "traces", "logs")}
TOOLS = {"gemini-cli": "gemini_cli", "genai-python": "my-app"}
SUBSETS = [
    (client, subset)
    for client in CLIENTS
    for size in (1, 2, 3)
    for subset in combinations(SOURCES[client], size)
    if subset != ("logs",) or client == "gemini-cli"  # the application's logs hold content alone
]
STREAMS = {"gpt-4o": 1, "claude-sonnet-4-5": 2}
"""Answers that the application had streamed to it."""


def truth(client: str, billed: list[Billed], sources: tuple[str, ...]) -> dict[str, Counter[str]]:
    """What a bridge must serve. The instrumentations lack something themselves: neither the metrics nor the spans of
    the one for OpenAI divide prompts, its metrics leave out answers that are streamed, and in the metrics of the one
    for Anthropic each of those has the output token more that its first event spoke of."""
    found: dict[str, Counter[str]] = {}
    for one in billed:
        is_whole = client == "gemini-cli" or (one.model.startswith("claude") and "traces" in sources)
        prompt = one.input if is_whole else one.input + one.read + one.written
        counts = {"input": prompt, "output": one.output}
        if is_whole:
            counts |= {"cache_read": one.read, "cache_write": one.written}
        found.setdefault(normalise_model(one.model), Counter()).update(counts)
    if client == "genai-python" and "metrics" in sources:
        found["claude-sonnet-4-5"]["output"] += STREAMS["claude-sonnet-4-5"]
        if "traces" not in sources:
            streamed = [one for one in billed if one.model == "gpt-4o"][1]
            found["gpt-4o"].subtract({"input": streamed.input + streamed.read, "output": streamed.output})
    return {model: +counts for model, counts in found.items()}


def batch_of(sent: Sent) -> Batch:
    encoding = Encoding(sent.content_type.partition(";")[0])
    match sent.path:
        case "/v1/metrics":
            return decode_metrics(sent.body, encoding)
        case "/v1/logs":
            events = decode_logs(sent.body, encoding, known.EVENT_KEYS).events
            usages, points, refused = known.read_events(events)
            return Batch(points, refused, tuple(usages))
        case _:
            spans = decode_traces(sent.body, encoding, known.span_keys(frozenset())).events
            usages, refused = known.read_spans(spans)
            return Batch([], refused, tuple(usages))


def tokens(bridge: Following, client: str) -> dict[str, Counter[str]]:
    served = bridge.served(TOOLS[client])
    for counts in served.values():
        del counts["usd"], counts["requests"]
    return {model: +counts for model, counts in served.items() if +counts}


async def replay(
    directory: Path, client: str, recording: Recording, sources: tuple[str, ...], seed: int = 0
) -> dict[str, Counter[str]]:
    """What a bridge serves that gets these sources of a run, the first export twice. Spans are sent within seconds and
    metrics once a minute, so they come first unless a seed shuffles them."""
    root = directory / "root"
    root.mkdir(parents=True)
    sent = sorted(
        (one for one in recording.sent if one.path.rpartition("/")[2] in sources),
        key=lambda one: one.path != "/v1/traces",
    )
    if seed:
        random.Random(seed).shuffle(sent)
    async with following(directory / "state", {str(root): TRANSCRIPTS}) as bridge:
        for one in [*sent, *sent[:1]]:
            await bridge.tell(batch_of(one))
        for name, content in recording.files.items() if "chats" in sources else ():
            path = root / name
            await asyncio.to_thread(path.parent.mkdir, parents=True, exist_ok=True)
            await asyncio.to_thread(path.write_bytes, content)
        await bridge.until_read()
        return tokens(bridge, client)


@pytest.mark.parametrize(("client", "sources"), SUBSETS)
def test_every_combination_of_sources_adds_up(tmp_path: Path, client: str, sources: tuple[str, ...]) -> None:
    recording = load(client)
    assert recording.billed
    wanted = truth(client, recording.billed, sources)
    assert asyncio.run(replay(tmp_path, client, recording, sources)) == wanted


@pytest.mark.parametrize("client", CLIENTS)
def test_spans_of_known_tools_and_everything_together_add_nothing(tmp_path: Path, client: str) -> None:
    recording = load(client)
    everything = ("metrics", "logs", "traces", "chats")
    for seed in range(1, 4):
        served = asyncio.run(replay(tmp_path / str(seed), client, recording, everything, seed))
        wanted = truth(client, recording.billed, everything)
        assert holds(served, wanted), seed


def holds(served: dict[str, Counter[str]], wanted: dict[str, Counter[str]]) -> bool:
    """Whether what is served is right, but for prompts that were served whole before they were divided."""
    return served.keys() == wanted.keys() and all(
        {**served[model], "input": 0} == {**counts, "input": 0} and served[model]["input"] >= counts["input"]
        for model, counts in wanted.items()
    )


def programs(client: str, *, is_campaign: bool) -> str:
    """Where the client is; skips the test where it is not to be run."""
    name = "BRIDGE_TEST_GEMINI" if client == "gemini-cli" else "BRIDGE_TEST_GENAI"
    if not is_campaign or not os.environ.get(name):
        pytest.skip(f"runs with --campaign and {name}")
    return os.environ[name]


@pytest.mark.parametrize("client", CLIENTS)
def test_a_run_of_the_client_itself(tmp_path: Path, campaign: bool, client: str) -> None:
    programs(client, is_campaign=campaign)
    recording = record(client)
    for number, (_, sources) in enumerate(subset for subset in SUBSETS if subset[0] == client):
        wanted = truth(client, recording.billed, sources)
        assert asyncio.run(replay(tmp_path / str(number), client, recording, sources)) == wanted, sources


@pytest.mark.parametrize("client", CLIENTS)
def test_the_client_beside_a_bridge(tmp_path: Path, campaign: bool, client: str) -> None:
    program = programs(client, is_campaign=campaign)
    daemon = Daemon(tmp_path)
    (tmp_path / ".gemini" / "tmp").mkdir(parents=True)
    daemon.start()
    try:
        with model_apis() as apis:
            (run_gemini if client == "gemini-cli" else run_genai)(program, tmp_path, apis, daemon.url)
        sources = ("metrics", "logs", "chats") if client == "gemini-cli" else ("metrics", "traces")
        wanted = truth(client, apis.billed, sources)
        assert eventually(lambda: holds(shown(daemon, TOOLS[client]), wanted)), (shown(daemon, TOOLS[client]), wanted)
        assert "secret" not in daemon.get("/metrics").text
        assert "list the files" not in daemon.get("/metrics").text
    finally:
        daemon.close()


def shown(daemon: Daemon, tool: str) -> dict[str, Counter[str]]:
    """`ai_tokens_total` of a tool: model -> type -> tokens."""
    found: dict[str, Counter[str]] = {}
    for sample, value in daemon.samples("/metrics").items():
        if sample.startswith("ai_tokens_total{") and f'tool="{tool}"' in sample:
            labels = dict(pair.split("=", 1) for pair in sample[len("ai_tokens_total{") : -1].split(","))
            if float(value):
                model, kind = labels["model"].strip('"'), labels["type"].strip('"')
                found.setdefault(model, Counter())[kind] = round(float(value))
    return found
