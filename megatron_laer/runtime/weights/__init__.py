"""Restored experts of layers, with their states and autograd nodes."""
