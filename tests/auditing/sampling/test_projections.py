"""Controls of known expectation, and the directions along which a gradient is looked at."""

from __future__ import annotations

import pytest
import torch

import opdtheory as opd
from opdtheory.auditing.sampling.projections import controls, directions, fit_controls
from opdtheory.auditing.scenario import Case
from opdtheory.exact import Enumeration, exact_gradient
from opdtheory.exact.sampling import Sample, Sampler
from tests.auditing.sampling.pairs import small_case


@pytest.mark.parametrize("off_policy", [0.0, 0.5])
@pytest.mark.parametrize("granularity", ["token_local", "token_return", "sequence"])
def test_controls_have_the_expectation_they_claim(granularity: str, off_policy: float) -> None:
    """By spelling out every sequence; a control without its importance weights fails the same check."""
    case = small_case(3, 3, eos=0, off_policy=off_policy, seed=4)
    sampler = Sampler.build(case.student, case.teacher, case.behavior)
    everything = Enumeration.build(case.student, case.teacher, case.behavior)
    rows = everything.rows + torch.tensor([0, 1, 4])
    sample = Sample(everything.rollouts(), rows)
    weight = (everything.probability * len(everything)).view(-1, 1, 1)

    def expectation(control) -> torch.Tensor:
        return sampler.scatter(rows, weight * control.gradient(sample)).flatten()

    divergence = opd.divergence("jsd")
    found = controls(case, sampler, divergence, granularity, 0.7 if granularity == "token_return" else 1.0, 1)
    for control in found:
        torch.testing.assert_close(expectation(control), control.mean, rtol=0, atol=1e-12)
    if off_policy:
        careless = controls(
            Case(case.student, case.teacher, None, ""), Sampler.build(case.student, case.teacher), divergence,
            "token_local", 1.0, 1,
        )  # fmt: skip
        assert float((expectation(careless[0]) - careless[0].mean).abs().max()) > 1e-3


def test_the_control_of_a_baseline_has_expectation_zero() -> None:
    """Over all ordered pairs of sequences."""
    case = small_case(2, 2, eos=0, seed=2)
    sampler, everything = Sampler.build(case.student, case.teacher), Enumeration.build(case.student, case.teacher)
    control = controls(case, sampler, opd.divergence("jsd"), "token_local", 1.0, 2)[-2]
    total = torch.zeros_like(control.mean)
    for i in range(len(everything)):
        for j in range(len(everything)):
            index = torch.tensor([i, j])
            rows = everything.rows[index] + torch.tensor([0, 1])
            part = control.gradient(Sample(everything.rollouts(index), rows))
            assert float(part.abs().max()) > 0.0
            total += everything.probability[index].prod() * sampler.scatter(rows, part).flatten()
    assert float(total.abs().max()) < 1e-14


def test_directions_are_orthonormal_and_begin_with_the_exact_gradient() -> None:
    case = small_case(3, 3, eos=0)
    sampler = Sampler.build(case.student, case.teacher)
    exact, other = (sampler.stack(exact_gradient(case.student, case.teacher, n)).flatten() for n in ("jsd", "chi2"))
    basis = directions(sampler, exact, [other, exact], torch.Generator().manual_seed(0))
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis), dtype=basis.dtype), rtol=0, atol=1e-12)
    torch.testing.assert_close(basis[0], exact / exact.norm())
    assert float((other - basis[:2].T @ (basis[:2] @ other)).norm()) < 1e-10


def test_fit_controls_finds_the_combination() -> None:
    generator = torch.Generator().manual_seed(0)
    known = torch.randn(20, 3, 5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        fit_controls(2.0 * known[:, 1] + 4.0, known, 1e-10), torch.tensor([0.0, 2.0, 0.0], dtype=torch.float64)
    )
    mixed = known[:, 0] - 0.5 * known[:, 2]
    torch.testing.assert_close(fit_controls(mixed, known, 1e-10), torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64))
    known[:, 1] = known[:, 0]
    factors = fit_controls(mixed, known, 1e-10)
    assert float(factors[0] + factors[1]) == pytest.approx(1.0)
