"""On what the weight of a token depends, by experiments that change one thing at a time."""
