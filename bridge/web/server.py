"""The HTTP server: connections, the guard, routes and errors. What is served stands in receiver and metrics.

Law: no route is reached by a request that a web page could have sent (Host, Origin and fetch metadata are checked
before the body is read) or, over the network, by one without a token; every error is a google.rpc.Status that says
what to do; and no client holds more than its share: connections, heads, bodies and unread answers have limits and
deadlines. Above a limit the oldest connection goes that waits for its client and has never finished a request; a
request whose body is here is never cut.
"""

import asyncio
import ipaddress
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import Any

from aiohttp import StreamReader, web
from aiohttp.web_protocol import RequestHandler

from bridge import otlp
from bridge.config import Config
from bridge.otlp import Encoding
from bridge.telemetry import Telemetry, Throttle, log
from bridge.web.access import Access, Caller, Denial, is_loopback

KEEPALIVE_SECONDS = 3_600.0
HEADER_SECONDS = 10.0
LINGER_SECONDS = 2.0
PENALTY_SECONDS = 0.25
"""How long a 429 takes, so that many connections that flood are slow instead of the bridge."""
HEADER_BYTES = 64 * 2**10
"""Of a head that is not complete; the parser bounds each line and their number, which would be a megabyte."""
UNREAD_SECONDS = 30.0
UNREAD_STEP = 64 * 2**10
"""A client takes at least so many bytes of a waiting answer in UNREAD_SECONDS, or is cut off."""
UNREAD_BYTES = 64 * 2**20
"""All answers that wait for their clients to read them, at most."""

HEADERS = {
    "Server": "claude-otel-bridge",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
}

HTTP2_PREFACE = b"PRI * HTTP/2.0"
GRPC_HINT = (
    "a client speaks gRPC to this port, which serves OTLP over HTTP only; "
    "set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf in the client"
)
TLS_RECORD = b"\x16\x03"
TLS_HINT = "a client speaks TLS to this port, which does not; use http:// in its endpoint, or set tls.cert and tls.key"

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
CALLER = web.RequestKey("caller", Caller)
"""Who asks, beside each request that a handler gets."""
Routes = Mapping[str, Mapping[str, Handler]]
"""Path -> method -> handler. A path with GET answers HEAD as well."""


