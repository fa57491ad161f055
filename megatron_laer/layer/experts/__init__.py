"""A rank holds slices of all experts, and restored experts compute; both are defined here."""
