"""What was seen: frozen values, no behaviour, no I/O."""
