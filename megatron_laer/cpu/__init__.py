"""CPU platform: replacements of CUDA and the GPU buffers, a pool of gloo ranks, observed runs.

Training does not import it; `megatron_laer.device` does where there is no GPU.
"""
