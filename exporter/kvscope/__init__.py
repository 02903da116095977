"""Watches llama.cpp servers and publishes true figures of their KV cache."""
