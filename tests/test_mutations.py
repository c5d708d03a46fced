"""Mutants of recorded exports: each is taken or refused, in the decoder and over a socket; nothing breaks, hangs or
swells.

At full size: `.venv/bin/pytest --campaign -n 0 -s tests/test_mutations.py`.
"""

import contextlib
import http.client
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import islice
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.mutations import SLOW_SECONDS, Mutant, Outcome, mutants, run

MIB = 1 << 20
SHARE = 20_000
"""Mutants of one seed in a campaign."""
MEMORY = 300 * MIB


def test_mutants_are_taken_or_refused_by_the_decoder(campaign: bool) -> None:
    outcomes = _on_all_processors(5_000_000) if campaign else [run(0, 2_500)]
    counts = sum((outcome.counts for outcome in outcomes), Counter[str]())
    # A mutator that breaks everything at the first byte, or nothing, would prove little.
    assert counts["taken"] > counts.total() / 10
    assert counts["refused"] > counts.total() / 10
    assert max(outcome.longest for outcome in outcomes) < SLOW_SECONDS
    if campaign:
        assert max(outcome.memory for outcome in outcomes) < MEMORY


def _on_all_processors(count: int) -> list[Outcome]:
    outcomes: list[Outcome] = []
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        shares = [pool.submit(run, seed, SHARE) for seed in range(1, count // SHARE + 1)]
        for done in as_completed(shares):
            if done.exception():
                pool.shutdown(cancel_futures=True)
            outcomes.append(done.result())
            if len(outcomes) % 10 == 0:
                counts = sum((outcome.counts for outcome in outcomes), Counter[str]())
                memory = max(outcome.memory for outcome in outcomes) // MIB
                longest = max(outcome.longest for outcome in outcomes)
                text = ", ".join(f"{number} {what}" for what, number in sorted(counts.items()))
                sys.stdout.write(f"{counts.total()} mutants: {text}; longest {longest:.3f} s, {memory} MiB\n")
                sys.stdout.flush()
    return outcomes


def test_mutants_over_a_socket(make_daemon: Callable[..., Daemon], campaign: bool) -> None:
    """Every answer is one of three, the connection stays, no total falls, and afterwards all is well."""
    daemon = make_daemon().start()
    counts: Counter[int] = Counter()
    before = {name: float(value) for name, value in daemon.samples().items()}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=10)) as connection:
        for number, mutant in enumerate(islice(mutants(-1), 50_000 if campaign else 150)):
            counts[_post(connection, mutant)] += 1
            if number % 100 == 0:
                now = {name: float(value) for name, value in daemon.samples().items()}
                assert all(now[name] >= value for name, value in before.items())
                before = now
    assert set(counts) <= {200, 400, 413}
    assert min(counts[200], counts[400]) > counts.total() / 20
    assert daemon.get("/metrics").status == 200
    assert "Traceback" not in daemon.log
    assert "error" not in daemon.log
    if sys.platform == "linux" and daemon.process is not None:
        status = Path("/proc", str(daemon.process.pid), "status").read_text()
        assert int(status.split("VmHWM:")[1].split()[0]) * 1024 < MEMORY
    daemon.restart()
    assert {name: float(value) for name, value in daemon.samples().items()}.keys() == before.keys()


def _post(connection: http.client.HTTPConnection, mutant: Mutant) -> int:
    connection.request("POST", mutant.path, mutant.body, {"Content-Type": mutant.encoding.value})
    reply = connection.getresponse()
    reply.read()
    return reply.status


@pytest.mark.parametrize("seed", range(3))
def test_a_seed_is_one_sequence(seed: int) -> None:
    assert list(islice(mutants(seed), 30)) == list(islice(mutants(seed), 30))
