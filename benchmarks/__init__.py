"""Benchmarks and experiments: `python -m benchmarks.NAME` from the repository's root."""
