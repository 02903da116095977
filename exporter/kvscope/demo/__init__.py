"""A real llama.cpp server on a tiny generated model, and a scripted agent session against it."""
