"""A real Prometheus scrapes the bridge, and what its increase() says is what was counted.

PromQL ignores the first value of a series, so a session that is born with 5 commits would read 0. The rule under
test: a scraper that is known to the bridge sees a newborn counter at 0 once, one that comes for the first time
sees everything as it stands. Only stored samples are judged; nothing depends on how soon a scrape comes.

Prometheus takes five seconds from its start to its first scrape, so the tests share one and two bridges; each
test has sessions of its own.
"""

import re
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.daemon import PROTOBUF, Daemon
from tests.prometheus import Prometheus, Sample, run_prometheus, scrape_config, wait_for
from tests.recordings import delta_body

INTERVAL = "500ms"
EXPIRY_SECONDS = 2.0


class Scraped(NamedTuple):
    """A bridge with default settings and one whose sessions expire soon, both scraped from their start on."""

    prometheus: Prometheus
    bridge: Daemon
    forgetful: Daemon


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraped]:
    directory = tmp_path_factory.mktemp("increase")
    expiry = {"BRIDGE_SERIES_EXPIRY_HOURS": str(EXPIRY_SECONDS / 3600)}
    bridge = Daemon(make(directory / "bridge"))
    forgetful = Daemon(make(directory / "forgetful"), env=expiry)
    config = scrape_config({"bridge": bridge.port, "forgetful": forgetful.port}, interval=INTERVAL)
    try:
        with run_prometheus(directory / "prometheus", config) as prometheus:
            bridge.start()
            forgetful.start()
            prometheus.wait_for_scrape("bridge")
            prometheus.wait_for_scrape("forgetful")
            yield Scraped(prometheus, bridge, forgetful)
    finally:
        bridge.close()
        forgetful.close()


def make(directory: Path) -> Path:
    directory.mkdir()
    return directory


def commit(daemon: Daemon, session: str, count: int, *, minute: int = 0) -> None:
    """A session reports commits, in one delta point of a minute of its own."""
    start = (10**9 + minute * 60) * 10**9
    body = delta_body("claude_code.commit.count", [count], {"session.id": session}, start)
    assert daemon.post("/v1/metrics", body, PROTOBUF).status == 200


def series_of(session: str) -> str:
    return f'claude_code_commit_count_total{{session_id="{session}"}}'


def grown(prometheus: Prometheus, session: str, by: int, last: int) -> list[float]:
    """The stored values of a session, once two scrapes in a row have shown `last`; they must have grown `by`."""

    def read() -> list[Sample]:
        samples = prometheus.samples(series_of(session))
        return samples if [sample.value for sample in samples[-2:]] == [last, last] else []

    samples = wait_for(read, f"{session} to be stored as {last}")
    assert growth(samples) == by, samples
    if samples[0].value == 0 or by == 0:
        # The range ends with a sample, and a counter was not below 0 before: nothing is left to extrapolate.
        assert increase(prometheus, session, samples) == pytest.approx(by, rel=1e-12), samples
    return [sample.value for sample in samples]


def growth(samples: list[Sample]) -> float:
    """What a counter grew by; a fall is a reset to 0."""
    steps = pairwise(sample.value for sample in samples)
    return sum(after - before if after >= before else after for before, after in steps)


def increase(prometheus: Prometheus, session: str, samples: list[Sample]) -> float:
    """increase() at the time of the last sample, over a range that holds the birth."""
    seconds = int(samples[-1].time - samples[0].time) + 30
    (found,) = prometheus.query(f"increase({series_of(session)}[{seconds}s])", samples[-1].time)
    return float(found["value"][1])


def test_sessions_that_are_born_at_5_read_as_5(scraped: Scraped) -> None:
    sessions = ("first", "second", "third")
    for session in sessions:
        commit(scraped.bridge, session, 5)
        scraped.prometheus.wait_for_scrape("bridge")
    for session in sessions:
        assert grown(scraped.prometheus, session, 5, last=5).count(0) == 1


