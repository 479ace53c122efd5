r"""One f-divergence: its symbolic generator, and functions of $\log u$ with exact derivatives and limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad

from opdtheory.divergences import transform
from opdtheory.divergences.convexity import check_generator
from opdtheory.errors import InvalidArgumentError

if TYPE_CHECKING:
    import sympy

__all__ = ["Divergence", "Form", "Parameters", "check_weight", "weighted_sum"]

# The derivative of each form in log u, as a sum of forms: that of w is u^2 f'', that of u f' is u f' + u^2 f''.
_DERIVATIVES: dict[str, tuple[str, ...]] = {
    "generator": ("log_slope",),
    "log_slope": ("log_slope", "curvature"),
    "weight": ("curvature",),
    "curvature": ("curvature_slope",),
    "remainder": ("remainder", "centred_weight"),
    "centred_weight": ("curvature",),
}


@dataclass(frozen=True)
class Form:
    r"""A function of $\log u$ on float64 tensors, with its limits at $\log u = \mp\infty$.

    Attributes:
        function: elementwise, from float64 to float64; its values at infinite arguments are not used.
        at_zero: the limit for $u \to 0^+$.
        at_infinity: the limit for $u \to \infty$.
    """

    function: Callable[[Tensor], Tensor]
    at_zero: float
    at_infinity: float

    def __call__(self, log_u: Tensor) -> Tensor:
        """The values at a float64 tensor without NaN."""
        values = self.function(log_u)
        # A sum is finite only if its terms are: one operation nearly always makes the limits unnecessary.
        if math.isfinite(log_u.sum()):
            return values
        values = torch.where(log_u == -math.inf, torch.full_like(values, self.at_zero), values)
        return torch.where(log_u == math.inf, torch.full_like(values, self.at_infinity), values)


class Parameters(Mapping[str, float]):
    """A small immutable, hashable mapping that prints as a dictionary."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, float] | None = None) -> None:
        self._items: dict[str, float] = dict(items or {})

    def __getitem__(self, key: str) -> float:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