class Refused(Exception):  # what happened to the request, and a value more than a fault
    """The request is answered with an error: `code`, and a message that says what, where and what to do."""

    def __init__(self, code: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.headers = dict(headers or {})


def response(body: bytes, content_type: str, code: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """A response with the headers that all of ours have."""
    return web.Response(body=body, status=code, headers={**HEADERS, "Content-Type": content_type, **(headers or {})})


def caller_of(request: web.BaseRequest) -> Caller:
    """Who asks."""
    return request.get(CALLER) or Caller(request.remote or "", "", is_local=True)


def error_response(error: Refused, encoding: Encoding) -> web.Response:
    """A Status body in the request's encoding."""
    return response(otlp.status(encoding, error.code, str(error)), encoding.value, error.code, error.headers)


def answer_encoding(content_type: str) -> Encoding:
    """The encoding to answer in: protobuf to protobuf, JSON to everything else."""
    kind = content_type.partition(";")[0].strip().lower()
    return Encoding.PROTOBUF if kind == Encoding.PROTOBUF else Encoding.JSON


class _Connection(RequestHandler):
    """One connection, with a deadline for the head of every request and for unread answers, and quiet about broken
    clients. `answered`: a request has come in; `finished`: one was answered well."""

    def __init__(self, server: "Server", **options: Any) -> None:
        super().__init__(server, **options)
        self.server = server
        self.answered = self.finished = False
        self.peer = self.local = ""
        self.is_tls = False
        self.port = 0
        self.since = self.heard = 0.0
        self._body: StreamReader | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None
        self._unread = self._head_bytes = 0
        self._opening = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.peer, *_ = transport.get_extra_info("peername") or ("",)
        self.local, self.port, *_ = transport.get_extra_info("sockname") or ("", 0)
        self.is_tls = transport.get_extra_info("sslcontext") is not None
        self.since = self.heard = self._loop.time()
        super().connection_made(transport)
        self._head_timer = self._loop.call_later(HEADER_SECONDS, self._end_of_patience)

    def connection_lost(self, exc: BaseException | None) -> None:
        for timer in (self._head_timer, self._unread_timer):
            if timer is not None:
                timer.cancel()
        self.server.paused.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._opening:
            self._opening = data[: len(HTTP2_PREFACE)]
        is_body = self._is_body_due
        before = self._request_count
        super().data_received(data)
        self.heard = self._loop.time()
        if self._request_count > before:
            if self._messages:
                self._body = self._messages[-1][1]
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None
            self._head_bytes = 0
        elif data and not is_body:
            self._head_bytes += len(data)
            if self._head_bytes > HEADER_BYTES:
                self._refuse(400, f"the head of the request is larger than {HEADER_BYTES} bytes")
            elif self._head_timer is None:
                self._head_timer = self._loop.call_later(HEADER_SECONDS, self._end_of_patience)

    @property
    def _is_body_due(self) -> bool:
        return self._body is not None and not self._body.is_eof()

    @property
    def awaits_client(self) -> bool:
        """Whether it is the client that has to do something: send, or read an answer."""
        return not self._request_in_progress or self._paused or self._is_body_due

    def drop(self) -> None:
        """End the connection now, whatever is still to be sent."""
        transport = self.transport
        self.force_close()
        if transport is not None:
            transport.abort()

    def _end_of_patience(self) -> None:
        """The head of a request did not come in time."""
        if self._request_in_progress or self._messages:  # it is our turn still
            self._head_timer = self._loop.call_later(HEADER_SECONDS, self._end_of_patience)
            return
        self._refuse(408, f"the head of the request did not arrive within {HEADER_SECONDS:g} s")

    def _refuse(self, code: int, message: str) -> None:
        """End the connection before there is a request, with a word to whoever has begun one."""
        if self._opening and self.transport is not None:
            body = otlp.status(Encoding.JSON, code, message)
            self.transport.write(
                b"HTTP/1.1 %d %b\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
                % (code, HTTPStatus(code).phrase.encode(), len(body), body)
            )
        self.force_close()

    # --- answers that nobody reads ---

    @property
    def unread_bytes(self) -> int:
        """What waits to be read by the client, as far as the kernel has not taken it."""
        return 0 if self.transport is None else self.transport.get_write_buffer_size()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.unread_bytes
        self._unread_timer = self._loop.call_later(UNREAD_SECONDS, self._require_progress)
        self.server.note_paused(self)

    def resume_writing(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
        self.server.paused.pop(self, None)
        super().resume_writing()

    def _require_progress(self) -> None:
        left = self.unread_bytes
        if self._unread - left < UNREAD_STEP:
            self.drop()
            return
        self._unread = left
        self._unread_timer = self._loop.call_later(UNREAD_SECONDS, self._require_progress)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Bytes that are no HTTP request, or a fault of our own; the connection is closed afterwards."""
        del request, message
        self.answered = True
        if isinstance(exc, ConnectionError):
            answer = error_response(Refused(400, "connection lost"), Encoding.JSON)
        elif status == 500:
            log.error("request failed", exc_info=exc)
            answer = error_response(Refused(500, "internal error; the log says where"), Encoding.JSON)
        elif self._opening.startswith(TLS_RECORD):
            self.server.throttle.warning("tls", TLS_HINT)
            answer = error_response(Refused(400, TLS_HINT), Encoding.JSON)
        elif self._opening == HTTP2_PREFACE:
            self.server.telemetry.grpc_attempts.inc()
            self.server.throttle.warning("grpc", GRPC_HINT)
            answer = error_response(Refused(400, GRPC_HINT), Encoding.JSON)
        else:
            answer = error_response(Refused(400, "not a valid HTTP/1.1 request"), Encoding.JSON)
        answer.force_close()
        return answer


class Server(web.Server):
    """Dispatches requests to `routes` after the guard. `offers` says what an address of ours serves: `ingest`, `read`
    or everything; `max_connections` is what the process has descriptors for."""

    def __init__(
        self,
        routes: Routes,
        config: Config,
        telemetry: Telemetry,
        throttle: Throttle,
        access: Access,
        *,
        offers: Mapping[tuple[str, int], str] = MappingProxyType({}),
        max_connections: int | None = None,
    ) -> None:
        super().__init__(
            self._dispatch,
            access_log=None,
            auto_decompress=False,
            keepalive_timeout=KEEPALIVE_SECONDS,
            lingering_time=LINGER_SECONDS,
            logger=logging.getLogger("bridge.http"),
        )
        self.telemetry = telemetry
        self.throttle = throttle
        self.draining = False
        self.paused: dict[_Connection, None] = {}
        self._routes = {offer: _offered(routes, offer) for offer in ("", "ingest", "read")}
        self._offers = offers
        self._access = access
        self._hosts = frozenset(host.lower() for host in config.hosts)
        self._max_connections = max_connections or config.limits.connections
        self._max_of_address = config.limits.connections_per_address

    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)

    # --- connections ---

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """Above a limit one connection has to go."""
        super().connection_made(handler, transport)
        if not isinstance(handler, _Connection):
            return
        if len(self._connections) > self._max_connections and len(among := self._open()) > self._max_connections:
            self._close_one(handler, among)
            limit = self._max_connections
            self.throttle.warning("connections", "too many connections; raise limits.connections", limit=limit)
        elif not is_loopback(handler.peer) and not self._access.is_proxy(handler.peer):
            same = [connection for connection in self._open() if connection.peer == handler.peer]
            if len(same) > self._max_of_address:
                self._close_one(handler, same)
                text = "too many connections of an address; raise limits.connections_per_address"
                self.throttle.warning("connections_per_address", text, limit=self._max_of_address)

    def _open(self) -> list["_Connection"]:
        """The connections that are not being closed already."""
        return [one for one in self._connections if isinstance(one, _Connection) and one.transport is not None]

    def _close_one(self, newest: "_Connection", among: list["_Connection"]) -> None:
        idle = (connection for connection in among if connection is not newest and connection.awaits_client)
        min(idle, key=lambda c: (c.finished, c.heard if c.finished else c.since), default=newest).drop()

    def note_paused(self, connection: "_Connection") -> None:
        """An answer waits to be read; of too many bytes the one goes that has waited longest."""
        self.paused[connection] = None
        while len(self.paused) > 1 and sum(one.unread_bytes for one in self.paused) > UNREAD_BYTES:
            oldest = next(iter(self.paused))
            del self.paused[oldest]
            oldest.drop()
            self.throttle.warning("unread", "too many answers wait to be read; closed the oldest")

    # --- requests ---

    async def _dispatch(self, request: web.BaseRequest) -> web.StreamResponse:
        protocol = request.protocol
        assert isinstance(protocol, _Connection)  # noqa: S101  # __call__ makes no others
        protocol.answered = True
        try:
            self._guard(request, protocol)
            request[CALLER] = await self._admit(request, protocol)
            answer = await self._route(request, protocol)(request)
            protocol.finished = True
        except Refused as error:
            answer = error_response(error, answer_encoding(request.headers.get("Content-Type", "")))
            if not request.path.startswith("/-/"):  # a supervisor that asks too early was not refused anything
                self.telemetry.refused.labels(str(error.code)).inc()
                self._tell(request, protocol, error)
        if self.draining:
            answer.force_close()
        return answer

    def _tell(self, request: web.BaseRequest, protocol: "_Connection", error: Refused) -> None:
        """A line in the log about a refusal of which there is none yet, but not of pages that a browser looks for."""
        if error.code in (413, 503) or (error.code in (404, 405) and request.method != "POST"):
            return
        client = caller_of(request).address or protocol.peer
        self.throttle.warning(f"http {error.code}", f"refused a request: {error}", code=error.code, client=client)

    def _guard(self, request: web.BaseRequest, protocol: "_Connection") -> None:
        """Refuse what a web page may have sent: foreign Host (DNS rebinding), foreign Origin, cross-site fetches."""
        if request.version.major != 1:
            raise Refused(400, "HTTP/1.1 or HTTP/1.0 is needed")
        host = request.headers.get("Host")
        if host is not None and not self._is_our_host(host, protocol.local):
            raise Refused(421, "this Host is not served here; use localhost, or add the name to `hosts` in config.toml")
        # A proxy may end TLS, so a page of ours may be of https where we see none.
        ours = [f"https://{host}".lower(), *([] if protocol.is_tls else [f"http://{host}".lower()])]
        if any(origin.lower() not in ours for origin in request.headers.getall("Origin", [])):
            raise Refused(403, "requests from web pages of other origins are refused")
        if any(site not in ("none", "same-origin") for site in request.headers.getall("Sec-Fetch-Site", [])):
            raise Refused(403, "cross-site requests of browsers are refused")

    async def _admit(self, request: web.BaseRequest, protocol: "_Connection") -> Caller:
        """Who asks. Supervisors and load balancers need no token to ask whether the bridge lives."""
        is_open = request.path.startswith("/-/")
        admitted = self._access.caller(protocol.peer, protocol.local, request.headers, is_open=is_open)
        if isinstance(admitted, Denial):
            if admitted.code == 429:
                await asyncio.sleep(PENALTY_SECONDS)
            self.telemetry.denied.labels(str(admitted.code), admitted.reason).inc()
            headers = {"WWW-Authenticate": f'Bearer realm="{HEADERS["Server"]}"'} if admitted.code == 401 else {}
            raise Refused(admitted.code, admitted.message, headers)
        return admitted

    def _is_our_host(self, host: str, local: str) -> bool:
        found = _HOST.fullmatch(host.lower())
        if found is None:
            return False
        name = found[1].removesuffix(".")
        if name in _HOSTS or name in self._hosts or name.endswith(".localhost"):
            return True
        try:
            address = ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
        except ValueError:
            return False
        # The number that the connection was made to is a name that nobody can rebind.
        return (address.version == 4 and address.is_loopback) or str(address) == local.partition("%")[0]

    def _route(self, request: web.BaseRequest, protocol: "_Connection") -> Handler:
        path = request.path
        offer = self._offers.get((protocol.local, protocol.port)) or self._offers.get(("", protocol.port), "")
        methods = self._routes[offer].get(path)
        if methods is None or (request.method == "POST" and path == "/" and _is_otlp(request)):
            if request.method == "POST":
                self.telemetry.wrong_path.inc()
            raise Refused(404, f"nothing is served here; {_path_advice(request)}")
        method = "GET" if request.method == "HEAD" and "GET" in methods else request.method
        if method not in methods:
            allowed = ", ".join([*methods, *(["HEAD"] if "GET" in methods else [])])
            raise Refused(405, f"this path takes {allowed}", {"Allow": allowed})
        return methods[method]


def _offered(routes: Routes, offer: str) -> Routes:
    """The routes of an address that takes exports alone, or shows numbers alone; whether we live is told everywhere."""
    if not offer:
        return routes
    kept = {"POST"} if offer == "ingest" else {"GET"}
    chosen = {
        path: {method: handler for method, handler in methods.items() if method in kept or path.startswith("/-/")}
        for path, methods in routes.items()
    }
    return {path: methods for path, methods in chosen.items() if methods}


_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:]+)(?::[0-9]*)?")
_HOSTS = frozenset({"localhost", "[::1]", "host.docker.internal", "host.containers.internal"})


def _is_otlp(request: web.BaseRequest) -> bool:
    return request.headers.get("Content-Type", "").partition(";")[0].strip().lower() in tuple(Encoding)


def _path_advice(request: web.BaseRequest) -> str:
    if request.method == "POST":
        return (
            "OTLP goes to /v1/metrics, /v1/logs and /v1/traces. OTEL_EXPORTER_OTLP_ENDPOINT takes the address alone,"
            " a per-signal endpoint the whole path"
        )
    return "GET / lists what there is"
