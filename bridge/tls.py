"""TLS for addresses beyond loopback: the files that it takes, while they change, and handshakes that fail.

Law: what is in force is a certificate and key that fit. Files that are replaced are taken with the next handshake
after `refresh` has found that they can be used; until then, and for connections that stand, the old ones hold.
Imported only where TLS is set, since OpenSSL takes megabytes.
"""

import ssl
from collections.abc import Callable
from pathlib import Path

from bridge.config import Tls

HTTP_HINT = "a client speaks plain HTTP to an address with TLS; use https:// in its endpoint"


class TlsError(Exception):
    """The files cannot be used; the text says which setting, which file and why."""


def context_of(tls: Tls) -> ssl.SSLContext:
    """TLS 1.2 or later with these files. Raises TlsError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    paths = _paths(tls)
    for name, path in paths.items():
        try:
            path.open("rb").close()
        except OSError as error:
            raise TlsError(f"tls.{name}: cannot read {path}: {error.strerror}") from None
    name = "cert"
    try:
        # Without a password a key that wants one is an error, not a question on the terminal.
        context.load_cert_chain(paths["cert"], paths["key"], password=lambda: "")
        if authority := paths.get("client_ca"):
            name = "client_ca"
            context.load_verify_locations(authority)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        raise TlsError(f"tls.{name}: cannot use the files: {error}") from None
    return context


class TlsFiles:
    """The files of the settings, and `context`, which takes each handshake to what they hold now.

    `tell` is called with the kind of a handshake that failed and a line about it, which says nothing of its client.
    """

    def __init__(self, tls: Tls) -> None:
        self._tls = tls
        self._seen = self._look()
        self._newest = self.context = context_of(tls)
        self.context.sni_callback = self._choose
        self.context.sslobject_class = _handshake(lambda kind, text: self.tell(kind, text))
        self.tell: Callable[[str, str], object] = lambda *_: None

    def _choose(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        """Called in each handshake, also where the client names no server."""
        del name, context
        connection.context = self._newest

    def refresh(self) -> bool:
        """Take the files if they have changed; whether they had. Raises TlsError once for each change that cannot be
        used; the old ones stay in force then."""
        seen = self._look()
        if seen == self._seen:
            return False
        self._seen = seen
        self._newest = context_of(self._tls)
        return True

    def _look(self) -> list[tuple[int, int, int]]:
        found = []
        for path in _paths(self._tls).values():
            try:
                status = path.stat()
                found.append((status.st_ino, status.st_mtime_ns, status.st_size))
            except OSError:
                found.append((0, 0, 0))
        return found


def _paths(tls: Tls) -> dict[str, Path]:
    names = {"cert": tls.cert, "key": tls.key, "client_ca": tls.client_ca}
    return {name: Path(path).expanduser() for name, path in names.items() if path}


def _handshake(tell: Callable[[str, str], object]) -> type[ssl.SSLObject]:
    """Connections that tell of a handshake that fails; what fails it is one of OpenSSL's own words."""

    class Handshake(ssl.SSLObject):
        def do_handshake(self) -> None:
            try:
                super().do_handshake()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise
            except ssl.SSLError as error:
                if error.reason == "HTTP_REQUEST":
                    tell("tls http", HTTP_HINT)
                else:
                    tell(f"tls {error.reason}", f"a TLS handshake failed: {error.reason}")
                raise

    return Handshake
