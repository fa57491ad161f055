"""Effects: collectives, process groups, streams, and the state that every rank agrees on."""
