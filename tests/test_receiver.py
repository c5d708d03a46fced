"""What the bridge answers to HTTP, good and bad, over real sockets.

The tables hold one request a row: what goes over the wire, the status that comes back, and a word that stands in
the answer. Every refusal is a google.rpc.Status in the request's own encoding and leaves the counters alone.
"""

import contextlib
import gzip
import itertools
import json
import random
import re
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pytest
from google.protobuf.json_format import ParseDict
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)

from tests.daemon import JSON, PROTOBUF, Daemon

MIB = 1 << 20
MAX_BODY = 4 * MIB
HINT = "OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf"
INPUT = 'claude_code_token_usage{type="input"}'
SIGNALS = ("/v1/metrics", "/v1/logs", "/v1/traces")
PAGES = ("/v1/metrics", "/metrics", "/", "/-/healthy", "/-/ready")


# --- the wire --------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes
    version: str = ""

    @property
    def stays(self) -> bool:
        """Whether the connection is said to stay open."""
        return self.version == "HTTP/1.1" and self.headers.get("connection") != "close"

    @property
    def text(self) -> str:
        """Head and body in lower case, for a search."""
        lines = [f"{name}: {value}" for name, value in self.headers.items()]
        return "\n".join([*lines, self.body.decode("utf-8", "replace")]).lower()


class Wire:
    """One connection that sends what it is given and reads one answer at a time."""

    def __init__(self, port: int, address: str = "127.0.0.1") -> None:
        self.socket = socket.create_connection((address, port), timeout=30)
        self.file: BinaryIO = self.socket.makefile("rb")

    def __enter__(self) -> "Wire":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Send all of it, or as much as the bridge wants: it may answer and close before the end."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.socket.sendall(data)

    def answer(self, *, to_head: bool = False) -> Answer:
        start = self.file.readline().decode("latin-1")
        assert re.match(r"HTTP/\d\.\d \d{3} ", start), f"not a status line: {start!r}"
        version, status = start.split()[0], int(start.split()[1])
        headers = dict(self._headers())
        if to_head or status in (100, 204, 304):
            return Answer(status, headers, b"", version)
        if headers.get("transfer-encoding") == "chunked":
            return Answer(status, headers, b"".join(self._chunks()), version)
        length = headers.get("content-length")
        body = self.file.read() if length is None else self.file.read(int(length))
        return Answer(status, headers, body, version)

    def _headers(self) -> Iterator[tuple[str, str]]:
        while line := self.file.readline().decode("latin-1").strip():
            name, _, value = line.partition(":")
            yield name.lower(), value.strip()

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.file.readline(), 16):
            yield self.file.read(size)
            self.file.readline()
        self.file.readline()

    def rest(self, seconds: float) -> bytes:
        """What comes until the bridge closes, or is silent for so long."""
        self.socket.settimeout(seconds)
        rest = b""
        with contextlib.suppress(ConnectionResetError, TimeoutError):
            while piece := self.socket.recv(65_536):
                rest += piece
        return rest

    def is_closed(self) -> bool:
        """Whether the bridge ends the connection, without another byte."""
        self.socket.settimeout(5)
        try:
            return self.file.read(1) == b""
        except ConnectionResetError:
            return True


def exchange(daemon: Daemon, request: bytes) -> Answer:
    """Send one request on a connection of its own; PORT in it becomes the port of the bridge."""
    with Wire(daemon.port) as wire:
        wire.send(request.replace(b"PORT", str(daemon.port).encode()))
        return wire.answer(to_head=request.startswith(b"HEAD "))


def message_of(answer: Answer, encoding: str) -> str:
    """The message of a Status body, which must be in this encoding."""
    assert answer.headers.get("content-type", "").partition(";")[0] == encoding, answer
    if encoding == PROTOBUF:
        return str(Status.FromString(answer.body).message)
    status: dict[str, Any] = json.loads(answer.body)
    assert set(status) <= {"code", "message", "details"}
    message = status["message"]
    assert isinstance(message, str)
    return message


# --- requests --------------------------------------------------------------------------------------------------


def head(start: str, *headers: str) -> bytes:
    return "\r\n".join([start, *headers, "", ""]).encode("latin-1")


def get(path: str, *headers: str, host: str = "localhost", method: str = "GET") -> bytes:
    return head(f"{method} {path} HTTP/1.1", f"Host: {host}", *headers)


def post(path: str, body: bytes | None, *headers: str, kind: str | None = JSON, host: str = "localhost") -> bytes:
    """A POST with Content-Length; without a body the length is announced and nothing is sent."""
    length = 1000 if body is None else len(body)
    sent = [f"Content-Type: {kind}"] if kind is not None else []
    start = head(f"POST {path} HTTP/1.1", f"Host: {host}", *sent, f"Content-Length: {length}", *headers)
    return start + (body or b"")


