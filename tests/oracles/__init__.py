"""Slow, plain versions of the planner's functions, which tests compare with."""
