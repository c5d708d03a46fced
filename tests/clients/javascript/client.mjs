// An instrumented program: counts tokens and cost with the OpenTelemetry SDK and exports after each step.
//
//     node client.mjs http|proto INDEX COUNT SESSION AMOUNT...
//
// Each amount is one step: so many input tokens, twice as many output tokens and as many nano-dollars, then one export.
// The exporter takes its settings from the usual OTEL_EXPORTER_OTLP_* environment variables. Ends with 1 if an export
// was not acknowledged. INDEX tells this process from the others of COUNT that run beside it under the same identity.

import { createRequire } from "node:module";

const require = createRequire(import.meta.url); // unlike import, it finds packages in NODE_PATH
const { MeterProvider, PeriodicExportingMetricReader } = require("@opentelemetry/sdk-metrics");
const { resourceFromAttributes } = require("@opentelemetry/resources");

const [protocol, index, count, session, ...amounts] = process.argv.slice(2);
const { OTLPMetricExporter } = require(`@opentelemetry/exporter-metrics-otlp-${protocol}`);

// The SDK's clock counts milliseconds. Each process gets milliseconds of its own, so that no two start at the same time.
const now = Date.now;
Date.now = () => now() - (now() % count) + Number(index);

let acknowledged = 0;

class CountingExporter extends OTLPMetricExporter {
  export(metrics, callback) {
    super.export(metrics, (result) => {
      if (result.code === 0) acknowledged += 1;
      else console.error(result.error);
      callback(result);
    });
  }
}

const reader = new PeriodicExportingMetricReader({ exporter: new CountingExporter(), exportIntervalMillis: 3_600_000 });
const resource = resourceFromAttributes({ "service.name": "claude-code", "service.version": "2.1.329" });
const meter = new MeterProvider({ resource, readers: [reader] }).getMeter("com.anthropic.claude_code", "2.1.329");
const tokens = meter.createCounter("claude_code.token.usage", { unit: "tokens" });
const cost = meter.createCounter("claude_code.cost.usage", { unit: "USD" });
const identity = { model: "claude-opus-4-5", ...(session && { "session.id": session }) };

for (const amount of amounts.map(Number)) {
  tokens.add(amount, { ...identity, type: "input" });
  tokens.add(2 * amount, { ...identity, type: "output" });
  cost.add(amount / 1e9, identity);
  await reader.forceFlush();
}
process.exit(acknowledged === amounts.length ? 0 : 1);
