"""Measure what watching a server costs: the server, the machine, and a scrape."""
