"""Restored experts live here, with their states, their autograd nodes and their scheduler."""
