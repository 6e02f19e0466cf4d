"""What `benchmarks/kernels.py` times and how."""
