"""Layer specs of Megatron without the kernels of a GPU, for `--spec`."""
