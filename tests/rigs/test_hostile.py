"""Bad input of every kind, and what a web page can send: each gets its status at once, and changes nothing.

The oracle is the table: a name, bytes for the wire, and the status they must get. For each: the answer comes at once;
the connection is closed if the answer says so and is good for another request if not; no status is 5xx but 503.
Afterwards no counter and no log line but the throttled ones has come of all that.
"""

import gzip
import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.daemon import JSON, PROTOBUF, Daemon
from tests.test_receiver import (
    CHUNKED,
    REFUSED,
    SIGNALS,
    Case,
    Wire,
    as_json,
    as_protobuf,
    chunks,
    framed,
    get,
    head,
    post,
    request_of,
    tokens,
)

SECONDS, PATIENCE = 1.0, 5.0
"""How long an answer may take in a campaign, and on a machine that does other things as well."""
UNIT = {"/v1/metrics": "resourceMetrics", "/v1/logs": "resourceLogs", "/v1/traces": "resourceSpans"}
INNER = {
    "/v1/metrics": ("scopeMetrics", "metrics"),
    "/v1/logs": ("scopeLogs", "logRecords"),
    "/v1/traces": ("scopeSpans", "spans"),
}
WRONG: dict[str, Any] = {"a string": "x", "a number": 5, "true": True, "an object": {"x": 1}}


def shape_cases() -> Iterator[Case]:
    """A wrong type at each level of each signal."""
    for path, (scopes, members) in INNER.items():
        for name, wrong in WRONG.items():
            bodies: dict[str, Any] = {
                UNIT[path]: {UNIT[path]: wrong},
                scopes: {UNIT[path]: [{scopes: wrong}]},
                members: {UNIT[path]: [{scopes: [{members: wrong}]}]},
            }
            for place, body in bodies.items():
                yield Case(f"{path}: {place} is {name}", post(path, as_json(body)), 400, "not an array")
            yield Case(f"{path}: the root is {name} in a list", post(path, json.dumps([wrong]).encode()), 400)
        for name, wrong in {"a string": ["x"], "a number": [5], "a list": [[]]}.items():
            yield Case(f"{path}: one of {UNIT[path]} is {name}", post(path, as_json({UNIT[path]: wrong})), 400)
            body = {UNIT[path]: [{scopes: wrong}]}
            yield Case(f"{path}: one of {scopes} is {name}", post(path, as_json(body)), 400)


