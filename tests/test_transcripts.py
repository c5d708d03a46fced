"""The follower of transcripts, through a real bridge: what is history, what counts, how soon, and what never harms.

Most cases share one bridge and look at what a case adds; each has a project, a session and ids of its own.
"""

import asyncio
import contextlib
import errno
import os
import queue
import random
import shutil
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bridge.bookkeeper import LedgerSettings
from bridge.file_events import Directory, Watcher
from bridge.ledger import Ledger
from bridge.model import Source, TranscriptRow, Usage
from bridge.store import Store
from bridge.telemetry import Telemetry, Throttle
from bridge.tools.claude_code_lines import TRANSCRIPTS
from bridge.transcripts import Follower
from tests.daemon import Daemon
from tests.following import Sums, following
from tests.recordings import delta_body, own_metric
from tests.test_cases import rig_in
from tests.test_store import io_error, watched
from tests.transcript_tree import response

INPUT, OUTPUT = 10, 20
"""The tokens of a line that `response` writes."""
PATIENCE = 15.0
"""Seconds for what takes a tenth of one on an idle machine."""
_SAMPLE = "claude_code_token_usage"


class Tokens(NamedTuple):
    input: int
    output: int

    def __sub__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.input - other.input, self.output - other.output)


def requests(count: int) -> Tokens:
    """What `count` lines of `response` add up to."""
    return Tokens(INPUT * count, OUTPUT * count)


def shown(daemon: Daemon) -> Tokens:
    samples = daemon.samples()
    return Tokens(int(samples[f'{_SAMPLE}{{type="input"}}']), int(samples[f'{_SAMPLE}{{type="output"}}']))


