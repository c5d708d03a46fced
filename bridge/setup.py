"""`setup`: makes Claude Code, Codex or Gemini CLI export to this bridge, by a few lines in their own settings.

Law: nothing of the user's is lost. A file is edited as text, so that what is not ours keeps its bytes; before the
first edit it is copied beside itself, and what was written is noted beside it, so that `--undo` gives the file back
byte for byte, or, if it was changed meanwhile, takes back our values alone. A file that cannot be read, parsed or
edited safely is left alone. A write replaces the whole file at once; mode, owner and symbolic link stay.
"""

import contextlib
import hashlib
import json
import os
import re
import shlex
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from bridge import edits
from bridge.config import Config
from bridge.edits import JSON, MISSING, TOML, EditError, Language
from bridge.tools import claude_code
from bridge.web.access import is_loopback

BACKUP_SUFFIX = ".before-claude-otel-bridge"
RECORD_SUFFIX = ".claude-otel-bridge-undo"
HEADERS = "OTEL_EXPORTER_OTLP_HEADERS"
STATUSLINE: edits.Path = ("statusLine",)


_NO_HEADERS = (
    f"Gemini CLI has no setting for headers; export {HEADERS}='{claude_code.headers('TOKEN')}' in your shell with the"
    " token in it"
)


class SetupError(Exception):
    """Nothing was changed; `exit_code` is a sysexits code, the text says why and what to do."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Target(NamedTuple):
    """A tool's settings file and what should stand in it: path -> value and why, MISSING for what must not."""

    title: str
    file: Path
    language: Language
    wanted: Mapping[edits.Path, tuple[Any, str]]
    endpoint: str


class Change(NamedTuple):
    path: edits.Path
    before: Any
    after: Any
    why: str


def endpoints(config: Config) -> tuple[str, ...]:
    """The URLs of all addresses that take exports, first that for clients on this machine. What is bound beyond
    loopback speaks TLS, where that is set, and goes by the names in `hosts` too."""
    wildcard = {"0.0.0.0": "127.0.0.1", "[::]": "localhost"}  # noqa: S104  # compared, not listened on
    found = []
    for address in (*config.listen, *config.listen_ingest):
        host = address.rpartition(":")[0]
        names = wildcard.get(host, host), *config.hosts * is_beyond_loopback(host)
        found += [_url(address, name, config) for name in names]
    return tuple(found)


def network_endpoint(config: Config, name: str) -> str:
    """The URL for clients on other machines, which call this one `name`: of the first address beyond loopback that
    takes exports, without one of the first at all."""
    addresses = (*config.listen, *config.listen_ingest)
    public = (address for address in addresses if is_beyond_loopback(address.rpartition(":")[0]))
    return _url(next(public, addresses[0]), name, config)


def _url(address: str, name: str, config: Config) -> str:
    host, _, port = address.rpartition(":")
    scheme = "https" if config.tls.cert and is_beyond_loopback(host) else "http"
    return f"{scheme}://{name}:{port}"


def is_beyond_loopback(host: str) -> bool:
    """Whether others can reach what listens there."""
    return host != "localhost" and not is_loopback(host.strip("[]"))


