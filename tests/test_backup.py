"""Backups: taken while the bridge runs, stopped or was killed; restored as the README says.

Law under test: a backup holds exactly the commits up to one transaction, whatever is written meanwhile; it only
reads, overwrites nothing, follows no link, and is for its owner alone.
"""

import os
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from bridge.copies import back_up
from bridge.database import DATABASE, LOCK
from bridge.state import StateError
from tests.daemon import PROTOBUF, Daemon
from tests.recordings import delta_body

MakeDaemon = Callable[..., Daemon]
README = (Path(__file__).parents[1] / "README.md").read_text()
COMMITS = "claude_code_commit_count"
CLIENTS, BACKUPS = 4, 5


def commit(daemon: Daemon, session: str, count: int, minute: int = 0) -> None:
    """A session reports commits, in one delta point of a minute of its own."""
    body = delta_body("claude_code.commit.count", [count], {"session.id": session}, (10**9 + minute * 60) * 10**9)
    assert daemon.post("/v1/metrics", body, PROTOBUF).status == 200


def run_backup(daemon: Daemon, file: Path | str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "bridge", "--state-dir", str(daemon.state_dir), "backup", str(file)]
    return subprocess.run(command, env=daemon.environment, capture_output=True, text=True, timeout=30)


def sums_of(path: Path) -> tuple[int, int]:
    """The commits that a database has counted: by the lifetime total, and by its series."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as reader:
        ((total,),) = reader.execute("select coalesce(sum(value), 0) from total where name = 'commits'")
        ((series,),) = reader.execute("select coalesce(sum(value), 0) from series_value")
        return total, series


def restore(daemon: Daemon, backup: Path) -> None:
    """What the README tells people to do while the bridge is stopped."""
    shutil.copy(backup, daemon.state_dir / DATABASE)
    for suffix in ("-wal", "-shm"):
        (daemon.state_dir / f"{DATABASE}{suffix}").unlink(missing_ok=True)


# --- taking one ------------------------------------------------------------------------------------------------


def test_a_backup_of_a_running_bridge_is_told_of_and_private(daemon: Daemon) -> None:
    commit(daemon, "s", 5)
    file = daemon.directory / "a.db"
    done = run_backup(daemon, file)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(rf"{file}: {file.stat().st_size} bytes, schema \d+, as of transaction \d+\n", done.stdout)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert sums_of(file) == (5, 5)
    assert [path.name for path in daemon.directory.iterdir() if "a.db" in path.name] == ["a.db"]
    commit(daemon, "s", 1, minute=1)
    assert daemon.samples()[COMMITS] == "6"


def test_every_backup_under_load_stands_at_a_transaction(daemon: Daemon) -> None:
    """Points are acknowledged before, while and after each copy is made; total and series must agree in it."""
    commit(daemon, "first", 1)
    done = threading.Event()
    acknowledged = [0] * CLIENTS

    def send(client: int) -> None:
        minute = 0
        while not done.is_set():
            commit(daemon, f"s{client}", 1, minute)
            acknowledged[client] += 1
            minute += 1

    senders = [threading.Thread(target=send, args=(client,)) for client in range(CLIENTS)]
    for sender in senders:
        sender.start()
    try:
        for number in range(BACKUPS):
            before = sum(acknowledged)
            file = daemon.directory / f"{number}.db"
            copy = back_up(daemon.state_dir, file)
            total, series = sums_of(file)
            assert before + 1 <= total == series <= sum(acknowledged) + CLIENTS + 1
            assert copy.commits > 0
    finally:
        done.set()
        for sender in senders:
            sender.join(30)
    assert daemon.samples()[COMMITS] == str(sum(acknowledged) + 1)


@pytest.mark.parametrize("end", [Daemon.stop, Daemon.kill])
def test_a_backup_of_a_stopped_or_killed_bridge_has_everything(daemon: Daemon, end: Callable[[Daemon], object]) -> None:
    commit(daemon, "s", 5)
    end(daemon)
    (daemon.state_dir / LOCK).unlink()
    file = daemon.directory / "a.db"
    assert run_backup(daemon, file).returncode == 0
    assert sums_of(file) == (5, 5)
    assert not (daemon.state_dir / LOCK).exists(), "a backup has no need of the lock"
    daemon.start()
    assert daemon.samples()[COMMITS] == "5"


def test_what_exists_is_not_overwritten(daemon: Daemon) -> None:
    precious = daemon.directory / "precious"
    precious.write_text("precious")
    link, dangling = daemon.directory / "link", daemon.directory / "dangling"
    link.symlink_to(precious)
    dangling.symlink_to(daemon.directory / "nothing")
    for target in (precious, link, dangling, daemon.state_dir, daemon.state_dir / DATABASE):
        done = run_backup(daemon, target)
        assert done.returncode == os.EX_CANTCREAT
        assert done.stderr == f"claude-otel-bridge: {target} exists already; choose another name\n"
    assert precious.read_text() == "precious"
    assert not (daemon.directory / "nothing").exists()
    assert daemon.get("/-/ready").status == 200


def test_a_place_that_is_not_there_is_named(daemon: Daemon) -> None:
    done = run_backup(daemon, daemon.directory / "none" / "a.db")
    assert done.returncode == os.EX_CANTCREAT
    assert "none/a.db: No such file or directory" in done.stderr


def test_without_a_state_there_is_nothing_to_copy(make_daemon: MakeDaemon) -> None:
    never_started = make_daemon()
    done = run_backup(never_started, never_started.directory / "a.db")
    assert done.returncode == os.EX_NOINPUT
    assert f"there is no state in {never_started.state_dir}" in done.stderr
    assert not (never_started.directory / "a.db").exists()


def test_a_damaged_state_leaves_no_backup(tmp_path: Path) -> None:
    (tmp_path / DATABASE).write_bytes(b"garbage. " * 5000)
    with pytest.raises(StateError, match="cannot copy") as refused:
        back_up(tmp_path, tmp_path / "a.db")
    assert refused.value.exit_code == os.EX_DATAERR
    assert [path.name for path in tmp_path.iterdir()] == [DATABASE]


# --- restoring it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [Daemon.stop, Daemon.kill])
def test_a_restored_backup_counts_on_and_knows_its_points(daemon: Daemon, end: Callable[[Daemon], object]) -> None:
    commit(daemon, "s", 5)
    file = daemon.directory / "a.db"
    run_backup(daemon, file)
    end(daemon)
    restore(daemon, file)
    daemon.start()
    commit(daemon, "s", 5)
    assert daemon.samples()[COMMITS] == "5", "a repeat"
    commit(daemon, "s", 1, minute=1)
    assert daemon.samples()[COMMITS] == "6"
    assert stat.S_IMODE((daemon.state_dir / DATABASE).stat().st_mode) == 0o600


def test_a_backup_moves_a_state_to_another_place(daemon: Daemon, make_daemon: MakeDaemon) -> None:
    commit(daemon, "s", 5)
    other = make_daemon()
    other.state_dir.mkdir()
    run_backup(daemon, other.state_dir / DATABASE)
    other.start()
    assert other.samples()[COMMITS] == "5"


def test_the_commands_of_the_readme_back_up_and_restore(make_daemon: MakeDaemon) -> None:
    """As they stand there, in an empty home."""
    section = README.partition("## Backup, restore, upgrade")[2].partition("\n## ")[0]
    take, put_back = re.findall(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    daemon = make_daemon()
    daemon.state_dir = daemon.directory / ".local" / "state" / "claude-otel-bridge"
    daemon.start()
    commit(daemon, "s", 5)
    tell = f'#!/bin/sh\nexec {sys.executable} -m bridge "$@"\n'
    program = daemon.directory / ".venv" / "bin" / "claude-otel-bridge"
    program.parent.mkdir(parents=True)
    program.write_text(tell)
    program.chmod(0o755)
    environment = {**daemon.environment, "PYTHONPATH": str(Path(__file__).parents[1])}

    def follow(commands: str) -> None:
        subprocess.run(["sh", "-ec", commands], cwd=daemon.directory, env=environment, check=True, timeout=60)

    follow(take)
    commit(daemon, "s", 1, minute=1)
    daemon.kill()
    follow(put_back)
    daemon.start()
    assert sums_of(daemon.state_dir / DATABASE) == (5, 5)
