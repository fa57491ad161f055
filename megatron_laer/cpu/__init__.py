"""The CPU part: replacements of CUDA and the GPU buffers, a pool of gloo ranks, observed runs.

Training does not import it; `megatron_laer.device` lets it in where there is no GPU.
"""