def remote(url: str) -> str:
    """The address of a bridge elsewhere, without a path. Raises SetupError 64."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
        raise SetupError(f"--endpoint {url}: expected an address alone, as in https://bridge.example:4318", os.EX_USAGE)
    return f"{parts.scheme}://{parts.netloc}"


def token_of(environment: Mapping[str, str]) -> str:
    """The token that the tool has to send, from BRIDGE_TOKEN; empty where there is none. Raises SetupError 78."""
    token = environment.get("BRIDGE_TOKEN", "").strip()
    if token and not re.fullmatch(r"[A-Za-z0-9._~+/=-]+", token):
        raise SetupError("BRIDGE_TOKEN: a token has letters, digits and -._~+/= alone", os.EX_CONFIG)
    return token


def wants_token(config: Config, url: str) -> bool:
    """Whether the bridge asks who exports to this URL of it for a token."""
    is_guarded = config.loopback_token or is_beyond_loopback(urlsplit(url).hostname or "")
    return is_guarded and not config.insecure_no_auth


def has_token(headers: str) -> bool:
    """Whether a value of OTEL_EXPORTER_OTLP_HEADERS sends a token."""
    return any(part.partition("=")[0].strip().lower() == "authorization" for part in headers.split(","))


def require_token(tool: str, environment: Mapping[str, str]) -> None:
    """Raises SetupError 78 where the tool would send none to a bridge that wants one."""
    if tool != "codex" and has_token(environment.get(HEADERS, "")):
        return
    if tool == "gemini":
        raise SetupError(f"this bridge wants a token, and {_NO_HEADERS}, and run setup then", os.EX_CONFIG)
    named = "" if tool == "claude" else f"{tool} "
    raise SetupError(
        f"this bridge wants a token: BRIDGE_TOKEN=... claude-otel-bridge setup {named}--write, with one that"
        " `claude-otel-bridge token NAME` makes",
        os.EX_CONFIG,
    )


def home(environment: Mapping[str, str]) -> Path:
    """The home directory, also where HOME is not set."""
    given = environment.get("HOME", "")
    return Path(given) if given.startswith("/") else Path.home()


def target(tool: str, environment: Mapping[str, str], address: str, statusline: str = "", *, token: str = "") -> Target:
    """The settings of a tool that should export to the bridge at `address`, with a token if there is one; of Claude
    Code also its status line."""
    match tool:
        case "claude":
            wanted: dict[edits.Path, tuple[Any, str]] = {
                ("env", variable.name): (variable.value.format(endpoint=address), variable.why)
                for variable in claude_code.ENVIRONMENT
            }
            if token:
                wanted["env", HEADERS] = (claude_code.headers(token), "says who sends; whoever reads this file may too")
            for name in claude_code.OVERRIDES:
                wanted["env", name] = (MISSING, "wins over the general one and leads elsewhere")
            if statusline:
                shown = {"type": "command", "command": statusline}
                wanted[STATUSLINE] = (shown, "cost, context and limits in the status line")
            # Of a list of directories, which only transcripts know, the first is the one that is written to.
            first = environment.get("CLAUDE_CONFIG_DIR", "").partition(",")[0].strip()
            file = _place("CLAUDE_CONFIG_DIR", ".claude", {**environment, "CLAUDE_CONFIG_DIR": first}) / "settings.json"
            return Target("Claude Code", file, JSON, wanted, address)
        case "codex":
            headers = {"headers": {"Authorization": f"Bearer {token}"}} if token else {}
            wanted = {
                ("otel", key): (
                    {"otlp-http": {"endpoint": f"{address}/v1/{signal}", "protocol": "binary", **headers}},
                    why,
                )
                for key, signal, why in (
                    ("exporter", "logs", "events, with the tokens of each response"),
                    ("metrics_exporter", "metrics", "tokens of each turn"),
                )
            }
            return Target("Codex", _place("CODEX_HOME", ".codex", environment) / "config.toml", TOML, wanted, address)
        case _ if token:
            raise SetupError(f"{_NO_HEADERS}, and run setup without BRIDGE_TOKEN", os.EX_USAGE)
        case _:
            wanted = {
                ("telemetry", "enabled"): (True, "nothing is exported without it"),
                ("telemetry", "target"): ("local", "not Google Cloud"),
                ("telemetry", "otlpEndpoint"): (address, "this bridge"),
                ("telemetry", "otlpProtocol"): ("http", "the bridge speaks HTTP, not gRPC"),
                ("telemetry", "logPrompts"): (False, "the default sends your prompts along"),
            }
            place = Path(environment.get("GEMINI_CLI_HOME") or home(environment))
            return Target("Gemini CLI", place / ".gemini" / "settings.json", JSON, wanted, address)


def _place(variable: str, usual: str, environment: Mapping[str, str]) -> Path:
    given = environment.get(variable, "")
    return Path(given).expanduser() if given else home(environment) / usual


def exports(address: str, shell: str, token: str = "") -> str:
    """Claude Code's environment as commands of a shell."""
    form = "set -gx {} {}\n" if shell == "fish" else "export {}={}\n"
    variables = claude_code.environment(address) | ({HEADERS: claude_code.headers(token)} if token else {})
    return "".join(form.format(name, value) for name, value in variables.items())


