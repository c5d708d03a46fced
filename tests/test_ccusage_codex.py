"""The bridge's rules for rollouts beside those of ccusage, on the same stores.

test_codex_rollouts.py holds the bridge to the truth of these shapes in any order. Where ccusage 20.0.24 says something
else of a whole store, the case stands in DIFFERENCES with why that is not what happened.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.codex_tree import SHAPES, Thread, World, restamped, resumed_elsewhere, truth, with_ordinals, without_turns
from tests.test_ccusage import ccusage
from tests.test_codex_rollouts import family, worked

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

__all__ = ["ccusage"]

_GONE = "it leaves out what a fork copied of its declared parent, also when the parent's own file is gone"
_AGAIN = "it counts what a copy of a copy took over once more, for the declared parent has it from another thread"
DIFFERENCES = {
    "packed": "it reads no packed rollouts, and those are all that is left of a thread that rested for a week",
    "parent gone: restamped": _GONE,
    "parent gone: with_times": _GONE,
    "parent gone: without_turns": _GONE,
    "restamped, resumed_elsewhere": _AGAIN,
    "restamped, with_ordinals": _AGAIN,
    "without_turns, resumed_elsewhere": _AGAIN,
    "without_turns, with_ordinals": _AGAIN,
}


def cases() -> dict[str, list[Thread]]:
    found = {"packed": family(World(0), restamped), "packed and plain": family(World(1), restamped)}
    for number, shape in enumerate(SHAPES, 2):
        found[shape.__name__] = family(World(number), shape)
        found[f"parent gone: {shape.__name__}"] = family(World(number + 50), shape)[1:]
    for first in (restamped, without_turns):
        for second in (resumed_elsewhere, with_ordinals):
            world = World(100 + len(found))
            parent = worked(world)
            child = first(parent).work([world.decide()])
            found[f"{first.__name__}, {second.__name__}"] = [parent, child, second(child).work([world.decide()])]
    return found


CASES = cases()


def write(directory: Path, name: str) -> None:
    for thread in CASES[name]:
        path = directory / "sessions" / thread.file
        path.parent.mkdir(parents=True, exist_ok=True)
        if "plain" in name or "packed" not in name:
            path.write_bytes(thread.content)
        if "packed" in name:
            path.with_name(f"{path.name}.zst").write_bytes(zstd.compress(thread.content))


def agrees(ccusage: str, directory: Path, threads: Iterable[Thread]) -> bool:  # what the fixture gave
    """Whether it says of the store what the threads in it decided."""
    done = subprocess.run(
        [ccusage, "codex", "daily", "--json", "--offline"],
        env={**os.environ, "CODEX_HOME": str(directory), "HOME": str(directory)},
        capture_output=True,
        check=True,
        timeout=60,
    )
    said = json.loads(done.stdout)["totals"]
    sums = sum(truth(threads).values(), Counter[str]())
    theirs = (said["inputTokens"], said["outputTokens"], said["cacheReadTokens"], said["cacheCreationTokens"])
    return theirs == (sums["input"], sums["output"], sums["read"], sums["written"])


@pytest.mark.parametrize("name", DIFFERENCES)
def test_difference(ccusage: str, tmp_path: Path, name: str) -> None:  # a fixture of another module
    write(tmp_path, name)
    assert not agrees(ccusage, tmp_path, CASES[name])


def test_all_else_is_alike(ccusage: str, tmp_path: Path) -> None:  # a fixture of another module
    """In one store: none of these cases has a name in common with another."""
    names = CASES.keys() - DIFFERENCES.keys()
    for name in names:
        write(tmp_path, name)
    assert agrees(ccusage, tmp_path, [thread for name in names for thread in CASES[name]])


def test_every_difference_is_of_a_case() -> None:
    assert DIFFERENCES.keys() <= CASES.keys()
