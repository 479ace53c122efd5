"""What a token's weight depends on, found by changing one thing at a time."""
