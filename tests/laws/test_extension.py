"""CONTRIBUTING's promise: a divergence, or a family of them, is one entry; with it everything else serves it too."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import hypothesis
import pytest
import sympy
import torch
from torch import Tensor

import opdtheory as opd
from opdtheory import divergences, testing
from opdtheory.divergences import Divergence, registry
from opdtheory.divergences.divergence import Form
from opdtheory.divergences.logspace import mixture_ratio
from opdtheory.divergences.registry import entry, family, member
from opdtheory.errors import InvalidArgumentError
from opdtheory.theorems import theorems as every_theorem
from opdtheory.theorems.gradient.opd_plus import theorems
from opdtheory.theorems.instances.cases import catalogue, smooth_catalogue, strictly_convex
from opdtheory.training.config import TrainConfig
from opdtheory.verification import estimators as table
from tests.conftest import CHECKED
from tests.sparse import some

INF = math.inf


def _plain() -> str:
    r"""An entry that the catalogue lacks: $f = (u - 1)^2/\sqrt u$."""
    entry(
        "root_chi2",
        lambda sympy, u: (u - 1) ** 2 / sympy.sqrt(u),
        generator=Form(lambda t: torch.exp(t / 2) * (2 * torch.sinh(t / 2)) ** 2, INF, INF),
        log_slope=Form(lambda t: torch.exp(-t / 2) * torch.expm1(t) * (1.5 * torch.exp(t) + 0.5), -INF, INF),
        weight=Form(lambda t: torch.exp(-t / 2) * torch.expm1(t) * (0.5 * torch.exp(t) + 1.5), -INF, INF),
        curvature=Form(
            lambda t: 0.75 * torch.exp(1.5 * t) + 0.5 * torch.exp(t / 2) + 0.75 * torch.exp(-t / 2), INF, INF
        ),
        curvature_slope=lambda t: 1.125 * torch.exp(1.5 * t) + 0.25 * torch.exp(t / 2) - 0.375 * torch.exp(-t / 2),
        slope_at_infinity=INF,
        reference="this test",
    )
    return "root_chi2"


def _family() -> str:
    r"""A family that the catalogue lacks: $f = (u - 1)^2/m$, $m = \mathtt{share}\,u + 1 - \mathtt{share}$."""

    @family(sought=(0.01, 0.99), drawn=(0.05, 0.95), examples=(0.2, 0.7))
    def skew_chi2(share: float) -> Divergence:
        """Pearson's divergence to a mixture."""
        if not 0 < share < 1:
            raise InvalidArgumentError("share", f"must lie in (0, 1), got {share!r}")
        a, b = share, 1 - share

        def inverse(t: Tensor) -> Tensor:
            return mixture_ratio(-t, b, a)

        def ratio(t: Tensor) -> Tensor:
            return mixture_ratio(t, a, b)

        return member(
            "skew_chi2",
            lambda sympy, u: (u - 1) ** 2 / (sympy.Rational(str(share)) * (u - 1) + 1),
            generator=Form(lambda t: torch.expm1(t) ** 2 * inverse(t), 1 / b, INF),
            log_slope=Form(lambda t: torch.expm1(t) * inverse(t) * (torch.exp(t) + ratio(t)), 0.0, INF),
            weight=Form(lambda t: torch.expm1(t) * inverse(t) * (ratio(t) + 1), -1 / b, (1 + a) / a**2),
            curvature=Form(lambda t: 2 * ratio(t) ** 2 * inverse(t), 0.0, 0.0),
            curvature_slope=lambda t: 2 * ratio(t) ** 2 * inverse(t) * (2 * b * inverse(t) - a * ratio(t)),
            slope_at_infinity=1 / a,
            reference="this test",
            parameters={"share": float(share)},
        )

    return "skew_chi2"


