"""This package says before a run what FSEP makes of its settings: `verdict`, by training's table.

`bridge` reads the settings that Megatron-Bridge's recipes were exported with, `families` adds what
a recipe's model implies and no column has, `proof` says what of it parity rows prove, and `flags`
takes flags from files and out of command lines. Nothing here imports Megatron or torch.
"""
