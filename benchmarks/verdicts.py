"""What the audit catches: every way of being wrong, put into every sound estimator of the library where it applies.

`python benchmarks/verdicts.py --write docs/verdicts.md` writes the page. Whether a changed loss is wrong at all is
decided apart from the audit, by its expected gradient in a world where the change shows. `--match detach` takes some of
the changes, `--workers 2` sets the number of processes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import opdtheory as opd  # noqa: E402
from benchmarks.injections import INJECTIONS, Home  # noqa: E402
from opdtheory.auditing.reductions import undone  # noqa: E402
from opdtheory.choices import FAITHFUL, REDUCTIONS  # noqa: E402
from opdtheory.errors import InvalidArgumentError, LossError  # noqa: E402
from opdtheory.estimators import Estimator  # noqa: E402
from opdtheory.exact import Loss, exact_gradient, expected_gradient, random_pair  # noqa: E402
from opdtheory.testing.assertions import claim_settings  # noqa: E402
from opdtheory.verification.verify import shipped_estimators  # noqa: E402

# A loss whose gradient is off by less than this at the best scale is not wrong in its home.
WRONG = 1e-6

# Worlds in which no sound estimator may be blamed, where its claim allows them.
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"eos": 0},
    {"lengths": "fixed"},
    {"batch_size": 2},
    {"batch_size": 3, "eos": 0},
    {"prompts": 2},
    {"environment": (1,)},
    {"off_policy": 0.3},
    {"batch_size": 2, "prompts": 2, "shared_prompt": True},
)


@dataclass(frozen=True)
class Row:
    """One changed loss and what the audit said of it."""

    kind: str
    change: str
    estimator: str
    off_by: float
    caught: bool
    named: bool
    verdict: str
    limits: tuple[str, ...]


def sound() -> list[Estimator]:
    """The estimators whose claim is to be exact, up to a scale."""
    return [e for e in shipped_estimators() if e.claim.verdict in FAITHFUL]


def misfit(loss: Loss, estimator: Estimator, home: Home) -> float:
    """The distance from the exact gradient at the best scale over two pairs, as the reduction that fits best."""
    claim = estimator.claim
    best = float("inf")
    for reduction in REDUCTIONS:
        changed = undone(loss, reduction)
        actual, exact = [], []
        for seed in (1, 2):
            environment = (0,) if home.prompts else ()
            student, teacher = random_pair(
                home.vocab_size, home.horizon + home.prompts, eos=home.eos, seed=seed, environment=environment
            )
            behavior = student.perturbed(home.off_policy, seed=seed + 10) if home.off_policy else None
            cast = _cast(changed, home.dtype)
            actual.append(_flat(expected_gradient(cast, student, teacher, home.batch_size, behavior)))
            exact.append(
                _flat(exact_gradient(student, teacher, claim.divergence, claim.granularity, gamma=claim.gamma))
            )
        best = min(best, _error(actual, exact))
    return best


def _cast(loss: Loss, dtype: torch.dtype) -> Loss:
    return loss if dtype == torch.float64 else lambda r: loss(r.to(dtype))


def _flat(levels: list[Tensor]) -> Tensor:
    return torch.cat([level.flatten().double() for level in levels])


def _error(actual: list[Tensor], exact: list[Tensor]) -> float:
    a, e = torch.cat(actual), torch.cat(exact)
    scale = float(a @ e / (e @ e))
    return float((a - scale * e).norm() / a.norm().clamp_min(1e-300)) if scale > 0 else float("inf")


def settings_of(estimator: Estimator) -> dict[str, Any]:
    """The settings of an audit of the estimator as its users would write it: lengths that vary where it allows them."""
    settings = claim_settings(estimator.claim)
    settings["eos"] = None
    narrow = estimator.claim.assumptions.fixed_length and "mean" not in repr(estimator).replace("group_mean", "")
    return {**settings, "lengths": "fixed" if narrow else "both", "reduction": "any"}


def examine(task: tuple[int, int]) -> Row | None:
    """Change one estimator in one way, and audit it; None if that does not make it wrong."""
    estimator, injection = sound()[task[0]], INJECTIONS[task[1]]
    if not injection.applies(estimator):
        return None
    loss = injection.wrong(estimator)
    settings = {**settings_of(estimator), **injection.settings}
    if injection.home.eos is not None and settings["lengths"] == "fixed":
        return None
    home = injection.home
    least = max(home.batch_size, settings["batch_size"])
    try:
        off_by = misfit(loss, estimator, _with(home, least))
    except InvalidArgumentError:  # the estimator refuses such a batch, as of one rollout
        return None
    if off_by <= WRONG:
        return None
    claim = estimator.claim
    try:
        report = opd.audit(loss, claim.divergence, claim.granularity, name=injection.name, **settings)
    except (LossError, InvalidArgumentError) as error:  # no verdict, and no pass
        named = any(words in str(error) for words in injection.words)
        return Row(injection.kind, injection.name, repr(estimator), off_by, True, named, "refused", ())
    text = " ".join(str(report).split())
    named = any(words in text for words in injection.words)
    return Row(
        injection.kind,
        injection.name,
        repr(estimator),
        off_by,
        not report.passes,
        named and not report.passes,
        report.verdict,
        report.limits,
    )


def _with(home: Home, batch_size: int) -> Home:
    return Home(**{**vars(home), "batch_size": batch_size})


def alarm(task: tuple[int, int]) -> str:
    """What an audit says of a sound estimator in a world: `passes`, or its name; nothing if its claim excludes it."""
    estimator, extra = sound()[task[0]], SETTINGS[task[1]]
    given = estimator.claim.assumptions
    settings = {**settings_of(estimator), **extra}
    if settings["lengths"] == "fixed" and settings["eos"] is not None:
        return ""
    if (settings["off_policy"] and given.sampler != "any") or settings["batch_size"] < given.batch_size:
        return ""
    claim = estimator.claim
    try:
        report = opd.audit(estimator, claim.divergence, claim.granularity, **settings)
    except InvalidArgumentError:  # a setting that its claim does not allow
        return ""
    return "passes" if report.passes else f"{estimator!r} with {extra}"


def table(rows: list[Row]) -> list[str]:
    """The table by kind and change."""
    by_change: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        by_change[row.kind, row.change].append(row)
    lines = ["| kind | change | losses | caught | named |", "|---|---|---|---|---|"]
    for (kind, change), some in by_change.items():
        caught, named = sum(r.caught for r in some), sum(r.named for r in some)
        lines.append(f"| {kind} | {change} | {len(some)} | {caught} | {named} |")
    count, caught, named = len(rows), sum(r.caught for r in rows), sum(r.named for r in rows)
    lines.append(f"| **all** | | **{count}** | **{caught}** | **{named}** |")
    return lines


def page(rows: list[Row], asked: int, alarms: list[str], every: int = 1) -> str:
    """The whole page."""
    count, caught, named = len(rows), sum(r.caught for r in rows), sum(r.named for r in rows)
    missed = [r for r in rows if not r.caught]
    unnamed = [r for r in rows if r.caught and not r.named]
    parts = [
        "# What the audit catches",
        "",
        "Written by `python benchmarks/verdicts.py --write docs/verdicts.md`. Each way of being wrong is put, from",
        "outside, into each estimator of the library that claims to be exact, where it applies. Whether the changed",
        "loss is wrong is decided apart from the audit: its expected gradient is off by more than "
        f"{WRONG:g} at the best",
        "scale, under every reduction, in a world where the change shows. A loss counts as caught if the audit does",
        "not pass, and as named if the report says what is wrong or where.",
        *([f"Of the estimators, one in {every} was taken (`--every {every}`)."] if every > 1 else []),
        "",
        f"Of {count} wrong losses, {caught} are caught ({100 * caught / count:.1f} %) and {named} named "
        f"({100 * named / count:.1f} %). Of {asked} audits of sound estimators, {len(alarms)} blame one.",
        "",
        *table(rows),
    ]
    if missed:
        parts += ["", "## Not caught", "", "With the limit that the report itself states, where one does.", ""]
        parts += [
            f"- {r.change}, in `{r.estimator}`: off by {r.off_by:.2g} in its home; {r.verdict.replace('_', ' ')}. "
            f"{next((each for each in r.limits if each.startswith('Batches of more than')), '')}".rstrip()
            for r in missed
        ]
    if unnamed:
        parts += ["", "## Caught, but not named", ""]
        parts += [f"- {r.change}, in `{r.estimator}`: {r.verdict.replace('_', ' ')}." for r in unnamed]
    if alarms:
        parts += ["", "## Sound, and blamed", "", *(f"- {each}" for each in alarms)]
    return "\n".join(parts) + "\n"


def _each(function: Callable[[tuple[int, int]], Any], tasks: list[tuple[int, int]], workers: int) -> list[Any]:
    if workers == 1:
        return [function(task) for task in tasks]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return pool.map(function, tasks, chunksize=4)


def main(arguments: list[str] | None = None) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--match", default="", metavar="TEXT", help="changes with this text in kind or name")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every Nth estimator")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes (default: 2)")
    parser.add_argument("--alarms", action="store_true", help="audit the sound estimators alone")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the page")
    options = parser.parse_args(arguments)
    start, estimators = time.perf_counter(), range(0, len(sound()), options.every)
    chosen = [i for i, each in enumerate(INJECTIONS) if options.match in f"{each.kind} {each.name}"]
    tasks = [] if options.alarms else [(e, i) for i in chosen for e in estimators]
    rows = [row for row in _each(examine, tasks, options.workers) if row is not None]
    asked, alarms = 0, []
    if not options.match:
        found = _each(alarm, [(e, s) for e in estimators for s in range(len(SETTINGS))], options.workers)
        asked, alarms = sum(each != "" for each in found), [each for each in found if each not in ("", "passes")]
    text = page(rows, asked, alarms, options.every) if rows else f"{asked} audits of sound estimators; blamed: {alarms}"
    print(text)
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    if options.write:
        options.write.write_text(text, encoding="utf-8")
    return 1 if alarms or not all(row.caught for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
