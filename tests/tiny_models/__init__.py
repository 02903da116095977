"""Tiny models with random weights, one for each kind of KV memory that llama.cpp has.

`python -m tests.tiny_models window window.gguf` writes one; without arguments it lists them.
"""
