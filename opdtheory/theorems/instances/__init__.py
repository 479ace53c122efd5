"""What the checks run on: divergences, policies, trees, rational distributions and intervals."""
