"""Names for what a loss follows: catalogue objectives, sums of them, and formulas of the weight."""
