r"""The fused losses side by side with the textbook formula by autograd: time, memory and error."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opdtheory.divergences import divergence as as_divergence
from opdtheory.errors import InvalidArgumentError
from opdtheory.kernels.fused import fused_divergence
from opdtheory.machine import Run, in_turn, peak

__all__ = ["DIVERGENCES", "DTYPES", "Comparison", "compare"]


DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "chi2", "hellinger", "total_variation")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# Of a row's gradient in norm, over its norm: what the rounding of each dtype leaves, ten times over.
_ALLOWED = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Comparison:
    """One divergence, forward and backward: `fused_divergence`, and the textbook formula that it replaces.

    Attributes:
        divergence: its label.
        milliseconds: of the fused loss, the median.
        textbook_milliseconds: of the formula.
        megabytes: what the fused loss takes beyond its inputs, at its peak; NaN if unknown.
        textbook_megabytes: the same of the formula.
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
        """Whether the gradient is right."""
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
    r"""Time, memory and error of $\sum_n D_f(q_n \| p_n)$ and its gradient, side by side with the textbook formula.

    The formula is two log-softmaxes and $\sum_a p_a f(q_a/p_a)$ by autograd, `f` as it is written. Each repeat runs
    every subject once, so that a machine that slows down slows all of them; what is told are medians.

    Args:
        divergences: names or labels of the catalogue.
        tokens: rows of logits.
        vocabulary: words of a row.
        repeats: of each subject, after one run that is not counted.
        dtype: of the logits.
        device: where the losses are computed.
        seed: of the logits, Gaussian with the spread of a language model's.

    Raises:
        InvalidArgumentError: an unknown divergence, dtype or device, or a number that is not positive.
    """
    for name, number in (("tokens", tokens), ("vocabulary", vocabulary), ("repeats", repeats)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise InvalidArgumentError(name, f"is {number!r}; a positive integer is needed")
    if dtype not in _ALLOWED:
        raise InvalidArgumentError("dtype", f"is {dtype}; one of {', '.join(DTYPES)} is needed")
    members = [as_divergence(name) for name in divergences]
    generator = torch.Generator().manual_seed(seed)
    ours, noise = (torch.randn(tokens, vocabulary, generator=generator) for _ in range(2))
    try:
        student, teacher = ((3 * ours + x).to(device, dtype) for x in (torch.zeros(1), noise))
    except (RuntimeError, AssertionError) as error:  # torch's words for a device that it does not know, or has not
        raise InvalidArgumentError("device", f"is {device!r}: {str(error).splitlines()[0]}") from None
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
    """The generator as its formula says, not as the library evaluates it."""
    import sympy

    from opdtheory.divergences.transform import symbol

    functions = {"log": torch.log, "exp": torch.exp, "sqrt": torch.sqrt, "Abs": torch.abs}
    formula: Callable[[Tensor], Tensor] = sympy.lambdify(symbol(), as_divergence(name).expr, [functions])
    return formula


def _difference(name: str, student: Tensor, teacher: Tensor, rows: int = 8) -> float:
    """Of the fused gradient of the first rows from the textbook's in float64."""
    some = student.detach()[:rows].requires_grad_()
    wide = some.detach().double().requires_grad_()
    (found,) = torch.autograd.grad(fused_divergence(some, teacher[:rows], name).sum(), some)
    (exact,) = torch.autograd.grad(_textbook(name, wide, teacher[:rows].double()), wide)
    norms = exact.norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
    return float(((found.double() - exact).norm(dim=-1) / norms).max())
