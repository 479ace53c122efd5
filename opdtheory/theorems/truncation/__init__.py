"""Divergences on the top k tokens (T9)."""
