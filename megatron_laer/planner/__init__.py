"""From observed routing to layouts: quotas, costs, strategies, and the thread that runs them.

Plain NumPy, no torch and no Megatron, so that the simulator runs the code that training runs.
"""