# --- deciding: texts in, texts out -----------------------------------------------------------------------------


def changes(aim: Target, text: str) -> list[Change]:
    """What has to change in the file's text. A value that does as well as ours stays. Raises EditError."""
    parsed = aim.language.parse(text)
    found = []
    for path, (value, why) in aim.wanted.items():
        parent, present = edits.get(parsed, path[:-1]), edits.get(parsed, path)
        if parent is not MISSING and not isinstance(parent, dict):
            raise EditError(f"{'.'.join(path[:-1])} is not an object")
        if (present is MISSING and value is MISSING) or (path == STATUSLINE and present is not MISSING):
            continue
        is_claude = path[0] == "env" and isinstance(present, str | int)
        if present != value and not (is_claude and claude_code.fits(path[-1], str(present), aim.endpoint)):
            found.append(Change(path, present, value, why))
    return found


def changed(language: Language, text: str, wanted: list[Change]) -> str:
    """The text with these changes."""
    for path, _, after, _ in wanted:
        text = edits.remove(language, text, path) if after is MISSING else edits.put(language, text, path, after)
    return text


def reverted(language: Language, text: str, original: str, wrote: Mapping[edits.Path, Any]) -> tuple[str, list[str]]:
    """The text with our values taken back, for a file that was changed after us; the names that we leave alone."""
    before, left = language.parse(original), []
    for path, value in reversed([*wrote.items()]):
        if edits.get(language.parse(text), path) != value:
            left.append(".".join(path))
        elif (old := edits.get(before, path)) is not MISSING:
            text = edits.put(language, text, path, old, language.raw(original, path))
        else:
            text = edits.remove(language, text, path)
    for parent in {path[:-1] for path in wrote}:
        if edits.get(before, parent) is MISSING and edits.get(language.parse(text), parent) == {}:
            text = edits.remove(language, text, parent)
    return text, left


# --- acting ----------------------------------------------------------------------------------------------------


class _Record(NamedTuple):
    """What a write noted beside the file: the file before (None: there was none), the digest after, our values."""

    original: bytes | None
    made_directory: bool
    digest: str
    wrote: dict[edits.Path, Any]


def show(aim: Target) -> list[Change]:
    """What `write` would change."""
    with _explained(aim):
        return changes(aim, _text(_read(aim.file)))


def write(aim: Target) -> list[Change]:
    """Change the file; what was changed."""
    current, record = _read(aim.file), _load(aim.file)
    with _explained(aim):
        original = _undone(aim, current, record)[0] if record else current
        wanted = changes(aim, _text(original))
        after = changed(aim.language, _text(original), wanted).encode()
    if not wanted or after == current:
        return []
    made_directory = (record.made_directory if record else False) or not aim.file.parent.exists()
    _require_writable(aim.file)
    try:
        aim.file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        note = {
            "made_directory": made_directory,
            "existed": original is not None,
            "digest": hashlib.sha256(after).hexdigest(),
            "wrote": [[change.path, change.after is MISSING, _plain(change.after)] for change in wanted],
        }
        if original is not None:
            _replace(_beside(aim.file, BACKUP_SUFFIX), original, 0o600)
        _replace(_beside(aim.file, RECORD_SUFFIX), json.dumps(note).encode(), 0o600)
        if _read(aim.file) != current:
            raise SetupError(f"{aim.file} was changed by another program just now; try again", os.EX_TEMPFAIL)
        _replace(aim.file, after, None)
    except BaseException as error:
        if record is None:
            _forget(aim.file)
        if isinstance(error, OSError):
            raise _refused(error.filename or aim.file, error.strerror) from None
        raise
    return changes(aim, _text(current)) or wanted


