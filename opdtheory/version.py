"""The version of the package, where modules of any layer may read it."""

__version__ = "0.2.0"
