"""Expectations that are too large to enumerate, sampled until the verdict is certain."""
