"""`doctor`: what works and what does not, from the tools to XRG, worst first, each with what to do.

Law: it changes nothing and needs no daemon, no home and no PATH. The world is looked at once, in `evidence`; every
check is a pure function of what was found there. The exit code is 1 if anything fails.
"""

import contextlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from typing import NamedTuple

from bridge import __version__, exporters, filesystem, setup
from bridge.config import Config
from bridge.database import SCHEMA_VERSION
from bridge.evidence import (
    SHELL,
    STARTED,
    UNKNOWN_CERTIFICATE,
    XRG_DOMAIN,
    XRG_KEY,
    Answer,
    Directory,
    Evidence,
    Layer,
    Metrics,
    Transcripts,
    gather,
)
from bridge.model import DROP_TEXT, Drop
from bridge.place import NAME
from bridge.store import Inspection
from bridge.tools import claude_code

LITTLE_SPACE, NO_SPACE = 500 * 10**6, 20 * 10**6


class Status(StrEnum):
    FAIL = "fail"
    WARN = "warn"
    OK = "ok"


class Finding(NamedTuple):
    status: Status
    check: str
    what: str
    todo: str = ""


def run(config: Config, environment: Mapping[str, str], *, as_json: bool) -> tuple[str, int]:
    """The findings as a table or JSON, and the exit code."""
    findings = examine(gather(config, environment))
    code = int(any(finding.status is Status.FAIL for finding in findings))
    return (to_json(findings) if as_json else table(findings)), code


def examine(found: Evidence) -> list[Finding]:
    """All findings, worst first."""
    of_settings = [
        *check_claude(found.layers, found.endpoints, found.guarded),
        *check_exporters(found.settings, found.endpoints, found.guarded),
    ]
    led_here = frozenset(finding.check for finding in of_settings if finding.status is Status.OK)
    findings = [
        *(
            check_elsewhere(found.elsewhere)
            if found.elsewhere
            else check_daemon(found.answers, found.instance, found.holder)
        ),
        *check_directory(found.directory, found.user),
        *check_database(found.inspection),
        *of_settings,
        *check_transcripts(found.transcripts, found.metrics, found.now),
        *check_others(found.others, found.metrics, found.now, led_here),
        *check_xrg_endpoint(found.xrg_endpoint, found.here),
    ]
    if found.denied:
        todo = "set BRIDGE_TOKEN to a token that the bridge knows: claude-otel-bridge token NAME makes one"
        what = f"{found.denied}: exports, refusals and what XRG shows were not looked at"
        findings.append(Finding(Status.WARN, "token", what, todo))
    if found.metrics is not None:
        findings += [
            *check_version(found.metrics),
            *check_exports(found.metrics, found.now, is_led_here=bool(led_here)),
            *check_refusals(found.metrics),
            *check_points(found.metrics),
            *check_held(found.metrics),
            *check_clock(found.metrics, found.now),
        ]
    if found.profile is not None:
        findings += check_profile(found.profile)
    if isinstance(found.inspection, Inspection):
        findings += check_history(found.inspection)
    order = list(Status)
    return sorted(findings, key=lambda finding: order.index(finding.status))


def table(findings: Iterable[Finding]) -> str:
    """One line a finding, and one for what to do."""
    findings = list(findings)
    lines = []
    for status, check, what, todo in findings:
        lines.append(f"{status:<5} {check:<12} {what}")
        if todo:
            lines.append(f"{'':<18} -> {todo}")
    counts = [sum(finding.status is status for finding in findings) for status in Status]
    lines.append("{} failed, {} warnings, {} ok".format(*counts))
    return "\n".join(lines) + "\n"


def to_json(findings: Iterable[Finding]) -> str:
    findings = list(findings)
    healthy = all(finding.status is not Status.FAIL for finding in findings)
    report = {"version": __version__, "healthy": healthy, "findings": [finding._asdict() for finding in findings]}
    return json.dumps(report, indent=2, ensure_ascii=False) + "\n"


# --- checks ----------------------------------------------------------------------------------------------------


