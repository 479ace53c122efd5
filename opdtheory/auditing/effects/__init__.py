"""What a token's weight depends on, found by changing one thing at a time.

Throughout, `batch_size` is the number of rollouts that the loss sees at once, and `limit` the relative difference that
counts as rounding.
"""
