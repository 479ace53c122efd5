"""What a run writes besides its metrics and checkpoints: the rollouts of its steps, and the batch of a failed one."""
