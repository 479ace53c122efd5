"""Other worlds than the panel's: lengths, prompts, batch sizes, vocabularies, horizons, ratios and dtypes.

A finding on four tokens, three steps and one rollout is worth a gate only if it holds where the loss is used. Each
world changes one thing and is enumerated too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from opdtheory.auditing.naming.bandits import bandits
from opdtheory.auditing.naming.fit import fit_scale, flat
from opdtheory.auditing.records import Keyed
from opdtheory.auditing.reductions import WORDS, undone
from opdtheory.auditing.remembered import Remembered
from opdtheory.auditing.scenario import Case, Scenario, count_batches
from opdtheory.choices import REDUCTIONS, Reduction
from opdtheory.errors import BudgetExceededError, InvalidArgumentError, LossError
from opdtheory.exact import Enumeration, Loss
from opdtheory.exact.probe import Probe
from opdtheory.objective import Objective
from opdtheory.rollouts import Rollouts

__all__ = ["LARGE_VOCABULARY", "LARGEST_LOG_U", "LONG", "SIZES", "Asked", "Plan", "World", "ask", "plans"]

# The batch sizes, the vocabulary, the number of steps and the log-ratio that are asked about beside the panel's.
SIZES = (1, 2, 3, 5)
LARGE_VOCABULARY, _LARGE_IF_CALLED = 300, 64
LONG = 5
LARGEST_LOG_U = 30.0

# Pairs of the panel that are used in a world, batches that it may take, and calls: of a loss that `torch.func.vmap`
# maps over batches, and of one that has to be called for each.
_CHOSEN = (1, 3)
_MOST_BATCHES, _MOST_CALLS = 400, 100
_BUDGET, _BUDGET_OF_CALLS = 1_500, 200

# Rounding of the weight of a rare token, relative to that of its gradient, beside tokens that are e^30 times as likely.
_AMPLIFIED = 10.0

# A gradient nearer than this to the exact one is not zero.
_ZERO_BEYOND = 0.1

# The largest difference of a gradient in float32 from that in float64, relative to the largest entry.
_FLOAT32 = 1e-3

_LENGTHS, _TRIMMED = "rollouts that end early", "padding that ends with the longest rollout"


@dataclass(frozen=True, eq=False)
class World(Keyed):
    """Whether a finding holds in one world beside the panel's.

    Attributes:
        name: what is different there.
        holds: whether the loss has the same expected gradient there as on the panel, up to a scale where the batch size
            or the shape differs; None if it could not be asked.
        error: distance from the exact gradient at the best scale, relative to the loss's; None if it was not measured.
        scale: the best scale; None if it was not measured.
        detail: one sentence.
        varies: whether lengths vary there, so that the reduction matters.
    """

    name: str
    holds: bool | None
    error: float | None
    scale: float | None
    detail: str
    varies: bool = False


@dataclass(frozen=True)
class Asked:
    """The worlds of an audit, and the reduction that they show.

    Attributes:
        worlds: the worlds, in the order in which they were asked.
        reduction: the reduction as which the loss is exact where lengths vary; None if it is exact as none, or if no
            lengths vary.
    """

    worlds: list[World] = field(default_factory=list)
    reduction: Reduction | None = None


@dataclass(frozen=True)
class Plan:
    """A world to be asked: pairs of policies, batches, and a change of what the loss sees.

    Attributes:
        name: what is different there.
        scenario: what the rollouts look like.
        cases: the pairs of policies.
        varies: whether lengths vary.
        same_shape: whether an exact loss has scale 1 there too.
        rounding: the multiple of the panel's rounding that is left.
        change: what is done to the loss.
        budget: the largest number of evaluations on one pair.
    """

    name: str
    scenario: Scenario
    cases: list[Case]
    varies: bool = False
    same_shape: bool = True
    rounding: float = 1.0
    change: Callable[[Loss], Loss] = field(default=lambda loss: loss)
    budget: int = _BUDGET


@dataclass(frozen=True)
class _Found:
    """What a world shows: misfit and scale, or why there is none and whether that speaks against the loss."""

    error: float | None = None
    scale: float | None = None
    reason: str = ""
    wrong: bool = False

    def fits(self, tolerance: float) -> bool:
        """Whether the loss was evaluated and has the exact direction."""
        return self.error is not None and self.error <= tolerance


def ask(
    loss: Loss,
    objective: Objective,
    scenario: Scenario,
    claimed: str,
    scale: float,
    tolerance: float,
    everything: bool = True,
) -> Asked:
    """Ask whether a loss that follows an objective on the panel follows it in other worlds.

    Args:
        loss: the black box.
        objective: the objective that it follows on the panel.
        scenario: what the rollouts of the panel look like.
        claimed: the claimed reduction, or `any`.
        scale: the scale on the panel, 1 for an exact loss.
        tolerance: relative error that counts as rounding.
        everything: whether all worlds are asked, or those alone that are most often wrong: rollouts that end early,
            batches of 3, a larger vocabulary.
    """
    called = not _is_mapped(loss, scenario)
    worth = [
        p
        for p in plans(scenario, called)
        if everything or p.name in (_LENGTHS, "batches of 3") or p.name.endswith(" tokens")
    ]
    varying = [plan for plan in worth if plan.varies]
    # Two reductions are asked on the same batches.
    known = Remembered(loss) if called else loss
    seen: dict[tuple[str, Reduction], _Found] = {}

    def found(plan: Plan, reduction: Reduction) -> _Found:
        key = plan.name, reduction
        if key not in seen:
            seen[key] = _ask(plan, known, objective, reduction)
        return seen[key]

    def fits(reduction: Reduction) -> bool:
        evaluated = False
        for plan in varying:  # one that does not fit is enough
            answer = found(plan, reduction)
            if answer.wrong or (answer.error is not None and not answer.fits(tolerance)):
                return False
            evaluated |= answer.error is not None
        return evaluated

    reduction: Reduction | None = next((r for r in REDUCTIONS if fits(r)), None)
    held_to: Reduction = reduction or "token_sum"
    if claimed != "any":
        held_to = next(r for r in REDUCTIONS if r == claimed)
    elsewhere: Reduction = reduction or held_to
    exact = abs(scale - 1.0) <= tolerance
    worlds = [
        _judged(plan, found(plan, held_to if plan.varies else elsewhere), reduction, exact, tolerance) for plan in worth
    ]
    if everything:
        worlds.append(_in_float32(loss, scenario))
    return Asked(worlds, reduction)


def plans(scenario: Scenario, called: bool = False) -> list[Plan]:
    """The worlds beside a panel's that its batches allow, each with some of its pairs.

    Args:
        scenario: what the rollouts of the panel look like.
        called: whether the loss has to be called for each batch; its worlds are smaller.
    """
    found: list[Plan] = []
    ending = scenario.eos is not None or scenario.lengths != "fixed"
    if scenario.eos is None and ending:
        found.append(Plan(_LENGTHS, scenario.ending, _pairs(scenario.ending), varies=True))
    if ending:
        several = replace(scenario.ending, batch_size=max(scenario.batch_size, 2))
        cases = _fitting(several, ((3, 2), (2, 2)), called)
        found.append(Plan(_TRIMMED, several, cases, varies=True, same_shape=False, change=_trimmed))
    for size in SIZES:
        if size != scenario.batch_size:
            other = replace(scenario.ending if ending else scenario, batch_size=size)
            cases = _fitting(other, ((3, 2), (2, 2), (2, 1)), called)
            found.append(Plan(f"batches of {size}", other, cases, varies=ending, same_shape=False))
    if scenario.prompts == 1:
        prompted = replace(scenario, prompts=2)
        found.append(Plan("a prompt", prompted, _fitting(prompted, ((3, 2), (2, 2), (2, 1)), called)))
    largest = _LARGE_IF_CALLED if called else LARGE_VOCABULARY
    large = next(v for v in range(largest, 1, -1) if count_batches(v, scenario.batch_size) <= _MOST_BATCHES)
    if large > 4:
        one_step = replace(scenario, environment=())
        found.append(
            Plan(
                f"{large} tokens",
                one_step,
                one_step.sized(large, 1, _CHOSEN[: 1 if called else None]),
                same_shape=False,
            )
        )
    longer = _fitting(scenario, ((3, LONG), (2, LONG), (2, LONG - 1)), called)
    if longer and longer[0].student.horizon > 3:
        steps = longer[0].student.horizon - (scenario.prompts > 1)
        found.append(Plan(f"{steps} steps", scenario, longer, same_shape=False))
    found.append(_far(scenario))
    budget = _BUDGET_OF_CALLS if called else _BUDGET
    return [replace(plan, budget=budget) for plan in found if plan.cases]


def _pairs(scenario: Scenario) -> list[Case]:
    """Some of the panel's own pairs, or none if batches of this size are too many."""
    try:
        return [scenario.pairs()[i] for i in _CHOSEN]
    except BudgetExceededError:
        return []


