"""The OpenTelemetry SDK for Python as client: several processes at once, all under one identity."""

import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.recordings import assert_shows

CLIENT = Path(__file__).parent / "clients" / "sdk_client.py"
COMPRESSIONS = ("none", "gzip", "deflate")


@pytest.mark.parametrize("temporality", ["delta", "cumulative"])
@pytest.mark.parametrize("session", ["one-session", ""], ids=["session", "no-session"])
def test_processes_that_share_an_identity_add_up(daemon: Daemon, temporality: str, session: str) -> None:
    """The same amounts in every process and step: only start and end times tell the points apart."""
    amounts = [1, 10, 10, 1]
    clients = [start_client(daemon, session, amounts, temporality, compression) for compression in COMPRESSIONS]
    outputs = [client.communicate(timeout=60)[0] for client in clients]
    assert [client.returncode for client in clients] == [0] * len(clients), outputs
    total = sum(amounts) * len(clients)
    tokens, cost = "claude_code.token.usage", "claude_code.cost.usage"
    model = "claude-opus-4-5"
    assert_shows(
        daemon,
        {
            (tokens, "input", model): Decimal(total),
            (tokens, "output", model): Decimal(2 * total),
            (cost, "", model): Decimal(total).scaleb(-9),
        },
    )


def start_client(
    daemon: Daemon, session: str, amounts: list[int], temporality: str, compression: str
) -> subprocess.Popen[str]:
    environment = {
        **daemon.environment,
        "OTEL_EXPORTER_OTLP_ENDPOINT": daemon.url,
        "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": temporality,
        "OTEL_EXPORTER_OTLP_COMPRESSION": compression,
    }
    command = [sys.executable, str(CLIENT), session, *map(str, amounts)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
