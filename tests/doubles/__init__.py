"""Doubles of parts of Megatron and Transformer Engine that need a GPU, for ranks of tests."""
