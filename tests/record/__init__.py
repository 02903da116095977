"""Records what real servers answer; `python -m tests.record`."""
