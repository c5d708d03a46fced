"""Gemini CLI's chats: every rule of the format, as history and as it is written, and what an odd moment does."""

import asyncio
import os
from collections import Counter
from pathlib import Path

import pytest

from bridge import reading
from bridge.tools.gemini_lines import TOOL, TRANSCRIPTS
from tests.following import Following, Sums, following
from tests.gemini_tree import (
    FLASH,
    START_MS,
    Request,
    Step,
    document,
    edge_cases,
    lines,
    members,
    message,
    path_of,
    sums,
    tokens,
    write_store,
)

CASES = [*edge_cases()]
TRUTH = sums(request for case in CASES for request in case.requests)


def refused(bridge: Following) -> int:
    """Lines that were refused for what they are, as its own metrics tell."""
    (family,) = bridge.telemetry.transcript_refused.collect()
    return round(sum(sample.value for sample in family.samples if sample.name.endswith("_total")))


def test_there_is_a_case_for_each_rule() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 19


def test_every_rule_holds_for_history(tmp_path: Path) -> None:
    root = tmp_path / "tmp"
    for case in CASES:
        for step in case.steps:
            step.do(root)

    async def look() -> None:
        async with following(tmp_path / "state", {str(root): TRANSCRIPTS}) as bridge:
            assert await bridge.requests() == TRUTH
            assert bridge.served(TOOL) == {}
            assert refused(bridge) == sum(case.refused for case in CASES)

    asyncio.run(look())


def test_every_rule_holds_as_it_is_written(tmp_path: Path) -> None:
    """One step of every case after the other, with a restart in the middle; at the end all is looked at again."""
    root = tmp_path / "tmp"
    root.mkdir()
    longest = max(len(case.steps) for case in CASES)

    async def write(numbers: range) -> None:
        async with following(tmp_path / "state", {str(root): TRANSCRIPTS}) as bridge:
            for number in numbers:
                for case in CASES:
                    for step in case.steps[number : number + 1]:
                        step.do(root)
                await bridge.until_read()
            if numbers.stop == longest:
                assert await bridge.requests() == TRUTH
                for path in root.rglob("*.json"):
                    os.utime(path)
                await bridge.until_read()
                assert await bridge.requests() == TRUTH
                assert bridge.served(TOOL) == by_model(TRUTH)

    asyncio.run(write(range(1)))
    asyncio.run(write(range(1, longest)))


def by_model(truth: Sums) -> dict[str, Counter[str]]:
    """What is served of requests that add up to this."""
    found: dict[str, Counter[str]] = {}
    for (_, model), counts in truth.items():
        served = {"cache_read" if kind == "read" else kind: value for kind, value in counts.items()}
        found.setdefault(model, Counter()).update(served)
    return {model: +counts for model, counts in found.items()}


def test_a_document_that_grows_before_its_history_is_read(tmp_path: Path) -> None:
    """What it told at the first look is history, what came later counts."""
    root = tmp_path / "tmp"
    said = [message(f"m{at}", at * 1000, tokens(100, 20 + at)) for at in range(3)]
    path = path_of("s", ".json")
    Step(path, document("s", *said[:2]), replaces=True).do(root)
    os.utime(root / path, ns=(0, (START_MS + 1_500) * 10**6))
    row = reading.first_row(TRANSCRIPTS, str(root / path))
    assert row is not None

    async def look_first() -> None:
        async with following(tmp_path / "state") as bridge:
            await bridge.ledger.add_root(str(root), [row])

    async def go_on() -> None:
        async with following(tmp_path / "state", {str(root): TRANSCRIPTS}) as bridge:
            await bridge.until_read()
            assert await bridge.requests() == sums(Request("s", FLASH, 100, 20 + at, 0) for at in range(3))
            assert bridge.served(TOOL) == by_model(sums([Request("s", FLASH, 100, 22, 0)]))

    asyncio.run(look_first())
    Step(path, document("s", *said), replaces=True).do(root)
    asyncio.run(go_on())


def test_a_document_above_the_limit_is_counted_and_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_DOCUMENT", 1_000)
    root = tmp_path / "tmp"
    large = document("s", message("m", 1, tokens(1, 2), content="x" * 1_000))
    Step(path_of("s", ".json"), large).do(root)
    Step(path_of("t", ".json"), document("t", message("m", 1, tokens(1, 2)))).do(root)

    async def look() -> None:
        async with following(tmp_path / "state", {str(root): TRANSCRIPTS}) as bridge:
            assert await bridge.requests() == sums([Request("t", FLASH, 1, 2, 0)])
            assert refused(bridge) == 1

    asyncio.run(look())


def test_a_generated_store_adds_up(tmp_path: Path) -> None:
    root = tmp_path / "tmp"
    truth = sums(write_store(root, files=30, size=2_000_000))

    async def look() -> None:
        async with following(tmp_path / "state", {str(root): TRANSCRIPTS}) as bridge:
            assert await bridge.requests() == truth

    asyncio.run(look())


def test_the_place_of_the_store() -> None:
    assert TRANSCRIPTS.roots({}, "/home/u") == ("/home/u/.gemini/tmp",)
    assert TRANSCRIPTS.roots({"GEMINI_CLI_HOME": "/data/"}, "/home/u") == ("/data/.gemini/tmp",)


def test_a_chat_is_read_on_where_the_last_bridge_stopped(tmp_path: Path) -> None:
    """The session stands in the first line alone."""
    root = tmp_path / "tmp"
    root.mkdir()
    path = path_of("s")

    async def look(at: int) -> None:
        async with following(tmp_path / "state", {str(root): TRANSCRIPTS}) as bridge:
            Step(path, lines(message(f"m{at}", at, tokens(100, 20)))).do(root)
            await bridge.until_read()
            assert await bridge.requests() == sums([Request("s", FLASH, 100, 20, 0)] * (at + 1))

    Step(path, lines(members("s"))).do(root)
    for at in range(2):
        asyncio.run(look(at))
