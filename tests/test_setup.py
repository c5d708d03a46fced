"""`setup` changes what it must in other programs' settings, nothing else, and takes it back to the byte."""

import json
import os
import stat
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge import edits, setup
from bridge.config import Config, Tls
from bridge.edits import JSON, TOML, EditError
from bridge.setup import BACKUP_SUFFIX, RECORD_SUFFIX, SetupError
from bridge.tools.claude_code import ENVIRONMENT, OVERRIDES, environment, fits, misfits

ENDPOINT = "http://localhost:4318"
OURS = environment(ENDPOINT)


def run(home: Path, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`claude-otel-bridge setup ...` with nothing in the environment but a home."""
    command = [sys.executable, "-m", "bridge", *arguments]
    variables = {"HOME": str(home), "PYTHONWARNINGS": "error", **(env or {})}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=30)


def aim(home: Path, tool: str = "claude", address: str = ENDPOINT) -> setup.Target:
    return setup.target(tool, {"HOME": str(home)}, address)


def with_settings(home: Path, content: str | bytes) -> Path:
    file = home / ".claude" / "settings.json"
    file.parent.mkdir()
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def tree(home: Path) -> dict[str, bytes]:
    return {str(path.relative_to(home)): path.read_bytes() for path in home.rglob("*") if path.is_file()}


# --- as a new user ---------------------------------------------------------------------------------------------


def test_an_empty_home(tmp_path: Path) -> None:
    shown = run(tmp_path, "setup")
    assert shown.returncode == 0
    assert "Nothing has been changed" in shown.stdout
    for variable in ENVIRONMENT:
        assert variable.name in shown.stdout
        assert variable.why in shown.stdout
    assert not list(tmp_path.iterdir())
    written = run(tmp_path, "setup", "--write")
    assert written.returncode == 0, written.stderr
    assert json.loads((tmp_path / ".claude" / "settings.json").read_text()) == {"env": OURS}
    assert run(tmp_path, "setup", "--write").stdout.endswith("nothing to change.\n")
    undone = run(tmp_path, "setup", "--undo")
    assert undone.returncode == 0
    assert undone.stdout.endswith("settings.json: the bridge's own entries are gone from Claude Code's settings.\n")
    assert not list(tmp_path.iterdir())
    assert "nothing to undo" in run(tmp_path, "setup", "--undo").stdout


def test_the_port_of_the_settings_in_force(tmp_path: Path) -> None:
    assert "http://localhost:14318" in run(tmp_path, "--listen", "localhost:14318", "setup").stdout
    assert "http://localhost:15318" in run(tmp_path, "setup", env={"BRIDGE_LISTEN": "localhost:15318"}).stdout


def test_what_other_machines_are_told() -> None:
    def f(*listen: str, ingest: tuple[str, ...] = (), cert: str = "c") -> str:
        return setup.network_endpoint(Config(listen=listen, listen_ingest=ingest, tls=Tls(cert, cert)), "HOST")

    assert f("localhost:1", "0.0.0.0:2") == f("localhost:1", ingest=("192.0.2.2:2", "192.0.2.2:3")) == "https://HOST:2"
    assert f("localhost:1", "[2001:db8::1]:2", cert="") == "http://HOST:2"
    assert f("localhost:1") == "http://HOST:1"


def test_every_address_that_takes_exports_has_its_url() -> None:
    def f(*listen: str, cert: str = "", **settings: Any) -> tuple[str, ...]:
        return setup.endpoints(Config(listen=listen, tls=Tls(cert, cert), **settings))

    assert f("127.0.0.1:1", "localhost:2") == ("http://127.0.0.1:1", "http://localhost:2")
    assert f("[::1]:4318", cert="c") == ("http://[::1]:4318",)
    assert f("0.0.0.0:4318") == ("http://127.0.0.1:4318",)
    assert f("[::]:4318", cert="c") == ("https://localhost:4318",)
    assert f("localhost:1", cert="c", listen_ingest=("192.0.2.2:2",), listen_read=("192.0.2.2:3",), hosts=("nas",)) == (
        "http://localhost:1",
        "https://192.0.2.2:2",
        "https://nas:2",
    )


def test_claude_config_dir_is_honoured(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    assert run(tmp_path, "setup", "--write", env={"CLAUDE_CONFIG_DIR": str(elsewhere)}).returncode == 0
    assert (elsewhere / "settings.json").exists()
    assert not (tmp_path / ".claude").exists()


def test_nothing_but_the_path_of_python_is_needed() -> None:
    done = subprocess.run([sys.executable, "-m", "bridge", "setup"], env={}, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert "settings.json" in done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_exports_for_shells(tmp_path: Path, shell: str) -> None:
    lines = run(tmp_path, "setup", "--shell", shell).stdout.splitlines()
    form = "set -gx {} {}" if shell == "fish" else "export {}={}"
    assert lines == [form.format(name, value) for name, value in OURS.items()]


def test_bash_reads_the_exports(tmp_path: Path) -> None:
    script = f'{run(tmp_path, "setup", "--shell", "bash").stdout}\nprintf "%s" "$OTEL_EXPORTER_OTLP_ENDPOINT"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=30)
    assert done.stdout == ENDPOINT


@pytest.mark.parametrize(
    "arguments", [("--write", "--undo"), ("--shell", "bash", "--write"), ("codex", "--shell", "bash"), ("copilot",)]
)
def test_what_does_not_go_together(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = run(tmp_path, "setup", *arguments)
    assert done.returncode == os.EX_USAGE
    assert done.stderr
    assert not list(tmp_path.iterdir())


# --- settings that are there -----------------------------------------------------------------------------------

HOMES = {
    "empty": "",
    "blank": "\n",
    "object": "{}",
    "object with a line end": "{}\n",
    "space": "{ }\n",
    "compact": '{"model":"opus","hooks":{"Stop":[]}}',
    "one line": '{ "model": "opus", "env": { "A": "1" } }\n',
    "one line, empty env": '{"env": {}}\n',
    "two spaces": '{\n  "model": "opus",\n  "permissions": {\n    "allow": ["Bash(ls:*)"]\n  }\n}\n',
    "four spaces": '{\n    "env": {\n        "A": "1"\n    },\n    "model": "opus"\n}\n',
    "tabs": '{\n\t"env": {\n\t\t"A": "1"\n\t}\n}\n',
    "empty env": '{\n  "env": {},\n  "model": "opus"\n}\n',
    "no line end": '{\n  "model": "opus"\n}',
    "crlf": '{\r\n  "model": "opus",\r\n  "env": {\r\n    "A": "1"\r\n  }\r\n}\r\n',
    "line comments": '// mine\n{\n  // the model\n  "model": "opus", // big\n'
    '  "env": {\n    "A": "1" // first\n  }\n}\n',
    "block comments": '/* a\n b */ {\n  "model": /* , } */ "opus" /* last */\n}\n',
    "only a comment": "// nothing yet\n",
    "comment in an empty object": "{\n  // nothing yet\n}\n",
    "trailing commas": '{\n  "env": {\n    "A": "1",\n  },\n  "list": [1, 2,],\n}\n',
    "trailing comma and comment": '{\n  "a": 1, // one\n}\n',
    "like comments": '{"url": "http://x/y", "glob": "/* no */ ,}", "q": "\\"//"}\n',
    "byte order mark": '\ufeff{\n  "model": "opus"\n}\n',
    "escaped key": '{\n  "\\u0065nv": {\n    "A": "\\u00e9"\n  }\n}\n',
    "duplicate keys": '{\n  "env": {"A": "1"},\n  "env": {"B": "2"}\n}\n',
    "conflicts": '{\n  "env": {\n    "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", // why\n    "A": "1",\n'
    '    "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317",\n'
    '    "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://localhost:4318",\n'
    '    "CLAUDE_CODE_ENABLE_TELEMETRY": 0\n  }\n}\n',
    "numbers": '{"a": 1e400, "b": -0, "c": 12345678901234567890, "d": 0.1}\n',
    "unicode": '{\n  "emoji": "😀\u2028",\n  "env": {"Ä": "ö"}\n}\n',
    "deep": '{"a": ' + "[" * 200 + "]" * 200 + "}\n",
}


@pytest.mark.parametrize("content", HOMES.values(), ids=HOMES)
def test_write_adds_ours_and_undo_gives_every_byte_back(tmp_path: Path, content: str) -> None:
    file = with_settings(tmp_path, content)
    before = tree(tmp_path)
    old = JSON.parse(content)
    assert setup.write(aim(tmp_path))
    new = JSON.parse(file.read_bytes().decode())
    assert {**new.pop("env")} == {
        **{key: value for key, value in old.pop("env", {}).items() if key not in OVERRIDES},
        **OURS,
    }
    assert new == old
    assert not setup.show(aim(tmp_path))
    assert not setup.write(aim(tmp_path))
    assert (tmp_path / ".claude" / f"settings.json{BACKUP_SUFFIX}").read_bytes() == content.encode()
    assert setup.undo(aim(tmp_path)) == (True, [])
    assert tree(tmp_path) == before


@pytest.mark.parametrize("content", HOMES.values(), ids=HOMES)
def test_what_is_not_ours_keeps_its_lines(tmp_path: Path, content: str) -> None:
    """Of a file written over lines, every line is there again, but for a comma and the ones in conflict."""
    file = with_settings(tmp_path, content)
    setup.write(aim(tmp_path))
    after = file.read_bytes().decode()
    if content.count("\n") < 3 or "grpc" in content or 'env": {"' in content:
        return
    lines = [line.strip().replace(",", "") for line in content.splitlines() if line.strip() not in ('"env": {},', "")]
    kept = [line.strip().replace(",", "") for line in after.splitlines()]
    assert [line for line in lines if line not in kept] == []
    assert ("\r\n" in after) == ("\r\n" in content)
    assert after.count("\r") == after.count("\r\n")
    assert after[-1] == content[-1]


def test_the_style_of_the_file_is_taken_on() -> None:
    def f(text: str) -> str:
        return edits.put(JSON, text, ("env", "A"), "1")

    assert f("") == '{\n  "env": {\n    "A": "1"\n  }\n}\n'
    assert f("{}") == '{\n  "env": {\n    "A": "1"\n  }\n}'
    assert f('{\n\t"m": 1\n}\n') == '{\n\t"m": 1,\n\t"env": {\n\t\t"A": "1"\n\t}\n}\n'
    assert f('{\n  "env": {\n    "B": "2"\n  }\n}') == '{\n  "env": {\n    "B": "2",\n    "A": "1"\n  }\n}'
    assert f('{"m": 1}\n') == '{"m": 1, "env": {"A": "1"}}\n'
    assert f('{\n  "m": 1 // one\n}') == '{\n  "m": 1, // one\n  "env": {\n    "A": "1"\n  }\n}'
    assert f('{\r\n  "m": 1\r\n}') == '{\r\n  "m": 1,\r\n  "env": {\r\n    "A": "1"\r\n  }\r\n}'


def test_what_the_user_changes_afterwards_stays(tmp_path: Path) -> None:
    file = with_settings(tmp_path, HOMES["conflicts"])
    setup.write(aim(tmp_path))
    text = file.read_text().replace('"A": "1"', '"A": "2"').replace('"10000"', '"5000"')
    file.write_text(edits.put(JSON, text, ("model",), "opus"))
    did, left = setup.undo(aim(tmp_path))
    assert did
    assert left == ["env.OTEL_METRIC_EXPORT_INTERVAL"]
    expected = JSON.parse(HOMES["conflicts"])
    expected["env"] |= {"A": "2", "OTEL_METRIC_EXPORT_INTERVAL": "5000"}
    assert JSON.parse(file.read_text()) == {**expected, "model": "opus"}
    assert "// why" in file.read_text()
    assert not (tmp_path / ".claude" / f"settings.json{RECORD_SUFFIX}").exists()


def test_undo_of_a_file_that_claude_code_has_written_anew(tmp_path: Path) -> None:
    setup.write(aim(tmp_path))
    file = tmp_path / ".claude" / "settings.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model": "opus"}))
    setup.undo(aim(tmp_path))
    assert json.loads(file.read_text()) == {"model": "opus"}


def test_another_port_later_still_goes_back_to_the_first_file(tmp_path: Path) -> None:
    file = with_settings(tmp_path, HOMES["conflicts"])
    setup.write(aim(tmp_path))
    assert setup.write(aim(tmp_path, address="http://localhost:14318"))
    assert "http://localhost:14318" in file.read_text()
    file.write_text(edits.put(JSON, file.read_text(), ("model",), "opus"))
    setup.write(aim(tmp_path))
    setup.undo(aim(tmp_path))
    assert JSON.parse(file.read_text()) == {**JSON.parse(HOMES["conflicts"]), "model": "opus"}


def test_undo_when_the_file_is_gone(tmp_path: Path) -> None:
    setup.write(aim(tmp_path))
    (tmp_path / ".claude" / "settings.json").unlink()
    assert setup.undo(aim(tmp_path)) == (True, [])
    assert not list(tmp_path.iterdir())


def test_conflicts_are_shown(tmp_path: Path) -> None:
    with_settings(tmp_path, HOMES["conflicts"])
    shown = run(tmp_path, "setup").stdout
    assert '~ env.OTEL_EXPORTER_OTLP_PROTOCOL = "http/protobuf"   was "grpc"' in shown
    assert "- env.OTEL_EXPORTER_OTLP_METRICS_ENDPOINT" in shown
    assert '"http://collector:4317"' in shown


def test_what_does_as_well_stays(tmp_path: Path) -> None:
    content = json.dumps(
        {
            "env": {
                **OURS,
                "CLAUDE_CODE_ENABLE_TELEMETRY": "true",
                "OTEL_METRICS_EXPORTER": "console,otlp",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json",
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318/",
                "OTEL_METRIC_EXPORT_INTERVAL": "2000",
                "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT": "http://localhost:4318/v1/logs",
            }
        }
    )
    file = with_settings(tmp_path, content)
    assert setup.write(aim(tmp_path)) == []
    assert file.read_text() == content
    assert len(tree(tmp_path)) == 1


def test_mode_owner_and_link_stay(tmp_path: Path) -> None:
    real = tmp_path / "dotfiles" / "claude.json"
    real.parent.mkdir()
    real.write_text('{"model": "opus"}\n')
    real.chmod(0o640)
    (tmp_path / ".claude").mkdir()
    link = tmp_path / ".claude" / "settings.json"
    link.symlink_to("../dotfiles/claude.json")
    setup.write(aim(tmp_path))
    assert link.is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert json.loads(real.read_text())["env"] == OURS
    assert [path.name for path in real.parent.iterdir()] == ["claude.json"]
    backup = link.with_name(f"settings.json{BACKUP_SUFFIX}")
    assert stat.S_IMODE(backup.stat().st_mode) == 0o600
    setup.undo(aim(tmp_path))
    assert link.is_symlink()
    assert real.read_text() == '{"model": "opus"}\n'
    assert stat.S_IMODE(real.stat().st_mode) == 0o640


# --- what is refused -------------------------------------------------------------------------------------------

BAD = {
    "not JSON": '{"a": 1',
    "two values": "{} {}",
    "single quotes": "{'a': 1}",
    "a list": "[]",
    "a word": "null",
    "env is a list": '{"env": ["A=1"]}',
    "env is null": '{"env": null}',
    "NaN": '{"a": NaN}',
    "commas alone": "{,}",
    "two commas": '{"a": 1,,}',
    "open comment": '{"a": 1} /* ',
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "too deep": '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_a_file_that_is_not_understood_is_left_alone(tmp_path: Path, content: str | bytes) -> None:
    file = with_settings(tmp_path, content)
    before = tree(tmp_path)
    done = run(tmp_path, "setup", "--write")
    assert done.returncode == os.EX_DATAERR
    assert f"{file} was left as it is" in done.stderr
    assert '"CLAUDE_CODE_ENABLE_TELEMETRY": "1"' in done.stderr  # what to put in by hand
    assert "Traceback" not in done.stderr
    assert tree(tmp_path) == before


def test_read_only_places_are_left_alone(tmp_path: Path) -> None:
    file = with_settings(tmp_path, "{}\n")
    for path, mode in ((file, 0o444), (file.parent, 0o555)):
        usual = stat.S_IMODE(path.stat().st_mode)
        path.chmod(mode)
        done = run(tmp_path, "setup", "--write")
        assert done.returncode == os.EX_NOPERM
        assert f"{path} is a" in done.stderr
        assert "chmod u+w" in done.stderr
        assert run(tmp_path, "setup").returncode == 0
        path.chmod(usual)
    assert tree(tmp_path) == {".claude/settings.json": b"{}\n"}


def test_a_write_that_fails_leaves_everything_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_settings(tmp_path, "{}\n")
    before = tree(tmp_path)
    real = Path.replace

    def full(path: Path, target: Path) -> Path:
        if target.name == "settings.json":
            raise OSError(28, "No space left on device", str(target))
        return real(path, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(SetupError, match="No space left"):
        setup.write(aim(tmp_path))
    assert tree(tmp_path) == before


def test_a_file_that_another_program_writes_meanwhile_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = with_settings(tmp_path, "{}\n")
    monkeypatch.setattr(setup, "_require_writable", lambda _: file.write_text('{"new": 1}'))
    with pytest.raises(SetupError, match="try again"):
        setup.write(aim(tmp_path))
    assert tree(tmp_path) == {".claude/settings.json": b'{"new": 1}'}


def test_a_link_to_nothing_and_a_directory_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".claude").mkdir()
    file = tmp_path / ".claude" / "settings.json"
    file.symlink_to("/nowhere/at/all")
    done = run(tmp_path, "setup", "--write")
    assert done.returncode == os.EX_NOINPUT
    assert "does not exist" in done.stderr
    file.unlink()
    file.mkdir()
    done = run(tmp_path, "setup", "--write")
    assert done.returncode == os.EX_NOPERM
    assert "cannot read" in done.stderr


def test_a_damaged_record_is_not_believed(tmp_path: Path) -> None:
    with_settings(tmp_path, "{}\n")
    setup.write(aim(tmp_path))
    (tmp_path / ".claude" / f"settings.json{RECORD_SUFFIX}").write_text("{")
    before = tree(tmp_path)
    for action in (setup.undo, setup.write):
        with pytest.raises(SetupError, match="does not fit"):
            action(aim(tmp_path))
    assert tree(tmp_path) == before


# --- Codex and Gemini CLI --------------------------------------------------------------------------------------

CODEX = {
    "exporter": {"otlp-http": {"endpoint": f"{ENDPOINT}/v1/logs", "protocol": "binary"}},
    "metrics_exporter": {"otlp-http": {"endpoint": f"{ENDPOINT}/v1/metrics", "protocol": "binary"}},
}
CODEX_HOMES = {
    "none": None,
    "empty": "",
    "other tables": 'model = "o5"\n\n[tui]\nnotifications = true\n',
    "no line end": 'model = "o5"',
    "crlf": 'model = "o5"\r\n[otel]\r\nenvironment = "dev"\r\n[tui]\r\nx = 1\r\n',
    "otel": '[otel] # mine\nlog_user_prompt = false\nexporter = "none" # off\n\n[tui]\nexporter = "other"\n',
    "empty otel": "[otel]\n",
}


# --- the status line -------------------------------------------------------------------------------------------

SHOWN = "BRIDGE_LISTEN=localhost:5318 /opt/bin/claude-otel-bridge statusline"


def with_statusline(home: Path, action: str, statusline: str = SHOWN) -> str:
    return setup.run("claude", action, ENDPOINT, {"HOME": str(home)}, statusline)


def test_the_status_line_is_written_only_when_it_is_asked_for_and_taken_back(tmp_path: Path) -> None:
    file = with_settings(tmp_path, '{"model": "opus"}\n')
    assert "+ statusLine" in with_statusline(tmp_path, "show")
    with_statusline(tmp_path, "write", "")
    assert "statusLine" not in file.read_text()
    assert with_statusline(tmp_path, "write").count("\n  + ") == 1
    ours = {"type": "command", "command": SHOWN}
    assert json.loads(file.read_text()) == {"model": "opus", "env": OURS, "statusLine": ours}
    with_statusline(tmp_path, "write", "")
    assert json.loads(file.read_text())["statusLine"] == ours
    assert "nothing to change" in with_statusline(tmp_path, "write")
    with_statusline(tmp_path, "undo", "")
    assert file.read_text() == '{"model": "opus"}\n'


def test_a_status_line_of_the_user_s_own_stays(tmp_path: Path) -> None:
    own = {"type": "command", "command": "~/mine.sh"}
    file = with_settings(tmp_path, json.dumps({"statusLine": own}))
    for action in ("show", "write", "write"):
        told = with_statusline(tmp_path, action)
        assert f"statusLine is your own and stays; your command can run `{SHOWN}`" in told
    assert json.loads(file.read_text())["statusLine"] == own


def test_the_status_line_s_command_is_that_of_this_bridge(tmp_path: Path) -> None:
    shown = run(tmp_path, "--state-dir", "a b", "--listen", "localhost:5318", "setup", "--statusline")
    assert shown.returncode == 0, shown.stderr
    line = next(line for line in shown.stdout.splitlines() if "statusLine" in line)
    assert f"BRIDGE_STATE_DIR='{Path.cwd() / 'a b'}' BRIDGE_LISTEN=localhost:5318 " in line
    assert " statusline" in line
    refused = run(tmp_path, "setup", "codex", "--statusline")
    assert refused.returncode == os.EX_USAGE
    assert "--statusline is for Claude Code" in refused.stderr


@pytest.mark.parametrize("content", CODEX_HOMES.values(), ids=CODEX_HOMES)
def test_codex(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / ".codex" / "config.toml"
    if content is not None:
        file.parent.mkdir()
        file.write_bytes(content.encode())
    before = tree(tmp_path)
    old = tomllib.loads(content or "")
    setup.write(aim(tmp_path, "codex"))
    new = tomllib.loads(file.read_bytes().decode())
    assert new == {**old, "otel": {**old.get("otel", {}), **CODEX}}
    assert not setup.write(aim(tmp_path, "codex"))
    written = file.read_bytes()
    setup.undo(aim(tmp_path, "codex"))
    assert tree(tmp_path) == before
    setup.write(aim(tmp_path, "codex"))
    assert file.read_bytes() == written
    file.write_bytes(b'# mine\nmodel_provider = "x"\n' + written)
    setup.undo(aim(tmp_path, "codex"))
    assert tomllib.loads(file.read_text()) == {"model_provider": "x", **old}
    assert file.read_bytes().rstrip() == (b'# mine\nmodel_provider = "x"\n' + (content or "").encode()).rstrip()


@pytest.mark.parametrize(
    "content",
    [
        '[otel.exporter."otlp-http"]\nendpoint = "http://x/v1/logs"\nprotocol = "json"\n',
        'otel.environment = "dev"\n',
        'otel = { environment = "dev" }\n',
        '[otel]\nexporter = { otlp-http = {\nendpoint = "http://x" } }\n',
        'otel = "?"\n',
        "[otel\n",
    ],
)
def test_codex_settings_that_cannot_be_merged_are_left_alone(tmp_path: Path, content: str) -> None:
    file = tmp_path / ".codex" / "config.toml"
    file.parent.mkdir()
    file.write_text(content)
    done = run(tmp_path, "setup", "codex", "--write")
    assert done.returncode == os.EX_DATAERR
    assert "by hand" in done.stderr
    assert tomllib.loads(done.stderr[done.stderr.index("\n[otel]\n") :]) == {"otel": CODEX}
    assert tree(tmp_path) == {".codex/config.toml": content.encode()}


def test_codex_home_is_honoured(tmp_path: Path) -> None:
    assert setup.target("codex", {"CODEX_HOME": "/c"}, ENDPOINT).file == Path("/c/config.toml")


def test_the_home_of_gemini_is_honoured() -> None:
    assert setup.target("gemini", {"GEMINI_CLI_HOME": "/g"}, ENDPOINT).file == Path("/g/.gemini/settings.json")


def test_gemini(tmp_path: Path) -> None:
    file = tmp_path / ".gemini" / "settings.json"
    file.parent.mkdir()
    file.write_text('{\n  "ui": {"theme": "x"},\n  "telemetry": {"target": "gcp"}\n}\n')
    before = tree(tmp_path)
    assert run(tmp_path, "setup", "gemini", "--write").returncode == 0
    assert json.loads(file.read_text()) == {
        "ui": {"theme": "x"},
        "telemetry": {
            "enabled": True, "target": "local", "otlpEndpoint": ENDPOINT, "otlpProtocol": "http", "logPrompts": False,
        },
    }  # fmt: skip
    assert run(tmp_path, "setup", "gemini", "--undo").returncode == 0
    assert tree(tmp_path) == before


# --- laws ------------------------------------------------------------------------------------------------------

KEYS: st.SearchStrategy[str] = st.sampled_from([*OURS, *OVERRIDES, "A", "env", 'qu"ote\\', "é😀"]) | st.text(max_size=6)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
PLACES = st.sampled_from(["", " ", "\n", "\r\n", "\t", "\n    ", " /* , { */ ", " // ]\n", "//\r\n  "])


@st.composite
def settings_texts(draw: st.DrawFn) -> str:
    """JSON objects with white space and comments in any place, and trailing commas."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            members = [
                f"{draw(PLACES)}{json.dumps(key, ensure_ascii=draw(st.booleans()))}{draw(PLACES)}:{draw(PLACES)}"
                f"{text(inner)}{draw(PLACES)}"
                for key, inner in value.items()
            ]
            comma = "," if draw(st.booleans()) and members else ""
            return "{" + ",".join(members) + comma + draw(PLACES) + "}"
        if isinstance(value, list):
            return "[" + ",".join(f"{draw(PLACES)}{text(inner)}" for inner in value) + "]"
        return json.dumps(value, ensure_ascii=False)

    found = draw(st.dictionaries(KEYS.filter(lambda key: key != "env"), VALUES, max_size=4))
    if draw(st.booleans()):
        found["env"] = draw(st.dictionaries(KEYS, st.text(max_size=5) | st.integers(), max_size=5))
    text_of_it = f"{draw(PLACES)}{text(found)}{draw(PLACES)}"
    return text_of_it if "\ud800" not in text_of_it else "{}"


