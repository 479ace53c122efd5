"""What a loss follows: catalogue entries, their sums, and the weight as a formula."""
