"""Judgement of a run's settings before the run, by the table that training uses: `verdict`.

`bridge` reads recipes that were exported from Megatron-Bridge, and `families` adds the settings
that a recipe's model implies. `proof` finds the parity rows that prove a run, and `command_lines`
reads flags from files. Nothing here imports Megatron or torch.
"""