def framed(body: bytes, *headers: str, kind: str = JSON, path: str = "/v1/metrics") -> bytes:
    """A POST whose framing headers are given."""
    return head(f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Type: {kind}", *headers) + body


def chunks(body: bytes, size: int = 100_000) -> bytes:
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def tokens(value: Any, at: int = 1, kind: str = "input") -> dict[str, Any]:
    """A delta point of Claude Code's tokens; `at` tells it from others of the same value."""
    begin = 1_795_235_255_603_000_000 + at * 60_000_000_000
    attributes = {"type": kind, "session.id": "s-1", "model": "claude-x"}
    return {
        "startTimeUnixNano": str(begin),
        "timeUnixNano": str(begin + 60_000_000_000),
        "attributes": [{"key": key, "value": {"stringValue": text}} for key, text in attributes.items()],
        "asDouble": value,
    }


def request_of(*points: dict[str, Any], name: str = "claude_code.token.usage", **data: Any) -> dict[str, Any]:
    sum_ = {"aggregationTemporality": 1, "isMonotonic": True, "dataPoints": points, **data}
    resource = {"attributes": [{"key": "service.name", "value": {"stringValue": "claude-code"}}]}
    scope = {"scope": {"name": "com.anthropic.claude_code"}, "metrics": [{"name": name, "sum": sum_}]}
    return {"resourceMetrics": [{"resource": resource, "scopeMetrics": [scope]}]}


def as_json(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


def as_protobuf(body: dict[str, Any]) -> bytes:
    return ParseDict(body, ExportMetricsServiceRequest()).SerializeToString()


# --- what is refused, and how ----------------------------------------------------------------------------------


class Case(NamedTuple):
    """One request that must not count anything, its status, and a word of the answer (in lower case)."""

    name: str
    request: bytes
    status: int
    word: str = ""

    @property
    def encoding(self) -> str:
        """The encoding that the answer must have."""
        return PROTOBUF if re.search(rb"content-type: application/x-protobuf[;\r]", self.request.lower()) else JSON


POINT = request_of(tokens(1))
BODY = as_json(POINT)
GZIP = gzip.compress(BODY)
SOME_GZIP = gzip.compress(BODY + b" " * 3000)
LARGE = BODY.ljust(MAX_BODY + 1)
MANY_JSON = as_json(request_of(*[{"asInt": 1}] * 20_001))
MANY_PROTOBUF = as_protobuf(request_of(*[{"asInt": 1}] * 20_001))
EVIL = "Origin: http://evil.example"
CHUNKED = "Transfer-Encoding: chunked"


def zeros(mebibytes: int, wbits: int) -> bytes:
    """A valid beginning of a compressed stream of so many MiB of zeros, about a thousandth of that in size."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, wbits)
    first = compressor.compress(bytes(MIB)) + compressor.flush(zlib.Z_FULL_FLUSH)
    following = compressor.compress(bytes(MIB)) + compressor.flush(zlib.Z_FULL_FLUSH)
    return first + following * (mebibytes - 1)


def host_cases() -> Iterator[Case]:
    foreign = [
        "evil.example", "evil.example:4318", "localhost.evil", "localhost.evil.example:4318", "evillocalhost", "local",
        "localhost.localdomain", "0.0.0.0", "0.0.0.0:4318", "128.0.0.1", "126.255.255.255", "127.0.0.1.evil.example",
        "192.168.1.10:4318", "10.0.0.1", "169.254.169.254", "[::]", "[::2]:4318", "[fe80::1]", "2130706433",
        "127.0.0.256", "host.docker.internal.evil", "evilhost.docker.internal", "docker.internal",
        "host.containers.internal.evil:1", "xn--localhost-", "",
    ]  # fmt: skip
    for host in foreign:
        yield Case(f"host {host!r}", get("/v1/metrics", host=host), 421, "host")
    for host in (
        "evil.example@localhost",
        "localhost@evil.example",
        "localhost, evil.example",
        "[::1",
        "[::1].evil.example",
    ):
        yield Case(f"host {host!r}", get("/v1/metrics", host=host), 421)
    for path in (*PAGES, "/v1/logs", "/nowhere"):
        yield Case(f"foreign host, GET {path}", get(path, host="evil.example"), 421)
    for path in SIGNALS:
        yield Case(f"foreign host, POST {path}, body not read", post(path, None, host="evil.example"), 421)
    yield Case("foreign host, protobuf", post("/v1/metrics", None, kind=PROTOBUF, host="evil.example"), 421)
    yield Case("no host", head("GET /v1/metrics HTTP/1.1"), 400)
    yield Case("two hosts", get("/v1/metrics", "Host: evil.example"), 400)


def origin_cases() -> Iterator[Case]:
    for path in (*PAGES, "/v1/logs", "/nowhere"):
        yield Case(f"foreign origin, GET {path}", get(path, EVIL), 403, "origin")
        yield Case(f"cross-site, GET {path}", get(path, "Sec-Fetch-Site: cross-site"), 403, "cross-site")
    for path in SIGNALS:
        yield Case(f"foreign origin, POST {path}, body not read", post(path, None, EVIL), 403)
        yield Case(f"cross-site, POST {path}", post(path, b"{}", "Sec-Fetch-Site: cross-site"), 403)
        preflight = get(path, EVIL, "Access-Control-Request-Method: POST", method="OPTIONS")
        yield Case(f"preflight {path}", preflight, 403)
    yield Case("foreign origin, protobuf", post("/v1/metrics", b"", EVIL, kind=PROTOBUF), 403)
    yield Case("same-site", get("/v1/metrics", "Sec-Fetch-Site: same-site"), 403)
    yield Case("made-up fetch site", get("/v1/metrics", "Sec-Fetch-Site: sideways"), 403)
    for origin in (
        "null",
        "http://localhost:3000",
        "http://[",
        "http://localhost.evil",
        "file://",
        "localhost",
    ):
        yield Case(f"origin {origin}", get("/v1/metrics", f"Origin: {origin}"), 403)
    yield Case("foreign origin said to be same", get("/", EVIL, "Sec-Fetch-Site: same-origin"), 403)
    upgrade = get("/", EVIL, "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
    yield Case("websocket of a foreign origin", upgrade, 403)


def type_cases() -> Iterator[Case]:
    kinds = [
        "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonx",
        "application/grpc", "application/x-protobuffer", "application/xml", "json", "*/*",
        "text/plain;application/json", "text/plain; x=application/json",
    ]  # fmt: skip
    for kind in kinds:
        yield Case(f"type {kind}, body not read", post("/v1/metrics", None, kind=kind), 415, "content-type")
    for path in SIGNALS:
        yield Case(f"no type, {path}", post(path, None, kind=None), 415, "application/x-protobuf")
    yield Case("empty type", post("/v1/metrics", BODY, kind=""), 415)
    for encoding in (
        "br",
        "zstd",
        "snappy",
        "lz4",
        "compress",
        "x-unknown",
        "gzip, gzip",
        "deflate, gzip",
        "gzip,br",
        "aes128",
    ):
        refused = post("/v1/metrics", None, f"Content-Encoding: {encoding}")
        yield Case(f"encoding {encoding}, body not read", refused, 415, "content-encoding")
    twice = post("/v1/metrics", GZIP, "Content-Encoding: gzip", "Content-Encoding: gzip")
    yield Case("encoding given twice", twice, 415)
    yield Case("encoding br, protobuf", post("/v1/logs", None, "Content-Encoding: br", kind=PROTOBUF), 415, "gzip")


def body_cases() -> Iterator[Case]:
    garbage = [b"", b"garbage", b"[]", b"{", BODY[:-1], BODY + b"x", b"[" * 100_000, b"\xff\xfe", b'{"a":NaN}']
    for path in SIGNALS:
        for body in garbage:
            yield Case(f"{path} json {body[:12]!r}", post(path, body), 400, "json")
        for body in (b"garbage", b"\x0a\x05ab", as_protobuf(POINT)[:-1], b"{}"):
            yield Case(f"{path} protobuf {body[:12]!r}", post(path, body, kind=PROTOBUF), 400, "protobuf")
    yield Case("protobuf said to be json", post("/v1/metrics", as_protobuf(POINT)), 400)
    yield Case("json said to be protobuf", post("/v1/metrics", BODY, kind=PROTOBUF), 400)
    yield Case("wrong type inside", post("/v1/metrics", b'{"resourceMetrics":5}'), 400, "resourcemetrics")
    compressed = {
        "garbage": b"garbage", "empty": b"", "truncated": GZIP[:-1], "cut in half": GZIP[: len(GZIP) // 2],
        "trailing bytes": GZIP + b"x", "wrong checksum": GZIP[:-8] + bytes(8), "deflate": zlib.compress(BODY),
        "five members": GZIP * 5, "second member truncated": SOME_GZIP + GZIP[:-1],
    }  # fmt: skip
    for name, body in compressed.items():
        yield Case(f"gzip: {name}", post("/v1/metrics", body, "Content-Encoding: gzip"), 400, "gzip")
        chunked = framed(chunks(body), CHUNKED, "Content-Encoding: gzip", kind=PROTOBUF)
        yield Case(f"gzip, chunked, protobuf: {name}", chunked, 400, "gzip")
    for name, body in {"garbage": BODY, "truncated": zlib.compress(BODY)[:-1], "gzip": GZIP}.items():
        yield Case(f"deflate: {name}", post("/v1/logs", body, "Content-Encoding: deflate"), 400, "deflate")


def size_cases() -> Iterator[Case]:
    for path in SIGNALS:
        announced = framed(b"", f"Content-Length: {MAX_BODY + 1}", path=path)
        yield Case(f"{path}: large, body not sent", announced, 413, "max_body")
        yield Case(f"{path}: large", post(path, LARGE), 413, str(MAX_BODY))
        yield Case(f"{path}: large, chunked", framed(chunks(LARGE), CHUNKED, path=path), 413, "max_body")
        unpacked = post(path, gzip.compress(LARGE), "Content-Encoding: gzip")
        yield Case(f"{path}: large when unpacked", unpacked, 413, "max_body")
        bomb = post(path, zeros(1024, 31), "Content-Encoding: gzip", kind=PROTOBUF)
        yield Case(f"{path}: 1 GiB of zeros in 1 MB", bomb, 413, "decompression")
    yield Case("deflate bomb", post("/v1/metrics", zeros(1024, 15), "Content-Encoding: deflate"), 413, "decompression")
    huge = framed(b"", "Content-Length: 99999999999999999999")
    yield Case("a length of 20 digits", huge, 400)
    yield Case("20,001 points", post("/v1/metrics", MANY_JSON), 413, "20000")
    yield Case("20,001 points, protobuf", post("/v1/metrics", MANY_PROTOBUF, kind=PROTOBUF), 413, "20000")


def route_cases() -> Iterator[Case]:
    unknown = [
        "/v1/metric", "/v1/metrics/", "/v1/metrics/x", "//v1/metrics", "/v2/metrics", "/V1/METRICS", "/v1/profiles",
        "/v1development/profiles", "/prefix/v1/metrics", "/v1", "/favicon.ico", "/index.html", "/-/", "/-/reload",
        "/api", "/../etc/passwd", "/..%2f..%2fetc/passwd", "/%2e%2e/etc/passwd", "/static/../../bridge.db",
        "/metrics/..", "/%00", "/..\\..\\etc", "/metrics%00", "/static/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    ]  # fmt: skip
    for path in unknown:
        yield Case(f"GET {path}", get(path), 404)
        yield Case(f"POST {path}, body not read", post(path, None), 404)
    for kind in (JSON, PROTOBUF):
        yield Case(f"POST / with {kind}", post("/", BODY, kind=kind), 404, "/v1/metrics")
    yield Case("POST to a path with a prefix", post("/otel/v1/metrics", None, kind=PROTOBUF), 404)
    for path in ("/v1/logs", "/v1/traces"):
        for method in ("GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS"):
            yield Case(f"{method} {path}", get(path, method=method), 405, "allow: post")
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND"):
        yield Case(f"{method} /v1/metrics", get("/v1/metrics", method=method), 405, "post")
    for path in ("/metrics", "/-/healthy", "/-/ready"):
        for method in ("PUT", "DELETE", "OPTIONS"):
            yield Case(f"{method} {path}", get(path, method=method), 405, "get")
        yield Case(f"POST {path}", post(path, None, kind=PROTOBUF), 405, "get")


def framing_cases() -> Iterator[Case]:
    good = chunks(BODY)
    length = f"Content-Length: {len(BODY)}"
    yield Case("length and chunked", framed(good, length, CHUNKED), 400)
    yield Case("chunked and length", framed(good, CHUNKED, "Content-Length: 4"), 400)
    yield Case("two lengths", framed(BODY, length, "Content-Length: 4"), 400)
    yield Case("the same length twice", framed(BODY, length, length), 400)
    for value in ("+5", "-1", "0x5", "5, 5", "5 5", "", "five", "1e3", "\u00b2"):
        yield Case(f"length {value!r}", framed(BODY, f"Content-Length: {value}"), 400)
    for coding in ("chunked, identity", "xchunked", "identity", "chunked, chunked"):
        yield Case(f"transfer coding {coding!r}", framed(good, f"Transfer-Encoding: {coding}"), 400)
    yield Case("two transfer codings", framed(good, CHUNKED, "Transfer-Encoding: identity"), 400)
    yield Case("space before the colon", framed(good, "Transfer-Encoding : chunked"), 400)
    for size in (b"x", b"-1", b"+5", b"0x5", b"5 5", b"", b"fffffffffffffffff"):
        yield Case(f"chunk size {size!r}", framed(size + b"\r\nabcde\r\n0\r\n\r\n", CHUNKED), 400)
    yield Case("chunk longer than its size", framed(b"2\r\nabcde\r\n0\r\n\r\n", CHUNKED), 400)
    yield Case("folded header", framed(BODY, length, "X-Folded: a\r\n b"), 400)
    yield Case("folded first header", b"GET / HTTP/1.1\r\n Host: localhost\r\n\r\n", 400)
    yield Case("NUL in a header", get("/", "X-Nul: a\0b"), 400)
    yield Case("bare CR in a header", get("/", "X-Return: a\rb"), 400)
    yield Case("header without a name", get("/", ": x"), 400)
    yield Case("header without a colon", get("/", "nonsense"), 400)
    yield Case("space in a header name", get("/", "X Y: z"), 400)
    yield Case("header of 20 kB", get("/", "X-Long: " + "x" * 20_000), 400)
    yield Case("request line of 20 kB", get("/" + "x" * 20_000), 400)
    yield Case("garbage", b"garbage\r\n\r\n", 400)
    yield Case("no version", b"GET /\r\n\r\n", 400)
    yield Case("a version of the future", b"GET / HTTP/3.0\r\nHost: localhost\r\n\r\n", 400)
    yield Case("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64) + b"\r\n\r\n", 400)
    yield Case("gRPC", PREFACE, 400, "http/protobuf")


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
GROUPS: list[Callable[[], Iterator[Case]]] = [
    host_cases, origin_cases, type_cases, body_cases, size_cases, route_cases, framing_cases,
]  # fmt: skip
REFUSED = [case for group in GROUPS for case in group()]


@pytest.fixture(scope="module")
def bridge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One bridge for the tables of this module."""
    daemon = Daemon(tmp_path_factory.mktemp("receiver")).start()
    yield daemon
    daemon.close()


@pytest.mark.parametrize("case", REFUSED, ids=[case.name for case in REFUSED])
def test_a_refusal_says_why_in_the_encoding_of_the_request(bridge: Daemon, case: Case) -> None:
    answer = exchange(bridge, case.request)
    assert answer.status == case.status, answer
    assert case.word in answer.text
    assert not [name for name in answer.headers if name.startswith("access-control-")]
    if not case.request.startswith(b"HEAD "):
        assert 10 < len(message_of(answer, case.encoding)) < 1000


def test_no_refusal_counts_anything(bridge: Daemon) -> None:
    """The whole table in one go: the counters stand, the bridge answers, the log is calm."""
    before = bridge.samples()
    for case in REFUSED:
        exchange(bridge, case.request)
    assert bridge.samples() == before
    assert bridge.get("/-/ready").status == 200
    assert_calm(bridge)


FRAMING = list(framing_cases())


@pytest.mark.parametrize("case", FRAMING, ids=[case.name for case in FRAMING])
def test_what_follows_an_unreadable_request_is_not_read(bridge: Daemon, case: Case) -> None:
    """No request can be smuggled in the body of a broken one."""
    with Wire(bridge.port) as wire:
        wire.send(case.request + get("/-/healthy"))
        assert wire.answer().status == 400
        assert wire.is_closed()


# --- what is accepted ------------------------------------------------------------------------------------------


class Way(NamedTuple):
    """One way to send one point of 3 input tokens, the encoding that the answer must have, and the request."""

    name: str
    encoding: str
    request: bytes


def ways() -> Iterator[Way]:
    numbers = itertools.count(1000)

    def in_json() -> bytes:
        return as_json(request_of(tokens(3, at=next(numbers))))

    def in_protobuf() -> bytes:
        return as_protobuf(request_of(tokens(3, at=next(numbers))))

    def posted(name: str, body: bytes, *headers: str, kind: str = JSON) -> Way:
        encoding = PROTOBUF if "protobuf" in kind.lower() else JSON
        return Way(name, encoding, post("/v1/metrics", body, *headers, kind=kind))

    for parameter in ("", "; charset=utf-8", ";charset=UTF-8", " ; a=b", '; charset="utf-8"; x=y'):
        for kind in ("application/json", "Application/JSON"):
            yield posted(f"type {kind}{parameter}", in_json(), kind=kind + parameter)
        for kind in ("application/x-protobuf", "APPLICATION/X-PROTOBUF"):
            yield posted(f"type {kind}{parameter}", in_protobuf(), kind=kind + parameter)
    for name, encoding, pack in (
        ("gzip", "gzip", gzip.compress),
        ("gzip in upper case", "GZIP", gzip.compress),
        ("gzip of four members", "gzip", in_four_members),
        ("deflate", "deflate", zlib.compress),
    ):
        header = f"Content-Encoding: {encoding}"
        yield posted(name, pack(in_json()), header)
        yield posted(f"{name}, protobuf", pack(in_protobuf()), header, kind=PROTOBUF)
        yield Way(f"{name}, chunked", JSON, framed(chunks(pack(in_json()), 50), CHUNKED, header))
    yield Way("chunked", JSON, framed(chunks(in_json(), 70), CHUNKED))
    yield Way("chunked, byte by byte", JSON, framed(chunks(in_json(), 1), "transfer-encoding: Chunked"))
    yield Way("chunk extension", JSON, framed(b"5;name=value\r\n     \r\n" + chunks(in_json()), CHUNKED))
    yield Way("trailer", JSON, framed(chunks(in_json())[:-2] + b"X-Trailer: x\r\n\r\n", CHUNKED))
    yield posted("padded to the limit", in_json().ljust(MAX_BODY))
    yield posted("unpacked to the limit", gzip.compress(in_json().ljust(MAX_BODY)), "Content-Encoding: gzip")
    yield posted("Authorization", in_json(), "Authorization: Bearer x", "X-Custom: y")
    yield posted("gzip wanted back", in_json(), "Accept-Encoding: gzip, deflate, br", "Accept: text/html")
    yield posted("fetch metadata of our own", in_json(), "Sec-Fetch-Site: same-origin")
    own_origin = post("/v1/metrics", in_json(), "Origin: http://localhost:PORT", host="localhost:PORT")
    yield Way("own origin", JSON, own_origin)
    yield Way("query", JSON, post("/v1/metrics?tenant=a", in_json()))
    yield Way("absolute form", JSON, post("http://localhost:4318/v1/metrics", in_json()))
    yield Way("HTTP/1.0", JSON, post("/v1/metrics", in_json()).replace(b"HTTP/1.1", b"HTTP/1.0"))
    yield Way("blank line first", JSON, b"\r\n" + post("/v1/metrics", in_json()))


def in_four_members(body: bytes) -> bytes:
    return b"".join(gzip.compress(part) for part in (body[:9], body[9:50], b"", body[50:]))


WAYS = list(ways())


@pytest.mark.parametrize("way", WAYS, ids=[way.name for way in WAYS])
def test_every_way_to_send_a_point_counts_it_once(bridge: Daemon, way: Way) -> None:
    before = int(bridge.samples()[INPUT])
    answer = exchange(bridge, way.request)
    assert answer.status == 200, answer
    assert answer.headers["content-type"].partition(";")[0] == way.encoding
    assert answer.body == (b"{}" if way.encoding == JSON else b"")
    assert int(bridge.samples()[INPUT]) - before == 3


HOSTS = [
    "localhost", "localhost:4318", "LOCALHOST", "LocalHost:80", "localhost.", "localhost.:4318", "app.localhost",
    "a.b.localhost:1", "A.LOCALHOST.:4318", "127.0.0.1", "127.0.0.1:4318", "127.0.0.1:65535", "127.0.1.1",
    "127.255.255.254:9", "[::1]", "[::1]:4318", "host.docker.internal", "Host.Docker.Internal:4318",
    "host.docker.internal.", "host.containers.internal", "host.containers.internal:4318", "HOST.CONTAINERS.INTERNAL.:1",
]  # fmt: skip


@pytest.mark.parametrize("host", HOSTS)
def test_hosts_that_mean_this_machine(bridge: Daemon, host: str) -> None:
    assert exchange(bridge, get("/v1/metrics", host=host)).status == 200
    assert exchange(bridge, post("/v1/metrics", b"{}", host=host)).status == 200


@pytest.mark.parametrize("path", PAGES)
@pytest.mark.parametrize(
    "headers",
    [
        [],
        ["Sec-Fetch-Site: none"],
        ["Sec-Fetch-Site: same-origin"],
        ["Origin: http://localhost:PORT", "Sec-Fetch-Site: same-origin"],
    ],
    ids=str,
)
def test_pages_of_our_own_origin(bridge: Daemon, path: str, headers: list[str]) -> None:
    answer = exchange(bridge, get(path, *headers, host="localhost:PORT"))
    assert answer.status == 200
    assert answer.body
    assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["cache-control"] == "no-store"
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert "aiohttp" not in answer.text
    assert "python/" not in answer.headers.get("server", "").lower()


def test_the_landing_page_shows_a_host_as_text(bridge: Daemon) -> None:
    answer = exchange(bridge, get("/", host='"><script>alert(1)</script>.localhost'))
    assert answer.status in (200, 400, 421)
    assert "<script" not in answer.text


@pytest.mark.parametrize("path", PAGES)
def test_head_is_get_without_the_body(bridge: Daemon, path: str) -> None:
    with Wire(bridge.port) as wire:
        wire.send(get(path, method="HEAD"))
        answer = wire.answer(to_head=True)
        wire.send(get(path))
        assert wire.answer().headers["content-type"] == answer.headers["content-type"]
    assert answer.status == 200


@pytest.mark.parametrize("path", PAGES)
def test_pages_over_http_1_0(bridge: Daemon, path: str) -> None:
    with Wire(bridge.port) as wire:
        wire.send(head(f"GET {path} HTTP/1.0", "Host: localhost"))
        assert wire.answer().status == 200
        assert wire.is_closed()


@pytest.mark.parametrize("path", SIGNALS)
@pytest.mark.parametrize(("kind", "body", "want"), [(JSON, b"{}", b"{}"), (PROTOBUF, b"", b"")])
def test_an_empty_request_is_a_success(bridge: Daemon, path: str, kind: str, body: bytes, want: bytes) -> None:
    answer = exchange(bridge, post(path, body, kind=kind))
    assert (answer.status, answer.body) == (200, want)
    assert answer.headers["content-type"] == kind


def named(path: str, *names: str) -> dict[str, Any]:
    """A request of log records or spans of these names."""
    if path == "/v1/logs":
        return {"resourceLogs": [{"scopeLogs": [{"logRecords": [{"eventName": name} for name in names]}]}]}
    return {"resourceSpans": [{"scopeSpans": [{"spans": [{"name": name} for name in names]}]}]}


@pytest.mark.parametrize(
    ("path", "counter"), [("/v1/logs", "bridge_log_records_total"), ("/v1/traces", "bridge_spans_total")]
)
def test_logs_and_spans_are_counted_by_name(make_daemon: Callable[..., Daemon], path: str, counter: str) -> None:
    daemon = make_daemon().start()
    assert daemon.post(path, named(path, "api_request", "api_request", "tool_result")).json == {}
    assert daemon.post(path, named(path, "api_request"), compress=True, chunked=True).json == {}
    samples = daemon.samples("/metrics")
    assert float(samples[f'{counter}{{name="api_request"}}']) == 3
    assert float(samples[f'{counter}{{name="tool_result"}}']) == 1
    odd = ["", "x" * 10_000, 'quote"', "new\nline", "\u00e9", *(f"name-{at}" for at in range(1000))]
    assert daemon.post(path, named(path, *odd)).json == {}
    counts = {name: float(value) for name, value in daemon.samples("/metrics").items() if name.startswith(counter)}
    assert sum(counts.values()) == 4 + len(odd)
    assert len(counts) < 150
    assert max(map(len, counts)) < 200


def test_both_address_families(bridge: Daemon) -> None:
    for address in ("127.0.0.1", "::1"):
        with Wire(bridge.port, address) as wire:
            wire.send(get("/-/healthy"))
            assert wire.answer().status == 200


def test_pipelined_requests_are_answered_in_order(bridge: Daemon) -> None:
    before = int(bridge.samples()[INPUT])
    body = as_json(request_of(tokens(7, at=1)))
    with Wire(bridge.port) as wire:
        wire.send(
            get("/-/healthy") + post("/v1/metrics", body) + get("/v1/metrics") + get("/v1/logs") + get("/nowhere")
        )
        answers = [wire.answer() for _ in range(5)]
    assert [answer.status for answer in answers] == [200, 200, 200, 405, 404]
    assert f"{INPUT} {before + 7} ".encode() in answers[2].body


def test_a_connection_is_kept_for_all_signals(bridge: Daemon) -> None:
    with Wire(bridge.port) as wire:
        for at in range(30):
            kind, body = ((JSON, b"{}"), (PROTOBUF, b""))[at % 2]
            wire.send(post(SIGNALS[at % 3], body, kind=kind))
            answer = wire.answer()
            assert (answer.status, answer.body) == (200, body)
            for refused, status in (
                (post("/v1/metrics", b"garbage"), 400),
                (post("/nowhere", BODY), 404),
                (post("/v1/metrics", BODY, kind="text/plain"), 415),
                (post("/v1/metrics", BODY, host="evil.example"), 421),
            ):
                wire.send(refused)
                assert wire.answer().status == status


def test_a_body_may_wait_for_the_invitation(bridge: Daemon) -> None:
    body = as_json(request_of(tokens(1, at=2)))
    with Wire(bridge.port) as wire:
        wire.send(post("/v1/metrics", None, "Expect: 100-continue").replace(b"1000", b"%d" % len(body)))
        assert wire.answer().status == 100
        wire.send(body)
        assert wire.answer().status == 200


@pytest.mark.parametrize(
    ("refused", "status"),
    [
        (post("/v1/metrics", None, "Expect: 100-continue", kind="text/plain"), 415),
        (post("/v1/metrics", None, "Expect: 100-continue", host="evil.example"), 421),
        (post("/v1/metrics", None, "Expect: 100-continue", EVIL), 403),
        (post("/nowhere", None, "Expect: 100-continue"), 404),
        (framed(b"", "Expect: 100-continue", f"Content-Length: {MAX_BODY + 1}"), 413),
    ],
    ids=["415", "421", "403", "404", "413"],
)
def test_a_body_that_will_be_refused_is_not_invited(bridge: Daemon, refused: bytes, status: int) -> None:
    assert exchange(bridge, refused).status == status


# --- points that are refused -----------------------------------------------------------------------------------

TOKENS, COST, TIME = "claude_code.token.usage", "claude_code.cost.usage", "claude_code.active_time.total"


@pytest.mark.parametrize(
    ("name", "data", "value", "reason"),
    [
        (TOKENS, {}, {"asDouble": -1}, "negative"),
        (TOKENS, {"aggregationTemporality": 2}, {"asDouble": -1}, "negative"),
        (TOKENS, {}, {"asDouble": "NaN"}, "not_finite"),
        (TOKENS, {}, {"asDouble": "Infinity"}, "not_finite"),
        (TOKENS, {}, {}, "no_value"),
        (TOKENS, {"aggregationTemporality": 0}, {"asInt": 1}, "no_temporality"),
        (TOKENS, {}, {"asInt": 1_000_000_001}, "implausible"),
        (TOKENS, {}, {"asDouble": 1e300}, "implausible"),
        (COST, {}, {"asDouble": 100_000.5}, "implausible"),
        (TIME, {}, {"asDouble": 1_000_000.5}, "implausible"),
        (TOKENS, {}, {"asInt": 1, "timeUnixNano": str(2**64 - 1)}, "malformed"),
    ],
)
@pytest.mark.parametrize("encoding", [JSON, PROTOBUF])
def test_a_bad_point_does_not_cost_its_neighbours(
    bridge: Daemon, encoding: str, name: str, data: dict[str, Any], value: dict[str, Any], reason: str, request: Any
) -> None:
    at = 5000 + 2 * zlib.crc32(request.node.name.encode()) % 10_000_000
    bad = {name: member for name, member in tokens(0, at=at).items() if name != "asDouble"} | value
    body = request_of(tokens(5, at=at), tokens(6, at=at + 1))
    bad_metrics = request_of(bad, bad, bad, name=name, **data)
    body["resourceMetrics"] = [*bad_metrics["resourceMetrics"], *body["resourceMetrics"]]
    dropped = f'bridge_points_dropped_total{{reason="{reason}"}}'
    before, before_dropped = int(bridge.samples()[INPUT]), float(bridge.samples("/metrics").get(dropped, 0))
    payload = as_json(body) if encoding == JSON else as_protobuf(body)
    answer = exchange(bridge, post("/v1/metrics", payload, kind=encoding))
    assert answer.status == 200
    assert int(bridge.samples()[INPUT]) - before == 11
    assert float(bridge.samples("/metrics")[dropped]) - before_dropped == 3
    if encoding == JSON:
        partial = json.loads(answer.body)["partialSuccess"]
        rejected, message = partial["rejectedDataPoints"], partial["errorMessage"]
        assert rejected == "3"
    else:
        response = ExportMetricsServiceResponse.FromString(answer.body).partial_success
        rejected, message = response.rejected_data_points, response.error_message
        assert rejected == 3
    assert name in message
    assert reason in message


@pytest.mark.parametrize(
    ("name", "value"), [(TOKENS, 1_000_000_000), (COST, 100_000), (TIME, 1_000_000)], ids=["tokens", "cost", "time"]
)
def test_the_largest_plausible_point_counts(make_daemon: Callable[..., Daemon], name: str, value: int) -> None:
    point = tokens(value)
    point["attributes"][0]["value"]["stringValue"] = "input" if name == TOKENS else "user"
    daemon = make_daemon().start()
    assert daemon.post("/v1/metrics", request_of(point, name=name)).json == {}
    samples = {TOKENS: INPUT, COST: "claude_code_cost_usage", TIME: 'claude_code_active_time_total{type="user"}'}
    assert float(daemon.samples()[samples[name]]) == value


def test_20_000_points_are_not_too_many(bridge: Daemon) -> None:
    body = request_of(*[{"asInt": 1, "timeUnixNano": str(at)} for at in range(20_000)], name="many")
    answer = exchange(bridge, post("/v1/metrics", as_json(body)))
    assert (answer.status, answer.body) == (200, b"{}")


# --- clients that go wrong -------------------------------------------------------------------------------------


def wait_for(daemon: Daemon, text: str) -> None:
    """Until the log says it."""
    deadline = time.monotonic() + 5
    while text not in daemon.log:
        assert time.monotonic() < deadline, f"not in the log: {text}\n{daemon.log}"
        time.sleep(0.02)


def assert_calm(daemon: Daemon) -> None:
    """No fault of the bridge's own in its log and its metrics, and no flood of lines."""
    lines = daemon.log.splitlines()
    assert [line for line in lines if re.search(r" (error|critical) |Traceback", line)] == []
    assert len(lines) < 100
    if daemon.process is not None and daemon.process.poll() is None:
        assert [name for name in daemon.samples("/metrics") if 'code="500"' in name] == []


def test_a_grpc_client_gets_one_hint_in_the_log(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon().start()
    for _ in range(5):
        answer = exchange(daemon, PREFACE)
        assert answer.status == 400
        assert HINT in message_of(answer, JSON)
    wait_for(daemon, HINT)
    assert daemon.stop() == 0
    assert daemon.log.count(HINT) == 1
    assert_calm(daemon)


def test_a_broken_request_is_not_taken_for_grpc(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon().start()
    answer = exchange(daemon, get("/", "X-Broken: PRIVATE\0"))
    assert answer.status == 400
    assert HINT not in message_of(answer, JSON)
    assert HINT not in daemon.log


def test_a_client_that_vanishes_changes_nothing(make_daemon: Callable[..., Daemon]) -> None:
    """Closed or reset in the head, in the body, in a chunk, and before the answer is read."""
    daemon = make_daemon().start()
    whole = post("/v1/metrics", as_json(request_of(tokens(5))))
    chunked = framed(chunks(as_json(request_of(tokens(5))), 50), CHUNKED)
    before = daemon.samples()
    for request in (whole, chunked):
        for length in range(0, len(request), 61):
            for reset in (False, True):
                with Wire(daemon.port) as wire:
                    wire.send(request[:length])
                    if reset:
                        wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert daemon.samples() == before
    assert daemon.post("/v1/metrics", request_of(tokens(5))).json == {}
    assert int(daemon.samples()[INPUT]) == 5
    assert_calm(daemon)


ANSWERS = {100, 200, 400, 403, 404, 405, 408, 413, 415, 421, 503}


def injured(request: bytes, chance: random.Random) -> bytes:
    """The request with one to three small injuries in its first 400 bytes."""
    data = bytearray(request)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(min(len(data), 400))
        end = at + chance.choice([1, 1, 3, 20])
        piece = data[at:end]
        byte = bytes([chance.randrange(256)])
        data[at:end] = chance.choice([byte, b"", piece * 2, piece[::-1], b"\r\n", b"\0", b":", b" ", b"9" * 30, b"%"])
    return bytes(data)


def test_injured_requests_get_an_answer_or_none(make_daemon: Callable[..., Daemon]) -> None:
    """Bytes changed, left out, doubled and moved anywhere in a request: a known status or a closed connection."""
    daemon = make_daemon().start()
    chance = random.Random(4318)
    seeds = [
        post("/v1/metrics", BODY),
        post("/v1/logs", GZIP, "Content-Encoding: gzip", "Origin: http://localhost"),
        framed(chunks(BODY, 50), CHUNKED, "Expect: 100-continue"),
        post("/v1/metrics", as_protobuf(POINT), "Sec-Fetch-Site: none", kind=PROTOBUF),
        get("/metrics", "Accept: application/openmetrics-text; version=1.0.0, */*;q=0.1", host="localhost:4318"),
    ]
    seen: set[int] = set()
    for _ in range(20):
        wires = [Wire(daemon.port) for _ in range(75)]
        for wire in wires:
            wire.send(injured(chance.choice(seeds), chance))
        daemon.get("/-/healthy")  # answered when all of them have been read
        for wire in wires:
            with wire:
                # Ends a request that waits for more, and is no request itself.
                wire.send(b"\r\n0\r\n\r\n" + b"x" * 2000 + b"\r\n\r\n")
                seen |= {int(status) for status in re.findall(rb"^HTTP/\d\.\d (\d{3}) ", wire.rest(0.2))}
    assert seen <= ANSWERS
    assert {200, 400, 404, 415, 421} <= seen
    assert daemon.get("/-/ready").status == 200
    assert_calm(daemon)


def test_a_request_in_small_pieces_is_one_request(bridge: Daemon) -> None:
    before = int(bridge.samples()[INPUT])
    request = post("/v1/metrics", as_json(request_of(tokens(4, at=3))))
    with Wire(bridge.port) as wire:
        wire.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(len(request)):
            wire.send(request[at : at + 1])
        assert wire.answer().status == 200
    assert int(bridge.samples()[INPUT]) - before == 4


@pytest.mark.parametrize(
    "body",
    [
        b"5;" + b"x" * 65_536 + b"\r\n     \r\n" + chunks(b"{}"),
        chunks(b" " * 50_000 + b"{}", 1),
        chunks(b"{}")[:-2] + b"X-Trailer: x\r\n" * 10_000 + b"\r\n",
        b"0" * 65_536 + chunks(b"{}"),
    ],
    ids=["long extension", "many chunks", "many trailers", "long chunk size"],
)
def test_odd_chunks_are_soon_answered(bridge: Daemon, body: bytes) -> None:
    began = time.monotonic()
    assert exchange(bridge, framed(body, CHUNKED)).status in (200, 400, 413)
    assert time.monotonic() - began < 2


# --- memory and overload ---------------------------------------------------------------------------------------


def peak_memory(daemon: Daemon) -> int:
    """The most memory in bytes that the bridge has used since the last call."""
    assert daemon.process is not None
    process = Path("/proc", str(daemon.process.pid))
    peak = int(re.findall(r"VmHWM:\s+(\d+) kB", (process / "status").read_text())[0]) * 1024
    (process / "clear_refs").write_text("5")
    return peak


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="memory of another process is read from /proc")


@needs_proc
@pytest.mark.parametrize(("encoding", "wbits"), [("gzip", 31), ("deflate", 15)])
def test_a_bomb_is_refused_at_once_and_takes_no_memory(
    make_daemon: Callable[..., Daemon], encoding: str, wbits: int
) -> None:
    daemon = make_daemon().start()
    daemon.post("/v1/metrics", BODY)
    bomb = post("/v1/metrics", zeros(1024, wbits), f"Content-Encoding: {encoding}")
    peak_memory(daemon)
    before = peak_memory(daemon)
    for _ in range(5):
        began = time.monotonic()
        assert exchange(daemon, bomb).status == 413
        assert time.monotonic() - began < 0.5
    assert peak_memory(daemon) - before < 10_000_000


@needs_proc
def test_many_large_bodies_at_once_stay_in_bounds(make_daemon: Callable[..., Daemon]) -> None:
    """64 bodies of 4 MiB: each is taken or refused for now, and the rest of the bridge goes on."""
    daemon = make_daemon().start()
    body = as_json(request_of(tokens(1)))[:-1] + b',"x":"' + b"x" * (MAX_BODY - 1000) + b'"}'
    request = post("/v1/metrics", gzip.compress(body, 1), "Content-Encoding: gzip")
    answers: list[Answer] = []
    clients = [threading.Thread(target=lambda: answers.append(exchange(daemon, request))) for _ in range(64)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    statuses = {answer.status for answer in answers}
    assert len(answers) == 64
    assert 200 in statuses
    assert statuses <= {200, 503}
    for answer in answers:
        if answer.status == 503:
            assert "retry-after" not in answer.headers
            assert message_of(answer, JSON)
    assert int(daemon.samples()[INPUT]) == 1
    assert peak_memory(daemon) < 300 * MIB
    assert exchange(daemon, request).status == 200
    assert_calm(daemon)


def empties(*tags: int) -> bytes:
    """A protobuf body just below the limit: as many empty messages as fit, in fields of these numbers."""
    body = bytes([tags[-1] << 3 | 2, 0]) * (MAX_BODY // 2 - 40)
    for tag in reversed(tags[:-1]):
        size, length = len(body), bytearray()
        while size > 127:
            length.append(size & 127 | 128)
            size >>= 7
        body = bytes([tag << 3 | 2, *length, size]) + body
    return body


DENSE = {
    "points": ("/v1/metrics", PROTOBUF, empties(1, 2, 2, 7, 1)),
    "points in JSON": ("/v1/metrics", JSON, as_json(request_of()).replace(b"[]", b"[" + b"{}," * 1_390_000 + b"{}]")),
    "resources": ("/v1/metrics", PROTOBUF, empties(1)),
    "metrics": ("/v1/metrics", PROTOBUF, empties(1, 2, 2)),
    "attributes": ("/v1/metrics", PROTOBUF, empties(1, 2, 2, 7, 1, 7)),
    "log records": ("/v1/logs", PROTOBUF, empties(1, 2, 2)),
}


@needs_proc
@pytest.mark.parametrize("name", DENSE)
def test_a_dense_body_is_in_nobodys_way(make_daemon: Callable[..., Daemon], name: str) -> None:
    """Two million empty messages in 4 kB of gzip: memory stays bounded, scrapes are answered meanwhile."""
    path, kind, body = DENSE[name]
    daemon = make_daemon().start()
    answers: list[Answer] = []
    request = post(path, gzip.compress(body, 1), "Content-Encoding: gzip", kind=kind)
    client = threading.Thread(target=lambda: answers.append(exchange(daemon, request)))
    longest = 0.0
    began = time.monotonic()
    client.start()
    while client.is_alive():
        asked = time.monotonic()
        assert daemon.get("/v1/metrics").status == 200
        longest = max(longest, time.monotonic() - asked)
    assert answers[0].status in (200, 400, 413)
    assert longest < 1.5
    assert time.monotonic() - began < 3
    assert peak_memory(daemon) < 300 * MIB


def test_one_point_cannot_swell_the_scrape(make_daemon: Callable[..., Daemon]) -> None:
    """Names and values of any length and number: the point counts, the pages stay small."""
    daemon = make_daemon().start()
    many = [{"key": f"key.{at}", "value": {"stringValue": "v"}} for at in range(20_000)]
    point = tokens(5)
    for attributes in (
        [*many, *point["attributes"]],
        [*point["attributes"], {"key": "long", "value": {"stringValue": "v" * 2_000_000}}],
        [*point["attributes"], {"key": "k" * 2_000_000, "value": {"stringValue": "v"}}],
    ):
        assert daemon.post("/v1/metrics", request_of({**point, "attributes": attributes})).json == {}
    assert int(daemon.samples()[INPUT]) == 15
    daemon.post("/v1/metrics", request_of(tokens(1), name="n" * 2_000_000))
    daemon.post("/v1/metrics", request_of(tokens(1), name="long.unit", description="d" * 2_000_000))
    assert len(daemon.get("/metrics").body) < 200_000


def test_connections_are_limited(make_daemon: Callable[..., Daemon]) -> None:
    """Above the limit the oldest idle connection goes; who comes is served."""
    daemon = make_daemon(env={"BRIDGE_LIMITS_CONNECTIONS": "8"}).start()
    wires = [Wire(daemon.port) for _ in range(40)]
    for wire in wires[-4:]:
        wire.send(get("/-/healthy"))
        assert wire.answer().status == 200
    assert daemon.post("/v1/metrics", request_of(tokens(5))).json == {}
    assert wires[0].is_closed()
    assert daemon.log.count("limits.connections") == 1
    for wire in wires:
        wire.__exit__()
    assert_calm(daemon)


def test_a_body_that_does_not_arrive(make_daemon: Callable[..., Daemon]) -> None:
    """Slow senders are answered after the deadline, and meanwhile are in nobody's way."""
    daemon = make_daemon(env={"BRIDGE_LIMITS_BODY_SECONDS": "1"}).start()
    slow = [
        post("/v1/metrics", None),
        post("/v1/logs", None, kind=PROTOBUF) + b"x",
        framed(b"5\r\nab", CHUNKED),
        framed(b"", CHUNKED),
    ]
    wires = [Wire(daemon.port) for _ in slow]
    began = time.monotonic()
    for wire, request in zip(wires, slow, strict=True):
        wire.send(request)
    assert daemon.post("/v1/metrics", request_of(tokens(5))).status == 200
    assert time.monotonic() - began < 0.9
    for wire, kind in zip(wires, (JSON, PROTOBUF, JSON, JSON), strict=True):
        with wire:
            answer = wire.answer()
            assert answer.status == 408
            assert message_of(answer, kind)
            assert wire.is_closed()
    assert 1 <= time.monotonic() - began < 5
    assert_calm(daemon)
