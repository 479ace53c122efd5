"""Mutation testing of the library: break one term at a time and see whether a check fails."""
