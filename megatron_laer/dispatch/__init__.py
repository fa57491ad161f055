"""From tokens and experts to tokens and slots."""