def eventually(check: Callable[[], Any], *, seconds: float = PATIENCE) -> Any:
    """The first true value of `check`; its last value if there is none in time."""
    deadline = time.monotonic() + seconds
    while not (value := check()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return value


def select(daemon: Daemon, sql: str) -> list[tuple[Any, ...]]:
    """Rows of the bridge's database, while it runs."""
    with closing(sqlite3.connect(f"file:{daemon.state_dir / 'state.db'}?mode=ro", uri=True)) as connection:
        return connection.execute(sql).fetchall()


def is_read(daemon: Daemon, root: Path) -> bool:
    """Whether all complete lines of the transcripts below a root are read, history included."""
    with contextlib.suppress(sqlite3.OperationalError):  # the state is not there yet
        if select(daemon, "select 1 from root where not looked"):
            return False
        files = select(daemon, "select path, live, history, history_end from transcript")
        read = {path: live for path, live, history, end in files if history >= end}
        paths = (path for path in root.rglob("*.jsonl") if path.is_file() and not path.is_symlink())
        return bool(select(daemon, "select 1 from root")) and all(
            read.get(str(path)) == path.read_bytes().rfind(b"\n") + 1 for path in paths if path.stat().st_size
        )
    return False


def wait_until_read(daemon: Daemon, root: Path) -> None:
    assert eventually(lambda: is_read(daemon, root), seconds=2 * PATIENCE), f"not read:\n{daemon.log}"


def projects(daemon: Daemon) -> Path:
    return daemon.directory / ".claude" / "projects"


def shows(daemon: Daemon, count: int) -> bool:
    return shown(daemon) == requests(count)


def append(path: Path, *lines: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(b"".join(lines))


def rollup(daemon: Daemon) -> Tokens:
    ((first, second),) = select(daemon, "select coalesce(sum(input), 0), coalesce(sum(output), 0) from rollup")
    return Tokens(first, second)


class Place:
    """A project of its own under a running bridge: `line()` makes a new request, `counted` is what all of it added."""

    def __init__(self, daemon: Daemon, name: str) -> None:
        self.daemon = daemon
        self.name = name
        self.directory = projects(daemon) / f"-{name}"
        self.directory.mkdir(parents=True)
        self.file = self.directory / "s.jsonl"
        self.made = 0
        self._before = shown(daemon)

    def line(self, usage: dict[str, Any] | None = None, **members: Any) -> bytes:
        self.made += 1
        name = f"{self.name}-{self.made}"
        return response(f"msg_{name}", f"req_{name}", usage, **{"sessionId": self.name, **members})

    @property
    def counted(self) -> Tokens:
        return shown(self.daemon) - self._before

    def assert_counts(self, count: int) -> None:
        """That many requests count, once all is read."""
        wait_until_read(self.daemon, projects(self.daemon))
        assert eventually(lambda: self.counted == requests(count), seconds=3), self.counted
        assert self.counted == requests(count)


def has_counted(place: Place, count: int) -> bool:
    return place.counted == requests(count)


@pytest.fixture(scope="module")
def bridge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A bridge whose root was there, and empty, at its first look."""
    daemon = Daemon(tmp_path_factory.mktemp("bridge"))
    projects(daemon).mkdir(parents=True)
    daemon.start()
    wait_until_read(daemon, projects(daemon))
    yield daemon
    daemon.close()


@pytest.fixture
def place(bridge: Daemon, request: pytest.FixtureRequest) -> Place:
    return Place(bridge, request.node.name.removeprefix("test_").replace("[", "-").replace("]", ""))


def empty_root(daemon: Daemon) -> Daemon:
    projects(daemon).mkdir(parents=True)
    return daemon


def follow_from_here(daemon: Daemon) -> Daemon:
    """Start with an empty root, so that nothing is history."""
    empty_root(daemon).start()
    wait_until_read(daemon, projects(daemon))
    return daemon


# --- live ------------------------------------------------------------------------------------------------------


def test_an_appended_line_is_served_within_moments(place: Place) -> None:
    seconds = []
    for count in range(1, 13):
        began = time.monotonic()
        append(place.file, place.line())
        assert eventually(partial(has_counted, place, count))
        seconds.append(time.monotonic() - began)
    assert sorted(seconds)[-2] < 3, seconds


def test_a_session_beside_those_whose_metrics_exceed_their_transcripts_is_served_at_once(place: Place) -> None:
    """Auxiliary calls stand in no transcript; they must not hide what a new session uses."""
    old = {"session.id": f"{place.name}-old", "model": "claude-sonnet-4-5-20250929", "type": "input"}
    assert place.daemon.post(
        "/v1/metrics", delta_body("claude_code.token.usage", [5000], old), "application/x-protobuf"
    )
    append(place.directory / "old.jsonl", place.line(sessionId=f"{place.name}-old"))
    wait_until_read(place.daemon, projects(place.daemon))
    assert eventually(lambda: place.counted == Tokens(5000, OUTPUT))
    began = time.monotonic()
    append(place.file, place.line())
    assert eventually(lambda: place.counted == Tokens(5000 + INPUT, 2 * OUTPUT))
    assert time.monotonic() - began < 3


def test_a_line_counts_when_it_is_complete(place: Place) -> None:
    whole, half = place.line(), place.line()
    append(place.file, whole, half[:100])
    place.assert_counts(1)
    append(place.file, half[100:-1])
    append(place.directory / "other.jsonl", place.line())
    place.assert_counts(2)
    append(place.file, half[-1:])
    place.assert_counts(3)


def test_a_growing_output_counts_once(place: Place) -> None:
    for output in (1, 1, 7, OUTPUT):
        line = response(f"msg_{place.name}", f"req_{place.name}", {"output_tokens": output})
        append(place.file, line)
    place.assert_counts(1)


def test_two_writers_of_one_file(place: Place) -> None:
    lines = [place.line() for _ in range(200)]

    def write(part: list[bytes]) -> None:
        for line in part:
            append(place.file, line)

    writers = [threading.Thread(target=write, args=(lines[at::2],)) for at in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    place.assert_counts(200)


def test_files_in_new_and_deep_directories(place: Place) -> None:
    append(place.file, place.line())
    append(place.directory / "s" / "subagents" / "agent-1.jsonl", place.line(isSidechain=True))
    append(place.directory / "s" / "subagents" / "workflows" / "run" / "agent-2.jsonl", place.line(isSidechain=True))
    for number in range(30):
        append(place.directory / "/".join("abcdefgh") / str(number) / "x.jsonl", place.line())
    place.assert_counts(33)


# --- files that change ------------------------------------------------------------------------------------------


def test_a_truncated_file_is_read_again_and_counts_once(place: Place) -> None:
    first, second = place.line(), place.line()
    append(place.file, first, second)
    place.assert_counts(2)
    os.truncate(place.file, len(first))
    append(place.file, place.line())
    place.assert_counts(3)


def test_a_replaced_file_is_read_from_its_start(place: Place) -> None:
    append(place.file, place.line())
    place.assert_counts(1)
    new = place.directory / "new"
    new.write_bytes(place.line() + place.line() + place.line())
    new.rename(place.file)
    place.assert_counts(4)


def test_a_file_overwritten_in_place_is_read_from_its_start(place: Place) -> None:
    """Even if it was so short at first that little of its beginning was known."""
    short = b'{"type":"user"}\n'
    append(place.file, short)
    place.assert_counts(0)
    append(place.file, place.line())
    place.assert_counts(1)
    place.file.write_bytes(short + place.line() + place.line() + place.line())
    place.assert_counts(4)


def test_a_renamed_file_and_directory_count_once(place: Place) -> None:
    append(place.file, place.line())
    place.assert_counts(1)
    moved = place.file.rename(place.directory / "moved.jsonl")
    append(moved, place.line())
    place.assert_counts(2)
    place.directory.rename(place.directory.with_name(f"{place.directory.name}-moved"))
    append(place.directory.with_name(f"{place.directory.name}-moved") / "moved.jsonl", place.line())
    place.assert_counts(3)


def test_a_deleted_file_keeps_what_it_counted(place: Place) -> None:
    append(place.file, place.line())
    place.assert_counts(1)
    place.file.unlink()
    append(place.directory / "next.jsonl", place.line())
    place.assert_counts(2)


def test_an_older_copy_restored_counts_once(place: Place) -> None:
    append(place.file, place.line())
    old = place.file.read_bytes()
    append(place.file, place.line())
    place.assert_counts(2)
    place.file.unlink()
    place.file.write_bytes(old)
    place.assert_counts(2)
    append(place.file, place.line())
    place.assert_counts(3)


def test_a_fork_of_a_session_counts_once(place: Place) -> None:
    lines = [place.line(), place.line()]
    append(place.file, *lines)
    place.assert_counts(2)
    fork = [line.replace(place.name.encode() + b'"', b'fork"') for line in lines]
    append(place.directory / "fork.jsonl", *fork, place.line())
    place.assert_counts(3)


# --- what is no transcript --------------------------------------------------------------------------------------


def test_symbolic_links_are_not_followed(place: Place, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    append(outside / "x.jsonl", place.line())
    (place.directory / "file.jsonl").symlink_to(outside / "x.jsonl")
    (place.directory / "directory").symlink_to(outside)
    (place.directory / "loop").symlink_to(place.directory)
    (place.directory / "broken.jsonl").symlink_to(outside / "nothing")
    append(place.file, place.line())
    place.assert_counts(1)
    append(outside / "x.jsonl", place.line())
    append(outside / "y.jsonl", place.line())
    append(place.file, place.line())
    place.assert_counts(2)
    time.sleep(0.5)  # for an event that should not have been told
    assert place.counted == requests(2)


def test_pipes_and_directories_named_like_transcripts_do_no_harm(place: Place) -> None:
    os.mkfifo(place.directory / "pipe.jsonl")
    (place.directory / "directory.jsonl").mkdir()
    append(place.directory / "directory.jsonl" / "x.jsonl", place.line())
    append(place.directory / "not-a-transcript.json", place.line())
    append(place.file, place.line())
    place.assert_counts(2)


def test_names_that_are_no_text_do_no_harm(make_daemon: Callable[..., Daemon]) -> None:
    daemon = follow_from_here(make_daemon())
    name = os.fsencode(projects(daemon)) + b"/\xff\xfe.jsonl"
    line = response("msg_1", "req_1")
    with open(name, "wb") as file:  # noqa: PTH123  # a Path cannot say this name in a test's output
        file.write(line)
    append(projects(daemon) / "p" / "x.jsonl", response("msg_2", "req_2"))
    assert eventually(lambda: shown(daemon).input >= INPUT)
    append(projects(daemon) / "p" / "x.jsonl", response("msg_3", "req_3"))
    assert eventually(lambda: shown(daemon) == requests(3)), (shown(daemon), daemon.log)
    daemon.restart()
    assert shown(daemon) == requests(3)


def test_a_directory_whose_name_is_no_text_ends_the_events_of_no_other(tmp_path: Path) -> None:
    told: queue.SimpleQueue[set[str]] = queue.SimpleQueue()
    above, beside = tmp_path / "above", tmp_path / "beside"
    strange = Path(os.fsdecode(os.fsencode(above) + b"/\xff\xfe"))
    for directory in (strange, above / "near", beside):
        directory.mkdir(parents=True)
    watcher = Watcher((Directory(str(tmp_path), 0, 0),), told.put)

    def tells_of(path: Path) -> bool:
        append(path, b"{}")
        with contextlib.suppress(queue.Empty):
            return any(str(path) in told.get(timeout=1) for _ in range(9))
        return False

    try:
        assert eventually(lambda: watcher.unwatched == {str(above)})
        assert eventually(lambda: tells_of(beside / "a.jsonl"))
        assert eventually(lambda: tells_of(above / "near" / "b.jsonl"))
        (beside / "new").mkdir()
        assert eventually(lambda: tells_of(beside / "new" / "c.jsonl"))
        assert watcher.has_events
        assert watcher.unwatched == {str(above)}
    finally:
        watcher.stop()


def test_an_unreadable_file_is_counted_and_read_when_it_can_be(make_daemon: Callable[..., Daemon]) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    daemon = follow_from_here(make_daemon())
    path = projects(daemon) / "p" / "x.jsonl"
    path.parent.mkdir()
    path.touch(mode=0)
    os.chmod(path, 0o200)  # noqa: PTH101
    append(path, response("msg_1", "req_1"))
    assert eventually(lambda: own_metric(daemon, "bridge_transcript_errors_total") > 0)
    path.chmod(0o600)
    assert eventually(lambda: shown(daemon) == requests(1))


@pytest.mark.parametrize("call", ["scandir", "open"])
def test_history_stays_history_and_news_news_when_descriptors_run_out(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file or directory that cannot be opened then is not taken for an empty or absent one."""
    root = tmp_path / "projects"
    root.mkdir()
    (root / "old.jsonl").write_bytes(response("msg_1", "req_1"))
    works, left = getattr(os, call), 0

    def fails(path: Any = ".", *rest: Any, **options: Any) -> Any:
        nonlocal left
        if left and str(path).startswith(str(root)):
            left -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
        return works(path, *rest, **options)

    async def story() -> Sums:
        nonlocal left
        left = 2
        async with following(tmp_path / "state", {str(root): TRANSCRIPTS}) as bridge:
            assert not bridge.served("claude_code")
            left = 2 if call == "open" else 0
            (root / "new.jsonl").write_bytes(response("msg_2", "req_2"))
            assert await asyncio.to_thread(eventually, lambda: bridge.served("claude_code"))
            assert [model["input"] for model in bridge.served("claude_code").values()] == [INPUT]
            return await bridge.requests()

    monkeypatch.setattr(os, call, fails)
    monkeypatch.setattr("bridge.transcripts.ROOT_SECONDS", 0.01)
    assert sum(tokens["input"] for tokens in asyncio.run(story()).values()) == 2 * INPUT
    assert not left


# --- what stands in lines ---------------------------------------------------------------------------------------


def test_long_lines(place: Place) -> None:
    """A line of 300 kB counts, one of 20 MB is passed over, and what follows both counts."""
    append(place.file, place.line(content="x" * 300_000), place.line())
    before = own_metric(place.daemon, "bridge_transcript_lines_refused_total")
    append(place.file, place.line(content="x" * 20_000_000))
    append(place.file, place.line())
    place.assert_counts(3)
    assert own_metric(place.daemon, "bridge_transcript_lines_refused_total") == before + 1


def test_damaged_lines_cost_no_neighbour(place: Place) -> None:
    refused = own_metric(place.daemon, "bridge_transcript_lines_refused_total")
    append(
        place.file,
        b"\xef\xbb\xbf" + place.line(),
        b"\0" * 5000 + place.line(),
        place.line(content="@").replace(b"@", b"\xff\xfe\xc3"),
        place.line()[:-40] + b"\n",
        b"[" * 100_000 + b'"input_tokens": 1\n',
        b'null\n"input_tokens"\n{"input_tokens":[]}\n\n',
        place.line({"input_tokens": -1}),
        place.line({"input_tokens": 10**13}),
        place.line({"input_tokens": 1.5}),
        place.line().replace(b'"input_tokens":10', b'"input_tokens":' + b"9" * 500),
        place.line().replace(b'"input_tokens":10', b'"input_tokens":NaN'),
        place.line(timestamp="not a time", cwd=5, requestId={}),
        place.line(timestamp="0001-01-01T00:00:00+23:59"),
        place.line(timestamp="9999-12-31T23:59:59.999-23:59"),
        place.line(cwd="a\0b"),
    )
    place.assert_counts(7)
    assert own_metric(place.daemon, "bridge_transcript_lines_refused_total") >= refused + 7


@pytest.mark.parametrize("when", ["live", "history"])
def test_absurd_numbers_are_no_poison(make_daemon: Callable[..., Daemon], when: str) -> None:
    """Whatever a file says, the bridge goes on, and starts again."""
    counts = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    most = dict.fromkeys(counts, 10**12)
    lines = [
        response(f"msg_{at}", f"req_{at}", {**most, "input_tokens": 10**12 - at}, model="claude-opus-4-1")
        for at in range(2000)
    ]
    daemon = make_daemon()
    absurd = projects(daemon) / "p" / "absurd.jsonl"
    if when == "history":
        append(absurd, *lines)
        daemon.start()
    else:
        follow_from_here(daemon)
        append(absurd, *lines)
    wait_until_read(daemon, projects(daemon))
    daemon.restart()
    before = daemon.samples()["claude_code_cost_usage"]
    append(projects(daemon) / "p" / "x.jsonl", response("msg_x", "req_x", model="claude-sonnet-4-5"))
    wait_until_read(daemon, projects(daemon))
    assert daemon.get("/-/ready").status == 200
    assert float(daemon.samples()["claude_code_cost_usage"]) >= float(before)
    assert select(daemon, "select sum(input) from usage where is_counted and input = 10") == [(INPUT,)]


def test_one_id_for_everything_takes_no_longer(make_daemon: Callable[..., Daemon]) -> None:
    """Some gateways give every message the same id."""
    daemon = follow_from_here(make_daemon())
    lines = [response("msg_const", None, {"input_tokens": count}) for count in range(1, 1501)]
    began = time.monotonic()
    append(projects(daemon) / "p" / "x.jsonl", *lines)
    wait_until_read(daemon, projects(daemon))
    assert time.monotonic() - began < 10
    assert eventually(lambda: shown(daemon) == Tokens(1500 * 1501 // 2, 1500 * OUTPUT))


# --- history ----------------------------------------------------------------------------------------------------


def test_what_stands_there_at_the_first_look_is_history(make_daemon: Callable[..., Daemon]) -> None:
    daemon = empty_root(make_daemon())
    old = projects(daemon) / "p" / "old.jsonl"
    history = [response(f"msg_{at}", f"req_{at}") for at in range(5)]
    unfinished = response("msg_5", "req_5")
    append(old, *history, history[0], unfinished[:50])
    daemon.start()
    wait_until_read(daemon, projects(daemon))
    assert shown(daemon) == requests(0)
    assert rollup(daemon) == requests(5)
    assert select(daemon, "select count(*), sum(is_history > 0), sum(is_counted) from usage") == [(5, 5, 5)]
    append(old, unfinished[50:], response("msg_6", "req_6"))
    append(projects(daemon) / "p" / "fork.jsonl", *history)
    wait_until_read(daemon, projects(daemon))
    assert eventually(lambda: shown(daemon) == requests(2))
    assert rollup(daemon) == requests(7)
    daemon.restart()
    wait_until_read(daemon, projects(daemon))
    assert shown(daemon) == requests(2)
    assert rollup(daemon) == requests(7)


def test_a_side_question_of_history_replays_nothing(make_daemon: Callable[..., Daemon]) -> None:
    daemon = empty_root(make_daemon())
    replay = response("msg_1", "req_other", {"cache_read_input_tokens": 90_000}, isSidechain=True)
    append(projects(daemon) / "p" / "a.jsonl", replay, response("msg_2", "req_2", isSidechain=True))
    append(projects(daemon) / "p" / "b.jsonl", response("msg_1", "req_1"))
    daemon.start()
    wait_until_read(daemon, projects(daemon))
    assert rollup(daemon) == requests(2)
    assert select(daemon, "select sum(cache_read) from rollup") == [(0,)]


def test_a_response_of_history_that_grows_stays_history(make_daemon: Callable[..., Daemon]) -> None:
    daemon = empty_root(make_daemon())
    old = projects(daemon) / "p" / "old.jsonl"
    append(old, response("msg_0", "req_0", {"output_tokens": 1}))
    daemon.start()
    wait_until_read(daemon, projects(daemon))
    append(old, response("msg_0", "req_0"))
    wait_until_read(daemon, projects(daemon))
    assert rollup(daemon) == requests(1)
    assert shown(daemon) == requests(0)


def test_what_appears_later_counts_also_while_the_bridge_was_down(make_daemon: Callable[..., Daemon]) -> None:
    daemon = empty_root(make_daemon())
    append(projects(daemon) / "p" / "old.jsonl", response("msg_0", "req_0"))
    daemon.start()
    wait_until_read(daemon, projects(daemon))
    daemon.stop()
    append(projects(daemon) / "p" / "old.jsonl", response("msg_1", "req_1"))
    append(projects(daemon) / "p" / "new.jsonl", response("msg_2", "req_2"))
    daemon.start()
    assert eventually(lambda: shown(daemon) == requests(2))
    assert rollup(daemon) == requests(3)


def test_a_root_that_appears_later_has_no_history(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon().start()
    assert eventually(lambda: select(daemon, "select 1 from root where path like '%projects'"))
    append(projects(daemon) / "p" / "x.jsonl", response("msg_1", "req_1"))
    assert eventually(lambda: shown(daemon) == requests(1))
    shutil.rmtree(projects(daemon))
    append(projects(daemon) / "p" / "y.jsonl", response("msg_2", "req_2"))
    assert eventually(lambda: shown(daemon) == requests(2)), "a root that was made anew is not followed"
    append(projects(daemon) / "p" / "y.jsonl", response("msg_3", "req_3"))
    assert eventually(lambda: shown(daemon) == requests(3)), "a root that was made anew is not watched"


def test_several_roots(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    roots = [tmp_path / "one" / "projects", tmp_path / "two words" / "projects"]
    daemon = make_daemon(env={"CLAUDE_CONFIG_DIR": f"{roots[0].parent}, {roots[1].parent}/"})
    append(roots[0] / "p" / "x.jsonl", response("msg_1", "req_1"))
    append(projects(daemon) / "p" / "x.jsonl", response("msg_9", "req_9"))
    daemon.start()
    wait_until_read(daemon, roots[0])
    for number, root in enumerate((*roots, projects(daemon)), 2):
        append(root / "p" / "x.jsonl", response("msg_1", "req_1"), response(f"msg_{number}", f"req_{number}"))
    assert eventually(lambda: shown(daemon) == requests(2))
    wait_until_read(daemon, roots[1])
    assert rollup(daemon) == requests(3)


def test_a_root_may_be_a_link(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """Some keep their configuration elsewhere; only what lies below the root is not followed."""
    daemon = make_daemon()
    (tmp_path / "dotfiles" / "projects").mkdir(parents=True)
    (daemon.directory / ".claude").symlink_to(tmp_path / "dotfiles")
    daemon.start()
    assert eventually(lambda: select(daemon, "select 1 from root where path like '%projects'"))
    for number in range(1, 4):
        append(projects(daemon) / "p" / "x.jsonl", response(f"msg_{number}", f"req_{number}"))
        assert eventually(partial(shows, daemon, number))


# --- settings ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("flags", [("--no-transcripts",), ()])
def test_no_transcripts_means_that_no_file_there_is_opened(
    make_daemon: Callable[..., Daemon], flags: tuple[str, ...]
) -> None:
    """Without the flag the same trace does hold the root, so the trace would tell."""
    daemon = empty_root(make_daemon(*flags))
    append(projects(daemon) / "p" / "x.jsonl", response("msg_1", "req_1"))
    trace = daemon.directory / "trace"
    calls = "trace=open,openat,stat,newfstatat,inotify_add_watch,statx,access"
    command = ["strace", "-D", "-f", "--seccomp-bpf", "-e", calls, "-o", str(trace), *daemon.command]
    with daemon.log_path.open("ab") as log:
        daemon.process = subprocess.Popen(command, stderr=log, stdout=log, env=daemon.environment)
    daemon.wait_ready(60)
    if not flags:
        wait_until_read(daemon, projects(daemon))
    append(projects(daemon) / "p" / "x.jsonl", response("msg_2", "req_2"))
    if not flags:
        assert eventually(lambda: shown(daemon) == requests(1), seconds=30)
    else:
        time.sleep(1.5)  # the follower would look once a second
        assert shown(daemon) == requests(0)
    daemon.stop()
    eventually(lambda: "exited with" in trace.read_text())
    assert (str(projects(daemon)) in trace.read_text()) is (not flags)


def sources(daemon: Daemon) -> dict[str, int]:
    """The tokens of /metrics by family and type."""
    found: dict[str, int] = {}
    for sample, value in daemon.samples("/metrics").items():
        name, _, labels = sample.partition("{")
        if name in ("claude_code_token_usage_tokens_total", "ai_tokens_total") and 'type="input"' in labels:
            found[name] = found.get(name, 0) + int(float(value))
    return found


def test_with_source_transcripts_otlp_stays_out(make_daemon: Callable[..., Daemon]) -> None:
    daemon = follow_from_here(make_daemon(env={"BRIDGE_SOURCE": "transcripts"}))
    attributes = {"session.id": "s1", "model": "claude-sonnet-4-5-20250929", "type": "input"}
    daemon.post("/v1/metrics", delta_body("claude_code.token.usage", [5000], attributes), "application/x-protobuf")
    for count in range(1, 4):
        append(projects(daemon) / "p" / "x.jsonl", response(f"msg_{count}", f"req_{count}"))
        assert eventually(partial(shows, daemon, count))
    expected = {"claude_code_token_usage_tokens_total": 3 * INPUT, "ai_tokens_total": 3 * INPUT}
    assert sources(daemon) == expected
    daemon.restart()
    assert sources(daemon) == expected


def test_with_source_transcripts_sessions_that_share_a_series_add_up(tmp_path: Path) -> None:
    settings = LedgerSettings(source="transcripts", dropped=frozenset({"session.id"}))
    with rig_in(tmp_path, settings) as rig:
        for number, (session, output) in enumerate((("a", 10), ("b", 7), ("a", 5), ("c", 1), ("b", 2)), 1):
            key = number.to_bytes(16, "big")
            told = Usage("claude_code", Source.TRANSCRIPT, key, session, "m", number * 1000, 1, output, 0, 0, 0)
            row = TranscriptRow(0, "/x.jsonl", 1, 1, b"", 0, 0, number, 1, b"")
            rig.call(rig.ledger.post_transcript(row, (told,), (), is_history=False))
            if number == 3:
                rig.restart()
        assert rig.shown['claude_code.token.usage{model="m",type="output"}'] == 25
        assert rig.shown['claude_code.token.usage{model="m",type="input"}'] == 5


def test_with_source_otlp_no_transcript_counts(make_daemon: Callable[..., Daemon]) -> None:
    daemon = empty_root(make_daemon(env={"BRIDGE_SOURCE": "otlp"})).start()
    append(projects(daemon) / "p" / "x.jsonl", response("msg_1", "req_1"))
    attributes = {"session.id": "s1", "model": "claude-sonnet-4-5-20250929", "type": "input"}
    daemon.post("/v1/metrics", delta_body("claude_code.token.usage", [5000], attributes), "application/x-protobuf")
    assert shown(daemon) == Tokens(5000, 0)
    time.sleep(1.2)  # the follower would look once a second
    assert shown(daemon) == Tokens(5000, 0)
    assert not select(daemon, "select 1 from transcript")


@pytest.mark.parametrize(
    "fault", ["raise ImportError", "def watch(*_, **__):\n    raise OSError(28, 'no watches')\n    yield"]
)
def test_without_file_system_events_files_are_looked_at(make_daemon: Callable[..., Daemon], fault: str) -> None:
    daemon = make_daemon()
    modules = daemon.directory / "modules"
    modules.mkdir()
    (modules / "watchfiles.py").write_text(fault)
    daemon.env["PYTHONPATH"] = f"{modules}:{Path.cwd()}"
    follow_from_here(daemon)
    for count in range(1, 3):
        append(projects(daemon) / "p" / "x.jsonl", response(f"msg_{count}", f"req_{count}"))
        assert eventually(partial(shows, daemon, count)), daemon.log


# --- outages ----------------------------------------------------------------------------------------------------


def test_an_outage_during_a_session_is_healed(make_daemon: Callable[..., Daemon]) -> None:
    """What metrics lost stands in the transcript; what the transcript lacks came with metrics."""
    daemon = follow_from_here(make_daemon())
    path = projects(daemon) / "p" / "x.jsonl"
    attributes = {"session.id": "s1", "model": "claude-sonnet-4-5-20250929"}

    def export(number: int) -> None:
        for kind, value in (("input", INPUT), ("output", OUTPUT)):
            body = delta_body("claude_code.token.usage", [value], {**attributes, "type": kind}, start=number * 10**9)
            assert daemon.post("/v1/metrics", body, "application/x-protobuf").status == 200

    for number in range(1, 10):
        append(path, response(f"msg_{number}", f"req_{number}"))
        if number == 4:
            daemon.kill()
        elif number == 7:
            daemon.start()
        if not 4 <= number < 7:
            export(number)
    wait_until_read(daemon, projects(daemon))
    assert eventually(lambda: shown(daemon) == requests(9)), shown(daemon)


@pytest.mark.parametrize("seed", [1, 2])
def test_sigkill_while_files_grow_is_exact(make_daemon: Callable[..., Daemon], seed: int) -> None:
    daemon = follow_from_here(make_daemon())
    choose = random.Random(seed)
    total = 600
    lines = [response(f"msg_{at}", f"req_{at}", sessionId=f"s{at % 7}") for at in range(total)]
    choose.shuffle(lines)
    seen = [shown(daemon)]

    def write() -> None:
        for at, line in enumerate(lines):
            path = projects(daemon) / f"p{at % 3}" / f"{at % 7}.jsonl"
            cut = choose.randrange(len(line))
            append(path, line[:cut])
            append(path, line[cut:])
            if at % 11 == 0:
                append(path, choose.choice(lines[: at + 1]))
            time.sleep(0.004)

    writer = threading.Thread(target=write)
    writer.start()
    while writer.is_alive():
        time.sleep(random.Random(len(seen)).uniform(0.1, 0.6))
        daemon.kill()
        daemon.start()
        seen.append(shown(daemon))
    writer.join()
    wait_until_read(daemon, projects(daemon))
    assert eventually(lambda: shown(daemon) == requests(total)), shown(daemon)
    assert rollup(daemon) == requests(total)
    assert seen == sorted(seen)
    assert len(seen) > 2


def test_sigkill_while_history_is_read_is_exact(make_daemon: Callable[..., Daemon]) -> None:
    daemon = empty_root(make_daemon())
    total = 4000
    for file in range(40):
        lines = [response(f"msg_{file}_{at}", f"req_{file}_{at}", content="x" * 3000) for at in range(total // 40)]
        append(projects(daemon) / "p" / f"{file}.jsonl", *lines)
    choose = random.Random(3)
    for _ in range(4):
        daemon.start()
        time.sleep(choose.uniform(0, 0.3))
        daemon.kill()
    daemon.start()
    wait_until_read(daemon, projects(daemon))
    assert rollup(daemon) == requests(total)
    assert shown(daemon) == requests(0)
    assert select(daemon, "select count(*) from usage") == [(total,)]


class FailingCommits:
    """Fails the commits of some numbers, counted from when it is armed: before the disk has them, or after."""

    def __init__(self, failing: set[int], *, after: bool) -> None:
        self.failing = failing
        self.after = after
        self.commits: int | None = None
        self.failed = 0

    def __call__(self, sql: str, run: Callable[[], Any]) -> Any:
        if sql != "commit" or self.commits is None:
            return run()
        self.commits += 1
        if self.commits not in self.failing:
            return run()
        self.failed += 1
        if self.after:
            run()
        raise io_error()


async def follow_on(disk: FailingCommits, state: Path, root: Path, at_once: int) -> None:
    """Follow until all of three files of ten lines are read, of which the first ones are written at once."""

    def fail(error: BaseException) -> None:
        raise AssertionError from error

    ledger = Ledger(Store(state, connect=watched(disk)), LedgerSettings(), lambda: time.time_ns() // 10**6, fail)
    await ledger.start()
    throttle = Throttle(time.monotonic)
    follower = Follower(ledger, {str(root): TRANSCRIPTS}, Telemetry(time.time, throttle), throttle)
    task = asyncio.create_task(follower.run())
    try:
        async with asyncio.timeout(PATIENCE):
            while not await ledger.roots():  # noqa: ASYNC110  # nobody sets an event
                await asyncio.sleep(0.02)
            disk.commits = 0
            for file in range(3):
                lines = [response(f"msg_{file}_{at}", f"req_{file}_{at}") for at in range(10)]
                append(root / f"{file}.jsonl", *lines[:at_once])
                for line in lines[at_once:]:
                    await asyncio.sleep(0.02)
                    append(root / f"{file}.jsonl", line)
            while ledger.totals.get("tokens.input") != 30 * INPUT:
                assert not task.done(), task.exception()
                await asyncio.sleep(0.02)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await ledger.stop()


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at_once", [1, 10])
@pytest.mark.parametrize("failing", [{1}, {2}, {3}, {1, 2, 3}, {2, 4, 6}])
def test_a_disk_error_repeats_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: set[int], at_once: int, *, after: bool
) -> None:
    """The commit of what a transcript said fails before or after it reached the disk."""
    monkeypatch.setattr("bridge.transcripts.ROOT_SECONDS", 0.05)
    root = tmp_path / "projects"
    root.mkdir()
    (tmp_path / "state").mkdir()
    disk = FailingCommits(failing, after=after)
    asyncio.run(follow_on(disk, tmp_path / "state", root, at_once))
    assert disk.failed
    with closing(sqlite3.connect(tmp_path / "state" / "state.db")) as connection:
        assert connection.execute("select sum(input), sum(output) from rollup").fetchone() == requests(30)
        assert connection.execute("select sum(value) from served where kind = 'input'").fetchone() == (INPUT * 30,)
