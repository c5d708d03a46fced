"""The command line. Without arguments it runs the bridge. Sub-commands import what they need when they run.

Law: what stands on the way of `report` starts fast; pathlib and the arguments of all other commands do not.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn

from bridge import __version__
from bridge.place import columns

if TYPE_CHECKING:
    from pathlib import Path

    from bridge.config import Config

_EXAMPLES = """\
examples:
  claude-otel-bridge                            run on localhost:4318
  claude-otel-bridge --listen 127.0.0.1:14318   run on another port
  claude-otel-bridge install                    run as a service, now and at every login
  claude-otel-bridge report                     tokens and cost of every day
  claude-otel-bridge config show                the settings in force, as a config.toml
  curl localhost:4318/v1/metrics                what XRG reads
  curl localhost:4318/metrics                   what Prometheus reads

Every setting is also an environment variable (BRIDGE_LISTEN, BRIDGE_LIMITS_SERIES, ...) and a line of config.toml.
Flags win over environment over file.
"""


# It has no translations of its words, and looks for them, with a slow module, at every one of them.
argparse._ = str  # type: ignore[attr-defined]  # not told of
_EXTRA = "install the extra in the source tree: .venv/bin/pip install '.[completion]'"


class _Formatter(argparse.HelpFormatter):
    """As wide as the terminal; argparse loads slow modules to find that out, for every argument."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **{"width": columns(80) - 2, **options})


class _RawFormatter(_Formatter, argparse.RawDescriptionHelpFormatter):
    """With descriptions as they stand."""


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _Formatter, **options})

    def _print_message(self, message: str, file: Any = None) -> None:
        with suppress(AttributeError, OSError):  # nobody reads it, or it is closed; older Pythons raise that
            super()._print_message(message, file)

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        if message.startswith(("argument --since: expected", "argument --until: expected")):
            message += ": a day such as 2026-11-28, 20261128, today, yesterday, or 7d for the last seven"
        self.exit(os.EX_USAGE, f"{self.prog}: {message}\n")


def parser(first: str = "") -> argparse.ArgumentParser:
    """The command line: all of it, or, if its `first` word is `report`, no other command."""
    root = _Parser(
        prog="claude-otel-bridge",
        description="Accepts OTLP from Claude Code and other tools, keeps exact durable counters, serves them to XRG"
        " and Prometheus.",
        epilog=_EXAMPLES,
        formatter_class=_RawFormatter,
        allow_abbrev=False,
    )
    root.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    settings = root.add_argument_group("settings")
    settings.add_argument(
        "--listen", action="append", metavar="HOST:PORT", help="address to listen on, repeatable (localhost:4318)"
    )
    settings.add_argument("--state-dir", metavar="DIR", help="where the counters are kept")
    settings.add_argument("--token-file", metavar="FILE", help="tokens of network clients (`tokens` beside the state)")
    settings.add_argument("--insecure-no-auth", action="store_true", help="listen beyond loopback without tokens")
    settings.add_argument("--no-transcripts", action="store_true", help="do not open the transcripts of tools")
    settings.add_argument(
        "--allow-network-fs", action="store_true", help="keep the state on a network file system all the same"
    )
    settings.add_argument("--config", metavar="FILE", help="settings file (config.toml in the platform's place)")
    settings.add_argument("--log-format", choices=("text", "json"), help="log lines as text or JSON (text)")
    settings.add_argument("--log-level", choices=("debug", "info", "warning", "error"), help="least level (info)")
    settings.add_argument("--log-file", metavar="FILE", help="write the log here and rotate it (standard error)")
    root.add_argument(
        "--accept-data-loss",
        action="store_true",
        help="if the state is damaged and there is no copy, begin anew; what was served stays the floor",
    )
    commands = root.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    if first != "report":
        _add_state_commands(commands)
    _add_report(commands)
    if first != "report":
        commands.add_parser("statusline", help="one line for Claude Code's status line", description=_STATUSLINE)
        _add_client_commands(commands)
        _add_service(commands)
    for name, command in commands.choices.items():
        if name not in ("completion", "man"):
            _add_place(command)
    return root


def _add_state_commands(commands: "argparse._SubParsersAction[_Parser]") -> None:
    from pathlib import Path

    config = commands.add_parser("config", help="show or check the settings")
    config.add_argument("action", choices=("show", "check"), help="print the settings in force, or only check them")
    backup = commands.add_parser("backup", help="copy the state to a new file, also while the bridge runs")
    backup.add_argument("file", metavar="FILE", type=Path, help="where to; what exists is not overwritten")
    token = commands.add_parser("token", help="make a token for a network client, printed once, or take one back")
    token.add_argument("name", metavar="NAME", help="of a user, team or machine; the label `source` of what it sends")
    token.add_argument("--remove", action="store_true", help="the token of this name is good for nothing any more")


