"""How often sampled audits are wrong, beside the error rate that they state.

`python benchmarks/coverage.py --write docs/coverage.md` audits losses whose exact expected gradient is known by
enumeration, at coarse error rates, where errors can be seen, and at the default. Nothing but the audits' own draws
decides when they stop.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from scipy import stats
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import opdtheory as opd  # noqa: E402
from benchmarks.measure import write  # noqa: E402
from opdtheory.auditing.sampling.bounds import OnPair, least_bias, relative_bias  # noqa: E402
from opdtheory.auditing.sampling.montecarlo import ALPHA, Search  # noqa: E402
from opdtheory.auditing.scenario import Case, Scenario  # noqa: E402
from opdtheory.exact import random_pair  # noqa: E402
from opdtheory.exact.modes import plain_modes  # noqa: E402
from opdtheory.objective import Objective  # noqa: E402

SEED = 20261128
RATES = (0.2, 0.05, ALPHA)
PAIRS = 3
MARGIN, OBSERVATIONS = 0.05, 160

# What rounding may add to a number that is compared with an interval, relative to the exact gradient.
ROUNDING = 1e-9

Loss = Callable[[opd.Rollouts], Tensor]


def plain(r: opd.Rollouts) -> Tensor:
    """The estimator of the claim itself: without noise beside the control."""
    return r.token_sum(-(r.log_u.detach() * r.student_logprobs))


def earlier(values: Tensor) -> Tensor:
    """The values at the previous position: a baseline of the history, which changes no expectation."""
    return torch.cat([torch.zeros_like(values[:, :1]), values[:, :-1]], 1)


def based(r: opd.Rollouts, baseline: Tensor, bias: float = 0.0) -> Tensor:
    """The claim with a baseline, and a bias as large as the weight where `log u` is large."""
    log_u = r.log_u.detach()
    weight = log_u + bias * torch.sin(3.0 * log_u) - baseline.detach()
    return r.token_sum(-(weight * r.student_logprobs))


def noisy(r: opd.Rollouts, bias: float = 0.0) -> Tensor:
    return based(r, torch.cos(2.0 * earlier(r.tokens.double())), bias)


def skewed(r: opd.Rollouts, bias: float = 0.0) -> Tensor:
    """A heavy tail on one side: the fourth power of the previous ratio."""
    return based(r, earlier((4.0 * r.log_u).exp()), bias)


def rare(r: opd.Rollouts) -> Tensor:
    """Noise in few rollouts only, those that the student finds least likely."""
    return based(r, 30.0 * earlier((r.student_logprobs.detach() < -3.0).double()))


def grouped(r: opd.Rollouts, bias: float = 0.0) -> Tensor:
    """A baseline of the other rollouts, squared, so that no call serves two batches."""
    returns = (r.mask * r.log_u.detach()).sum(-1, keepdim=True)
    others = (returns.sum(0) - returns) / (len(returns) - 1)
    return based(r, others.square().expand_as(r.mask), bias)


@dataclass(frozen=True)
class Subject:
    """A loss, and what is true of it: whether it follows a multiple of the claim."""

    name: str
    loss: Loss
    batch_size: int = 1
    faithful: bool = True


SUBJECTS = (
    Subject("exact, without noise", plain),
    Subject("exact, noisy", noisy),
    Subject("exact, skewed noise", skewed),
    Subject("exact, noise in few rollouts", rare),
    Subject("exact, coupled rollouts", grouped, 2),
    Subject("exact up to scale, noisy", lambda r: 3.0 * noisy(r)),
    *(
        Subject(f"biased by {bias:g}, {kind.__name__}", functools.partial(kind, bias=bias), size, False)
        for kind, size, biases in ((noisy, 1, (1e-3, 1e-2, 1e-1)), (skewed, 1, (1e-2, 1e-1)), (grouped, 2, (1e-1,)))
        for bias in biases
    ),
)


@functools.cache
def pair(number: int) -> Case:
    return Case(*random_pair(3, 2, eos=0, scale=1.0, distance=1.0, seed=number), None, f"pair {number}")


@functools.cache
def truth(subject: Subject, number: int) -> tuple[list[Tensor], list[Tensor]]:
    """The exact expected gradient of a loss, and that of the claim."""
    case = pair(number)
    expected = opd.expected_gradient(subject.loss, case.student, case.teacher, subject.batch_size)
    return expected, opd.exact_gradient(case.student, case.teacher, "reverse_kl")


@dataclass(frozen=True)
class Truth:
    """What an audit should find, in the coordinates of its search."""

    along: Tensor
    expected: Tensor
    exact: Tensor

    @classmethod
    def of(cls, search: Search, subject: Subject, number: int) -> Truth:
        (each,) = search.pairs
        expected, exact = (each.stream.look.sampler.stack(levels).flatten() for levels in truth(subject, number))
        return cls(each.basis @ expected, expected, exact)

    @property
    def scale(self) -> float:
        return float(self.expected @ self.exact / (self.exact @ self.exact))

    def error(self, scale: float) -> float:
        """The distance from a multiple of the exact gradient."""
        return float((self.expected - scale * self.exact).norm())

    def misses(self, search: Search) -> tuple[int, int]:
        """How many of the intervals at a look leave out the truth, and how many there are."""
        (bounds,), (target,) = search.all_bounds(), search.claimed
        size, scale = target.size, self.scale
        own, cosine = OnPair.of("", bounds, target), scale * size / float(self.expected.norm())
        low, high = relative_bias(bounds, target)
        found = [
            *zip(bounds.low.tolist(), self.along.tolist(), bounds.high.tolist(), strict=True),
            (0.0, float((self.expected - bounds.known).norm()), bounds.unseen),
            (own.scale[0] * size, scale * size, own.scale[1] * size),
            (own.error[0] * scale * size, self.error(scale), own.error[1] * scale * size),
            (own.cosine[0], cosine, own.cosine[1]),
            (least_bias([bounds], [target]) * scale * size, self.error(scale), math.inf),
            (low * size, self.error(1.0), high * size),
        ]
        slack = ROUNDING * size
        return sum(not low - slack <= value <= high + slack for low, value, high in found), len(found)

    def naive(self, search: Search, level: float) -> bool:
        """Whether normal quantiles, without any union, would leave out a projection."""
        (each,) = search.pairs
        moments = each.stream.projections
        width = -statistics.NormalDist().inv_cdf(level / 2.0) * moments.deviation / math.sqrt(moments.count)
        off = self.along - each.bounds.along - moments.mean
        return bool((off.abs() > width + each.rounding).any())

    def refutes(self, verdict: str, search: Search, faithful: bool) -> bool:
        """Whether a verdict is wrong."""
        (target,) = search.claimed
        if verdict in ("exact", "exact_up_to_scale"):
            if verdict == "exact_up_to_scale" and self.error(1.0) <= ROUNDING * target.size:
                return True
            scale = 1.0 if verdict == "exact" else self.scale
            off = float((self.along - scale * target.along).abs().max())
            return off > MARGIN * scale * target.size or self.error(scale) > 0.5 * scale * target.size
        if verdict == "zero":
            return float(self.along.abs().max()) > MARGIN * target.size
        return verdict == "biased" and faithful


@dataclass
class Count:
    """What happened in audits of one loss at one error rate."""

    audits: int = 0
    looks: int = 0
    intervals: int = 0
    out: int = 0
    missed: int = 0
    naive: int = 0
    wrong: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Count) -> Count:
        return Count(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))


@plain_modes()
def audited(subject: Subject, number: int, alpha: float, seed: int) -> Count:
    """One audit: drawn until the verdict is certain, with every interval at every look compared with the truth."""
    claim, scenario = Objective.of(opd.divergence("reverse_kl")), Scenario(subject.batch_size, seed=seed)
    search = Search(subject.loss, [pair(number)], claim, scenario, alpha, 1, math.inf)
    apart = search.pairs[0].stream.look.calls
    calls = OBSERVATIONS * apart if apart == 1 else OBSERVATIONS // 2 * apart
    true, count, verdict = Truth.of(search, subject, number), Count(audits=1), "undecided"
    missed = naive = False
    with torch.no_grad():
        while verdict == "undecided" and search.batches < calls:
            before = search.pairs[0].looks
            search.advance(MARGIN, calls)
            if search.pairs[0].looks == before:
                break
            out, intervals = true.misses(search)
            count.looks, count.out, count.intervals = count.looks + 1, count.out + out, count.intervals + intervals
            missed, naive = missed or out > 0, naive or true.naive(search, alpha)
            verdict = search.judge(MARGIN)
    count.missed, count.naive = int(missed), int(naive)
    count.wrong = int(true.refutes(verdict, search, subject.faithful))
    count.verdicts[verdict] += 1
    return count


def rate(count: int, audits: int) -> str:
    """A measured rate with its Clopper-Pearson interval at 99 %."""
    found = stats.binomtest(count, audits).proportion_ci(0.99, "exact")
    return f"{count} of {audits:,} ({100 * found.low:.2g} to {100 * found.high:.2g} %)"


def summary(found: dict[tuple[str, float], Count]) -> list[str]:
    lines = [
        "| stated error rate | an interval missed | a wrong verdict | naive intervals missed | looks |",
        "|---|---|---|---|---|",
    ]
    for alpha in RATES:
        total = sum((count for (_, at), count in found.items() if at == alpha), Count())
        cells = (rate(n, total.audits) for n in (total.missed, total.wrong, total.naive))
        lines.append(f"| {alpha:g} | {' | '.join(cells)} | {total.looks:,} |")
    return lines


def by_subject(found: dict[tuple[str, float], Count]) -> list[str]:
    lines = [
        "| loss | true bias at the best scale | stated error rate | audits | missed | wrong | naive | verdicts |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for subject in SUBJECTS:
        biases = []
        for number in range(PAIRS):
            expected, exact = (torch.cat([g.flatten() for g in levels]) for levels in truth(subject, number))
            scale = float(expected @ exact / (exact @ exact))
            biases.append(float((expected - scale * exact).norm() / (scale * exact.norm())))
        bias = "0" if subject.faithful else f"{100 * min(biases):.2g} to {100 * max(biases):.2g} %"
        for alpha in RATES:
            n = found[subject.name, alpha]
            verdicts = ", ".join(f"{many} {word.replace('_', ' ')}" for word, many in n.verdicts.most_common())
            cells = (subject.name, bias, f"{alpha:g}", n.audits, n.missed, n.wrong, n.naive, verdicts)
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def page(found: dict[tuple[str, float], Count]) -> str:
    total = sum(found.values(), Count())
    about = (
        f"{total.audits:,} audits of {len(SUBJECTS)} losses on {PAIRS} pairs (three tokens, two steps, an end), "
        f"seed {SEED}, margin {100 * MARGIN:g} %, at most {OBSERVATIONS} observations each, half if coupled: "
        f"{total.looks:,} looks, {total.intervals:,} intervals, of which {total.out} leave out the truth. "
        "In brackets: Clopper-Pearson intervals at 99 %."
    )
    return "\n".join([about, "", *summary(found), "", *by_subject(found)])


def main(arguments: list[str] | None = None) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--audits", type=int, default=60, metavar="N", help="audits of each loss at each error rate")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables into this page")
    options = parser.parse_args(arguments)
    found: dict[tuple[str, float], Count] = {}
    for row, subject in enumerate(SUBJECTS):
        start = time.process_time()
        for n, alpha in enumerate(RATES):
            # No two audits share their draws, or the intervals of pooled rates would be too short.
            first = SEED + (len(RATES) * row + n) * options.audits
            seeds = range(first, first + options.audits)
            each = (audited(subject, seed % PAIRS, alpha, seed) for seed in seeds)
            found[subject.name, alpha] = sum(each, Count())
        print(f"{subject.name}: {time.process_time() - start:.0f} s", file=sys.stderr, flush=True)
    text = page(found)
    print(text)
    if options.write:
        write(options.write, "benchmarks/coverage.py", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
