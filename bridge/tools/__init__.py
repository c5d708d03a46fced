"""What each tool's telemetry means, one module a tool; a module holds only what differs."""
