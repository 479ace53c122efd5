"""Losses of whole distributions and of their likeliest tokens: zero probabilities, wide ratios, narrow dtypes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from opdtheory import divergences
from opdtheory.errors import InvalidArgumentError
from opdtheory.estimators import Estimator, estimator
from opdtheory.estimators.vocabulary import perspective
from opdtheory.exact import (
    TabularPolicy,
    exact_gradient,
    expected_gradient,
    gradient_moments,
    least_variance,
    local_gradient,
    random_pair,
)
from opdtheory.rollouts import Payload, Rollouts
from opdtheory.testing import gradient_gap
from tests.estimators.pairs import error, three_tokens, value_of, with_zeros
from tests.tolerances import ALGEBRA


def test_zero_probabilities_follow_the_conventions() -> None:
    half_log = 0.5 * math.log(2)
    # p = (1/2, 1/2, 0, 0), q = (1/2, 0, 1/2, 0): one shared token, one of each kind, one of neither.
    rollouts = with_zeros([0.5, 0.5, 0.0, 0.0], [0.5, 0.0, 0.5, 0.0])
    loss = estimator("full_vocab", "jsd")(rollouts)
    assert float(loss.detach()) == pytest.approx(0.5 * half_log + 0.5 * half_log, abs=ALGEBRA)
    (grad,) = torch.autograd.grad(loss, rollouts.student_logits, retain_graph=True)
    # By hand: weights w(1) = 0 and w(0) = -f(0) = -log(2)/2.
    wanted = torch.tensor([-0.25 * half_log, 0.25 * half_log, 0.0, 0.0], dtype=torch.float64)
    assert error(grad.reshape(-1), wanted) < ALGEBRA
    for name in ("forward_kl", "reverse_kl"):
        infinite = estimator("full_vocab", name)(rollouts)
        assert float(infinite.detach()) == math.inf
        assert torch.isfinite(torch.autograd.grad(infinite, rollouts.student_logits, retain_graph=True)[0]).all()


@pytest.mark.parametrize("kind", ["topk_truncated", "topk_tail", "topk_renormalised", "topk_reward"])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 9])
def test_top_k_with_zero_probabilities_is_finite(kind: str, k: int) -> None:
    rollouts = with_zeros([0.6, 0.4, 0.0, 0.0], [0.7, 0.3, 0.0, 0.0])
    value = estimator(kind, "jsd", k=k)(rollouts)
    (grad,) = torch.autograd.grad(value, rollouts.student_logits)
    assert torch.isfinite(value)
    assert torch.isfinite(grad).all()


def test_top_k_of_the_whole_vocabulary_is_the_whole_divergence() -> None:
    rollouts = three_tokens(mask=[1.0, 1.0, 1.0])
    full = value_of(estimator("full_vocab", "jsd"), rollouts)
    for kind in ("topk_truncated", "topk_renormalised", "topk_tail"):
        for k in (4, 7):
            assert value_of(estimator(kind, "jsd", k=k), rollouts) == pytest.approx(full, abs=ALGEBRA)
    tail = [value_of(estimator("topk_tail", "jsd", k=k), rollouts) for k in (1, 2, 3)]
    assert tail[0] < tail[1] < tail[2] == pytest.approx(full, abs=ALGEBRA)  # data processing; k = V - 1 loses nothing


def test_top_k_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.15, 0.05]).double(), torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    rollouts = with_zeros(p.tolist(), q.tolist())

    def kl(a: Tensor, b: Tensor) -> float:
        return float((a * torch.log(a / b)).sum())

    def of(kind: str, support: str) -> float:
        return value_of(estimator(kind, "reverse_kl", k=2, support=support), rollouts)

    for support, (i, j) in (("teacher", (2, 4)), ("student", (0, 2))):
        a, b = p[i:j], q[i:j]
        assert of("topk_truncated", support) == pytest.approx(kl(a, b))
        assert of("topk_renormalised", support) == pytest.approx(kl(a / a.sum(), b / b.sum()))
        rest = torch.stack([1 - a.sum()]), torch.stack([1 - b.sum()])
        assert of("topk_tail", support) == pytest.approx(kl(a, b) + kl(*rest))


def test_renormalising_over_impossible_tokens_is_refused() -> None:
    rollouts = with_zeros([0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5])
    words = "support: must hold a token that the student can write, got 2 of probability zero"
    with pytest.raises(InvalidArgumentError, match=words):
        estimator("topk_renormalised", "jsd", k=2)(rollouts)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd", "hellinger", "total_variation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_ratios_neither_overflow_nor_vanish(name: str, dtype: torch.dtype) -> None:
    gap = 120.0 if dtype == torch.float32 else 900.0
    log_p = torch.tensor([0.0, -gap], dtype=dtype, requires_grad=True)
    log_q = torch.tensor([-0.5, math.log(-math.expm1(-0.5))], dtype=dtype)
    terms = perspective(divergences.divergence(name), log_p, log_q)
    q = log_q.double().exp()
    f_infinity = divergences.divergence(name).slope_at_infinity
    f_infinity = f_infinity if math.isfinite(f_infinity) else float(log_q[1]) + gap
    assert float(terms[1].detach()) == pytest.approx(float(q[1]) * f_infinity, rel=1e-5, abs=1e-6)
    (grad,) = torch.autograd.grad(terms.sum(), log_p)
    wanted = -float(q[1]) if name == "forward_kl" else 0.0  # -p w, and p u = q
    assert float(grad[1]) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("gap", [250.0, 301.0, 340.0])
def test_terms_that_grow_faster_than_the_ratio_are_exact_until_the_generator_overflows(gap: float) -> None:
    log_p = torch.tensor([-gap], dtype=torch.float64, requires_grad=True)
    log_q = torch.tensor([-0.5], dtype=torch.float64)
    term = perspective(divergences.divergence("chi2"), log_p, log_q)
    square = math.exp(gap - 1.0)  # q^2 / p, beside which q and p vanish
    assert float(term.detach()) == pytest.approx(square, rel=1e-12)
    (grad,) = torch.autograd.grad(term.sum(), log_p)
    assert float(grad) == pytest.approx(-square, rel=1e-12)
    forward = perspective(divergences.divergence("forward_kl"), log_p.detach(), log_q)
    assert float(forward) == pytest.approx(math.exp(-0.5) * (gap - 0.5), rel=1e-12)


def test_a_term_whose_generator_overflows_is_infinite_and_has_no_gradient() -> None:
    log_p = torch.tensor([-400.0, -1e-3], dtype=torch.float64, requires_grad=True)
    term = perspective(divergences.divergence("chi2"), log_p, torch.tensor([-0.5, -0.9], dtype=torch.float64))
    (grad,) = torch.autograd.grad(term.sum(), log_p)
    assert float(term[0].detach()) == math.inf and float(grad[0]) == 0.0
    assert math.isfinite(float(term[1].detach())) and float(grad[1]) != 0.0


EPS = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-23}


def narrow_error(loss: Callable[[Rollouts], Tensor], dtype: torch.dtype, gap: float) -> float:
    """The gradient's error, relative to its length, against float64 on the same rounded logits."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, 2, 6)
    student, teacher = (2.0 * torch.randn(shape, generator=generator) for _ in range(2))
    # Tokens that only the teacher likes, and only the student.
    student[..., 0] -= gap
    teacher[..., 1] -= gap
    tokens = torch.zeros(shape[:2], dtype=torch.int64)
    found = []
    for wide in (dtype, torch.float64):
        leaf = student.to(dtype).to(wide).requires_grad_()
        value = loss(Rollouts.from_logits(tokens, leaf, teacher.to(dtype).to(wide)))
        assert value.dtype == wide
        found.append(torch.autograd.grad(value, leaf)[0].double())
    return float((found[0] - found[1]).norm() / found[1].norm())


