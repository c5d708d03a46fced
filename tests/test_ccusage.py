"""The bridge's rules beside those of ccusage, the most used reader of transcripts, on the same trees.

What both make of a case is held against what was decided when the case was made. Where ccusage 20.0.24 says something
else, the case stands in DIFFERENCES with what it says and why that is not what happened.
"""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bridge import pricing
from bridge.model import Source, Usage
from tests.test_javascript_sdk import NODE_MODULES
from tests.transcript_tree import (
    START_MS,
    Case,
    Request,
    edge_cases,
    list_price,
    write_edge_cases,
    write_tree,
)


class Counts(NamedTuple):
    """Tokens by kind, and nano-dollars."""

    input: int = 0
    output: int = 0
    read: int = 0
    written: int = 0
    cost: int = 0


NONE = Counts()
ONE = Counts(10, 20, 0, 0, 330_000)
"""A request of 10 and 20 tokens to a model of 3 and 15 USD."""


class Difference(NamedTuple):
    theirs: Counts
    why: str


DIFFERENCES = {
    "the_whole_line_with_the_highest_output": Difference(
        Counts(500, 3, 0, 0, 2_575_000),
        "it keeps the line with the most tokens of all kinds: here an attempt that another model's response replaced",
    ),
    "one_id_for_everything": Difference(
        Counts(12, 20, 0, 0, 336_000),
        "without a request id its key is message, session and time stamp, so that requests of one millisecond merge",
    ),
    "a_sidechain_beside_a_response_without_request_id": Difference(
        ONE, "it drops a side-chain whose message stands elsewhere, also where nothing says that it is the same request"
    ),
    "progress_alone": Difference(NONE, "it reads no progress lines, so a subagent whose own file is gone is lost"),
    "the_excess_over_the_split_is_5m": Difference(
        Counts(10, 20, 0, 250, 1_605_000), "where a split is there it believes it, also when it is less than the sum"
    ),
    "zeros_beside_a_sum": Difference(ONE, "the same: some gateways write a split of zeros beside the sum"),
    "web_searches": Difference(ONE, "it does not price searches: three are 3 cents"),
    "geography": Difference(ONE, "it does not price inference_geo: us is a tenth more"),
    "a_long_prompt": Difference(
        Counts(150_000, 1000, 60_000, 0, 483_000_000),
        "above 200,000 tokens of prompt the whole request costs more; it looks at each kind of tokens alone",
    ),
    "synthetic": Difference(
        Counts(10, 20), "it counts lines that the client wrote itself; real ones have zeros, so that nobody sees it"
    ),
    "api_error": Difference(ONE, "the same for the lines that tell of an error"),
    "refused_above_the_limit": Difference(
        Counts(10**12 + 1, 20, 0, 0, 5_999_999_400_306_000), "it has no limit of what one request can have"
    ),
    **dict.fromkeys(
        ("null_counts", "odd_texts"), Difference(NONE, "a member of an unknown shape costs it the whole line")
    ),
    "spaces_in_json": Difference(NONE, "it looks for keys without a space before the colon"),
    **dict.fromkeys(
        (
            "byte_order_mark",
            "nuls_of_a_crash",
            "bad_utf8_in_content",
            "bad_utf8_in_a_name",
            "half_a_surrogate_pair",
        ),
        Difference(NONE, "bytes that are not JSON to the letter cost it the whole line, wherever they stand"),
    ),
}


@pytest.fixture(scope="module")
def ccusage() -> str:
    """The program; skips the tests where it is not installed."""
    found = NODE_MODULES / ".bin" / "ccusage"
    if found.exists():
        return str(found)
    missing = "needs ccusage; install it with: npm install --prefix tests/clients/javascript"
    if os.environ.get("BRIDGE_TEST_REQUIRE_ALL") == "1":
        pytest.fail(missing)
    pytest.skip(missing)


def told(ccusage: str, tree: Path) -> dict[str, Counts]:
    """What it says of a tree, by project."""
    done = subprocess.run(
        [ccusage, "claude", "daily", "--instances", "--json", "--offline"],
        env={**os.environ, "CLAUDE_CONFIG_DIR": str(tree), "HOME": str(tree)},
        capture_output=True,
        check=True,
        timeout=60,
    )
    return {project: added(map(day, days)) for project, days in json.loads(done.stdout)["projects"].items()}


