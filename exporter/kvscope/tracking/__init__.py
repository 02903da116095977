"""Pure rules: advance(history, look) -> history. No clock, no I/O, no Prometheus."""
