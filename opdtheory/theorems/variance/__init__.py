"""The variance of one-sample estimators, and how to reduce it (T7)."""
