"""Estimators against expectations enumerated here by hand, with false twins that the same checks refute."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import Tensor

from opdtheory import divergences
from opdtheory.errors import InvalidArgumentError
from opdtheory.estimators import Claim, Estimator, estimator, estimator_names
from opdtheory.estimators.vocabulary import perspective
from opdtheory.rollouts import Rollouts
from tests.tolerances import ALGEBRA

JUNK = 1e6
EOS = 0

GENERATORS = {
    "reverse_kl": lambda u: -torch.log(u),
    "forward_kl": lambda u: u * torch.log(u),
    "chi2": lambda u: (u - 1) ** 2,
    "jsd": lambda u: 0.5 * (u * torch.log(u) - (u + 1) * torch.log((u + 1) / 2)),
    "total_variation": lambda u: 0.5 * (u - 1).abs(),
}
# w = u f' - f, differentiated by hand.
WEIGHTS = {
    "reverse_kl": lambda u: torch.log(u),
    "forward_kl": lambda u: u,
    "chi2": lambda u: u**2,
    "jsd": lambda u: 0.5 * torch.log1p(u),
    "total_variation": lambda u: 0.5 * torch.sign(u - 1),
    "alpha": lambda u: u**1.5 / 1.5,
    "skew_reverse_kl": lambda u: torch.log(0.3 + 0.7 * u) - 0.7 * u / (0.3 + 0.7 * u),  # lam = 0.3
    "skew_jsd(beta=0.7)": lambda u: torch.log(0.3 + 0.7 * u),
}
NAMES = ("reverse_kl", "forward_kl", "chi2", "jsd", "total_variation")


@dataclass(frozen=True)
class Pair:
    """A student, a teacher and a behaviour policy: one row of logits per history, level by level."""

    student: tuple[Tensor, ...]
    teacher: tuple[Tensor, ...]
    behavior: tuple[Tensor, ...]
    eos: bool = False

    @property
    def vocabulary(self) -> int:
        return self.student[0].shape[-1]

    def sequences(self) -> list[tuple[int, ...]]:
        every = itertools.product(range(self.vocabulary), repeat=len(self.student))
        return sorted({self._cut(y) for y in every})

    def _cut(self, y: tuple[int, ...]) -> tuple[int, ...]:
        return y[:1] if self.eos and y[0] == EOS else y

    def rows(self, levels: tuple[Tensor, ...], y: tuple[int, ...]) -> list[Tensor]:
        return [levels[n][y[0] if n else 0] for n in range(len(y))]

    def log_distribution(self, levels: tuple[Tensor, ...], y: tuple[int, ...]) -> Tensor:
        return torch.stack([r.log_softmax(-1)[a] for r, a in zip(self.rows(levels, y), y, strict=True)])

    def batch(self, ys: tuple[tuple[int, ...], ...]) -> Rollouts:
        """Rollouts padded by junk of a large size, as masked values mean nothing."""
        length = len(self.student)
        junk = torch.full((self.vocabulary,), JUNK, dtype=torch.float64)
        junk[0] = -JUNK

        def padded(values: list[Tensor], filler: Tensor) -> Tensor:
            return torch.stack([*values, *[filler] * (length - len(values))])

        def scores(levels: tuple[Tensor, ...], sign: float) -> Tensor:
            filler = torch.tensor(sign * JUNK, dtype=torch.float64)
            return torch.stack([padded(list(self.log_distribution(levels, y)), filler) for y in ys])

        return Rollouts(
            tokens=torch.tensor([[*y, *[1] * (length - len(y))] for y in ys]),
            mask=torch.tensor([[1.0] * len(y) + [0.0] * (length - len(y)) for y in ys], dtype=torch.float64),
            student_logits=torch.stack([padded(self.rows(self.student, y), junk) for y in ys]),
            teacher_logits=torch.stack([padded(self.rows(self.teacher, y), -junk) for y in ys]),
            student_logprobs=scores(self.student, -1.0),
            teacher_logprobs=scores(self.teacher, 1.0),
            behavior_logprobs=scores(self.behavior, -2.0).detach(),
        )


@cache
def pair(seed: int = 0, vocabulary: int = 4, horizon: int = 2, eos: bool = False, off_policy: bool = False) -> Pair:
    generator = torch.Generator().manual_seed(seed)

    def levels() -> tuple[Tensor, ...]:
        rows = [
            torch.randn(vocabulary**n, vocabulary, generator=generator, dtype=torch.float64) for n in range(horizon)
        ]
        return tuple(rows)

    student = tuple(level.requires_grad_() for level in levels())
    teacher, other = levels(), levels()
    return Pair(student, teacher, other if off_policy else tuple(level.detach() for level in student), eos)


def expected_gradient(loss: Callable[[Rollouts], Tensor], policies: Pair, batch_size: int = 1) -> Tensor:
    """The enumerated expectation over all batches of the gradient, flattened."""
    total: Tensor = torch.zeros((), dtype=torch.float64)
    for ys in itertools.product(policies.sequences(), repeat=batch_size):
        distribution = sum(policies.log_distribution(policies.behavior, y).sum() for y in ys)
        total = total + distribution.detach().exp() * loss(policies.batch(ys))
    return flat_gradient(total, policies)


def flat_gradient(value: Tensor, policies: Pair) -> Tensor:
    if not value.requires_grad:
        return torch.zeros(sum(level.numel() for level in policies.student), dtype=torch.float64)
    grads = torch.autograd.grad(value, policies.student, allow_unused=True, materialize_grads=True)
    return torch.cat([g.reshape(-1) for g in grads])


def token_local(weight: Callable[[Tensor], Tensor], policies: Pair) -> Tensor:
    """The closed form, sum over histories of P(h) times -p (w - E_p w): no autograd."""
    rows = []
    for level, (student, teacher) in enumerate(zip(policies.student, policies.teacher, strict=True)):
        p, q = student.detach().softmax(-1), teacher.softmax(-1)
        w = weight(q / p)
        reach = torch.ones(1, 1, dtype=p.dtype) if level == 0 else policies.student[0].detach().softmax(-1).T
        if level == 1 and policies.eos:
            reach = reach.clone()
            reach[EOS] = 0
        rows.append((-reach * p * (w - (p * w).sum(-1, keepdim=True))).reshape(-1))
    return torch.cat(rows)


def token_return(name: str, policies: Pair, gamma: float) -> Tensor:
    """Autograd of the enumerated objective sum_y p(y) sum_n gamma^(n-1) f(u_n)."""
    total: Tensor = torch.zeros((), dtype=torch.float64)
    for y in policies.sequences():
        log_p, log_q = policies.log_distribution(policies.student, y), policies.log_distribution(policies.teacher, y)
        discount = torch.tensor([gamma**n for n in range(len(y))], dtype=torch.float64)
        total = total + log_p.sum().exp() * (discount * GENERATORS[name](torch.exp(log_q - log_p))).sum()
    return flat_gradient(total, policies)


def sequence(name: str, policies: Pair) -> Tensor:
    """Autograd of D_f between the enumerated distributions of whole sequences."""
    total: Tensor = torch.zeros((), dtype=torch.float64)
    for y in policies.sequences():
        log_p = policies.log_distribution(policies.student, y).sum()
        total = total + log_p.exp() * GENERATORS[name](
            torch.exp(policies.log_distribution(policies.teacher, y).sum() - log_p)
        )
    return flat_gradient(total, policies)


def value_of(loss: Estimator, rollouts: Rollouts) -> float:
    return float(loss(rollouts).detach())


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max())


def twin(loss: Estimator, change: Callable[[Rollouts, Tensor], Tensor]) -> Estimator:
    """The same estimator with its loss of each token changed."""
    token_loss = loss.token_loss
    return replace(loss, token_loss=lambda rollouts: change(rollouts, token_loss(rollouts)))


# One step: the closed form of T1 and the table of T4.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["opd_plus", "opd_plus_centred", "full_vocab"])
def test_corrected_weights_match_the_closed_form(kind: str, name: str) -> None:
    bandit = pair(vocabulary=5, horizon=1)
    loss, exact = estimator(kind, name), token_local(WEIGHTS[name], bandit)
    assert error(expected_gradient(loss, bandit), exact) < ALGEBRA
    assert error(expected_gradient(twin(loss, lambda r, x: -x), bandit), exact) > 1e-2


@pytest.mark.parametrize(
    ("loss", "weight"),
    [
        (estimator("opd", "forward_kl"), lambda u: -u * torch.log(u)),
        (estimator("opd", "chi2"), lambda u: -((u - 1) ** 2)),
        (estimator("opd", "reverse_kl"), torch.log),
        (estimator("k1_loss"), torch.ones_like),
        (estimator("k2_loss"), torch.log),
        (estimator("k3_loss"), lambda u: u),
        (estimator("k1_reward"), torch.log),
        (estimator("k2_reward"), lambda u: -0.5 * torch.log(u) ** 2),
        (estimator("k3_reward"), lambda u: torch.log(u) - u + 1),
        (estimator("box_cox", alpha=0.5), lambda u: 2 * torch.sqrt(u)),
        (estimator("box_cox", alpha=0.0), torch.log),
        (estimator("box_cox", alpha=1e-14), torch.log),
        (estimator("sign"), lambda u: torch.sign(u - 1)),
        (estimator("k1_reward", clip_log_ratio=0.5), lambda u: torch.log(u).clamp(-0.5, 0.5)),
        (estimator("opd_plus", "forward_kl", clip_weight=(0.5, 1.2)), lambda u: u.clamp(0.5, 1.2)),
        (estimator("k2_loss", clip_log_ratio=0.5), lambda u: torch.log(u) * (torch.log(u).abs() < 0.5)),
        (estimator("opd_plus", "forward_kl", clip_log_ratio=0.5), lambda u: u.clamp(math.exp(-0.5), math.exp(0.5))),
        (estimator("opd", divergences.skew_reverse_kl(0.3)), lambda u: torch.log(0.3 + 0.7 * u)),
    ],
    ids=lambda value: repr(value) if isinstance(value, Estimator) else "",
)
def test_local_weight(loss: Estimator, weight: Callable[[Tensor], Tensor]) -> None:
    bandit = pair(vocabulary=5, horizon=1)
    assert error(expected_gradient(loss, bandit), token_local(weight, bandit)) < ALGEBRA


def test_power_follows_the_difference_of_powers() -> None:
    bandit = pair(vocabulary=5, horizon=1)
    p, q = bandit.student[0].detach().softmax(-1), bandit.teacher[0].softmax(-1)
    weight = q**0.7 - p**0.7
    exact = (-p * (weight - (p * weight).sum())).reshape(-1)
    assert error(expected_gradient(estimator("power", alpha=0.7), bandit), exact) < ALGEBRA


def test_box_cox_is_the_weight_of_the_alpha_divergence() -> None:
    log_u = torch.linspace(-5, 5, 41, dtype=torch.float64)
    for alpha in (-1.0, 0.0, 0.5, 1.0, 2.5):
        difference = estimator("box_cox", alpha=alpha).token_loss.advantage.function(log_u)
        difference = difference - divergences.alpha(alpha).weight(log_u)
        assert float(difference.max() - difference.min()) < 1e-9


# Two steps.


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_two_steps(name: str, eos: bool) -> None:
    policies = pair(seed=2, vocabulary=3, eos=eos)
    local = token_local(WEIGHTS[name], policies)
    assert error(expected_gradient(estimator("opd_plus", name), policies), local) < ALGEBRA
    assert error(expected_gradient(estimator("full_vocab", name), policies), local) < ALGEBRA
    assert error(expected_gradient(estimator("return_to_go", name, gamma=0.0), policies), local) < ALGEBRA
    whole = expected_gradient(estimator("sequence_opd_plus", name), policies)
    assert error(whole, sequence(name, policies)) < ALGEBRA
    full = token_return(name, policies, 1.0)
    assert error(expected_gradient(estimator("return_to_go", name, gamma=1.0), policies), full) < ALGEBRA
    discounted = estimator("return_to_go", name, gamma=0.6, discounted=True)
    assert error(expected_gradient(discounted, policies), token_return(name, policies, 0.6)) < ALGEBRA
    # False twins: the future dropped, and the discount of the outer sum.
    assert error(local, full) > 1e-3
    practised = expected_gradient(estimator("return_to_go", name, gamma=0.6), policies)
    assert error(practised, token_return(name, policies, 0.6)) > 1e-3


def test_discount_zero_without_an_outer_discount_is_local() -> None:
    policies = pair(seed=2, vocabulary=3)
    discounted = expected_gradient(estimator("return_to_go", "jsd", gamma=0.0, discounted=True), policies)
    assert error(discounted, token_return("jsd", policies, 0.0)) < ALGEBRA


def test_return_to_go_skips_masked_tokens() -> None:
    policies = pair(vocabulary=3, horizon=1)
    rollouts = three_tokens(mask=[1.0, 0.0, 1.0])
    advantage = estimator("return_to_go", "forward_kl", gamma=0.5).token_loss.advantages(rollouts)
    u = torch.exp(rollouts.log_u.detach())[0]
    assert advantage[0].tolist() == pytest.approx([float(u[0] - 0.25 * u[2] * torch.log(u[2])), 0.0, float(u[2])])
    assert policies.vocabulary == 3


def three_tokens(mask: list[float]) -> Rollouts:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(2, 1, 3, 4, generator=generator, dtype=torch.float64)
    return Rollouts.from_logits(
        torch.tensor([[1, 2, 3]]),
        logits[0].requires_grad_(),
        logits[1],
        torch.tensor([mask], dtype=torch.float64),
    )


# Every claim, by enumeration.

CLAIMS = [
    *(estimator(kind, name) for kind in ("opd", "opd_plus", "opd_plus_centred", "full_vocab") for name in NAMES),
    *(estimator("sequence_opd_plus", name) for name in ("reverse_kl", "forward_kl", "total_variation")),
    *(estimator("return_to_go", "jsd", gamma=g, discounted=d) for g in (0.0, 0.5, 1.0) for d in (False, True)),
    *(estimator(name) for name in estimator_names() if name[:2] in ("k1", "k2", "k3") or name == "sign"),
    *(estimator(f"k{i}_loss", clip_log_ratio=0.5) for i in (1, 2, 3)),
    *(estimator(f"k{i}_loss", importance=kind) for i in (1, 2, 3) for kind in ("token", "prefix", "sequence")),
    *(estimator("opd_plus", "jsd", importance=kind) for kind in ("token", "prefix", "sequence", "ppo")),
    *(estimator("sequence_opd_plus", "jsd", importance=kind) for kind in ("sequence", "ppo")),
    *(estimator("return_to_go", "jsd", gamma=1.0, importance=kind) for kind in ("sequence", "ppo")),
    *(
        estimator(kind, "jsd", k=2, support=s)
        for kind in ("topk_truncated", "topk_renormalised", "topk_tail", "topk_reward")
        for s in ("teacher", "student")
    ),
    *(estimator("opd_plus", "jsd", reduction=r) for r in ("token_mean", "sequence_mean")),
    *(estimator("k1_loss", reduction=r) for r in ("token_mean", "sequence_mean")),
    *(estimator("opd_plus", "jsd", baseline=b) for b in ("group_mean", "leave_one_out", "vocabulary")),
    *(estimator("return_to_go", "jsd", gamma=1.0, baseline=b) for b in ("group_mean", "leave_one_out")),
    *(estimator("sequence_opd_plus", "jsd", baseline=b) for b in ("group_mean", "leave_one_out")),
    *(estimator("topk_reward", "jsd", k=2, baseline=b) for b in ("group_mean", "leave_one_out")),
    estimator("k1_reward", baseline="constant", baseline_value=0.7),
    estimator("k1_reward", baseline="vocabulary", importance="prefix"),
    estimator("k1_reward", baseline="leave_one_out", importance="prefix"),
    estimator("opd", "forward_kl", baseline="vocabulary"),
    estimator("opd_plus", "jsd", baseline="group_mean", reduction="token_mean"),
    estimator("k1_reward", zscore=True),
    estimator("topk_reward", "jsd", k=2, zscore=True),
    estimator("full_vocab", "jsd", importance="prefix"),
    estimator("topk_renormalised", "jsd", k=1),
    estimator("box_cox", alpha=1.5),
    estimator("box_cox", alpha=1.5, clip_log_ratio=0.5),
    estimator("power", alpha=0.5),
    estimator("opd", divergences.skew_reverse_kl(0.3)),
    estimator("opd_plus", "jsd", clip_log_ratio=0.3),
    estimator("opd_plus", "total_variation", clip_log_ratio=0.3),
    estimator("opd_plus", "jsd", clip_weight=(-0.05, 0.05)),
    estimator("sign", clip_weight=(-0.2, 0.5)),
    estimator("sign", clip_weight=(2.0, 3.0)),
    estimator("opd", "chi2", clip_weight=(0.0, 1.0)),
    estimator("k1_reward", importance="ppo", clip_weight=(-0.3, 0.3)),
    estimator("topk_reward", "jsd", k=2, importance="token"),
    estimator("sequence_opd_plus", "total_variation", clip_log_ratio=0.3),
    estimator("return_to_go", "total_variation", gamma=0.0, clip_log_ratio=0.3),
    estimator("return_to_go", "total_variation", gamma=1.0, clip_log_ratio=0.3),
]


def objective(claim: Claim, policies: Pair) -> Tensor:
    name = claim.divergence.name
    if claim.granularity == "token_local":
        return token_local(WEIGHTS[name], policies)
    if claim.granularity == "sequence":
        return sequence(name, policies)
    return token_return(name, policies, claim.gamma)


def verdict(got: Tensor, exact: Tensor) -> str:
    if float(got.abs().max()) < ALGEBRA:
        return "zero"
    scale = float(got @ exact / (exact @ exact))
    if scale <= 0 or error(got, scale * exact) > 1e-10:
        return "biased"
    return "exact" if abs(scale - 1) < 1e-10 else "exact_up_to_scale"


def is_coupled(loss: Estimator) -> bool:
    return any(option in ("baseline", "zscore") for option, _ in loss.options) and "batch" in str(loss.claim)


def found(loss: Estimator, *, eos: bool, off_policy: bool, horizon: int = 2) -> str:
    # Two pairs in one vector, so that a scale must be common to both.
    size = 2 if is_coupled(loss) else 1
    vocabulary = 3 if size == 2 else 4
    panel = [pair(seed, vocabulary, horizon, eos, off_policy) for seed in (11, 12)]
    got = torch.cat([expected_gradient(loss, policies, size) for policies in panel])
    exact = torch.cat([objective(loss.claim, policies) for policies in panel])
    result = verdict(got, exact)
    if result == "biased" and loss.claim.verdict == "other_objective":
        other = torch.cat([token_local(WEIGHTS[loss.claim.descends], policies) for policies in panel])
        return "other_objective" if verdict(got, other) in ("exact", "exact_up_to_scale") else "biased"
    return result


@pytest.mark.parametrize("loss", CLAIMS, ids=repr)
def test_claim_holds_under_its_assumptions(loss: Estimator) -> None:
    assumptions = loss.claim.assumptions
    assert found(loss, eos=False, off_policy=False) == loss.claim.verdict
    if not assumptions.fixed_length:
        assert found(loss, eos=True, off_policy=False) == loss.claim.verdict
    if assumptions.sampler == "on_policy_or_one_step":
        assert found(loss, eos=False, off_policy=True, horizon=1) == loss.claim.verdict
    elif assumptions.sampler == "any":
        assert found(loss, eos=not assumptions.fixed_length, off_policy=True) == loss.claim.verdict


@pytest.mark.parametrize(
    ("loss", "setting"),
    [
        (estimator("opd_plus", "jsd"), {"eos": False, "off_policy": True}),
        (estimator("k2_loss"), {"eos": False, "off_policy": True}),
        (estimator("k1_loss"), {"eos": False, "off_policy": True}),
        (estimator("k1_reward", importance="token"), {"eos": False, "off_policy": True}),
        (estimator("opd_plus", "jsd", importance="ppo"), {"eos": False, "off_policy": True}),
        (estimator("full_vocab", "jsd"), {"eos": False, "off_policy": True}),
        (estimator("opd_plus", "jsd", reduction="sequence_mean"), {"eos": True, "off_policy": False}),
        (estimator("opd_plus", "jsd", reduction="token_mean"), {"eos": True, "off_policy": False}),
        (estimator("k1_loss", reduction="token_mean"), {"eos": True, "off_policy": False}),
        (estimator("k1_reward", baseline="group_mean"), {"eos": True, "off_policy": False}),
    ],
    ids=repr,
)
def test_assumptions_are_needed(loss: Estimator, setting: dict[str, bool]) -> None:
    assert loss.claim.verdict != "biased"
    assert found(loss, **setting) == "biased"


def test_ppo_on_policy_is_the_plain_estimator() -> None:
    policies = pair(seed=3, vocabulary=3)
    plain = expected_gradient(estimator("opd_plus", "jsd"), policies)
    assert error(expected_gradient(estimator("opd_plus", "jsd", importance="ppo"), policies), plain) < ALGEBRA


def test_ppo_leaves_no_gradient_outside_the_interval() -> None:
    rollouts = three_tokens(mask=[1.0, 1.0, 1.0])
    stale = replace(rollouts, behavior_logprobs=rollouts.behavior_logprobs - 1)  # ratio e everywhere
    for sign, finite in ((1.0, False), (-1.0, True)):
        loss = estimator("sign", baseline="constant", baseline_value=-3 * sign, importance="ppo", clip_range=0.1)
        (grad,) = torch.autograd.grad(loss(stale), rollouts.student_logits, retain_graph=True)
        assert bool((grad != 0).any()) is finite


def test_group_mean_scales_by_one_less_than_the_group() -> None:
    bandit = pair(vocabulary=3, horizon=1)
    exact = token_local(WEIGHTS["forward_kl"], bandit)
    loss = estimator("opd_plus", "forward_kl", baseline="group_mean")
    assert error(expected_gradient(loss, bandit, 2), exact / 2) < ALGEBRA
    assert error(expected_gradient(loss, bandit, 3), exact * 2 / 3) < ALGEBRA


def test_z_score_of_two_values_shows_its_bias_in_groups_of_four() -> None:
    loss = estimator("sign", zscore=True)
    assert loss.claim.assumptions.batch_size == 4 and loss.claim.assumptions.several_steps
    assert {"batch of at least 4", "more than one step"} <= set(loss.claim.assumptions.words)

    def of_size(size: int, horizon: int) -> str:
        policies = pair(11, 2, horizon)
        return verdict(expected_gradient(loss, policies, size), token_local(WEIGHTS["total_variation"], policies))

    assert of_size(2, 2) == of_size(3, 2) == of_size(4, 1) == "exact_up_to_scale"
    assert of_size(4, 2) == loss.claim.verdict == "biased"


# Baselines on batches whose rollouts have different lengths.


def ragged() -> Rollouts:
    generator = torch.Generator().manual_seed(8)
    logits = torch.randn(2, 3, 2, 4, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    return Rollouts.from_logits(torch.tensor([[1, 2], [0, 3], [2, 2]]), logits[0], logits[1], mask)


def test_baselines_count_the_unmasked_alone() -> None:
    rollouts = ragged()
    log_u = rollouts.log_u

    def advantages(**options: object) -> Tensor:
        return estimator("k1_reward", **options).token_loss.advantages(rollouts)

    group, others = advantages(baseline="group_mean"), advantages(baseline="leave_one_out")
    assert torch.allclose(group[:, 0], log_u[:, 0] - log_u[:, 0].mean(), atol=ALGEBRA)
    assert torch.allclose(others[0, 0], log_u[0, 0] - (log_u[1, 0] + log_u[2, 0]) / 2, atol=ALGEBRA)
    assert group[0, 1] == 0  # alone at its position: its own mean
    assert torch.allclose(others[0, 1], log_u[0, 1], atol=ALGEBRA)  # no other: no baseline
    z = advantages(zscore=True, eps=1e-9)
    assert torch.allclose(z[:, 0], group[:, 0] / log_u[:, 0].std(), atol=1e-6)
    assert z[0, 1] == 0
    for values in (group, others, z):
        assert (values[1:, 1] == 0).all()


def test_vocabulary_baseline_is_the_expected_advantage() -> None:
    rollouts = ragged()
    p = rollouts.student_logits.softmax(-1)
    u = rollouts.teacher_logits.softmax(-1) / p
    got = estimator("opd_plus", "chi2", baseline="vocabulary", clip_weight=(-0.5, 1.0)).token_loss.advantages(rollouts)
    weight = (u**2 - 1).clamp(-0.5, 1.0)
    at = weight.gather(-1, rollouts.tokens.unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(got, (at - (p * weight).sum(-1)) * rollouts.mask, atol=ALGEBRA)


# Masks, zero probabilities and wide ratios.


@pytest.mark.parametrize("loss", CLAIMS, ids=repr)
def test_masked_positions_have_exactly_zero_gradient(loss: Estimator) -> None:
    policies = pair(seed=4, eos=True)
    rollouts = policies.batch(((1, 2), (EOS,), (3, 1)))
    leaves = [rollouts.student_logprobs.detach().requires_grad_(), rollouts.student_logits.detach().requires_grad_()]
    value = loss(replace(rollouts, student_logprobs=leaves[0], student_logits=leaves[1]))
    assert value.ndim == 0
    assert torch.isfinite(value)
    if not value.requires_grad:
        return
    grads = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    for grad in grads:
        assert torch.isfinite(grad).all()
        assert (grad[1, 1] == 0).all()


def with_zeros(student: list[float], teacher: list[float]) -> Rollouts:
    logits = torch.tensor([student, teacher], dtype=torch.float64).log()
    return Rollouts.from_logits(
        torch.tensor([[0]]), logits[0].reshape(1, 1, -1).requires_grad_(), logits[1].reshape(1, 1, -1)
    )


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
    with pytest.raises(InvalidArgumentError, match="support: the student gives all 2"):
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


def test_tokens_that_the_student_cannot_write_contribute_nothing() -> None:
    student = torch.tensor([[[0.0, -torch.inf]]], requires_grad=True)
    rollouts = Rollouts.from_logits(
        torch.tensor([[1]]), student, torch.tensor([[[0.0, 0.0]]]), behavior_logprobs=torch.tensor([[-1.0]])
    )
    for loss in (estimator("opd_plus", "chi2", importance="prefix"), estimator("k3_loss"), estimator("k1_reward")):
        value = loss(rollouts)
        (grad,) = torch.autograd.grad(value, student, retain_graph=True)
        assert float(value.detach()) == 0
        assert (grad == 0).all()


# The interface.


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "options", "argument"),
    [
        (("opd_pluss", "jsd"), {}, "name"),
        (("opd_plus",), {}, "divergence"),
        (("opd_plus", "jds"), {}, "divergence"),
        (("k1_loss", "jsd"), {}, "divergence"),
        (("k1_loss",), {"baseline": "group_mean"}, "baseline"),
        (("k1_loss",), {"importance": "ppo"}, "importance"),
        (("k1_reward",), {"gamma": 0.5}, "gamma"),
        (("k1_reward",), {"alpha": 0.5}, "alpha"),
        (("k1_reward",), {"k": 2}, "k"),
        (("k1_reward",), {"support": "teacher"}, "support"),
        (("k1_reward",), {"discounted": True}, "discounted"),
        (("k1_reward",), {"beta": 0.5}, "beta"),
        (("k1_reward",), {"zscore": "yes"}, "zscore"),
        (("k1_reward",), {"zscore": True, "baseline": "group_mean"}, "zscore"),
        (("k1_reward",), {"eps": 1e-3}, "eps"),
        (("k1_reward",), {"zscore": True, "eps": 0.0}, "eps"),
        (("k1_reward",), {"baseline": "groupmean"}, "baseline"),
        (("k1_reward",), {"baseline": "constant"}, "baseline_value"),
        (("k1_reward",), {"baseline_value": 1.0}, "baseline_value"),
        (("k1_reward",), {"baseline": "constant", "baseline_value": math.nan}, "baseline_value"),
        (("k1_reward",), {"clip_range": 0.2}, "clip_range"),
        (("k1_reward",), {"importance": "ppo", "clip_range": 0}, "clip_range"),
        (("k1_reward",), {"importance": "tokens"}, "importance"),
        (("k1_reward",), {"clip_log_ratio": -1.0}, "clip_log_ratio"),
        (("k1_reward",), {"clip_weight": 1.0}, "clip_weight"),
        (("k1_reward",), {"clip_weight": (1.0, 0.0)}, "clip_weight"),
        (("k1_reward",), {"reduction": "mean"}, "reduction"),
        (("sign",), {"clip_log_ratio": 1.0}, "clip_log_ratio"),
        (("power",), {"alpha": 0.5, "clip_log_ratio": 1.0}, "clip_log_ratio"),
        (("power",), {"alpha": 0.0}, "alpha"),
        (("box_cox",), {}, "alpha"),
        (("box_cox",), {"alpha": math.inf}, "alpha"),
        (("full_vocab", "jsd"), {"importance": "token"}, "importance"),
        (("full_vocab", "jsd"), {"clip_log_ratio": 1.0}, "clip_log_ratio"),
        (("return_to_go", "jsd"), {}, "gamma"),
        (("return_to_go", "jsd"), {"gamma": 1.5}, "gamma"),
        (("return_to_go", "jsd"), {"gamma": 1.0, "importance": "prefix"}, "importance"),
        (("return_to_go", "jsd"), {"gamma": 1.0, "baseline": "vocabulary"}, "baseline"),
        (("topk_tail", "jsd"), {}, "k"),
        (("topk_tail", "jsd"), {"k": 0}, "k"),
        (("topk_tail", "jsd"), {"k": 2.0}, "k"),
        (("topk_tail", "jsd"), {"k": 2, "support": "both"}, "support"),
    ],
)
def test_bad_options_are_refused_by_name(arguments: tuple[str, ...], options: dict[str, object], argument: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^{argument}: ") as caught:
        estimator(*arguments, **options)
    assert isinstance(caught.value, ValueError)
    assert caught.value.argument == argument


def test_unknown_names_come_with_a_suggestion() -> None:
    with pytest.raises(InvalidArgumentError, match="did you mean 'opd_plus'"):
        estimator("opd_pluss", "jsd")
    with pytest.raises(InvalidArgumentError, match="did you mean 'baseline'"):
        estimator("opd_plus", "jsd", basline="constant")


@pytest.mark.parametrize("options", [{"baseline": "group_mean"}, {"baseline": "leave_one_out"}, {"zscore": True}])
def test_group_statistics_need_a_group(options: dict[str, object]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"at least 2 rollouts.*got 1"):
        estimator("k1_reward", **options)(three_tokens(mask=[1.0, 1.0, 1.0]))


def test_repr_shows_the_call() -> None:
    loss = estimator("return_to_go", "jsd", gamma=0.5, baseline="leave_one_out", reduction="token_mean")
    shown = "estimator('return_to_go', 'jsd', reduction='token_mean', baseline='leave_one_out', gamma=0.5)"
    assert repr(loss) == shown


def test_claims_print_and_serialise() -> None:
    claim = estimator("k3_loss").claim
    assert str(claim).startswith("other_objective for the token_local objective of reverse_kl; descends forward_kl")
    assert claim.to_dict()["divergence"] == "reverse_kl"
    assert estimator("opd_plus", divergences.alpha(0.5)).claim.to_dict()["divergence"] == "alpha(alpha=0.5)"


def test_estimators_survive_pickling() -> None:
    rollouts = ragged()
    loss = estimator("opd_plus_centred", "jsd", baseline="vocabulary")
    assert value_of(pickle.loads(pickle.dumps(loss)), rollouts) == value_of(loss, rollouts)


def test_every_name_is_covered() -> None:
    assert {loss.name for loss in CLAIMS} == set(estimator_names())
