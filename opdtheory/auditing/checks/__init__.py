"""What a sound loss has and the direction of its gradient does not show."""
