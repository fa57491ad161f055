"""Advice on a run: the fastest settings of FSEP that fit in memory, and the fastest stock.

`settings` lists the settings, `predictor` predicts one, `search` finds the best and `output`
prints it.
"""