def check_daemon(answers: tuple[Answer, ...], instance: str, holder: str) -> Iterator[Finding]:
    """Is a bridge there on every address, and is it the one whose state we look at?"""
    silent = [answer for answer in answers if answer.problem]
    present = [answer for answer in answers if not answer.problem]
    if not answers:
        yield Finding(Status.WARN, "daemon", "it listens on no loopback address; not asked", "see `listen`")
    elif not present:
        held = f"; process {holder} holds the state" if holder else ""
        where = ", ".join(f"{answer.address} ({answer.problem})" for answer in silent)
        todo = "start it: claude-otel-bridge install, or claude-otel-bridge in a terminal"
        if holder:
            todo = f"it runs with another `listen`: see the ready line of its log, or stop process {holder} first"
        yield Finding(Status.FAIL, "daemon", f"nothing answers on {where}{held}", todo)
    for answer in present:
        port = answer.address.rpartition(":")[2]
        if not answer.instance:
            what = f"another program answers on {answer.address} ({answer.server or 'without a name'})"
            todo = f"stop it (lsof -i :{port} names it), or choose another `listen` and run setup again"
            yield Finding(Status.FAIL, "daemon", what, todo)
        elif answer.instance != instance:
            what = f"the bridge on {answer.address} keeps its state elsewhere"
            yield Finding(Status.FAIL, "daemon", what, "name its settings with --config or --state-dir, or stop it")
        elif answer.status != 200:
            what = f"the bridge on {answer.address} answers {answer.status}: it is starting or stopping"
            yield Finding(Status.WARN, "daemon", what, "look again in a few seconds")
        else:
            yield Finding(Status.OK, "daemon", f"the bridge answers on {answer.address}")
    if present and silent:
        where = ", ".join(f"{answer.address} ({answer.problem})" for answer in silent)
        todo = "restart it; clients that take localhost for that address are refused"
        yield Finding(Status.WARN, "daemon", f"nothing answers on {where}", todo)


def check_elsewhere(answer: Answer) -> Iterator[Finding]:
    """Does the bridge of another machine take what Claude Code would send?"""
    address, problem, status, server, _ = answer
    if problem:
        todo = "see whether it runs and can be reached from here; ask whoever runs it"
        if problem.startswith(UNKNOWN_CERTIFICATE):
            todo = (
                "SSL_CERT_FILE=chain.pem claude-otel-bridge doctor, with its authority; Claude Code has that from"
                " NODE_EXTRA_CA_CERTS"
            )
        yield Finding(Status.FAIL, "daemon", f"{address}, to which Claude Code exports: {problem}", todo)
    elif server != NAME:
        what = f"{address}, to which Claude Code exports, is another program ({server or 'without a name'})"
        yield Finding(Status.WARN, "daemon", what, "see whether that is meant: claude-otel-bridge setup changes it")
    elif status == 401:
        todo = f"BRIDGE_TOKEN=... claude-otel-bridge setup --write --endpoint {address}, with the token you were given"
        yield Finding(Status.FAIL, "daemon", f"the bridge at {address} does not know the token, or there is none", todo)
    elif status in (403, 421, 429, 503):
        yield Finding(Status.WARN, "daemon", f"the bridge at {address} answers {status}", "ask whoever runs it")
    else:
        yield Finding(Status.OK, "daemon", f"the bridge at {address} answers and takes what comes from here")


def check_version(metrics: Metrics) -> Iterator[Finding]:
    for labels, _ in metrics.get("bridge_build_info", []):
        if labels.get("version") == __version__:
            yield Finding(Status.OK, "version", __version__)
        else:
            what = f"the daemon is {labels.get('version')}, this command {__version__}"
            yield Finding(Status.WARN, "version", what, "restart the bridge")


def check_directory(directory: Directory, user: int) -> Iterator[Finding]:
    path, owner, mode, file_system, free, put_aside = directory
    if owner is None:
        yield Finding(Status.OK, "state", f"{path} does not exist yet; the first start makes it")
        return
    findings = []
    if owner != user:
        status = Status.WARN if user == 0 else Status.FAIL
        todo = "run doctor as that user, or choose another `state_dir`"
        findings.append(Finding(status, "state", f"{path} belongs to uid {owner}, not to {user}", todo))
    if mode & 0o077:
        what = f"{path} has mode {mode:04o}: others can read it"
        findings.append(Finding(Status.WARN, "state", what, f"chmod 700 {path}"))
    if file_system in filesystem.NETWORK:
        what = f"{path} is on a network file system ({file_system}), whose locks and syncs SQLite cannot trust"
        findings.append(Finding(Status.WARN, "state", what, "choose a `state_dir` on a local disk"))
    if put_aside:
        what = f"the database was damaged once and replaced by a copy; what it was is in {put_aside}"
        findings.append(Finding(Status.WARN, "state", what, "check the disk; remove that folder when you are done"))
    if free < LITTLE_SPACE:
        status = Status.FAIL if free < NO_SPACE else Status.WARN
        what = f"{free // 10**6} MB are free at {path}"
        findings.append(Finding(status, "state", what, "make room; exports are refused while the disk is full"))
    if not findings:
        named = f" on {file_system}" if file_system else ""
        findings.append(Finding(Status.OK, "state", f"{path}{named}, {free / 10**9:.1f} GB free"))
    yield from findings


