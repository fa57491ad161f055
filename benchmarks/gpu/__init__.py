"""Measurements on a card: one module for each subject, and `__main__` for all of them."""
