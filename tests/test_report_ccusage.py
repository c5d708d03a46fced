"""`report` beside ccusage on the same transcripts, and beside the truth of whoever made them.

On transcripts that both read alike (see test_ccusage.py for those that they do not) every day, month, session and block
must agree to the token and the nano-dollar, in any time zone. What still differs, by intent:

- ccusage has a model's fast mode as a model of its own; here the model is one, and its price is not.
- It shows a gap only after five idle hours from the last request on, here all time between blocks is one.
- Its rate is that between the first and the last request of a block, so that an idle block burns on; here it is that
  since the first request. Both project it to the block's end.
- It sums up what the files still hold; here what was read stays.
"""

import json
import os
import random
import subprocess
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bridge.cli import _main
from bridge.pricing import normalise_model
from tests.daemon import Daemon
from tests.test_ccusage import ccusage as ccusage  # the fixture
from tests.test_transcripts import append, wait_until_read
from tests.transcript_tree import MODELS, START_MS, Truth, list_price, response, timestamp, write_tree

ZONES = ("UTC", "Asia/Kolkata", "America/New_York")
CLEAN = "/home/ann/clean"


class Trees(NamedTuple):
    """A generated tree with its truth, a plain one for ccusage, and the state of a bridge that has read both."""

    truth: Truth
    plain: Path
    state: Path


def write_plain(root: Path) -> None:
    """Sessions of some days around a change of the clocks, with idle times, in two models."""
    choose = random.Random(11)
    for session in range(12):
        time_ms = START_MS + (30 + choose.randrange(30)) * 86_400_000 + choose.randrange(86_400_000)
        lines = []
        for number in range(choose.randrange(5, 60)):
            time_ms += choose.choice((20_000, 60_000, 900_000, 7_200_000))
            new, long = choose.randrange(3000), choose.choice((0, 5000))
            usage = {
                "input_tokens": choose.randrange(500), "output_tokens": choose.randrange(1, 4000),
                "cache_read_input_tokens": choose.randrange(100_000), "cache_creation_input_tokens": new + long,
                "cache_creation": {"ephemeral_5m_input_tokens": new, "ephemeral_1h_input_tokens": long},
            }  # fmt: skip
            name = f"clean_{session}_{number}"
            members = {"model": choose.choice(MODELS[:2]), "timestamp": timestamp(time_ms)}
            lines.append(response(name, f"req_{name}", usage, sessionId=f"plain-{session}", cwd=CLEAN, **members))
        append(root / "projects" / "-home-ann-clean" / f"plain-{session}.jsonl", *lines)


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trees]:
    generated, plain = tmp_path_factory.mktemp("generated"), tmp_path_factory.mktemp("plain")
    truth = write_tree(generated, files=60, size=8_000_000, seed=5)
    write_plain(plain)
    daemon = Daemon(tmp_path_factory.mktemp("bridge"), env={"CLAUDE_CONFIG_DIR": f"{generated},{plain}"})
    try:
        daemon.start()
        wait_until_read(daemon, plain / "projects")
        daemon.stop()
        yield Trees(truth, plain, daemon.state_dir)
    finally:
        daemon.close()


Reported = Any


@pytest.fixture
def report(trees: Trees, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Reported:
    monkeypatch.setenv("HOME", str(trees.state.parent))

    def run(*arguments: str, zone: str = "UTC") -> Any:
        command = ["--state-dir", str(trees.state), "report", *arguments, "--json", "--timezone", zone]
        assert _main(command) == 0
        return json.loads(capsys.readouterr().out)

    return run


def said(ccusage: str, trees: Trees, *arguments: str, zone: str = "UTC") -> Any:
    done = subprocess.run(
        [ccusage, *arguments, "--json", "--offline", "--timezone", zone],
        env={**os.environ, "CLAUDE_CONFIG_DIR": str(trees.plain), "HOME": str(trees.plain)},
        capture_output=True,
        check=True,
        timeout=60,
    )
    return json.loads(done.stdout)


def ours(row: dict[str, Any]) -> tuple[int, ...]:
    names = ("input", "output", "cache_write", "cache_read")
    return (*(row[name] for name in names), round(row["cost_usd"] * 1e9))


def theirs(row: dict[str, Any]) -> tuple[int, ...]:
    names = ("inputTokens", "outputTokens", "cacheCreationTokens", "cacheReadTokens")
    return (*(row[name] for name in names), round(row["totalCost"] * 1e9))


def test_a_report_is_the_truth_of_the_generated_tree(trees: Trees, report: Reported) -> None:
    expected: dict[str, Counter[str]] = {}
    for model, counts in trees.truth.tokens().items():
        expected.setdefault(normalise_model(model), Counter()).update(counts)
    all_of_it, clean = (report("model", *extra) for extra in ((), ("--project", CLEAN)))
    plain = {row["model"]: row for row in clean["rows"]}
    for row in all_of_it["rows"]:
        truth, extra = expected[row["model"]], plain.get(row["model"], Counter())
        assert row["input"] == truth["input"] + extra["input"]
        assert row["output"] == truth["output"] + extra["output"]
        assert row["cache_read"] == truth["read"] + extra["cache_read"]
        assert row["cache_write"] == truth["write_5m"] + truth["write_1h"] + extra["cache_write"]
        assert row["cache_write_1h"] == truth["write_1h"] + extra["cache_write_1h"]
        assert row["requests"] == truth["requests"] + extra["requests"]
    cost = trees.truth.cost(list_price) + round(clean["total"]["cost_usd"] * 1e9)
    assert round(all_of_it["total"]["cost_usd"] * 1e9) == cost


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize(("kind", "key"), [("daily", "date"), ("monthly", "month")])
def test_days_and_months_agree(ccusage: str, trees: Trees, report: Reported, kind: str, key: str, zone: str) -> None:
    found = {row[key]: ours(row) for row in report(kind, "--project", CLEAN, zone=zone)["rows"]}
    assert found == {row[key]: theirs(row) for row in said(ccusage, trees, "claude", kind, zone=zone)[kind]}
    assert len(found) > 1


def test_sessions_agree(ccusage: str, trees: Trees, report: Reported) -> None:
    found = {row["session"]: ours(row) for row in report("session", "--project", CLEAN)["rows"]}
    assert found == {row["sessionId"]: theirs(row) for row in said(ccusage, trees, "claude", "session")["sessions"]}


def test_blocks_agree(ccusage: str, trees: Trees, report: Reported) -> None:
    found = {
        (block["start"], block["end"]): ours(block)
        for block in report("blocks", "--project", CLEAN)["blocks"]
        if not block["gap"]
    }
    assert found == {
        (seconds(block["startTime"]), seconds(block["endTime"])): (
            *(block["tokenCounts"][name] for name in (
                "inputTokens", "outputTokens", "cacheCreationInputTokens", "cacheReadInputTokens",
            )),
            round(block["costUSD"] * 1e9),
        )
        for block in said(ccusage, trees, "blocks")["blocks"]
        if not block["isGap"]
    }  # fmt: skip


def seconds(at: str) -> str:
    return datetime.fromisoformat(at).astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
