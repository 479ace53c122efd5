"""Hunting counterexamples to T6 and T11 over random divergences, policies, horizons, discounts and batches."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opdtheory import exact_gradient, exact_value, expected_gradient
from opdtheory.estimators import estimator
from opdtheory.exact import TabularPolicy, enumerated_value, random_pair
from opdtheory.testing import divergences, gradient_gap, policies, policy_pairs
from opdtheory.theorems.instances.batches import Atoms, Moments, batch_mean, first_order
from opdtheory.theorems.instances.cases import autograd_gradient
from opdtheory.theorems.instances.trees import Dual, Linear, field_of, gradient_of, rational_tree, trees
from opdtheory.theorems.sequences.return_to_go import practised_field
from tests.tolerances import ENUMERATION

SMALL = policy_pairs(vocab_size=(2, 3), horizon=(1, 3))
LONGER = policy_pairs(vocab_size=(2, 3), horizon=(2, 3), distinct=True)
DISCOUNTS = st.sampled_from((0.0, 0.3, 0.9, 1.0))


def same(actual, expected) -> bool:
    # Far pairs reach ratios of e^12 over three tokens; the gap is relative to the larger of one and the gradient.
    return gradient_gap(actual, expected) <= ENUMERATION


def minus(left, right):
    return [a - b for a, b in zip(left, right, strict=True)]


def by_autograd(pair, d, objective, gamma=1.0):
    return autograd_gradient(pair, lambda s: enumerated_value(s, pair[1], d, objective, gamma))


def far_pair(eos=None):
    return random_pair(2, 3, eos=eos, distance=1.5, seed=8)


# T6a.


def return_to_go_is(pair, d, gamma, discounted) -> bool:
    loss = estimator("return_to_go", d, gamma=gamma, discounted=discounted)
    return same(expected_gradient(loss, *pair), by_autograd(pair, d, "token_return", gamma))


@given(SMALL, divergences(), DISCOUNTS)
def test_weights_of_both_objectives(pair, d, gamma):
    assert return_to_go_is(pair, d, gamma, discounted=True)
    assert same(expected_gradient(estimator("sequence_opd_plus", d), *pair), by_autograd(pair, d, "sequence"))


def test_the_outer_discount_is_needed():
    assert not return_to_go_is(far_pair(), "jsd", 0.3, discounted=False)


# T6b.


def gap_is(pair, d, sign) -> bool:
    def later(r):
        rewards = torch.where(r.mask > 0, d.generator(r.log_u.detach()), 0.0)
        return r.token_sum(sign * (rewards.sum(-1, keepdim=True) - rewards.cumsum(-1)) * r.student_logprobs)

    gap = minus(exact_gradient(*pair, d, "token_return"), exact_gradient(*pair, d, "token_local"))
    return same(gap, expected_gradient(later, *pair))


@given(SMALL, divergences())
def test_gap_of_the_per_token_weight(pair, d):
    assert gap_is(pair, d, 1)


@given(divergences())
def test_the_gap_has_this_sign(d):
    assert not gap_is(far_pair(), d, -1)


# T6c and T6h.


def coincide(pair, d) -> bool:
    values = [[exact_value(*pair, d, objective)] for objective in ("token_return", "sequence")]
    gradients = [exact_gradient(*pair, d, objective) for objective in ("token_return", "sequence")]
    return same(*values) and same(*gradients)


@given(SMALL)
def test_chain_rule_of_the_reverse_kl(pair):
    assert coincide(pair, "reverse_kl")


@given(divergences())
def test_nothing_else_adds_up(d):
    log_u = torch.tensor([-2.0, 0.0, 2.0], dtype=torch.float64)
    # u^2 f'' is constant for the reverse KL alone; the kink of the total variation hides its curvature.
    curvature = d.curvature(log_u)
    is_reverse = d.name != "total_variation" and float(curvature.max() - curvature.min()) < 1e-9
    assert coincide(far_pair(), d) == is_reverse


# T6d.


def student_prefix_weight_is(pair, power) -> bool:
    def loss(r):
        log_u = r.log_u.detach() * r.mask
        before = (log_u.cumsum(-1) - log_u) * power
        return r.token_sum(-(before + log_u).exp() * r.student_logprobs)

    return same(expected_gradient(loss, *pair), exact_gradient(*pair, "forward_kl", "sequence"))


@given(SMALL)
def test_forward_kl_weights_prefixes_by_their_ratio(pair):
    assert student_prefix_weight_is(pair, 1)


def test_student_prefixes_are_another_objective():
    assert not student_prefix_weight_is(far_pair(), 0)


# T6e.


def padding_is_ignored(pair, d, masked) -> bool:
    loss = estimator("return_to_go", d, gamma=1.0)

    def seen(r):
        return loss(r if masked else dataclasses.replace(r, mask=torch.ones_like(r.mask)))

    return same(expected_gradient(seen, *pair), by_autograd(pair, d, "token_return"))


@given(policy_pairs(vocab_size=(2, 3), horizon=(1, 3), eos=0), divergences())
def test_nothing_follows_the_end(pair, d):
    assert padding_is_ignored(pair, d, masked=True)
    # Cutting both distributions earlier never raises their divergence.
    cut = [
        float(exact_value(*(TabularPolicy(p.logits[:cap], eos=0) for p in pair), d, "sequence"))
        for cap in range(1, pair[0].horizon + 1)
    ]
    assert all(later >= earlier - 1e-12 * max(1.0, later) for earlier, later in zip(cut, cut[1:], strict=False))


def test_padding_that_counts_is_seen():
    assert not padding_is_ignored(far_pair(eos=0), "jsd", masked=False)


# T6f.


def environment_is(pair, world, d, masked) -> bool:
    played, judged = (TabularPolicy([p.logits[0], world, p.logits[2]]) for p in pair)
    own = torch.tensor([1.0, 0.0 if masked else 1.0, 1.0], dtype=torch.float64)
    loss = estimator("sequence_opd_plus", d)
    found = expected_gradient(lambda r: loss(dataclasses.replace(r, mask=r.mask * own)), *pair, behavior=played)
    truth = by_autograd((played, judged), d, "sequence")
    return same(found, [truth[0], torch.zeros_like(truth[1]), truth[2]])


@given(policy_pairs(vocab_size=2, horizon=3, eos=None), policies(vocab_size=2, horizon=2, eos=None), divergences())
def test_an_environment_has_neither_score_nor_reward(pair, world, d):
    assert environment_is(pair, world.logits[1], d, masked=True)


def test_an_environment_that_is_scored_is_seen():
    assert not environment_is(far_pair(), random_pair(2, 2, seed=9)[0].logits[1], "jsd", masked=False)


@given(st.integers(0, 10**6), st.sampled_from((None, 0)), st.sampled_from(((), (0,), (1,))))
def test_the_same_in_fractions_with_f_free(seed, eos, environment):
    tree = rational_tree(2, 3, eos, environment, seed)

    def weight(t, y, us, n):
        total = us[n].weight()
        for u in us[n + 1 :]:
            total = total - u.f()
        return total

    assert [g.value for g in field_of(tree, weight)] == gradient_of(tree, "token_return")
    everywhere = field_of(tree, weight, scored=lambda t, history: True)
    assert ([g.value for g in everywhere] == gradient_of(tree, "token_return")) == (not tree.world)


def test_trees_are_normalised():
    for tree in (*trees(), rational_tree(2, 3, 1, (1,), seed=7)):
        assert sum(p.value for _, p, _ in tree.walk(tree.rows(None))) == 1
        assert all(sum((p.slope for _, p, _ in tree.walk(tree.rows(seed))), Fraction(0)) == 0 for seed in tree.logits)


# T6g.


def asymmetry(pair, d, gamma, outer) -> float:
    at = torch.cat([z.flatten() for z in pair[0].logits])
    jacobian = torch.autograd.functional.jacobian(practised_field(pair, d, gamma, outer), at)
    return float((jacobian - jacobian.T).abs().max()) / max(1.0, float(jacobian.abs().max()))


@given(SMALL, divergences(smooth=True), DISCOUNTS)
def test_with_the_outer_discount_it_is_a_gradient(pair, d, gamma):
    assert asymmetry(pair, d, gamma, outer=True) <= ENUMERATION


@given(divergences(smooth=True), DISCOUNTS)
def test_as_practised_it_is_none_unless_undiscounted(d, gamma):
    assert (asymmetry(far_pair(), d, gamma, outer=False) <= ENUMERATION) == (gamma == 1.0)


# T11.

PARTS = st.lists(st.tuples(st.integers(-5, 5), st.integers(1, 6), st.integers(1, 5)), min_size=2, max_size=3)


def atoms_of(parts) -> Atoms:
    total = sum(chance for _, _, chance in parts)
    numerators, lengths, chances = zip(*parts, strict=True)
    return Atoms(tuple(map(Fraction, numerators)), lengths, tuple(Fraction(c, total) for c in chances))


def left_over(atoms, size, *terms):
    m = Moments.of(atoms)
    expansion = m.n / m.l + sum((term(m) / size**k for k, term in enumerate(terms, 1)), Fraction(0))
    return batch_mean(atoms, size, "token_mean") - expansion


def is_the_expansion(atoms, term) -> bool:
    """Whether what is left, times the batch, falls with the batch: less than the term itself by one order."""
    scaled = [abs(left_over(atoms, size, term)) * size for size in (8, 64)]
    return scaled[1] <= scaled[0] / 3 + Fraction(1, 10**3)


@given(PARTS)
def test_the_expansion_leaves_one_order_less(parts):
    atoms = atoms_of(parts)
    assert is_the_expansion(atoms, first_order)
    assert batch_mean(atoms, 8, "token_sum") == Moments.of(atoms).n


@pytest.mark.parametrize("factor", [0, Fraction(1, 2), -1])
def test_no_other_term_does(factor):
    assert not is_the_expansion(atoms_of([(1, 1, 1), (-2, 3, 2)]), lambda m: factor * first_order(m))


def summed_is_exact(pair, d, reduction) -> bool:
    loss = estimator("opd_plus", d, reduction=reduction)
    return same(expected_gradient(loss, *pair, batch_size=2), exact_gradient(*pair, d))


@given(policy_pairs(vocab_size=2, horizon=(1, 3), eos=0), divergences())
def test_a_sum_over_tokens_is_unbiased(pair, d):
    assert summed_is_exact(pair, d, "token_sum")


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_a_mean_over_tokens_is_not(reduction):
    assert not summed_is_exact(far_pair(eos=0), "jsd", reduction)


def leaves_the_teacher_alone(student, d, name, reduction) -> bool:
    found = expected_gradient(estimator(name, d, reduction=reduction), student, student, batch_size=2)
    return same(found, [torch.zeros_like(g) for g in found])


@given(policies(vocab_size=2, horizon=(1, 3), eos=0), divergences(), st.sampled_from(("token_mean", "sequence_mean")))
def test_centred_weights_leave_the_teacher_alone_under_a_mean(student, d, reduction):
    assert leaves_the_teacher_alone(student, d, "opd_plus_centred", reduction)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_other_weights_do_not(reduction):
    assert not leaves_the_teacher_alone(far_pair(eos=0)[0], "reverse_kl", "opd_plus", reduction)


def sequence_mean_descends(pair, d, power) -> bool:
    def value(student):
        from opdtheory.exact import Enumeration

        r = Enumeration.build(student, pair[1]).rollouts()
        chance = (r.mask * r.student_logprobs).sum(-1).exp()
        return (chance * d.generator((r.mask * r.log_u).sum(-1)) / r.mask.sum(-1) ** power).sum()

    loss = estimator("sequence_opd_plus", d, reduction="sequence_mean")
    return same(expected_gradient(loss, *pair), autograd_gradient(pair, value))


@given(policy_pairs(vocab_size=2, horizon=(1, 3), eos=0), divergences())
def test_a_mean_over_each_rollout_weighs_it_by_its_length(pair, d):
    assert sequence_mean_descends(pair, d, 1)


@given(divergences())
def test_it_is_not_the_divergence_itself(d):
    assert not sequence_mean_descends(far_pair(eos=0), d, 0)


def test_dual_numbers_differentiate():
    x, y = Dual(Fraction(2), Fraction(3)), Dual(Fraction(5), Fraction(-1, 2))
    assert x + y == Dual(Fraction(7), Fraction(5, 2)) and x - y == Dual(Fraction(-3), Fraction(7, 2))
    assert x * y == Dual(Fraction(10), Fraction(14)) and x.under(Fraction(4)) == Dual(Fraction(2), Fraction(-3))
    # T1b: the weight's slope is u f''.
    assert x.weight().slope == Linear({(2, Fraction(2)): Fraction(6)})
    assert x.weight().value == Linear({(1, Fraction(2)): Fraction(2), (0, Fraction(2)): Fraction(-1)})
