"""This package holds rank pools and observed training runs, for tests and benchmarks."""
