"""GPUs: one module per backend, whose name is the value of --gpu."""
