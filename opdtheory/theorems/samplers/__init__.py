"""Rollouts of another policy, truncated sampling and missing support (T8, T10)."""