def undo(aim: Target) -> tuple[bool, list[str]]:
    """Take back what `write` did: whether it had done anything, and the values that were changed since and stay."""
    current, record = _read(aim.file), _load(aim.file)
    if record is None:
        return False, []
    with _explained(aim):
        original, left = _undone(aim, current, record)
    try:
        if original is None:
            _require_writable(aim.file)
            aim.file.unlink(missing_ok=True)
        elif original != current:
            _require_writable(aim.file)
            _replace(aim.file, original, None)
    except OSError as error:
        raise _refused(error.filename or aim.file, error.strerror) from None
    _forget(aim.file)
    if record.made_directory:
        with contextlib.suppress(OSError):  # something else stands in it by now
            aim.file.parent.rmdir()
    return True, left


def _undone(aim: Target, current: bytes | None, record: _Record) -> tuple[bytes | None, list[str]]:
    """The file without our values: as it was, or as the user has made it since."""
    if current is None:
        return None, []
    if hashlib.sha256(current).hexdigest() == record.digest:
        return record.original, []
    text, left = reverted(aim.language, _text(current), _text(record.original), record.wrote)
    is_gone = record.original is None and not aim.language.parse(text)
    return (None if is_gone else text.encode()), left


def _plain(value: Any) -> Any:
    return None if value is MISSING else value


def _beside(file: Path, suffix: str) -> Path:
    return file.with_name(file.name + suffix)


def _forget(file: Path) -> None:
    """Remove what was noted beside the file."""
    for suffix in (BACKUP_SUFFIX, RECORD_SUFFIX):
        with contextlib.suppress(OSError):
            _beside(file, suffix).unlink(missing_ok=True)


def _load(file: Path) -> _Record | None:
    note, original = _read(_beside(file, RECORD_SUFFIX)), _read(_beside(file, BACKUP_SUFFIX))
    if note is None:
        return None
    try:
        entry = json.loads(note)
        wrote = {tuple(path): MISSING if gone else value for path, gone, value in entry["wrote"]}
        if entry["existed"] and original is None:
            raise ValueError
        return _Record(original if entry["existed"] else None, entry["made_directory"], entry["digest"], wrote)
    except (ValueError, TypeError, KeyError):
        raise SetupError(
            f"{_beside(file, RECORD_SUFFIX)} does not fit {_beside(file, BACKUP_SUFFIX).name} beside it; compare the"
            f" latter with {file.name} yourself and delete both",
            os.EX_DATAERR,
        ) from None


