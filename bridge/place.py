"""Where the state is, where the bridge listens and how wide the terminal is, for commands that must answer at once.

Law: the same flags, variables and files as for the daemon, and the same order of them; but only the few settings that
are needed here are looked at, since reading and checking all of them takes longer than a whole report. Whether the
rest makes sense is said by the daemon, by `config check` and by `doctor`.
"""

import os
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

NAME = "claude-otel-bridge"


class Place(NamedTuple):
    """The settings that are looked at; `transcripts`: whether they are followed at all."""

    state_dir: str
    listen: str
    transcripts: bool


class Misplaced(Exception):
    """The settings file cannot be read; the text says why."""


def default_state_dir(platform: str, environment: Mapping[str, str], home: str) -> str:
    """Where state is kept: XDG's place, on macOS Application Support."""
    if platform == "darwin":
        return f"{home}/Library/Application Support/{NAME}"
    base = environment.get("XDG_STATE_HOME", "")
    # The XDG specification: a relative path is to be ignored.
    return f"{base if base.startswith('/') else f'{home}/.local/state'}/{NAME}"


def config_file(given: str | None, platform: str, environment: Mapping[str, str], home: str) -> str | None:
    """The settings file: --config or BRIDGE_CONFIG, which must exist; else the first of the usual places that does."""
    if named := given or environment.get("BRIDGE_CONFIG"):
        return expand(named, home)
    xdg = environment.get("XDG_CONFIG_HOME", "")
    places = [xdg if xdg.startswith("/") else f"{home}/.config"]
    if platform == "darwin":
        places.insert(0, f"{home}/Library/Application Support")
    files = (f"{place}/{NAME}/config.toml" for place in places)
    return next((file for file in files if os.path.exists(file)), None)  # noqa: PTH110  # pathlib starts slowly


def expand(path: str, home: str) -> str:
    """A path without `~`."""
    return f"{home}{path[1:]}" if path == "~" or path.startswith("~/") else path


def find(flags: Mapping[str, Any], platform: str, environment: Mapping[str, str], home: str) -> Place:
    """The place in force; `flags` may have config, state_dir, listen and no_transcripts. Raises Misplaced."""
    said = _said(config_file(flags.get("config"), platform, environment, home))

    def setting(key: str, default: Any) -> Any:
        return environment.get(f"BRIDGE_{key.upper()}") or said.get(key) or default

    state_dir = flags.get("state_dir") or setting("state_dir", "")
    listen = flags.get("listen") or setting("listen", ["localhost:4318"])
    listen = listen.split(",") if isinstance(listen, str) else listen
    transcripts = str(environment.get("BRIDGE_TRANSCRIPTS", said.get("transcripts", True))).lower()
    is_off = flags.get("no_transcripts") or transcripts in ("false", "0")
    directory = expand(str(state_dir), home) or default_state_dir(platform, environment, home)
    return Place(directory, str(listen[0]).strip(), not is_off and setting("source", "auto") != "otlp")


def _said(file: str | None) -> dict[str, Any]:
    if file is None:
        return {}
    import tomllib

    try:
        with open(file, "rb") as opened:  # noqa: PTH123  # pathlib starts slowly
            return tomllib.load(opened)
    except OSError as error:
        raise Misplaced(f"cannot read settings: {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Misplaced(f"{file}: {error}") from None


def columns(otherwise: int) -> int:
    """The width of the terminal; `otherwise` where there is none."""
    if os.environ.get("COLUMNS", "").isdecimal():
        return int(os.environ["COLUMNS"]) or otherwise
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or otherwise
    except (AttributeError, OSError, ValueError):
        return otherwise
