"""The first look at a large tree of transcripts: the bridge and ccusage on the same files, in alternating order.

    python -m tests.bench.backfill [--files 2000] [--megabytes 1000 4000] [--runs 3] [--ccusage PATH] [--tree DIRECTORY]
    python -m tests.bench.backfill --tool gemini_cli [--files 800] [--megabytes 1300] ...
    python -m tests.bench.backfill --tool codex [--packed] [--files 300] ...

The trees and the states lie in a temporary directory unless DIRECTORY is given, where the trees are kept for next time.
The bridge's time runs from the start of the process until its log says that history is read; CPU and memory are those
of the process until then. What it stored is compared with what the tree's generator decided; a difference is an error.
`--profile` says instead where the time of reading and of storing goes, each alone and in this process.
"""

import argparse
import cProfile
import json
import os
import pstats
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from bridge import pricing, reading
from bridge.pricing import normalise_model
from bridge.store import Store
from bridge.tools import known
from bridge.tools.claude_code_lines import TRANSCRIPTS
from bridge.usage import UsageBooks
from tests import codex_tree, gemini_tree
from tests.daemon import Daemon
from tests.transcript_tree import START_MS, list_price, write_tree

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

TICKS = os.sysconf("SC_CLK_TCK")


class Run(NamedTuple):
    """Seconds, CPU seconds, and the peak of resident memory in MB."""

    wall: float
    cpu: float
    memory: float


class Sums(NamedTuple):
    """What a tree holds: the tokens by model and type, and the cost in nano-dollars."""

    tokens: dict[str, dict[str, int]]
    cost: int


def make_tree(directory: Path, files: int, size: int) -> Sums:
    """The tree, made unless it is there, and its truth, kept beside it."""
    truth = directory / "truth.json"
    if not truth.exists():
        made = write_tree(directory, files=files, size=size)
        tokens: dict[str, Counter[str]] = {}
        for model, counts in made.tokens().items():
            kept = {name: counts[name] for name in ("input", "output", "read", "write_5m", "write_1h", "requests")}
            tokens.setdefault(normalise_model(model), Counter()).update(kept)
        truth.write_text(json.dumps([tokens, made.cost(list_price)]))
    found, cost = json.loads(truth.read_text())
    return Sums(found, cost)


def make_chats(directory: Path, files: int, size: int) -> Sums:
    """The same of Gemini CLI's chats; nobody says what they cost."""
    truth = directory / "truth.json"
    if not truth.exists():
        tokens: dict[str, Counter[str]] = {}
        for one in gemini_tree.write_store(directory / ".gemini" / "tmp", files=files, size=size):
            counts = {"input": one.input, "output": one.output, "read": one.read, "write_5m": 0, "write_1h": 0}
            sums = tokens.setdefault(one.model, Counter(dict.fromkeys((*counts, "requests"), 0)))
            sums.update({**counts, "requests": 1})
        truth.write_text(json.dumps([tokens, 0]))
    found, cost = json.loads(truth.read_text())
    return Sums(found, cost)


def make_rollouts(directory: Path, files: int, size: int) -> Sums:
    """The same of Codex's rollouts."""
    truth = directory / "truth.json"
    if not truth.exists():
        made = codex_tree.write_store(directory, files, size)
        for counts in made.values():
            counts["write_5m"] = counts.pop("written")
            counts["write_1h"] = 0
        truth.write_text(json.dumps([made, 0]))
    found, cost = json.loads(truth.read_text())
    return Sums(found, cost)


def pack(tree: Path) -> None:
    """Pack all rollouts that are not packed yet, as Codex does it."""
    for path in sorted(tree.rglob("*.jsonl")):
        path.with_name(f"{path.name}.zst").write_bytes(zstd.compress(path.read_bytes()))
        path.unlink()


def stored(database: Path) -> Sums:
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    sql = (
        "select name, sum(input), sum(output), sum(cache_read), sum(cache_write_5m), sum(cache_write_1h),"
        " sum(requests), sum(cost) from rollup join model on model.id = rollup.model group by name"
    )
    rows = connection.execute(sql).fetchall()
    connection.close()
    names = ("input", "output", "read", "write_5m", "write_1h", "requests")
    return Sums({row[0]: dict(zip(names, row[1:7], strict=True)) for row in rows}, sum(row[7] for row in rows))