def test_a_second_prometheus_sees_history_as_it_stands_and_disturbs_nothing(scraped: Scraped, tmp_path: Path) -> None:
    first, bridge = scraped.prometheus, scraped.bridge
    commit(bridge, "history", 100)
    grown(first, "history", 100, last=100)
    config = scrape_config({"bridge": bridge.port}, interval=INTERVAL, params={"scraper": ["b"]})
    with run_prometheus(tmp_path, config) as second:
        assert grown(second, "history", 0, last=100)[0] == 100
        commit(bridge, "history", 7, minute=1)
        commit(bridge, "news", 5)
        for prometheus in (first, second):
            assert grown(prometheus, "news", 5, last=5).count(0) == 1
        grown(second, "history", 7, last=107)
        grown(first, "history", 107, last=107)


def test_a_session_that_expires_and_comes_back_is_not_counted_twice(scraped: Scraped) -> None:
    prometheus, bridge = scraped.prometheus, scraped.forgetful
    for session in ("back", "gone and back"):
        commit(bridge, session, 5)
    for session in ("back", "gone and back"):
        grown(prometheus, session, 5, last=5)
    time.sleep(EXPIRY_SECONDS)
    commit(bridge, "back", 3, minute=1)
    assert grown(prometheus, "back", 5 + 3, last=3).count(0) == 2

    bridge.restart()  # the quick way to a sweep: what has expired is not loaded
    prometheus.wait_for_scrape("forgetful")
    wait_for(lambda: not prometheus.query(series_of("gone and back")), "the series to be stale")
    commit(bridge, "gone and back", 3, minute=1)
    assert grown(prometheus, "gone and back", 5 + 3, last=3).count(0) == 2
    assert bridge.samples()["claude_code_commit_count"] == "16"


def test_a_killed_bridge_goes_on_where_it_was(scraped: Scraped) -> None:
    prometheus, bridge = scraped.prometheus, scraped.bridge
    commit(bridge, "settled", 5)
    grown(prometheus, "settled", 5, last=5)

    # Counted and not shown. A scrape has just passed, so none is under way when the bridge is killed.
    prometheus.wait_for_scrape("bridge")
    commit(bridge, "unseen", 5)
    bridge.kill()
    bridge.start()
    grown(prometheus, "unseen", 5, last=5)

    # Shown at 0, and not yet with its value.
    commit(bridge, "half seen", 5)
    wait_for(lambda: prometheus.samples(series_of("half seen")), "its 0 to be stored")
    bridge.kill()
    bridge.start()
    assert grown(prometheus, "half seen", 5, last=5).count(0) == 1

    for session in ("settled", "unseen"):
        grown(prometheus, session, 5, last=5)


# --- the scraper memory, asked as Prometheus asks ---------------------------------------------------------------

SCRAPE = {"X-Prometheus-Scrape-Timeout-Seconds": "10", "User-Agent": "Prometheus/3.5.0"}
SCRAPERS_KEPT = 64


def shown(daemon: Daemon, session: str) -> str:
    """What a scrape shows of a session."""
    (value,) = re.findall(rf'_total{{.*session_id="{session}".*}} (.*)', daemon.get("/metrics", SCRAPE).text)
    return str(value)


def test_whoever_scraped_longest_ago_is_forgotten_first(daemon: Daemon) -> None:
    daemon.get("/metrics", SCRAPE)
    for number in range(SCRAPERS_KEPT + 6):
        daemon.get(f"/metrics?scraper={number}", SCRAPE)
        commit(daemon, f"session {number}", 5)
        assert shown(daemon, f"session {number}") == "0", f"forgotten after {number + 1} others"


def test_an_answer_without_a_body_has_shown_nothing(daemon: Daemon) -> None:
    daemon.get("/metrics", SCRAPE)
    commit(daemon, "news", 5)
    daemon.request("HEAD", "/metrics", headers=SCRAPE)
    assert [shown(daemon, "news"), shown(daemon, "news")] == ["0", "5"]
