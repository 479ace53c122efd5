"""One pair of the panel: the exact gradients of claims about several teachers, an extrapolated one, other histories."""

from __future__ import annotations

import pytest
import torch

from opdtheory.auditing.scenario import Scenario
from opdtheory.divergences import divergence
from opdtheory.errors import InvalidArgumentError
from opdtheory.exact import TabularPolicy, exact_gradient, expected_gradient
from opdtheory.objective import Objective
from opdtheory.testing import gradient_gap
from tests.tolerances import ENUMERATION


def of(name: str, granularity: str = "token_local") -> Objective:
    return Objective.of(divergence(name), granularity)


@pytest.mark.parametrize("weights", [(), (0.7, 0.2, 0.1), (0.25, 0.5, 0.25)])
@pytest.mark.parametrize("eos", [None, 0])
def test_kl_divergences_to_several_teachers_are_those_to_their_mixtures(weights, eos):
    """T16: the geometric mixture for the reverse KL, the arithmetic one for the forward KL; the other one is a twin."""
    for case in Scenario(eos=eos, teachers=3, teacher_weights=weights).pairs()[::2]:
        shares, teachers = zip(*case.targets, strict=True)
        assert shares == (weights or (1 / 3, 1 / 3, 1 / 3)) and teachers[0] is case.teacher
        logs = [[level.log_softmax(-1) for level in teacher.logits] for teacher in teachers]
        levels = list(zip(*logs, strict=True))
        geometric = TabularPolicy([sum(w * q for w, q in zip(shares, qs, strict=True)) for qs in levels], eos)
        mixed = [sum(w * q.exp() for w, q in zip(shares, qs, strict=True)).log() for qs in levels]
        for name, right, wrong in (
            ("reverse_kl", geometric, TabularPolicy(mixed, eos)),
            ("forward_kl", TabularPolicy(mixed, eos), geometric),
        ):
            found = case.exact(of(name))
            assert gradient_gap(found, exact_gradient(case.student, right, name)) <= ENUMERATION
            assert gradient_gap(found, exact_gradient(case.student, wrong, name)) > 1e-3


@pytest.mark.parametrize("lam", [1.5, 0.5, -0.25])
@pytest.mark.parametrize("eos", [None, 1])
def test_the_extrapolated_teacher_is_followed_by_its_reward(lam, eos):
    """T16: the detached reward `lam log(q/b) - log(p/b)` follows the reverse KL to `q^lam b^(1 - lam)`."""
    scenario = Scenario(eos=eos, base=True, extrapolation=lam)
    base = scenario.companions()[1]

    for case in scenario.pairs()[1:3]:
        log_b = [level.log_softmax(-1) for level in base.table(case.teacher).logits]

        def loss(r, factor=lam, log_b=log_b):
            rows = [torch.zeros(len(r.tokens), dtype=torch.int64)]
            for n in range(r.tokens.shape[1] - 1):
                rows.append(rows[-1] * 4 + r.tokens[:, n])
            b = torch.stack([log_b[n][row, r.tokens[:, n]] for n, row in enumerate(rows)], 1)
            reward = factor * (r.teacher_logprobs - b) - (r.student_logprobs - b)
            return r.token_sum(-reward.detach() * r.student_logprobs)

        exact = case.exact(of("reverse_kl"))
        assert gradient_gap(expected_gradient(loss, case.student, case.teacher), exact) <= ENUMERATION
        wrong = expected_gradient(lambda r, loss=loss: loss(r, lam + 0.1), case.student, case.teacher)
        assert gradient_gap(wrong, exact) > 1e-3


@pytest.mark.parametrize("granularity", ["token_return", "sequence"])
@pytest.mark.parametrize(
    "settings",
    [{"student_temperature": 2.0}, {"teacher_temperature": 0.5}, {"off_policy": 0.3, "histories": "sampler"}]
    + [{"sampling_temperature": 2.0}],
)
def test_what_is_defined_for_tokens_only_is_refused_elsewhere(granularity, settings):
    case = Scenario(**settings).pairs()[0]
    assert case.granularities == ("token_local",)
    with pytest.raises(InvalidArgumentError, match="must be token_local") as caught:
        case.exact(of("jsd", granularity))
    assert caught.value.argument == "granularity"


@pytest.mark.parametrize("settings", [{"teachers": 2}, {"base": True, "extrapolation": 1.5}])
def test_several_teachers_are_defined_for_sequences_too(settings):
    case = Scenario(**settings).pairs()[1]
    by_hand = [
        [weight * level for level in exact_gradient(case.student, target, "jsd", "sequence")]
        for weight, target in case.targets
    ]
    found = case.exact(of("jsd", "sequence"))
    assert gradient_gap(found, [sum(levels) for levels in zip(*by_hand, strict=True)]) <= ENUMERATION


@pytest.mark.parametrize(
    "settings",
    [{"student_temperature": 2.0, "teacher_temperature": 2.0}, {"off_policy": 0.4, "histories": "sampler"}]
    + [{"teachers": 3}, {"sampling_temperature": 0.5}, {"eos": 0, "base": True, "extrapolation": 0.5}],
)
def test_the_variance_of_the_whole_vocabulary_is_that_of_its_loss(settings):
    scenario = Scenario(**settings)
    case = scenario.pairs()[2]
    taus = case.student_temperature, case.teacher_temperature
    targets = case.targets or ((1.0, case.teacher),)

    def loss(r):
        rows = [torch.zeros(len(r.tokens), dtype=torch.int64)]
        for n in range(r.tokens.shape[1] - 1):
            rows.append(rows[-1] * 4 + r.tokens[:, n])
        log_p, total = (r.student_logits / taus[0]).log_softmax(-1), torch.zeros_like(r.mask)
        for weight, target in targets:
            z = torch.stack([target.logits[n][row] for n, row in enumerate(rows)], 1)
            total = total + weight * (log_p.exp() * (log_p - (z / taus[1]).log_softmax(-1))).sum(-1)
        return r.token_sum(total)

    found = case.full_vocabulary_variance(divergence("reverse_kl"))
    assert found == pytest.approx(scenario.moments(loss, case).variance, rel=1e-9)
