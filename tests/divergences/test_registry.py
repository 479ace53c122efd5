"""The register: names, labels, families, and what is refused."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import subprocess
import sys

import pytest

from opdtheory import divergences
from opdtheory.divergences import divergence, families, names
from opdtheory.divergences.registry import parametric, register
from opdtheory.errors import InvalidArgumentError
from tests.divergences.members import CATALOGUE_NAMES, FAMILIES, INF


def test_names_are_the_catalogue() -> None:
    assert names() == tuple(CATALOGUE_NAMES)
    for name in names():
        assert getattr(divergences, name) is not None


def test_lookup_by_name() -> None:
    assert divergence("jsd") is divergences.jsd
    assert divergence(divergences.jsd) is divergences.jsd
    assert divergence("alpha", alpha=0.5) == divergences.alpha(0.5)
    assert divergences.alpha(0.5) != divergences.alpha(0.25)
    assert hash(divergences.skew_jsd(0.1)) == hash(divergences.skew_jsd(0.1))
    assert repr(divergences.alpha(0.5)) == divergences.alpha(0.5).label == "alpha(alpha=0.5)"
    assert dict(divergences.skew_jsd(0.1).parameters) == {"beta": 0.1}
    assert divergences.jsd.label == "jsd"


@pytest.mark.parametrize(
    ("arguments", "parameters", "named", "says"),
    (
        (("jsdd",), {}, "divergence", "did you mean 'jsd'"),
        (("nothing like it",), {}, "divergence", "must be one of reverse_kl, forward_kl"),
        pytest.param((3,), {}, "divergence", "or a label, got 3", marks=pytest.mark.bad_input),
        (("alpha",), {}, "alpha", "must be given"),
        (("jsd",), {"beta": 0.5}, "beta", "takes no parameters"),
        (("skew_jsd",), {"beta": 0.5, "lam": 0.1}, "lam", "takes beta"),
        ((divergences.jsd,), {"beta": 0.5}, "beta", "takes no parameters"),
        (("skew_jsd",), {"beta": -0.1}, "beta", r"\[0, 1\]"),
        (("skew_jsd",), {"beta": 1.1}, "beta", r"\[0, 1\]"),
        (("skew_jsd",), {"beta": math.nan}, "beta", "nan"),
        pytest.param(("skew_jsd",), {"beta": "0.5"}, "beta", "'0.5'", marks=pytest.mark.bad_input),
        (("skew_forward_kl",), {"lam": 1.0}, "lam", r"\[0, 1\)"),
        (("skew_reverse_kl",), {"lam": -1e-9}, "lam", r"\[0, 1\)"),
        (("alpha",), {"alpha": INF}, "alpha", "finite"),
        (("alpha",), {"alpha": math.nan}, "alpha", "finite"),
        pytest.param(("alpha",), {"alpha": True}, "alpha", "True", marks=pytest.mark.bad_input),
    ),
)
def test_bad_names_and_parameters_are_refused(
    arguments: tuple[object], parameters: dict[str, object], named: str, says: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=says) as caught:
        divergence(*arguments, **parameters)
    assert caught.value.argument == named


def test_families_are_the_names_that_take_a_parameter() -> None:
    assert divergences.families() == {name: key for name, (key, _) in FAMILIES.items()}
    for name in divergences.names():
        if name in divergences.families():
            with pytest.raises(InvalidArgumentError, match="must be given"):
                divergences.divergence(name)


def test_importing_the_package_leaves_sympy_and_mpmath_alone() -> None:
    code = "import sys, opdtheory.divergences; print([m for m in ('sympy', 'mpmath') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_family_looks_like_the_function_that_it_decorates() -> None:
    family = divergences.alpha
    assert str(inspect.signature(family)) == "(alpha: 'float') -> 'Divergence'"
    assert inspect.getdoc(family).startswith("Cressie-Read power divergence")
    assert family(0.5) == family(alpha=0.5)
    with pytest.raises(TypeError, match="alpha"):
        family(beta=0.5)
    assert copy.deepcopy(family) is family and pickle.loads(pickle.dumps(family)) is family


def test_ranges_and_examples_of_a_family_are_members() -> None:
    for family in parametric():
        assert family.name in names() and family.parameter == families()[family.name]
        for value in (*family.sought, *family.drawn, *family.examples):
            d = family(value)
            assert d.name == family.name and dict(d.parameters) == {family.parameter: value}
            assert divergence(d.label) == d


def test_a_name_is_registered_once() -> None:
    for known in (divergences.jsd, divergences.alpha):
        with pytest.raises(InvalidArgumentError, match="^name: must be new, got"):
            register(known)