def check_database(inspection: Inspection | str | None) -> Iterator[Finding]:
    known = SCHEMA_VERSION
    match inspection:
        case None:
            yield Finding(Status.OK, "database", "none yet")
        case str():
            todo = "check the disk and its permissions; restore a copy if it is damaged"
            yield Finding(Status.FAIL, "database", f"cannot be read: {inspection}", todo)
        case Inspection(version=version) if version > known:
            what = f"has schema {version}, this version knows up to {known}"
            yield Finding(Status.FAIL, "database", what, "install the newer version again")
        case Inspection(version=0):
            todo = "move it away or choose another `state_dir`"
            yield Finding(Status.FAIL, "database", "is not one of this program", todo)
        case Inspection(version=version) if version < known:
            yield Finding(Status.OK, "database", f"has schema {version}; the next start brings it to {known}")
        case _:
            yield Finding(Status.OK, "database", f"schema {inspection.version}, {inspection.commits} commits")


def check_exports(metrics: Metrics, now: float, *, is_led_here: bool = False) -> Iterator[Finding]:
    """The last export of each tool and signal. `is_led_here`: the settings of a tool lead here."""
    tools: dict[str, dict[str, float]] = defaultdict(dict)
    for labels, when in metrics.get("bridge_last_export_timestamp_seconds", []):
        tools[labels["tool"] or "unnamed"][labels["signal"]] = when
    if not tools:
        since = f" since the bridge started {_ago(now, when)}" if (when := _sum(metrics, STARTED)) else " yet"
        if is_led_here:
            yield Finding(Status.OK, "exports", f"none came{since}")
        else:
            todo = "claude-otel-bridge setup --write, then a new Claude Code session"
            yield Finding(Status.WARN, "exports", f"nothing was received{since}", todo)
    for tool, signals in sorted(tools.items()):
        what = f"{tool}: " + ", ".join(f"{signal} {_ago(now, when)}" for signal, when in sorted(signals.items()))
        if tool == "claude_code" and "metrics" not in signals:
            todo = "set OTEL_METRICS_EXPORTER=otlp: claude-otel-bridge setup"
            yield Finding(Status.WARN, "exports", f"{what}, but no metrics", todo)
        else:
            yield Finding(Status.OK, "exports", what)


_REFUSALS = {
    "400": ("not OTLP, or damaged", "the log names the client's mistake"),
    "401": ("without a token that is known", "give the client one: claude-otel-bridge token NAME"),
    "403": ("from web pages", "nothing, unless a page of yours should read the bridge"),
    "405": ("with a wrong method", "POST exports to /v1/metrics, GET /metrics to read"),
    "408": ("that did not arrive in time", "raise limits.body_seconds if a client is that slow"),
    "413": ("that were too large", "raise limits.max_body_mib, or make the sender's batches smaller"),
    "415": ("of a wrong type", "set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf in the client"),
    "421": ("with a foreign Host", "use localhost in the client, or add the name to `hosts`"),
    "429": ("above the allowance of a token or an address", "raise limits.requests_per_second, or see who floods"),
    "503": ("that came too early or could not be written", "see the log, and the disk"),
}


