"""Recorded runs as metrics, events and transcripts: each alone and together, in any order, live and across kills.

What the mock API was told to report is the truth. A bridge must show it wherever a source of the run has it: metrics
and events have all that arrived, transcripts all but auxiliary calls and what old clients never wrote down.
"""

import json
import random
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.daemon import Daemon
from tests.recordings import DIRECTORY, EXPECTED, RUNS, Request, xrg_samples
from tests.test_transcripts import append, eventually, follow_from_here, projects, select, shown, wait_until_read

FILES = DIRECTORY / "transcripts"
IN_TRANSCRIPTS: dict[str, dict[str, dict[str, int]]] = json.loads((FILES / "expected.json").read_text())
SOURCES = ("/v1/metrics", "/v1/logs", "transcripts")
SUBSETS = [subset for size in (1, 2, 3) for subset in combinations(SOURCES, size)]
KINDS = ("input", "output", "cacheRead", "cacheCreation")
_FIRST = re.compile(rb'"timestamp":"([^"]+)"')
# Two short-lived processes of this run ended before they had exported anything.
ONLY_IN_TRANSCRIPTS = {
    "v2077-compact": {
        "claude-sonnet-4-5-20250929": {"input": 2, "output": 4, "cacheRead": 6, "cacheCreation": 8},
        "claude-haiku-4-5-20251001": {"input": 1, "output": 2, "cacheRead": 3, "cacheCreation": 4},
    }
}


class Line(NamedTuple):
    """A line of a transcript, to be appended to the file of this name below the root."""

    path: str
    content: bytes

    def send(self, daemon: Daemon) -> None:
        append(projects(daemon) / self.path, self.content)


class Body(NamedTuple):
    request: Request

    def send(self, daemon: Daemon) -> None:
        reply = self.request.post(daemon)
        assert reply.status == 200, reply.text


Piece = Line | Body


def pieces(run: str, sources: tuple[str, ...]) -> list[Piece]:
    """What a run sent and wrote, source by source."""
    found: list[Piece] = [Body(request) for request in RUNS[run] if request.path in sources]
    return [*found, *lines(run)] if "transcripts" in sources else found


def lines(run: str) -> Iterator[Line]:
    """File after file, as they were begun: a fork after what it copies."""
    root = FILES / run / "projects"
    for path in sorted(root.rglob("*.jsonl"), key=lambda path: (_FIRST.findall(path.read_bytes())[:1], path)):
        for line in path.read_bytes().splitlines(keepends=True):
            yield Line(str(path.relative_to(root)), line)


def truth(sources: tuple[str, ...], runs: list[str]) -> dict[str, Decimal]:
    """The four token samples of these runs."""
    sums: dict[tuple[str, str, str], Decimal] = {}
    for run in runs:
        known = EXPECTED[run]["tokens"] if sources != ("transcripts",) else IN_TRANSCRIPTS[run]
        for model, counts in known.items():
            for kind in KINDS:
                key = ("claude_code.token.usage", kind, model)
                sums[key] = sums.get(key, Decimal()) + counts[kind]
                # Beside metrics alone, those of a compaction in the same session hide what they lack.
                is_hidden = "/v1/logs" not in sources and "sonnet" in model
                if "transcripts" in sources and len(sources) > 1 and not is_hidden:
                    sums[key] += ONLY_IN_TRANSCRIPTS.get(run, {}).get(model, {}).get(kind, 0)
    return {sample: value for sample, value in xrg_samples(sums).items() if "token_usage" in sample}


def tokens(daemon: Daemon) -> dict[str, Decimal]:
    return {sample: Decimal(value) for sample, value in daemon.samples().items() if "token_usage" in sample}


def cost(daemon: Daemon) -> Decimal:
    return Decimal(daemon.samples()["claude_code_cost_usage"])


def is_complete(run: str, sources: tuple[str, ...]) -> bool:
    """Whether these sources have all that the client knew of, so that the cost can be the client's own."""
    if "transcripts" in sources and run in ONLY_IN_TRANSCRIPTS:
        return False
    return sources != ("transcripts",) or IN_TRANSCRIPTS[run] == EXPECTED[run]["tokens"]


def assert_shows(daemon: Daemon, sources: tuple[str, ...], runs: list[str]) -> None:
    if "transcripts" in sources:
        wait_until_read(daemon, projects(daemon))
    expected = truth(sources, runs)
    eventually(lambda: tokens(daemon) == expected, seconds=3)
    assert tokens(daemon) == expected
    if all(is_complete(run, sources) for run in runs):
        client = sum((value for run in runs for value in EXPECTED[run]["cost_usd"].values()), Decimal())
        assert abs(cost(daemon) - client) <= Decimal("1e-9"), runs


