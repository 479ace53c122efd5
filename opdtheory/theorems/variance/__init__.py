"""The variance of one-sample estimators, and what takes some of it away (T7)."""
