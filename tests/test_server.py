"""The HTTP server by itself: deadlines, limits of connections, answers that nobody reads; short times, real sockets."""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web

from bridge.config import Config, Limits
from bridge.telemetry import Telemetry, Throttle
from bridge.tokens import Tokens
from bridge.watch import HANG_SECONDS, STALL_SECONDS, TICK_SECONDS, LoopWatch
from bridge.web import server as module
from bridge.web.access import Access
from bridge.web.server import Server, response

PAGE = b"x" * (8 * 2**20)
SHORT = 0.2
GET = b"GET /small HTTP/1.1\r\nHost: localhost\r\n\r\n"

Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter


async def small(request: web.BaseRequest) -> web.Response:
    return response(b"ok", "text/plain")


async def large(request: web.BaseRequest) -> web.Response:
    return response(PAGE, "text/plain")


async def echo(request: web.BaseRequest) -> web.Response:
    return response(await request.read(), "text/plain")


@contextlib.asynccontextmanager
async def served(limits: Limits = Limits()) -> AsyncIterator[tuple[Server, int]]:  # noqa: B008  # frozen
    config = Config(limits=limits)
    throttle = Throttle(time.monotonic)
    access = Access(config, Tokens(Path("/nonexistent"), ()), time.monotonic)
    routes = {"/small": {"GET": small}, "/large": {"GET": large}, "/echo": {"POST": echo}}
    server = Server(routes, config, Telemetry(time.time, throttle), throttle, access)
    runner = web.ServerRunner(server, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield server, runner.addresses[0][1]
    finally:
        await runner.cleanup()


OPEN: list[Writer] = []


async def connect(port: int) -> tuple[Reader, Writer]:
    """A connection that ends with the test."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    OPEN.append(writer)
    return reader, writer


async def collect(reader: Reader) -> bytes:
    """All that comes until the connection ends, in whatever way."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(65_536):
            data += piece
    return data


async def ask(reader: Reader, writer: Writer, request: bytes = GET) -> int:
    """Send a request and read its answer; the status."""
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    await reader.readexactly(int(length.split(b":")[1]))
    return int(head.split()[1])


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  # what is waited for sets no event
        await asyncio.sleep(0.01)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        try:
            async with asyncio.timeout(20):
                await test()
        finally:
            for writer in OPEN:
                writer.close()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()
            OPEN.clear()

    asyncio.run(bounded())


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEADER_SECONDS", "UNREAD_SECONDS", "LINGER_SECONDS"):
        monkeypatch.setattr(module, name, SHORT)


@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize("before", [0, 1, 3])
def test_the_head_of_every_request_has_a_deadline(before: int) -> None:
    """Also of a later one, however steadily it drips."""

    async def test() -> None:
        async with served() as (_, port):
            reader, writer = await connect(port)
            for _ in range(before):
                assert await ask(reader, writer) == 200
            answer = asyncio.create_task(collect(reader))
            for byte in GET[:-4].ljust(100, b"x"):
                if not answer.done():
                    writer.write(bytes([byte]))
                    await asyncio.sleep(SHORT / 20)
            assert answer.done()
            assert answer.result().startswith(b"HTTP/1.1 408 ")
            assert b"did not arrive" in answer.result()

    run(test)


@pytest.mark.usefixtures("_short")
def test_a_client_that_is_silent_at_first_is_closed_and_an_idle_one_is_not() -> None:
    async def test() -> None:
        async with served() as (server, port):
            idle_reader, idle_writer = await connect(port)
            assert await ask(idle_reader, idle_writer) == 200
            silent, _ = await connect(port)
            assert await silent.read() == b""
            assert await ask(idle_reader, idle_writer) == 200
            assert len(server.connections) == 1

    run(test)


def test_a_head_of_many_small_lines_is_bounded() -> None:
    async def test() -> None:
        async with served() as (_, port):
            reader, writer = await connect(port)
            assert await ask(reader, writer) == 200
            answer = asyncio.create_task(collect(reader))
            writer.write(GET[:-2])
            for _ in range(40):
                writer.write(b"X: " + b"x" * 4000 + b"\r\n")
                await asyncio.sleep(0)
                if answer.done():
                    break
            assert b"HTTP/1.1 400 " in await answer

    run(test)


@pytest.mark.usefixtures("_short")
def test_a_slow_body_is_not_taken_for_a_slow_head() -> None:
    async def test() -> None:
        async with served() as (_, port):
            reader, writer = await connect(port)
            assert await ask(reader, writer) == 200
            writer.write(b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 40\r\n\r\n")
            for _ in range(40):
                writer.write(b"x")
                await asyncio.sleep(SHORT / 20)
            assert await ask(reader, writer, b"") == 200
            assert await ask(reader, writer) == 200

    run(test)


@pytest.mark.usefixtures("_short")
def test_an_answer_that_nobody_reads_is_given_up() -> None:
    async def test() -> None:
        async with served() as (server, port):
            sock = slow_reader(port)
            with sock:
                await until(lambda: len(server.paused) == 1)
                await until(lambda: not server.connections)
                assert not server.paused

    run(test)


@pytest.mark.usefixtures("_short")
def test_an_answer_that_is_read_slowly_arrives() -> None:
    async def test() -> None:
        async with served() as (_, port):
            sock = slow_reader(port, buffer=2**18)
            sock.setblocking(False)
            taken = 0
            with sock:
                while piece := await asyncio.get_running_loop().sock_recv(sock, 2**20):
                    taken += len(piece)
                    if taken > len(PAGE):
                        break
                    await asyncio.sleep(SHORT / 10)
            assert taken > len(PAGE)

    run(test)


def test_unread_answers_share_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits longest goes; a client that reads is served meanwhile."""
    monkeypatch.setattr(module, "UNREAD_BYTES", 3 * len(PAGE))

    async def test() -> None:
        async with served() as (server, port):
            with contextlib.ExitStack() as stack:
                for _ in range(8):
                    stack.enter_context(slow_reader(port))
                await until(lambda: len(server.paused) <= 4 and len(server.connections) <= 5)
                assert sum(one.unread_bytes for one in server.paused) <= 3 * len(PAGE)
                reader, writer = await connect(port)
                assert await ask(reader, writer) == 200

    run(test)


def slow_reader(port: int, buffer: int = 4096) -> socket.socket:
    """A client that asks for a large page and takes no more of it than its buffer holds."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    sock.connect(("127.0.0.1", port))
    sock.sendall(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
    return sock


def test_above_the_limit_who_never_finished_a_request_goes_first() -> None:
    async def test() -> None:
        async with served(Limits(connections=8)) as (server, port):
            good = [await connect(port) for _ in range(4)]
            for reader, writer in good:
                assert await ask(reader, writer) == 200
            dripping = [await connect(port) for _ in range(20)]
            for _, writer in dripping:
                writer.write(b"GET / HT")
            half = await connect(port)
            half[1].write(b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nx")
            reader, writer = await connect(port)
            assert await ask(reader, writer) == 200
            for reader, writer in good:
                assert await ask(reader, writer) == 200
            assert len(server.connections) <= 8

    run(test)


def test_a_request_that_is_being_answered_is_not_cut() -> None:
    async def test() -> None:
        async with served(Limits(connections=8)) as (_, port):
            working = [await connect(port) for _ in range(8)]
            for _, writer in working:
                writer.write(b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\nok")
            others = [await connect(port) for _ in range(4)]
            for reader, writer in working[4:]:
                assert await ask(reader, writer, b"") == 200
            assert len(others) == 4

    run(test)


# --- the event loop --------------------------------------------------------------------------------------------


SCALE = 0.01 / TICK_SECONDS
"""Ticks of 10 ms."""


def test_a_loop_that_stalls_is_counted_once_and_goes_on() -> None:
    seen: list[str] = []

    async def test() -> None:
        watch = LoopWatch(lambda: seen.append("stalled"), seen.append, scale=SCALE)
        watch.start()
        await asyncio.sleep(STALL_SECONDS * SCALE * 5)
        assert seen == []
        time.sleep(STALL_SECONDS * SCALE * 5)  # noqa: ASYNC251  # what is watched for
        assert seen == ["stalled"]
        await asyncio.sleep(STALL_SECONDS * SCALE * 5)
        watch.stop()

    run(test)
    assert seen == ["stalled"]


def test_a_loop_that_hangs_is_reported_with_the_place() -> None:
    seen: list[str] = []

    async def test() -> None:
        LoopWatch(lambda: seen.append("stalled"), seen.append, scale=SCALE).start()
        await asyncio.sleep(STALL_SECONDS * SCALE * 5)
        time.sleep(HANG_SECONDS * SCALE * 2)  # noqa: ASYNC251  # same

    run(test)
    assert seen[0] == "stalled"
    assert seen[1].rpartition(":")[0] == __file__
    assert len(seen) == 2
