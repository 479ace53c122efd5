"""`opdtheory verify`: every identity, every shipped estimator, and a false twin of each that must be refuted."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from opdtheory.auditing import Audit, audit, quick_verdict
from opdtheory.errors import InvalidArgumentError
from opdtheory.estimators import Claim, Estimator, estimator
from opdtheory.estimators.factory import examples
from opdtheory.exact.modes import plain_modes
from opdtheory.rollouts import Rollouts
from opdtheory.testing.assertions import assert_claim, claim_settings
from opdtheory.theorems import IdentityResult, TheoremResult, theorems
from opdtheory.theorems.proofs import Proof, proof

__all__ = ["EstimatorResult", "Verification", "check_estimator", "shipped_estimators", "verify"]

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class EstimatorResult:
    """What an audit found about one shipped estimator and about its false twin.

    Attributes:
        name: the call that makes the estimator.
        label: its short form, such as `opd(jsd, gamma=1.0)`.
        claim: what the estimator claims.
        audit: what the audit found.
        agrees: whether the audit confirms the claim.
        twin: the loss that the claim must not fit.
        twin_verdict: the audit's verdict on the twin.
    """

    name: str
    label: str
    claim: Claim
    audit: Audit
    agrees: bool
    twin: str
    twin_verdict: str

    @property
    def twin_refuted(self) -> bool:
        """Whether the audit's verdict on the twin differs from the claim."""
        return self.twin_verdict != self.claim.verdict

    @property
    def passed(self) -> bool:
        """Whether the claim holds for the estimator and not for its twin."""
        return self.agrees and self.twin_refuted


@dataclass(frozen=True)
class Verification:
    """All results of one run.

    Attributes:
        theorems: one result per theorem, with its derivation and checks.
        estimators: one result per shipped estimator.
        seconds: how long the run took.
    """

    theorems: list[TheoremResult]
    estimators: list[EstimatorResult]
    seconds: float

    @property
    def identities(self) -> list[IdentityResult]:
        """The checks of all theorems, in order."""
        return [result for theorem in self.theorems for result in theorem.identities]

    @property
    def proofs(self) -> list[Proof]:
        """The proofs in Coq that are recorded of these theorems; they are not checked again."""
        return [found for theorem in self.theorems if (found := proof(theorem.number)) is not None]

    @property
    def passed(self) -> bool:
        """Whether every step, identity and claim holds and every false twin is refuted."""
        return all(r.passed for r in self.theorems) and all(r.passed for r in self.estimators)

    @property
    def twins_refuted(self) -> int:
        """The number of false twins refuted."""
        of_identities = sum(len(r.twins) - len(r.survivors) for r in self.identities)
        return of_identities + sum(r.twin_refuted for r in self.estimators)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain Python values for `json.dumps`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "passed": self.passed,
            "seconds": self.seconds,
            "theorems": [
                {
                    "number": theorem.number,
                    "name": theorem.name,
                    "passed": theorem.passed,
                    "seconds": theorem.seconds,
                    "machine_checked": found.to_dict() if (found := proof(theorem.number)) else None,
                    "derivation": [vars(step) for step in theorem.steps],
                    "identities": [
                        {**vars(r), "error": _finite(r.error), "twins": {k: _finite(v) for k, v in r.twins.items()}}
                        | {"holds": r.holds, "survivors": r.survivors, "passed": r.passed}
                        for r in theorem.identities
                    ],
                }
                for theorem in self.theorems
            ],
            "estimators": [
                {
                    "name": r.name,
                    "claim": r.claim.to_dict(),
                    "verdict": r.audit.verdict,
                    "descends": r.audit.descends,
                    "relative_bias": r.audit.relative_bias,
                    "scale": r.audit.scale,
                    "twin": r.twin,
                    "twin_verdict": r.twin_verdict,
                    "passed": r.passed,
                }
                for r in self.estimators
            ],
        }


def verify(
    select: Sequence[str] = (), *, workers: int = 1, progress: Callable[[str], None] = lambda _: None
) -> Verification:
    """Check every theorem and the claim of every shipped estimator.

    Args:
        select: numbers of theorems (`"T4"`) and names of estimators (`"opd_plus"`) to check (default: all).
        workers: number of processes. More than one starts Python anew, so a script needs the usual
            `if __name__ == "__main__"` guard.
        progress: called with the name of each item when it is done.

    Raises:
        InvalidArgumentError: `select` names neither a theorem nor an estimator, or `workers` is below one.
    """
    if workers < 1:
        raise InvalidArgumentError("workers", f"must be at least 1, got {workers}")
    start = time.perf_counter()
    tasks = _tasks(select)
    found: list[TheoremResult | EstimatorResult] = []
    if workers == 1:
        for task in tasks:
            found.append(_run(task))
            progress(_title(found[-1]))
    else:
        # A forked child could inherit a lock of torch's thread pool; a spawned one starts clean.
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            for result in pool.map(_run, tasks):
                found.append(result)
                progress(_title(result))
    return Verification(
        [result for result in found if isinstance(result, TheoremResult)],
        [result for result in found if isinstance(result, EstimatorResult)],
        time.perf_counter() - start,
    )


