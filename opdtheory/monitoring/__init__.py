"""Real runs: what their logged log-probabilities say."""
