"""The simulator replays a recorded run under each strategy, by the code that training runs.

Layouts, splits, forecasts and predicted seconds come from `planner`; here are only the order of
events, the statistics and the reports of `plan`. Neither Megatron nor torch is imported.
"""
