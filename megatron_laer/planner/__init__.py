"""From observed routing to layouts: quotas, costs, strategies, and the thread that runs them.

NumPy and a C++ core (`native/`), no torch and no Megatron, so that benchmarks run the code that
training runs.
"""
