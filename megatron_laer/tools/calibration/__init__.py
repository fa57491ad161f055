"""Measurement of a cluster's hardware constants, on the ranks of a launcher.

`settings` says what is measured, `jobs` and its neighbours measure it, `sampling` repeats and
gathers, and `constants` makes a cluster of the figures by the fits in `fitting`.
"""
