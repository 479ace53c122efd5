"""Generated calls of public functions: each is right or raises by name. `python -m tests.fuzz --calls 100000`."""
