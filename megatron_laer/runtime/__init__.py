"""All effects of training: collectives, groups, streams, and state that ranks agree on."""