def day(said: dict[str, Any]) -> Counts:
    return Counts(
        said["inputTokens"],
        said["outputTokens"],
        said["cacheReadTokens"],
        said["cacheCreationTokens"],
        round(said["totalCost"] * 1e9),
    )


def added(counts: Iterable[Counts]) -> Counts:
    return Counts(*map(sum, zip(NONE, *counts, strict=True)))


def truth(requests: Iterable[Request]) -> Counts:
    return added(Counts(r.input, r.output, r.read, r.write_5m + r.write_1h, list_price(r)) for r in requests)


@pytest.fixture(scope="module")
def said_of_edge_cases(ccusage: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Counts]:
    tree = tmp_path_factory.mktemp("edge")
    write_edge_cases(tree)
    return told(ccusage, tree)


@pytest.mark.parametrize("case", edge_cases(), ids=lambda case: case.name)
def test_edge_case(said_of_edge_cases: dict[str, Counts], case: Case) -> None:
    theirs = said_of_edge_cases.get(f"-{case.name}", NONE)
    known = DIFFERENCES.get(case.name)
    assert theirs == (truth(case.requests) if known is None else known.theirs)
    assert known is None or theirs != truth(case.requests)


def test_every_difference_is_of_a_case() -> None:
    assert DIFFERENCES.keys() <= {case.name for case in edge_cases()}


def test_a_generated_tree_differs_by_what_is_explained_above(ccusage: str, tmp_path: Path) -> None:
    """Blocks of a response without a request id, each with a time stamp of its own as in every recorded transcript,
    count again and again outside side-chains, without what is beyond their split; searches and regions cost nothing.
    Nothing else differs."""
    requests = write_tree(tmp_path, files=60, size=8_000_000, seed=5).requests
    theirs = added(told(ccusage, tmp_path).values())
    assert theirs != truth(requests)
    lines = [line for line in main_lines(tmp_path) if "requestId" not in line]
    once = {(line["message"]["id"], line["message"]["model"], prompt(line["message"]["usage"])): line for line in lines}
    ours = (in_full(line["message"]) for line in once.values())
    plain = [request._replace(searches=0, geo="") for request in requests]
    repeated = (in_full(line["message"], believes_split=True) for line in lines)
    assert added([theirs, truth(ours)]) == added([truth(plain), truth(repeated)])


def main_lines(tree: Path) -> Iterator[dict[str, Any]]:
    """The lines that tell of a response, outside side-chains."""
    for path in tree.rglob("*.jsonl"):
        for text in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a line that a crash has cut
                line = json.loads(text)
                if line["type"] == "assistant" and not line.get("isSidechain") and not line.get("isApiErrorMessage"):
                    yield line


def prompt(usage: dict[str, Any]) -> tuple[int, int, int]:
    return usage["input_tokens"], usage["cache_read_input_tokens"], usage["cache_creation_input_tokens"]


def in_full(message: dict[str, Any], *, believes_split: bool = False) -> Request:
    """The request of a line without regard to searches and regions, and where asked only as much as its split says."""
    usage = message["usage"]
    new, read, written = prompt(usage)
    split = usage.get("cache_creation", {"ephemeral_5m_input_tokens": written})
    long = split.get("ephemeral_1h_input_tokens", 0)
    short = split["ephemeral_5m_input_tokens"] if believes_split else written - long
    return Request(message["model"], new, usage["output_tokens"], read, short, long, speed=usage["speed"])


def test_the_price_of_every_request_is_that_of_the_list(tmp_path: Path) -> None:
    prices = pricing.load({})
    for request in set(write_tree(tmp_path, files=20, size=4_000_000, seed=3).requests):
        usage = Usage(
            "claude_code", Source.TRANSCRIPT, b"", "", request.model, START_MS, request.input, request.output,
            request.read, request.write_5m, request.write_1h, web_searches=request.searches, speed=request.speed,
            geo=request.geo,
        )  # fmt: skip
        assert prices.cost(usage) == list_price(request), request
