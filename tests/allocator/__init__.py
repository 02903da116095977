"""What the real llama.cpp allocates, beside what kvscope says: run as `python -m tests.allocator`."""
