"""Reading the log-probabilities that a run has written to files; start at `reading.read_run`."""