def check_refusals(metrics: Metrics) -> Iterator[Finding]:
    """Wrong paths and protocols, and a disk that does not take commits."""
    if metrics.get("bridge_storage_ok") and not _sum(metrics, "bridge_storage_ok"):
        todo = "free space or repair the disk; it goes on by itself"
        yield Finding(Status.FAIL, "storage", "the last commit failed; exports are refused", todo)
    if count := _sum(metrics, "bridge_grpc_attempts_total"):
        todo = "set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf in the client: claude-otel-bridge setup"
        yield Finding(Status.WARN, "protocol", f"gRPC clients knocked {_times(count)}; only HTTP is served", todo)
    if count := _sum(metrics, "bridge_wrong_path_total"):
        todo = "OTEL_EXPORTER_OTLP_ENDPOINT takes the address alone, a per-signal endpoint the whole path (/v1/metrics)"
        yield Finding(Status.WARN, "path", f"exports came to a wrong path {_times(count)}", todo)
    denied = metrics.get("bridge_http_denied_total", [])
    guesses = sum(count for labels, count in denied if (labels["code"], labels.get("reason")) == ("429", "token"))
    if guesses:
        what = f"{guesses:.0f} requests were refused with 429: an address sent too many wrong tokens"
        yield Finding(Status.WARN, "refused", what, "the log names the address; give its client a token that is known")
    for labels, count in metrics.get("bridge_http_refused_total", []):
        if labels["code"] == "429":
            count -= guesses
        if count > 0 and (known := _REFUSALS.get(labels["code"])):
            what = f"{count:.0f} requests were refused with {labels['code']}: {known[0]}"
            yield Finding(Status.WARN, "refused", what, known[1])


def check_points(metrics: Metrics) -> Iterator[Finding]:
    """Duplicates, drops and limits."""
    for labels, count in metrics.get("bridge_points_dropped_total", []):
        if count:
            with contextlib.suppress(ValueError):
                text = DROP_TEXT[Drop(labels["reason"])]
                what = f"{count:.0f} points were refused as {labels['reason']}: {text}"
                yield Finding(Status.WARN, "points", what, "the log and the sender's log name the metrics")
    for labels, count in metrics.get("bridge_streams_limited_total", []):
        if count:
            what = f"{labels['setting']} was met {_times(count)}"
            yield Finding(Status.WARN, "points", what, "raise the setting, or drop labels with labels.drop")
    accepted, duplicates = (_sum(metrics, f"bridge_points_{kind}_total") for kind in ("accepted", "duplicate"))
    yield Finding(Status.OK, "points", f"{accepted:.0f} counted, {duplicates:.0f} came again and did not count twice")


def check_held(metrics: Metrics) -> Iterator[Finding]:
    """Whether the state went back, as after a restored backup, and has not caught up with what was served."""
    lost, held = (_sum(metrics, name) for name in ("bridge_state_lost_commits_total", "bridge_held"))
    what = "the state went back" + (f" {lost:.0f} transactions at the start" if lost else "")
    if held:
        todo = "nothing: they go on once it has caught up"
        yield Finding(Status.WARN, "restored", f"{what}; {held:.0f} totals and series stand still", todo)
    elif lost:
        yield Finding(Status.OK, "restored", f"{what}; it has caught up")


def check_clock(metrics: Metrics, now: float) -> Iterator[Finding]:
    latest = max((when for _, when in metrics.get("bridge_last_export_timestamp_seconds", [])), default=0)
    if latest > now + 5:
        what = f"the last export lies {latest - now:.0f} s in the future: the clock was set back"
        yield Finding(Status.WARN, "clock", what, "nothing is lost; check how this machine gets its time")


def check_history(inspection: Inspection) -> Iterator[Finding]:
    """What the database remembers of senders and scrapers."""
    if inspection.version != SCHEMA_VERSION:
        return
    seen = {"delta": inspection.has_deltas, "cumulative": inspection.has_runs}
    if kinds := [kind for kind, is_seen in seen.items() if is_seen]:
        yield Finding(Status.OK, "temporality", f"{' and '.join(kinds)} seen; both count exactly")
    names = ", ".join(" ".join(part for part in key.split("|") if part) for key, _ in inspection.scrapers[:4])
    what = f"{len(inspection.scrapers)} known: {names}" if names else "none has scraped /metrics so far"
    yield Finding(Status.OK, "prometheus", what)


_LESSER = frozenset(
    {"OTEL_METRIC_EXPORT_INTERVAL", "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE"}
)  # exports arrive without them, only later or less surely


