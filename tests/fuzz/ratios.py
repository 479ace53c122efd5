"""Calls of the divergences' functions of the log-ratio, beside sympy's expression in float64, and of the catalogue."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import sympy
import torch
from torch import Tensor

import opdtheory as opd
from tests.fuzz.calls import Call, Parts, chosen
from tests.fuzz.corruptions import FLOATS, JUNK, rearranged
from tests.fuzz.fused import NAMES

__all__ = ["catalogue", "functions"]

# Digits that the plain formula loses to cancellation, which the library's does not.
_PLAIN = 1e-7
_DIGITS = {torch.float64: _PLAIN, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@functools.cache
def plain(name: str, function: str) -> Callable[[np.ndarray], np.ndarray]:
    """The function of `u` as sympy writes it."""
    d, u = opd.divergence(name), opd.u
    slope = u * sympy.diff(d.expr, u)
    wanted = {
        "generator": d.expr,
        "log_slope": slope,
        "weight": slope - d.expr,
        "curvature": u**2 * sympy.diff(d.expr, u, 2),
    }[function]
    return sympy.lambdify(u, wanted, "numpy")


def functions(rng: random.Random) -> Call:
    """A function of a divergence and its derivative by autograd."""
    name, function = chosen(rng, *NAMES[:-1]), chosen(rng, "generator", "log_slope", "weight", "curvature")
    if name == "total_variation":
        # A kink, of which sympy's derivative is a distribution.
        name = "jsd"
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    shape = chosen(rng, (), (3,), (2, 3), (0,), (2, 0, 3), (1, 2, 2))
    log_u = (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).clamp(-6, 6).to(chosen(rng, *FLOATS))
    bad: set[str] = set()
    value: Any = rearranged(rng, log_u)
    if rng.random() < 0.35:
        bad.add("log_u")
        if log_u.numel() and rng.random() < 0.4:
            value = log_u.clone()
            value.view(-1)[rng.randrange(value.numel())] = torch.nan
        else:
            value = chosen(rng, *JUNK, log_u.long(), log_u.bool(), log_u.to(torch.complex64))
    recorded = not bad and rng.random() < 0.5 and function != "curvature"
    if recorded:
        value = value.detach().requires_grad_()

    def run() -> Parts:
        found = getattr(opd.divergence(name), function)(value)
        return [found, *torch.autograd.grad(found.sum(), value)] if recorded else [found]

    def expected() -> Parts:
        parts = [_plainly(name, function, value)]
        if recorded:
            # d/dlog u of f is u f', of u f' it is u f' + u^2 f'', of w it is u^2 f''.
            slopes = {"generator": ("log_slope",), "log_slope": ("log_slope", "curvature"), "weight": ("curvature",)}
            parts.append(sum((_plainly(name, each, value) for each in slopes[function]), torch.zeros(shape).double()))
        # Rounded to the dtype of the argument, whose range they may leave.
        return [part.to(value.dtype) for part in parts]

    return Call(f"{name}.{function}", {"log_u": value}, run, expected, bad, (_DIGITS[log_u.dtype],))


def _plainly(name: str, function: str, log_u: Tensor) -> Tensor:
    at = log_u.detach().double()
    values = np.asarray(plain(name, function)(at.exp().numpy()), dtype=np.float64)
    return torch.from_numpy(np.broadcast_to(values, at.shape).copy())


_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "skew_jsd": ("beta", lambda x: 0 <= x <= 1),
    "alpha": ("alpha", math.isfinite),
    "skew_forward_kl": ("lam", lambda x: 0 <= x < 1),
    "skew_reverse_kl": ("lam", lambda x: 0 <= x < 1),
}
_NUMBERS = (0, 1, 0.5, 0.25, -1, 2, 1e-300, 1.5, -0.0, math.nan, math.inf, -math.inf, True, "1", None, [0.5], 1j)


def catalogue(rng: random.Random) -> Call:
    """`divergence(name, **parameters)`: an entry whose curvature at the teacher is not negative, or a refusal."""
    plain_names = [name for name in opd.divergences.names() if name not in _RANGES]
    name: Any = chosen(rng, *plain_names, *_RANGES, *_RANGES)
    arguments: dict[str, Any] = {}
    bad: set[str] = set()
    if name in _RANGES:
        parameter, inside = _RANGES[name]
        number = chosen(rng, *_NUMBERS)
        arguments[parameter] = number
        real = isinstance(number, (int, float)) and not isinstance(number, bool)
        if not (real and inside(number)):
            bad.add(parameter)
    if rng.random() < 0.3:
        how = rng.randrange(3)
        if how == 0:
            name = chosen(rng, "kl", "", 3, None, "JSD!", b"jsd", ("jsd",))
            bad |= {"divergence", *arguments}
        elif how == 1:
            extra = chosen(rng, "beta", "gamma", "lam", "alpha")
            if extra not in arguments:
                arguments[extra] = 0.5
                bad |= {extra, *arguments}
        elif arguments:
            bad |= set(arguments)
            arguments = {}

    def run() -> Parts:
        d = opd.divergence(name, **arguments)
        return [d.generator(torch.zeros(1).double()), d.curvature(torch.zeros(1).double()).clamp(max=0.0)]

    expected = [torch.zeros(1).double()] * 2
    return Call("divergence", {"name": name, **arguments}, run, lambda: expected, bad)
