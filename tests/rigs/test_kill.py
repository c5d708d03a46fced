"""SIGKILL at any moment: nothing that was acknowledged is lost, nothing counts twice, no scrape shows less.

Eight senders of four kinds post to a bridge that is killed and started again, send on purpose again what was
acknowledged, give up some of what was not answered and send the rest again as it was or in other batches; a transcript
grows meanwhile. One poller reads as XRG does, twenty times a second: every line lies between what was acknowledged
before it asked and what had been sent when it was answered, and never falls. Another reads as Prometheus does. In the
end everything that is open is sent again, and the bridge shows exactly what was ever made.

Where a supervisor holds the listening sockets no connection may be refused and no scrape may fail; how many waited
longer than XRG does is told, since that is a matter of the machine as well.
"""

import contextlib
import http.client
import re
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest

from bridge.database import DATABASE
from tests.daemon import PROTOBUF, Daemon
from tests.rigs.progress import Progress
from tests.rigs.traffic import (
    CumulativeSender,
    DeltaSender,
    EventSender,
    Export,
    Sender,
    TranscriptWriter,
    added,
    differences,
    shown_in,
)
from tests.test_systemd import Activated
from tests.test_transcripts import eventually, select
from tests.xrg_reader import XRG

POLL_SECONDS = 0.05
RETRY_SECONDS = 0.05
REFUSED = -1
SCRAPE_EVERY = 20
"""Polls between two scrapes of /metrics."""
REPEATED, GIVEN_UP, REGROUPED = 0.13, 0.15, 0.3
XRG_PATIENCE = 2.0
WRAPPED = 2**31
UPTIME = (0.02, 0.7)


class Outcome(NamedTuple):
    """What a campaign saw. Points, but for kills, scrapes, connections and seconds."""

    kills: int
    acknowledged: int
    repeated: int
    unanswered: int
    unavailable: int
    scrapes: int
    cut: int
    refused_connections: int
    failed_scrapes: int
    slow_scrapes: int
    longest_gap: float

    def __str__(self) -> str:
        return (
            f"{self.kills} kills, {self.acknowledged} points acknowledged, {self.repeated} sent again on purpose,"
            f" {self.unanswered} unanswered, {self.unavailable} answered 503; {self.scrapes} scrapes,"
            f" {self.cut} cut by the kill, {self.failed_scrapes} failed,"
            f" {self.slow_scrapes} slower than {XRG_PATIENCE:g} s, longest gap {self.longest_gap:.2f} s;"
            f" {self.refused_connections} connections refused"
        )


