"""Changes that would make a loss follow its claim, each verified by an audit of the changed loss."""
