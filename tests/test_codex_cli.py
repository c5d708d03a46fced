"""Codex itself: what a mock API handed out is what a bridge shows, whatever of it the sources told.

Recorded runs are replayed by every test run; `--campaign` runs the client, if it is installed: set BRIDGE_TEST_CODEX to
the command, or have `codex` in the path (npm install @openai/codex).
"""

import asyncio
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import pytest

from bridge import otlp, pricing
from bridge.model import Batch, Usage
from bridge.otlp import Encoding
from bridge.tools import known
from bridge.tools.codex_lines import TOOL, TRANSCRIPTS
from tests.clients.codex_cli import Codex, MockApi, first_half, second_half, tokens
from tests.daemon import Daemon
from tests.following import Following, following
from tests.recordings import DIRECTORY
from tests.test_transcripts import eventually

RUNS = DIRECTORY / "codex"
SOURCES = ("metrics", "logs", "rollouts")
SUBSETS = [subset for size in (1, 2, 3) for subset in combinations(SOURCES, size)]
KINDS = ("input", "output", "cache_read", "cache_write")
# https://developers.openai.com/api/docs/pricing, checked 2026-11-28: nano-dollars for input, output, read and written.
LIST_PRICES = {"gpt-5.5": (5_000, 30_000, 500, 5_000), "gpt-5.6-sol": (4_000, 20_000, 400, 5_000)}


def list_price(counts: dict[str, dict[str, int]]) -> int:
    """Nano-dollars. The one request of gpt-5.6-sol is above the limit: twice the input and 1.5 times the output."""
    cost = 0
    for model, sums in counts.items():
        into, out, read, written = LIST_PRICES[model]
        cost_in = sums["input"] * into + sums["cache_read"] * read + sums["cache_write"] * written
        cost_out = sums["output"] * out
        cost += 2 * cost_in + cost_out * 3 // 2 if model == "gpt-5.6-sol" else cost_in + cost_out
    return cost


PRICES = pricing.load()


def price(usage: object) -> int | None:
    assert isinstance(usage, Usage)
    return PRICES.cost(usage)


async def post(bridge: Following, file: Path) -> None:
    encoding = Encoding.JSON if file.suffix == ".json" else Encoding.PROTOBUF
    body = await asyncio.to_thread(file.read_bytes)
    if "metrics" in file.stem:
        batch: Batch = otlp.decode_metrics(body, encoding)
        await bridge.tell(batch)
    else:
        await bridge.tell_events(otlp.decode_logs(body, encoding, known.event_keys(frozenset())).events)


@pytest.mark.parametrize("sources", SUBSETS, ids="+".join)
@pytest.mark.parametrize("run", ["json", "binary"])
def test_recorded(tmp_path: Path, run: str, sources: tuple[str, ...]) -> None:
    """In any order, and bodies twice; files appear under other names than they had, as the client moves them."""
    expected = json.loads((RUNS / run / "expected.json").read_text())
    chance = Random(f"{run}{sources}")
    home = tmp_path.resolve() / "codex"
    roots = dict.fromkeys(TRANSCRIPTS.roots({"CODEX_HOME": str(home)}, ""), TRANSCRIPTS)
    for root in roots:
        Path(root).mkdir(parents=True)
    bodies = [path for path in sorted((RUNS / run).iterdir()) if path.stem.endswith(sources)]
    rollouts = [path for path in sorted((RUNS / run / "home").rglob("*.jsonl*")) if "rollouts" in sources]
    pieces = chance.sample([*bodies, *rollouts], len(bodies) + len(rollouts))

    async def story() -> None:
        async with following(tmp_path / "state", roots, price) as bridge:
            for piece in pieces:
                if piece in bodies:
                    await post(bridge, piece)
                else:
                    target = home / chance.choice(["sessions", "archived_sessions"]) / piece.name
                    await asyncio.to_thread(shutil.copyfile, piece, target)
            await bridge.until_read()
            served = bridge.served(TOOL)
            assert {model: {kind: sums[kind] for kind in KINDS} for model, sums in served.items()} == {
                model: {kind: sums[kind] for kind in KINDS} for model, sums in expected.items()
            }
            if sources != ("metrics",):
                requests = {model: sums["requests"] for model, sums in served.items()}
                assert requests == {model: sums["requests"] for model, sums in expected.items()}
                assert sum(sums["usd"] for sums in served.values()) == list_price(expected)

    asyncio.run(story())


# --- the client itself -------------------------------------------------------------------------------------------


@pytest.fixture
def command(campaign: bool) -> str:
    """The client's command; skips the test where it is not installed."""
    found = shutil.which(os.environ.get("BRIDGE_TEST_CODEX", "codex"))
    if not campaign:
        pytest.skip("takes half a minute; run it with --campaign")
    if found is None:
        if os.environ.get("BRIDGE_TEST_REQUIRE_ALL") == "1":
            pytest.fail("needs Codex: npm install @openai/codex, and its command in BRIDGE_TEST_CODEX")
        pytest.skip("needs Codex: npm install @openai/codex, and its command in BRIDGE_TEST_CODEX")
    return found


def joined(daemon: Daemon) -> dict[str, dict[str, int]]:
    """What `/metrics` shows of Codex: model -> kind -> tokens."""
    shown: dict[str, Counter[str]] = {}
    for sample, value in daemon.samples("/metrics").items():
        if sample.startswith("ai_tokens_total{") and 'tool="codex"' in sample:
            labels: dict[str, Any] = dict(
                part.split("=", 1) for part in sample[len("ai_tokens_total{") : -1].replace('"', "").split(",")
            )
            shown.setdefault(labels["model"], Counter())[labels["type"]] = int(float(value))
    return {model: dict(sums) for model, sums in shown.items()}


def without_requests(sums: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    return {model: {kind: counts[kind] for kind in KINDS} for model, counts in sums.items()}


@pytest.mark.parametrize("protocol", ["json", "binary"])
@pytest.mark.parametrize("sources", SUBSETS, ids="+".join)
def test_live(
    command: str, tmp_path: Path, make_daemon: Callable[..., Daemon], sources: tuple[str, ...], protocol: str
) -> None:
    """After each half; between them a bridge that has rollouts is killed, down while some work is done, and back."""
    if protocol == "json" and "rollouts" in sources and len(sources) > 1:
        pytest.skip("the encoding changes nothing in how sources are joined")
    mock = MockApi()
    codex = Codex(command, tmp_path.resolve() / "user", mock)
    flags = () if "rollouts" in sources else ("--no-transcripts",)
    daemon = make_daemon(*flags, env={"CODEX_HOME": str(codex.home)}).start()
    codex.export(daemon.url, sources, protocol)
    try:
        first_half(codex)
        assert eventually(lambda: joined(daemon) == without_requests(tokens(mock.handed))), (
            joined(daemon), tokens(mock.handed)
        )  # fmt: skip
        if "rollouts" in sources:
            daemon.kill()
            codex.exec("while the bridge is down")
            daemon.start()
        second_half(codex)
        assert eventually(lambda: joined(daemon) == without_requests(tokens(mock.handed))), (
            joined(daemon), tokens(mock.handed)
        )  # fmt: skip
    finally:
        mock.close()
