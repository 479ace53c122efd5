"""One Markdown page per theorem, written from the object and from what its checks found."""

from __future__ import annotations

from opdtheory.theorems.theorem import IdentityResult, Theorem, TheoremResult

__all__ = ["index", "page", "slug"]

_HOW = {
    "symbolic": "symbolic",
    "exact": "exact, in fractions",
    "rigorous": "rigorous, by intervals",
    "numeric": "numeric, float64",
}


def slug(theorem: Theorem) -> str:
    """The page's file name without its ending."""
    return theorem.number.lower()


def index(theorems: tuple[Theorem, ...]) -> str:
    """The page that lists all theorems with what to do about each."""
    lines = ["# The theorems", "", "| | theorem | what to do |", "|---|---|---|"]
    lines += [f"| [{t.number}]({slug(t)}.md) | {t.name} | {t.advice} |" for t in theorems]
    return "\n".join(lines) + "\n"


def page(theorem: Theorem, result: TheoremResult) -> str:
    """The page of one theorem: statement, derivation, numbers, false twins."""
    parts = [
        f"# {theorem.number}: {theorem.name}",
        _displayed(theorem.statement),
        "**Hypotheses.** " + "; ".join(theorem.hypotheses) + ".",
        f"**Source.** {theorem.source.rstrip('.')}.",
        f"**What to do.** {theorem.advice}",
    ]
    if result.steps:
        parts += ["## Derivation", "Each step is decided by sympy unless it says otherwise.", _derivation(result)]
    if result.identities:
        parts += ["## Checks", _checks(result.identities), "## False twins", _TWINS, _twins(result.identities)]
    return "\n\n".join(parts) + "\n"


_TWINS = "Wrong forms of the same claims; the same checks must find them wrong by far more than rounding."


def _derivation(result: TheoremResult) -> str:
    lines = []
    for number, step in enumerate(result.steps, start=1):
        note = " *(Proved in words; the machine checks a lemma or an instance.)*" if step.in_words else ""
        lines += [f"**{number}.** {step.why[:1].upper()}{step.why[1:].rstrip('.')}.{note}", _displayed(step.says)]
    return "\n\n".join(lines)


def _checks(identities: list[IdentityResult]) -> str:
    lines = ["| check | claim | how | cases | largest error | tolerance |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {r.name} | {_inline(r.statement)} | {_HOW[r.kind]} | {r.cases} | "
        f"{_number(r.error)} | {_number(r.tolerance)} |"
        for r in identities
    ]
    return "\n".join(lines)


def _twins(identities: list[IdentityResult]) -> str:
    lines = ["| check | false twin | off by |", "|---|---|---|"]
    lines += [f"| {r.name} | {twin} | {_number(error)} |" for r in identities for twin, error in r.twins.items()]
    return "\n".join(lines)


def _displayed(formula: str) -> str:
    return f"$$\n{formula}\n$$"


def _inline(formula: str) -> str:
    # A bar would end the cell of the table.
    return f"${formula}$".replace(r"\|", r"\Vert ").replace("|", r"\vert ")


def _number(value: float) -> str:
    if value == 0.0:
        return "0"
    return "refuted outright" if value == float("inf") else f"{value:.1e}"
