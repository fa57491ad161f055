"""This package says what FSEP refuses to run with, why, and what would work instead.

`table` holds one row per refused setting, a `Refusal` of `refusal`, and `fields` the other MoE
fields of Megatron's TransformerConfig; `arguments` checks what was parsed and `model` a
TransformerConfig, both by the same rows. Nothing here imports Megatron or torch. The combinations
that are proved equal to stock are rows of `tests/parity`, and docs/support.md lists all of it.
"""


class RefusedError(ValueError):
    """Request for a run that cannot work; launchers print the message alone."""