@pytest.fixture(params=(_plain, _family), ids=("divergence", "family"))
def label(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The label of an entry that is in the catalogue during one test."""
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    name: str = request.param()
    return "skew_chi2(share=0.3)" if name == "skew_chi2" else name


def _enumerated(student: Tensor, teacher: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    p, q = torch.softmax(student, -1), torch.softmax(teacher, -1)
    return (p * f(q / p)).sum(-1)


def _logits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_it_is_found_by_name_and_label(label: str) -> None:
    d = opd.divergence(label)
    assert d.label == label and d.name in divergences.names()
    assert opd.divergence(d.name, **d.parameters) == d == opd.divergence(d)
    assert (d.name in divergences.families()) == bool(d.parameters)
    found = getattr(divergences, d.name)
    assert found is d if not d.parameters else found(*d.parameters.values()) == found(**d.parameters) == d
    assert copy.deepcopy(d) == pickle.loads(pickle.dumps(d)) == d
    with pytest.raises(InvalidArgumentError, match=f"did you mean '{d.name}'"):
        opd.divergence(d.name + "x")
    with pytest.raises(InvalidArgumentError, match=f"^name: must be new, got '{d.name}'"):
        registry.register(next(each for each in registry.entries() if each.name == d.name))


def test_the_catalogue_forgets_it_after_the_test() -> None:
    for name in ("root_chi2", "skew_chi2", "skew_chi2(share=0.3)"):
        with pytest.raises(InvalidArgumentError, match="^divergence: must be one of "):
            opd.divergence(name)
    assert not hasattr(divergences, "root_chi2")


def test_its_functions_are_those_of_its_generator(label: str) -> None:
    d, t = opd.divergence(label), torch.linspace(-4, 4, 41, dtype=torch.float64)
    own = Divergence.from_expr(d.expr)
    for form in ("generator", "log_slope", "weight", "curvature"):
        torch.testing.assert_close(getattr(d, form)(t), getattr(own, form)(t), rtol=1e-10, atol=1e-14)
    assert d.at_zero == own.at_zero and d.slope_at_infinity == pytest.approx(own.slope_at_infinity, rel=1e-15)
    assert torch.autograd.gradcheck(d.curvature, t.requires_grad_())


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_the_fused_loss_is_the_enumerated_one(label: str, dtype: torch.dtype) -> None:
    d = opd.divergence(label)
    student, teacher = _logits((5, 7), dtype, 1).requires_grad_(), _logits((5, 7), dtype, 2)
    mask = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5], dtype=dtype)
    values = opd.fused_divergence(student, teacher, label, mask)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    wide = student.detach().double().requires_grad_()
    f = sympy.lambdify(divergences.symbol(), d.expr, [{"sqrt": torch.sqrt}])
    expected = mask.double() * _enumerated(wide, teacher.double(), f)
    (slope,) = torch.autograd.grad(expected.sum(), wide)
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(values, expected.to(dtype), rtol=rtol, atol=rtol)
    torch.testing.assert_close(gradient, slope.to(dtype), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_the_fused_loss_takes_narrow_logits(label: str, dtype: torch.dtype) -> None:
    student, teacher = _logits((3, 6), dtype, 3).requires_grad_(), _logits((3, 6), dtype, 4)
    values = opd.fused_divergence(student, teacher, label)
    values.sum().backward()
    wide = opd.fused_divergence(student.detach().double(), teacher.double(), label)
    assert values.dtype == torch.float32 and student.grad is not None and student.grad.dtype == dtype
    torch.testing.assert_close(values, wide.float(), rtol=1e-6, atol=1e-6)
    assert torch.isfinite(student.grad).all() and student.grad.any()


@pytest.mark.skipif(CHECKED, reason="OPDTHEORY_TYPECHECK: the compiler cannot trace the checks")
def test_the_fused_loss_compiles(label: str) -> None:
    student, teacher = _logits((3, 6), torch.float32, 5).requires_grad_(), _logits((3, 6), torch.float32, 6)
    compiled = torch.compile(opd.fused_divergence, backend="aot_eager", fullgraph=True)
    values = compiled(student, teacher, label)
    assert torch.equal(values, opd.fused_divergence(student, teacher, label))
    (gradient,) = torch.autograd.grad(values.sum(), student)
    (expected,) = torch.autograd.grad(opd.fused_divergence(student, teacher, label).sum(), student)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("name", some(("full_vocab", "opd_plus"), 2))
@pytest.mark.slow
def test_audits_name_it(label: str, name: str) -> None:
    loss = opd.estimator(name, label)
    testing.assert_claim(loss)
    report = opd.audit(loss, label, details=False)
    assert report.verdict == "exact"
    for other in ("forward_kl", "skew_jsd(beta=0.1)"):
        report = opd.audit(loss, other, details=False)
        assert report.verdict == "other_objective"
        assert report.descends == label, report.descends


def test_claims_of_other_losses_name_it(label: str) -> None:
    plain = opd.divergence(label)
    if not plain.parameters:  # V[-f] is another divergence: nothing to name
        assert opd.estimator("opd", label).claim.verdict == "biased"


def test_strategies_draw_it(label: str) -> None:
    name = label.split("(")[0]
    settings = hypothesis.settings(max_examples=500, deadline=None, database=None, derandomize=True)
    drawn = hypothesis.find(testing.divergences(), lambda d: d.name == name, settings=settings)
    assert drawn.label == ("skew_chi2(share=0.5)" if drawn.parameters else name)


@pytest.fixture
def kinked(monkeypatch: pytest.MonkeyPatch) -> Divergence:
    """A strictly convex generator with a kink that is in the catalogue during one test."""
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    return entry(
        "kinked",
        lambda sympy, u: (u - 1) ** 2 + sympy.Abs(u - 1),
        generator=Form(lambda t: torch.expm1(t) ** 2 + torch.expm1(t).abs(), 2.0, INF),
        log_slope=Form(lambda t: torch.exp(t) * (2 * torch.expm1(t) + torch.sign(t)), 0.0, INF),
        weight=Form(lambda t: torch.expm1(2 * t) + torch.sign(t), -2.0, INF),
        curvature=Form(lambda t: 2 * torch.exp(2 * t), 0.0, INF),
        curvature_slope=lambda t: 4 * torch.exp(2 * t),
        slope_at_infinity=INF,
        reference="this test",
    )


@pytest.mark.slow
def test_a_generator_with_a_kink_is_one_entry_too(kinked: Divergence) -> None:
    settings = hypothesis.settings(max_examples=300, deadline=None, database=None, derandomize=True)
    assert hypothesis.find(testing.divergences(), lambda d: d is kinked, settings=settings) is kinked
    with pytest.raises(hypothesis.errors.NoSuchExample):
        hypothesis.find(testing.divergences(smooth=True), lambda d: d is kinked, settings=settings)
    loss = opd.estimator("opd_plus", "kinked")
    assert opd.audit(loss, "kinked").verdict == "exact" and opd.audit(loss, "forward_kl").descends == "kinked"


@pytest.mark.parametrize(
    "number",
    ["T2b", *(pytest.param(n, marks=pytest.mark.slow) for n in ("T1", "T2", "T5", "T5b", "T10", "T10b"))],
)
def test_theorems_are_checked_on_it_with_a_kink_too(kinked: Divergence, number: str) -> None:
    assert kinked in catalogue() and kinked not in smooth_catalogue() and strictly_convex(kinked)
    for identity in every_theorem(number)[0].identities:
        assert identity.run().passed, identity.name


@pytest.mark.slow
def test_theorems_are_checked_on_it(label: str) -> None:
    name = label.split("(")[0]
    expected = ["skew_chi2(share=0.2)", "skew_chi2(share=0.7)"] if name == "skew_chi2" else [name]
    assert [d.label for d in catalogue() if d.name == name] == expected
    for theorem in theorems():
        for identity in theorem.identities:
            assert identity.run().passed, (theorem.number, identity.name)


def test_the_table_names_a_weight_that_is_its_own(label: str) -> None:
    d, u = opd.divergence(label), divergences.symbol()
    named = table._named(3 * (divergences.weight_of(d.expr) - divergences.weight_of(d.expr).subs(u, 1)), u)
    assert named == (None if d.parameters else d.name)


def test_a_run_of_training_can_be_asked_for_it(label: str) -> None:
    # The annotation is of what a configuration holds.
    for given in (label,) if CHECKED else (label, opd.divergence(label)):
        config = TrainConfig(divergence=given)
        assert config.divergence == label and TrainConfig.from_dict(config.to_dict()) == config
        assert label in config.loss().label