@dataclass(frozen=True, repr=False)
class Divergence:
    r"""An f-divergence $D_f(q\|p) = E_p[f(u)]$ of the ratio $u = q/p$, teacher over student, with $f(1) = 0$.

    Take one from the catalogue (`divergence("jsd")`, `alpha(0.5)`) or make one with `Divergence.from_expr`.

    `generator`, `log_slope`, `weight`, `curvature`, `remainder` and `centred_weight` take $\log u$, teacher minus
    student log-probability in nats, as a tensor of any shape and floating-point dtype. $\pm\infty$ is allowed; NaN,
    and anything but a floating-point tensor, raises `InvalidArgumentError`. Dtypes narrower than float64 are evaluated
    in float64 and rounded once. Autograd, `torch.func` and forward mode give the exact derivatives: that of
    `generator` is `log_slope`, that of `weight` is `curvature`, that of `log_slope` is `log_slope + curvature`.

    Attributes:
        name: the name in the catalogue, or the one given to `from_expr`.
        parameters: the parameter of a member of a family, by name; empty for others.
        reference: where the divergence comes from.

    Example:
        >>> import torch
        >>> from opdtheory.divergences import divergence
        >>> forward = divergence("forward_kl")
        >>> forward.weight(torch.tensor([0.0, 1.0, -torch.inf]))
        tensor([1.0000, 2.7183, 0.0000])
        >>> forward.expr, forward.at_zero, forward.slope_at_infinity
        (u*log(u), 0.0, inf)
    """

    name: str
    parameters: Mapping[str, float]
    reference: str = field(compare=False)
    _forms: Mapping[str, Form] = field(compare=False)
    _slope_at_infinity: float = field(compare=False)
    _make_expr: Callable[[], sympy.Expr] = field(compare=False)
    _remake: tuple[Callable[..., Divergence], tuple[Any, ...]] = field(compare=False)  # for pickling
    _own_expr: Any = None  # the generator given to `from_expr`, which the name does not identify
    _terms: tuple[tuple[float, Divergence], ...] = field(default=(), compare=False)  # of a weighted sum

    @classmethod
    def from_expr(cls, expr: sympy.Expr, name: str = "custom") -> Divergence:
        r"""The divergence with a given generator, a sympy expression in `u`.

        $$f(1) = 0, \qquad f'' \ge 0 \text{ on } (0, \infty)$$

        are checked, convexity by sympy where it can decide and else on a grid of $\log u \in [-60, 60]$. The
        numeric methods evaluate $f$, $u f'$, $u f' - f$ and $u^2 f''$ as written, after $u = e^t$, and near $u = 1$,
        where most expressions cancel, by their power series in $t$. Where an intermediate value overflows, underflows
        or cancels by more than 10 bits, mpmath evaluates the point, which takes about 0.1 ms for each distinct one.
        Elsewhere the relative error may reach $10^{-11}$. Limits are sympy's; a limit that it does not find is NaN.

        Args:
            expr: an expression whose only free symbol is called `u`, whatever its assumptions.
            name: the name in messages and tables.

        Raises:
            InvalidArgumentError: `expr` violates a condition, which the message names, or `name` is empty.
        """
        if not isinstance(name, str) or not name:
            raise InvalidArgumentError("name", f"must be a non-empty string, got {name!r}")
        generator = check_generator(expr)
        return _from_checked(generator, name)

    @property
    def expr(self) -> sympy.Expr:
        """The generator $f$ as a sympy expression in `u`, with parameters as exact decimal fractions."""
        return self._make_expr()

    @property
    def label(self) -> str:
        """The name with its parameters, such as `jsd` or `skew_jsd(beta=0.1)`."""
        if not self.parameters:
            return self.name
        # Without `items`, which torch 2.6 does not compile.
        return f"{self.name}({', '.join(f'{key}={self.parameters[key]!r}' for key in self.parameters)})"

    @property
    def at_zero(self) -> float:
        r"""The limit $f(0^+)$, maybe infinite: the cost per unit of student mass where the teacher has none (T10)."""
        return self._forms["generator"].at_zero

    @property
    def slope_at_infinity(self) -> float:
        r"""The limit $f'(\infty) = \lim f(u)/u$, maybe infinite: the cost per unit of teacher mass never sampled."""
        return self._slope_at_infinity

    def generator(self, log_u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        r"""The generator $f(u)$ at $u = e^{\log u}$."""
        return self._evaluate("generator", log_u)

    def log_slope(self, log_u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        r"""The slope in the log-ratio, $u f'(u) = \mathrm{d}f/\mathrm{d}\log u$."""
        return self._evaluate("log_slope", log_u)

    def weight(self, log_u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        r"""The exact policy-gradient weight $w_f(u) = u f'(u) - f(u)$ (T1): $\nabla D_f = -E_p[w_f(u)\, s]$.

        An estimator ascends the log-probability with this weight. Only differences matter: a constant is a baseline.
        """
        return self._evaluate("weight", log_u)

    def curvature(self, log_u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        r"""The curvature $u^2 f''(u) = \mathrm{d}w_f/\mathrm{d}\log u \ge 0$; at $u = 1$ the pull of the teacher (T5).

        At a kink of the generator it is zero by convention.
        """
        return self._evaluate("curvature", log_u)

    @property
    def terms(self) -> tuple[tuple[float, Divergence], ...]:
        """Weights and divergences of a sum; of any other divergence, itself with weight one."""
        return self._terms or ((1.0, self),)

    def __add__(self, other: Divergence) -> Divergence:
        r"""The sum of two divergences, the divergence of the generator $f + g$, since $D_f$ is linear in $f$."""
        return weighted_sum((*self.terms, *other.terms)) if isinstance(other, Divergence) else NotImplemented

    def __rmul__(self, weight: float) -> Divergence:
        r"""The divergence times a weight of at least 0, the one of the generator $c f$."""
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            return NotImplemented
        check_weight(weight)
        return weighted_sum(tuple((weight * c, d) for c, d in self.terms))

    __mul__ = __rmul__

    @property
    def slope_at_one(self) -> float:
        r"""The slope $f'(1)$, the gauge (T3), that `remainder` takes off; 0 where a user's generator keeps it."""
        two = torch.tensor(math.log(2.0), dtype=torch.float64)
        return float(self.generator(two) - self.remainder(two))

    def remainder(self, log_u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        r"""The generator in the gauge of slope zero at one, $f(u) - f'(1)(u - 1) \ge 0$ (T3).

        Between distributions it has the same expectation as $f$, and it loses no digits where they are nearly equal.
        """
        return self._evaluate("remainder", log_u)

    def centred_weight(self, log_u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        r"""The weight less its value at one, $w_f(u) - w_f(1)$, which loses no digits near $u = 1$ (T7a)."""
        return self._evaluate("centred_weight", log_u)

    def _evaluate(self, kind: str, log_u: Tensor) -> Tensor:
        if not isinstance(log_u, Tensor):
            raise InvalidArgumentError("log_u", f"must be a floating-point tensor, got {type(log_u).__name__}")
        if not log_u.is_floating_point():
            raise InvalidArgumentError("log_u", f"must have a floating-point dtype, got {log_u.dtype}")
        # Under vmap only a function with a rule for it sees an ordinary tensor.
        if transforms_active():
            return _Transformed.apply(log_u, self, kind)
        recorded = log_u.requires_grad and torch.is_grad_enabled()
        if recorded or forward_ad.unpack_dual(log_u).tangent is not None:
            return _Evaluate.apply(log_u, self, kind)
        return _values(log_u, self, kind)

    def __repr__(self) -> str:
        return self.label

    def __reduce__(self) -> tuple[Callable[..., Divergence], tuple[Any, ...]]:
        return self._remake


# Whether a transform of `torch.func` is active; where torch cannot tell, any call may be inside one.
transforms_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def _values(log_u: Tensor, divergence: Divergence, kind: str) -> Tensor:
    values = log_u.to(torch.float64)
    # One operation nearly always shows that there is no NaN.
    if not math.isfinite(values.sum()) and bool(torch.isnan(values).any()):
        count = int(torch.isnan(values).sum())
        raise InvalidArgumentError("log_u", f"must not hold NaN, got {count} among {log_u.numel()} entries")
    return divergence._forms[kind](values).to(log_u.dtype)


class _Evaluate(torch.autograd.Function):
    """A form of a divergence at a tensor; its derivatives are forms again, to any order that is defined.

    There is no `setup_context`, for which torch would look up the signature of `forward` at every call.
    """

    @staticmethod
    def forward(ctx: Any, log_u: Tensor, divergence: Divergence, kind: str) -> Tensor:
        values = _values(log_u, divergence, kind)
        _keep(ctx, log_u, divergence, kind)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        slope = _derivative(ctx)
        # A masked entry sends back a zero, which 0 * inf would turn into NaN.
        slope = torch.where((grad == 0) & torch.isinf(slope), torch.zeros_like(slope), slope)
        return grad * slope, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return tangent * _derivative(ctx)


class _Transformed(_Evaluate):
    """The same inside transforms of `torch.func`, which need `setup_context`."""

    @staticmethod
    def forward(log_u: Tensor, divergence: Divergence, kind: str) -> Tensor:  # type: ignore[override]
        return _values(log_u, divergence, kind)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Divergence, str], output: Tensor) -> None:
        _keep(ctx, *inputs)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], log_u: Tensor, divergence: Divergence, kind: str) -> Any:
        return _Transformed.apply(log_u, divergence, kind), in_dims[0]


def _keep(ctx: Any, log_u: Tensor, divergence: Divergence, kind: str) -> None:
    ctx.divergence, ctx.kind = divergence, kind
    ctx.save_for_backward(log_u)
    ctx.save_for_forward(log_u)


def _derivative(ctx: Any) -> Tensor:
    if ctx.kind not in _DERIVATIVES:
        raise NotImplementedError(f"{ctx.divergence.label}: derivatives end with the slope of `curvature`")
    (log_u,) = ctx.saved_tensors
    parts = [ctx.divergence._evaluate(kind, log_u) for kind in _DERIVATIVES[ctx.kind]]
    if len(parts) == 1:
        return parts[0]
    total = parts[0] + parts[1]
    if ctx.kind == "remainder":
        # Far below one its parts cancel, and u f' - f'(1) u does not.
        slope = ctx.divergence._evaluate("log_slope", log_u) - ctx.divergence.slope_at_one * log_u.exp()
        return torch.where(log_u < -1.0, slope, total)
    # Slope and curvature overflow with opposite signs only towards u = 0, where u f' rises from -inf.
    return torch.where(torch.isnan(total), torch.full_like(total, math.inf), total)


def _from_checked(generator: sympy.Expr, name: str) -> Divergence:
    forms = {
        kind: Form(transform.numeric(expression), *transform.limits(expression))
        for kind, expression in transform.forms(generator).items()
    }
    slope_at_infinity = transform.slope_at_infinity(generator)
    slope, *expressions = transform.centred(generator)
    f, weight = forms["generator"], forms["weight"]
    # A convex function whose slope never rises above f'(1) is affine beyond one.
    ends = (
        f.at_zero + slope,
        0.0 if slope_at_infinity == slope != 0.0 else f.at_infinity if slope == 0.0 else math.inf,
    )
    forms["remainder"] = Form(transform.numeric(expressions[0]), *ends)
    forms["centred_weight"] = Form(
        transform.numeric(expressions[1]), weight.at_zero - slope, weight.at_infinity - slope
    )
    return Divergence(
        name=name,
        parameters=Parameters(),
        reference="",
        _forms=forms,
        _slope_at_infinity=slope_at_infinity,
        _make_expr=lambda: generator,
        _remake=(_from_checked, (generator, name)),
        _own_expr=generator,
    )


def check_weight(weight: float) -> None:
    """Raise unless a weight of a sum is a finite number of at least 0: else it is no f-divergence.

    Raises:
        InvalidArgumentError: the weight is negative, infinite or NaN.
    """
    if not 0.0 <= weight < math.inf:
        raise InvalidArgumentError("divergence", f"must have finite weights of at least 0, got {weight!r}")


def weighted_sum(terms: tuple[tuple[float, Divergence], ...]) -> Divergence:
    r"""The f-divergence $\sum_i c_i D_{f_i}$, whose generator is $\sum_i c_i f_i$.

    Terms of weight zero are left out, and equal divergences are added up.

    Args:
        terms: weights of at least 0, at least one of them positive, and divergences.

    Raises:
        InvalidArgumentError: a weight is negative or not finite, or none is positive.
    """
    weights: dict[Divergence, float] = {}
    for weight, term in terms:
        check_weight(weight)
        if weight > 0:
            weights[term] = weights.get(term, 0.0) + float(weight)
    if not weights:
        raise InvalidArgumentError("divergence", "must have a positive weight, got none")
    kept = tuple((weight, term) for term, weight in weights.items())
    if len(kept) == 1 and kept[0][0] == 1.0:
        return kept[0][1]
    own = tuple(term._own_expr for _, term in kept)
    slope = sum(weight * term.slope_at_infinity for weight, term in kept)
    kinds = [kind for kind in kept[0][1]._forms if all(kind in term._forms for _, term in kept)]
    return Divergence(
        name=" + ".join(f"{_coefficient(weight)}{term.label}" for weight, term in kept),
        parameters=Parameters(),
        reference="; ".join(dict.fromkeys(term.reference for _, term in kept if term.reference)),
        _forms={kind: _summed([(w, term._forms[kind]) for w, term in kept], slope) for kind in kinds},
        _slope_at_infinity=slope,
        _make_expr=lambda: _summed_expr(kept),
        _remake=(weighted_sum, (kept,)),
        _own_expr=own if any(expr is not None for expr in own) else None,
        _terms=kept,
    )


def _coefficient(weight: float) -> str:
    """A weight before its name, in as many digits as give it back."""
    if weight == 1.0:
        return ""
    return f"{int(weight)}*" if weight.is_integer() and weight < 1e15 else f"{weight!r}*"


def _summed(forms: list[tuple[float, Form]], slope: float) -> Form:
    def function(t: Tensor) -> Tensor:
        total = forms[0][0] * forms[0][1].function(t)
        for weight, form in forms[1:]:
            total = total + weight * form.function(t)
        return total

    at_infinity = sum(weight * form.at_infinity for weight, form in forms)
    if math.isnan(at_infinity) and slope != 0.0:
        # Of terms that grow with opposite signs, the faster one decides: f(u) and u f' go as f'(inf) u.
        at_infinity = math.copysign(math.inf, slope)
    return Form(function, sum(weight * form.at_zero for weight, form in forms), at_infinity)


def _summed_expr(terms: tuple[tuple[float, Divergence], ...]) -> sympy.Expr:
    import sympy

    return sympy.Add(*(sympy.Rational(repr(weight)) * term.expr for weight, term in terms))
