"""Replay of recorded runs and prediction of iterations, with the planner that training runs.

Layouts, splits, forecasts and predicted seconds come from `planner`. Neither Megatron nor torch is
imported.
"""
