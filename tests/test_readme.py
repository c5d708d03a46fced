"""The README says what the code does: commands run, settings, metrics and reasons are all there."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_type_hints

from bridge import config, model, otlp
from bridge.telemetry import Telemetry, Throttle
from bridge.tools.claude_code import XRG_PROFILE, environment
from tests.daemon import Daemon

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


SERVICE_COMMANDS = (
    r"(sudo )?pipx install (--global )?\.",
    r"claude-otel-bridge (install|uninstall( --purge)?|start|stop|restart|status|logs -f)",
    r"sudo claude-otel-bridge install --system",
    r"mkdir -p ~/\S+( ~/\S+)?",
    r"cp systemd/user/claude-otel-bridge\.socket systemd/user/claude-otel-bridge\.service ~/\.config/systemd/user/",
    r"systemctl --user (daemon-reload|enable --now claude-otel-bridge\.socket claude-otel-bridge\.service)",
    r'sed "s\|/Users/YOU\|\$HOME\|" launchd/claude-otel-bridge\.plist > ~/Library/LaunchAgents/\S+',
    r"launchctl bootstrap gui/\$UID ~/Library/LaunchAgents/claude-otel-bridge\.plist",
)
"""Their verbs are tested in test_service and test_launchd, their files in test_systemd and test_launchd."""

GENAI_COMMANDS = (
    r"pip install opentelemetry-\S+( (opentelemetry-\S+|httpx))*",
    r"OTEL_SERVICE_NAME=my-app OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf opentelemetry-instrument python my_app\.py",
)
"""What test_real_clients does with an application of its own."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_first_screen_has_the_waist_and_the_two_commands() -> None:
    first = "\n".join(README.splitlines()[:30])
    assert "Ledger" in first
    run, test = blocks("sh")[:2]
    assert run.strip().endswith("pip install -q . && .venv/bin/claude-otel-bridge")
    assert test.strip().endswith("pip install -q -e '.[test]' && .venv/bin/pytest")


def test_every_shell_command_is_one_that_a_test_runs() -> None:
    """The two set-up commands are run by the continuous integration script, the rest here and below."""
    tested = (
        r"python3 -m venv \.venv && \.venv/bin/pip install -q (\.|-e '\.\[test\]') && \.venv/bin/\S+",
        r"export \w+=\S+",
        r"curl localhost:4318/v1/metrics",
        r"\.venv/bin/claude-otel-bridge (config show|config check|--help)",
        r"\.venv/bin/claude-otel-bridge setup( codex| gemini)?( --write| --undo| --shell fish| --statusline)?",
        r"\.venv/bin/claude-otel-bridge doctor( --json)?",
        r"\.venv/bin/claude-otel-bridge report( \w+)?( --\w+( [\w/]+)?)*",
        r"\.venv/bin/claude-otel-bridge backup claude-otel-bridge\.db",
        r"\.venv/bin/claude-otel-bridge token( --remove)? alice",
        r"BRIDGE_TOKEN=\.\.\. claude-otel-bridge setup --write --endpoint https://192\.168\.1\.5:4318",
        r"curl --cacert chain\.pem -H \"Authorization: Bearer \$BRIDGE_TOKEN\" https://192\.168\.1\.5:4318/v1/metrics",
        *SERVICE_COMMANDS,
        *GENAI_COMMANDS,
        r"(cp claude-otel-bridge\.db|rm -f) ~/\.local/state/claude-otel-bridge/state\.db.*",
    )
    for block in blocks("sh"):
        for command in block.strip().splitlines():
            assert any(re.fullmatch(pattern, command) for pattern in tested), command
    script = (ROOT / ".ci" / "run").read_text()
    for part in ("python3 -m venv .venv", ".venv/bin/pip install -q -e '.[test]'", ".venv/bin/pytest"):
        assert part in script
        assert part in README