def text_cases() -> Iterator[Case]:
    """What is nearly JSON, and what JSON readers have fallen for."""
    texts = {
        "comment": b'{"resourceMetrics":[] /* x */}', "trailing comma": b'{"resourceMetrics":[],}',
        "single quotes": b"{'resourceMetrics':[]}", "no quotes": b"{resourceMetrics:[]}", "NUL": b"{\0}",
        "two roots": b"{}{}", "byte order mark": b"\xef\xbb\xbf{}", "UTF-16": "{}".encode("utf-16"),
        "UTF-32": "{}".encode("utf-32"), "overlong UTF-8": b'{"a":"\xc0\xaf"}',
        "surrogate in UTF-8": b'{"\xed\xa0\x80":1}',
        "latin-1": b'{"a":"\xe9"}', "Infinity": b'{"a":Infinity}', "-Infinity": b'{"a":-Infinity}',
        "hexadecimal": b'{"a":0x10}', "plus": b'{"a":+1}', "leading zero": b'{"a":01}', "bare point": b'{"a":.5}',
        "newline in a string": b'{"a":"\n"}', "bad escape": b'{"a":"\\x41"}', "half an escape": b'{"a":"\\u12"}',
        "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "deep lists": b'{"a":' + b"[" * 50_000,
        "form": b"resourceMetrics=1", "XML": b"<?xml version='1.0'?><!DOCTYPE x SYSTEM 'file:///etc/passwd'><x/>",
        "pickle": b"\x80\x04\x95\x05\0\0\0\0\0\0\0.", "a script": b"<script>alert(1)</script>",
    }  # fmt: skip
    for name, text in texts.items():
        for path in SIGNALS:
            yield Case(f"{path}: {name}", post(path, text), 400, "json")


def protobuf_cases() -> Iterator[Case]:
    """What is nearly protobuf."""
    deep = b"\x0a\x00"
    for _ in range(300):  # an attribute's value in a list in a value in a list ...
        size = len(deep)
        length = bytes([size & 127 | 128, size >> 7]) if size > 127 else bytes([size])
        deep = b"\x2a" + length + deep
    bodies = {
        "a length beyond the end": b"\x0a\xff\xff\xff\x7f", "a length of 2^63": b"\x0a" + b"\xff" * 9 + b"\x01",
        "an endless varint": b"\x08" + b"\xff" * 20, "field 0": b"\x02\x00", "wire type 6": b"\x0e",
        "wire type 7": b"\x0f", "an end without a group": b"\x0c", "a group without an end": b"\x0b",
        "cut after a tag": b"\x0a", "nothing but 0xff": b"\xff" * 100,
    }  # fmt: skip
    for name, body in bodies.items():
        for path in SIGNALS:
            yield Case(f"{path} protobuf: {name}", post(path, body, kind=PROTOBUF), 400, "protobuf")
    whole = as_protobuf(request_of(tokens(1)))
    for at in range(3, len(whole) - 1, 7):
        yield Case(f"protobuf cut at {at}", post("/v1/metrics", whole[:at], kind=PROTOBUF), 400)
    yield Case("gzip of nothing", post("/v1/metrics", gzip.compress(b""), "Content-Encoding: gzip"), 400)


def wire_cases() -> Iterator[Case]:
    """Heads and framings that HTTP servers have fallen for."""
    good, body = chunks(b"{}"), b"{}"
    for name, headers in {
        "chunked in a list of its own": ["Transfer-Encoding: ,chunked,"],
        "tab before chunked and identity": ["Transfer-Encoding:\tchunked", "Transfer-Encoding: identity"],
        "vertical tab": ["Transfer-Encoding: \x0bchunked"],
        "quoted": ['Transfer-Encoding: "chunked"'],
        "gzip in transfer": ["Transfer-Encoding: gzip, chunked", "Content-Length: 5"],
        "length with a comma": ["Content-Length: 2,2"],
        "length in octal": ["Content-Length: 0o2"],
        "length with an underscore": ["Content-Length: 0_2"],
        "length with a space inside": ["Content-Length: 1 0"],
        "length beyond 64 bits": [f"Content-Length: {2**64}"],
    }.items():
        yield Case(f"wire: {name}", framed(good, *headers), 400)
    for name, start in {
        "a tab": "GET\t/ HTTP/1.1", "lower case version": "GET / http/1.1",
        "no slash": "GET / HTTP1.1", "version 1.10": "GET / HTTP/1.10", "version 1.": "GET / HTTP/1.",
        "no path": "GET HTTP/1.1", "a NUL in the path": "GET /\0 HTTP/1.1", "method with a colon": "GE:T / HTTP/1.1",
    }.items():  # fmt: skip
        yield Case(f"wire: {name}", head(start, "Host: localhost"), 400)
    for version in ("0.9", "2.0", "9.9"):
        yield Case(f"wire: version {version}", head(f"GET / HTTP/{version}", "Host: localhost"), 400)
    for name, value in {"DEL": "a\x7fb", "NUL": "\0", "SOH": "\x01"}.items():
        yield Case(f"wire: {name} in the host", get("/", host=value), 400)
    yield Case("wire: 200 headers", get("/", *(f"X-{at}: x" for at in range(200))), 400)
    yield Case("wire: chunk size of 20 digits", framed(b"1" * 20 + b"\r\n" + body, CHUNKED), 400)
    yield Case("wire: bare newline after a chunk size", framed(b"2\n{}\r\n0\r\n\r\n", CHUNKED), 400)
    yield Case("wire: PROXY protocol", b"PROXY TCP4 6.6.6.6 127.0.0.1 1 4318\r\n" + get("/"), 400)
    for name, data in {
        "SSH": b"SSH-2.0-OpenSSH_9.9\r\n",
        "SMTP": b"EHLO x\r\n",
        "Redis": b"*1\r\n$4\r\nINFO\r\n",
    }.items():
        yield Case(f"wire: {name}", data + b"\r\n", 400)


HOSTILE = [*REFUSED, *shape_cases(), *text_cases(), *protobuf_cases(), *wire_cases()]


@pytest.fixture(scope="module")
def bridge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path_factory.mktemp("hostile"))
    yield daemon.start()
    daemon.close()


def problem_of(bridge: Daemon, case: Case, most: float) -> str:
    """What is wrong with the answer to a case; empty if nothing is."""
    began = time.monotonic()
    with Wire(bridge.port) as wire:
        wire.socket.settimeout(2 * PATIENCE)
        wire.send(case.request)
        answer = wire.answer(to_head=case.request.startswith(b"HEAD "))
        seconds = time.monotonic() - began
        if answer.status != case.status or case.word not in answer.text:
            return f"{answer.status}, not {case.status} {case.word}: {answer.body[:200]!r}"
        if seconds > most:
            return f"took {seconds:.1f} s"
        if not answer.stays:
            return "" if wire.is_closed() else "the connection stays, though the answer says close"
        announced = b"Content-Length: 1000\r\n" in case.request or b"Content-Length: 4194305" in case.request
        if announced:  # and never sent: a next request would be its body
            return ""
        wire.send(get("/-/healthy"))
        return "" if wire.answer().status == 200 else "the connection is no good for another request"


