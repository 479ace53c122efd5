"""The fast forms: against the oracle, autograd of the perspective and float64, each shown to notice a wrong form."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from opdtheory.divergences import Divergence, divergence, symbol
from opdtheory.estimators.vocabulary import perspective
from opdtheory.exact.tree import row_gradient
from opdtheory.kernels.distributions import Distributions
from opdtheory.kernels.forms import Filled, Form, fast_form
from opdtheory.kernels.reference import reference_form
from opdtheory.kernels.sweep import Evaluator, sweep
from tests.tolerances import ALGEBRA

INF = math.inf
LABELS = (
    "reverse_kl forward_kl jsd chi2 neyman_chi2 hellinger total_variation le_cam jeffreys skew_jsd(beta=0.1) "
    "skew_jsd(beta=0.9) alpha(alpha=-2.5) alpha(alpha=-1) alpha(alpha=0) alpha(alpha=0.3) alpha(alpha=0.5) "
    "alpha(alpha=0.7) alpha(alpha=1) alpha(alpha=1.5) alpha(alpha=2) alpha(alpha=3.7) skew_forward_kl(lam=0) "
    "skew_forward_kl(lam=0.1) skew_forward_kl(lam=0.8) skew_reverse_kl(lam=0) skew_reverse_kl(lam=0.1) "
    "skew_reverse_kl(lam=0.8)"
).split()
# Where only the divergence's own functions keep the digits.
SLOW = (
    "skew_jsd(beta=0) skew_jsd(beta=1e-9) skew_jsd(beta=1) alpha(alpha=1e-3) alpha(alpha=0.999) alpha(alpha=5) "
    "skew_forward_kl(lam=1e-9) skew_reverse_kl(lam=0.999)"
).split()
FINITE = [name for name in LABELS if math.isfinite(divergence(name).at_zero + divergence(name).slope_at_infinity)]


def logits(
    *shape: int, spread: float = 2.0, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (spread * torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.to(dtype), teacher.to(dtype)


def form_of(d: Divergence) -> Form:
    form = fast_form(d)
    assert form is not None
    return form


def by_form(
    form: Form, d: Divergence, student: Tensor, teacher: Tensor, dtype: torch.dtype = torch.float64, tau: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Values and gradient of a form whose buffers are of the given dtype."""
    evaluator = Evaluator(d, form, dtype, reference_form(d), 1 / tau)
    values, gradient = torch.empty(student.shape[:-1], dtype=torch.float64), torch.empty_like(student)
    sweep(evaluator, student, teacher, None, None, values, gradient)
    return values, gradient


def by_autograd(d: Divergence, student: Tensor, teacher: Tensor, tau: float = 1.0) -> tuple[Tensor, Tensor]:
    z = student.detach().double().clone().requires_grad_()
    log_p, log_q = torch.log_softmax(z / tau, -1), torch.log_softmax(teacher.double() / tau, -1)
    values = perspective(d, log_p, log_q).sum(-1)
    return values.detach(), torch.autograd.grad(values.sum(), z)[0]


