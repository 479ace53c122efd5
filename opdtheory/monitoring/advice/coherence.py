r"""How the gradients of different histories add up in parameters that they share.

In the parameters, $|\sum_h J_h^\top x_h|^2 = \sum_{hh'} x_h^\top J_h J_{h'}^\top x_{h'}$. The Jacobians are not known;
a linear layer before the softmax has $J_h J_{h'}^\top = (\phi_h\cdot\phi_{h'})\,I$ with its inputs $\phi_h$. The
student's own log-probabilities stand for them, which are linear in them up to a constant of each row: centred, and at
length one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Features", "Square"]

# Directions in which features are kept, and the width to which larger rows are projected first.
_RANK, _WIDTH = 32, 256


@dataclass(frozen=True)
class Features:
    r"""Kernel $K_{hh'} = \phi_h\cdot\phi_{h'} + 1[h = h']\,r_h$ of one on the diagonal.

    Attributes:
        phi: the features, `(N, R)`.
        left: what they leave of a row's length of one, `(N,)`.
    """

    phi: Float[Tensor, "N R"]
    left: Float[Tensor, " N"]

    @classmethod
    def of(cls, rows: Sequence[Tensor]) -> Features:
        """Those of a student's logits, in chunks of rows, `(n, V)`."""
        width = rows[0].shape[-1]
        mix = None
        if width > _WIDTH:
            generator = torch.Generator().manual_seed(0)
            mix = torch.randn(width, _WIDTH, generator=generator, dtype=torch.float64) / _WIDTH**0.5
        parts = []
        for chunk in rows:
            centred = chunk.detach().double().log_softmax(-1)
            centred = centred - centred.mean(-1, keepdim=True)
            size = centred.norm(dim=-1, keepdim=True)
            # A uniform row has no direction of its own.
            unit = centred / size.clamp_min(1e-12)
            parts.append(unit if mix is None else unit @ mix)
        features = torch.cat(parts)
        if min(features.shape) > _RANK:
            left, values, _ = torch.linalg.svd(features, full_matrices=False)
            features = left[:, :_RANK] * values[:_RANK]
        # The projection may lengthen a row a little.
        features = features / features.norm(dim=-1, keepdim=True).clamp_min(1.0)
        return cls(features, (1 - features.square().sum(-1)).clamp_min(0.0))


@dataclass
class Square:
    r"""$|\sum_h J_h^\top x_h|^2$ of vectors that are added chunk by chunk.

    Attributes:
        rows: the number of rows so far.
        own: $\sum_h |x_h|^2$.
        rest: $\sum_h r_h |x_h|^2$.
        sums: $\sum_h x_h \otimes \phi_h$, `(V, R)`; None before the first chunk.
    """

    rows: int = 0
    own: float = 0.0
    rest: float = 0.0
    sums: Float[Tensor, "V R"] | None = field(default=None, repr=False)

    def add(self, vectors: Float[Tensor, "n V"], phi: Float[Tensor, "n R"], left: Float[Tensor, " n"]) -> None:
        """Add the vectors of some rows with their features."""
        squares = vectors.square().sum(-1)
        found = vectors.T @ phi
        self.rows += len(vectors)
        self.own += float(squares.sum())
        self.rest += float((squares * left).sum())
        self.sums = found if self.sums is None else self.sums + found

    def of_mean(self, tokens: int) -> float:
        r"""The expected square of the mean over `tokens` rows drawn from these.

        $(1 - \frac1n)\,\mathrm{pair} + \frac1n\,\mathrm{own}$ with the mean over pairs of different rows and the mean
        square of one; at `tokens` of all rows, the square of their mean.
        """
        if not self.rows or self.sums is None:
            return 0.0
        count = self.rows
        whole = (float(self.sums.square().sum()) + self.rest) / count**2
        own = self.own / count
        if tokens >= count:
            # More tokens than there are rows: the mean of all rows is the best that is known.
            return whole
        pair = (whole - own / count) / (1 - 1 / count)
        return max(0.0, (1 - 1 / tokens) * pair + own / tokens)
