"""Objectives of whole sequences (T6)."""
