"""The implied generator of a weight that is a function rather than an expression, by quadrature."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.errors import InvalidArgumentError

__all__ = ["implied_generator_values"]

_RELATIVE = 1e-13
_ENOUGH = 1e-8  # an error estimate above this, relative to the values, is a failure
_INTERVALS = 200


def implied_generator_values(
    weight: Callable[[Tensor], Tensor],
    log_u: Float[Tensor, "*shape"],
    breaks: Sequence[float] = (),
) -> Float[Tensor, "*shape"]:
    r"""Values of the generator whose exact weight is a given function, up to a constant (T4).

    $$V[w](e^t) = \int_0^t (w(s) - w(0))\,e^{t - s}\,\mathrm{d}s$$

    in the gauge $f(1) = f'(1) = 0$, with the weight as a function of $s = \log u$. Adaptive quadrature in float64 goes
    from each value of `log_u` to the next. For a smooth weight its relative error is about 1e-12 away from $u = 1$;
    near it $w(s) - w(0)$ cancels. `implied_generator` gives a closed form where sympy finds one. No gradient flows
    through the result; its slope in $\log u$ is $V + w - w(0)$.

    Args:
        weight: an elementwise function from float64 tensors of $\log u$ in nats to float64 tensors.
        log_u: the points at which to evaluate the generator, finite, of any shape and floating-point dtype.
        breaks: values of $\log u$ at which the weight jumps or has a kink; without them a jump costs digits.

    Returns:
        The values, in the dtype of `log_u`; the generator is convex if and only if the weight never falls.

    Raises:
        InvalidArgumentError: `log_u` is not floating-point or not finite, or the weight is not finite, not elementwise
            or too rough to integrate.

    Example:
        >>> import torch
        >>> implied_generator_values(torch.tanh, torch.tensor([-1.0, 0.0, 1.0]))
        tensor([0.3136, 0.0000, 0.6351])
    """
    if not isinstance(log_u, Tensor) or not log_u.is_floating_point():
        found = log_u.dtype if isinstance(log_u, Tensor) else type(log_u).__name__
        raise InvalidArgumentError("log_u", f"must be a floating-point tensor, got {found}")
    if not bool(torch.isfinite(log_u).all()):
        raise InvalidArgumentError("log_u", "must be finite, got NaN or infinite entries")
    points, place = torch.unique(log_u.detach().to(torch.float64), return_inverse=True)
    at_one = _value(weight, 0.0)
    values = {0.0: 0.0}
    stops = {*points.tolist(), *(float(b) for b in breaks)}
    for side in (sorted(t for t in stops if t > 0), sorted((t for t in stops if t < 0), reverse=True)):
        here, value = 0.0, 0.0
        for there in side:
            # Only growth by exp(there - here) links one stop to the next, so errors do not build up.
            value = math.exp(there - here) * value + _integral(weight, at_one, here, there)
            here = there
            values[there] = value
    distinct = torch.tensor([values[t] for t in points.tolist()], dtype=torch.float64, device=log_u.device)
    return distinct[place].to(log_u.dtype).reshape(log_u.shape)


def _integral(weight: Callable[[Tensor], Tensor], at_one: float, low: float, high: float) -> float:
    from scipy.integrate import IntegrationWarning, quad

    def integrand(s: float) -> float:
        return (_value(weight, s) - at_one) * math.exp(high - s)

    with warnings.catch_warnings():
        # The error estimate decides below; at the limit of float64 the routine warns of rounding.
        warnings.simplefilter("ignore", IntegrationWarning)
        value, error = quad(integrand, low, high, epsabs=0.0, epsrel=_RELATIVE, limit=_INTERVALS)[:2]
    if not error <= _ENOUGH * max(abs(value), abs(high - low)):
        raise InvalidArgumentError(
            "weight", f"is too rough to integrate for log u between {low:g} and {high:g}; list its jumps in `breaks`"
        )
    return value


def _value(weight: Callable[[Tensor], Tensor], log_u: float) -> float:
    with torch.no_grad():
        found = weight(torch.tensor([log_u], dtype=torch.float64))
    if not isinstance(found, Tensor) or found.shape != (1,):
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InvalidArgumentError("weight", f"must be an elementwise function, got {got} for a tensor of shape (1,)")
    number = float(found)
    if not math.isfinite(number):
        raise InvalidArgumentError("weight", f"must be finite, got {number} at log u = {log_u:g}")
    return number
