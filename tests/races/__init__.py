"""The real stream code runs on CPU tensors here, and accesses that nothing orders are found."""
