"""The reach and speed of the oracle: trees, automata, second moments and sampled rollouts, in one process.

`python benchmarks/oracle.py` takes turns where it compares; `--write docs/performance.md` puts the tables into that
page. Per-sequence autograd, its rival, gathers the rows of one sequence, runs one backward pass and adds the gradient
to the table; it is timed on some thousand sequences, and its time for all of them is that share's, scaled up.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import opdtheory as opd  # noqa: E402
from benchmarks.measure import operations, write  # noqa: E402
from opdtheory.exact import rollout_gradients  # noqa: E402
from opdtheory.exact.sampling import Sampler  # noqa: E402
from opdtheory.machine import Run, in_turn, machine, seconds  # noqa: E402

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "chi2", "hellinger", "total_variation", "le_cam", "jeffreys")
OBJECTIVES = ("token_local", "token_return", "sequence")
# The marks: seconds at a million sequences, MB at a hundred million, against autograd, rollouts a second.
AT_A_MILLION, IN_MEMORY, OF_AUTOGRAD, RATE = 0.1, 4000.0, 500.0, 1e6


def trees(repeats: int, horizon: int) -> list[str]:
    """Value and gradient on the tree of ten tokens."""
    student, teacher = opd.random_pair(10, horizon, seed=0)
    subjects: dict[str, Run] = {}
    for name in DIVERGENCES:
        d = opd.divergence(name)
        for objective in OBJECTIVES:
            for what, function in (("value", opd.exact_value), ("gradient", opd.exact_gradient)):
                subjects[f"{name} {objective} {what}"] = lambda f=function, d=d, o=objective: f(student, teacher, d, o)
    times = in_turn(subjects, repeats)
    lines = [
        f"V = 10, T = {horizon}: {10**horizon:,} sequences, milliseconds; medians of {repeats} alternated repeats.",
        "",
        "| | " + " | ".join(f"{o} {w}" for o in OBJECTIVES for w in ("value", "gradient")) + " |",
        "|---" * (1 + 2 * len(OBJECTIVES)) + "|",
    ]
    for name in DIVERGENCES:
        row = [times[f"{name} {o} {w}"] for o in OBJECTIVES for w in ("value", "gradient")]
        lines.append(f"| `{name}` | " + " | ".join(f"{1e3 * t:.0f}" for t in row) + " |")
    slow = [name for name, t in times.items() if t > AT_A_MILLION]
    verdict = f"Missed by {len(slow)} of {len(times)}." if slow else "Met by all."
    profiles = _profiles({name: subjects[name] for name in slow})
    return [*lines, "", f"Mark at a million sequences: {1e3 * AT_A_MILLION:.0f} ms. {verdict}", *profiles]


def _profiles(subjects: dict[str, Run]) -> list[str]:
    """Where the time goes for subjects that miss a mark; nothing if there are none."""
    rows = [f"| {name.replace(' | ', ', ')} | {operations(run)} |" for name, run in subjects.items()]
    return ["", "| missed by | operations, with their share of the time |", "|---|---|", *rows] if rows else []


def one_by_one(student: opd.TabularPolicy, teacher: opd.TabularPolicy, tokens: Tensor) -> list[Tensor]:
    """The gradient of `token_return` of some sequences, a backward pass for each."""
    d, size = opd.divergence("jsd"), student.vocab_size
    total = [torch.zeros_like(level) for level in student.logits]
    for sequence in tokens.tolist():
        rows, row = [], 0
        for a in sequence:
            rows.append(row)
            row = row * size + a
        ours = torch.stack([level[r] for level, r in zip(student.logits, rows, strict=True)]).requires_grad_()
        theirs = torch.stack([level[r] for level, r in zip(teacher.logits, rows, strict=True)])
        at = torch.tensor(sequence).unsqueeze(-1)
        log_p = torch.log_softmax(ours, -1).gather(-1, at)
        log_q = torch.log_softmax(theirs, -1).gather(-1, at)
        (log_p.sum().exp() * d.generator(log_q - log_p).sum()).backward()
        assert ours.grad is not None
        for level, r, gradient in zip(total, rows, ours.grad, strict=True):
            level[r] += gradient
    return total


def against_autograd(repeats: int) -> list[str]:
    """The oracle against per-sequence autograd, on a tree that both finish and on a larger one."""
    lines = ["| sequences | oracle, ms | autograd, s | ratio | largest difference |", "|---|---|---|---|---|"]
    for size, horizon, share in ((6, 4, 1296), (10, 6, 2000)):
        student, teacher = opd.random_pair(size, horizon, seed=0)
        count = size**horizon
        chosen = torch.arange(count) if share == count else torch.randperm(count, generator=_seeded())[:share]
        powers = size ** torch.arange(horizon - 1, -1, -1)
        tokens = (chosen.unsqueeze(1) // powers) % size
        exact = lambda: opd.exact_gradient(student, teacher, "jsd", "token_return")  # noqa: B023, E731
        rival = lambda: one_by_one(student, teacher, tokens)  # noqa: B023, E731
        times = in_turn({"oracle": exact, "autograd": rival}, repeats)
        whole = times["autograd"] * count / share
        gap = "not compared"
        if share == count:
            gap = f"{max(float((a - b).abs().max()) for a, b in zip(exact(), rival(), strict=True)):.0e}"
        lines.append(
            f"| {count:,} | {1e3 * times['oracle']:.2f} | {whole:.2f} | {whole / times['oracle']:,.0f} | {gap} |"
        )
    return [*lines, "", f"Mark: {OF_AUTOGRAD:g} times at a million sequences, of which 2,000 were timed."]


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# A process of its own, whose peak is what all of it takes: policies, libraries and the oracle's work.
HUNDRED_MILLION = """
import json, resource, time
import opdtheory as opd
student, teacher = opd.random_pair(10, {horizon}, seed=0)
policies = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
value = float(opd.exact_value(student, teacher, "{name}", "{objective}"))
between = time.perf_counter()
norm = sum(float(g.flatten() @ g.flatten()) for g in opd.exact_gradient(student, teacher, "{name}", "{objective}"))
end = time.perf_counter()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([value, norm, between - start, end - between, policies, peak]))
"""


def hundred_million(horizon: int) -> list[str]:
    """Time and peak memory where tables alone take most of the memory."""
    lines = [
        f"V = 10, T = {horizon}: {10**horizon:,} sequences, a process each; its peak holds both policies' tables, of "
        f"{8 * sum(10 ** (n + 1) for n in range(horizon)) / 1e6:,.0f} MB each, and the gradient, which is as large.",
        "",
        "| | value, s | gradient, s | peak with the policies alone, MB | peak, MB |",
        "|---|---|---|---|---|",
    ]
    for name, objective in (("reverse_kl", "token_local"), ("jsd", "token_return"), ("chi2", "sequence")):
        script = HUNDRED_MILLION.format(horizon=horizon, name=name, objective=objective)
        ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
        _, _, value, gradient, policies, peak = json.loads(ran.stdout)
        label = f"`{name}` {objective}"
        lines.append(f"| {label} | {value:.1f} | {gradient:.1f} | {policies / 1e3:,.0f} | {peak / 1e3:,.0f} |")
    return [*lines, "", f"Mark: {IN_MEMORY:,.0f} MB."]


def long_horizons(horizon: int) -> list[str]:
    """Two Markov chains of 64 tokens."""
    student = opd.MarkovPolicy.random(64, horizon, seed=0)
    noise = opd.MarkovPolicy.random(64, horizon, scale=0.1, seed=1)
    teacher = opd.MarkovPolicy(student.initial + noise.initial, student.transition + noise.transition, horizon)
    lines = ["| | value | value, s | gradient, s |", "|---|---|---|---|"]
    settings = [("reverse_kl", "token_local"), ("jsd", "token_return")]
    settings += [(name, "sequence") for name in ("reverse_kl", "forward_kl", "hellinger", "alpha(alpha=-0.5)", "chi2")]
    for name, objective in settings:
        value = float(opd.exact_value(student, teacher, name, objective))
        took = [
            min(seconds(lambda f=f, n=name, o=objective: f(student, teacher, n, o)) for _ in range(3))
            for f in (opd.exact_value, opd.exact_gradient)
        ]
        lines.append(f"| `{name}` {objective} | {value:.6g} | {took[0]:.2f} | {took[1]:.2f} |")
    return [f"V = 64, T = {horizon:,}, the teacher's logits 0.1 from the student's; the best of three.", "", *lines]


def second_moments() -> list[str]:
    """The variance of one rollout's gradient at horizons that cannot be enumerated."""
    d = opd.divergence("jsd")
    lines = [
        "| V | T | sampled token | its time, s | whole vocabulary | return-to-go | its time, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for size, horizon in ((4, 10), (4, 100), (4, 1_000), (4, 10_000), (16, 10_000), (64, 1_000)):
        student, teacher = (opd.MarkovPolicy.random(size, horizon, seed=s) for s in (0, 1))
        found, times = [], []
        for options in ({}, {"summed_tokens": size}, {"cost": d.generator}):
            start = time.perf_counter()
            found.append(opd.rollout_moments(student, teacher, d.weight, **options).variance)
            times.append(time.perf_counter() - start)
        sampled, summed, later = (f"{variance:.4g}" for variance in found)
        lines.append(f"| {size} | {horizon:,} | {sampled} | {times[0]:.2f} | {summed} | {later} | {times[2]:.2f} |")
    about = "OPD+ for the JSD on two random Markov chains: trace of the covariance of one rollout's gradient."
    return [about, "", *lines]


def rates(repeats: int, rollouts: int) -> list[str]:
    """Rollouts per second on a toy pair: drawn, scored, differentiated, and added up by row."""
    student, teacher = opd.random_pair(4, 3, seed=0)
    sampler, generator = Sampler.build(student, teacher), _seeded()
    subjects: dict[str, Run] = {}
    for label, estimator in (
        ("OPD, reverse KL", opd.estimator("opd", "reverse_kl")),
        ("OPD+, JSD", opd.estimator("opd_plus", "jsd")),
        ("return-to-go, JSD", opd.estimator("return_to_go", "jsd", gamma=1.0)),
        ("whole vocabulary, JSD", opd.estimator("full_vocab", "jsd")),
    ):

        def mean(estimator: opd.Estimator = estimator) -> None:
            sample = sampler.draw(rollouts, generator)
            with torch.enable_grad():
                loss = estimator(sample.rollouts)
            (gradient,) = torch.autograd.grad(loss, sample.rollouts.student_logits)
            sampler.scatter(sample.rows, gradient)

        def each(estimator: opd.Estimator = estimator) -> None:
            rollout_gradients(estimator, sampler.draw(rollouts, generator))

        subjects[f"{label} | the mean gradient"] = mean
        subjects[f"{label} | each rollout's own"] = each
    times = in_turn(subjects, repeats)
    lines = ["| estimator | gradient | million rollouts a second |", "|---|---|---|"]
    lines += [f"| {label} | {rollouts / took / 1e6:.2f} |" for label, took in times.items()]
    about = f"V = 4, T = 3, {rollouts:,} rollouts a call; medians of {repeats} alternated repeats."
    mark = f"Mark: {RATE / 1e6:g} million a second."
    missed = {label: subjects[label] for label, took in times.items() if rollouts / took < RATE}
    return [about, "", *lines, "", mark + ("" if missed else " Met by all."), *_profiles(missed)]


PARTS = ("trees", "autograd", "memory", "horizons", "moments", "rates")


def main(arguments: list[str] | None = None) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="alternated, at least 5 for the page")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--small", action="store_true", help="smaller sizes, to see that it runs")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables into this page")
    options = parser.parse_args(arguments)
    if options.write and (options.repeats < 5 or options.small):
        parser.error("--write needs --repeats of at least 5 and full sizes")
    few = 4 if options.small else 0
    sections = {
        "trees": ("A million sequences", lambda: trees(options.repeats, 6 - few // 2)),
        "autograd": ("Beside per-sequence autograd", lambda: against_autograd(options.repeats)),
        "memory": ("A hundred million sequences", lambda: hundred_million(8 - few)),
        "horizons": ("Ten thousand tokens", lambda: long_horizons(100 if few else 10_000)),
        "moments": ("Variances by recursion", second_moments),
        "rates": ("Sampled rollouts", lambda: rates(options.repeats, 1_000 if few else 50_000)),
    }
    text = f"On {machine()}, by `python benchmarks/oracle.py`."
    for part in options.parts:
        title, rows = sections[part]
        text += "\n\n" + "\n".join([f"### {title}", "", *rows()])
    print(text)
    if options.write:
        write(options.write, "benchmarks/oracle.py", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
