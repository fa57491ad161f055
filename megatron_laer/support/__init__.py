"""Refusals: settings that FSEP cannot run with, each with a reason and a remedy.

`table` has one row, a `Refusal` of `refusal`, per refused setting, and `fields` the other MoE
fields of Megatron's TransformerConfig. By the same rows, `arguments` checks parsed arguments and
`model` a TransformerConfig. Nothing here imports Megatron or torch. Combinations proved equal to
stock are rows of `tests/parity`; docs/support.md lists all.
"""


class RefusedError(ValueError):
    """Request for a run that cannot work; launchers print the message alone."""