@settings(max_examples=250, deadline=None, derandomize=True)
@given(settings_texts())
def test_any_settings_keep_everything_else(text: str) -> None:
    target = aim(Path("/home/none"))
    before = JSON.parse(text)
    wanted = setup.changes(target, text)
    after_text = setup.changed(JSON, text, wanted)
    after = JSON.parse(after_text)
    assert not misfits({key: str(value) for key, value in after["env"].items()}, ENDPOINT)
    assert not setup.changes(target, after_text)
    ours = {*OURS, *OVERRIDES}
    for parsed in (before, after):
        env = {key: value for key, value in parsed.pop("env", {}).items() if key not in ours}
        parsed["rest of env"] = env
    assert after == before
    wrote = {change.path: change.after for change in wanted}
    back, left = setup.reverted(JSON, after_text, text, wrote)
    assert not left
    assert JSON.parse(back) == JSON.parse(text)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(settings_texts())
def test_any_settings_come_back_to_the_byte(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    home = tmp_path_factory.mktemp("home")
    file = with_settings(home, text)
    if setup.write(aim(home)):
        assert setup.undo(aim(home)) == (True, [])
    assert tree(home) == {".claude/settings.json": text.encode()}
    file.unlink()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(alphabet='{}[]",:/*\\\n ab1', max_size=30))
