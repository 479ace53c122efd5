"""What became of the mutants: kill rates, survivors with their reasons, the page of the documentation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import tomllib

REASONS = Path(__file__).with_name("survivors.toml")
AIM = 0.95

# Why a mutant that no check notices is no defect of the checks.
KINDS = {
    "equivalent": "the mutant computes the same",
    "instance": "another instance, sample or starting point, of which the statement is true as well",
    "accuracy": "numerical quality alone: a tolerance, a grid, a step size or a branch between two valid forms",
    "redundant": "a second guard that another one backs up, or words and layout",
}


@dataclass(frozen=True)
class Outcome:
    """One mutant: what was changed, the how-manieth such change in its function, and whether it was killed."""

    module: str
    function: str
    line: int
    before: str
    after: str
    nth: int
    how: str

    @property
    def dead(self) -> bool:
        """Whether a check failed on it, or it never ended."""
        return self.how in ("killed", "timeout")

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """What tells it from others, wherever its line has moved to."""
        return self.module, self.function, self.before, self.after, self.nth


def explanations() -> dict[tuple[str, str, str, str], tuple[str, str]]:
    """Kind and reason by module, function and change; lines move, so they do not count."""
    entries = tomllib.loads(REASONS.read_text(encoding="utf-8"))["survivor"]
    return {(e["module"], e["function"], e["before"], e["after"]): (e["kind"], e["reason"]) for e in entries}


def explanation(outcome: Outcome, known: dict[tuple[str, str, str, str], tuple[str, str]]) -> tuple[str, str] | None:
    """Why it survives, where that is recorded."""
    return known.get((outcome.module, outcome.function, outcome.before, outcome.after))


def rate(outcomes: Iterable[Outcome]) -> float:
    """Killed, of all."""
    outcomes = list(outcomes)
    return sum(outcome.dead for outcome in outcomes) / max(len(outcomes), 1)


def is_success(outcomes: list[Outcome]) -> bool:
    """Whether enough are killed and no survivor lacks its reason."""
    known = explanations()
    return rate(outcomes) >= AIM and all(o.dead or explanation(o, known) for o in outcomes)


def summary(outcomes: list[Outcome], asked: int, seconds: float) -> str:
    """Rates per package and module, and the survivors without a reason; `asked` is how many there were to run."""
    known = explanations()
    lines = []
    for module in sorted({o.module for o in outcomes}):
        own = [o for o in outcomes if o.module == module]
        lines.append(f"{module}: {sum(o.dead for o in own)} of {len(own)} killed")
    alive = [o for o in outcomes if not o.dead]
    kinds = Counter(found[0] for o in alive if (found := explanation(o, known)))
    lines += [
        f"unexplained: {o.module}:{o.line} in {o.function}: {o.before}  ->  {o.after}"
        for o in alive
        if not explanation(o, known)
    ]
    dead, slow = len(outcomes) - len(alive), sum(o.how == "timeout" for o in outcomes)
    lines.append(
        f"{dead} of {len(outcomes)} mutants killed ({100 * rate(outcomes):.1f} %; {asked} asked for), {slow} of them "
        f"by time-out, in {seconds:.0f} s; survivors: "
        + (", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "none explained")
        + f", {len(alive) - sum(kinds.values())} unexplained"
    )
    return "\n".join(lines)


def write_page(path: Path, outcomes: list[Outcome], asked: int) -> None:
    """The page of the documentation."""
    known = explanations()
    alive = sorted((o for o in outcomes if not o.dead), key=lambda o: (o.module, o.line))
    packages = sorted({"/".join(o.module.split("/")[:2]) for o in outcomes})
    *others, last = (f"`{package.split('/')[1]}`" for package in packages)
    in_words = f"{', '.join(others)} and {last}" if others else last
    table = [
        "| package | mutants | killed | rate | survivors that compute the same |",
        "| --- | --- | --- | --- | --- |",
    ]
    for package in [*packages, ""]:
        own = [o for o in outcomes if o.module.startswith(f"{package}/" if package else "")]
        same = sum(1 for o in own if not o.dead and (explanation(o, known) or ("",))[0] == "equivalent")
        table.append(
            f"| {f'`{package}`' if package else 'all'} | {len(own)} | {sum(o.dead for o in own)} | "
            f"{100 * rate(own):.1f} % | {same} |"
        )
    text = [
        "# What the checks would notice",
        "",
        "<!-- Written by `make mutation`; edit tests/mutation/ instead. -->",
        "",
        f"Every sum in {in_words} is broken, one term at a time: its sign turned, or either term dropped. A mutant is",
        "killed when a step or an identity of a theorem, or a test, fails on it.",
        "",
        *table,
        "",
        f"{len(outcomes)} of {asked} mutants were run, in random order."
        if len(outcomes) < asked
        else "Every mutant was run.",
        "",
        "## Survivors",
        "",
    ]
    for kind, meaning in KINDS.items():
        own = [o for o in alive if (explanation(o, known) or ("",))[0] == kind]
        if not own:
            continue
        text += [f"### {kind.capitalize()}: {meaning} ({len(own)})", ""]
        for o in own:
            found = explanation(o, known)
            reason = found[1] if found else ""
            text.append(
                f"- `{o.module.removeprefix('opdtheory/')}`, `{o.function}`: "
                f"`{_short(o.before)}` → `{_short(o.after)}`. {reason}"
            )
        text.append("")
    unexplained = [o for o in alive if not explanation(o, known)]
    if unexplained:
        text += [f"### Not explained ({len(unexplained)})", ""]
        text += [f"- `{o.module}:{o.line}`: `{_short(o.before)}` → `{_short(o.after)}`" for o in unexplained]
        text.append("")
    path.write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")


def _short(code: str) -> str:
    code = " ".join(code.split()).replace("`", "'").replace("|", "¦")
    return code if len(code) <= 90 else code[:87] + "..."
