"""Prediction of whole training iterations, by a recursion over the clocks of all ranks.

A trace's counts go through the planner, guard and quotas of training (`methods`, `work`).
Exchanges start where `schedule` says (`chunk`), and stages follow Megatron's schedules
(`pipeline`). Rates are measured constants (`rates`).
"""
