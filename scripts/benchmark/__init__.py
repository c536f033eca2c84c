"""Benchmarks of training, operators and data reading: `python -m scripts.benchmark`."""
