"""The register of the catalogue: divergences and families of divergences, by name and by label."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from opdtheory.divergences.divergence import Divergence, Form, Parameters, weighted_sum
from opdtheory.divergences.transform import symbol
from opdtheory.errors import InvalidArgumentError

if TYPE_CHECKING:
    import sympy

__all__ = [
    "Family",
    "divergence",
    "entries",
    "entry",
    "families",
    "family",
    "member",
    "names",
    "parameter_free",
    "parametric",
    "register",
    "summands",
]

_INF = math.inf


@dataclass(frozen=True, eq=False)
class Family:
    """A family of divergences with one parameter; calling it with a value gives that member.

    Attributes:
        name: the catalogue's name.
        parameter: the parameter's name.
        make: the member at a value; raises `InvalidArgumentError` for a value out of range.
        sought: the interval in which a fit seeks the parameter.
        drawn: the interval from which the strategies of `opdtheory.testing` draw it.
        examples: the values at which the theorems are checked.
    """

    name: str
    parameter: str
    make: Callable[..., Divergence]
    sought: tuple[float, float]
    drawn: tuple[float, float]
    examples: tuple[float, ...]

    def __post_init__(self) -> None:
        # Signature, docstring and name are the function's, as they would be without the decorator.
        kept = {key: getattr(self.make, key) for key in ("__doc__", "__module__", "__name__", "__qualname__")}
        vars(self).update(kept, __wrapped__=self.make)

    def __call__(self, *value: float, **named: float) -> Divergence:
        """The member at a value of the parameter, given by position or by name."""
        return self.make(*value, **named)

    def __reduce__(self) -> str:
        return self.name


Entry = TypeVar("Entry", Divergence, Family)

_ENTRIES: dict[str, Divergence | Family] = {}


def register(added: Entry) -> Entry:
    """Add a divergence or a family to the catalogue.

    Raises:
        InvalidArgumentError: the catalogue has an entry of that name.
    """
    if added.name in _ENTRIES:
        raise InvalidArgumentError("name", f"must be new, got {added.name!r}, which the catalogue has")
    _ENTRIES[added.name] = added
    return added


def entry(name: str, expr: Callable[[Any, sympy.Symbol], sympy.Expr], **forms: Any) -> Divergence:
    """A divergence without a parameter, made as `member` does and registered."""
    return register(member(name, expr, **forms))


def family(
    *, sought: tuple[float, float], drawn: tuple[float, float], examples: tuple[float, ...]
) -> Callable[[Callable[[float], Divergence]], Family]:
    """Register a function of one parameter as a `Family`, under the names of the function and of its parameter."""

    def decorate(make: Callable[[float], Divergence]) -> Family:
        (parameter,) = inspect.signature(make).parameters
        return register(Family(make.__name__, parameter, make, sought, drawn, examples))

    return decorate


def member(
    name: str,
    expr: Callable[[Any, sympy.Symbol], sympy.Expr],
    *,
    generator: Form,
    log_slope: Form,
    weight: Form,
    curvature: Form,
    curvature_slope: Callable[[Tensor], Tensor],
    slope_at_infinity: float,
    reference: str,
    parameters: dict[str, float] | None = None,
    remainder: Form | None = None,
    centred_weight: Form | None = None,
) -> Divergence:
    r"""A divergence from its generator and its functions of `log u`.

    `expr` gets the module `sympy`, which nothing here imports before an expression is asked for, and the symbol `u`.
    A generator with $f'(1) \ne 0$ needs `remainder` and `centred_weight` to keep its digits near $u = 1$.
    """

    @functools.cache
    def make_expr() -> sympy.Expr:
        import sympy

        return expr(sympy, symbol())

    forms = {
        "generator": generator,
        "log_slope": log_slope,
        "weight": weight,
        "curvature": curvature,
        "remainder": remainder or generator,
        "centred_weight": centred_weight or weight,
        # A curvature that levels off has no slope left; one that diverges does so exponentially.
        "curvature_slope": Form(
            curvature_slope,
            -_INF if math.isinf(curvature.at_zero) else 0.0,
            _INF if math.isinf(curvature.at_infinity) else 0.0,
        ),
    }
    return Divergence(
        name=name,
        parameters=Parameters(parameters),
        reference=reference,
        _forms=forms,
        _slope_at_infinity=slope_at_infinity,
        _make_expr=make_expr,
        _remake=(_from_names, (name, dict(parameters or {}))),
    )


def _from_names(name: str, parameters: dict[str, float]) -> Divergence:
    return divergence(name, **parameters)


_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"

# How a member of a family prints.
_LABEL = re.compile(rf"\s*(\w+)\(\s*(\w+)\s*=\s*([-+]?{_NUMBER})\s*\)\s*", re.IGNORECASE)

# One term of a weighted sum, with the sign that goes on.
_TERM = re.compile(rf"\s*(?:({_NUMBER})\s*\*)?\s*([a-z_]\w*\s*(?:\([^()]*\))?)\s*(\+|$)", re.IGNORECASE)


def names() -> tuple[str, ...]:
    """The names in the catalogue, those of families included."""
    return tuple(_ENTRIES)


def families() -> dict[str, str]:
    """The names that take a parameter, with the parameter's name.

    Example:
        >>> families()["skew_jsd"]
        'beta'
    """
    return {each.name: each.parameter for each in parametric()}


def entries() -> tuple[Divergence | Family, ...]:
    """The divergences without a parameter and the families, in the order of `names`."""
    return tuple(_ENTRIES.values())


def parameter_free() -> tuple[Divergence, ...]:
    """The entries without a parameter."""
    return tuple(each for each in entries() if isinstance(each, Divergence))


def summands() -> tuple[Divergence, ...]:
    """The entries of `parameter_free` that sums are written in: not Jeffreys' divergence, the sum of both KLs."""
    return tuple(each for each in parameter_free() if each.name != "jeffreys")


