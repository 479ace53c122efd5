"""Small experiments on a black-box loss: the expected weights of designed rows, and gradients of single batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.errors import OpdTheoryError
from opdtheory.exact import Loss, TabularPolicy, gradient_moments
from opdtheory.exact.enumeration import Enumeration
from opdtheory.exact.expectation import BATCH_BUDGET
from opdtheory.rollouts import Rollouts

__all__ = [
    "Effect",
    "Pool",
    "Rows",
    "cut_short",
    "differ",
    "expected_weights",
    "experiment",
    "one_step_weights",
    "sampled_by",
    "size_for",
]

# The most batches that one expectation of a coupled loss may take.
_EVALUATIONS = 150

_VOCABULARY, _HORIZON = 8, 2


@dataclass(frozen=True)
class Effect:
    """The finding of an experiment: whether the gradient depends on what was changed, and how, in sentences."""

    found: bool = False
    words: list[str] = field(default_factory=list)


def differ(a: Tensor, b: Tensor, limit: float) -> bool:
    """Whether some entries differ by more than the limit."""
    return float((a - b).abs().max()) > limit


@contextmanager
def experiment(notes: list[str], what: str) -> Iterator[None]:
    """Run one experiment; whatever the loss raises in it ends that experiment alone, with a note."""
    try:
        yield
    except (OpdTheoryError, RuntimeError, ValueError, IndexError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        notes.append(f"{what} could not be looked at: {reason.rstrip(chr(46))}.")


def size_for(batch_size: int) -> tuple[int, int] | None:
    """A vocabulary and horizon for which batches of this size can be enumerated, or None."""
    sizes = ((3, 3),) if batch_size == 1 else ((2, 3), (2, 2))
    for vocabulary, horizon in sizes:
        count = vocabulary**horizon
        if math.comb(count + batch_size - 1, batch_size) <= _EVALUATIONS:
            return vocabulary, horizon
    return None


@dataclass(frozen=True)
class Rows:
    """Policies whose rows are chosen from a few fixed pairs of rows, prefix by prefix.

    Attributes:
        vocabulary: number of tokens.
        horizon: number of positions.
    """

    vocabulary: int
    horizon: int

    def pair(
        self, variant: Callable[[int, int], int], alike: Callable[[int], bool] = lambda n: False
    ) -> tuple[TabularPolicy, TabularPolicy]:
        """Student and teacher whose prefix number `row` of level `n` has the rows of kind `variant(n, row)`.

        On levels that are `alike`, the teacher is the student.
        """
        generator = torch.Generator().manual_seed(11)
        kinds = 1 + self.vocabulary
        student = torch.randn(kinds, self.vocabulary, generator=generator, dtype=torch.float64)
        # The distances differ, so that each kind has its own divergence.
        noise = torch.randn(kinds, self.vocabulary, generator=generator, dtype=torch.float64)
        teacher = student + noise * (0.6 + 0.3 * torch.arange(kinds, dtype=torch.float64)).unsqueeze(-1)
        index = [torch.tensor([variant(n, row) for row in range(self.vocabulary**n)]) for n in range(self.horizon)]
        theirs = [(student if alike(n) else teacher)[i] for n, i in enumerate(index)]
        return TabularPolicy([student[i] for i in index]), TabularPolicy(theirs)

    def first_token(self, level: int, row: int) -> int:
        """The first token of a prefix."""
        return int(row // self.vocabulary ** (level - 1))


def expected_weights(
    loss: Loss, pair: tuple[TabularPolicy, TabularPolicy], batch_size: int, budget: int = BATCH_BUDGET
) -> list[Tensor]:
    r"""The expected weight of each token after each prefix, $-G_{ha} / (P(h)\,p_{ha})$, with mean zero over the row.

    Returns one tensor `(V**n, V)` per level.
    """
    student, teacher = pair
    gradient = gradient_moments(loss, student, teacher, batch_size, budget=budget, thorough=False).mean
    reach = torch.ones(1, dtype=torch.float64)
    weights = []
    for level, logits in zip(gradient, student.logits, strict=True):
        p = torch.softmax(logits, -1)
        advantage = -level.double() / (reach.unsqueeze(-1) * p)
        weights.append(advantage - advantage.mean(-1, keepdim=True))
        reach = (reach.unsqueeze(-1) * p).flatten()
    return weights


def one_step_weights(
    loss: Loss, log_p: Float[Tensor, " V"], log_q: Float[Tensor, " V"], batch_size: int = 1, budget: int = BATCH_BUDGET
) -> Float[Tensor, " V"]:
    """The expected weight of each token of one step between two distributions."""
    pair = TabularPolicy([log_p.unsqueeze(0)]), TabularPolicy([log_q.unsqueeze(0)])
    return expected_weights(loss, pair, batch_size, budget)[0][0]


class Pool:
    """All rollouts of two steps over eight tokens, and the gradient of the loss in the logits of chosen batches."""

    def __init__(self, loss: Loss) -> None:
        generator = torch.Generator().manual_seed(5)
        count = sum(_VOCABULARY**n for n in range(_HORIZON))
        # Nearly uniform rows leave room for a sampling policy that gives a token e times its probability.
        rows = 0.15 * torch.randn(count, _VOCABULARY, generator=generator, dtype=torch.float64)
        noise = 0.8 * torch.randn(count, _VOCABULARY, generator=generator, dtype=torch.float64)
        levels = [1, _VOCABULARY]
        self.loss = loss
        self.everything = Enumeration.build(
            TabularPolicy(list(rows.split(levels))), TabularPolicy(list((rows + noise).split(levels)))
        )

    def __len__(self) -> int:
        return len(self.everything)

    def sensitivity(
        self, index: Tensor, change: Callable[[Rollouts], Rollouts] | None = None
    ) -> Float[Tensor, "B T V"]:
        """The gradient of the loss of a batch, perhaps changed, in its rollouts' logits, times the batch size."""
        leaf = self.everything.gather_logits(self.everything.student_tables, index).detach().requires_grad_()
        rollouts = self.everything.rollouts(index, leaf)
        with torch.enable_grad():
            value = self.loss(rollouts if change is None else change(rollouts))
            (gradient,) = torch.autograd.grad(value, leaf, allow_unused=True, materialize_grads=True)
        return len(index) * gradient.detach()

    def advantages(self, index: Tensor) -> tuple[Float[Tensor, "B T"], bool]:
        r"""The `A` of each token whose logits have the gradient $-A\,(1_y - p)$, and whether that is every token."""
        sensitivity, score = self.sensitivity(index), self.score(index)
        found = -(sensitivity * score).sum(-1) / score.square().sum(-1)
        left = sensitivity + found.unsqueeze(-1) * score
        return found, bool(left.abs().max() <= 1e-6 * sensitivity.abs().max().clamp_min(1e-300))

    def score(self, index: Tensor) -> Float[Tensor, "B T V"]:
        """The gradient of each token's log-probability in its logits."""
        rollouts = self.everything.rollouts(index)
        return torch.nn.functional.one_hot(rollouts.tokens, _VOCABULARY) - torch.softmax(rollouts.student_logits, -1)


def sampled_by(log_ratio: Tensor) -> Callable[[Rollouts], Rollouts]:
    r"""A change: another policy sampled the same tokens, with the given $\log p/\mu$, `(B, T)`."""
    return lambda r: replace(r, behavior_logprobs=r.student_logprobs.detach() - log_ratio)


def cut_short(rollout: int) -> Callable[[Rollouts], Rollouts]:
    """A change: the last token of one rollout is masked."""

    def change(r: Rollouts) -> Rollouts:
        mask = r.mask.clone()
        mask[rollout, -1] = 0.0
        return replace(r, mask=mask)

    return change
