"""Changes that would make a loss follow its claim, each verified."""
