"""A stand-in for NVIDIA's driver, for machines without one."""
