"""Where the bridge listens, with what, and who may come in there at all.

Law: an address that others can reach is not listened on without tokens, unless the user insists. An address in use
is an error; an address family that the machine lacks is skipped with one line. A supervisor's sockets go before own
ones.
"""

import asyncio
import contextlib
import errno
import os
import resource
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from aiohttp import web

from bridge import supervisor
from bridge.config import Config, Tls
from bridge.telemetry import log
from bridge.tokens import Tokens
from bridge.web.access import is_loopback
from bridge.web.server import HEADER_SECONDS

if TYPE_CHECKING:
    import ssl

    from bridge.tls import TlsFiles

BACKLOG = 512
SPARE_DESCRIPTORS = 128
"""Descriptors for all that is no connection."""


class StartError(Exception):
    """The daemon cannot start; `exit_code` is a sysexits code, the text says what, where and what to do."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def require_access(config: Config, known: Tokens, addresses: Sequence[tuple[Any, ...]]) -> "TlsFiles | None":
    """What TLS needs, if it is set. Raises StartError 78 for addresses beyond loopback that anybody could use, and for
    files that TLS cannot use; warns of what is allowed but unwise."""
    public = [_shown(address) for address in addresses if not is_loopback(address[0])]
    if (public or config.loopback_token) and not known and not config.insecure_no_auth:
        where = public[0] if public else _shown(addresses[0])
        raise StartError(
            f"refusing to listen on {where} without a token: make one with `claude-otel-bridge token NAME`, or set"
            " BRIDGE_TOKEN; --insecure-no-auth lets everybody in who reaches it",
            os.EX_CONFIG,
        )
    if public and config.insecure_no_auth:
        log.warning("insecure_no_auth: whoever reaches these addresses may read and write", extra={"listen": public})
    files = tls_files(config.tls)
    if public and files is None and not config.trusted_proxies:
        log.warning("no TLS: tokens and data cross the network in plain text; set tls.cert", extra={"listen": public})
    return files


def tls_files(tls: Tls) -> "TlsFiles | None":
    """TLS with these files; None where none are set. Raises StartError 78."""
    if not tls.cert:
        return None
    from bridge.tls import TlsError, TlsFiles

    try:
        return TlsFiles(tls)
    except TlsError as error:
        raise StartError(str(error), os.EX_CONFIG) from None


def own_certificate() -> "ssl.SSLContext":
    """For asking the bridge of this machine, whose certificate bears another name than an address."""
    import ssl

    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def offers(config: Config) -> dict[tuple[str, int], str]:
    """What our addresses serve that do not serve everything: `ingest` or `read`; an empty host stands for all."""
    found: dict[tuple[str, int], str] = {}
    for offer, addresses in (("ingest", config.listen_ingest), ("read", config.listen_read)):
        for host, port in map(split_address, addresses):
            for name in ("127.0.0.1", "::1") if host == "localhost" else (host,):
                found[("" if name in ("0.0.0.0", "::") else name, port)] = offer  # noqa: S104  # compared, not bound
    return found


def room_for(connections: int) -> int:
    """Raise this process's limit of open files to what so many connections need; how many there is room for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + SPARE_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    return connections if soft == resource.RLIM_INFINITY else max(8, min(connections, soft - SPARE_DESCRIPTORS))


class Site(web.SockSite):
    """A listening socket of ours. A TLS handshake has the time of a request's head."""

    def __init__(self, runner: web.ServerRunner, sock: socket.socket, *, context: "ssl.SSLContext | None") -> None:
        super().__init__(runner, sock, ssl_context=context, backlog=BACKLOG)

    async def start(self) -> None:
        await web.BaseSite.start(self)
        assert self._runner.server is not None  # noqa: S101  # the runner is set up
        self._server = await asyncio.get_running_loop().create_server(
            self._runner.server,
            sock=self._sock,
            ssl=self._ssl_context,
            backlog=self._backlog,
            ssl_handshake_timeout=None if self._ssl_context is None else HEADER_SECONDS,
        )


# --- sockets ---------------------------------------------------------------------------------------------------


def listening(listen: tuple[str, ...]) -> list[socket.socket]:
    """The sockets that the supervisor passed, else own ones. A passed one that does not listen is StartError 69."""
    try:
        passed = supervisor.passed_sockets()
    except OSError as error:
        raise StartError(f"the supervisor passed what is no socket: {error.strerror}", os.EX_UNAVAILABLE) from None
    if not passed:
        return bind(listen)
    for sock in passed:
        if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise StartError("the supervisor passed a socket that does not listen for TCP", os.EX_UNAVAILABLE)
    if {split_address(address)[1] for address in listen} != {sock.getsockname()[1] for sock in passed}:
        log.warning(
            "the service's sockets are not those of the `listen` setting; `claude-otel-bridge install` renews them",
            extra={"listen": " ".join(listen), "sockets": shown_addresses(passed)},
        )
    return passed


def bind(listen: tuple[str, ...]) -> list[socket.socket]:
    """Listening sockets for `HOST:PORT` addresses; `localhost` is both loopback families.

    An address in use is StartError 69, a wrong one 64; nothing stays bound then. A family that the machine lacks is
    skipped with one line.
    """
    sockets: list[socket.socket] = []
    try:
        for address in listen:
            _bind_host(*split_address(address), sockets)
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def split_address(address: str) -> tuple[str, int]:
    """`localhost:4318`, `[::1]:4318` -> host and port. StartError 64 for anything else."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise StartError(f"--listen {address}: expected HOST:PORT, as in localhost:4318", os.EX_USAGE)
    return host, int(port)


def _bind_host(host: str, port: int, sockets: list[socket.socket]) -> None:
    """Append the sockets of one address."""
    if host == "localhost":
        wanted = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
    else:
        wanted = [(socket.AF_INET6 if ":" in host else socket.AF_INET, host)]
    before = len(sockets)
    for family, name in wanted:
        shown = _shown((name, port))
        try:
            sockets.append(_bind_one(family, name, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise StartError(
                    f"{shown} is already in use; stop the other program (lsof -i :{port} names it) or choose another"
                    " --listen",
                    os.EX_UNAVAILABLE,
                ) from None
            if error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL) and len(wanted) > 1:
                log.warning("this machine has no such address; not listening there", extra={"address": shown})
                continue
            raise StartError(f"cannot listen on {shown}: {error.strerror}", os.EX_UNAVAILABLE) from None
    if len(sockets) == before:
        raise StartError(f"cannot listen on {host}:{port}: no loopback address", os.EX_UNAVAILABLE)


def _bind_one(family: socket.AddressFamily, name: str, port: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((name, port))
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


def shown_addresses(sockets: list[socket.socket]) -> str:
    return " ".join(_shown(sock.getsockname()) for sock in sockets)


def _shown(address: tuple[Any, ...]) -> str:
    host, port, *_ = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
