"""The smallest changes that would make a loss follow its claim, each verified by an audit of the changed loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from opdtheory.auditing.fixes.candidates import candidates, gauge
from opdtheory.auditing.fixes.causes import at_fault
from opdtheory.auditing.fixes.corrections import Curve
from opdtheory.auditing.fixes.facts import Candidate, Facts, alike
from opdtheory.auditing.fixes.remainder import remainder
from opdtheory.auditing.fixes.substitutes import bucket_added, last_resort, topk_form
from opdtheory.auditing.fixes.topk import wide_pair
from opdtheory.auditing.fixes.trial import Trial, attempt
from opdtheory.auditing.naming.recover import RecoveredWeight, recover_weight
from opdtheory.auditing.remembered import Remembered
from opdtheory.auditing.report import Audit, Remedy
from opdtheory.auditing.scenario import Case
from opdtheory.choices import Verdict
from opdtheory.errors import check_integer
from opdtheory.exact import Loss
from opdtheory.exact.modes import plain_modes

__all__ = ["remedies"]

# Verdicts from better to worse; a fix must be faithful, and better than the loss.
_RANK = {"exact": 0, "exact_up_to_scale": 1}
_WRONG = 2

# Kinds that are tried because of the settings, whatever the loss.
_BLIND = ("reduction", "padding", "importance")

# The most changes tried for one loss; most cost the expectation on one pair.
_TRIALS = 80
_COUPLED_TRIALS = 20


def remedies(
    loss: Loss,
    *,
    report: Audit,
    verdict: Callable[[Loss], tuple[str, float]] | None = None,
    limit: int = 3,
    pairs: int | None = None,
) -> list[Remedy]:
    """Up to three changes that make a loss descend what it claims, the smallest first, each verified.

    Every change is made to the inputs and outputs of the black box, and the changed loss is audited; a change that does
    not make it faithful is not offered. If nothing smaller works, the last resort is the library's own estimator. Two
    kinds of remedy may have `verified=False`, since they lead to another divergence than the claimed one: a change of
    gauge (T5b), and a tail bucket for more than one token (T9d).

    Args:
        loss: the black box.
        report: the audit of `loss`, whose claim, scenario, weight and findings are used.
        verdict: maps a changed loss to its verdict and worst relative bias (default: a `Trial` on the audit's pairs).
        limit: the largest number of remedies.
        pairs: number of the audit's pairs that judge a changed loss, those that refute most first; None takes all.

    Returns:
        The remedies; none if the loss is exact and stays so when lengths vary.

    Raises:
        InvalidArgumentError: `limit` or `pairs` is below 1.
    """
    check_integer("limit", limit)
    if pairs is not None:
        check_integer("pairs", pairs)
    lengths = report.variable_lengths is not None and report.variable_lengths.verdict not in _RANK
    top_k = _beyond_the_panel(report)
    if report.verdict == "undecided" or (report.verdict == "exact" and not lengths and top_k is None):
        return []
    # What is wrong at fixed length is to be right at any.
    asked = lengths or (report.verdict == "biased" and report.variable_lengths is None)
    with plain_modes():
        known = None if report.dependence is None else report.dependence.top_k
        facts = replace(_facts(Remembered(loss), report, asked, pairs), top_k=known)
        if top_k is not None:
            facts.trial.cases.insert(0, Case(*wide_pair(top_k), None, f"V={top_k} and more"))
        narrow = lengths or top_k is not None
        found = _Search(verdict or facts.trial, _WRONG if narrow else _RANK.get(report.verdict, _WRONG), facts)
        return found.run(report, limit)


def _beyond_the_panel(report: Audit) -> int | None:
    """The k of a top-k loss to which the panel shows the whole vocabulary; None for another loss."""
    found, scenario = report.dependence, report.scenario
    if found is None or found.top_k is None or scenario.coupled or scenario.off_policy:
        return None
    return found.top_k if found.top_k >= scenario.pairs()[0].student.vocab_size else None


def _facts(loss: Loss, report: Audit, lengths: bool, pairs: int | None) -> Facts:
    scenario, tolerance = report.scenario, report.tolerance
    few = {} if pairs is None else {"pairs": pairs}
    trial = Trial(loss, report.claim, scenario, tolerance=tolerance, lengths=lengths, **few)
    weight: RecoveredWeight | None = report.weight
    if scenario.off_policy:
        weight = attempt(lambda: recover_weight(loss, replace(scenario, off_policy=0.0), tolerance))
    curve = None
    if weight is not None and weight.depends_on_ratio_only:
        curve = Curve(weight.log_u, weight.weight, alike(tolerance))
    return Facts(loss, report.claim, scenario, report.verdict, lengths, curve, trial, report.weight.explains_panel)


class _Search:
    """The search for changes, one after another, until enough are verified."""

    def __init__(self, verdict: Callable[[Loss], tuple[str, float]], rank: int, facts: Facts) -> None:
        self.verdict, self.rank, self.facts = verdict, rank, facts
        self._of_two: Trial | None = None

    def run(self, report: Audit, limit: int) -> list[Remedy]:
        """The remedies, smallest change first."""
        claim = _other_claim(report)
        # Verifying a fix is expensive if rollouts are coupled, so one is enough.
        most = 1 if self.facts.scenario.coupled else limit - (claim is not None and limit > 1)
        found = self._verified(most)
        if not any(remedy.cause for remedy in found):
            found = self._without_teacher(found)
        if not any(remedy.verified for remedy in found):
            found += [r for r in [self.tried(last_resort(self.facts))] if r is not None]
        if found and not any(remedy.cause for remedy in found):
            found[0] = replace(found[0], cause=at_fault(self.facts))
        if claim is not None:
            found.append(claim)
        found += [r for r in (self._gauge(), self._tail(report, found)) if r is not None]
        return found[:limit]

    def _verified(self, most: int) -> list[Remedy]:
        found: list[Remedy] = []
        allowed = _COUPLED_TRIALS if self.facts.scenario.coupled else _TRIALS
        for _, candidate in zip(range(allowed), candidates(self.facts), strict=False):
            # What is wrong is known by name, or two changes together would be offered beside a single one.
            if len(found) == most or (found and (found[0].cause or "," in candidate.kind)):
                break
            if found and (candidate.kind in _BLIND or candidate.kind in {remedy.kind for remedy in found}):
                continue
            remedy = self.tried(candidate)
            if remedy is not None:
                found.append(remedy)
        return found

    def tried(self, candidate: Candidate) -> Remedy | None:
        """The remedy, if the changed loss is faithful and better than the loss was."""
        judged = self._judged(candidate)
        if judged is None or _RANK.get(judged[0], _WRONG) >= self.rank:
            return None
        if not self._holds_in_batches(candidate):
            return None
        cause = f"{candidate.cause} {candidate.follows}".strip()
        return Remedy(candidate.kind, candidate.text, *judged, verified=True, cause=cause)

    def _holds_in_batches(self, candidate: Candidate) -> bool:
        """Whether another reduction is right in batches of two too: of one rollout, all means are the same."""
        if "reduction" not in candidate.kind or self.facts.scenario.coupled:
            return True
        if self._of_two is None:
            facts = self.facts
            lengths = facts.scenario if facts.scenario.lengths == "fixed" else facts.scenario.ending
            scenario = replace(lengths, batch_size=2, prompts=1, environment=())
            self._of_two = Trial(facts.original, facts.claim, scenario, tolerance=facts.trial.tolerance, pairs=0)
        of_two = self._of_two
        if not of_two.cases:
            return True
        judged = attempt(lambda: of_two(candidate.loss))
        return judged is not None and judged[0] in _RANK

    def _gauge(self) -> Remedy | None:
        candidate = gauge(self.facts)
        judged = None if candidate is None else self._judged(candidate)
        if candidate is None or judged is None:
            return None
        verified = judged[0] in _RANK
        end = " (T5b)." if verified else ", though of another divergence than the one claimed (T5b)."
        return Remedy("gauge", candidate.text + end, *judged, verified=verified)

    def _without_teacher(self, found: list[Remedy]) -> list[Remedy]:
        """The remedies of a loss in which the teacher is absent, which is said with the first of them or alone."""
        cause = remainder(self.facts)
        judged = None if cause is None else attempt(lambda: self.facts.trial(cause.loss, to_the_end=True))
        if cause is None or judged is None:
            return found
        if found:
            return [replace(found[0], cause=cause.cause), *found[1:]]
        return [Remedy(cause.kind, cause.text, *judged, verified=judged[0] in _RANK, cause=cause.cause)]

    def _tail(self, report: Audit, found: list[Remedy]) -> Remedy | None:
        """The tail bucket if it brings a truncated loss nearer without curing it."""
        form = topk_form(self.facts)
        if form is None or form.form != "topk_truncated" or any(remedy.kind == "tail" for remedy in found):
            return None
        candidate = bucket_added(self.facts, form)
        judged = attempt(lambda: self.facts.trial(candidate.loss, to_the_end=True))
        if judged is None or judged[1] >= report.relative_bias:
            return None
        text = " The loss then descends the divergence of the coarser distribution exactly, not the claimed one."
        return Remedy("tail", candidate.text + text, *judged, verified=judged[0] in _RANK)

    def _judged(self, candidate: Candidate) -> tuple[str, float] | None:
        return attempt(lambda: self.verdict(candidate.loss))


def _other_claim(report: Audit) -> Remedy | None:
    """The objective that the loss does descend, as a claim."""
    found = report.identified
    if report.verdict != "other_objective" or found is None or report.descends is None:
        return None
    exact = abs(found.scale - 1.0) <= report.tolerance
    times = "" if exact else f" times {found.scale:.6g}"
    text = f"Claim {report.descends} ({found.granularity}) instead: the expected gradient is exactly that{times}."
    verdict: Verdict = "exact" if exact else "exact_up_to_scale"
    return Remedy("claim", text, verdict, max(abs(found.scale - 1.0), found.error), verified=True)
