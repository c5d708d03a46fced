"""The command line. Without arguments it runs the bridge. Sub-commands import what they need when they run."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from bridge import __version__

_EXAMPLES = """\
examples:
  claude-otel-bridge                            run on localhost:4318
  claude-otel-bridge --listen 127.0.0.1:14318   run on another port
  claude-otel-bridge config show                the settings in force, as a config.toml
  curl localhost:4318/v1/metrics                what XRG reads
  curl localhost:4318/metrics                   what Prometheus reads

Every setting is also an environment variable (BRIDGE_LISTEN, BRIDGE_LIMITS_SERIES, ...) and a line of config.toml.
Flags win over environment over file.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(os.EX_USAGE, f"{self.prog}: {message}\n")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    root = _Parser(
        prog="claude-otel-bridge",
        description="Accepts OTLP from Claude Code and other tools, keeps exact durable counters, serves them to XRG"
        " and Prometheus.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    root.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    settings = root.add_argument_group("settings")
    settings.add_argument(
        "--listen", action="append", metavar="HOST:PORT", help="address to listen on, repeatable (localhost:4318)"
    )
    settings.add_argument("--state-dir", metavar="DIR", help="where the counters are kept")
    settings.add_argument("--config", metavar="FILE", help="settings file (config.toml in the platform's place)")
    settings.add_argument("--log-format", choices=("text", "json"), help="log lines as text or JSON (text)")
    settings.add_argument("--log-level", choices=("debug", "info", "warning", "error"), help="least level (info)")
    commands = root.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    config = commands.add_parser("config", help="show or check the settings")
    config.add_argument("action", choices=("show", "check"), help="print the settings in force, or only check them")
    return root


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `claude-otel-bridge`; ends with SystemExit."""
    sys.exit(_main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    from bridge import config as settings

    options = parser().parse_args(arguments)
    try:
        file = _config_file(options.config)
        text = file.read_text(encoding="utf-8") if file else ""
        flags: dict[str, Any] = {
            key: value
            for key in ("listen", "state_dir", "log_format", "log_level")
            if (value := getattr(options, key)) is not None
        }
        config = settings.load(text, os.environ, flags, str(file))
    except settings.ConfigError as error:
        sys.stderr.write(f"claude-otel-bridge: {error}\n")
        return os.EX_CONFIG
    except (OSError, UnicodeDecodeError) as error:
        sys.stderr.write(f"claude-otel-bridge: cannot read settings: {error}\n")
        return os.EX_CONFIG
    if options.command == "config":
        if options.action == "show":
            sys.stdout.write(settings.to_toml(config))
        else:
            sys.stdout.write(f"{file or 'no settings file'}: ok\n")
        return os.EX_OK
    from bridge import daemon

    return daemon.run(config)


def _config_file(given: str | None) -> Path | None:
    """The settings file: --config or BRIDGE_CONFIG, which must exist; else the first of the usual places that does."""
    if named := given or os.environ.get("BRIDGE_CONFIG"):
        return Path(named).expanduser()
    xdg = os.environ.get("XDG_CONFIG_HOME", "")
    places = [Path(xdg) if xdg.startswith("/") else Path.home() / ".config"]
    if sys.platform == "darwin":
        places.insert(0, Path.home() / "Library" / "Application Support")
    return next((file for place in places if (file := place / "claude-otel-bridge" / "config.toml").exists()), None)
