"""Layouts in the making: the planner rank, where layouts come from, and what is recorded."""
