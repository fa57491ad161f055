"""The simulator replays a recorded run by the planner that training runs.

Layouts, splits, forecasts and predicted seconds come from `planner`; here are only the order of
events, the statistics and the reports of `plan`. Neither Megatron nor torch is imported.
"""
