"""CPU platform, imported only without a GPU: CUDA replacements, gloo ranks, observed runs."""
