"""The sentences of a report against its numbers: losses with random changes are audited, and every sentence must hold.

Each kind of sentence has its own judge, which recomputes the numbers from the loss and not from the report.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import opdtheory as opd
from opdtheory.auditing import Audit
from opdtheory.auditing.scenario import Case
from opdtheory.exact import Loss
from opdtheory.rollouts import Rollouts
from tests.sparse import some

# How far a followed gradient may be off: a loss in float64, and one predicted from an interpolated weight.
FOLLOWS, INTERPOLATED = 1e-6, 0.05

ADVANTAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "log u": lambda t: t,
    "u": lambda t: t.exp(),
    "-u log u": lambda t: -t * t.exp(),
    "jsd": lambda t: opd.divergence("jsd").weight(t),
    "opd jsd": lambda t: -opd.divergence("jsd").generator(t),
    "hellinger": lambda t: opd.divergence("hellinger").weight(t),
    "log u - log(u)^2 / 100": lambda t: t - t.square() / 100,
}


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A loss with changes, each of which may be absent.

    Attributes:
        form: a key of `ADVANTAGES`, the name of a whole-vocabulary divergence, or an estimator of the zoo.
        attached: whether the reward's detach is missing.
        clamp: bound of the log-ratio.
        masked: whether tokens with a ratio above e are left out.
        baseline: what is subtracted from the advantage.
        discount: factor of each further position.
        temperatures: of student and teacher, for whole-vocabulary losses.
        reduction: how tokens become one number.
        scale: a factor.
    """

    form: str
    attached: bool = False
    clamp: float | None = None
    masked: bool = False
    baseline: float = 0.0
    discount: float = 1.0
    temperatures: tuple[float, float] = (1.0, 1.0)
    reduction: str = "token_sum"
    scale: float = 1.0

    def __call__(self, r: Rollouts) -> Tensor:
        if self.form in ADVANTAGES:
            log_u = r.log_u if self.attached else r.log_u.detach()
            kept = (log_u < 1.0).to(log_u) if self.masked else torch.ones_like(log_u)
            log_u = log_u if self.clamp is None else log_u.clamp(-self.clamp, self.clamp)
            value = -kept * (ADVANTAGES[self.form](log_u) - self.baseline) * r.student_logprobs
        else:
            student, teacher = self.temperatures
            log_p = (r.student_logits / student).log_softmax(-1)
            log_u = (r.teacher_logits / teacher).log_softmax(-1) - log_p
            value = log_p.exp() * opd.divergence(self.form).generator(log_u)
            value = (value if self.clamp is None else value.clamp(max=self.clamp / 20)).sum(-1)
        weight = self.discount ** torch.arange(r.mask.shape[1]).to(r.mask)
        reduced: Tensor = getattr(r, self.reduction)(weight * value)
        return self.scale * reduced


def draw(generator: random.Random) -> tuple[Loss, str, dict[str, Any]]:
    """A loss, the divergence that it claims, and the settings of its audit."""
    claim = generator.choice(("reverse_kl", "forward_kl", "jsd"))
    settings: dict[str, Any] = generator.choice(({}, {}, {"eos": 0}, {"off_policy": 0.3}))
    if generator.random() < 0.25:
        name = generator.choice(("opd", "opd_plus", "k1_reward", "k2_loss", "k3_loss", "k3_reward", "sign", "power"))
        options: dict[str, Any] = {"alpha": 0.5} if name == "power" else {}
        clip: dict[str, Any] = {} if name == "sign" else {"clip_log_ratio": 1.5}
        options |= generator.choice(({}, {"reduction": "sequence_mean"}, clip))
        named = (claim,) if name in ("opd", "opd_plus") else ()
        return opd.estimator(name, *named, **options), claim, settings

    def sometimes(value: Any, otherwise: Any) -> Any:
        return value if generator.random() < 0.25 else otherwise

    drawn = Drawn(
        form=generator.choice((*ADVANTAGES, "reverse_kl", "forward_kl", "hellinger")),
        attached=sometimes(True, False),
        clamp=sometimes(generator.choice((0.5, 2.0)), None),
        masked=sometimes(True, False),
        baseline=sometimes(0.7, 0.0),
        discount=sometimes(0.5, 1.0),
        temperatures=sometimes(generator.choice(((2.0, 2.0), (1.0, 1.5), (0.8, 1.0))), (1.0, 1.0)),
        reduction=sometimes(generator.choice(("token_mean", "sequence_mean")), "token_sum"),
        scale=sometimes(generator.choice((-1.0, 0.5)), 1.0),
    )
    return drawn, claim, settings


