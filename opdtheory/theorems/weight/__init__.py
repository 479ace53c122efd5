"""The divergence that a weight implies (T4)."""
