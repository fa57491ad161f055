"""Measurements of a run: durations, timelines, recordings, and tables of logs."""
