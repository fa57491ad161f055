"""Prediction of whole training iterations, by a recursion over the clocks of all ranks.

A trace's counts go through the planner, guard and quotas of training (`methods`, `work`); the
exchanges start where `schedule` says (`chunk`); stages follow each other as Megatron's schedules
have it (`pipeline`). Rates are constants that were measured elsewhere (`rates`).
"""
