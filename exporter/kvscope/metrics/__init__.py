"""Snapshots as Prometheus metrics and web pages; the only place that knows prometheus_client."""
