"""Whether the teacher attracts (T5)."""