def _add_place(command: argparse.ArgumentParser) -> None:
    """Settings that may stand behind a command as well; what is not given there leaves what stands before it."""
    place = command.add_argument_group("settings, here or before the command")
    for flag, action, metavar, text in (
        ("--listen", "append", "HOST:PORT", "address of the bridge, repeatable (localhost:4318)"),
        ("--state-dir", "store", "DIR", "where the counters are kept"),
        ("--config", "store", "FILE", "settings file (config.toml in the platform's place)"),
    ):
        place.add_argument(flag, action=action, metavar=metavar, help=text, default=argparse.SUPPRESS)


_REPORT = """\
What was used, from the bridge's own records: of all sources joined, also of what the tools themselves have deleted.
Without KIND, by day. All kinds add up to the same total. `blocks` are five hours from the hour of a first request on,
of Claude Code unless --tool names another, with the gaps between them and what the active one comes to.
"""
_REPORT_MORE = """\
examples:
  claude-otel-bridge report                               every day
  claude-otel-bridge report monthly --csv                 for a spreadsheet
  claude-otel-bridge report model --since 7d              the last seven days by model
  claude-otel-bridge report session --project . --json    the sessions in this directory
  claude-otel-bridge report blocks --active               what this block comes to

A day is 2026-11-28, 20261128, today, yesterday or 7d. A tool or a model is named by a part of its name, a project by a
path or by the end of one; all of them by patterns with * and ?.
"""


_STATUSLINE = """\
Claude Code runs it as the command of its status line and hands over a JSON object on standard input: this prints what
the session, the day and the block of five hours have cost so far, how full the context and the limits are, and records
the official limits as metrics. `claude-otel-bridge setup --statusline` shows how to switch it on.
"""


def _add_report(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="tokens and cost by day, session, project, model, ...",
        description=_REPORT,
        epilog=_REPORT_MORE,
        formatter_class=_RawFormatter,
    )
    kinds = ("daily", "weekly", "monthly", "session", "project", "model", "tool", "blocks")
    report.add_argument("kind", nargs="?", choices=kinds, default="daily", metavar="KIND", help=", ".join(kinds))
    report.add_argument("--since", metavar="DAY", help="first day")
    report.add_argument("--until", metavar="DAY", help="last day")
    for name in ("tool", "project", "model"):
        report.add_argument(f"--{name}", action="append", metavar=name.upper(), help=f"only this {name}, repeatable")
    report.add_argument("--timezone", metavar="ZONE", help="days and hours of this zone, as in Europe/Berlin (local)")
    report.add_argument("--active", action="store_true", help="of blocks, only the one that is not over yet")
    form = report.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON")
    form.add_argument("--csv", action="store_true", help="as CSV")


_SERVICE = {
    "install": "run the bridge as a service from now on",
    "uninstall": "stop the service and remove its files",
    "start": "start the service",
    "stop": "stop the service and close its sockets",
    "restart": "restart the service; no connection is refused meanwhile",
    "status": "whether the service is installed, runs and answers",
    "logs": "show the log of the service",
}


