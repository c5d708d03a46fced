"""The OpenTelemetry SDK for JavaScript as client, which is what Claude Code exports with."""

import os
import shutil
import subprocess
from decimal import Decimal
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.recordings import assert_shows

DIRECTORY = Path(__file__).parent / "clients" / "javascript"
NODE_MODULES = Path(os.environ.get("BRIDGE_TEST_NODE_MODULES", DIRECTORY / "node_modules"))


@pytest.fixture
def node() -> str:
    """The node command; skips the test where it or the packages are not installed."""
    found = shutil.which("node")
    if found and (NODE_MODULES / "@opentelemetry" / "sdk-metrics").is_dir():
        return found
    missing = "needs Node.js and packages; install them with: npm install --prefix tests/clients/javascript"
    if os.environ.get("BRIDGE_TEST_REQUIRE_ALL") == "1":
        pytest.fail(missing)
    pytest.skip(missing)


@pytest.mark.parametrize("temporality", ["delta", "cumulative"])
@pytest.mark.parametrize("session", ["one-session", ""], ids=["session", "no-session"])
def test_processes_that_share_an_identity_add_up(node: str, daemon: Daemon, temporality: str, session: str) -> None:
    """JSON and protobuf, plain and compressed, the same amounts in every process: only times tell the points apart."""
    amounts = [1, 12, 7, 3]
    kinds = [("http", "none"), ("http", "gzip"), ("proto", "none"), ("proto", "gzip")]
    clients = []
    for index, (protocol, compression) in enumerate(kinds):
        command = [node, str(DIRECTORY / "client.mjs"), protocol, str(index), str(len(kinds)), session]
        environment = {
            **daemon.environment,
            "NODE_PATH": str(NODE_MODULES),
            "OTEL_EXPORTER_OTLP_ENDPOINT": daemon.url,
            "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": temporality,
            "OTEL_EXPORTER_OTLP_COMPRESSION": compression,
        }
        clients.append(
            subprocess.Popen(
                [*command, *map(str, amounts)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [client.communicate(timeout=60)[0] for client in clients]
    assert [client.returncode for client in clients] == [0] * len(clients), outputs
    total = sum(amounts) * len(clients)
    model = "claude-opus-4-5"
    assert_shows(
        daemon,
        {
            ("claude_code.token.usage", "input", model): Decimal(total),
            ("claude_code.token.usage", "output", model): Decimal(2 * total),
            ("claude_code.cost.usage", "", model): Decimal(total).scaleb(-9),
        },
    )
