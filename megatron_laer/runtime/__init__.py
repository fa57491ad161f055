"""The runtime holds all effects: collectives, groups, streams, and state that ranks agree on."""
