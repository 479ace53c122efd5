"""The gradient of a divergence and what stop-gradient makes of it (T1, T2, T3)."""
