"""The tables of the experiment's page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opdtheory.rendering.markdown import folded, markdown_table
from opdtheory.reproduction.claims import (
    LEVEL,
    PREDICTIONS,
    REPORTS,
    Comparison,
    Difference,
    difference,
    find,
    ours,
    predicted,
)
from opdtheory.reproduction.plan import FORMS, RATES, REFERENCE
from opdtheory.reproduction.summary import Summary
from opdtheory.reproduction.theory import Reading, reading

__all__ = ["arms", "predictions", "reports", "starts", "theory", "tuning", "variance"]

_ENDS = ("arm", "seeds", "greedy", "sampled", f"against `{REFERENCE}`", "verdict")
_MEASURES = ("arm", "KL(p‖q)", "KL(q‖p)", "entropy", "gradient norm", "clipped", "length")


def starts(table: Sequence[Summary]) -> str:
    """Where the students start, by task, and how far apart."""
    parts = []
    for task in _tasks(table):
        whole = max((each for each in table if each.task == task), key=lambda each: len(each.seeds))
        if whole.start is None:
            continue
        shares = whole.start.seeds
        parts.append(
            f"on {task} at a sampled accuracy of {', '.join(f'{share:.3f}' for share in shares)}, "
            f"{max(shares) - min(shares):.3f} apart at most"
        )
    return f"The students start {'; '.join(parts)}." if parts else "No run has finished."


def reports(table: Sequence[Summary]) -> str:
    """What others report, with their numbers, and our differences beside them."""
    tasks = _tasks(table)
    rows = []
    for each in REPORTS:
        with_whom = "its own start" if each.compared.other is None else f"`{each.compared.other}`"
        found = [ours(table, task, each.compared) for task in tasks]
        if any(gap is not None for gap in found):
            arm = f"`{each.compared.arm}` against {with_whom}"
            rows.append((each.claim, each.source, each.numbers, arm, *map(_shown, found)))
    if not rows:
        return ""
    head = ("claim", "source", "its numbers", "ours", *tasks)
    return "\n\n".join(
        [
            "## What others report, and what we find",
            "Each line is one source's statement in its own numbers, and our nearest comparison: other models, other "
            "tasks, other budgets. A difference of .03 points, as between 48.99 and 48.96, is a null result.",
            markdown_table(head, rows),
        ]
    )


def predictions(table: Sequence[Summary]) -> str:
    """What theory predicts, and whether the runs bear it out."""
    tasks = _tasks(table)
    lines = [
        "## Predicted, then run",
        "The predictions follow from the variance of each estimator (T7a, T13, T19b); each was written down before the "
        "arms that decide it ran. It is held to the difference between two arms with the same students, paired by "
        f"seed. That a difference within {LEVEL:g} counts as close although it excludes zero was settled while the "
        "runs went on.",
    ]
    return "\n\n".join([*lines, *_held(table, tasks)])


def _held(table: Sequence[Summary], tasks: Sequence[str]) -> list[str]:
    """Each prediction that the arms of a table decide, and how it is held."""
    lines = []
    for each in PREDICTIONS:
        words, found = predicted(table, tasks, each)
        if found:
            lines += [f"**{each.says}:** {words}.", "\n".join(f"- {line}" for line in found)]
    return lines


def variance(table: Sequence[Summary]) -> str:
    """The variance of each estimator at the start beside where it ends."""
    rows = []
    for task in _tasks(table):
        for each in (each for each in table if each.task == task and each.form in FORMS and each.sampled is not None):
            divergence = each.name.partition("/")[0]
            whole = find(table, task, f"{divergence}/full_vocab")
            gap = None if whole is None or whole is each else difference(each, whole)
            rows.append((task, f"`{each.name}`", _number(each.means["variance"]), str(each.sampled), _shown(gap)))
    return "\n\n".join(
        [
            "## What the variance costs",
            "The variance is that of one rollout's gradient at the start, summed over the vocabulary at the prefixes "
            "of 32 rollouts, relative to the squared length of the exact gradient of the same divergence. All forms "
            "of one divergence but `opd` follow the same expected gradient, up to the clip. The optimal baseline is "
            "computed from both whole distributions, as the whole vocabulary is; the top tokens with *no baseline* "
            "or with that of the *rest* need no more than what a teacher's server sends, its likeliest tokens and the "
            "sampled one.",
            markdown_table(("task", "arm", "variance", "sampled", "against the whole vocabulary"), rows),
        ]
    )


def tuning(table: Sequence[Summary], chosen: Sequence[Summary]) -> str:
    """The arms at the learning rate tuned for each, and the rates."""
    if not chosen:
        return ""
    rows = []
    for each in chosen:
        rate = each.rows[0]["identity"]["fields"]["learning_rate"] if each.rows else None
        other = find(chosen, each.task, REFERENCE)
        gap = None if other is None or other is each else difference(each, other)
        common = find(table, each.task, each.name)
        rows.append(
            (
                each.task,
                f"`{each.name}`",
                "-" if rate is None else f"{rate:g}",
                str(len(each.seeds)),
                "-" if common is None or common.sampled is None else str(common.sampled),
                "-" if each.sampled is None else str(each.sampled),
                _shown(gap),
            )
        )
    head = ("task", "arm", "rate", "seeds", "sampled, common rate", "sampled, own rate", f"against `{REFERENCE}`")
    return "\n\n".join(
        [
            "## Each arm at its own learning rate",
            f"Tuned over {', '.join(f'{rate:g}' for rate in RATES)} on a student and rollouts of one further seed, "
            "which is used for nothing else, by the sampled accuracy at the end; then run with the seeds of the "
            "comparison. Both arms of a difference have their own rate.",
            markdown_table(head, rows),
            "The predictions that these arms decide, each arm at its own rate:",
            *_held(chosen, _tasks(chosen)),
        ]
    )


def arms(table: Sequence[Summary]) -> str:
    """Every measure of every arm, by task."""
    lines = [
        "## Every arm",
        "Accuracy on the test problems at the end, answered greedily and by sampling, with 95 % Wilson intervals over "
        "seeds and problems (over problems only if there is one seed). Differences in sampled accuracy are paired by "
        "seed, with Student's 95 % interval: *above* or *below* if it excludes zero, *level* if all of it is within "
        f"{LEVEL:g} of zero, else *not resolved*; of so many differences some are *above* or *below* by chance. KLs to "
        "the teacher and entropy on the student's own test prefixes, in nats per token. Gradient norm before clipping "
        "and share of clipped tokens, averaged over the run. Length of the responses at the end. An arm *trains* or "
        "*declines* if its sampled accuracy ends above or below the start in every seed, with disjoint intervals; it "
        "*collapses* if it declines and its KL(p‖q) more than doubles.",
    ]
    for task in _tasks(table):
        mine = [each for each in table if each.task == task]
        lines.append(f"### {task}\n\n{_beginning(mine)}")
        for group, title in (("main", "Compared"), ("control", "Controls")):
            members = [each for each in mine if each.group == group]
            if members:
                lines.append(f"**{title}**\n\n{markdown_table(_ENDS, [_end_row(table, each) for each in members])}")
                measures = markdown_table(_MEASURES, [_measure_row(each) for each in members])
                lines.append(folded(f"{title}: distances, entropy, gradients and lengths", measures))
    return "\n\n".join(lines)


def _tasks(table: Sequence[Summary]) -> list[str]:
    return list(dict.fromkeys(each.task for each in table))


def _shown(found: Difference | None) -> str:
    return "-" if found is None else str(found)


def _beginning(mine: Sequence[Summary]) -> str:
    whole = max(mine, key=lambda each: len(each.seeds))
    if whole.start is None:
        return "No run has finished."
    greedy = ", ".join(f"{row['start']['greedy_accuracy']:.3f}" for row in whole.rows)
    return (
        f"The students answer greedily with an accuracy of {greedy}, and start at a KL(p‖q) of "
        f"{_number(whole.means['start_reverse_kl'])}, a KL(q‖p) of {_number(whole.means['start_forward_kl'])} and an "
        f"entropy of {_number(whole.means['start_entropy'])} nats per token."
    )


def _end_row(table: Sequence[Summary], each: Summary) -> tuple[str, ...]:
    against = None if each.name == REFERENCE else ours(table, each.task, Comparison(each.name))
    return (
        f"`{each.name}`",
        str(len(each.seeds)),
        *("-" if share is None else str(share) for share in (each.greedy, each.sampled)),
        _shown(against),
        "; ".join([each.verdict, *each.failed]),
    )


def _measure_row(each: Summary) -> tuple[str, ...]:
    measures = ("reverse_kl", "forward_kl", "entropy", "gradient_norm")
    clipped, length = each.means.get("clip_fraction"), each.means.get("response_length")
    return (
        f"`{each.name}`",
        *(_number(each.means.get(name)) for name in measures),
        "-" if clipped is None else f"{100 * clipped:.1f} %",
        "-" if length is None else f"{length:.0f}",
    )


def theory(table: Sequence[Summary]) -> str:
    """What theory reads from each arm's weight, the bias at the start, and whether the objective it follows fell."""
    readings = {each.name: reading(each.arm.config()) for each in table}
    tasks = _tasks(table)
    rows = []
    for name in dict.fromkeys(each.name for each in table):
        mine = [each for task in tasks for each in table if (each.task, each.name) == (task, name)]
        cells = [" / ".join(cell(each) for each in mine) for cell in (_bias, _followed, lambda each: each.word)]
        rows.append((f"`{name}`", str(readings[name]), *cells))
    return "\n\n".join(
        [
            "## What theory says about each arm",
            "The weight is read on the log-ratios that the clip leaves. The bias is that of the estimator's expected "
            "gradient in the student's parameters, clip included, relative to the exact gradient of the divergence it "
            "is named after; both are summed over the whole vocabulary at the prefixes of 32 rollouts at the start. "
            "The cosine is between the two. The objective followed is $D_V$ of [T4](theory/t4.md), from the start to "
            "the end, on the student's own prefixes: the arm's expected gradient is the exact gradient of $D_V$. Where "
            "the weight falls, $D_V$ is no divergence and can be negative, so its fall is no progress. Cells hold "
            f"{' / '.join(tasks)}.",
            markdown_table(("arm", "weight, read by theory", "bias (cosine)", "objective followed", "verdict"), rows),
            _tally(table, readings),
        ]
    )


