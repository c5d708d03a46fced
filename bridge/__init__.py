"""Exact, durable counters of tokens and cost from the telemetry of AI coding tools."""

__version__ = "0.1.0"
