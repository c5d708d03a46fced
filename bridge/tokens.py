"""Tokens of network clients: a name and the SHA-256 of a secret each, from a file or the environment.

Law: a secret is printed once, when it is made, and stands nowhere else of ours: a file has its hash. A file that
others could read or exchange is refused. All hashes are compared, in constant time, whether one fits or not.
File: one line a token, `NAME sha256:HEX` or `NAME SECRET`; `#` begins a comment.
"""

import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from bridge.config import TOKEN_VARIABLES

FILE = "tokens"
"""The name of the file in the state directory."""
MAX_FILE = 2**20
MIN_SECRET = 24
"""Characters of a secret; shorter ones could be guessed from their hash."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"sha256:([0-9a-fA-F]{64})")


class TokenError(Exception):
    """Tokens cannot be used; `exit_code` is a sysexits code, the text says what, where and what to do."""

    def __init__(self, message: str, exit_code: int = os.EX_CONFIG) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Token(NamedTuple):
    """Who may send and read, and the SHA-256 of the secret that says so."""

    name: str
    digest: bytes


def parse(text: str, where: str) -> tuple[Token, ...]:
    """The tokens of a file's text. Raises TokenError, which never quotes a secret."""
    tokens = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        place = f"{where}, line {number}"
        if len(words) != 2:
            raise TokenError(f"{place}: expected NAME sha256:HEX or NAME SECRET")
        tokens.append(_token(words[0], words[1], place))
    names = [token.name for token in tokens]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise TokenError(f"{where}: {double} stands there twice; a name has one token")
    return tuple(tokens)


def of_environment(environment: Mapping[str, str]) -> tuple[Token, ...]:
    """`BRIDGE_TOKEN` is the token `default`; `BRIDGE_TOKENS` has lines as in the file, or commas between them."""
    one, many = (environment.get(variable, "") for variable in TOKEN_VARIABLES)
    default = (_token("default", one.strip(), "environment: BRIDGE_TOKEN"),) if one.strip() else ()
    others = parse(many.replace(",", "\n"), "environment: BRIDGE_TOKENS")
    if default and any(token.name == "default" for token in others):
        raise TokenError("environment: BRIDGE_TOKENS: default stands there, and BRIDGE_TOKEN is the token of that name")
    return (*default, *others)


def _token(name: str, secret: str, place: str) -> Token:
    if not _NAME.fullmatch(name):
        raise TokenError(f"{place}: a name has up to 64 letters, digits, dots, dashes and underscores")
    if found := _HASH.fullmatch(secret):
        return Token(name, bytes.fromhex(found[1]))
    if len(secret) < MIN_SECRET:
        raise TokenError(f"{place}: the token of {name} is shorter than {MIN_SECRET} characters; let `token` make one")
    return Token(name, _digest(secret))


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def find(tokens: Iterable[Token], secret: str) -> str | None:
    """The name of the token with this secret."""
    digest, found = _digest(secret), None
    for token in tokens:
        if hmac.compare_digest(token.digest, digest):
            found = token.name
    return found


# --- the file --------------------------------------------------------------------------------------------------


class Tokens:
    """The tokens in force: those of the environment, and of a file that may be changed meanwhile."""

    def __init__(self, path: Path, of_environment: tuple[Token, ...]) -> None:
        self._path = path
        self._of_environment = of_environment
        self._seen: tuple[int, int, int] | None = None
        self._all = of_environment

    def __bool__(self) -> bool:
        return bool(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def find(self, secret: str) -> str | None:
        """The name of the token with this secret."""
        return find(self._all, secret)

    def refresh(self) -> bool:
        """Read the file if it has changed, whether it had. Raises TokenError; the tokens stay as they were then."""
        try:
            found = self._path.stat()
            seen = found.st_ino, found.st_mtime_ns, found.st_size
        except OSError:
            seen = None
        if seen == self._seen:
            return False
        of_file = parse(read(self._path), str(self._path)) if seen else ()
        self._seen = seen
        self._all = (*self._of_environment, *of_file)
        return True


def read(path: Path) -> str:
    """The text of a file that is its owner's alone. Raises TokenError 77 for one that is not, 78 for others."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        reason = "it is a symbolic link" if path.is_symlink() else error.strerror
        raise TokenError(f"token_file: cannot read {path}: {reason}", os.EX_NOPERM) from None
    found = os.fstat(descriptor)
    mode = stat.S_IMODE(found.st_mode)
    try:
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or found.st_uid not in (0, os.geteuid()):
            raise TokenError(f"token_file: {path} must be a regular file of yours with one name", os.EX_NOPERM)
        if mode & 0o077:
            raise TokenError(
                f"token_file: {path} has mode {mode:04o}; others may read it: chmod 600 {path}", os.EX_NOPERM
            )
        return os.read(descriptor, MAX_FILE).decode()
    except UnicodeDecodeError:
        raise TokenError(f"token_file: {path} is not UTF-8 text") from None
    finally:
        os.close(descriptor)


def make(path: Path, name: str) -> str:
    """Add a token of this name to the file; the secret, which stands nowhere else. Raises TokenError."""
    text = read(path) if path.exists() or path.is_symlink() else ""
    if any(token.name == name for token in parse(text, str(path))):
        raise TokenError(f"{path} has a token of {name} already; take it back first: token --remove {name}")
    secret = f"bridge_{secrets.token_urlsafe(32)}"
    line = f"{name} sha256:{_token(name, secret, 'token').digest.hex()}\n"
    _write(path, text + ("" if not text or text.endswith("\n") else "\n") + line)
    return secret


def remove(path: Path, name: str) -> None:
    """Take the token of this name out of the file. Raises TokenError."""
    text = read(path) if path.exists() or path.is_symlink() else ""
    lines = text.splitlines(keepends=True)
    kept = [line for line in lines if line.partition("#")[0].split()[:1] != [name]]
    if len(kept) == len(lines):
        raise TokenError(f"{path} has no token of {name}", os.EX_NOINPUT)
    _write(path, "".join(kept))


def _write(path: Path, text: str) -> None:
    """Put the whole text in the file's place at once, for the owner of the directory alone."""
    new = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new.unlink(missing_ok=True)
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            if os.geteuid() == 0:  # root may make tokens for a service of another user
                owner = path.parent.stat()
                os.fchown(descriptor, owner.st_uid, owner.st_gid)
            file.flush()
            os.fsync(descriptor)
        new.replace(path)
    except OSError as error:
        raise TokenError(f"cannot write {path}: {error.strerror}", os.EX_CANTCREAT) from None
