"""Properties of a sound loss that the direction of its gradient does not show."""