def check_claude(
    layers: tuple[Layer, ...], endpoints: tuple[str, ...], guarded: frozenset[str] = frozenset()
) -> Iterator[Finding]:
    """What of Claude Code's settings and environment keeps its exports from all addresses of this bridge, of which
    those in `guarded` ask for a token."""
    variables: dict[str, str] = {}
    origin: dict[str, Layer] = {}
    relevant = {*claude_code.environment(""), *claude_code.OVERRIDES}
    for layer in layers:
        if layer.problem:
            yield Finding(Status.WARN, "claude", f"{layer.name}: {layer.problem}", "repair the file")
        for name in sorted(relevant & layer.variables.keys()):
            value = layer.variables[name]
            if variables.get(name, value) != value:
                what = f"{name} is {variables[name]} in {origin[name].name}, but {value} in {layer.name}, which wins"
                yield Finding(Status.WARN, "claude", what, f"make {origin[name].name} say the same, or nothing")
            variables[name], origin[name] = value, layer
    usual = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318"}
    endpoint = min(endpoints, key=lambda url: len(claude_code.misfits(usual | variables, url)))
    wrong = claude_code.misfits(variables, endpoint)
    if "CLAUDE_CODE_ENABLE_TELEMETRY" in wrong:
        todo = "claude-otel-bridge setup --write"
        yield Finding(Status.WARN, "claude", "Claude Code's telemetry is not switched on", todo)
        return
    is_default = all(claude_code.fits(name, value, endpoint) for name, value in usual.items())
    problems = 0
    for name, value in wrong.items():
        if name in _LESSER or (is_default and name == "OTEL_EXPORTER_OTLP_ENDPOINT" and not value):
            continue
        problems += 1
        is_minor = "LOGS" in name or (name == "OTEL_EXPORTER_OTLP_PROTOCOL" and not value)
        where = f" in {origin[name].name}" if name in origin else ""
        what = f"{name}={value}{where}: {_reason(name)}" if value else f"{name} is not set: {_reason(name)}"
        todo = "claude-otel-bridge setup --write"
        if name in origin and origin[name].is_managed:
            todo = "ask who manages this machine's Claude Code"
        elif name in origin and origin[name].name == SHELL and name in claude_code.OVERRIDES:
            todo = f"unset {name} where your shell sets it"
        yield Finding(Status.WARN if is_minor else Status.FAIL, "claude", what, todo)
    if endpoint in guarded and not any(setup.has_token(layer.variables.get(setup.HEADERS, "")) for layer in layers):
        todo = "BRIDGE_TOKEN=... claude-otel-bridge setup --write"
        yield Finding(Status.WARN, "claude", f"this bridge wants a token, and {setup.HEADERS} has none", todo)
    elif not problems:
        yield Finding(Status.OK, "claude", f"Claude Code is set to export to {endpoint}")


def _reason(name: str) -> str:
    if name.endswith("_EXPORTER"):
        return "otlp must be in it"
    if name.endswith("_PROTOCOL"):
        return "http/protobuf or http/json is needed; gRPC is not served"
    if name in claude_code.OVERRIDES:
        return "it is used as it stands and must be this bridge's address with the whole path"
    return "it does not lead to this bridge"


def check_exporters(
    found: tuple[exporters.Exporter, ...], endpoints: tuple[str, ...], guarded: frozenset[str] = frozenset()
) -> Iterator[Finding]:
    """What of other tools' settings keeps their exports from this bridge, where they are told to export."""
    for exporter in found:
        if exporter.problem:
            yield Finding(Status.WARN, exporter.tool, exporter.problem, "repair the file")
        elif exporters.exports(exporter):
            every = {url: list(exporters.misfits(exporter, url)) for url in endpoints}
            endpoint, misfits = min(every.items(), key=lambda pair: len(pair[1]))
            yield from (Finding(Status.WARN, exporter.tool, what, todo) for what, todo in misfits)
            if not misfits and endpoint in guarded and exporter.tool == "codex" and not exporters.sends_token(exporter):
                todo = "BRIDGE_TOKEN=... claude-otel-bridge setup codex --write"
                yield Finding(
                    Status.WARN, exporter.tool, f"this bridge wants a token, and {exporter.title} has none", todo
                )
            elif not misfits:
                yield Finding(Status.OK, exporter.tool, f"{exporter.title} is set to export to {endpoint}")


