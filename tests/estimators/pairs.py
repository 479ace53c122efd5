"""Policies whose expectations are enumerated by hand, and the estimators that are held against them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from opdtheory import divergences
from opdtheory.estimators import Estimator, estimator, estimator_names
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


def three_tokens(mask: list[float]) -> Rollouts:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(2, 1, 3, 4, generator=generator, dtype=torch.float64)
    return Rollouts.from_logits(
        torch.tensor([[1, 2, 3]]),
        logits[0].requires_grad_(),
        logits[1],
        torch.tensor([mask], dtype=torch.float64),
    )


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
    *(
        estimator("topk_tail_sampled", "jsd", k=2, support=s, importance=kind, baseline=b)
        for s, kind, b in (("teacher", None, None), ("student", "token", "optimal"), ("teacher", "prefix", "optimal"))
    ),
    *(estimator("k2_loss", importance=kind) for kind in ("tis", "mask", "sequence_mask", "gspo")),
    *(estimator("opd_plus_centred", "jsd", importance=kind) for kind in ("tis", "mask", "sequence_mask", "gspo")),
    *(estimator("sequence_opd_plus", "jsd", importance=kind) for kind in ("sequence_mask", "gspo")),
    estimator("opd_plus", "jsd", baseline="optimal"),
    estimator("k1_reward", baseline="optimal", importance="tis", clip_range=1.1),
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


def verdict(got: Tensor, exact: Tensor) -> str:
    if float(got.abs().max()) < ALGEBRA:
        return "zero"
    scale = float(got @ exact / (exact @ exact))
    if scale <= 0 or error(got, scale * exact) > 1e-10:
        return "biased"
    return "exact" if abs(scale - 1) < 1e-10 else "exact_up_to_scale"


def ragged() -> Rollouts:
    generator = torch.Generator().manual_seed(8)
    logits = torch.randn(2, 3, 2, 4, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    return Rollouts.from_logits(torch.tensor([[1, 2], [0, 3], [2, 2]]), logits[0], logits[1], mask)


def with_zeros(student: list[float], teacher: list[float]) -> Rollouts:
    logits = torch.tensor([student, teacher], dtype=torch.float64).log()
    return Rollouts.from_logits(
        torch.tensor([[0]]), logits[0].reshape(1, 1, -1).requires_grad_(), logits[1].reshape(1, 1, -1)
    )
