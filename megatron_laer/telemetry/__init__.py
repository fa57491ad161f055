"""What FSEP reports about a run."""
