"""Claude Code itself: what a mock API billed is what a bridge shows, whatever of it the sources told.

`--campaign` runs the client, 2.1.332 or newer, if BRIDGE_TEST_CLAUDE is its command (npm install
@anthropic-ai/claude-code); runs of it that were recorded are replayed by every test run.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest

from bridge.join import KINDS
from bridge.pricing import normalise_model
from tests.clients.claude_code import Claude, MockApi
from tests.daemon import Daemon
from tests.test_transcripts import eventually

SOURCES = ("metrics", "logs", "transcripts")
SUBSETS = [subset for size in (1, 2, 3) for subset in combinations(SOURCES, size)]
PLAIN = {"OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": "cumulative"}
OTHER = {
    "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": "delta",
    "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json",
    "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
    "CLAUDE_CODE_ENHANCED_TELEMETRY_BETA": "1",
    "OTEL_TRACES_EXPORTER": "otlp",
    "OTEL_SERVICE_NAME": "my-team",
}
NEEDS = "needs Claude Code: npm install @anthropic-ai/claude-code, and its command in BRIDGE_TEST_CLAUDE"


@pytest.fixture
def command(campaign: bool) -> str:
    """The client's command; skips the test where it is not installed."""
    if not campaign:
        pytest.skip("takes some minutes; run it with --campaign")
    found = shutil.which(os.environ.get("BRIDGE_TEST_CLAUDE", "claude"))
    if found is None:
        if os.environ.get("BRIDGE_TEST_REQUIRE_ALL") == "1":
            pytest.fail(NEEDS)
        pytest.skip(NEEDS)
    return found


def joined(daemon: Daemon) -> dict[str, dict[str, int]]:
    """What `/metrics` shows: tool and model -> kind -> tokens, where there are any."""
    shown: dict[str, Counter[str]] = {}
    for sample, value in daemon.samples("/metrics").items():
        name, _, rest = sample.partition("{")
        if name == "ai_tokens_total" and float(value):
            labels = dict(part.split("=", 1) for part in rest[:-1].replace('"', "").split(","))
            model = f"{labels['tool']} {labels['model']}"
            shown.setdefault(model, Counter())[labels["type"]] = int(float(value))
    return {model: dict(kinds) for model, kinds in shown.items()}


def billed(mock: MockApi) -> dict[str, dict[str, int]]:
    """The same, as the mock has it."""
    true: dict[str, Counter[str]] = {}
    for model, kinds in mock.tokens().items():
        true.setdefault(f"claude_code {normalise_model(model)}", Counter()).update(kinds)
    return {model: {kind: count for kind, count in kinds.items() if count} for model, kinds in true.items()}


def assert_shows(daemon: Daemon, claude: Claude, mock: MockApi) -> None:
    def is_shown() -> bool:
        cost = float(daemon.samples()["claude_code_cost_usage"])
        return joined(daemon) == billed(mock) and abs(cost - claude.cost) < 1e-8

    assert eventually(is_shown), (joined(daemon), billed(mock), daemon.samples(), claude.cost)


def first_half(claude: Claude) -> str:
    """A tool, a subagent, a resume with a failure, a fork; the first session."""
    session: str = claude.ask("DO[think+bash agent+1h text]")["session_id"]
    claude.ask("--resume", session, "DO[529+text]")
    claude.ask("--resume", session, "--fork-session", "DO[500+429+text+1h]", forked_from=session)
    return session


def second_half(claude: Claude, session: str, *, with_auxiliary: bool) -> None:
    """Two sessions at once, other models and prices; calls that no transcript has: a search, a compaction."""
    model = ("--model", "claude-sonnet-4-5-20250929")
    at_once = [claude.start(*model, "DO[bash bash text]"), claude.start(*model, "DO[search+us+text]")]
    for process in at_once:
        claude.finish(process)
    claude.ask("--model", "claude-opus-5", "DO[fast+text]")
    claude.ask("--model", "haiku", "DO[long+text]")
    if with_auxiliary:
        claude.ask("--resume", session, "DO[web text]")
        claude.ask("--resume", session, "/compact")
    claude.ask("--resume", session, "DO[write text]")


def user(command: str, directory: Path, mock: MockApi, daemon: Daemon, sources: tuple[str, ...]) -> Claude:
    """Somebody whose client exports these sources."""
    claude = Claude(command, directory, mock)
    daemon.env["CLAUDE_CONFIG_DIR"] = str(claude.config)
    missing = {f"OTEL_{name.upper()}_EXPORTER": "" for name in ("metrics", "logs") if name not in sources}
    claude.configure(daemon.url, missing)
    return claude


@pytest.mark.parametrize("variables", [PLAIN, OTHER], ids=["cumulative", "delta+json+gzip+traces"])
@pytest.mark.parametrize("sources", SUBSETS, ids="+".join)
def test_the_client(
    command: str,
    make_daemon: Callable[..., Daemon],
    tmp_path: Path,
    sources: tuple[str, ...],
    variables: dict[str, str],
) -> None:
    """After each half; between them a bridge that has transcripts is killed, down while some work is done, and back."""
    flags = () if "transcripts" in sources else ("--no-transcripts",)
    daemon = make_daemon(*flags)
    mock = MockApi()
    claude = user(command, tmp_path.resolve() / "user", mock, daemon, sources)
    claude.configure(daemon.url, variables)
    daemon.start()
    try:
        session = first_half(claude)
        assert_shows(daemon, claude, mock)
        if "transcripts" in sources:
            daemon.kill()
            claude.ask("DO[bash text]")
            daemon.start()
        second_half(claude, session, with_auxiliary=sources != ("transcripts",))
        assert_shows(daemon, claude, mock)
    finally:
        mock.close()


@pytest.mark.parametrize("sources", SUBSETS[3:], ids="+".join)
def test_the_client_behind_a_gateway_that_answers_by_another_model(
    command: str, make_daemon: Callable[..., Daemon], tmp_path: Path, sources: tuple[str, ...]
) -> None:
    """The sums over models; the cost of the model that answers may be dearer by the table than what the client says."""
    flags = () if "transcripts" in sources else ("--no-transcripts",)
    daemon = make_daemon(*flags)
    mock = MockApi("glm-4.6")
    claude = user(command, tmp_path.resolve() / "user", mock, daemon, sources)
    daemon.start()

    def is_shown() -> bool:
        tokens = [int(value) for sample, value in daemon.samples().items() if "token_usage" in sample]
        return tokens == [sum(kinds[kind] for kinds in mock.tokens().values()) for kind in KINDS]

    try:
        session = first_half(claude)
        assert eventually(is_shown), (daemon.samples(), mock.tokens())
        second_half(claude, session, with_auxiliary=True)
        assert eventually(is_shown), (daemon.samples(), mock.tokens())
    finally:
        mock.close()
