"""The HTTP server: connections, the guard, routes and errors. What is served stands in receiver and metrics.

Law: no route is reached by a request that a web page could have sent (Host, Origin and fetch metadata are
checked before the body is read), every error is a google.rpc.Status that says what to do, and no client holds
more than its share: connections, headers and bodies have limits and deadlines.
"""

import asyncio
import ipaddress
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aiohttp import HttpVersion10, web
from aiohttp.web_protocol import RequestHandler

from bridge import otlp
from bridge.config import Config
from bridge.otlp import Encoding
from bridge.telemetry import Telemetry, Throttle, log

KEEPALIVE_SECONDS = 3_600.0
HEADER_SECONDS = 10.0
LINGER_SECONDS = 2.0

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

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
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


def error_response(error: Refused, encoding: Encoding) -> web.Response:
    """A Status body in the request's encoding."""
    return response(otlp.status(encoding, error.code, str(error)), encoding.value, error.code, error.headers)


def answer_encoding(content_type: str) -> Encoding:
    """The encoding to answer in: protobuf to protobuf, JSON to everything else."""
    kind = content_type.partition(";")[0].strip().lower()
    return Encoding.PROTOBUF if kind == Encoding.PROTOBUF else Encoding.JSON


class _Connection(RequestHandler):
    """One connection: closed when its first request's headers do not come in time, quiet about broken clients."""

    def __init__(self, server: "Server", **options: Any) -> None:
        super().__init__(server, **options)
        self.server = server
        self.answered = False
        self._deadline: asyncio.TimerHandle | None = None
        self._speaks_http2: bool | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._deadline = self._loop.call_later(HEADER_SECONDS, self._close_if_silent)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._speaks_http2 is None:
            self._speaks_http2 = data.startswith(HTTP2_PREFACE)
        super().data_received(data)

    def _close_if_silent(self) -> None:
        if not self.answered:
            self.force_close()

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
        elif self._speaks_http2:
            self.server.telemetry.grpc_attempts.inc()
            self.server.throttle.warning("grpc", GRPC_HINT)
            answer = error_response(Refused(400, GRPC_HINT), Encoding.JSON)
        else:
            answer = error_response(Refused(400, "not a valid HTTP/1.1 request"), Encoding.JSON)
        answer.force_close()
        return answer


class Server(web.Server):
    """Dispatches requests to `routes` after the guard. `extra_hosts` may stand in Host besides the loopback names."""

    def __init__(self, routes: Routes, config: Config, telemetry: Telemetry, throttle: Throttle) -> None:
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
        self._routes = routes
        self._hosts = frozenset(host.lower() for host in config.hosts)
        self._max_connections = config.limits.connections

    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """Above the limit the oldest connection that is not answering a request has to go."""
        super().connection_made(handler, transport)
        if len(self._connections) > self._max_connections:
            idle = next((c for c in self._connections if c is not handler and not c._request_in_progress), handler)
            idle.force_close()
            self.throttle.warning(
                "connections", "too many connections; raise limits.connections", limit=self._max_connections
            )

    async def _dispatch(self, request: web.BaseRequest) -> web.StreamResponse:
        protocol = request.protocol
        if isinstance(protocol, _Connection):
            protocol.answered = True
        try:
            self._guard(request)
            answer = await self._route(request)(request)
        except Refused as error:
            answer = error_response(error, answer_encoding(request.headers.get("Content-Type", "")))
            if not request.path.startswith("/-/"):  # a supervisor that asks too early was not refused anything
                self.telemetry.refused.labels(str(error.code)).inc()
        if self.draining:
            answer.force_close()
        return answer

    def _guard(self, request: web.BaseRequest) -> None:
        """Refuse what a web page may have sent: foreign Host (DNS rebinding), foreign Origin, cross-site fetches."""
        if request.version < HttpVersion10:
            raise Refused(400, "HTTP/1.0 or later is needed")
        host = request.headers.get("Host")
        if host is not None and not self._is_our_host(host):
            raise Refused(421, "this Host is not served here; use localhost, or add the name to `hosts` in config.toml")
        if any(origin.lower() != f"http://{host}".lower() for origin in request.headers.getall("Origin", [])):
            raise Refused(403, "requests from web pages of other origins are refused")
        if any(site not in ("none", "same-origin") for site in request.headers.getall("Sec-Fetch-Site", [])):
            raise Refused(403, "cross-site requests of browsers are refused")

    def _is_our_host(self, host: str) -> bool:
        found = _HOST.fullmatch(host.lower())
        if found is None:
            return False
        name = found[1].removesuffix(".")
        if name in _HOSTS or name in self._hosts or name.endswith(".localhost"):
            return True
        try:
            return ipaddress.IPv4Address(name).is_loopback
        except ValueError:
            return False

    def _route(self, request: web.BaseRequest) -> Handler:
        path = request.path
        methods = self._routes.get(path)
        if methods is None or (request.method == "POST" and path == "/" and _is_otlp(request)):
            if request.method == "POST":
                self.telemetry.wrong_path.inc()
            raise Refused(404, f"nothing is served here; {_path_advice(request)}")
        method = "GET" if request.method == "HEAD" and "GET" in methods else request.method
        if method not in methods:
            allowed = ", ".join([*methods, *(["HEAD"] if "GET" in methods else [])])
            raise Refused(405, f"this path takes {allowed}", {"Allow": allowed})
        return methods[method]


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
