"""Rank pools and observed training runs, for tests and benchmarks of the package."""
