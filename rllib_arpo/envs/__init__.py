"""Environments over token sequences, one object per path."""
