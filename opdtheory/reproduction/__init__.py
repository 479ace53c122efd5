"""The experiment of the paper: its plan, its processes, and the page of its results."""
