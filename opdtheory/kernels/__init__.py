"""Losses over the whole vocabulary that compute their gradient chunk by chunk in the forward pass."""

from opdtheory.kernels.fused import fused_divergence
from opdtheory.kernels.linear import fused_linear_divergence
from opdtheory.kernels.parallel import fused_parallel_divergence
from opdtheory.kernels.sampled_tail import fused_sampled_tail
from opdtheory.kernels.top_k import fused_top_k_divergence

__all__ = [
    "fused_divergence",
    "fused_linear_divergence",
    "fused_parallel_divergence",
    "fused_sampled_tail",
    "fused_top_k_divergence",
]
