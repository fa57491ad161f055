"""Judgement of a run's settings before the run, by the table that training uses: `verdict`.

`proof` finds the parity rows that prove a run, by its `features`. `command_lines` reads flags from
files, and `containers` calls recipes of Megatron-Bridge.
"""
