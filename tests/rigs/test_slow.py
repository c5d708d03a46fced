"""Sockets that are slow, silent, or too many, beside a client that posts: it is served as if it were alone.

At full size: `.venv/bin/pytest --campaign -n 0 -s tests/rigs/test_slow.py`.
"""

import contextlib
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest

from tests.daemon import JSON, Daemon
from tests.test_receiver import INPUT, as_json, get, post, request_of, tokens
from tests.test_transcripts import INPUT as LINE_INPUT
from tests.test_transcripts import append, eventually, follow_from_here, projects
from tests.transcript_tree import response

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="descriptors of another process are read from /proc")
BACK_SECONDS = 30.0


def descriptors(daemon: Daemon) -> int:
    assert daemon.process is not None
    return len(os.listdir(f"/proc/{daemon.process.pid}/fd"))  # noqa: PTH208  # what is counted has no names


def processor_seconds(daemon: Daemon) -> float:
    assert daemon.process is not None
    fields = Path(f"/proc/{daemon.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


OPENINGS = (
    b"", b"G", b"POST /v1/metrics HT", get("/metrics")[:-2], post("/v1/metrics", None), post("/v1/logs", None) + b"{",
    get("/metrics") * 30, get("/-/healthy"),
)  # fmt: skip
"""Silent, dripping heads, bodies that do not come, answers that nobody reads, and one that was good once."""


@contextlib.contextmanager
def slow_sockets(daemon: Daemon, count: int) -> Iterator[list[socket.socket]]:
    """So many connections, each of which has begun something; one more byte comes to each now and then."""
    sockets: list[socket.socket] = []
    ended = threading.Event()

    def drip() -> None:
        while not ended.wait(0.5):
            for at in range(0, len(sockets), 7):
                with contextlib.suppress(OSError):
                    sockets[at].send(b"x")

    try:
        for at in range(count):
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.settimeout(5)
            sock.connect(("127.0.0.1", daemon.port))
            with contextlib.suppress(OSError):  # closed at once: there are too many
                sock.sendall(OPENINGS[at % len(OPENINGS)])
            sock.setblocking(False)
            sockets.append(sock)
        threading.Thread(target=drip, daemon=True).start()
        yield sockets
    finally:
        ended.set()
        for sock in sockets:
            sock.close()


def post_steadily(daemon: Daemon, count: int, pause: float) -> list[float]:
    """Post one point at a time over one connection; seconds until each answer."""
    connection = HTTPConnection("127.0.0.1", daemon.port, timeout=10)
    latencies = []
    with contextlib.closing(connection):
        for at in range(count):
            body = as_json(request_of(tokens(1, at)))
            began = time.monotonic()
            connection.request("POST", "/v1/metrics", body, {"Content-Type": JSON})
            reply = connection.getresponse()
            reply.read()
            latencies.append(time.monotonic() - began)
            assert reply.status == 200
            time.sleep(pause)
    return sorted(latencies)


def test_slow_sockets_are_in_nobodys_way(make_daemon: Callable[..., Daemon], campaign: bool) -> None:
    count, posts = (2_000, 1_000) if campaign else (200, 50)
    daemon = make_daemon(env={} if campaign else {"BRIDGE_LIMITS_CONNECTIONS": "64"}).start()
    if campaign:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, count + 200)), hard))
    post_steadily(daemon, 5, 0)
    before = descriptors(daemon)
    with slow_sockets(daemon, count) as sockets:
        latencies = post_steadily(daemon, posts, 0.02 if campaign else 0)
        most = descriptors(daemon)
        assert len(sockets) == count
    began = time.monotonic()
    while descriptors(daemon) > before and time.monotonic() - began < BACK_SECONDS:
        time.sleep(0.05)
    back = time.monotonic() - began
    assert descriptors(daemon) <= before
    assert int(daemon.samples()[INPUT]) == posts
    assert most < (512 if campaign else 64) + 40
    p99 = latencies[int(posts * 0.99)]
    if campaign:
        sys.stdout.write(
            f"{count} slow sockets: {posts} posts, p50 {latencies[posts // 2] * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms,"
            f" at most {most} descriptors, {before} again after {back:.1f} s\n"
        )
    assert p99 < (0.1 if campaign else 5)
    assert "Traceback" not in daemon.log


def test_without_descriptors_nothing_spins_and_all_is_well_afterwards(make_daemon: Callable[..., Daemon]) -> None:
    """Who is connected is served meanwhile, and a transcript is read as soon as it can be opened."""
    daemon = follow_from_here(make_daemon())
    assert daemon.process is not None
    post_steadily(daemon, 1, 0)
    kept = HTTPConnection("127.0.0.1", daemon.port, timeout=10)
    kept.connect()
    at_rest = descriptors(daemon)
    resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (at_rest + 8,) * 2)
    connections = []
    for _ in range(60):
        sock = socket.socket()
        sock.settimeout(5)
        sock.connect(("127.0.0.1", daemon.port))
        connections.append(sock)
    before = processor_seconds(daemon)
    time.sleep(1)
    assert processor_seconds(daemon) - before < 0.5
    append(projects(daemon) / "p.jsonl", response("msg_1", "req_1"))
    for method, body in (("POST", as_json(request_of(tokens(1, 7)))), ("GET", None)):
        kept.request(method, "/v1/metrics", body, {"Content-Type": JSON})
        with kept.getresponse() as reply:
            assert (reply.status, bool(reply.read())) == (200, True)
    kept.close()
    for sock in connections:
        sock.close()
    quiet, began = 0, time.monotonic()
    while quiet < 30 and time.monotonic() - began < BACK_SECONDS:  # accepting pauses for a second
        quiet = quiet + 1 if descriptors(daemon) <= at_rest + 1 else 0
        time.sleep(0.05)
    assert post_steadily(daemon, 3, 0)
    assert eventually(lambda: int(daemon.samples()[INPUT]) == 4 + LINE_INPUT)
    assert len(daemon.log.splitlines()) < 15
