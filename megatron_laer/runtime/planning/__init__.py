"""This package gets the layouts of a step on the planner rank, records them and saves its state."""
