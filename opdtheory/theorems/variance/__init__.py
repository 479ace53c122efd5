"""The variance of one-sample estimators, how to reduce it (T7), and the least that the data allow (T19)."""
