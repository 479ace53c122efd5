"""Generated calls of the public border: each is right or refused by name. `python -m tests.fuzz --calls 100000`."""
