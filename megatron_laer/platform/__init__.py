"""This package holds what depends on the machine and on the installed Megatron, not on FSEP."""
