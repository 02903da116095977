"""The only I/O on what is watched: a pure parser from bytes to observed values, and a fetch."""