def _tasks(select: Sequence[str]) -> list[tuple[str, int]]:
    """`("theorem", i)` and `("estimator", j)` for everything selected."""
    numbers = [theorem.number for theorem in theorems()]
    names = [estimator.name for estimator in shipped_estimators()]
    for wanted in select:
        if wanted not in numbers and wanted not in names:
            known = f"{', '.join(numbers)}, {', '.join(dict.fromkeys(names))}"
            raise InvalidArgumentError("select", f"must name theorems or estimators ({known}), got {wanted!r}")
    return [("theorem", i) for i, number in enumerate(numbers) if not select or number in select] + [
        ("estimator", j) for j, name in enumerate(names) if not select or name in select
    ]


def _run(task: tuple[str, int]) -> TheoremResult | EstimatorResult:
    kind, index = task
    with plain_modes():
        if kind == "theorem":
            return theorems()[index].run()
        return check_estimator(list(shipped_estimators())[index])


def _title(result: TheoremResult | EstimatorResult) -> str:
    return result.label if isinstance(result, EstimatorResult) else f"{result.number} {result.name}"


def shipped_estimators() -> Iterator[Estimator]:
    """Every named estimator in at least one form, and every modifier at least once."""
    yield from examples()
    yield estimator("opd_plus", "jsd", reduction="token_mean")
    yield estimator("opd_plus", "jsd", reduction="sequence_mean")
    yield estimator("opd_plus", "jsd", importance="prefix")
    yield estimator("opd_plus", "jsd", importance="token")
    yield estimator("opd_plus", "jsd", importance="ppo")
    yield estimator("opd_plus", "jsd", clip_log_ratio=0.5)
    yield estimator("opd_plus", "forward_kl", clip_weight=(0.5, 1.5))
    yield estimator("opd_plus", "reverse_kl", baseline="constant", baseline_value=-1.0)
    yield estimator("opd_plus", "reverse_kl", baseline="vocabulary")
    yield estimator("opd_plus", "reverse_kl", baseline="group_mean")
    yield estimator("opd_plus", "reverse_kl", baseline="leave_one_out")
    yield estimator("opd_plus", "reverse_kl", zscore=True)


def check_estimator(loss: Estimator) -> EstimatorResult:
    """Audit an estimator against its own claim, and a false twin of it likewise."""
    claim = loss.claim
    settings = claim_settings(claim)
    try:
        report, agrees = assert_claim(loss), True
    except AssertionError:
        report = audit(loss, claim.divergence, claim.granularity, name=repr(loss), details=False, **settings)
        agrees = False
    description, twin = _twin(loss)
    verdict = quick_verdict(twin, claim.divergence, claim.granularity, **settings)
    return EstimatorResult(repr(loss), loss.label, claim, report, agrees, description, verdict)


def _twin(loss: Estimator) -> tuple[str, Callable[[Rollouts], Tensor]]:
    """A loss on which a working audit returns another verdict than on the estimator.

    The twin of a faithful estimator ascends instead of descending. Where the claim is a bias or a zero, the twin is
    the whole-vocabulary loss, which is exact or has another objective under any distribution of prefixes.
    """
    if loss.claim.verdict in ("exact", "exact_up_to_scale", "other_objective"):
        return "sign flipped", lambda rollouts: -loss(rollouts)
    if loss.claim.granularity == "token_local":
        return "whole vocabulary, prefixes weighted", estimator(
            "full_vocab", loss.claim.divergence, importance="prefix"
        )
    return "undiscounted or exact form", _exact_twin(loss.claim)


def _exact_twin(claim: Claim) -> Estimator:
    if claim.granularity == "sequence":
        return estimator("sequence_opd_plus", claim.divergence, importance="sequence")
    return estimator("return_to_go", claim.divergence, gamma=claim.gamma, discounted=True, importance="sequence")


def _finite(value: float) -> float | None:
    return value if value < float("inf") else None
