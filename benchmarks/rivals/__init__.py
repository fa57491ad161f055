"""Other people's planners, each written from its public description, for comparison only."""
