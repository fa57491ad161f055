"""What a card shows: one module for each subject, and `__main__` for all of them."""
