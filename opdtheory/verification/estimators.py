"""`opdtheory table`: what each local estimator follows, derived symbolically from its weight (T1, T4, T5, T7)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opdtheory import divergences
from opdtheory.divergences.registry import parameter_free
from opdtheory.estimators import Estimator, estimator
from opdtheory.estimators.factory import ENTRIES, formula_of

if TYPE_CHECKING:
    import sympy

__all__ = ["Row", "rows"]

# For which the estimators are tabulated that the caller gives a divergence.
_DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "chi2", "hellinger", "le_cam")


@dataclass(frozen=True)
class Row:
    r"""One estimator whose weight is a function of the ratio alone.

    Attributes:
        estimator: with its claim.
        weight: the local weight in the gauge $w(1) = 0$.
        implied: the generator $V[w]$ that it follows exactly (T4), in the gauge $f(1) = f'(1) = 0$.
        genuine: whether $V[w]$ is convex, so that an f-divergence is minimised.
        named: the catalogue entry that $V[w]$ is a positive multiple of, or None.
        slope: $w'(1)$; the teacher attracts if it is positive (T5).
        second_moment: where $E_p[w^2]$ is unbounded over pairs of distributions: "bounded", "unbounded as u -> 0", ...
    """

    estimator: Estimator
    weight: sympy.Expr
    implied: sympy.Expr
    genuine: bool
    named: str | None
    slope: sympy.Expr
    second_moment: str

    @property
    def verdict(self) -> str:
        """What the estimator minimises, in a few words."""
        if self.weight == 0:
            return "zero gradient"
        if self.named is not None:
            return self.named
        return "some f-divergence" if self.genuine else "no f-divergence"

    @property
    def stability(self) -> str:
        """What the linearised flow does at the teacher (T5)."""
        if self.slope.is_infinite or self.slope > 0:
            return "attracts"
        return "repels" if self.slope < 0 else "no first-order force"

    def to_dict(self) -> dict[str, str]:
        """The row as text, formulas whole."""
        return {
            "estimator": self.estimator.label,
            "weight": str(self.weight),
            "implied_generator": str(self.implied),
            "verdict": self.verdict,
            "stability": self.stability,
            "second_moment": self.second_moment,
        }


def rows() -> list[Row]:
    """The estimators whose local weight is a function of `u`, each derived from that weight."""
    import sympy

    u = divergences.symbol()
    named = [(name, entry) for name, entry in ENTRIES.items() if entry.formula is not None]
    losses = [estimator(name, f) for f in _DIVERGENCES for name, entry in named if entry.nominal is None]
    losses += [estimator(name, **o) for name, entry in named if entry.nominal is not None for o in entry.examples[:1]]
    weights = [formula_of(loss.name, loss.claim.divergence, loss.settings) for loss in losses]
    centred = [sympy.simplify(w - w.subs(u, 1)) for w in weights if w is not None]
    return [_row(loss, weight, u) for loss, weight in zip(losses, centred, strict=True)]


def _row(loss: Estimator, weight: sympy.Expr, u: sympy.Symbol) -> Row:
    import sympy

    jump = weight.has(sympy.sign)
    return Row(
        estimator=loss,
        weight=weight,
        implied=divergences.implied_generator(weight) if weight != 0 else sympy.Integer(0),
        genuine=weight != 0 and _never_falls(weight, u),
        named=_named(weight, u),
        # A weight that jumps upwards at the teacher pulls harder than any slope.
        slope=sympy.oo if jump else sympy.diff(weight, u).subs(u, 1),
        second_moment=_second_moment(weight, u),
    )


def _never_falls(weight: sympy.Expr, u: sympy.Symbol) -> bool:
    """Whether the weight is non-decreasing, so that V[w] is convex (T4): its steps on a wide grid of log u."""
    curve = _curve(weight, u, 60)
    return all(after >= before for before, after in itertools.pairwise(curve))


def _named(weight: sympy.Expr, u: sympy.Symbol) -> str | None:
    """The catalogue entry without a parameter whose weight is a positive multiple of this one (T3, T4)."""
    if weight == 0:
        return None
    for entry in parameter_free():
        other = divergences.weight_of(entry.expr)
        theirs = _curve(other, u, 4)
        theirs = [value - theirs[len(theirs) // 2] for value in theirs]
        ours = _curve(weight, u, 4)
        scale = ours[-1] / theirs[-1]
        if scale > 0 and all(abs(a - scale * b) <= 1e-12 * abs(ours[-1]) for a, b in zip(ours, theirs, strict=True)):
            return entry.name
    return None


def _curve(weight: sympy.Expr, u: sympy.Symbol, limit: int) -> list[Any]:
    """The weight at log u from -limit to limit in steps of 1/4, with 60 digits."""
    import mpmath
    import sympy

    function = sympy.lambdify(u, weight, "mpmath")
    with mpmath.workdps(60):
        return [function(mpmath.exp(mpmath.mpf(k) / 4)) for k in range(-4 * limit, 4 * limit + 1)]


def _second_moment(weight: sympy.Expr, u: sympy.Symbol) -> str:
    """Where $E_p[w^2]$ can grow without bound: nowhere iff $w^2$ is bounded at 0 and $w^2/u$ at infinity (T10)."""
    import sympy

    weight = weight.subs(sympy.sign(u - 1), 1)
    near_zero = sympy.limit(weight**2, u, 0, "+")
    far_off = sympy.limit(weight**2 / u, u, sympy.oo)
    ends = [text for text, value in (("u → 0", near_zero), ("u → ∞", far_off)) if not value.is_finite]
    return f"unbounded as {' and '.join(ends)}" if ends else "bounded"
