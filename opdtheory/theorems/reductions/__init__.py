"""T11 and T17: sums and means over tokens, rollouts, micro-batches and windows."""
