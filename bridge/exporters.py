"""What the settings of Codex and of Gemini CLI say of where they export to, and what of that keeps it from the bridge.

Law: it reads, and changes nothing; a tool that is not told to export is passed over, since its transcripts suffice.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from bridge import edits, setup
from bridge.tools import claude_code

_TABLES = {"codex": "otel", "gemini": "telemetry"}
_VARIABLES = {
    "GEMINI_TELEMETRY_ENABLED": "enabled",
    "GEMINI_TELEMETRY_TARGET": "target",
    "OTEL_EXPORTER_OTLP_ENDPOINT": "otlpEndpoint",
    "GEMINI_TELEMETRY_OTLP_ENDPOINT": "otlpEndpoint",
    "GEMINI_TELEMETRY_OTLP_PROTOCOL": "otlpProtocol",
    "GEMINI_TELEMETRY_LOG_PROMPTS": "logPrompts",
    "GEMINI_TELEMETRY_OUTFILE": "outfile",
}
"""Variables that go before Gemini CLI's settings, the later before the earlier. Of flags, any other text says no."""
_FLAGS = ("enabled", "logPrompts")
_DEFAULTS = {"target": "local", "otlpEndpoint": "http://localhost:4317", "otlpProtocol": "grpc", "logPrompts": True}
"""Of Gemini CLI."""


class Setting(NamedTuple):
    """A value and where it stands: a file, a variable, or nowhere."""

    value: Any
    origin: str = ""


class Exporter(NamedTuple):
    """What a tool, as `setup` calls it, is told of its exports; or why that is not known."""

    tool: str
    title: str
    settings: Mapping[str, Setting]
    problem: str = ""


class Misfit(NamedTuple):
    """A setting that keeps exports from the bridge, and what to do."""

    what: str
    todo: str


def of_tools(environment: Mapping[str, str], endpoint: str) -> Iterator[Exporter]:
    """What Codex and Gemini CLI are told."""
    for tool, table in _TABLES.items():
        aim = setup.target(tool, environment, endpoint)
        try:
            told = edits.get(aim.language.parse(aim.file.read_text(encoding="utf-8")), (table,))
        except FileNotFoundError:
            told = edits.MISSING
        except (OSError, UnicodeDecodeError, edits.EditError) as error:
            yield Exporter(tool, aim.title, {}, f"{aim.file} cannot be read: {error}")
            continue
        settings = {key: Setting(value, str(aim.file)) for key, value in told.items()} if isinstance(told, dict) else {}
        for name, key in _VARIABLES.items() if tool == "gemini" else ():
            if value := environment.get(name, ""):
                settings[key] = Setting(value in ("true", "1") if key in _FLAGS else value, name)
        yield Exporter(tool, aim.title, settings)


def exports(exporter: Exporter) -> bool:
    """Whether a tool is told to export anywhere."""
    if exporter.tool == "gemini":
        return bool(exporter.settings.get("enabled", Setting(False)).value)
    return any(isinstance(exporter.settings.get(key, Setting("")).value, dict) for key in _CODEX)


def sends_token(exporter: Exporter) -> bool:
    """Whether all exports of Codex, which go to HTTP, have a token."""
    told = [exporter.settings[key].value for key in _CODEX if key in exporter.settings]
    headers = [value["otlp-http"].get("headers", {}) for value in told if isinstance(value, dict)]
    return all(isinstance(names, dict) and "authorization" in map(str.lower, names) for names in headers)


def misfits(exporter: Exporter, endpoint: str) -> Iterator[Misfit]:
    """What keeps the exports of a tool from the bridge at `endpoint`."""
    find = _of_gemini if exporter.tool == "gemini" else _of_codex
    for key, setting, why in find(exporter.settings, endpoint):
        is_variable = setting.origin in _VARIABLES
        where = f" in {setting.origin}" if setting.origin and not is_variable else "" if is_variable else " by default"
        name = setting.origin if is_variable else f"{_TABLES[exporter.tool]}.{key}"
        todo = f"claude-otel-bridge setup {exporter.tool} --write"
        yield Misfit(
            f"{name}={setting.value}{where}: {why}", f"unset {name} where your shell sets it" if is_variable else todo
        )


def _of_gemini(settings: Mapping[str, Setting], endpoint: str) -> Iterator[tuple[str, Setting, str]]:
    found = {key: settings.get(key, Setting(value)) for key, value in _DEFAULTS.items()}
    outfile = settings.get("outfile", Setting(""))
    if found["target"].value != "local":
        yield "target", found["target"], "local is needed; this is Google Cloud"
    if outfile.value:
        yield "outfile", outfile, "what is written to a file is sent nowhere"
    if not claude_code.fits("OTEL_EXPORTER_OTLP_ENDPOINT", str(found["otlpEndpoint"].value), endpoint):
        yield "otlpEndpoint", found["otlpEndpoint"], "it does not lead to this bridge"
    if found["otlpProtocol"].value != "http":
        yield "otlpProtocol", found["otlpProtocol"], "http is needed; gRPC is not served"
    if found["logPrompts"].value:
        yield "logPrompts", found["logPrompts"], "your prompts are sent along; the bridge throws them away"


_CODEX = {"exporter": "LOGS", "metrics_exporter": "METRICS"}


def _of_codex(settings: Mapping[str, Setting], endpoint: str) -> Iterator[tuple[str, Setting, str]]:
    for key, signal in _CODEX.items():
        setting = settings.get(key, Setting(""))
        value, origin = setting.value, setting.origin
        if not isinstance(value, dict):
            continue
        http = value.get("otlp-http")
        if not isinstance(http, dict):
            yield key, Setting(", ".join(value), origin), "otlp-http is needed; gRPC is not served"
        elif not claude_code.fits(f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT", str(http.get("endpoint", "")), endpoint):
            yield (
                key,
                Setting(http.get("endpoint", ""), origin),
                f"it does not lead to this bridge's /v1/{signal.lower()}",
            )
