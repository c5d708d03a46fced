"""HTTP: the guard that every request passes, the OTLP receiver, the views of the counters."""
