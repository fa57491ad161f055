"""Random legal combinations of Megatron's and FSEP's settings, each compared with stock."""
