"""Tests and benchmarks of the package get rank pools and observed training runs here."""