def parametric() -> tuple[Family, ...]:
    """The entries with a parameter."""
    return tuple(each for each in entries() if isinstance(each, Family))


def divergence(name: str | Divergence, **parameters: float) -> Divergence:
    """A divergence of the catalogue by name or label, or a sum of several; a `Divergence` passes through unchanged.

    Args:
        name: one of `names()`, a label such as `"alpha(alpha=0.5)"`, a weighted sum of these such as
            `"9*reverse_kl + forward_kl"`, or a `Divergence`.
        parameters: the family's parameter: `beta` for `skew_jsd`, `alpha` for `alpha`, `lam` for the skew KLs.

    Raises:
        InvalidArgumentError: an unknown name, a parameter that is missing, unexpected or out of range, or a sum with
            another form than weights of at least 0 times names.

    Example:
        >>> divergence("skew_jsd", beta=0.1) == divergence("skew_jsd(beta=0.1)")
        True
        >>> divergence("9*reverse_kl + forward_kl").expr
        u*log(u) - 9*log(u)
    """
    if isinstance(name, Divergence):
        if parameters:
            raise InvalidArgumentError(
                next(iter(parameters)), f"must be left out: the object {name.label} takes no parameters"
            )
        return name
    label = _LABEL.fullmatch(name) if isinstance(name, str) and not parameters else None
    if label is None and isinstance(name, str) and not parameters and ("*" in name or "+" in name):
        return _sum(name)
    given = {label[2]: float(label[3])} if label else parameters
    found = _found(label[1] if label else name)
    wanted = (found.parameter,) if isinstance(found, Family) else ()
    for key in given:
        if key not in wanted:
            takes = f"takes {', '.join(wanted)}" if wanted else "takes no parameters"
            raise InvalidArgumentError(key, f"must be left out: {found.name} {takes}")
    for key in wanted:
        if key not in given:
            raise InvalidArgumentError(key, f'must be given for {found.name}: divergence("{found.name}", {key}=...)')
    if isinstance(found, Divergence):
        return found
    return _kept(found, given[found.parameter]) if label else found(**given)


@functools.lru_cache(maxsize=256)
def _sum(text: str) -> Divergence:
    """A weighted sum from its text, such as `9*reverse_kl + 0.5*skew_jsd(beta=0.1)`."""
    terms: list[tuple[float, Divergence]] = []
    place = 0
    while place < len(text) or (terms and text.rstrip().endswith("+")):
        term = _TERM.match(text, place)
        if term is None:
            raise InvalidArgumentError(
                "divergence",
                f"must be weights of at least 0 times names, such as '9*reverse_kl + forward_kl', got {text!r}; "
                f"the part {text[place:].strip()!r} is not",
            )
        terms.append((float(term[1] or 1.0), divergence(term[2].strip())))
        place = term.end()
    return weighted_sum(tuple(terms))


@functools.lru_cache(maxsize=256)
def _kept(found: Family, value: float) -> Divergence:
    """A member by its label, kept: a loss names one at every step."""
    return found(value)


def _found(name: object) -> Divergence | Family:
    if isinstance(name, str) and name in _ENTRIES:
        return _ENTRIES[name]
    close = difflib.get_close_matches(str(name), _ENTRIES, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise InvalidArgumentError("divergence", f"must be one of {', '.join(_ENTRIES)} or a label, got {name!r}{hint}")