class Panel:
    """Expected gradients on the pairs of an audit, one flat vector for each."""

    def __init__(self, report: Audit) -> None:
        self.report, self.cases = report, report.scenario.pairs()

    def of(self, loss: Loss, change: Callable[[Case], Case] = lambda case: case) -> list[Tensor]:
        size = self.report.scenario.batch_size
        return [
            _flat(opd.expected_gradient(loss, case.student, case.teacher, size, case.behavior))
            for case in map(change, self.cases)
        ]

    def local(self, loss: Loss) -> list[Tensor]:
        """What a loss of the student's own tokens would have: the student samples, token by token."""
        return [_flat(opd.expected_gradient(loss, case.student, case.teacher)) for case in self.cases]

    def exact(self, divergence: Any, granularity: str, gamma: float) -> list[Tensor]:
        return [
            _flat(opd.exact_gradient(case.student, case.teacher, divergence, granularity, gamma=gamma))
            for case in self.cases
        ]


def _flat(levels: list[Tensor]) -> Tensor:
    return torch.cat([level.flatten().double() for level in levels])


def misfits(actual: list[Tensor], expected: list[Tensor]) -> list[float]:
    """The error of each pair, relative to the actual gradient, at the common scale with the smallest sum of squares."""
    units = [(a / a.norm(), e / a.norm()) for a, e in zip(actual, expected, strict=True)]
    scale = sum(float(a @ e) for a, e in units) / sum(float(e @ e) for _, e in units)
    return [float((a - scale * e).norm()) for a, e in units] if scale > 0 else [float("inf")]


def contradictions(report: Audit, loss: Loss) -> list[str]:
    """The sentences of a report that its loss contradicts."""
    return list(_contradictions(report, Panel(report), loss))


def _contradictions(report: Audit, panel: Panel, loss: Loss) -> Iterator[str]:
    text = " ".join(str(report).split())
    actual = panel.of(loss)
    claimed = panel.exact(report.claim.divergence, report.granularity, report.claim.gamma)
    cosines = [float(a @ e / (a.norm() * e.norm()).clamp_min(1e-100)) for a, e in zip(actual, claimed, strict=True)]
    if found := re.search(r"uphill on (\d) of (\d) pairs", text):
        if (int(found[1]), int(found[2])) != (sum(c < 0 for c in cosines), len(cosines)):
            yield found[0]
    elif "is not that of" in text and min(cosines) < 0:
        yield "not said to be uphill"
    if "is exactly that of" in text and max(misfits(actual, claimed)) > FOLLOWS:
        yield "is exactly that of"
    yield from _identified(report, panel, actual, text)
    if "some f-divergence is minimised" in text:
        weight = report.weight
        if bool((weight.weight.diff() < -1e-6 * weight.weight.abs().max()).any()):
            yield "minimised, by a weight that falls"
        if max(misfits(actual, panel.local(weighted(weight.log_u, weight.weight)))) > INTERPOLATED:
            yield "minimised, but the weight is not the panel's"
    yield from _of_both(panel, actual, text)
    yield from _causes(report, panel, loss, actual, text)


def _identified(report: Audit, panel: Panel, actual: list[Tensor], text: str) -> Iterator[str]:
    found = report.identified
    if found is None or found.terms is not None:
        return
    divergence = opd.divergence(found.objective, **found.parameters)
    gamma = getattr(found, "gamma", None)
    errors = misfits(actual, panel.exact(divergence, found.granularity, 1.0 if gamma is None else gamma))
    if "Its expected gradient is that of" in text and max(errors) > FOLLOWS:
        yield "Its expected gradient is that of"
    if told := re.search(r"nearest catalogue objective is .*?, off by ([\d.e+-]+)%", text):
        typical = float(np.sqrt(np.mean(np.square(errors))))
        if typical >= 0.98 or abs(float(told[1]) / 100 - typical) > 0.01:
            yield told[0]


def _of_both(panel: Panel, actual: list[Tensor], text: str) -> Iterator[str]:
    if told := re.search(r"(follows|ascends) the Bregman .*?density-power divergence, alpha=([\d.e+-]*\d)", text):
        alpha, sign = float(told[2]), -1.0 if told[1] == "ascends" else 1.0

        def power(r: Rollouts) -> Tensor:
            q, p = r.teacher_logprobs, r.student_logprobs.detach()
            weight = q - p if alpha == 0 else ((alpha * q).exp() - (alpha * p).exp()) / alpha
            return r.token_sum(-sign * weight * r.student_logprobs)

        if max(misfits(actual, panel.local(power))) > FOLLOWS:
            yield told[0]
    if told := re.search(r"The weight is log q - ([\d.e+-]*\d) log p", text):
        share = float(told[1])

        def sharpened(r: Rollouts) -> Tensor:
            weight = r.teacher_logprobs - share * r.student_logprobs.detach()
            return r.token_sum(-weight * r.student_logprobs)

        if max(misfits(actual, panel.local(sharpened))) > 1e-4:
            yield told[0]


def _causes(report: Audit, panel: Panel, loss: Loss, actual: list[Tensor], text: str) -> Iterator[str]:
    if "The teacher is absent" in text or "The teacher does not enter the loss" in text:
        others = panel.of(loss, lambda case: dataclasses.replace(case, teacher=case.teacher.perturbed(1.0, seed=3)))
        if any(float((a - o).norm()) > FOLLOWS * float(a.norm()) for a, o in zip(actual, others, strict=True)):
            yield "the teacher is absent"
    if told := re.search(r"softened distributions, softmax\(logits / ([\d.]*\d)\), times ([\d.]*\d)", text):
        heat = float(told[1])
        softened = Drawn(report.claim.divergence.name, temperatures=(heat, heat), scale=heat * float(told[2]))
        errors = [float((a - e).norm() / a.norm()) for a, e in zip(actual, panel.of(softened), strict=True)]
        # The sentence is of the loss that is left once a reduction, if one is named too, is undone.
        if max(errors) > 1e-4 and "The loss is a mean" not in text:
            yield told[0]


