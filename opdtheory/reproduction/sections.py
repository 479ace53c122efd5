"""The tables of the experiment's page: every arm, what theory says about it, and baselines for the reverse KL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opdtheory.rendering.markdown import markdown_table
from opdtheory.reproduction.claims import difference, noise_floor
from opdtheory.reproduction.summary import Summary
from opdtheory.reproduction.theory import Reading, reading

__all__ = ["arms", "baselines", "theory"]

_GRID = (
    *("arm", "seeds", "greedy", "sampled", "KL(p‖q)", "KL(q‖p)"),
    *("entropy", "gradient norm", "clipped", "length", "verdict"),
)


def arms(table: Sequence[Summary]) -> str:
    """Every measure of every arm, by task."""
    lines = [
        "## Every arm",
        "Accuracy on the test problems at the end, answered greedily and by sampling, with 95 % Wilson intervals over "
        "seeds and problems (over problems only if there is one seed). KLs to the teacher and entropy on the student's "
        "own test prefixes, in nats per token. Gradient norm before clipping and share of clipped tokens, averaged "
        "over the run. Length of the responses at the end. An arm *trains* or *declines* if its sampled accuracy ends "
        "above or below the start in every seed, with disjoint intervals; it *collapses* if it declines and its "
        "KL(p‖q) more than doubles.",
    ]
    for task in dict.fromkeys(each.task for each in table):
        mine = [each for each in table if each.task == task]
        lines.append(f"### {task}\n\n{_starts(mine)}")
        for group, title in (("grid", "The grid"), ("control", "Controls"), ("twin", "Other rollouts")):
            rows = [_grid_row(each) for each in mine if each.group == group]
            if rows:
                lines.append(f"**{title}**\n\n{markdown_table(_GRID, rows)}")
    return "\n\n".join(lines)


def _starts(mine: Sequence[Summary]) -> str:
    whole = max(mine, key=lambda each: len(each.seeds))
    if whole.start is None:
        return "No run has finished."
    greedy = ", ".join(f"{row['start']['greedy_accuracy']:.3f}" for row in whole.rows)
    sampled = ", ".join(f"{row['start']['test_sampled_accuracy']:.3f}" for row in whole.rows)
    return (
        f"The students start at a sampled accuracy of {sampled} (greedy {greedy}), a KL(p‖q) of "
        f"{_number(whole.means['start_reverse_kl'])}, a KL(q‖p) of {_number(whole.means['start_forward_kl'])} and an "
        f"entropy of {_number(whole.means['start_entropy'])} nats per token."
    )


def _grid_row(each: Summary) -> tuple[str, ...]:
    measures = ("reverse_kl", "forward_kl", "entropy", "gradient_norm")
    clipped, length = each.means.get("clip_fraction"), each.means.get("response_length")
    return (
        f"`{each.name}`",
        str(len(each.seeds)),
        *("-" if share is None else str(share) for share in (each.greedy, each.sampled)),
        *(_number(each.means.get(name)) for name in measures),
        "-" if clipped is None else f"{100 * clipped:.1f} %",
        "-" if length is None else f"{length:.0f}",
        "; ".join([each.verdict, *each.failed]),
    )


def theory(table: Sequence[Summary]) -> str:
    """What theory reads from each arm's weight, the bias at the start, and whether the objective it follows fell."""
    readings = {each.name: reading(each.arm.config()) for each in table}
    tasks = list(dict.fromkeys(each.task for each in table))
    rows = []
    for name in dict.fromkeys(each.name for each in table if each.group != "twin"):
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
        words = [each.word for each in table if each.group != "twin" and readings[each.name].descends is descends]
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


_BASELINES = (
    *("reverse_kl/opd", "reverse_kl/opd_plus", "reverse_kl/opd, optimal baseline"),
    *("reverse_kl/opd, vocabulary baseline", "reverse_kl/opd, other rollouts"),
)


def baselines(table: Sequence[Summary]) -> str:
    """The reverse-KL arms that differ by a baseline."""
    rows = []
    for task in dict.fromkeys(each.task for each in table):
        mine = {each.name: each for each in table if each.task == task}
        plain = mine.get("reverse_kl/opd")
        if plain is None or plain.sampled is None:
            continue
        for name in _BASELINES:
            each = mine.get(name)
            if each is None or each.sampled is None:
                continue
            gap = difference(each, plain)
            constant = {"reverse_kl/opd": 0.0, "reverse_kl/opd_plus": 1.0}.get(name, each.means["baseline_value"])
            rows.append(
                (
                    f"`{name}`",
                    task,
                    "-" if constant is None else f"{constant:+.2f}",
                    _number(each.means["variance"]),
                    str(each.sampled),
                    "-" if gap is None or each is plain else f"{gap[0]:+.3f}",
                )
            )
    if not rows:
        return ""
    floor, seeds = noise_floor(table), max(len(each.seeds) for each in table)
    limit = "" if floor is None else f" The noise floor of the last column is {floor.over(seeds):.3f}."
    return "\n\n".join(
        [
            "## The reverse KL: OPD, OPD+ and baselines",
            "For the reverse KL the advantages of OPD and OPD+ differ by the constant 1, a baseline: their expected "
            "gradients are the same and only the variance differs ([T7a](theory/t7a.md)). The optimal constant is the "
            "one at the start; the vocabulary baseline is the mean advantage at each prefix. The variance is that of "
            "one rollout's gradient at the start, summed over the vocabulary, relative to the squared length of the "
            f"exact gradient.{limit}",
            markdown_table(("arm", "task", "constant", "variance", "sampled", "against OPD"), rows),
        ]
    )


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    size = abs(value)
    if size < 1e-9:  # rounding
        return "0"
    return f"{value:.2f}" if 0.1 <= size < 100 else f"{value:,.0f}" if 100 <= size < 1e6 else f"{value:.2g}"