@pytest.mark.parametrize("gap", [2.0, 15.0, 45.0])
@pytest.mark.parametrize("dtype", list(EPS))
def test_whole_vocabulary_losses_in_narrow_dtypes_are_rounded_once(dtype: torch.dtype, gap: float) -> None:
    """f(u) leaves float16 from log u = 11 on, where p f(u) is small; a value and each logit's gradient may round."""
    for name in ("reverse_kl", "forward_kl", "jsd", "neyman_chi2" if gap < 10 else "hellinger"):
        for kind, options in (("full_vocab", {}), ("topk_tail", {"k": 3}), ("topk_truncated", {"k": 3})):
            assert narrow_error(estimator(kind, name, **options), dtype, gap) <= EPS[dtype], (kind, name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_same_in_the_logits_own_dtype_overflows_or_rounds_away(dtype: torch.dtype) -> None:
    divergence = divergences.divergence("forward_kl")

    def careless(r: Rollouts) -> Tensor:
        log_p, log_q = (torch.log_softmax(z, -1) for z in (r.student_logits, r.teacher_logits))
        return r.token_sum((log_p.exp() * divergence.generator(log_q - log_p)).sum(-1))

    assert not narrow_error(careless, dtype, 15.0) <= EPS[dtype]


@pytest.mark.parametrize("dtype", list(EPS))
def test_terms_in_narrow_dtypes_are_those_of_float64(dtype: torch.dtype) -> None:
    log_p = torch.tensor([0.0, -9.0, -15.0, -28.0, -40.0, -torch.inf, -1.0], dtype=dtype)
    log_q = torch.tensor([-3.0, -0.1, -2.0, -1.0, -0.5, -2.0, -torch.inf], dtype=dtype)
    for name in ("forward_kl", "jsd", "hellinger", "total_variation", "skew_forward_kl"):
        divergence = divergences.divergence(name, **({"lam": 0.3} if name == "skew_forward_kl" else {}))
        wide = perspective(divergence, log_p.double(), log_q.double())
        torch.testing.assert_close(perspective(divergence, log_p, log_q), wide.to(dtype), rtol=0, atol=0)


# Exact on k tokens, sampled on the rest.

SPLITS = (
    {"k": 1},
    {"k": 2, "support": "student"},
    {"k": 2, "baseline": "constant", "baseline_value": 0.7},
    {"k": 3, "baseline": "optimal"},
    {"k": 9},
)


@pytest.mark.parametrize("options", SPLITS, ids=str)
@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd", "chi2", "total_variation", "skew_jsd(beta=0.1)"])
def test_a_sampled_tail_has_the_exact_gradient(name: str, options: dict) -> None:
    loss = estimator("topk_tail_sampled", name, **options)
    for seed, eos in ((1, None), (2, 0)):
        student, teacher = random_pair(5, 2, eos=eos, distance=1.0, seed=seed)
        found = expected_gradient(loss, student, teacher)
        assert gradient_gap(found, exact_gradient(student, teacher, name)) < ALGEBRA


@pytest.mark.parametrize(("importance", "exact"), [("prefix", True), ("token", False), (None, False)])
def test_a_sampled_tail_off_policy_needs_the_prefix_and_the_token(importance: str | None, exact: bool) -> None:
    student, teacher = random_pair(5, 2, eos=0, distance=1.0, seed=3)
    mu = student.perturbed(0.5, seed=4)
    loss = estimator("topk_tail_sampled", "jsd", k=2, baseline="optimal", importance=importance)
    found = expected_gradient(loss, student, teacher, behavior=mu)
    assert (gradient_gap(found, exact_gradient(student, teacher, "jsd")) < ALGEBRA) is exact
    at_the_sampler = local_gradient(student, teacher, "jsd", histories=mu)
    assert (gradient_gap(found, at_the_sampler) < ALGEBRA) is (importance == "token")


def test_the_best_constant_of_a_sampled_tail_has_the_least_variance() -> None:
    student, teacher = random_pair(6, 1, distance=1.5, seed=7)
    best = gradient_moments(estimator("topk_tail_sampled", "forward_kl", k=2, baseline="optimal"), student, teacher)
    others = [
        gradient_moments(
            estimator("topk_tail_sampled", "forward_kl", k=2, baseline="constant", baseline_value=c), student, teacher
        ).variance
        for c in torch.linspace(-3.0, 5.0, 33).tolist()
    ]
    assert best.variance < min(others) < 1.05 * best.variance
    # On one step the constant is a number, which the parabola through three others has as its lowest point.
    low, middle, high = (others[i] for i in (0, 16, 32))
    lowest = 1.0 + 4.0 * (low - high) / (2 * (low - 2 * middle + high))
    loss = estimator("topk_tail_sampled", "forward_kl", k=2, baseline="constant", baseline_value=lowest)
    assert gradient_moments(loss, student, teacher).variance == pytest.approx(best.variance, rel=1e-6)


def test_more_exact_tokens_and_their_constant_lower_the_variance() -> None:
    student, teacher = random_pair(7, 1, distance=1.0, seed=1)
    for name in ("forward_kl", "chi2", "jsd"):
        plain = gradient_moments(estimator("opd_plus", name, baseline="optimal"), student, teacher).variance
        found = [
            gradient_moments(estimator("topk_tail_sampled", name, k=k, baseline="optimal"), student, teacher).variance
            for k in (1, 3, 5, 7)
        ]
        assert found == sorted(found, reverse=True) and found[0] < plain
        assert found[-1] < 1e-20


def test_a_sampled_tail_at_zero_probabilities_is_finite() -> None:
    rollouts = with_zeros([0.6, 0.4, 0.0, 0.0], [0.7, 0.3, 0.0, 0.0])
    for options in SPLITS:
        value = estimator("topk_tail_sampled", "jsd", **options)(rollouts)
        (grad,) = torch.autograd.grad(value, rollouts.student_logits, retain_graph=True)
        assert bool(torch.isfinite(value)) and bool(torch.isfinite(grad).all())


def test_a_sampled_tail_takes_the_sampled_token_once() -> None:
    """By hand at one position: the set's terms, and the sampled token where it lies outside."""
    logits = torch.tensor([[[1.0, 0.0, -1.0, 0.5]]], dtype=torch.float64)
    teacher = torch.tensor([[[0.0, 2.0, 1.0, -1.0]]], dtype=torch.float64)
    p, q = logits.softmax(-1).flatten(), teacher.softmax(-1).flatten()
    for token in range(4):
        rollouts = Rollouts.from_logits(torch.tensor([[token]]), logits.clone().requires_grad_(), teacher)
        value = estimator("topk_tail_sampled", "forward_kl", k=2)(rollouts)
        (found,) = torch.autograd.grad(value, rollouts.student_logits)
        expected = torch.zeros(4, dtype=torch.float64)
        for a in {1, 2} | ({token} if token in (0, 3) else set()):
            score = torch.eye(4, dtype=torch.float64)[a] - p
            expected -= (q[a] if a in (1, 2) else q[a] / p[a]) * score
        assert error(found.flatten(), expected) < ALGEBRA


def seven_tokens() -> Rollouts:
    """Rollouts of four steps, the last of one rollout masked, sampled by another policy."""
    generator = torch.Generator().manual_seed(2)
    student, teacher = torch.randn(2, 3, 4, 7, generator=generator, dtype=torch.float64)
    tokens = torch.randint(7, (3, 4), generator=generator)
    mask = torch.ones(3, 4, dtype=torch.float64)
    mask[1, 3] = 0.0
    behavior = -1.0 - torch.rand(3, 4, generator=generator, dtype=torch.float64)
    return Rollouts.from_logits(tokens, student.requires_grad_(), teacher, mask, behavior)


def payload_of(batch: Rollouts, k: int) -> Rollouts:
    """The batch as a trainer has it whose teacher is a server."""
    return Rollouts.from_payload(
        batch.tokens,
        batch.student_logits,
        Payload(*batch.teacher_top_k(k)),
        batch.teacher_logprobs,
        batch.mask,
        batch.behavior_logprobs,
    )


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd", "chi2"])
@pytest.mark.parametrize(
    "options",
    [{}, {"baseline": "constant", "baseline_value": 0.3}, {"baseline": "rest"}, {"importance": "prefix"}],
)
def test_a_payload_is_all_that_the_sampled_tail_needs(name: str, options: dict) -> None:
    batch = seven_tokens()
    loss = estimator("topk_tail_sampled", name, k=2, **options)
    found, exact = (torch.autograd.grad(loss(r), r.student_logits)[0] for r in (payload_of(batch, 2), batch))
    assert torch.equal(found, exact)
    # A longer payload serves too; a shorter one is refused.
    longer = torch.autograd.grad(loss(payload_of(batch, 5)), batch.student_logits)[0]
    assert torch.equal(longer, exact)
    with pytest.raises(InvalidArgumentError, match="k"):
        loss(payload_of(batch, 1))


def test_estimators_of_the_sampled_token_need_no_payload() -> None:
    batch = seven_tokens()
    loss = estimator("opd_plus", "jsd")
    assert torch.equal(loss(payload_of(batch, 1)), loss(batch))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("loss", "what"),
    [
        (estimator("full_vocab", "jsd"), "this divergence"),
        (estimator("topk_tail", "jsd", k=2), "this divergence"),
        (estimator("topk_tail_sampled", "jsd", k=2, baseline="optimal"), "a baseline of least variance"),
        (estimator("topk_tail_sampled", "jsd", k=2, support="student"), "the student's likeliest tokens"),
        (estimator("opd_plus", "jsd", baseline="optimal"), "this baseline"),
    ],
)
def test_what_needs_the_whole_distribution_says_so(loss: Estimator, what: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"whole distribution for {what}, got a payload of 2 tokens"):
        loss(payload_of(seven_tokens(), 2))


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd", "hellinger", "chi2"])
@pytest.mark.parametrize("k", [1, 2])
def test_the_weight_of_the_rest_has_the_variance_of_its_closed_form(name: str, k: int) -> None:
    student, teacher = random_pair(5, 1, distance=1.0, seed=4)
    loss = estimator("topk_tail_sampled", name, k=k, baseline="rest")
    moments = gradient_moments(loss, student, teacher)
    laws = [policy.logits[0].log_softmax(-1) for policy in (student, teacher)]
    exact = least_variance(*laws, name, k=k).split_level
    assert float(moments.variance) == pytest.approx(float(exact.variance), rel=1e-10)
    assert gradient_gap(moments.mean, exact_gradient(student, teacher, name)) < ALGEBRA
    # The twin without a baseline has another variance.
    plain = gradient_moments(estimator("topk_tail_sampled", name, k=k), student, teacher).variance
    assert abs(float(plain) / float(exact.variance) - 1.0) > 1e-3