def test_every_bad_input_gets_its_status_at_once_and_changes_nothing(bridge: Daemon, campaign: bool) -> None:
    names = [case.name for case in HOSTILE]
    assert len(set(names)) >= 400
    assert all(case.status < 500 for case in HOSTILE)
    before = bridge.samples()
    problems = {}
    for case in HOSTILE:
        try:
            problem = problem_of(bridge, case, SECONDS if campaign else PATIENCE)
        except (AssertionError, OSError) as error:
            problem = repr(error).partition("\n")[0]
        if problem:
            problems[case.name] = problem
    assert problems == {}
    after = bridge.samples("/metrics")
    assert bridge.samples() == before
    assert not [name for name in after if name.startswith("claude_code")]
    assert float(after["bridge_points_accepted_total"]) == 0
    assert "Traceback" not in bridge.log
    assert len(bridge.log.splitlines()) < 60


# --- what a web page can send ----------------------------------------------------------------------------------

FOREIGN_HOSTS = ("evil.example", "evil.example:4318", "localhost.evil.example", "0.0.0.0:4318", "rebound.local")
OWN_HOSTS = ("localhost:4318", "127.0.0.1:4318", "[::1]:4318")
SITES = ("cross-site", "same-site", "same-origin", "")
TYPES = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", JSON, PROTOBUF)


def vectors() -> Iterator[Case]:
    """What a browser sends for a page of another origin, or of a name that was made to mean this machine.

    A page cannot leave out `Origin` where it posts, nor say `same-origin` of another origin; only old browsers say
    nothing of the site. It can choose path, method and, as far as CORS lets it, type.
    """
    sent = [("POST", path, kind) for path in SIGNALS for kind in TYPES]
    read = [("GET", path, "") for path in ("/v1/metrics", "/metrics", "/", "/-/ready")]
    flight = [("OPTIONS", path, "") for path in SIGNALS]
    for host in FOREIGN_HOSTS:  # rebinding: to the browser it is the page's own origin
        for method, path, kind in [*sent[:5], *read]:
            yield _vector(f"rebound to {host}", method, path, kind, host, f"http://{host}", "same-origin", 421)
    origins = ("http://evil.example", "null", "http://localhost:3000", "http://localhost.evil.example:4318")
    for host, origin in itertools.product(OWN_HOSTS, origins):
        for method, path, kind in [*sent, *flight]:
            yield _vector(f"page of {origin}", method, path, kind, host, origin, "cross-site", 403)
        for method, path, kind in (*read[:2], *sent[5:7]):
            yield _vector(f"old browser, page of {origin}", method, path, kind, host, origin, "", 403)
    for host, site in itertools.product(OWN_HOSTS, ("cross-site", "same-site")):  # images, scripts, links, frames
        for method, path, kind in read:
            yield _vector("no-cors element", method, path, kind, host, "", site, 403)


def _vector(name: str, method: str, path: str, kind: str, host: str, origin: str, site: str, status: int) -> Case:
    headers = [f"Origin: {origin}"] if origin else []
    if site:
        mode = "no-cors" if kind in TYPES[:3] or not origin else "cors"
        headers += [f"Sec-Fetch-Site: {site}", f"Sec-Fetch-Mode: {mode}", "Sec-Fetch-Dest: empty"]
    if method == "OPTIONS":
        headers += ["Access-Control-Request-Method: POST", "Access-Control-Request-Headers: content-type"]
    name = f"{name}: {method} {path} {kind} to {host} {site}"
    request = (
        post(path, None, *headers, kind=kind, host=host) if kind else get(path, *headers, host=host, method=method)
    )
    return Case(name, request, status)


VECTORS = list(vectors())


def test_no_web_page_gets_in(bridge: Daemon, campaign: bool) -> None:
    """Refused before the body, which is announced and never sent, and without a word that CORS would understand."""
    assert len({case.name for case in VECTORS}) >= 300
    before = bridge.samples()
    for case in VECTORS:
        began = time.monotonic()
        with Wire(bridge.port) as wire:
            wire.send(case.request)
            answer = wire.answer()
        assert answer.status == case.status, case.name
        assert time.monotonic() - began < (SECONDS if campaign else PATIENCE), case.name
        assert not [name for name in answer.headers if name.startswith("access-control-")], case.name
        assert b"claude_code" not in answer.body, case.name
    assert bridge.samples() == before