def distance(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> float:
    """The largest difference, over one plus the size of what is wanted."""
    return max(float(((a - b).abs() / (1 + b.abs())).max()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("tau", (1.0, 0.7))
def test_forms_are_the_divergences(name: str, tau: float) -> None:
    d = divergence(name)
    student, teacher = logits(3, 4, 7)
    wanted = by_autograd(d, student, teacher, tau)
    for form in (form_of(d), reference_form(d)):
        assert distance(by_form(form, d, student, teacher, tau=tau), wanted) < ALGEBRA
    log_p, log_q = torch.log_softmax(student / tau, -1), torch.log_softmax(teacher / tau, -1)
    oracle = row_gradient(d, log_p, log_q) / tau
    assert distance((wanted[0], by_form(form_of(d), d, student, teacher, tau=tau)[1]), (wanted[0], oracle)) < ALGEBRA


def _twins(form: Form) -> dict[str, Form]:
    """The form with one thing wrong."""

    def changed(**what: float) -> Form:
        def fill(distributions: Distributions) -> Filled:
            found = form.fill(distributions)
            return Filled(
                found.h * what.get("h", 1.0) + what.get("shift", 0.0) * distributions.p,
                found.value * what.get("value", 1.0),
                found.mean * what.get("mean", 1.0),
            )

        return dataclasses.replace(form, fill=fill)

    other = "mass" if form.kind == "weight" else "weight"
    return {
        "sign of the gradient": dataclasses.replace(form, factor=-form.factor),
        "other kind": dataclasses.replace(form, kind=other),  # type: ignore[arg-type]
        "twice the weight": changed(h=2.0, mean=2.0),
        "a weight that is off": changed(shift=0.1),
        "half the value": changed(value=0.5),
    }


@pytest.mark.parametrize("name", LABELS)
def test_a_wrong_form_is_noticed(name: str) -> None:
    d = divergence(name)
    student, teacher = logits(3, 4, 7)
    wanted = by_autograd(d, student, teacher)
    for what, twin in _twins(form_of(d)).items():
        assert distance(by_form(twin, d, student, teacher), wanted) > 1e-4, what


def test_a_gradient_without_its_mean_is_noticed() -> None:
    """The mean vanishes for masses in the gauge of their own, so only weights show it."""
    for name in ("jsd", "reverse_kl", "le_cam", "skew_reverse_kl(lam=0.1)"):
        d = divergence(name)
        form = form_of(d)
        twin = dataclasses.replace(
            form, fill=lambda distributions, form=form: form.fill(distributions)._replace(mean=0.0)
        )
        student, teacher = logits(3, 4, 7)
        assert distance(by_form(twin, d, student, teacher), by_autograd(d, student, teacher)) > 1e-3


@pytest.mark.parametrize("name", SLOW)
def test_parameters_at_the_ends_are_left_to_the_reference_form(name: str) -> None:
    assert fast_form(divergence(name)) is None


def test_own_divergences_are_left_to_the_reference_form() -> None:
    u = symbol()
    own = Divergence.from_expr((u - 1) ** 2 / (u + 2), name="jsd")
    assert fast_form(own) is None
    student, teacher = logits(2, 5)
    found = by_form(reference_form(own), own, student, teacher)
    assert distance(found, by_autograd(own, student, teacher)) < ALGEBRA
    assert distance(found, by_autograd(divergence("jsd"), student, teacher)) > 1e-3


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("offset", (0.0, 30.0, -200.0, 1e4))
def test_float32_is_as_good_as_said(name: str, offset: float) -> None:
    """Realistic rows: the logits are taken as they are, so that only the arithmetic is measured."""
    d = divergence(name)
    student, teacher = logits(20, 500, spread=3.0, dtype=torch.float32)
    # Exactly representable, so that both are the same distributions at any offset.
    student, teacher = ((64 * z).round() / 64 for z in (student, 0.7 * student + 0.5 * teacher))
    found = by_form(form_of(d), d, student, teacher + offset, torch.float32)
    values, gradient = by_autograd(d, student, teacher + offset)
    log_u = torch.log_softmax(teacher.double(), -1) - torch.log_softmax(student.double(), -1)
    largest = float(d.weight(log_u).abs().max().clamp(min=1))
    assert float((found[0] - values).abs().max()) < 2e-6 * max(1.0, float(values.max()))
    p = torch.softmax(student.double(), -1)
    assert float(((found[1] - gradient).abs() / p).max()) < 2e-6 * largest


@pytest.mark.parametrize("name", LABELS)
def test_at_the_teacher_nothing_is_left(name: str) -> None:
    d = divergence(name)
    student, _ = logits(5, 300, spread=4.0, dtype=torch.float32)
    values, gradient = by_form(form_of(d), d, student, student.clone(), torch.float32)
    assert float(values.abs().max()) < 1e-20
    assert float(gradient.abs().max()) < 1e-20


@pytest.mark.parametrize("name", [name for name in LABELS if divergence(name).name != "total_variation"])
def test_near_the_teacher_values_keep_digits(name: str) -> None:
    """In the gauge f'(1) = 0 an error of a normaliser counts to second order (T3); the values are about 5e-9."""
    d = divergence(name)
    student, noise = logits(20, 2000, spread=1.0)
    student, teacher = student.float(), (student + 1e-4 * noise).float()
    values, _ = by_form(form_of(d), d, student, teacher, torch.float32)
    exact, _ = by_autograd(d, student, teacher)
    assert float((values - exact).abs().max()) < 3e-8


def test_without_the_gauge_digits_would_be_lost() -> None:
    """The false twin: forward KL as the sum of q log u."""
    d = divergence("forward_kl")
    student, noise = logits(20, 2000, spread=1.0)
    student, teacher = student.float(), (student + 1e-4 * noise).float()
    log_p, log_q = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    plain = (log_q.exp() * (log_q - log_p)).sum(-1)
    assert float((plain - by_autograd(d, student, teacher)[0]).abs().max()) > 5e-8


def _extreme_rows() -> tuple[Tensor, Tensor]:
    huge = torch.finfo(torch.float32).min
    rows = [
        ([0.0, 1.0, -INF, 2.0], [1.0, 0.0, -INF, -1.0]),  # neither distribution has the token
        ([0.0, 1.0, -INF, 2.0], [1.0, 0.0, 0.5, -1.0]),
        ([0.0, 1.0, 0.3, 2.0], [1.0, 0.0, -INF, -1.0]),
        ([0.0, -INF, -INF, -INF], [-INF, 0.0, -INF, -INF]),  # no token in common
        ([0.0, 0.0, -INF, -INF], [0.0, -INF, 0.0, -INF]),
        ([5.0, -INF, -INF, -INF], [-3.0, -INF, -INF, -INF]),
        ([0.0, 90.0, -90.0, 3.0], [90.0, 0.0, -95.0, 3.0]),
        ([0.0, 150.0, -90.0, 3.0], [1.0, 0.0, 150.0, 3.0]),
        ([0.0, 1.0, huge, 2.0], [1.0, 0.0, huge, -1.0]),
        ([0.0, 1.0, 2.0, 3.0], [1e4, 0.0, 0.0, 0.0]),
        ([-150.0, -151.0, -152.0, -153.0], [150.0, 151.0, 150.5, 149.0]),
    ]
    student, teacher = zip(*rows, strict=True)
    return torch.tensor(student), torch.tensor(teacher)


@pytest.mark.parametrize("name", LABELS)
def test_extremes_are_as_the_perspective_has_them(name: str) -> None:
    d = divergence(name)
    student, teacher = _extreme_rows()
    for rows in (slice(None), *(slice(i, i + 1) for i in range(len(student)))):
        values, gradient = by_form(form_of(d), d, student[rows], teacher[rows], torch.float32)
        exact, slope = by_autograd(d, student[rows], teacher[rows])
        assert not bool(values.isnan().any()) and not bool(gradient.isnan().any())
        # Where f(u) alone overflows the perspective is inf, which its product with p need not be.
        known = exact < 1e30 if d.name in ("chi2", "neyman_chi2", "alpha") else torch.ones_like(exact, dtype=torch.bool)
        assert torch.equal(torch.isinf(values)[known], torch.isinf(exact)[known])
        finite = known & torch.isfinite(exact)
        scale = 1 + exact[finite]
        assert bool(((values - exact)[finite].abs() < 3e-6 * scale).all())
        # Where both distributions have a token alike, the sign of log u is that of rounding.
        if d.name != "total_variation":
            assert bool(((gradient - slope)[finite].abs() < 5e-6 * scale.unsqueeze(-1)).all())


@pytest.mark.parametrize("name", FINITE)
def test_absent_tokens_have_exactly_no_gradient(name: str) -> None:
    d = divergence(name)
    student, teacher = _extreme_rows()
    _, gradient = by_form(form_of(d), d, student, teacher, torch.float32)
    assert bool((gradient[torch.isneginf(student)] == 0).all())


def test_reference_form_of_huge_ratios() -> None:
    """Beyond the range of exp, f(u)/u is its limit or a straight line in log u; the false twin stops at the end."""
    student, teacher = torch.tensor([[0.0, -1e6]], dtype=torch.float64), torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    values = {name: float(by_form(reference_form(d), d, student, teacher)[0]) for name, d in _named("forward_kl jsd")}
    assert values["forward_kl"] == pytest.approx(0.5 * 1e6 - math.log(2), rel=1e-14)
    assert values["forward_kl"] != pytest.approx(0.5 * 700, rel=0.5)
    # p = (1, 0), q = (1/2, 1/2): m = (3/4, 1/4)
    wanted = 0.5 * (0.5 * math.log(2 / 3) + 0.5 * math.log(2)) + 0.5 * math.log(4 / 3)
    assert values["jsd"] == pytest.approx(wanted, rel=1e-14)


def _named(names: str) -> list[tuple[str, Divergence]]:
    return [(name, divergence(name)) for name in names.split()]
