"""Measurement of a cluster's hardware constants, on the ranks of a launcher.

`gemms`, `links`, `host` and `contention` measure at the sizes in `settings`; `sampling` repeats and
gathers. `constants` makes a cluster of the figures, by the fits in `fitting`.
"""
