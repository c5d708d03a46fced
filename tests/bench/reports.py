"""How long reports and the status line take on a big state: whole processes, and Python's own start beside them.

    python -m tests.bench.reports [--days 365] [--sessions 10] [--runs 10]

The state has that many sessions a day, each of two to six quarters of an hour and two models, in twenty projects. A
process is measured from its start to its end; CPU seconds are the system's for it. `--python` names an interpreter in
whose environment the bridge is installed, since an editable installation starts more slowly.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bridge.database import DATABASE
from bridge.reports import KINDS
from bridge.store import Store
from bridge.usage_store import REQUESTS, RollupKey, UsageStore

COMMANDS = (
    *(f"report {kind}" for kind in (*KINDS, "blocks")),
    *(f"report {kind} {form}" for kind in ("session", "blocks") for form in ("--json", "--csv")),
)
NOW = int(time.time())


def make_state(directory: Path, days: int, sessions: int) -> int:
    """A state of usage up to now; the number of its rollups."""
    choose = random.Random(1)
    store = Store(directory)
    store.open(NOW * 1000)
    with store.transaction():
        usage = UsageStore(store)
        usage.add_root("/home/ann/.claude/projects", looked=True)
        models = [usage.add_model("claude_code", f"claude-model-{number}").id for number in range(6)]
        projects = [usage.label(f"/home/ann/project-{number}") for number in range(20)]
        rows = []
        for number in range(days * sessions):
            session = usage.session("claude_code", f"{number:08x}-0000-4000-8000-000000000000").id
            start, project = NOW // 900 - number * 96 // sessions, choose.choice(projects)
            used = choose.sample(models, 2)
            for quarter in range(start - choose.randrange(1, 6), start + 1):
                for model in used:
                    first, output, read, short, long, cost = (choose.randrange(10**6) for _ in range(6))
                    key = RollupKey(quarter, model, session, project, 0, REQUESTS)
                    rows.append((key, (choose.randrange(1, 60), first, output, read, short, long, cost, 0)))
        usage.add_to_rollups(rows)
    store.close()
    return len(rows)


def measured(command: list[str], environment: dict[str, str], runs: int) -> tuple[float, float]:
    """The least wall and CPU milliseconds of some runs."""
    found = []
    for _ in range(runs):
        began = time.perf_counter()
        # Not from the clone, which Python would take the bridge from whatever is installed.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment, cwd=environment["HOME"]
        )
        assert process.stdin is not None
        process.stdin.write(b'{"model":{"display_name":"Opus"},"cost":{"total_cost_usd":1}}')
        process.stdin.close()
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{command} ended with {process.returncode}")
        found.append((1000 * wall, 1000 * (used.ru_utime + used.ru_stime)))
    walls, cpus = zip(*found, strict=True)
    return min(walls), min(cpus)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--days", type=int, default=365)
    parser.add_argument("--sessions", type=int, default=10)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--python", default=sys.executable)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        directory = Path(home) / "state"
        directory.mkdir()
        rows = make_state(directory, options.days, options.sessions)
        size = (directory / DATABASE).stat().st_size / 1e6
        sys.stdout.write(f"{options.days * options.sessions} sessions, {rows} rollups, {size:.1f} MB\n\n")
        sys.stdout.write("| | wall ms | CPU ms |\n|---|---|---|\n")
        environment = {"HOME": home, "BRIDGE_STATE_DIR": str(directory)}
        program = [options.python, "-m", "bridge"]
        commands = {"python alone": [options.python, "-c", "pass"], "statusline": [*program, "statusline"]}
        commands |= {command: [*program, *command.split()] for command in COMMANDS}
        commands["report daily, half-hour zone"] = [*program, "report", "--timezone", "Asia/Kolkata"]
        commands["report daily --since 30d"] = [*program, "report", "--since", "30d"]
        for name, command in commands.items():
            wall, cpu = measured(command, environment, options.runs)
            sys.stdout.write(f"| {name} | {wall:.0f} | {cpu:.0f} |\n")


if __name__ == "__main__":
    main()
