"""FSEP measures a run and reports on it here: durations, timelines, and tables of logs."""
