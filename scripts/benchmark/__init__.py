"""Benchmarks of training, operators, data reading and a GPU: `python -m scripts.benchmark`."""