def test_the_weight_of_the_rest_leaves_nothing_to_chance_where_the_ratio_is_level() -> None:
    teacher = torch.tensor([[0.5, 0.2, 0.2, 0.1]], dtype=torch.float64).log()
    student = torch.tensor([[0.3, 0.28, 0.28, 0.14]], dtype=torch.float64).log()
    policies = [TabularPolicy([rows]) for rows in (student, teacher)]
    for name in ("reverse_kl", "jsd", "chi2"):
        level, plain = (
            gradient_moments(estimator("topk_tail_sampled", name, k=1, **options), *policies).variance
            for options in ({"baseline": "rest"}, {})
        )
        assert float(level) < ALGEBRA < 1e-3 < float(plain)


def test_a_rest_that_is_rounding_gives_a_finite_constant() -> None:
    certain = torch.tensor([[0.0, -60.0, -60.0]], dtype=torch.float64)
    other = torch.tensor([[0.0, -1.0, -2.0]], dtype=torch.float64)
    for laws in ((certain, other), (other, certain), (certain, certain)):
        policies = [TabularPolicy([rows]) for rows in laws]
        for name in ("reverse_kl", "forward_kl", "chi2"):
            mean = expected_gradient(estimator("topk_tail_sampled", name, k=1, baseline="rest"), *policies)
            assert all(bool(torch.isfinite(level).all()) for level in mean)