class Tally:
    """Counts of many threads."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, what: str, count: int = 1) -> None:
        with self._lock:
            self._counts[what] += count

    def __getitem__(self, what: str) -> int:
        return self._counts[what]

    def __str__(self) -> str:
        return ", ".join(f"{what} {count}" for what, count in sorted(self._counts.items()))


class Campaign:
    """Senders and pollers of one bridge. Faults that they see end up in `faults`."""

    def __init__(self, daemon: Daemon, seed: int, size: tuple[int, int], *, sessions_end: bool = True) -> None:
        self.daemon = daemon
        self.seed = seed
        self.senders: list[DeltaSender | CumulativeSender | EventSender] = [
            *(DeltaSender(f"delta{number}", seed + number, size) for number in range(4)),
            DeltaSender("pool", seed + 4, size, has_session=False),
            CumulativeSender("cumulative0", seed + 5),
            CumulativeSender("cumulative1", seed + 6),
            EventSender("events", seed + 7, (1, 10)),
        ]
        self.writer = TranscriptWriter("transcript", seed + 8)
        if not sessions_end:
            for sender in self.senders:
                sender.per_session = sys.maxsize
        self.faults: list[str] = []
        self.counts = Tally()
        self.longest_gap = 0.0
        self.answered = threading.Event()
        self._ended = threading.Event()

    # --- senders ---

    def run_sender(self, sender: DeltaSender | CumulativeSender | EventSender, seed: int) -> None:
        choose = Random(seed)
        client = Client(self.daemon.port, self.counts)
        while not self._ended.is_set():
            self.deliver(client, sender, sender.make(), choose)
            if sender.past and choose.random() < REPEATED:
                again = choose.choice(sender.past)
                if client.post(again.path, again.body) == 200:
                    self.counts.add("repeated", again.points)
        client.close()

    def deliver(self, client: "Client", sender: Sender, export: Export, choose: Random) -> None:
        """Send an export until it is acknowledged, or give it up."""
        bodies: tuple[bytes, ...] = (export.body,)
        while not self._ended.is_set():
            statuses = [client.post(export.path, body) for body in bodies]
            if REFUSED in statuses:
                self._ended.wait(RETRY_SECONDS)
                continue
            if all(status == 200 for status in statuses):
                sender.acknowledge(export)
                self.counts.add("acknowledged", export.points)
                return
            if wrong := set(statuses) - {0, 200, 503}:
                self.faults.append(f"{export.path} was answered with {wrong}")
                return
            self.counts.add("unavailable" if 503 in statuses else "unanswered", export.points)
            if choose.random() < GIVEN_UP:
                return
            if export.pieces and choose.random() < REGROUPED:
                bodies = export.pieces
            self._ended.wait(0.01)

    def write_transcript(self) -> None:
        """What stands under a root at the first look is history; so this waits until there was one."""
        eventually(lambda: select(self.daemon, "select 1 from root where path like '%.claude/projects'"), seconds=60)
        folder = self.daemon.directory / ".claude" / "projects" / "p"
        folder.mkdir(parents=True)
        with (folder / "transcript.jsonl").open("ab", buffering=0) as file:
            while not self._ended.wait(0.05):
                file.write(self.writer.line())

    # --- pollers ---

    def poll(self) -> None:
        """As XRG, and now and then as Prometheus."""
        xrg = XRG()
        client = Client(self.daemon.port, self.counts, is_poller=True)
        last: Counter[str] = Counter()
        series: dict[str, float] = {}
        answered_at = time.monotonic()
        number = 0
        while not self._ended.wait(POLL_SECONDS):
            number += 1
            certain = added(sender.sums()[0] for sender in self.senders)
            asked_at = time.monotonic()
            text = client.get("/v1/metrics")
            possible = added([*(sender.sums()[1] for sender in self.senders), self.writer.sums()[1]])
            now = time.monotonic()
            self.counts.add("scrapes")
            self.counts.add("slow scrapes", now - asked_at > XRG_PATIENCE)
            if text is None:
                continue
            self.longest_gap, answered_at = max(self.longest_gap, now - answered_at), now
            self.answered.set()
            shown = shown_in(text)
            self.faults += differences(shown, certain, possible)
            self.faults += [
                f"{line} fell from {value} to {shown[line]}" for line, value in last.items() if shown[line] < value
            ]
            last = shown
            if number > 1 and xrg.poll(text).rate >= WRAPPED:
                self.faults.append("XRG's sum fell")
            if number % SCRAPE_EVERY == 0 and (scrape := client.get("/metrics")) is not None:
                self.faults += fallen(series, scrape)
        client.close()

    # --- the whole ---

    @contextmanager
    def running(self) -> Iterator[None]:
        threads = [
            threading.Thread(target=self.run_sender, args=(sender, self.seed * 100 + number))
            for number, sender in enumerate(self.senders)
        ]
        threads += [threading.Thread(target=self.poll), threading.Thread(target=self.write_transcript)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._ended.set()
            for thread in threads:
                thread.join(60)

    def settle(self) -> None:
        """Send what is open and let the transcript be read to its end: then it shows exactly what was made."""
        client = Client(self.daemon.port, self.counts)
        for sender in self.senders:
            for export in sender.open():
                assert eventually(partial(self.is_taken, client, export), seconds=60)
                sender.acknowledge(export)
        client.close()
        truth = added([*(sender.sums()[1] for sender in self.senders), self.writer.sums()[1]])
        eventually(lambda: self.shown() == truth, seconds=60)
        assert not [*differences(self.shown(), truth, truth)]

    @staticmethod
    def is_taken(client: "Client", export: Export) -> bool:
        return client.post(export.path, export.body) == 200

    def shown(self) -> Counter[str]:
        return shown_in(self.daemon.get("/v1/metrics").text)


class Client:
    """One connection at a time. Status 0: there was no answer, so that nobody knows; REFUSED: nobody listened."""

    def __init__(self, port: int, counts: Tally, *, is_poller: bool = False) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        self._counts = counts
        self._is_poller = is_poller

    def post(self, path: str, body: bytes) -> int:
        answer = self._ask("POST", path, body, {"Content-Type": PROTOBUF})
        return answer[0] if answer else REFUSED

    def get(self, path: str) -> str | None:
        """The text, or None when there was none; one that was in the killed bridge's hands is asked for again."""
        for _ in range(10):
            answer = self._ask("GET", path, None, {"X-Prometheus-Scrape-Timeout-Seconds": "2"})
            if answer is None:
                return None
            if answer[0] == 200:
                return answer[1].decode()
            if answer[0]:
                self._counts.add("failed scrapes")
                return None
        return None

    def _ask(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, bytes] | None:
        """Status and body; status 0 when the connection ended before the answer, None when there was no bridge."""
        try:
            self._connection.request(method, path, body, headers)
            answer = self._connection.getresponse()
            return answer.status, answer.read()
        except ConnectionRefusedError:
            self._connection.close()
            self._counts.add("refused connections")
            self._counts.add("failed scrapes", self._is_poller)
            return None
        except (OSError, http.client.HTTPException):
            self._connection.close()
            self._counts.add("cut", self._is_poller)
            return 0, b""

    def close(self) -> None:
        self._connection.close()