def _fitting(scenario: Scenario, sizes: tuple[tuple[int, int], ...], called: bool) -> list[Case]:
    """Pairs of the first size whose batches are few enough; none if no size is."""
    longest = 2 + max(scenario.environment, default=-1)
    for vocab_size, steps in sizes:
        vocab_size = max(vocab_size, 1 + (scenario.eos or 0), scenario.prompts)
        steps = max(steps, longest)
        count = (scenario.prompts * vocab_size**steps) if scenario.prompts > 1 else vocab_size**steps
        if count_batches(count, scenario.batch_size) <= (_MOST_CALLS if called else _MOST_BATCHES):
            return scenario.sized(vocab_size, steps, _CHOSEN[: 1 if called else None])
    return []


def _far(scenario: Scenario) -> Plan:
    """One step with log-ratios up to `LARGEST_LOG_U` of either sign; none is 0, where rounding would decide a sign."""
    half = torch.tensor([0.3, 1.0, 5.0, 15.0, 20.0, LARGEST_LOG_U], dtype=torch.float64)
    if scenario.coupled:
        half = half[:: len(half) - 1]
    log_u = torch.cat([-half.flip(0), half])
    few = count_batches(len(log_u), scenario.batch_size) <= _MOST_BATCHES
    fixed = replace(scenario, eos=None, prompts=1, environment=(), shared_prompt=False)
    cases = bandits(log_u, fixed)[:2] if few else []
    return Plan(f"log-ratios up to {LARGEST_LOG_U:g}", fixed, cases, same_shape=False, rounding=_AMPLIFIED)


