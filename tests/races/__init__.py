"""The real stream code on CPU tensors, with a check for unordered accesses."""
