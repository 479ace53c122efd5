"""One theorem on the page of a verification: what it says, and folded what was derived and checked."""

from __future__ import annotations

import re
from html import escape

from opdtheory.rendering.html import bullets, folded, number, prose, table
from opdtheory.rendering.mathematics import display, inline, typeset
from opdtheory.theorems import IdentityResult, StepResult, Theorem, TheoremResult
from opdtheory.theorems.proofs import Proof, ProvedStatement, proof
from opdtheory.verification.markdown import HOW, as_sentence, axioms_in_words, named

__all__ = ["anchor", "article", "mark"]


_IN_WORDS = " <span class='note'>(Proved in words; the machine checks a lemma or an instance.)</span>"


def anchor(number: str) -> str:
    """What links to a theorem say."""
    return re.sub(r"\W+", "-", number.lower())


def mark(passed: bool, right: str = "holds", wrong: str = "fails") -> str:
    """A verdict as a word."""
    return f"<span class='mark {'good' if passed else 'bad'}'>{right if passed else wrong}</span>"


def article(found: TheoremResult, stated: Theorem | None) -> str:
    """The theorem as HTML; of one that fails, what failed comes first and is open.

    Args:
        found: what its steps and checks found.
        stated: the theorem itself; without it, there is no statement.
    """
    head = f"{escape(found.number)} {typeset(named(found.name))} {mark(found.passed)}"
    parts = [f"<article class='entry' id='{anchor(found.number)}'><h3>{head}</h3>"]
    if not found.passed:
        parts.append(bullets(_failures(found)))
    if stated is not None:
        parts += [f"<p>{typeset(stated.meaning)}</p>" if stated.meaning else "", display(stated.statement)]
        parts.append(
            f"<p class='note'>Assumed: {typeset('; '.join(stated.hypotheses))}.</p>" if stated.hypotheses else ""
        )
    parts += [_derivation(found.steps), *_checks(found.identities), _machine_checked(proof(found.number))]
    return "".join(parts) + "<p class='back'><a href='#contents'>Contents</a></p></article>"


def _failures(found: TheoremResult) -> list[str]:
    failures = [
        f"Step {i} of the derivation does not hold: {inline(step.says)}"
        for i, step in enumerate(found.steps, 1)
        if not step.holds
    ]
    for check in found.identities:
        what = f"“{typeset(named(check.name))}”"
        if not check.cases:
            failures.append(f"The check {what} saw no case.")
        elif not check.holds:
            where = f"; {escape(check.failure)}" if check.failure else ""
            failures.append(
                f"The check {what} is off by {_error(check.error)}, above {_error(check.tolerance)}{where}."
            )
        if not check.twins:
            failures.append(f"The check {what} has no false twin.")
        failures += [f"The check {what} does not refute its false twin “{typeset(named(t))}”." for t in check.survivors]
    return failures


def _derivation(steps: list[StepResult]) -> str:
    if not steps:
        return ""
    items = "".join(
        f"<li><p>{typeset(as_sentence(step.why))} {mark(step.holds)}"
        f"{_IN_WORDS if step.in_words else ''}</p>"
        f"{display(step.says)}</li>"
        for step in steps
    )
    holding = sum(step.holds for step in steps)
    return folded(
        f"Derivation: {_hold(holding, len(steps), 'step')}",
        f"<ol class='steps'>{items}</ol>",
        holding < len(steps),
    )


def _checks(checks: list[IdentityResult]) -> list[str]:
    if not checks:
        return []
    rows = [
        (
            typeset(named(check.name))
            + (f"<br><span class='bad'>{escape(check.failure)}</span>" if check.failure else ""),
            inline(check.statement),
            mark(check.holds),
            escape(HOW[check.kind]),
            f"{check.cases:,}",
            _error(check.error),
            f"{check.seconds:.1f}",
        )
        for check in checks
    ]
    holding, cases = sum(check.holds for check in checks), sum(check.cases for check in checks)
    header = ("check", "claim", "verdict", "how", "cases", "largest error", "s")
    about = "What was compared; errors are relative to the larger of one and the numbers compared."
    twins = [
        (
            typeset(named(check.name)),
            typeset(named(twin)),
            mark(twin not in check.survivors, "refuted", "survives"),
            _error(error),
        )
        for check in checks
        for twin, error in check.twins.items()
    ]
    surviving = sum(len(check.survivors) for check in checks)
    return [
        folded(
            f"Checks: {_hold(holding, len(checks), 'check')}, on {cases:,} cases",
            table(header, rows, about, numbers=(4, 5, 6)),
            holding < len(checks),
        ),
        folded(
            f"False twins: {_all_of(len(twins) - surviving, len(twins), 'twin')} refuted",
            table(
                ("check", "false twin", "verdict", "off by"),
                twins,
                "Wrong forms of the claims, which the same checks must refute.",
                numbers=(3,),
            ),
            surviving > 0,
        )
        if twins
        else "",
    ]


def _machine_checked(proved: Proof | None) -> str:
    if proved is None:
        return ""

    def items(statements: tuple[ProvedStatement, ...]) -> str:
        return bullets(prose(as_sentence(each.words)) for each in statements)

    count = len(proved.statements)
    return folded(
        f"Machine-checked in Coq {proved.coq}: {count} statement{'' if count == 1 else 's'}",
        f"<p>For every finite vocabulary, in exact real numbers:</p>{items(proved.statements)}"
        f"{f'<p>Not among them: {prose(proved.left_out)}.</p>' if proved.left_out else ''}"
        f"<p>These false twins do not hold:</p>{items(proved.twins)}"
        f"<p class='note'>{axioms_in_words(proved.axioms, '<code>{}</code>')} Last checked on {proved.checked}: "
        f"<code>{escape(proved.file)}</code>, whose digest, with the files that it requires, begins with "
        f"<code>{proved.digest[:12]}</code>.</p>",
    )


def _hold(holding: int, count: int, what: str) -> str:
    return f"{_all_of(holding, count, what)} {'holds' if holding == count == 1 else 'hold'}"


def _all_of(holding: int, count: int, what: str) -> str:
    """`all 3 steps`, `both steps`, `the step`, `2 of 3 steps`."""
    if holding < count:
        return f"{holding} of {count} {what}s"
    return {1: f"the {what}", 2: f"both {what}s"}.get(count, f"all {count} {what}s")


def _error(value: float) -> str:
    return "outright" if value == float("inf") else number(float(f"{value:.1e}"))
