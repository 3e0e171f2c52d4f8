"""Benchmarks. `python -m bench` compares servers; the other files measure one part each."""
