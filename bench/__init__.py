"""Benchmarks: one table of cases drives names, bytes and output (`python -m bench --help`)."""
