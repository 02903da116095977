"""Views for a terminal: pure functions from a snapshot to text."""
