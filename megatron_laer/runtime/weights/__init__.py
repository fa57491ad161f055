"""Restored experts: their states, their place in autograd, and the communication schedule."""
