"""Layouts of a step on the planner rank, their recording, and the planner's checkpoints."""
