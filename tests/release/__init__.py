"""Builds the package as it would be released, and runs it where nothing else is installed."""
