"""The token-local objective at other histories and temperatures, against its definition differentiated by autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from opdtheory.divergences import divergence
from opdtheory.errors import InvalidArgumentError
from opdtheory.exact import Enumeration, TabularPolicy, exact_gradient, random_pair
from opdtheory.exact.companions import softened
from opdtheory.exact.histories import local_gradient
from opdtheory.testing import gradient_gap
from tests.tolerances import ALGEBRA, ENUMERATION

TEMPERATURES = [(1.0, 1.0), (2.0, 2.0), (0.5, 1.0), (1.0, 3.0), (1.5, 0.7)]


def by_definition(
    student: TabularPolicy, teacher: TabularPolicy, name: str, histories: TabularPolicy, taus: tuple[float, float]
) -> list[Tensor]:
    """Autograd of the sum over all sequences, each prefix weighted by the sequences that continue it."""
    leaves = [z.clone().requires_grad_() for z in student.logits]
    everything = Enumeration.build(TabularPolicy(leaves, student.eos, student.environment), teacher, histories)
    rollouts = everything.rollouts()
    log_p = (rollouts.student_logits / taus[0]).log_softmax(-1)
    log_q = (rollouts.teacher_logits / taus[1]).log_softmax(-1)
    rows = (log_p.exp() * divergence(name).generator(log_q - log_p)).sum(-1)
    value = (everything.probability.unsqueeze(-1) * rollouts.mask * rows).sum()
    found = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    return [torch.where(torch.isfinite(g), g, 0.0) for g in found]


@pytest.mark.parametrize("taus", TEMPERATURES)
@pytest.mark.parametrize("name", ["forward_kl", "jsd", "9*reverse_kl + forward_kl"])
@pytest.mark.parametrize("eos", [None, 0])
def test_the_gradient_is_that_of_the_definition(name, taus, eos):
    student, teacher = random_pair(3, 3, eos=eos, seed=4)
    sampler = student.perturbed(0.8, seed=9)
    found = local_gradient(student, teacher, name, sampler, *taus)
    assert gradient_gap(found, by_definition(student, teacher, name, sampler, taus)) <= ENUMERATION
    # Twins: the student's own histories, and one temperature left out.
    assert gradient_gap(local_gradient(student, teacher, name, None, *taus), found) > 1e-3
    if taus[0] != 1.0:
        assert gradient_gap(local_gradient(student, teacher, name, sampler, 1.0, taus[1]), found) > 1e-3
    if taus[1] != 1.0:
        assert gradient_gap(local_gradient(student, teacher, name, sampler, taus[0]), found) > 1e-3


@pytest.mark.parametrize("eos", [None, 1])
def test_positions_of_an_environment_have_no_gradient(eos):
    student, teacher = random_pair(3, 3, eos=eos, seed=2, environment=(0, 1))
    found = local_gradient(student, teacher, "chi2", None, 2.0, 2.0)
    assert gradient_gap(found, by_definition(student, teacher, "chi2", student, (2.0, 2.0))) <= ENUMERATION
    assert float(found[0].abs().max()) == float(found[1].abs().max()) == 0.0


@pytest.mark.parametrize("name", ["reverse_kl", "hellinger", "skew_jsd(beta=0.1)"])
def test_without_a_setting_it_is_the_token_local_objective(name):
    pair = random_pair(4, 3, eos=2, seed=1)
    assert gradient_gap(local_gradient(*pair, name), exact_gradient(*pair, name)) <= ALGEBRA


def test_a_softened_pair_at_its_own_histories_is_a_pair_of_its_own():
    """At the softened student's histories, the gradient in its logits is tau times that in the student's."""
    student, teacher = random_pair(3, 3, seed=6)
    soft = softened(student, 2.0), softened(teacher, 2.0)
    own = [level / 2.0 for level in exact_gradient(*soft, "jsd")]
    assert gradient_gap(local_gradient(student, teacher, "jsd", soft[0], 2.0, 2.0), own) <= ALGEBRA


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
@pytest.mark.parametrize("which", ["student_temperature", "teacher_temperature"])
def test_a_temperature_that_is_not_positive_is_refused(which, temperature):
    with pytest.raises(InvalidArgumentError) as caught:
        local_gradient(*random_pair(3, 2), "jsd", **{which: temperature})
    assert caught.value.argument == which
