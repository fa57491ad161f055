"""Process groups, streams, collectives and the weight exchange of one FSEP group."""
