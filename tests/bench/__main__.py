"""The bridge beside what people would use instead: one run, one table.

    python -m tests.bench [PART ...] [--peers bridge,collector] [--repeat 3] [--output DIRECTORY] [--quick]

Parts: ingest, formats, slow-disk, series, visible, idle, start, steady, truth; all of them by default, which takes
about half an hour with all peers. Peers that cannot be built here are left out and named. The results go to
`bench.md` and `bench.json` in DIRECTORY, which is the cache of the peers by default; parts measured before stay in
them until they are measured again.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.bench import peers as catalogue
from tests.bench.parts import PARTS, Options, Results, Row

QUICK = Options(
    repeat=1,
    requests=640,
    connections=(16,),
    sessions=(34, 334),
    steady_sessions=100,
    steady_seconds=10,
    idle_seconds=10,
)


def machine() -> str:
    """Cores, clock and software, without names."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    cores = Path("/proc/cpuinfo").read_text().count("processor\t")
    clock = f"{float(fields.get('cpu MHz', '0')) / 1000:.1f} GHz"
    return (
        f"{cores} cores of {clock}, {platform.system()} {platform.release().split('-')[0]} {platform.machine()},"
        f" Python {platform.python_version()}"
    )


def commit() -> str:
    """The commit of the source tree, marked where something is not committed."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )  # fmt: skip
    return done.stdout.strip() or "unknown"


def table(document: dict[str, Any]) -> str:
    """The results as Markdown; `ratio` is how much better the bridge is than the best peer (below 1: worse)."""
    names = list(document["versions"])
    lines = [
        f"Measured {document['date']} on {document['machine']}, commit {document['commit']}: "
        + ", ".join(f"{name} {version}" for name, version in document["versions"].items())
        + ".",
        "",
        f"| what | unit | {' | '.join(names)} | ratio to the best peer |",
        f"|---|---|{'---:|' * len(names)}---|",
    ]
    for rows in document["parts"].values():
        for row in rows:
            medians = {name: statistics.median(values) for name, values in row["values"].items()}
            shown = [_number(medians[name]) if name in medians else "" for name in names]
            lines.append(f"| {row['label']} | {row['unit']} | {' | '.join(shown)} | {_ratio(row, medians)} |")
    return "\n".join(lines) + "\n"


def _ratio(row: dict[str, Any], medians: dict[str, float]) -> str:
    others = {name: value for name, value in medians.items() if name != "bridge"}
    if "bridge" not in medians or not others:
        return ""
    best = (max if row["is_higher_better"] else min)(others, key=lambda name: others[name])
    ours, theirs = medians["bridge"], others[best]
    better, worse = (ours, theirs) if row["is_higher_better"] else (theirs, ours)
    return f"{_number(better / worse) if worse else '∞'} ({best})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def main() -> int:
    """Run the parts that were asked for and write what came of them."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--peers", default=",".join(catalogue.ALL), help="comma list (default: %(default)s)")
    parser.add_argument("--repeat", type=int, help="repetitions of each part (default: 3)")
    parser.add_argument("--output", type=Path, default=None, help="where bench.md and bench.json go")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller loads, once each")
    arguments = parser.parse_args()
    if unknown := (set(arguments.parts) - PARTS.keys()) | (set(arguments.peers.split(",")) - catalogue.ALL.keys()):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    options = QUICK if arguments.quick else Options()
    if arguments.repeat:
        options = options._replace(repeat=arguments.repeat)
    chosen = []
    for name in arguments.peers.split(","):
        try:
            chosen.append(catalogue.ALL[name]())
        except catalogue.PeerMissing as error:
            catalogue.say(f"without {name}: {error}")
    directory = arguments.output or catalogue.cache()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "bench.json"
    document = json.loads(path.read_text()) if path.exists() else {"versions": {}, "parts": {}}
    document["date"] = f"{datetime.now(UTC):%Y-%m-%d}"
    document["machine"], document["commit"] = machine(), commit()
    document["versions"] |= {peer.name: peer.version for peer in chosen}
    for name in arguments.parts or PARTS:
        results = Results()
        PARTS[name](chosen, options, results)
        document["parts"][name] = [_row(row, values) for row, values in results.values.items()]
        document["parts"] = {part: document["parts"][part] for part in PARTS if part in document["parts"]}
        path.write_text(json.dumps(document, indent=1))
        (directory / "bench.md").write_text(table(document))
        sys.stdout.write(table({**document, "parts": {name: document["parts"][name]}}))
    catalogue.say(f"written: {directory / 'bench.md'}, {path}")
    return 0


def _row(row: Row, values: dict[str, list[float]]) -> dict[str, Any]:
    return {**row._asdict(), "values": values}


if __name__ == "__main__":
    sys.exit(main())
