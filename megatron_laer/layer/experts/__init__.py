"""Slices of all experts on a rank, and the compute with restored experts."""
