"""A museum of seeded bugs: each breaks one rule on purpose, and the tests that guard the rule have to turn red.

    python -m tests.museum                 all of them, and the guards on the tree as it is, which have to be green
    python -m tests.museum ack_early ...   some of them

An exhibit is one bug: in which file which text is replaced by which, and the tests that must catch it. `run` copies the
tree, breaks the copy and runs the guards there. Every ordinary run checks that each text stands in its file, once.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
GREEN, RED = 0, 1
SECONDS = 900


class Edit(NamedTuple):
    """In a file one text, which stands there once, becomes another."""

    file: str
    old: str
    new: str


class Exhibit(NamedTuple):
    """A rule, the bug that breaks it, and the arguments of pytest that find it."""

    rule: str
    edits: tuple[Edit, ...]
    guards: tuple[str, ...]


class Stale(Exception):
    """The text that an exhibit replaces no longer stands in its file, once."""


def apply(exhibit: Exhibit, root: Path) -> None:
    """Break a tree. Raises Stale."""
    for file, old, new in exhibit.edits:
        text = (root / file).read_text()
        if text.count(old) != 1:
            raise Stale(f"{file} has {text.count(old)} times: {old!r}")
        (root / file).write_text(text.replace(old, new))


def copy_tree(target: Path) -> None:
    """The tracked and new files of the repository, as they are."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


def verdict(guards: Iterable[str], exhibit: Exhibit | None = None) -> tuple[int, str]:
    """The exit code of the guards on a copy of the tree, broken by an exhibit, and the last lines of their output."""
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name) / "tree"
        tree.mkdir()
        copy_tree(tree)
        if exhibit is not None:
            apply(exhibit, tree)
        options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--basetemp", str(Path(name) / "tests")]
        command = [sys.executable, "-m", "pytest", *options, *guards]
        try:
            done = subprocess.run(
                command, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS
            )
        except subprocess.TimeoutExpired:
            return -1, f"not done within {SECONDS} s"
        return done.returncode, "\n".join(done.stdout.splitlines()[-4:])


def run(names: Iterable[str]) -> list[str]:
    """Show exhibits to their guards; the names of those that no guard caught."""
    from tests.museum.exhibits import EXHIBITS

    missed = []
    names = [*names]
    for number, name in enumerate(names, 1):
        code, output = verdict(EXHIBITS[name].guards, EXHIBITS[name])
        caught = code == RED
        sys.stderr.write(f"{number} of {len(names)} {'caught' if caught else 'MISSED'} {name}: {EXHIBITS[name].rule}\n")
        if not caught:
            sys.stderr.write(f"exit code {code}\n{output}\n")
            missed.append(name)
    return missed
