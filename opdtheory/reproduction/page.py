"""The page of the experiment, `docs/reproduction.md`: every number and every verdict comes from the rows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opdtheory.rendering.markdown import markdown_table
from opdtheory.reproduction.figures import write_figures
from opdtheory.reproduction.plan import FULL, STARTS, TUNING_SEED, Plan
from opdtheory.reproduction.runner import Outcome
from opdtheory.reproduction.sections import arms, predictions, reports, starts, theory, tuning, variance
from opdtheory.reproduction.summary import Summary, summaries, tuned

__all__ = ["page_of", "read_outcome", "write_page"]


def write_page(outcome: Outcome, path: Path) -> Path:
    """Write the page, its figures into the folder `figures` next to it, and the rows as JSON lines of the same name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figures = write_figures(summaries(outcome.rows), path.parent / "figures")
    beside = path.with_name("reproduction_smollm2.jsonl")
    outcome.others = {"smollm2": beside.exists()}
    links = [(file.relative_to(path.parent).as_posix(), caption) for file, caption in figures]
    head = {
        "plan": dataclasses.asdict(outcome.plan),
        "missing": outcome.missing,
        "models": outcome.models,
        "sessions": outcome.sessions,
        "others": outcome.others,
        "figures": links,
    }
    lines = [json.dumps(each, allow_nan=False) for each in (head, *outcome.rows)]
    path.with_suffix(".jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    path.write_text(page_of(outcome, links), encoding="utf-8")
    return path


def read_outcome(path: Path) -> tuple[Outcome, list[tuple[str, str]]]:
    """What `write_page` stored in the JSON lines: the outcome, and the figures with their captions."""
    head, *rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    values: dict[str, Any] = {n: tuple(each) if isinstance(each, list) else each for n, each in head["plan"].items()}
    outcome = Outcome(Plan(**values), rows, head["missing"], head["models"], head["sessions"], head["others"])
    return outcome, [(file, caption) for file, caption in head["figures"]]


def page_of(outcome: Outcome, figures: Sequence[tuple[str, str]]) -> str:
    """The page as Markdown."""
    table = summaries(outcome.rows)
    parts = [
        _opening(outcome),
        reports(table),
        predictions(table),
        _figures(figures),
        variance(table),
        tuning(table, tuned(outcome.rows, outcome.plan)),
        arms(table),
        theory(table),
        _limits(outcome, table),
        _models(outcome),
        _AGAIN,
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _opening(outcome: Outcome) -> str:
    plan, rows = outcome.plan, outcome.rows
    seeds = sorted({row["seed"] for row in rows if row["seed"] != TUNING_SEED})
    machines = dict.fromkeys(_machine(row["machine"]) for row in rows)
    processor = sum(row["processor_seconds"] for row in rows) / 60
    lines = [
        "# Reproduction",
        "Small language models are distilled on their own samples: with the reward's gradient stopped (OPD), with the "
        "corrected advantage (OPD+), with a baseline of least variance, exactly on the teacher's likeliest tokens with "
        "a sampled tail (T13), and with the loss over the whole vocabulary, which weighs no sampled token. "
        f"`opdtheory reproduce{_option(plan)}` writes this page from the rows in the file "
        "of JSON lines next to it; no number or verdict is typed by hand.",
        f"**It rests on {len(rows)} of the {len(rows) + len(outcome.missing)} runs of the {plan.name} plan, with "
        f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}, on {' and '.join(plan.tasks)}.** "
        f"A run has {plan.steps} steps of {plan.arms()[0].fields['prompts_per_step']} rollouts; the test has "
        f"{plan.eval_examples} problems that are never trained on. The runs took {processor:.0f} minutes of processor "
        f"time{_wall(outcome)}, on {'; '.join(machines)}.",
    ]
    lines.append(f"{_students(plan)} {starts(summaries(rows))}")
    if len(seeds) < 3:
        lines.append(
            f"With {len(seeds)} seed{'s' if len(seeds) > 1 else ''} the verdicts below are about "
            f"{'these students' if len(seeds) > 1 else 'this student'} only; the full plan has {FULL.seeds} seeds."
        )
    return "\n\n".join(lines)


def _option(plan: Plan) -> str:
    return "" if plan.name == "full" else f" --plan {plan.name}"


def _students(plan: Plan) -> str:
    if plan.base is not None:
        return (
            "Teacher and student are SmolLM2-135M-Instruct trained further on demonstrations in its own tokens, the "
            "student for fewer steps and without some of its layers."
        )
    shares = " or ".join(f"{100 * STARTS[task]:.0f} % ({task})" for task in plan.tasks if task in STARTS)
    return (
        f"The students of all seeds are trained on demonstrations until they answer {shares} of held-out problems by "
        "sampling."
    )


def _wall(outcome: Outcome) -> str:
    mine = [each for each in outcome.sessions if each["plan"] == outcome.plan.name]
    if not mine:
        return ""
    minutes = sum(each["seconds"] for each in mine) / 60
    models = sum(each["models"] for each in mine)
    trained = f" (including {models} training{'s' * (models > 1)} of the models below)" if models else ""
    workers, arms = mine[-1]["workers"], sum(each["arms"] for each in mine)
    some = f" for {arms} of them" if arms < len(outcome.rows) else ""
    at_once = f"{workers} process{'es' * (workers > 1)} at a time"
    return f" and {minutes:.1f} minutes of wall-clock time{some}{trained}, {at_once}"


def _machine(found: dict[str, Any]) -> str:
    gpu = f", {found['gpu']}" if "gpu" in found else ""
    return f"{found['processor']}, {found['cores']} cores{gpu}, torch {found['torch']}"


def _figures(figures: Sequence[tuple[str, str]]) -> str:
    return "\n\n".join(f"![{caption}]({file})\n\n*{caption}*" for file, caption in figures)


def _limits(outcome: Outcome, table: Sequence[Summary]) -> str:
    plan = outcome.plan
    lines = [f"- `{each.name}` on {each.task} failed, {text}." for each in table for text in each.failed]
    if plan.name == "quick":
        left = [name for name in FULL.divergences if name not in plan.divergences]
        forms = [name for name in FULL.forms if name not in plan.forms]
        controls = [name for name in FULL.controls if name not in plan.controls]
        lines.append(
            f"- The quick plan leaves out {', '.join(left)}; {', '.join(forms)}; the controls {', '.join(controls)}; "
            f"tuning; and all but {plan.seeds} of {FULL.seeds} seeds. It has {plan.steps} of {FULL.steps} steps and "
            f"{plan.eval_examples} of {FULL.eval_examples} test problems."
        )
    if plan.name == "full" and not outcome.others.get("smollm2"):
        lines.append(
            "- The plan of a real language model, `opdtheory reproduce --plan smollm2 --page "
            "docs/reproduction_smollm2.md`, was not run: it needs a GPU. Nothing here says how its arms would end."
        )
    missing = len(outcome.missing)
    if missing:
        total = missing + len(outcome.rows)
        lines.append(f"- {missing} of {total} runs of the plan have no row yet:{_missing(outcome)}.")
    if not lines:
        return ""
    return "## What failed or is missing\n\n" + "\n".join(lines)


def _missing(outcome: Outcome) -> str:
    reasons: dict[str, list[str]] = {}
    for label, reason in outcome.missing.items():
        reasons.setdefault(reason, []).append(label)
    return ";".join(
        f" {len(labels)} {reason}" + (f" ({'; '.join(labels)})" if len(labels) <= 6 else "")
        for reason, labels in reasons.items()
    )


def _models(outcome: Outcome) -> str:
    rows = []
    for record in outcome.models:
        recipe = record["recipe"]
        rows.append(
            (
                f"{recipe['role']} {recipe['seed']} of {recipe['task']}",
                f"{record['parameters']:,}",
                f"{record.get('steps', recipe['steps'])} × {recipe['batch_size']}",
                f"{record['greedy_accuracy']:.3f}",
                f"{record['sampled_accuracy']:.3f}",
                f"{record['processor_seconds']:.0f}",
            )
        )
    fields = outcome.plan.arms()[0].fields
    settings = (
        f"Chosen for reverse-KL OPD and then the same for all arms: Adam with a learning rate of "
        f"{fields['learning_rate']:g}, {fields['warmup_steps']} steps of warm-up and linear decay; "
        f"{fields['prompts_per_step']} rollouts per step; the log-ratio of sampled estimators clipped to "
        f"±{fields['clip_log_ratio']:g}; gradients clipped to a norm of {fields['clip_gradient']:g}; the mean over the "
        "tokens of a batch, end of sequence included."
    )
    head = ("model", "parameters", "steps × examples", "greedy", "sampled", "processor seconds")
    table = markdown_table(head, rows) if rows else ""
    return f"## Models and settings\n\n{settings}\n\n{table}"


_AGAIN = (
    "## Run it again\n\n```console\n"
    "$ opdtheory reproduce --quick                        # minutes on two cores, teachers and students included\n"
    "$ opdtheory reproduce --page docs/reproduction.md    # all arms; resumes a stopped run\n"
    "```"
)
