"""Deliberate faults in the package's core, each of which a test must notice."""
