"""A client that is not the bottleneck: requests made beforehand, sent over connections that stay open.

It runs in the process of the benchmark, on another core than the server, and says how busy it was itself.
"""

import asyncio
import re
import time
from collections.abc import Sequence
from typing import NamedTuple, cast

from bridge.otlp import Encoding

SECONDS = 120
"""No load takes longer."""
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Load(NamedTuple):
    """What came of a load: seconds in all and of each request, sorted, and the client's share of its core."""

    seconds: float
    latencies: list[float]
    busy: float

    @property
    def rate(self) -> float:
        """Requests a second."""
        return len(self.latencies) / self.seconds

    def percentile(self, percent: float) -> float:
        """Seconds that this share of the requests needed at most."""
        return self.latencies[min(len(self.latencies) - 1, int(len(self.latencies) * percent / 100))]


class RequestFailed(Exception):
    """A server answered with something else than success."""


def post(path: str, body: bytes, encoding: Encoding) -> bytes:
    """The bytes of one request."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {encoding.value}\r\nContent-Length: {len(body)}"
    return f"{head}\r\n\r\n".encode() + body


class _Connection(asyncio.Protocol):
    """Sends its requests one after the other, each when the answer to the one before is complete."""

    def __init__(self, requests: Sequence[bytes], period: float) -> None:
        self._requests = iter(requests)
        self._period = period
        self._buffer = b""
        self.latencies: list[float] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's does not derive from it
        self._due = time.perf_counter()
        self._send()

    def _send(self) -> None:
        request = next(self._requests, None)
        if request is None:
            self._transport.close()
            self.done.set_result(None)
            return
        self._began = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        length = _LENGTH.search(self._buffer, 0, end)
        if len(self._buffer) < end + 4 + (int(length[1]) if length else 0):
            return
        if self._buffer[9:10] != b"2":
            self.done.set_exception(RequestFailed(self._buffer[:600].decode(errors="replace")))
            self._transport.close()
            return
        self.latencies.append(time.perf_counter() - self._began)
        self._buffer = b""
        self._due += self._period
        wait = self._due - time.perf_counter()
        if self._period and wait > 0:
            asyncio.get_running_loop().call_later(wait, self._send)
        else:
            self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(RequestFailed(f"connection lost: {exc}"))


async def send(port: int, queues: Sequence[Sequence[bytes]], period: float = 0) -> Load:
    """Send each queue over a connection of its own; with a `period`, one request in as many seconds of each.

    Raises RequestFailed.
    """
    loop = asyncio.get_running_loop()
    began, busy = time.perf_counter(), time.process_time()
    connections = []
    for number, queue in enumerate(queues):
        if period:
            await asyncio.sleep(period / len(queues) if number else 0)
        _, connection = await loop.create_connection(lambda q=queue: _Connection(q, period), "127.0.0.1", port)  # type: ignore[misc]
        connections.append(connection)
    async with asyncio.timeout(SECONDS):
        for connection in connections:
            await connection.done
    seconds = time.perf_counter() - began
    latencies = sorted(latency for connection in connections for latency in connection.latencies)
    return Load(seconds, latencies, (time.process_time() - busy) / seconds)
