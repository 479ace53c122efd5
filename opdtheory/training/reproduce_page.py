"""The page of the experiment, `docs/reproduction.md`: every number and every verdict on it is read off the rows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opdtheory.training.reproduce_claims import claims, difference, floor_text, noise_floor
from opdtheory.training.reproduce_figures import write_figures
from opdtheory.training.reproduce_plan import FULL, Arm, Plan
from opdtheory.training.reproduce_runner import Outcome
from opdtheory.training.reproduce_table import Summary, summaries
from opdtheory.training.reproduce_theory import Reading, reading

__all__ = ["page_of", "read_outcome", "write_page"]


def write_page(outcome: Outcome, path: Path) -> Path:
    """Write the page, its figures into the folder `figures` beside it, and the rows as JSON lines under its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figures = write_figures(summaries(outcome.rows), path.parent / "figures")
    links = [(file.relative_to(path.parent).as_posix(), caption) for file, caption in figures]
    head = {
        "plan": dataclasses.asdict(outcome.plan),
        "missing": outcome.missing,
        "models": outcome.models,
        "sessions": outcome.sessions,
        "figures": links,
    }
    lines = [json.dumps(each, allow_nan=False) for each in (head, *outcome.rows)]
    path.with_suffix(".jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    path.write_text(page_of(outcome, links), encoding="utf-8")
    return path


def read_outcome(path: Path) -> tuple[Outcome, list[tuple[str, str]]]:
    """What `write_page` stored in the JSON lines, with the figures and their captions."""
    head, *rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    values: dict[str, Any] = {n: tuple(each) if isinstance(each, list) else each for n, each in head["plan"].items()}
    outcome = Outcome(Plan(**values), rows, head["missing"], head["models"], head["sessions"])
    return outcome, [(file, caption) for file, caption in head["figures"]]


def page_of(outcome: Outcome, figures: Sequence[tuple[str, str]]) -> str:
    """The page as Markdown."""
    table = summaries(outcome.rows)
    readings = {each.name: _reading(each) for each in table}
    parts = [
        _opening(outcome),
        _claims(table),
        _figures(figures),
        _grid(table),
        _theory(table, readings),
        _baselines(table),
        _limits(outcome, table),
        _models(outcome),
        _again(outcome.plan),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _opening(outcome: Outcome) -> str:
    plan, rows = outcome.plan, outcome.rows
    seeds = sorted({row["seed"] for row in rows})
    machines = dict.fromkeys(_machine(row["machine"]) for row in rows)
    processor = sum(row["processor_seconds"] for row in rows) / 60
    lines = [
        "# Reproduction",
        "Small language models are distilled on their own samples, with the reward's gradient stopped (OPD), with the "
        "corrected advantage (OPD+), and with the loss over the whole vocabulary, which weighs no sampled token. "
        f"`opdtheory reproduce{' --quick' if plan.name == 'quick' else ''}` writes this page from the rows in the file "
        "of JSON lines beside it; no number or verdict is typed.",
        f"**It rests on {len(rows)} of the {len(plan.arms())} runs of the {plan.name} plan, with the seeds "
        f"{', '.join(map(str, seeds))} on {' and '.join(plan.tasks)}.** A run is {plan.steps} steps of 128 rollouts, "
        f"the test {plan.eval_examples} problems that no training saw. The runs took {processor:.0f} minutes of "
        f"processor time, {_wall(outcome)}on {'; '.join(machines)}.",
    ]
    if len(seeds) < 3:
        lines.append(
            f"With {len(seeds)} seed{'s' if len(seeds) > 1 else ''} the verdicts below are of "
            f"{'these students' if len(seeds) > 1 else 'this student'}; the full plan has {FULL.seeds}."
        )
    return "\n\n".join(lines)


def _wall(outcome: Outcome) -> str:
    mine = [each for each in outcome.sessions if each["plan"] == outcome.plan.name]
    if not mine:
        return ""
    minutes = sum(each["seconds"] for each in mine) / 60
    models = sum(each["models"] for each in mine)
    trained = f", {models} teachers and students included," if models else ""
    return f"{minutes:.1f} minutes by the clock{trained} with {mine[-1]['workers']} processes at a time, "


def _machine(found: dict[str, Any]) -> str:
    gpu = f", {found['gpu']}" if "gpu" in found else ""
    return f"{found['processor']}, {found['cores']} cores{gpu}, torch {found['torch']}"


def _claims(table: Sequence[Summary]) -> str:
    found = claims(table)
    floor = noise_floor(table)
    head = ["## What reproduces", _table(("claim", "task", "here", "sampled accuracy"), found)]
    if floor is None:
        head.append("No two runs of one expected gradient were made, so that no two arms are compared.")
    else:
        text = floor_text(floor)
        head.append(f"{text[0].upper()}{text[1:]}. Two arms closer than that are called level.")
    return "\n\n".join(head)


def _figures(figures: Sequence[tuple[str, str]]) -> str:
    return "\n\n".join(f"![{caption}]({file})\n\n*{caption}*" for file, caption in figures)


_GRID = (
    *("arm", "seeds", "greedy", "sampled", "KL(p‖q)", "KL(q‖p)"),
    *("entropy", "gradient norm", "clipped", "length", "verdict"),
)


def _grid(table: Sequence[Summary]) -> str:
    lines = [
        "## Every arm",
        "Accuracy at the end on the test problems, answered greedily and by sampling, with 95 % Wilson intervals over "
        "seeds and problems (with one seed over problems only); KLs to the teacher and entropy on the student's own "
        "test prefixes, in nats a token; gradient norm before its clip and share of clipped tokens, means over the "
        "run; length of the responses at the end.",
    ]
    for task in dict.fromkeys(each.task for each in table):
        mine = [each for each in table if each.task == task]
        lines.append(f"### {task}\n\n{_starts(mine)}")
        for group, title in (("grid", "The grid"), ("control", "Controls"), ("twin", "Other rollouts")):
            rows = [_grid_row(each) for each in mine if each.group == group]
            if rows:
                lines.append(f"**{title}**\n\n{_table(_GRID, rows)}")
    return "\n\n".join(lines)


def _starts(mine: Sequence[Summary]) -> str:
    whole = max(mine, key=lambda each: len(each.seeds))
    if whole.start is None:
        return "No run is finished."
    greedy = ", ".join(f"{row['start']['greedy_accuracy']:.3f}" for row in whole.rows)
    sampled = ", ".join(f"{row['start']['test_sampled_accuracy']:.3f}" for row in whole.rows)
    return (
        f"The students start at a sampled accuracy of {sampled} (greedy {greedy}), a KL(p‖q) of "
        f"{_number(whole.means['start_reverse_kl'])}, a KL(q‖p) of {_number(whole.means['start_forward_kl'])} and an "
        f"entropy of {_number(whole.means['start_entropy'])} nats a token."
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


def _theory(table: Sequence[Summary], readings: dict[str, Reading]) -> str:
    tasks = list(dict.fromkeys(each.task for each in table))
    rows = []
    for name in dict.fromkeys(each.name for each in table if each.group != "twin"):
        mine = [each for task in tasks for each in table if (each.task, each.name) == (task, name)]
        cells = [" / ".join(cell(each) for each in mine) for cell in (_bias, _followed, lambda each: each.word)]
        rows.append((f"`{name}`", str(readings[name]), *cells))
    return "\n\n".join(
        [
            "## What theory says of each",
            "The weight is read on the range of log-ratios that the clip leaves. The bias is that of the estimator's "
            "expected gradient in the student's parameters, its clip included, relative to the exact gradient of the "
            "divergence it is named after, summed over the whole vocabulary at the prefixes of 32 rollouts of the "
            "start; with its cosine. The objective followed is $D_V$ of [T4](theory/t4.md), whose exact gradient the "
            "arm's expected gradient is, on the student's own prefixes, from the start to the end: where the weight "
            f"falls it is no divergence, can be negative, and its fall is no progress. Cells hold {' / '.join(tasks)}.",
            _table(("arm", "its weight, read by theory", "bias (cosine)", "objective followed", "verdict"), rows),
        ]
    )


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


def _baselines(table: Sequence[Summary]) -> str:
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
    floor = noise_floor(table)
    limit = "" if floor is None else f" The noise floor of the last column is {floor.over(_seeds(table)):.3f}."
    return "\n\n".join(
        [
            "## The reverse KL: OPD, OPD+ and baselines",
            "For the reverse KL the advantages of OPD and OPD+ differ by the constant 1, a baseline, so that their "
            "expected gradients are the same and only the variance differs ([T7](theory/t7.md)). The optimal constant "
            "is that of the start; the vocabulary baseline is the mean of the advantage at each prefix. The variance "
            "is that of one rollout's gradient at the start, over the squared length of the exact gradient, summed "
            f"over the vocabulary.{limit}",
            _table(("arm", "task", "constant", "variance", "sampled", "against OPD"), rows),
        ]
    )


def _seeds(table: Sequence[Summary]) -> int:
    return max((len(each.seeds) for each in table), default=1) or 1


def _limits(outcome: Outcome, table: Sequence[Summary]) -> str:
    plan = outcome.plan
    lines = []
    for claim, task, verdict, numbers in claims(table):
        if verdict != "reproduces":
            lines.append(f"- {claim}, on {task}: {numbers}.")
    for each in table:
        lines += [f"- `{each.name}` on {each.task} failed, {text}." for text in each.failed]
    if plan.name == "quick":
        left = [name for name in FULL.divergences if name not in plan.divergences]
        controls = [name for name in FULL.controls if name not in plan.controls]
        lines.append(
            f"- The quick plan leaves out: {', '.join(left)}; the controls {', '.join(controls)}; all but {plan.seeds} "
            f"of {FULL.seeds} seeds; it takes {plan.steps} of {FULL.steps} steps, and {plan.eval_examples} of "
            f"{FULL.eval_examples} test problems."
        )
    missing = len(outcome.missing)
    if missing:
        lines.append(f"- {missing} of {len(plan.arms())} runs of the plan have no row yet:{_missing(outcome)}.")
    if not lines:
        return ""
    return "## What does not reproduce, failed or is missing\n\n" + "\n".join(lines)


def _missing(outcome: Outcome) -> str:
    seeds: dict[str, list[str]] = {}
    for name, reason in outcome.missing.items():
        arm, _, seed = name.rpartition(", ")
        seeds.setdefault(arm if reason == "not run" else f"{arm} ({reason})", []).append(seed.removeprefix("seed "))
    groups: dict[str, list[str]] = {}
    for arm, which in seeds.items():
        groups.setdefault(", ".join(which), []).append(arm)
    return ";".join(
        f" seed{'s' if ',' in which else ''} {which} of {len(arms)} arms"
        + (f" ({'; '.join(arms)})" if len(arms) <= 6 else "")
        for which, arms in groups.items()
    )


def _models(outcome: Outcome) -> str:
    rows = []
    for record in outcome.models:
        recipe = record["recipe"]
        rows.append(
            (
                f"{recipe['role']} {recipe['seed']} of {recipe['task']}",
                f"{record['parameters']:,}",
                f"{recipe['steps']} × {recipe['batch_size']}",
                f"{record['greedy_accuracy']:.3f}",
                f"{record['sampled_accuracy']:.3f}",
                f"{record['processor_seconds']:.0f}",
            )
        )
    plan = outcome.plan
    arm: Arm = plan.arms()[0]
    fields = arm.fields
    settings = (
        f"Fixed on reverse-KL OPD and then the same for all: Adam at {fields['learning_rate']:g} with "
        f"{fields['warmup_steps']} steps of warm-up and linear decay, {fields['prompts_per_step']} rollouts a step, "
        f"the log-ratio of sampled estimators clipped to ±{fields['clip_log_ratio']:g}, gradients to a norm of "
        f"{fields['clip_gradient']:g}, the mean over the tokens of a batch, end of sequence included."
    )
    head = ("model", "parameters", "steps × examples", "greedy", "sampled", "processor seconds")
    table = _table(head, rows) if rows else ""
    return f"## Models and settings\n\n{settings}\n\n{table}"


def _again(plan: Plan) -> str:
    return (
        "## Again\n\n```console\n"
        "$ opdtheory reproduce --quick                        # minutes on two cores, teachers and students included\n"
        "$ opdtheory reproduce --page docs/reproduction.md    # all arms; goes on where it was stopped\n"
        "```"
    )


def _reading(each: Summary) -> Reading:
    if not each.rows:
        return Reading("zero")
    fields = each.rows[0]["identity"]["fields"]
    return reading(Arm(each.name, each.group, each.task, 0, fields).config())


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if 0.01 <= abs(value) < 100 else "0" if value == 0 else f"{value:.2g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])
