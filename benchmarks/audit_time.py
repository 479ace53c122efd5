"""The time of an audit for every estimator of the library and every published loss that is installed.

`python benchmarks/audit_time.py` audits the whole list in one process on one thread and prints it, the slowest last;
`--only zoo groups` takes some of its parts, `--match jsd` the subjects with that text in their names. Every package
is imported, and every loss called once, before its clock starts.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
# As a script, this file does not see the package of the published losses.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import opdtheory as opd  # noqa: E402
from examples.published_losses import gallery  # noqa: E402
from opdtheory.errors import OpdTheoryError  # noqa: E402
from opdtheory.rendering.table import Table  # noqa: E402
from opdtheory.testing.assertions import claim_settings  # noqa: E402
from opdtheory.verification.verify import shipped_estimators  # noqa: E402

# Seconds on an idle core: of a loss that couples a group of four, and of any other. An audit has one thread, so CPU
# time tells what they would be where other processes take the core away.
GROUP, GROUP_LIMIT, LIMIT = 4, 10.0, 3.0

# Beside their own claims the estimators are audited against wrong ones, where the search for a name and for remedies
# is longest, and under every setting that makes the panel another one.
CLAIMS = ("reverse_kl", "forward_kl", "jsd", "chi2")
GRANULARITIES = ("token_local", "token_return", "sequence")
SETTINGS: tuple[dict[str, Any], ...] = (
    {"eos": 0},
    {"off_policy": 0.3},
    {"eos": 0, "off_policy": 0.3},
    {"prompts": 2},
    {"environment": (1,)},
    {"eos": 0, "prompts": 2, "environment": (1,)},
    {"batch_size": 2},
    {"batch_size": 2, "eos": 0},
    {"batch_size": 2, "off_policy": 0.3},
    {"batch_size": 2, "eos": 0, "prompts": 2, "shared_prompt": True},
)


@dataclass(frozen=True)
class Subject:
    """A loss, the claim that it is audited against, and the further arguments of the audit."""

    part: str
    name: str
    loss: Callable[[opd.Rollouts], torch.Tensor]
    objective: opd.Divergence | str
    granularity: str = "token_local"
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def limit(self) -> float:
        return GROUP_LIMIT if self.settings.get("batch_size", 1) == GROUP else LIMIT


@dataclass(frozen=True)
class Timing:
    """What one audit took, or why there was none."""

    subject: Subject
    wall: float
    cpu: float
    evaluations: int
    verdict: str


def subjects() -> Iterator[Subject]:
    """Everything, in a fixed order."""
    yield from zoo()
    yield from wrong_claims()
    yield from under_settings()
    yield from groups()
    yield from sampled()
    yield from adapters()
    yield from published()


def zoo() -> Iterator[Subject]:
    for e in shipped_estimators():
        yield Subject("zoo", e.label, e, e.claim.divergence, e.claim.granularity, claim_settings(e.claim))


def wrong_claims() -> Iterator[Subject]:
    for name in ("opd", "opd_plus", "full_vocab", "return_to_go", "sequence_opd_plus"):
        for follows in CLAIMS:
            e = opd.estimator(name, follows, **({"gamma": 1.0} if name == "return_to_go" else {}))
            for claim, granularity in zip(CLAIMS, (*GRANULARITIES, "token_local"), strict=True):
                yield Subject("claims", f"{e.label} as {claim}, {granularity}", e, claim, granularity)


def under_settings() -> Iterator[Subject]:
    losses = (
        opd.estimator("opd", "jsd"),
        opd.estimator("opd_plus", "jsd"),
        opd.estimator("opd_plus", "jsd", reduction="token_mean"),
        opd.estimator("k3_loss"),
        opd.estimator("full_vocab", "forward_kl"),
        opd.estimator("topk_truncated", "reverse_kl", k=2),
        opd.estimator("return_to_go", "jsd", gamma=0.5),
    )
    coupled = (
        opd.estimator("opd_plus", "jsd", baseline="leave_one_out"),
        opd.estimator("opd", "reverse_kl", baseline="group_mean"),
        opd.estimator("opd_plus", "forward_kl", zscore=True),
    )
    for settings in SETTINGS:
        given = ", ".join(f"{key}={value}" for key, value in settings.items())
        for e in (*losses, *coupled) if settings.get("batch_size", 1) > 1 else losses:
            name = f"{e.label}, {given}"
            yield Subject("settings", name, e, e.claim.divergence, e.claim.granularity, settings)


def groups() -> Iterator[Subject]:
    """Groups of four, of three tokens and two steps with an end of sequence."""
    settings = {"batch_size": GROUP, "eos": 0}
    for name in ("opd", "opd_plus"):
        for follows in ("reverse_kl", "forward_kl", "jsd"):
            for options in ({"baseline": "leave_one_out"}, {"baseline": "group_mean"}, {"zscore": True}):
                e = opd.estimator(name, follows, **options)
                yield Subject("groups", f"{e.label}, G={GROUP}", e, follows, "token_local", settings)
    mean = opd.estimator("opd_plus", "jsd", reduction="token_mean")
    yield Subject("groups", f"{mean.label}, G={GROUP}", mean, "jsd", "token_local", settings)


def sampled() -> Iterator[Subject]:
    """Losses right and wrong with too many batches to enumerate."""
    for settings in ({"batch_size": 16, "eos": 0}, {"batch_size": 12, "eos": 0, "off_policy": 0.3}):
        given = ", ".join(f"{key}={value}" for key, value in settings.items())
        for name in ("opd", "opd_plus"):
            for follows in ("reverse_kl", "forward_kl", "jsd"):
                for options in ({"baseline": "leave_one_out"}, {"baseline": "group_mean"}, {"zscore": True}):
                    e = opd.estimator(name, follows, **options)
                    yield Subject("sampled", f"{e.label}, {given}", e, follows, "token_local", settings)


def adapters() -> Iterator[Subject]:
    """Losses of other shapes, one of which inverts two output layers at every call."""

    def forward_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        return (log_q.exp() * (log_q - log_p)).sum(-1)

    adapted = {
        "from_logprobs": opd.from_logprobs(lambda p, q: (p - q).square() / 2),
        "from_logits": opd.from_logits(lambda p, q, labels: forward_kl(p.log_softmax(-1), q.log_softmax(-1))),
        "from_advantage": opd.from_advantage(lambda p, q: q - p, detach=True),
        "from_hidden": opd.from_hidden(
            lambda x, head, y, other, labels: forward_kl((x @ head.T).log_softmax(-1), (y @ other.T).log_softmax(-1))
        ),
        "from_top_k": opd.from_top_k(
            lambda z, ids, log_q, labels: forward_kl(z.log_softmax(-1).gather(-1, ids), log_q), k=2
        ),
    }
    for name, loss in adapted.items():
        for claim in ("forward_kl", "reverse_kl"):
            yield Subject("adapters", f"{name} as {claim}", loss, claim)


def published() -> Iterator[Subject]:
    from examples.published_losses import torchrl_losses, trl_losses

    for entry in gallery.ENTRIES:
        if entry.version is not None:
            claim = opd.divergence(entry.objective, **entry.parameters)
            name = f"{entry.package}: {entry.function}"
            yield Subject("published", name, entry.loss, claim, entry.granularity, entry.settings)
    outside = {
        trl_losses: ("distillation_chunked_0", "distillation_chunked_0_5", "iw_opd_unweighted", "iw_opd_jsd_top_2"),
        torchrl_losses: ("k3_forward",),
    }
    for module, functions in outside.items():
        package = module.__name__.rpartition(".")[2].removesuffix("_losses")
        if any(entry.package == package and entry.version is not None for entry in gallery.ENTRIES):
            for function in functions:
                yield Subject("published", f"{package}: {function}", getattr(module, function), "reverse_kl")


def measured(subject: Subject, details: bool, repeats: int) -> Timing:
    """The fastest of a few audits, as time that other processes take does not count."""
    found: list[Timing] = []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            report = opd.audit(
                subject.loss, subject.objective, subject.granularity, details=details, **subject.settings
            )
            outcome = report.evaluations, report.verdict
        except OpdTheoryError as error:
            outcome = 0, f"refused: {type(error).__name__}"
        found.append(Timing(subject, time.perf_counter() - wall, time.process_time() - cpu, *outcome))
    return min(found, key=lambda timing: timing.cpu)


def warm_up(subject: Subject) -> None:
    """Import what the loss imports when it is called."""
    logits = torch.randn(4, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 4]])
    try:
        subject.loss(opd.Rollouts.from_logits(tokens, logits.requires_grad_(), logits.detach().flip(0)))
    except Exception as error:  # some losses take one rollout only; the audit says what is wrong
        print(f"{subject.name}: {type(error).__name__} at the first call", file=sys.stderr)


def table(timings: list[Timing]) -> str:
    rows = [("subject", "wall s", "cpu s", "evaluations", "verdict")]
    for t in timings:
        over = "  over the limit" if t.cpu > t.subject.limit else ""
        rows.append((t.subject.name, f"{t.wall:.2f}", f"{t.cpu:.2f}", str(t.evaluations), f"{t.verdict}{over}"))
    return "\n".join(Table(rows, "lrrrl").lines())


def summary(timings: list[Timing]) -> str:
    parts = []
    for limit, what in ((LIMIT, "all others"), (GROUP_LIMIT, f"groups of {GROUP}")):
        held = [t for t in timings if t.subject.limit == limit]
        if held:
            worst = max(held, key=lambda t: t.cpu)
            over = sum(t.cpu > limit for t in held)
            slowest = f"the slowest {worst.cpu:.2f} s ({worst.wall:.2f} s wall), {worst.subject.name}"
            parts.append(f"{what}: {len(held) - over} of {len(held)} under {limit:g} s CPU, {slowest}")
    total = sum(t.cpu for t in timings)
    return f"{'; '.join(parts)}; {total:.0f} s CPU in all."


def main(arguments: list[str] | None = None) -> int:
    parts = list(dict.fromkeys(subject.part for subject in subjects()))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, metavar="PART", help=", ".join(parts))
    parser.add_argument("--match", default="", metavar="TEXT", help="only subjects with this text in their names")
    parser.add_argument("--no-details", dest="details", action="store_false", help="verdict and name alone")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="take the fastest of so many audits")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    chosen = [s for s in subjects() if s.part in options.only and options.match in s.name]
    if not chosen:
        parser.error(f"no subject of {', '.join(options.only)} has {options.match!r} in its name")
    # The first audit of a process loads sympy and scipy.
    opd.audit(opd.estimator("opd", "forward_kl"), "jsd")
    timings = []
    for subject in chosen:
        warm_up(subject)
        timings.append(measured(subject, options.details, options.repeats))
    timings.sort(key=lambda t: t.cpu)
    print(table(timings))
    print(summary(timings))
    return int(any(t.cpu > t.subject.limit for t in timings))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