def _tally(table: Sequence[Summary], readings: dict[str, Reading]) -> str:
    """How often each verdict comes with a weight that never falls, and with one that falls."""
    lines = []
    for descends, text in ((True, "the weight never falls"), (False, "the weight falls")):
        words = [each.word for each in table if readings[each.name].descends is descends]
        if words:
            counts = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(sorted(words)))
            lines.append(f"- where {text}: {counts}, of {len(words)} arms on a task")
    return "Verdicts by what T4 says of the weight:\n\n" + ";\n".join(lines) + "." if lines else ""


def _bias(each: Summary) -> str:
    bias, cosine = each.means["bias"], each.means["cosine"]
    return _number(bias) if cosine is None else f"{_number(bias)} ({cosine:+.2f})"


def _followed(each: Summary) -> str:
    start, end = each.means["start_objective"], each.means["objective"]
    if start is None:
        return "-"
    fell = sum(_falls(row) for row in each.rows)
    return f"{_number(start)} to {_number(end)}, fell in {fell} of {len(each.rows)}"


def _falls(row: Any) -> bool:
    start, end = row["objective"][0], row["objective"][-1]
    return start is not None and end is not None and end < start


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    size = abs(value)
    if size < 1e-9:  # rounding
        return "0"
    return f"{value:.2f}" if 0.1 <= size < 100 else f"{value:,.0f}" if 100 <= size < 1e6 else f"{value:.2g}"