def _read(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        if file.is_symlink():
            raise SetupError(
                f"{file} is a link to {file.readlink()}, which does not exist; make it or delete the link",
                os.EX_NOINPUT,
            ) from None
        return None
    except OSError as error:
        raise _refused(file, error.strerror, "read") from None


def _text(content: bytes | None) -> str:
    try:
        return (content or b"").decode()
    except UnicodeDecodeError:
        raise EditError("it is not UTF-8 text") from None


@contextlib.contextmanager
def _explained(aim: Target) -> Any:
    """Turn EditError into what to do by hand."""
    try:
        yield
    except EditError as error:
        raise SetupError(
            f"{aim.file} was left as it is: {error}.\nPut this in by hand:\n\n{by_hand(aim)}", os.EX_DATAERR
        ) from None


def by_hand(aim: Target) -> str:
    """What the file should have in it."""
    text = "" if aim.language is TOML else "{}\n"
    for path, (value, _) in aim.wanted.items():
        if value is not MISSING:
            text = edits.put(aim.language, text, path, value)
    return text


def _require_writable(file: Path) -> None:
    """Refuse what its owner has made read-only, also for root and where replacing the file would go through."""
    real = file.resolve()
    for path in (real, real.parent, file.parent):
        try:
            mode = path.stat().st_mode
        except OSError:
            continue
        if not mode & 0o222 or not os.access(path, os.W_OK):
            what = "directory" if stat.S_ISDIR(mode) else "file"
            raise SetupError(
                f"{path} is a {what} that may not be written; nothing was changed. Make it writable"
                f" (chmod u+w {path}) or change the settings where they are made",
                os.EX_NOPERM,
            )


def _refused(path: object, reason: str | None, what: str = "write") -> SetupError:
    return SetupError(f"cannot {what} {path}: {reason}; nothing was changed", os.EX_NOPERM)


def _replace(file: Path, content: bytes, mode: int | None) -> None:
    """Put `content` in the file's place at once; without `mode` it keeps its own, and its owner."""
    real = file.resolve()
    descriptor, name = tempfile.mkstemp(prefix=f".{real.name}.", dir=real.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as new:
            new.write(content)
            new.flush()
            os.fsync(new.fileno())
        if mode is not None:
            temporary.chmod(mode)
        elif real.exists():
            old = real.stat()
            if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
                with contextlib.suppress(PermissionError):
                    os.chown(temporary, old.st_uid, old.st_gid)
            temporary.chmod(stat.S_IMODE(old.st_mode))
        temporary.replace(real)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


# --- the command -----------------------------------------------------------------------------------------------


def statusline_command(program: tuple[str, ...], variables: Mapping[str, str]) -> str:
    """What a shell has to run for the status line of this bridge."""
    assigned = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    return " ".join((*assigned, shlex.join((*program, "statusline"))))


def run(
    tool: str, action: str, address: str, environment: Mapping[str, str], statusline: str = "", *, token: str = ""
) -> str:
    """Do what the command asks, `show`, `write` or `undo`; the lines to print, without the token."""
    aim = target(tool, environment, address, statusline, token=token)
    record = _load(aim.file)
    if action == "write" and record is not None and STATUSLINE in record.wrote and not statusline:
        aim = target(tool, environment, address, record.wrote[STATUSLINE]["command"], token=token)
    if action == "undo":
        did, left = undo(aim)
        if not did:
            return f"{aim.file}: nothing to undo; setup has written nothing there.\n"
        stays = "".join(f"  {name} was changed since, and stays\n" for name in left)
        return f"{aim.file}: the bridge's own entries are gone from {aim.title}'s settings.\n{stays}"
    found = write(aim) if action == "write" else show(aim)
    stays = _statusline_of_others(aim) if statusline else ""
    if not found:
        return f"{aim.file}: {aim.title} is set to export to {address}; nothing to change.\n{stays}"
    lines = [f"{aim.file} ({aim.title})", *(_line(change) for change in found), *stays.splitlines(), ""]
    if action == "show":
        lines.append("Nothing has been changed. Write it with --write; take it back later with --undo.")
    else:
        backup = _beside(aim.file, BACKUP_SUFFIX)
        lines += [f"Written. The file as it was: {backup}"] if backup.exists() else ["Written."]
        lines.append(
            f"Start {aim.title} anew: sessions that run keep their settings. Then try claude-otel-bridge doctor."
        )
    return "\n".join(lines) + "\n"


def _statusline_of_others(aim: Target) -> str:
    """That a status line of the user's own stays, and how both can be had."""
    wanted, _ = aim.wanted[STATUSLINE]
    with _explained(aim):
        present = edits.get(aim.language.parse(_text(_read(aim.file))), STATUSLINE)
    if present in (MISSING, wanted):
        return ""
    return f"  = statusLine is your own and stays; your command can run `{wanted['command']}` with the same input.\n"


def _line(change: Change) -> str:
    name = ".".join(change.path)
    if change.before is MISSING:
        return f"  + {name} = {_shown(change.after)}   {change.why}"
    if change.after is MISSING:
        return f"  - {name} = {_shown(change.before)}   {change.why}"
    return f"  ~ {name} = {_shown(change.after)}   was {_shown(change.before)}; {change.why}"


def _shown(value: Any) -> str:
    """A value without the secret that may stand in it."""
    return re.sub(r"(?i)(bearer( |%20)|authorization=)[^\s\"',]+", r"\1...", json.dumps(value))
