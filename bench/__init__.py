"""Benchmarks: each runs as `python -m bench.X`, prints a table, and JSON with `--json`."""