def check_transcripts(transcripts: Transcripts, metrics: Metrics | None, now: float) -> Iterator[Finding]:
    """Has Claude Code been used without telling us?"""
    root, count, newest = transcripts
    if not count:
        yield Finding(Status.OK, "transcripts", f"none under {root}")
        return
    yield Finding(Status.OK, "transcripts", f"{count} under {root}, the newest {_ago(now, newest)}")
    if metrics is None:
        return
    samples = metrics.get("bridge_last_export_timestamp_seconds", [])
    last = max((when for labels, when in samples if labels["tool"] == "claude_code"), default=0)
    if newest > max(last, _sum(metrics, STARTED)) + 300:
        what = f"Claude Code was used {_ago(now, newest)}, but its last export came " + (
            _ago(now, last) if last else "before the bridge started, or never"
        )
        yield Finding(Status.WARN, "exports", what, "start its sessions anew: they keep the settings they began with")


def check_others(
    others: tuple[tuple[str, Transcripts], ...], metrics: Metrics | None, now: float, led_here: frozenset[str]
) -> Iterator[Finding]:
    """Which other tools were used; their transcripts suffice, and exports tell more. `led_here`: as `setup` calls
    them, those whose settings lead here."""
    samples = (metrics or {}).get("bridge_last_export_timestamp_seconds", [])
    exporting = {labels["tool"] for labels, _ in samples}
    for tool, (root, count, newest) in others:
        title, name = _OTHERS[tool]
        told = f"{title}: {count} under {root}, the newest {_ago(now, newest)}"
        if metrics is not None and tool not in exporting and name not in led_here:
            told += f"; it exports nothing here, which `claude-otel-bridge setup {name}` changes"
        yield Finding(Status.OK, "transcripts", told)


_OTHERS = {"codex": ("Codex", "codex"), "gemini_cli": ("Gemini CLI", "gemini")}
"""Title, and what `setup` calls it."""


def check_profile(profile: str) -> Iterator[Finding]:
    tokens, cost, missing = xrg_reading(profile)
    if missing:
        what = f"XRG would not find {', '.join(missing)} on /v1/metrics"
        yield Finding(Status.FAIL, "xrg", what, "restart the bridge; if it stays, report it")
    else:
        yield Finding(Status.OK, "xrg", f"XRG would show {tokens} tokens and ${cost:.2f}")


def xrg_reading(text: str) -> tuple[int, float, list[str]]:
    """What XRG makes of a scrape: tokens, cost, and the kinds of tokens that it does not find.

    Its value is a line's second-to-last word. A line with `token_usage` or `tokens` in it counts for the first of
    the kinds that occurs anywhere in the line; another line with `cost` in it is money.
    """
    kinds = dict.fromkeys(("input", "output", "cache_read", "cache_create"), 0)
    found = set()
    cost = 0.0
    for line in text.split("\n"):
        words = [word for word in line.split(" ") if word]
        if line.startswith("#") or len(words) < 2:
            continue
        if "token_usage" in line or "tokens" in line:
            if kind := next((kind for kind in kinds if kind in line), None):
                number = re.match(r"[+-]?\d+", words[-2])  # a C integer: it ends at the first other character
                kinds[kind] += int(number[0]) if number else 0
                found.add(kind)
        elif "cost" in line:
            with contextlib.suppress(ValueError):
                cost += float(words[-2])
    return sum(kinds.values()), cost, [kind for kind in kinds if kind not in found]


def check_xrg_endpoint(set_to: str, endpoint: str) -> Iterator[Finding]:
    wanted = f"{endpoint}/v1/metrics"
    if set_to and set_to.replace("127.0.0.1", "localhost") != wanted.replace("127.0.0.1", "localhost"):
        todo = f"defaults write {XRG_DOMAIN} {XRG_KEY} {wanted}"
        yield Finding(Status.WARN, "xrg", f"XRG is set to read {set_to}", todo)


def _sum(metrics: Metrics, name: str) -> float:
    return sum(value for _, value in metrics.get(name, []))


def _times(count: float) -> str:
    return "once" if count == 1 else f"{count:.0f} times"


def _ago(now: float, when: float) -> str:
    seconds = now - when
    for size, name in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f} {name} ago"
    return f"{seconds:.0f} s ago" if seconds >= 1 else "just now"
