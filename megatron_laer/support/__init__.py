"""Checks of Megatron's arguments and TransformerConfig by the table of `rules`.

Nothing here imports Megatron or torch. docs/support.md lists proved and refused combinations.
"""


class RefusedError(ValueError):
    """Request for a run that cannot work; launchers print the message alone."""
