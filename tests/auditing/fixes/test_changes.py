"""Changes to a black box are the changes that they say they are."""

from __future__ import annotations

import torch
from torch import Tensor

from opdtheory.auditing.fixes import changes
from opdtheory.auditing.scenario import Case
from opdtheory.exact import Enumeration, Loss, gradient_moments, random_pair
from tests.auditing.fixes.losses import k1_loss, over_padding, zoo
from tests.tolerances import ENUMERATION


def one_case(off_policy: float = 0.0) -> Case:
    student, teacher = random_pair(3, 3, eos=0, scale=1.0, distance=1.0, seed=3)
    return Case(student, teacher, student.perturbed(off_policy, seed=4) if off_policy else None, "one")


def gradient(loss: Loss, case: Case) -> Tensor:
    mean = gradient_moments(loss, case.student, case.teacher, 1, case.behavior).mean
    return torch.cat([level.flatten() for level in mean])


def test_weighted_tokens_multiply_each_term() -> None:
    """Against a loss that carries its importance weight inside, on logits and on log-probabilities alike."""
    from opdtheory.estimators.offpolicy import importance_weight, prefix_weight

    case = one_case(0.4)
    for inside, plain, weight in (
        (zoo("k2_loss", importance="prefix"), zoo("k2_loss"), lambda r: importance_weight(r, "prefix")),
        (zoo("full_vocab", "jsd", importance="prefix"), zoo("full_vocab", "jsd"), prefix_weight),
    ):
        expected = gradient(inside, case)
        actual = gradient(changes.weighted_tokens(plain, weight), case)
        torch.testing.assert_close(actual, expected, rtol=0, atol=ENUMERATION)
        assert float((gradient(plain, case) - expected).norm()) > 1e-3


def test_value_as_reward_reads_each_token_alone() -> None:
    case = one_case()
    rollouts = Enumeration.build(case.student, case.teacher).rollouts()
    for loss in (k1_loss, lambda r: r.token_mean(-r.log_u), lambda r: r.sequence_mean(-r.log_u)):
        values = changes.token_values(loss, rollouts)
        torch.testing.assert_close(values, torch.where(rollouts.mask > 0, -rollouts.log_u.detach(), 0.0))
        actual = gradient(changes.value_as_reward(loss), case)
        torch.testing.assert_close(actual, gradient(zoo("k1_reward"), case), rtol=0, atol=ENUMERATION)


def test_values_as_a_reward_keep_the_reduction_of_the_whole_loss() -> None:
    """A loss with terms that single tokens do not show has none."""
    case = one_case()
    everything = Enumeration.build(case.student, case.teacher)
    batches = [everything.rollouts(torch.tensor(some)) for some in ([0, 5, 9], [3, 11, 1])]
    for reduction in ("token_sum", "token_mean", "sequence_mean"):
        assert (
            changes.reduction_of_values(lambda r, how=reduction: getattr(r, how)(-r.log_u), batches, ENUMERATION)
            == reduction
        )
    assert changes.reduction_of_values(lambda r: r.token_sum(r.log_u - r.log_u.flip(0)), batches, ENUMERATION) is None


def test_hidden_padding_gets_no_gradient() -> None:
    case = one_case()
    everything = Enumeration.build(case.student, case.teacher)
    for loss, leaks in ((over_padding, True), (changes.padding_hidden(over_padding), False)):
        logits = everything.gather_logits(everything.student_tables).detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss(everything.rollouts(student_logits=logits)), logits)
        assert bool((slope[everything.mask == 0] != 0).any()) == leaks
