"""The enumerated student-teacher pairs that an audit looks at."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.errors import BudgetExceededError, InvalidArgumentError
from opdtheory.exact import TabularPolicy, random_pair

__all__ = ["STEP", "Case", "bandit_parts", "bandits", "far_bandit", "far_grid", "is_dear", "log_u_grid", "panel"]

# (sharpness of the student, distance of the teacher): from nearly equal to far apart.
_PAIRS = ((1.0, 0.03), (1.0, 0.5), (0.3, 1.0), (1.0, 1.5), (2.5, 1.0), (0.5, 2.5))

# Vocabulary and horizon of a pair: for single rollouts, and, largest first, for batches that are enumerated.
_SINGLE = (4, 3)
_BATCHED = ((3, 2), (2, 2))

# Evaluations of a coupled loss that one pair, or one bandit, should cost; and the most that one may.
_PAIR_EVALUATIONS = 1_000
_BANDIT_EVALUATIONS = 250
_MOST_EVALUATIONS = 5_000

# Points that a grid has at least, and batches of so many tokens that a bandit may cost where sampling would do.
_FEWEST_POINTS = 5
_AFFORDABLE_BATCHES = 1_000

# Position of the response up to which an environment may write.
_LAST_WRITTEN = 2

# Batch size from which the grid is split into bandits of three tokens, and its wide points then.
_SPLIT_FROM = 3
_SPLIT_POINTS = 17

# Points of the wide part of the grid, odd, and its end.
_GRID_POINTS = 33
_GRID_LIMIT = 4.0

# Log-ratios beyond the grid, of either sign, at which a formula is tried and clamps are looked for.
_FAR = (4.5, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 10.5, 11.0, 11.5, 12.0)

# Share of the teacher's law (above) or of the student's (below) that a far token has.
_FAR_SHARE = 0.02

# Keeps the wide points a millionth off the round log-ratios at which losses clip: on such a bound, rounding alone
# would decide on which side a token falls.
_OFF_ROUND = 1.0 + 2.0**-20

# Spacing of the four points around 0 from which the slope at the teacher is taken.
STEP = 0.01


@dataclass(frozen=True)
class Case:
    """One pair of the panel.

    Attributes:
        student: the policy that is trained.
        teacher: the policy that scores.
        behavior: the policy that samples, or None for the student.
        label: what distinguishes the pair, for tables.
    """

    student: TabularPolicy
    teacher: TabularPolicy
    behavior: TabularPolicy | None
    label: str


def panel(
    batch_size: int = 1,
    eos: int | None = None,
    off_policy: float = 0.0,
    seed: int = 0,
    prompts: int = 1,
    environment: Iterable[int] = (),
    shared_prompt: bool = False,
) -> list[Case]:
    """Six pairs of one size, from nearly equal to far apart, small enough for the batch size.

    Args:
        batch_size: rollouts that the loss sees at once.
        eos: the token that ends a rollout, or None.
        off_policy: standard deviation of the noise on the sampling policy's logits.
        seed: of everything.
        prompts: number of prompts; from 2 on a prompt of one token, drawn by a law of its own, comes before the
            response: position 0, written by the environment.
        environment: positions of the response, counted from 0 after the prompt, whose tokens an environment
            writes. The response is as long as without, or longer where the student would not have the last word.
        shared_prompt: whether the batches to be counted share a prompt, as in `gradient_moments`.

    Raises:
        InvalidArgumentError: `prompts` or `environment` is out of range.
        BudgetExceededError: batches of this size cannot be enumerated even on the smallest pair.
    """
    written = tuple(environment)
    _check_written(prompts, written)
    sizes = [
        (vocab_size, max(horizon, 2 + max(written, default=-1)))
        for vocab_size, horizon in (_BATCHED if batch_size > 1 else (_SINGLE,))
    ]
    counts = {size: _evaluations(size, batch_size, prompts, shared_prompt) for size in sizes}
    vocab_size, horizon = next((size for size in sizes if counts[size] <= _PAIR_EVALUATIONS), sizes[-1])
    if counts[vocab_size, horizon] > _MOST_EVALUATIONS:
        raise BudgetExceededError(
            f"auditing batches of {batch_size} rollouts",
            counts[vocab_size, horizon],
            _MOST_EVALUATIONS,
            "audit a smaller batch_size",
        )
    if prompts > vocab_size:
        raise InvalidArgumentError("prompts", f"is {prompts}; the panel's policies have {vocab_size} tokens")
    cases = []
    for i, (scale, distance) in enumerate(_PAIRS):
        levels = (0, *(1 + n for n in written)) if prompts > 1 else written
        student, teacher = random_pair(
            vocab_size,
            horizon + (prompts > 1),
            eos=eos,
            scale=scale,
            distance=distance,
            seed=1000 * seed + i,
            environment=levels,
        )
        if prompts > 1:
            student, teacher = _with_prompts(student, prompts), _with_prompts(teacher, prompts)
        behavior = student.perturbed(off_policy, seed=1000 * seed + 500 + i) if off_policy else None
        cases.append(Case(student, teacher, behavior, f"sharpness {scale:g}, distance {distance:g}"))
    return cases


def _check_written(prompts: int, environment: tuple[int, ...]) -> None:
    if isinstance(prompts, bool) or not isinstance(prompts, int) or prompts < 1:
        raise InvalidArgumentError("prompts", f"is {prompts!r}; a positive integer is needed")
    for n in environment:
        if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= _LAST_WRITTEN:
            raise InvalidArgumentError("environment", f"holds {n!r}; every position must lie in [0, {_LAST_WRITTEN}]")


def _evaluations(size: tuple[int, int], batch_size: int, prompts: int, shared_prompt: bool) -> int:
    """Batches up to symmetry, of sequences of full length."""
    sequences = size[0] ** size[1]
    if shared_prompt:
        return prompts * _batches(sequences, batch_size)
    return _batches(prompts * sequences, batch_size)


def _with_prompts(policy: TabularPolicy, prompts: int) -> TabularPolicy:
    """The policy with all but the first tokens excluded from position 0."""
    first = policy.logits[0].clone()
    first[:, prompts:] = -torch.inf
    return TabularPolicy([first, *policy.logits[1:]], eos=policy.eos, environment=policy.environment)


def is_dear(batch_size: int) -> bool:
    """Whether recovering the weight of a loss that couples batches of this size takes seconds."""
    return _batches(_FEWEST_POINTS, batch_size) > _AFFORDABLE_BATCHES


def log_u_grid(batch_size: int = 1) -> Float[Tensor, " points"]:
    """Log-ratios at which the weight is recovered: symmetric, 0 in the middle, `STEP` and `2 STEP` beside it."""
    wide = _GRID_POINTS if batch_size < _SPLIT_FROM else _SPLIT_POINTS  # 0 is in both parts
    while batch_size > 1 and wide > 1 and _bandit_evaluations(wide + 4, batch_size) > _BANDIT_EVALUATIONS:
        wide -= 2
    middle = STEP * torch.arange(-2, 3, dtype=torch.float64)
    above = _OFF_ROUND * torch.linspace(0.0, _GRID_LIMIT, wide // 2 + 1, dtype=torch.float64)[1:]
    return torch.cat([-above.flip(0), middle, above])


def bandit_parts(batch_size: int) -> list[Float[Tensor, " points"]]:
    """The grid in parts that are symmetric and hold 0, each for bandits of its own.

    Batches of three and more out of few tokens are few: three at a time, `(-t, 0, t)`, cover a fine grid.
    """
    log_u = log_u_grid(batch_size)
    if batch_size < _SPLIT_FROM:
        return [log_u]
    return [torch.stack([-t, torch.zeros_like(t), t]) for t in log_u[len(log_u) // 2 + 1 :]]


def _bandit_evaluations(points: int, batch_size: int) -> int:
    """Batches that the bandits of one law take."""
    if batch_size < _SPLIT_FROM:
        return _batches(points, batch_size)
    return points // 2 * _batches(3, batch_size)


def far_grid(sign: int) -> Float[Tensor, " points"]:
    """Log-ratios of one sign from the end of the grid on, outwards."""
    return sign * _OFF_ROUND * torch.tensor((_GRID_LIMIT, *_FAR), dtype=torch.float64)


def far_bandit(log_u: Float[Tensor, " points"], off_policy: float, seed: int) -> Case:
    """A one-step pair whose tokens have the log-ratios given, all of one sign, and a last one that balances the laws.

    All but that one have a small share in the law that favours them, so that none outweighs the others.
    """
    share = torch.full_like(log_u, _FAR_SHARE)
    p, q = (share * (-log_u).exp(), share) if bool((log_u > 0).all()) else (share, share * log_u.exp())
    student, teacher = (
        TabularPolicy([torch.cat([law, 1.0 - law.sum(0, keepdim=True)]).log().unsqueeze(0)]) for law in (p, q)
    )
    behavior = student.perturbed(off_policy, seed=seed + 1) if off_policy else None
    return Case(student, teacher, behavior, "far bandit")


def bandits(log_u: Float[Tensor, " points"], off_policy: float, seed: int) -> list[Case]:
    r"""One-step pairs with one token per grid point, whose log-ratios are the grid exactly.

    With $p_a \propto r_a e^{-t_a/2}$, $q_a \propto r_a e^{t_a/2}$ and both $t$ and $r$ symmetric about the
    middle, the normalisers agree and $\log u_a = t_a$. Different $r$ sweep $p$ apart from $u$.
    """
    generator = torch.Generator().manual_seed(seed)
    cases = []
    for spread in (0.0, 0.7, 1.4):
        noise = spread * torch.randn(log_u.shape, generator=generator, dtype=torch.float64)
        log_r = (noise + noise.flip(0)) / 2
        student = TabularPolicy([(log_r - log_u / 2).unsqueeze(0)])
        teacher = TabularPolicy([(log_r + log_u / 2).unsqueeze(0)])
        behavior = student.perturbed(off_policy, seed=seed + 1) if off_policy else None
        cases.append(Case(student, teacher, behavior, f"bandit, spread {spread:g}"))
    return cases


def _batches(sequences: int, batch_size: int) -> int:
    return math.comb(sequences + batch_size - 1, batch_size)
