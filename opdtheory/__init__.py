"""opdtheory: what an on-policy-distillation loss really does."""

__version__ = "0.1.0"