_COUNTER = re.compile(r"((?:claude_code|ai)_\w+_total\{[^\n]*\}) (\S+)")


def fallen(series: dict[str, float], scrape: str) -> list[str]:
    """The counters of tools that fell since the last scrape; `series` is brought up to date."""
    now = {name: float(value) for name, value in _COUNTER.findall(scrape)}
    faults = [
        f"{name} fell from {value} to {now.get(name)}" for name, value in series.items() if now.get(name, -1) < value
    ]
    series.update(now)
    return faults


def run_campaign(
    daemon: Daemon, *, kills: int, points: int, size: tuple[int, int], seconds: float, seed: int
) -> Outcome:
    """Kill at least so often, and until so many points are acknowledged, but no longer than `seconds`."""
    choose = Random(seed)
    campaign = Campaign(daemon, seed, size)
    progress = Progress("kill", kills)
    deadline = time.monotonic() + seconds
    daemon.start()
    killed = 0
    with campaign.running():
        while (killed < kills or campaign.counts["acknowledged"] < points) and time.monotonic() < deadline:
            campaign.answered.clear()
            if choose.random() < 0.85:
                assert campaign.answered.wait(30), f"no answer after {killed} kills:\n{daemon.log[-2000:]}"
                time.sleep(choose.uniform(*UPTIME))
            else:
                time.sleep(choose.uniform(0.05, 0.5))
            daemon.kill()
            killed += 1
            daemon.spawn()
            progress.tell(killed, campaign.counts)
            assert not campaign.faults, campaign.faults[:5]
        daemon.wait_ready(60)
    campaign.settle()
    daemon.restart()
    campaign.settle()
    daemon.stop()
    with closing(sqlite3.connect(daemon.state_dir / DATABASE)) as reader:
        assert reader.execute("pragma integrity_check").fetchall() == [("ok",)]
    assert not campaign.faults, campaign.faults[:5]
    counts = campaign.counts
    outcome = Outcome(
        killed, counts["acknowledged"], counts["repeated"], counts["unanswered"], counts["unavailable"],
        counts["scrapes"], counts["cut"], counts["refused connections"], counts["failed scrapes"],
        counts["slow scrapes"],
        campaign.longest_gap,
    )  # fmt: skip
    progress.end(outcome)
    return outcome


def test_nothing_is_lost_and_nothing_counts_twice(make_daemon: Callable[..., Daemon], campaign: bool) -> None:
    daemon = make_daemon()
    if campaign:
        outcome = run_campaign(daemon, kills=1_000, points=1_000_000, size=(30, 100), seconds=2_400, seed=1)
        assert outcome.kills >= 1_000
        assert outcome.acknowledged >= 1_000_000
        assert outcome.repeated >= 100_000
    else:
        outcome = run_campaign(daemon, kills=3, points=1_000, size=(5, 30), seconds=60, seed=1)
    assert outcome.repeated


def test_a_held_socket_refuses_nobody(tmp_path: Path, campaign: bool) -> None:
    daemon = Activated(tmp_path)
    daemon.hold()
    with contextlib.closing(daemon):
        if campaign:
            outcome = run_campaign(daemon, kills=500, points=100_000, size=(30, 100), seconds=1_500, seed=2)
            assert outcome.kills >= 500
        else:
            outcome = run_campaign(daemon, kills=2, points=1_000, size=(5, 30), seconds=60, seed=2)
    assert outcome.refused_connections == 0
    assert outcome.failed_scrapes == 0


@pytest.mark.parametrize(("before", "after", "faults"), [(5, 5, 0), (5, 4, 1), (5, None, 1)])
def test_the_poller_of_metrics_sees_a_fall(before: int, after: int | None, faults: int) -> None:
    name = 'ai_tokens_total{type="input"}'
    series: dict[str, float] = {}
    fallen(series, f"{name} {before}\n")
    assert len(fallen(series, f"{name} {after}\n" if after else "")) == faults