def test_the_command_examples_run(daemon: Daemon) -> None:
    """In a home of their own, beside a bridge that runs."""
    env = {"HOME": str(daemon.directory), "BRIDGE_LISTEN": f"localhost:{daemon.port}"}
    env["BRIDGE_STATE_DIR"] = str(daemon.state_dir)
    for line in re.findall(r"^\.venv/bin/claude-otel-bridge ((?!backup ).+)$", README, re.MULTILINE):
        command = [sys.executable, "-m", "bridge", *line.split()]
        done = subprocess.run(
            command, cwd=daemon.directory, env={**os.environ, **env, "PYTHONPATH": str(ROOT)}, timeout=30,
            capture_output=True,
        )  # fmt: skip
        assert done.returncode == 0, (line, done.stderr)


def test_the_header_with_the_token_lets_a_reader_in(make_daemon: Callable[..., Daemon]) -> None:
    (header,) = re.findall(r'^curl .* -H "([^"]+)"', README, re.MULTILINE)
    token = "t" * int(re.findall(r"a SECRET of (\d+) characters or more", README)[0])
    daemon = make_daemon(env={"BRIDGE_LOOPBACK_TOKEN": "true", "BRIDGE_TOKEN": token}).start()
    name, value = header.replace("$BRIDGE_TOKEN", token).split(": ")
    assert daemon.get("/v1/metrics", {name: value}).status == 200
    assert daemon.get("/v1/metrics", {name: f"{value}x"}).status == 401


def test_the_environment_for_claude_code_is_the_landing_page_s(daemon: Daemon) -> None:
    page = daemon.get("/", {"Host": "localhost:4318"}).text
    exports = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("export ")]
    assert exports == [f"export {name}={value}" for name, value in environment("http://localhost:4318").items()]
    for line in exports:
        assert line in page


def test_the_shown_samples_have_the_shape_of_the_profile(daemon: Daemon) -> None:
    shown = [line.rsplit(" ", 2)[0] for line in README.splitlines() if re.match(r"claude_code_\S+ \S+ \d{13}$", line)]
    served = list(daemon.samples())
    assert shown
    assert shown == served[: len(shown)]
    for family in XRG_PROFILE:
        assert f"`{family.name}`" in README


def test_every_setting_is_described() -> None:
    paths = []
    for key, kind in get_type_hints(config.Config).items():
        members = get_type_hints(kind) if isinstance(kind, type) and hasattr(kind, "__struct_fields__") else {}
        paths += [f"{key}.{member}" for member in members] or [key]
    assert set(paths) == set(config.DESCRIPTIONS)
    for path in paths:
        assert f"`{path}`" in README, path


def test_every_reason_and_own_metric_is_described() -> None:
    for reason in model.Drop:
        assert f"| `{reason.value}` |" in README
        assert reason in model.DROP_TEXT
    telemetry = Telemetry(lambda: 0.0, Throttle(lambda: 0.0))
    for family in telemetry.registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        assert name.startswith("process_") or f"`{name}" in README, name
    for key in otlp.CONTENT_KEYS:
        assert f"`{key}`" in README


def places_of_this_machine() -> set[str]:
    """Where this tree lies and where its developer is at home; of what is on every machine nothing is to be told."""
    return {str(ROOT), str(ROOT.parent), str(Path.home())} - {"/", "/home", "/opt", "/srv", "/tmp", "/usr/src"}


def test_the_project_speaks_of_itself_alone() -> None:
    """No place of a developer's machine and no package index stands in what is published."""
    places = "|".join(map(re.escape, sorted(places_of_this_machine())))
    index = r"https?://(?:[\w.-]*(?:registry|proxy|repo|index|mirror)[\w-]*\.|[^\s/]+/simple/)"
    forbidden = re.compile(rf"(?<![\w.-])(?:{places})/[.\w]|{index}")
    assert forbidden.search(f"cd {ROOT}/bridge")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        file = ROOT / name
        if file.suffix not in (".bin", ".gz", ".png") and file.is_file():
            assert not forbidden.search(file.read_text(errors="replace")), name