def _add_service(commands: Any) -> None:
    for name, text in _SERVICE.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--system", action="store_true", help="the service of the whole machine (Linux)")
        if name == "install":
            command.add_argument("--dry-run", action="store_true", help="only print the files")
        elif name == "uninstall":
            command.add_argument("--purge", action="store_true", help="remove the state directory as well")
        elif name == "logs":
            command.add_argument("-f", "--follow", action="store_true", help="go on showing new lines")
            command.add_argument("-n", "--lines", type=int, default=100, metavar="N", help="show the last N (100)")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `claude-otel-bridge`; ends with SystemExit."""
    sys.exit(_main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    options = parser(*words[:1]).parse_args(words)
    home = os.path.expanduser("~")  # noqa: PTH111  # pathlib starts slowly
    if options.command == "report":
        from bridge import reporting

        return reporting.run(options, os.environ, home)
    if options.command == "statusline":
        from bridge import statusline

        return statusline.main(os.environ, home, vars(options))
    from bridge import config as settings

    try:
        file = _config_file(options.config, of_system=getattr(options, "system", False))
        if file and (problem := _exposed(file)):
            sys.stderr.write(f"claude-otel-bridge: {problem}\n")
            return os.EX_NOPERM
        text = file.read_text(encoding="utf-8") if file else ""
        flags: dict[str, Any] = {
            key: value
            for key in ("listen", "token_file", "state_dir", "log_format", "log_level", "log_file")
            if (value := getattr(options, key)) is not None
        }
        if options.no_transcripts:
            flags["transcripts"] = False
        if options.allow_network_fs:
            flags["allow_network_fs"] = True
        if options.insecure_no_auth:
            flags["insecure_no_auth"] = True
        config = settings.load(text, os.environ, flags, str(file))
        if config.prices:
            _check_prices(config, str(file))
    except settings.ConfigError as error:
        sys.stderr.write(f"claude-otel-bridge: {error}\n")
        return os.EX_CONFIG
    except (OSError, UnicodeDecodeError) as error:
        sys.stderr.write(f"claude-otel-bridge: cannot read settings: {error}\n")
        return os.EX_CONFIG
    if options.command == "config":
        if options.action == "show":
            sys.stdout.write(settings.to_toml(config))
            return os.EX_OK
        return _check_start(config, file)
    if options.command == "backup":
        return _back_up(options.file, config)
    if options.command == "token":
        return _change_tokens(options, config)
    if options.command in ("setup", "doctor", "completion", "man"):
        return _client_command(options, config)
    if options.command in _SERVICE:
        from bridge import service

        return service.main(options, config, flags | ({"config": options.config} if options.config else {}))
    with _trusting_nobody():
        from bridge import daemon
    return daemon.run(config, accept_data_loss=options.accept_data_loss)


@contextmanager
def _trusting_nobody() -> Iterator[None]:
    """While aiohttp is imported, which reads the certificates of all authorities for its client: nothing here uses it,
    and it takes 2 MB and a tenth of the start."""
    nowhere = {"SSL_CERT_FILE": os.devnull, "SSL_CERT_DIR": os.devnull}
    before = {name: os.environ.get(name) for name in nowhere}
    os.environ.update(nowhere)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _check_start(config: "Config", file: "Path | None") -> int:
    """Say whether the bridge would start with these settings: what they lead to, as tokens and certificates."""
    from bridge.config import listened
    from bridge.daemon import state_directory, tokens_in_force
    from bridge.listeners import StartError, require_access, split_address
    from bridge.tokens import TokenError

    addresses = [split_address(address) for address in listened(config)]
    try:
        allowed = tokens_in_force(config, state_directory(config))
        require_access(config, allowed, [("::1" if host == "localhost" else host, port) for host, port in addresses])
    except (StartError, TokenError) as error:
        sys.stderr.write(f"claude-otel-bridge: {file or 'no settings file'}: {error}\n")
        return error.exit_code
    sys.stdout.write(f"{file or 'no settings file'}: ok\n")
    return os.EX_OK


def _check_prices(config: "Config", file: str) -> None:
    from bridge import pricing
    from bridge.config import ConfigError

    try:
        pricing.load(config.prices)
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from None


def _back_up(file: "Path", config: "Config") -> int:
    from bridge.copies import back_up
    from bridge.daemon import state_directory
    from bridge.state import StateError

    try:
        copy = back_up(state_directory(config), file)
    except StateError as error:
        sys.stderr.write(f"claude-otel-bridge: {error}\n")
        return error.exit_code
    sys.stdout.write(f"{file}: {copy.size} bytes, schema {copy.version}, as of transaction {copy.commits}\n")
    return os.EX_OK


def _change_tokens(options: argparse.Namespace, config: "Config") -> int:
    from bridge import setup, tokens
    from bridge.daemon import state_directory, token_file

    file = token_file(config, state_directory(config))
    try:
        if options.remove:
            tokens.remove(file, options.name)
            sys.stdout.write(f"removed the token of {options.name} from {file}\n")
            return os.EX_OK
        secret = tokens.make(file, options.name)
    except tokens.TokenError as error:
        sys.stderr.write(f"claude-otel-bridge: {error}\n")
        return error.exit_code
    sys.stdout.write(f"{secret}\n")
    sys.stderr.write(
        f"This is the token of {options.name}; it is shown this once, {file} has its hash. On the client:\n"
        "  BRIDGE_TOKEN=... claude-otel-bridge setup --write --endpoint"
        f" {setup.network_endpoint(config, 'THIS_HOST')}\n"
        "or OTEL_EXPORTER_OTLP_HEADERS=Authorization=Bearer%20... in its environment.\n"
    )
    return os.EX_OK


def _exposed(file: "Path") -> str:
    """Why a settings file must not be believed; empty if it may be: others could have written it."""
    found = file.stat()
    if found.st_uid not in (0, os.geteuid()) and os.geteuid() != 0:
        return f"{file} belongs to uid {found.st_uid}; settings of others are not believed"
    is_private_group = found.st_gid == found.st_uid  # the group of one user, to which umask 002 gives everything
    if found.st_mode & (0o002 if is_private_group else 0o022):
        return f"{file} has mode {found.st_mode & 0o7777:04o}: others may write it; chmod go-w {file}"
    return ""


def _config_file(given: str | None, *, of_system: bool) -> "Path | None":
    """The settings file: --config or BRIDGE_CONFIG, which must exist; else the first of the usual places that does."""
    from pathlib import Path

    if named := given or os.environ.get("BRIDGE_CONFIG"):
        return Path(named).expanduser()
    file = Path("/etc/claude-otel-bridge/config.toml")
    if of_system:
        return file if file.exists() else None
    from bridge import place

    found = place.config_file(None, sys.platform, os.environ, str(Path.home()))
    return Path(found) if found else None


# --- setup, doctor, completion ---------------------------------------------------------------------------------


def _add_client_commands(commands: "argparse._SubParsersAction[_Parser]") -> None:
    setup = commands.add_parser("setup", help="make Claude Code, Codex or Gemini CLI export to this bridge")
    setup.add_argument("tool", nargs="?", choices=("claude", "codex", "gemini"), default="claude", help="claude")
    action = setup.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="change the tool's settings; without it, only show how")
    action.add_argument("--undo", action="store_true", help="take back what --write did")
    setup.add_argument(
        "--statusline", action="store_true", help="also show cost and limits in Claude Code's status line"
    )
    setup.add_argument("--endpoint", metavar="URL", help="a bridge elsewhere; its token is taken from BRIDGE_TOKEN")
    action.add_argument("--shell", choices=("bash", "zsh", "fish"), help="print Claude Code's environment for a shell")
    doctor = commands.add_parser("doctor", help="say what works and what does not, from the tools to XRG")
    doctor.add_argument("--json", action="store_true", help="the findings as JSON")
    completion = commands.add_parser("completion", help="print the completion script of a shell")
    completion.add_argument("shell", choices=("bash", "zsh", "fish", "tcsh"))
    commands.add_parser("man", help="print the manual page")


def _client_command(options: argparse.Namespace, config: "Config") -> int:
    if options.command == "completion":
        return _print_completion(options.shell)
    if options.command == "man":
        return _print_manual()
    if options.command == "doctor":
        from bridge import doctor

        text, code = doctor.run(config, os.environ, as_json=options.json)
        sys.stdout.write(text)
        return code
    from bridge import setup

    try:
        address = setup.remote(options.endpoint) if options.endpoint else setup.endpoints(config)[0]
        token = setup.token_of(os.environ)
        if not (token or options.endpoint or options.undo) and setup.wants_token(config, address):
            setup.require_token(options.tool, os.environ)
    except setup.SetupError as error:
        sys.stderr.write(f"claude-otel-bridge: {error}\n")
        return error.exit_code
    if options.shell and options.tool != "claude":
        sys.stderr.write("claude-otel-bridge: --shell is for Claude Code; the others read their settings file\n")
        return os.EX_USAGE
    if options.statusline and options.tool != "claude":
        sys.stderr.write("claude-otel-bridge: --statusline is for Claude Code\n")
        return os.EX_USAGE
    if options.shell:
        sys.stdout.write(setup.exports(address, options.shell, token))
        return os.EX_OK
    action = "write" if options.write else "undo" if options.undo else "show"
    try:
        statusline = _statusline(config) if options.statusline else ""
        sys.stdout.write(setup.run(options.tool, action, address, os.environ, statusline, token=token))
    except setup.SetupError as error:
        sys.stderr.write(f"claude-otel-bridge: {error}\n")
        return error.exit_code
    return os.EX_OK


def _statusline(config: "Config") -> str:
    """The command of the status line, with what is not as usual of the settings that it looks at."""
    from pathlib import Path

    from bridge.config import Config
    from bridge.service import stable_command
    from bridge.setup import statusline_command

    usual = Config()
    changed = {
        "BRIDGE_STATE_DIR": str(Path(config.state_dir).expanduser().absolute()) if config.state_dir else "",
        "BRIDGE_LISTEN": config.listen[0] if config.listen != usual.listen else "",
    }
    variables = {name: value for name, value in changed.items() if value}
    return statusline_command(stable_command(Path.home()), variables)


def _print_completion(shell: str) -> int:
    try:
        import shtab
    except ImportError:
        sys.stderr.write(f"claude-otel-bridge: completion needs shtab; {_EXTRA}\n")
        return os.EX_UNAVAILABLE
    sys.stdout.write(shtab.complete(parser(), shell) + "\n")
    return os.EX_OK


def _print_manual() -> int:
    try:
        from argparse_manpage.manpage import Manpage
    except ImportError:
        sys.stderr.write(f"claude-otel-bridge: man needs argparse-manpage; {_EXTRA}\n")
        return os.EX_UNAVAILABLE
    whole = parser()
    data = {"version": __version__, "manual_title": "claude-otel-bridge", "manual_section": "1"}
    sys.stdout.write(f"{Manpage(whole, data)}\n")
    return os.EX_OK
