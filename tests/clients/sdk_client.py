"""An instrumented program: counts tokens and cost with the OpenTelemetry SDK and exports after each step.

    sdk_client.py SESSION AMOUNT...

Each amount is one step: so many input tokens, twice as many output tokens and as many nano-dollars, then one export.
The exporter takes its settings from the usual OTEL_EXPORTER_OTLP_* environment variables. Ends with 1 if an export was
not acknowledged.
"""

import sys
from typing import Any

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExportResult, MetricsData, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource


class CountingExporter(OTLPMetricExporter):
    """Counts the exports that the server acknowledged."""

    acknowledged = 0

    def export(self, metrics_data: MetricsData, *arguments: Any, **options: Any) -> MetricExportResult:
        result = super().export(metrics_data, *arguments, **options)
        self.acknowledged += result is MetricExportResult.SUCCESS
        return result


def main(session: str, *amounts: str) -> int:
    exporter = CountingExporter()
    reader = PeriodicExportingMetricReader(exporter, export_interval_millis=float("inf"))
    resource = Resource({"service.name": "claude-code", "service.version": "2.1.329"})  # create() makes an instance id
    provider = MeterProvider([reader], resource, shutdown_on_exit=False)
    meter = provider.get_meter("com.anthropic.claude_code", "2.1.329")
    tokens = meter.create_counter("claude_code.token.usage", "tokens")
    cost = meter.create_counter("claude_code.cost.usage", "USD")
    identity = {"model": "claude-opus-4-5", **({"session.id": session} if session else {})}
    for amount in map(int, amounts):
        tokens.add(amount, {**identity, "type": "input"})
        tokens.add(2 * amount, {**identity, "type": "output"})
        cost.add(amount / 1e9, identity)
        provider.force_flush()
    return 0 if exporter.acknowledged == len(amounts) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
