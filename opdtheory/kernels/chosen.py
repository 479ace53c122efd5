r"""Log-probabilities of some tokens of each position, from hidden states and an output layer.

With $g_i$ from upstream for the token $a_i$, the gradient in a row of logits is
$\frac1\tau \bigl(\sum_i g_i\,1[j = a_i] - p_j \sum_i g_i\bigr)$.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from opdtheory.kernels.attached import last
from opdtheory.kernels.heads import PLAIN_HEAD, HeadForm
from opdtheory.kernels.products import add_product, chunk_rows, product, products_of, wide_dtype

__all__ = ["OutputLayer", "chosen_log_probs", "likeliest"]


class OutputLayer(NamedTuple):
    r"""What makes a next-token distribution of a hidden state: $\mathrm{softmax}(z / \tau)$, $z$ as in `HeadForm`.

    Attributes:
        weight: `(V, D)`.
        bias: `(V,)`, or None.
        form: scale and soft-capping.
        temperature: $\tau$.
        dtype: of the factors of the matrix product; logits are of float32 at least.
    """

    weight: Tensor
    bias: Tensor | None = None
    form: HeadForm = PLAIN_HEAD
    temperature: float = 1.0
    dtype: torch.dtype = torch.float32

    @property
    def wide(self) -> torch.dtype:
        """The dtype of logits."""
        return wide_dtype(self.dtype)


def chosen_log_probs(
    hidden: Float[Tensor, "N D"], layer: OutputLayer, ids: Int64[Tensor, "N k"]
) -> Float[Tensor, "N k"]:
    r"""$\log p$ of some tokens of each position, in float64, as a function of hidden states, weight and bias.

    Logits are computed for a chunk of positions at a time, once in the forward pass and once in the backward pass. The
    gradient in a weight of low precision is summed in float32 and rounded once. First derivatives only.

    Args:
        hidden: hidden states.
        layer: the output layer.
        ids: tokens; one may be there several times.
    """
    values: Tensor = _Chosen.apply(hidden, layer.weight, layer.bias, ids, layer)
    return values


def likeliest(
    hidden: Float[Tensor, "N D"],
    layer: OutputLayer,
    k: int,
    vocabulary: int,
    tokens: Int64[Tensor, " N"],
) -> tuple[Int64[Tensor, "N k"], Float[Tensor, "N k"], Float[Tensor, " N"]]:
    r"""The `k` likeliest of the first tokens of a vocabulary, their $\log p$ and that of another token, detached.

    Args:
        hidden: hidden states.
        layer: the output layer.
        k: how many.
        vocabulary: tokens from here on are not taken, but have their probability.
        tokens: the other token.
    """
    with torch.no_grad():
        ids = tokens.new_empty(len(hidden), k)
        logs, of_tokens = (
            torch.empty(*shape, dtype=torch.float64, device=hidden.device) for shape in (ids.shape, [len(hidden)])
        )
        for part, _, logits, normaliser in _chunks(hidden, layer):
            best = logits[:, :vocabulary].topk(k, -1)
            ids[part], logs[part] = best.indices, best.values.double() - normaliser
            of_tokens[part] = (logits.gather(-1, tokens[part].unsqueeze(-1)).double() - normaliser).squeeze(-1)
    return ids, logs, of_tokens


def _chunks(hidden: Tensor, layer: OutputLayer) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    r"""The place of each chunk, its hidden states, its $z / \tau$, and the logarithm of their summed exponentials."""
    weight = layer.weight.detach().to(layer.dtype)
    bias = None if layer.bias is None else layer.bias.detach()
    rows = chunk_rows(len(weight), layer.wide, weight.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            states = hidden[part].detach().to(layer.dtype)
            logits = products_of(states, weight, states.new_empty(len(states), len(weight), dtype=layer.wide))
            layer.form.shape(logits, bias)
            logits.div_(layer.temperature)
            yield part, states, logits, logits.logsumexp(-1, keepdim=True).double()


class _Chosen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, layer: OutputLayer
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, ids)
        ctx.layer = layer
        values = torch.empty(ids.shape, dtype=torch.float64, device=hidden.device)
        for part, _, logits, normaliser in _chunks(hidden, layer):
            values[part] = logits.gather(-1, ids[part]).double() - normaliser
        return values

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids = ctx.saved_tensors
        layer = ctx.layer._replace(weight=weight, bias=bias)
        by_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        by_weight = (
            torch.zeros(weight.shape, dtype=layer.wide, device=weight.device) if ctx.needs_input_grad[1] else None
        )
        by_bias = torch.zeros(len(weight), dtype=layer.wide, device=weight.device)
        with torch.no_grad():
            factor = weight.detach().to(layer.dtype)
            for part, states, logits, normaliser in _chunks(hidden, layer):
                kept = None if layer.form.softcap is None else logits * layer.temperature
                arriving = upstream[part].to(layer.wide)
                found = logits.sub_(normaliser.to(layer.wide)).exp_().mul_(-arriving.sum(-1, keepdim=True))
                found.scatter_add_(-1, ids[part], arriving).div_(layer.temperature)
                layer.form.pull_back(found, kept)
                if by_hidden is not None:
                    by_hidden[part] = product(found, factor).to(hidden.dtype)
                if by_weight is not None:
                    add_product(by_weight, found, states)
                by_bias += found.sum(0)
        sources = [each for each in (upstream, hidden, weight, bias) if each is not None]
        found_all = (
            by_hidden,
            None if by_weight is None else by_weight.to(weight.dtype),
            None if bias is None else by_bias.to(bias.dtype),
        )
        wanted = zip(found_all, ctx.needs_input_grad, strict=False)
        grads = (
            last("chosen_log_probs", each, *sources) if need and each is not None else None for each, need in wanted
        )
        return (*grads, None, None)
