"""Measurements of a run: durations, ranges for profilers, recordings, and tables of logs."""
