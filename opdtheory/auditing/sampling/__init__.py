"""Expectations too large to enumerate, by sampling until the verdict is certain."""
