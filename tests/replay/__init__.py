"""Recordings of real servers, played back to the whole exporter."""
