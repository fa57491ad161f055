"""Adapters to frameworks around Megatron Core with their own loops and configurations."""
