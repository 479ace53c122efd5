"""Rollouts that another policy sampled, or that were cut (T8, T10)."""