def run_bridge(tree: Path, truth: Sums, variable: str = "CLAUDE_CONFIG_DIR") -> Run:
    with tempfile.TemporaryDirectory() as directory:
        daemon = Daemon(Path(directory), env={variable: str(tree), "PYTHONWARNINGS": ""})
        began = time.perf_counter()
        daemon.spawn()
        assert daemon.process is not None
        peak = 0
        while "history is read" not in daemon.log:
            if daemon.process.poll() is not None:
                raise SystemExit(daemon.log)
            peak = max(peak, sum(map(memory_of, (daemon.process.pid, *children_of(daemon.process.pid)))))
            time.sleep(0.02)
        wall = time.perf_counter() - began
        fields = Path(f"/proc/{daemon.process.pid}/stat").read_text().rpartition(")")[2].split()
        cpu = sum(map(int, fields[11:15])) / TICKS  # with the processes that it had and that have ended
        daemon.stop()
        found = stored(daemon.state_dir / "state.db")
        if found.tokens != truth.tokens or truth.cost not in (0, found.cost):
            raise SystemExit(f"stored {found}\n truth {truth}")
        return Run(wall, cpu, peak / 1000)


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def memory_of(pid: int) -> int:
    """The most kilobytes that a process has had in memory so far; 0 of one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def run_ccusage(command: str, tree: Path) -> tuple[Run, dict[str, Any]]:
    began = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [command, "daily", "--json", "--offline"],
            stdout=output,
            env={**os.environ, "CLAUDE_CONFIG_DIR": str(tree), "HOME": str(tree)},
        )
        _, status, used = os.wait4(process.pid, 0)  # with what its own children used
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        totals: dict[str, Any] = json.load(output)["totals"]
    return Run(wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1000), totals


def best(runs: list[Run]) -> Run:
    return Run(min(run.wall for run in runs), min(run.cpu for run in runs), max(run.memory for run in runs))


def profile(tree: Path) -> None:
    """Where the time goes: reading all files, then storing what they said."""
    found = reading.files(str(tree / "projects"), TRANSCRIPTS)
    rows = [row for path, _ in found if (row := reading.first_row(TRANSCRIPTS, path))]
    chunks: list[reading.Chunk] = []

    def read() -> None:
        for first in rows:
            row = first
            while row.history < row.history_end:
                chunks.append(reading.read_old(TRANSCRIPTS, row))
                row = chunks[-1].row

    with tempfile.TemporaryDirectory() as directory:
        store = Store(Path(directory))
        store.open(START_MS)
        books = UsageBooks(store, pricing.load({}).cost, normalise_model, known.REPORTING)
        books.load()

        def write() -> None:
            for chunk in chunks:
                with store.transaction():
                    books.write_transcript(chunk.row)
                    books.load_history(chunk.usages, START_MS)

        def finish() -> None:
            with store.transaction():
                books.finish_history()

        for name, work in (("read", read), ("write", write), ("finish", finish)):
            profiler = cProfile.Profile()
            began = time.process_time()
            profiler.runcall(work)
            sys.stdout.write(f"\n== {name}: {time.process_time() - began:.2f} CPU-s under the profiler\n")
            pstats.Stats(profiler, stream=sys.stdout).sort_stats("tottime").print_stats(18)
        store.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[1000])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--ccusage", default=shutil.which("ccusage"), help="its program; npm install ccusage@20.0.24")
    parser.add_argument("--tree", type=Path, help="keep the trees below this directory")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--tool", choices=("claude_code", "gemini_cli", "codex"), default="claude_code")
    parser.add_argument("--packed", action="store_true", help="pack the rollouts of Codex")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        for megabytes in options.megabytes:
            tree = (options.tree or Path(directory)).resolve() / f"{options.files}-{megabytes}"
            tree.mkdir(parents=True, exist_ok=True)
            if options.tool == "gemini_cli":
                truth = make_chats(tree, options.files, megabytes * 10**6)
                measure(tree, [*(tree / ".gemini").rglob("*.json*")], truth, "GEMINI_CLI_HOME", options.runs)
                continue
            if options.tool == "codex":
                truth = make_rollouts(tree, options.files, megabytes * 10**6)
                if options.packed:
                    pack(tree)
                measure(tree, [*tree.rglob("rollout-*")], truth, "CODEX_HOME", options.runs)
                continue
            truth = make_tree(tree, options.files, megabytes * 10**6)
            if options.profile:
                profile(tree)
            else:
                compare(tree, truth, options.ccusage, options.runs)


def measure(tree: Path, paths: list[Path], truth: Sums, variable: str, runs: int) -> None:
    size = sum(path.stat().st_size for path in paths) / 1e9
    run = best([run_bridge(tree, truth, variable) for _ in range(runs)])
    requests = sum(counts["requests"] for counts in truth.tokens.values())
    sys.stdout.write(
        f"{len(paths)} files, {size:.3f} GB, {requests} requests; best of {runs} runs\n"
        f"wall {run.wall:.2f} s, CPU {run.cpu:.2f} s, {run.cpu / size:.2f} CPU-s/GB, peak {run.memory:.0f} MB\n"
    )


def compare(tree: Path, truth: Sums, ccusage: str | None, runs: int) -> None:
    paths = list((tree / "projects").rglob("*.jsonl"))
    size = sum(path.stat().st_size for path in paths) / 1e9
    bridge: list[Run] = []
    other: list[Run] = []
    totals: dict[str, Any] = {}
    for number in range(runs):
        for program in ("bridge", "ccusage") if number % 2 == 0 else ("ccusage", "bridge"):
            if program == "bridge":
                bridge.append(run_bridge(tree, truth))
            elif ccusage:
                run, totals = run_ccusage(ccusage, tree)
                other.append(run)
    requests = sum(counts["requests"] for counts in truth.tokens.values())
    lines = [
        f"\n{len(paths)} files, {size:.3f} GB, {requests} requests, {truth.cost / 1e9:.2f} USD; best of {runs} runs",
        "",
        "| | wall s | CPU s | CPU s/GB | peak MB | USD |",
        "|---|---|---|---|---|---|",
    ]
    shown = [("bridge", best(bridge), f"{truth.cost / 1e9:.2f}")]
    if other:
        shown.append(("ccusage", best(other), f"{totals['totalCost']:.2f}"))
    for name, run, dollars in shown:
        row = f"| {name} | {run.wall:.2f} | {run.cpu:.2f} | {run.cpu / size:.2f} | {run.memory:.0f} | {dollars} |"
        lines.append(row)
    if other:
        ratios = " | ".join(f"{ours / theirs:.2f}" for ours, theirs in zip(shown[0][1], shown[1][1], strict=True))
        wall, cpu, memory = ratios.split(" | ")
        lines.append(f"| bridge / ccusage | {wall} | {cpu} | {cpu} | {memory} | |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