class Watch:
    """Looks at the counters of a bridge again and again: none may ever fall."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.last: dict[str, Decimal] = {}

    def look(self) -> None:
        now = {sample: Decimal(value) for sample, value in self.daemon.samples().items()}
        fell = [sample for sample, value in self.last.items() if now[sample] < value]
        assert not fell, f"{fell} fell from {self.last} to {now}"
        self.last = now


COMPLETE_FIRST = sorted(IN_TRANSCRIPTS, key=lambda run: (IN_TRANSCRIPTS[run] != EXPECTED[run]["tokens"], run))
"""All runs with transcripts, those first whose transcripts have all that the client used."""


@pytest.mark.parametrize("sources", SUBSETS, ids="+".join)
def test_the_truth_wherever_a_source_has_it(make_daemon: Callable[..., Daemon], sources: tuple[str, ...]) -> None:
    """Run after run, source after source; then all of it once more, and after a kill."""
    daemon = follow_from_here(make_daemon())
    watch = Watch(daemon)
    for number, run in enumerate(COMPLETE_FIRST, 1):
        for piece in pieces(run, sources):
            piece.send(daemon)
        watch.look()
        assert_shows(daemon, sources, COMPLETE_FIRST[:number])
        watch.look()
    for run in COMPLETE_FIRST[:4]:
        for piece in pieces(run, sources):
            piece.send(daemon)
    assert_shows(daemon, sources, COMPLETE_FIRST)
    daemon.kill()
    daemon.start()
    watch.look()
    assert_shows(daemon, sources, COMPLETE_FIRST)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_truth_in_any_order_and_across_kills(make_daemon: Callable[..., Daemon], seed: int) -> None:
    """All sources of all runs mixed, each file's lines in their order, with SIGKILL in between."""
    daemon = follow_from_here(make_daemon())
    watch = Watch(daemon)
    choose = random.Random(seed)
    waiting: dict[str, list[Piece]] = {}
    for run in COMPLETE_FIRST:
        for piece in pieces(run, SOURCES):
            name = piece.path if isinstance(piece, Line) else f"{run}{len(waiting)}"
            waiting.setdefault(name, []).append(piece)
    sent = 0
    kill_at = set(choose.sample(range(len(waiting)), 4))
    while waiting:
        name = choose.choice(list(waiting))
        at_once = choose.randint(1, 40)
        for piece in waiting[name][:at_once]:
            piece.send(daemon)
        waiting[name] = waiting[name][at_once:]
        if not waiting[name]:
            del waiting[name]
        if sent in kill_at:
            daemon.kill()
            if choose.random() < 0.5 and waiting:
                down = choose.choice(list(waiting))
                if isinstance(waiting[down][0], Line):
                    waiting[down].pop(0).send(daemon)
                    waiting = {key: rest for key, rest in waiting.items() if rest}
            daemon.start()
        sent += 1
        watch.look()
    assert_holds(daemon, SOURCES, COMPLETE_FIRST)
    watch.look()


def assert_holds(daemon: Daemon, sources: tuple[str, ...], runs: list[str]) -> None:
    """The store holds the truth; what is served may stand above it where a copy came before its original."""
    wait_until_read(daemon, projects(daemon))
    columns = ("input", "output", "cache_read", "cache_write")
    sums = ", ".join(f"sum({name} + max(pool_{name}, pool_metric_{name}))" for name in columns)
    expected = tuple(truth(sources, runs).values())
    ((*found,),) = eventually(lambda: select(daemon, f"select {sums} from truth"))
    assert tuple(found) == expected
    reported = "sum(input), sum(output), sum(cache_read), sum(cache_write)"
    assert select(daemon, f"select {reported} from usage_sums") == [expected]
    assert all(value >= least for value, least in zip(tokens(daemon).values(), expected, strict=True))


def test_transcripts_that_were_there_first_are_history_beside_live_ones(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon()
    for line in lines("v329-agent"):
        line.send(daemon)
    daemon.start()
    wait_until_read(daemon, projects(daemon))
    assert shown(daemon) == (0, 0)
    for line in lines("v329-json"):
        line.send(daemon)
    assert_shows(daemon, ("transcripts",), ["v329-json"])


def test_the_recordings_are_what_is_said_of_them() -> None:
    """Twelve runs, small; half of them have a transcript that lacks nothing."""
    size = sum(path.stat().st_size for path in Path(FILES).rglob("*.jsonl"))
    assert size < 700_000
    assert len(IN_TRANSCRIPTS) == 12
    assert sum(is_complete(run, ("transcripts",)) for run in IN_TRANSCRIPTS) == 7


def test_spans_are_no_requests_beside_events_and_metrics(daemon: Daemon) -> None:
    """Also where the user has named the client otherwise: `my-team`."""
    for piece in pieces("v332-traces", ("/v1/metrics", "/v1/logs", "/v1/traces")):
        piece.send(daemon)
    joined = {
        sample.partition('tool="')[2].partition('"')[0] for sample in daemon.samples("/metrics") if "ai_" in sample
    }
    assert joined - {""} == {"claude_code"}
    assert tokens(daemon) == truth(("/v1/metrics", "/v1/logs"), ["v332-traces"])
