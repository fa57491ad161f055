"""What a rank holds of every expert, and how restored experts compute."""
