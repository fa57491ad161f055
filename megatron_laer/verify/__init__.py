"""Checks of a run on itself: restored experts against their owners.

It takes layouts and ranges of rows from the planner, and no arithmetic from the exchange, which it
checks.
"""
