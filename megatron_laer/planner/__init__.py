"""The planner turns observed routing into layouts: quotas, costs, strategies, and their thread.

NumPy and a C++ core (`native/`), no torch and no Megatron, so that benchmarks run the code that
training runs.
"""
