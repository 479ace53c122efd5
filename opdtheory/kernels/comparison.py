r"""The fused losses compared with the textbook formula by autograd: time, memory and error."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opdtheory.divergences import divergence as as_divergence
from opdtheory.errors import InvalidArgumentError, check_integer
from opdtheory.kernels.fused import fused_divergence
from opdtheory.machine import Run, in_turn, peak

__all__ = ["DIVERGENCES", "DTYPES", "Comparison", "compare"]


DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "chi2", "hellinger", "total_variation")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# The error in norm of a row's gradient, over its norm: ten times what rounding leaves in each dtype.
_ALLOWED = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Comparison:
    """One divergence, forward and backward: `fused_divergence` and the textbook formula that it replaces.

    Attributes:
        divergence: the label.
        milliseconds: the median time of the fused loss.
        textbook_milliseconds: that of the formula.
        megabytes: the peak memory of the fused loss beyond its inputs; NaN if unknown.
        textbook_megabytes: that of the formula.
        difference: the largest distance of a row's gradient from float64, over its norm.
        allowed: the largest difference that the dtype explains.
    """

    divergence: str
    milliseconds: float
    textbook_milliseconds: float
    megabytes: float
    textbook_megabytes: float
    difference: float
    allowed: float

    @property
    def agrees(self) -> bool:
        """Whether the gradient is as accurate as the dtype allows."""
        return self.difference <= self.allowed


def compare(
    divergences: Sequence[str] = DIVERGENCES,
    *,
    tokens: int = 64,
    vocabulary: int = 151_936,
    repeats: int = 5,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> list[Comparison]:
    r"""Time, memory and error of $\sum_n D_f(q_n \| p_n)$ and its gradient, compared with the textbook formula.

    The formula is two log-softmaxes and $\sum_a p_a f(q_a/p_a)$ by autograd, with `f` as written. Each repeat runs
    every subject once, so that a slower machine slows all of them; times are medians.

    Args:
        divergences: names or labels of the catalogue.
        tokens: the number of rows of logits.
        vocabulary: the number of tokens in the vocabulary.
        repeats: the number of timed runs of each subject, after one that does not count.
        dtype: the dtype of the logits.
        device: the device that computes the losses.
        seed: the seed of the logits, which are Gaussian with the spread of a language model's.

    Raises:
        InvalidArgumentError: a divergence, dtype or device is unknown, or a number is not positive.
    """
    for name, number in (("tokens", tokens), ("vocabulary", vocabulary), ("repeats", repeats)):
        check_integer(name, number)
    if dtype not in _ALLOWED:
        raise InvalidArgumentError("dtype", f"must be one of {', '.join(DTYPES)}, got {dtype}")
    members = [as_divergence(name) for name in divergences]
    generator = torch.Generator().manual_seed(seed)
    ours, noise = (torch.randn(tokens, vocabulary, generator=generator) for _ in range(2))
    try:
        student, teacher = ((3 * ours + x).to(device, dtype) for x in (torch.zeros(1), noise))
    except (RuntimeError, AssertionError) as error:  # torch does not know the device or does not have it
        raise InvalidArgumentError(
            "device", f"must be available, got {device!r}: {str(error).splitlines()[0]}"
        ) from None
    student.requires_grad_()

    def fused(name: str) -> Run:
        return lambda: fused_divergence(student, teacher, name).sum().backward()

    def textbook(name: str) -> Run:
        return lambda: _textbook(name, student, teacher).backward()

    kinds = {"fused": fused, "textbook": textbook}
    subjects = {(d.label, kind): make(d.label) for d in members for kind, make in kinds.items()}

    def forget() -> None:
        student.grad = None

    times = in_turn(subjects, repeats, forget)
    memory = {}
    for key, call in subjects.items():
        forget()
        memory[key] = peak(call)
    return [
        Comparison(
            d.label,
            1e3 * times[d.label, "fused"],
            1e3 * times[d.label, "textbook"],
            memory[d.label, "fused"],
            memory[d.label, "textbook"],
            _difference(d.label, student, teacher),
            _ALLOWED[dtype],
        )
        for d in members
    ]


def _textbook(name: str, student: Tensor, teacher: Tensor) -> Tensor:
    log_p, log_q = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    return (log_p.exp() * _generator(name)(torch.exp(log_q - log_p))).sum()


@functools.lru_cache
def _generator(name: str) -> Callable[[Tensor], Tensor]:
    """The generator as its formula is written, not as the library evaluates it."""
    import sympy

    from opdtheory.divergences.transform import symbol

    functions = {"log": torch.log, "exp": torch.exp, "sqrt": torch.sqrt, "Abs": torch.abs}
    formula: Callable[[Tensor], Tensor] = sympy.lambdify(symbol(), as_divergence(name).expr, [functions])
    return formula


def _difference(name: str, student: Tensor, teacher: Tensor, rows: int = 8) -> float:
    """The largest relative distance of the fused gradient from the textbook's in float64, over the first rows."""
    some = student.detach()[:rows].requires_grad_()
    wide = some.detach().double().requires_grad_()
    (found,) = torch.autograd.grad(fused_divergence(some, teacher[:rows], name).sum(), some)
    (exact,) = torch.autograd.grad(_textbook(name, wide, teacher[:rows].double()), wide)
    norms = exact.norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
    return float(((found.double() - exact).norm(dim=-1) / norms).max())