def test_any_text_is_edited_rightly_or_refused(text: str) -> None:
    for language in (JSON, TOML):
        try:
            result = edits.put(language, text, ("env", "A"), "1")
        except EditError:
            continue
        assert edits.get(language.parse(result), ("env", "A")) == "1"


def test_what_fits() -> None:
    def f(name: str, value: str) -> bool:
        return fits(name, value, ENDPOINT)

    assert f("OTEL_EXPORTER_OTLP_ENDPOINT", "http://[::1]:4318")
    assert not f("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4317")
    assert not f("OTEL_EXPORTER_OTLP_ENDPOINT", "https://localhost:4318")
    assert not f("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318/v1/metrics")
    assert not f("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:x")
    assert not f("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "http://localhost:4318")
    assert f("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "http://localhost:4318/v1/metrics")
    assert not f("OTEL_METRICS_EXPORTER", "prometheus")
    assert not f("OTEL_METRIC_EXPORT_INTERVAL", "60000")
    assert not f("OTEL_METRIC_EXPORT_INTERVAL", "²")
    assert not f("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "grpc")
    assert set(misfits({}, ENDPOINT)) == set(OURS)
    assert not misfits(OURS, ENDPOINT)


# --- a bridge elsewhere ----------------------------------------------------------------------------------------

TOKEN = "bridge_0123456789abcdefghijklmnopqrstuvwxyz-_"
AFAR = "https://bridge.example:4318"


def test_a_bridge_elsewhere_gets_its_token_and_nobody_sees_it(tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path), "BRIDGE_TOKEN": TOKEN}
    token = setup.token_of(environment)
    for action in ("show", "write"):
        shown = setup.run("claude", action, setup.remote(AFAR), environment, token=token)
        assert TOKEN not in shown
        assert "Authorization=..." in shown
    file = tmp_path / ".claude" / "settings.json"
    env = json.loads(file.read_text())["env"]
    assert env["OTEL_EXPORTER_OTLP_ENDPOINT"] == AFAR
    assert env["OTEL_EXPORTER_OTLP_HEADERS"] == f"Authorization=Bearer%20{TOKEN}"
    assert "nothing to change" in setup.run("claude", "write", AFAR, environment, token=token)
    assert TOKEN not in setup.run("claude", "undo", AFAR, environment, token=token)
    assert not file.exists()
    codex = setup.run("codex", "write", AFAR, environment, token=token)
    assert TOKEN not in codex
    assert f'Authorization = "Bearer {TOKEN}"' in (tmp_path / ".codex" / "config.toml").read_text()
    with pytest.raises(setup.SetupError, match="Gemini CLI has no setting for headers"):
        setup.run("gemini", "show", AFAR, environment, token=token)
    assert f"export OTEL_EXPORTER_OTLP_HEADERS=Authorization=Bearer%20{TOKEN}\n" in setup.exports(AFAR, "bash", token)


@pytest.mark.parametrize("url", ["bridge.example:4318", "ftp://a", "https://", "http://a/v1/metrics", "http://a?b"])
def test_an_endpoint_is_an_address_alone(url: str) -> None:
    with pytest.raises(setup.SetupError, match="expected an address alone"):
        setup.remote(url)


def test_a_bridge_that_wants_a_token_is_not_set_up_without(tmp_path: Path) -> None:
    done = run(tmp_path, "setup", "--write", env={"BRIDGE_LOOPBACK_TOKEN": "true"})
    assert done.returncode == os.EX_CONFIG
    assert "this bridge wants a token: BRIDGE_TOKEN=... claude-otel-bridge setup --write" in done.stderr
    assert not list(tmp_path.iterdir())
    headers = {setup.HEADERS: "x=1, Authorization=Bearer%20x"}
    setup.require_token("claude", headers)
    setup.require_token("gemini", headers)
    for tool, words in (
        ("codex", "BRIDGE_TOKEN=... claude-otel-bridge setup codex --write"),
        ("gemini", "export OTEL_"),
    ):
        with pytest.raises(SetupError, match=words):
            setup.require_token(tool, {})
    f = setup.wants_token
    urls = ("http://localhost:1", "http://[::1]:1", "https://192.0.2.2:1", "https://nas:1")
    assert [f(Config(), url) for url in urls] == [False, False, True, True]
    assert all(f(Config(loopback_token=True), url) for url in urls)
    assert not any(f(Config(loopback_token=True, insecure_no_auth=True), url) for url in urls)


@pytest.mark.parametrize("token", ["two words", "a,b", 'quo"te', "new\nline", "per%20cent"])
def test_a_token_that_headers_cannot_carry(token: str) -> None:
    with pytest.raises(setup.SetupError, match="BRIDGE_TOKEN"):
        setup.token_of({"BRIDGE_TOKEN": token})