def _is_mapped(loss: Loss, scenario: Scenario) -> bool:
    """Whether the loss can be mapped over batches of the panel's size, on a pair of the panel: it may insist on it."""
    case = (_pairs(scenario) or _pairs(scenario.single))[0]
    probe = Probe(loss, Enumeration.build(case.student, case.teacher, case.behavior))
    return probe.maps(torch.arange(len(probe.everything)), scenario.batch_size)


def _trimmed(loss: Loss) -> Loss:
    """The loss on batches whose padding ends with the longest rollout."""

    def trimmed(rollouts: Rollouts) -> Tensor:
        written = rollouts.mask.sum(0).nonzero()
        stop = 1 + int(written.max()) if len(written) else rollouts.mask.shape[1]
        return loss(rollouts.cut(stop))

    return trimmed


def _ask(plan: Plan, loss: Loss, objective: Objective, reduction: Reduction) -> _Found:
    changed = plan.change(undone(loss, reduction))
    try:
        moments = [plan.scenario.moments(changed, case, plan.budget, thorough=True) for case in plan.cases]
        exact = [flat(case.exact(objective)) for case in plan.cases]
    except BudgetExceededError as error:
        return _Found(reason=f"Not asked: {error}.")
    except LossError as error:
        # A baseline of other rollouts has nothing to subtract if there are none.
        alone = plan.scenario.batch_size == 1
        return _Found(reason=f"The loss fails here: {error}", wrong=not alone)
    except InvalidArgumentError as error:  # an estimator or adapter of this library refuses the batch
        return _Found(reason=f"The loss refuses such rollouts: {error}.")
    except Exception as error:  # whatever the loss raises, it is not silently wrong
        first = (str(error).strip().splitlines() or [""])[0]
        return _Found(reason=f"The loss raises {type(error).__name__} here: {first}")
    fit = fit_scale([flat(m.mean) for m in moments], exact)
    # A ratio of e^30 makes the noise so large that a sound gradient is small beside it: only what misses can be zero.
    if fit.worst_error > _ZERO_BEYOND and all(m.is_zero for m in moments):
        alone = plan.scenario.batch_size == 1
        return _Found(reason="The expected gradient is zero here.", wrong=not alone)
    return _Found(fit.worst_error, fit.scale)


def _judged(plan: Plan, found: _Found, reduction: Reduction | None, exact: bool, tolerance: float) -> World:
    if found.error is None:
        return World(plan.name, False if found.wrong else None, None, None, found.reason, plan.varies)
    tolerance *= plan.rounding
    if not found.fits(tolerance):
        off = "any amount" if found.error == float("inf") else f"{100 * found.error:.3g}%"
        detail = f"Off by up to {off} of its length even at the best scale."
        if plan.varies and reduction is not None:
            detail += f" It is exact as {WORDS[reduction]}."
        return World(plan.name, False, found.error, found.scale, detail, plan.varies)
    assert found.scale is not None
    at_scale = abs(found.scale - 1.0) <= tolerance
    if exact and not at_scale and plan.same_shape:
        detail = f"The gradient is {found.scale:.6g} times the exact one."
        return World(plan.name, False, found.error, found.scale, detail, plan.varies)
    times = "" if at_scale else f", times {found.scale:.6g}"
    return World(plan.name, True, found.error, found.scale, f"Exact here too{times}.", plan.varies)


def _in_float32(loss: Loss, scenario: Scenario) -> World:
    """The gradient of one batch in float32, beside that in float64."""
    name = "float32"
    try:
        (case,) = replace(scenario, vocabulary=None).sized(4, 3, (1,))
        everything = Enumeration.build(case.student, case.teacher, case.behavior)
        size = scenario.batch_size if scenario.coupled else 8
        index = torch.linspace(0, len(everything) - 1, size).round().long()
        wide, narrow = (_gradient(loss, everything, index, dtype) for dtype in (torch.float64, torch.float32))
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return World(name, None, None, None, f"The loss raises {type(error).__name__} here: {first}")
    largest = float(wide.abs().max())
    if largest == 0.0:
        return World(name, None, None, None, "The gradient of the batch is zero.")
    off = float((narrow.double() - wide).abs().max()) / largest
    if not off <= _FLOAT32:
        return World(name, False, off, None, f"The gradient of a batch is off by {off:.2g} of its largest entry.")
    return World(name, True, off, None, "The gradient of a batch is that of float64, up to rounding.")


def _gradient(loss: Loss, everything: Enumeration, index: Tensor, dtype: torch.dtype) -> Tensor:
    rows = everything.gather_logits([t.detach() for t in everything.student_tables], index)
    leaf = rows.to(dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(everything.rollouts(index, leaf).to(dtype)), leaf)
    return gradient