def _onward(x: Tensor, y: Tensor, place: float) -> Tensor:
    """The line through two points, at another place."""
    return (y[0] + (y[1] - y[0]) * (place - x[0]) / (x[1] - x[0])).view(1)


def weighted(log_u: Tensor, weight: Tensor) -> Loss:
    """The loss that puts an interpolated weight on each token, which goes on for a nat beyond its points."""
    ends = [_onward(log_u[:2], weight[:2], float(log_u[0]) - 1), _onward(log_u[-2:], weight[-2:], float(log_u[-1]) + 1)]
    log_u = torch.cat([log_u[:1] - 1, log_u, log_u[-1:] + 1])
    weight = torch.cat([ends[0], weight, ends[1]])

    def loss(r: Rollouts) -> Tensor:
        found = np.interp(r.log_u.detach().numpy(), log_u.numpy(), weight.numpy())
        return r.token_sum(-torch.from_numpy(found) * r.student_logprobs)

    return loss


def check(seed: int) -> None:
    loss, claim, settings = draw(random.Random(seed))
    report = opd.audit(loss, claim, **settings)
    assert contradictions(report, loss) == [], f"{loss}, {claim}, {settings}:\n{report}"


@pytest.mark.parametrize("seed", some(range(4)))
def test_no_sentence_contradicts_the_numbers(seed: int) -> None:
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, 128))
def test_no_sentence_contradicts_the_numbers_of_many(seed: int) -> None:
    check(seed)


def per_sequence(r: Rollouts) -> Tensor:
    return r.sequence_mean(r.log_u.square() / 2)


def test_the_law_refutes_false_sentences() -> None:
    """What was once said of these losses, or nearly."""
    report = opd.audit(per_sequence, "reverse_kl", eos=0)
    assert contradictions(report, per_sequence) == []
    # As if it had not been found that the loss is exact as a mean.
    report = dataclasses.replace(report, reduction=None, against_sum=[])
    minimised = dataclasses.replace(report.weight, explains_panel=True)
    assert any(
        "not the panel's" in x for x in contradictions(dataclasses.replace(report, weight=minimised), per_sequence)
    )

    rising = dataclasses.replace(minimised, weight=-minimised.weight, non_decreasing=True)
    assert any("falls" in x for x in contradictions(dataclasses.replace(report, weight=rising), per_sequence))

    assert report.dependence is not None
    bregman = (
        "The weight is g(q) - h(p): it follows the Bregman divergence of phi, the density-power divergence, alpha=0"
    )
    words = dataclasses.replace(report.dependence, ratio_only=False, words=[bregman])
    assert any(
        "density-power" in x for x in contradictions(dataclasses.replace(report, dependence=words), per_sequence)
    )


def test_nothing_is_said_of_a_ratio_in_whose_gradient_the_teacher_is_absent() -> None:
    def loss(r: Rollouts) -> Tensor:
        reward = (r.tokens == 1).to(r.mask).sum(-1, keepdim=True)
        return r.token_sum(-reward * r.student_logprobs + r.student_logprobs - r.teacher_logprobs)

    text = opd.audit(loss, "reverse_kl").summary()
    assert "The teacher is absent" in text
    assert "function of the ratio" not in text and "f-divergence" not in text and "nearest" not in text


def test_the_law_refutes_false_numbers() -> None:
    def loss(r: Rollouts) -> Tensor:
        return r.token_sum((r.log_u.detach().square() + 0.2 * r.log_u.detach()) * r.student_logprobs)

    report = opd.audit(loss, "reverse_kl")
    assert contradictions(report, loss) == []
    pairs = [dataclasses.replace(pair, cosine=abs(pair.cosine)) for pair in report.pairs]
    assert "not said to be uphill" in contradictions(dataclasses.replace(report, pairs=pairs), loss)
    assert report.identified is not None
    nearer = dataclasses.replace(report.identified, error=0.1)
    assert any("off by" in x for x in contradictions(dataclasses.replace(report, identified=nearer), loss))
    assert contradictions(dataclasses.replace(report, verdict="exact"), loss)
    absent = dataclasses.replace(report.remedies[0], cause="The teacher is absent from the expected gradient.")
    assert "the teacher is absent" in contradictions(dataclasses.replace(report, remedies=[absent]), loss)
    softened = "the forward_kl of the softened distributions, softmax(logits / 2), times 0.5 (T16)."
    named = dataclasses.replace(report.remedies[0], cause=softened)
    assert any("softened" in x for x in contradictions(dataclasses.replace(report, remedies=[named]), loss))
