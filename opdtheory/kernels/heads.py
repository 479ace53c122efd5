r"""What models do to the products of hidden states and an output layer before these are logits."""

from __future__ import annotations

import math
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from opdtheory.errors import InvalidArgumentError, check_between
from opdtheory.kernels import arguments

__all__ = ["PLAIN_HEAD", "HeadForm", "check_bias", "head_form"]


class HeadForm(NamedTuple):
    r"""The logits $c \tanh(s (W h + b) / c)$, without the cap if $c$ is None; the bias is handed over apart."""

    scale: float = 1.0
    softcap: float | None = None

    def shape(self, products: Tensor, bias: Tensor | None) -> None:
        """Turn the products $W h$ of some positions into logits, in place."""
        if bias is not None:
            products += bias.to(products.dtype)
        if self.scale != 1.0:
            products *= self.scale
        if self.softcap is not None:
            products.div_(self.softcap).tanh_().mul_(self.softcap)

    def keep(self, logits: Tensor) -> Tensor | None:
        """What the derivative needs of logits that will be overwritten."""
        return None if self.softcap is None else logits.clone()

    def pull_back(self, gradient: Tensor, kept: Tensor | None) -> None:
        """Turn a gradient in the logits into one in the products, in place."""
        if kept is not None:
            assert self.softcap is not None
            gradient *= kept.div_(self.softcap).square_().neg_().add_(1.0)
        if self.scale != 1.0:
            gradient *= self.scale


PLAIN_HEAD = HeadForm()


def head_form(whose: str, scale: object, softcap: object) -> HeadForm:
    """The form with these numbers.

    Raises:
        InvalidArgumentError: a number is out of range.
    """
    if not isinstance(scale, Real) or isinstance(scale, bool) or not math.isfinite(scale):
        raise InvalidArgumentError(f"{whose}_scale", f"must be a finite number, got {scale!r}")
    if softcap is None:
        return HeadForm(float(scale))
    check_between(f"{whose}_softcap", softcap, 0.0, math.inf)
    return HeadForm(float(scale), float(softcap))  # type: ignore[arg-type]


def check_bias(whose: str, bias: object, head: Tensor) -> None:
    """Raise unless a bias is None or has an entry for each row of a head."""
    if bias is None:
        return
    wanted = f"a floating-point tensor of shape ({head.shape[0]},)"
    if not isinstance(bias, torch.Tensor) or not bias.is_floating_point() or tuple(bias.shape) != (head.shape[0],):
        found = f"{bias.dtype}, {tuple(bias.shape)}" if isinstance(bias, torch.Tensor) else type(bias).__name__
        raise InvalidArgumentError(f"{whose}_bias", f"must be {wanted}, got {found}")
    arguments.check_device(f"{whose}_bias", bias, f"{whose}_head", head.device)
