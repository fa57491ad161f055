"""Public planners by others, each written from its description, for comparison only."""
