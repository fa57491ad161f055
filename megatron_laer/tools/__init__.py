"""The tools: commands that plan, predict, measure, report, check and inspect.

They read recordings and the planner's public names. Training does not import them, and importing
them imports no Megatron.
"""
