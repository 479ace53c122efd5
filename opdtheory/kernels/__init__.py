"""Losses of the whole vocabulary that find their gradient chunk by chunk in the forward pass."""

from opdtheory.kernels.fused import fused_divergence

__all__ = ["fused_divergence"]
