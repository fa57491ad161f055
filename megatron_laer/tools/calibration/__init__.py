"""`calibrate` measures a cluster's hardware constants here, on the ranks that it runs on.

`settings` says what is measured, `jobs` and its neighbours measure it, `sampling` repeats and
gathers, and `constants` makes a cluster of the figures by the fits in `fitting`.
"""
