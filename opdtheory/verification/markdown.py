"""One Markdown page per theorem, written from the object and from what its checks found."""

from __future__ import annotations

import re

from opdtheory.rendering.markdown import folded, literal
from opdtheory.rendering.mathematics import lines_of
from opdtheory.theorems.proofs import Proof, ProvedStatement, proof
from opdtheory.theorems.theorem import IdentityResult, Theorem, TheoremResult

__all__ = [
    "HOW",
    "as_sentence",
    "axioms_in_words",
    "index",
    "machine_checked",
    "machine_checked_part",
    "named",
    "page",
    "slug",
]

HOW = {
    "symbolic": "symbolic",
    "exact": "exact, in fractions",
    "rigorous": "rigorous, by intervals",
    "numeric": "numeric, float64",
}

# A one-letter name with an index or a power, such as w_f or e^C.
_INDEXED = re.compile(r"\b[A-Za-z][_^]\w+")


def slug(theorem: Theorem) -> str:
    """The page's file name without its ending."""
    return theorem.number.lower()


def index(theorems: tuple[Theorem, ...]) -> str:
    """The page that lists all theorems with what to do about each."""
    lines = ["# The theorems", "", "| | theorem | what to do |", "|---|---|---|"]
    lines += [f"| [{t.number}]({slug(t)}.md) | {t.name} | {_in_cell(t.advice)} |" for t in theorems]
    proved = ", ".join(f"[{t.number}]({slug(t)}.md#machine-checked)" for t in theorems if proof(t.number))
    lines += ["", f"[Machine-checked in Coq](../proofs.md): {proved}."] if proved else []
    return "\n".join(lines) + "\n"


def page(theorem: Theorem, result: TheoremResult) -> str:
    """The page of one theorem: meaning, statement, derivation, what to do; what was checked is folded."""
    parts = [
        f"# {theorem.number}: {theorem.name}",
        theorem.meaning,
        "## Statement",
        *map(_displayed, lines_of(theorem.statement)),
        "**Hypotheses.** " + as_sentence("; ".join(theorem.hypotheses)),
    ]
    if result.steps:
        parts += ["## Derivation", _derivation(result)]
    parts += ["## What to do", theorem.advice, machine_checked_part(theorem.number)]
    if result.identities:
        parts += ["## What was checked", _counted(result.identities)]
        parts += [folded("The checks", _checks(result.identities))]
        parts += [folded("The false twins", _twins(result.identities))]
    parts += [f"**Source.** {as_sentence(theorem.source)}"]
    return "\n\n".join(filter(None, parts)) + "\n"


def _derivation(result: TheoremResult) -> str:
    lines = ["Sympy decides each step, except where it says otherwise."]
    for number, step in enumerate(result.steps, start=1):
        note = " *(Proved in words; the machine checks a lemma or an instance.)*" if step.in_words else ""
        lines += [f"**Step {number}.** {as_sentence(step.why)}{note}", *map(_displayed, lines_of(step.says))]
    return "\n\n".join(lines)


def machine_checked_part(number: str) -> str:
    """The part of a theorem's page that says what Coq checks; empty if that is nothing."""
    proved = proof(number)
    return f"## Machine-checked\n\n{_machine_checked(proved)}" if proved else ""


def _machine_checked(proved: Proof) -> str:
    text = f"[the statements in Coq](../proofs.md#{proved.number.lower()})"
    return "\n\n".join(
        [
            f"Coq {proved.coq} checks the proofs of what follows, in exact real numbers and for every finite vocabulary"
            f" ({text}).",
            _items(proved.statements),
            *([f"Not among them: {literal(proved.left_out)}."] if proved.left_out else []),
            "It also checks that these false twins do not hold:",
            _items(proved.twins),
            f"{axioms_in_words(proved.axioms)} Last checked on {proved.checked}: `{proved.file}`, whose digest, with"
            f" the files that it requires, begins with `{proved.digest[:12]}`.",
        ]
    )


def _items(statements: tuple[ProvedStatement, ...]) -> str:
    return "\n".join(f"- {literal(as_sentence(each.words))}" for each in statements)


def axioms_in_words(axioms: tuple[str, ...], quote: str = "`{}`") -> str:
    """What proofs in Coq rest on, as a sentence; `quote` puts a name into code."""
    if not axioms:
        return "The proofs use no axioms."
    names = ", ".join(quote.format(name) for name in axioms)
    return f"The proofs use no axioms beyond those of Coq's real numbers: {names}."


def machine_checked(count: int) -> str:
    """How many theorems are machine-checked, as a clause."""
    return f"{count} theorem{' is' if count == 1 else 's are'} machine-checked in Coq"


def _counted(identities: list[IdentityResult]) -> str:
    cases, twins = sum(r.cases for r in identities), sum(len(r.twins) for r in identities)
    checks = "One check ran" if len(identities) == 1 else f"{len(identities)} checks ran"
    return (
        f"{checks}, on {cases:,} cases in all. Beside each stand wrong forms of its claim, {twins} in all, which the"
        " same check must find wrong by far more than rounding."
    )


def _checks(identities: list[IdentityResult]) -> str:
    lines = ["| check | claim | how | cases | largest error | tolerance |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {_cell(r.name)} | {_in_cell(f'${r.statement}$')} | {HOW[r.kind]} | {r.cases} | "
        f"{_number(r.error)} | {_number(r.tolerance)} |"
        for r in identities
    ]
    return "\n".join(lines)


def _twins(identities: list[IdentityResult]) -> str:
    lines = ["| check | false twin | off by |", "|---|---|---|"]
    lines += [
        f"| {_cell(r.name)} | {_cell(twin)} | {_number(error)} |" for r in identities for twin, error in r.twins.items()
    ]
    return "\n".join(lines)


def _displayed(formula: str) -> str:
    return f"$$\n{formula}\n$$"


def named(name: str) -> str:
    """A name in which words with an index or a power are formulas."""
    return _INDEXED.sub(r"$\g<0>$", name)


def _cell(name: str) -> str:
    return named(name).replace("|", r"\|")


def _in_cell(text: str) -> str:
    # A bar would end the cell of the table.
    return text.replace(r"\|", r"\Vert{}").replace("|", r"\vert{}")


def as_sentence(text: str) -> str:
    """The text with a capital letter and one full stop."""
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def _number(value: float) -> str:
    if value == 0.0:
        return "0"
    return "refuted outright" if value == float("inf") else f"{value:.1e}"
