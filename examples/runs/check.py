"""Hold the diagnosis to runs whose outcome is known, in the formats of seven trainers.

`python examples/runs/check.py FOLDER ...` reads what `make.py` made: each run in each format. A verdict is right if a
run that collapsed is foreseen to, within the first tenth of its steps, if one that did not is not, and if the two that
are wrong in another way are told so. `--write` puts the table into docs/runs.md and the figures into record.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.runs import formats
from opdtheory.monitoring import CollapseWarning, Diagnosis, Monitor, SampledTokens, diagnose_file
from opdtheory.rendering.markdown import markdown_table
from opdtheory.training.config import TrainConfig

HERE = Path(__file__).resolve().parent
RECORD = HERE / "record.json"
PAGE = HERE.parents[1] / "docs" / "runs.md"
MARKERS = ("<!-- runs -->", "<!-- /runs -->")

# One format of each trainer, as `formats.WRITERS` names it.
FORMATS = ("TRL jsonl", "verl pt", "slime pt", "prime-rl", "NeMo-RL", "ms-swift", "OpenRLHF")
# The names of the fields that prime-rl and NeMo-RL have none of their own for.
MAPPED = {"prime-rl": {"teacher": "teacher_logprobs"}, "NeMo-RL": {"teacher": "teacher_logprobs"}}

# The verdict that a run must have, where it is not that of its outcome.
OTHERWISE = {"mismatch": "other_samples", "over_clipped": "clipped"}
FORESEEN = ("collapse", "noise", "no_signal")


def steps_of(folder: Path) -> Iterator[dict[str, Tensor]]:
    """The recorded steps of a run, in order."""
    for path in sorted((folder / "rollouts").glob("step_*.pt")):
        yield torch.load(path, weights_only=True)


def is_right(name: str, word: str, found: dict[str, Any], steps: int) -> bool:
    """Whether what was found of a run is what became of it."""
    if word == "collapses":
        first = found["first_warning"]
        return found["verdict"] in FORESEEN and first is not None and first < steps / 10
    return found["verdict"] == OTHERWISE.get(name, "nothing_found") and found["first_warning"] is None


def summary(found: Diagnosis) -> dict[str, Any]:
    """What is recorded of a diagnosis."""
    return {"verdict": found.verdict, "first_warning": found.first_warning, "tokens": found.tokens}


def read(folder: Path) -> dict[str, Any]:
    """A run's outcome, and what each format of it says."""
    outcome = json.loads((folder / "outcome.json").read_text(encoding="utf-8"))
    config = TrainConfig.from_toml(folder / "config.toml")
    loss = config.loss()
    records = list(steps_of(folder))
    roles = {"student": "student_logprobs", "teacher": "teacher_logprobs", "mask": "mask", "entropy": "entropy"}
    # Only a sampler of its own is logged as such: on-policy, trainers have nothing else to log.
    if config.sampling_temperature is not None:
        roles["behavior"] = "behavior_logprobs"
    said: dict[str, Any] = {}
    for name in FORMATS:
        with tempfile.TemporaryDirectory() as made:
            steps = [{role: row[field] for role, field in roles.items()} for row in records]
            written = formats.WRITERS[name][1](Path(made), steps)
            said[name] = summary(diagnose_file(written, loss, **MAPPED.get(name, {})))
    if "student_logits" in records[0]:
        said["arrays with logits"] = summary(with_logits(records, loss))
    return {
        "name": outcome["name"],
        "seed": config.seed,
        "pair_seed": config.pair_seed,
        "loss": loss.label,
        "word": outcome["word"],
        "start": outcome["start"],
        "end": outcome["end"],
        "steps": len(records),
        "said": said,
        "right": all(is_right(outcome["name"], outcome["word"], each, len(records)) for each in said.values()),
    }


def with_logits(records: Sequence[dict[str, Tensor]], loss: Any) -> Diagnosis:
    """The diagnosis of arrays with both whole distributions."""
    monitor = Monitor(loss)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CollapseWarning)
        for step, row in enumerate(records):
            given = {name: row[name] for name in ("entropy", "student_logits", "teacher_logits")}
            behavior = row["behavior_logprobs"]
            same = torch.equal(behavior, row["student_logprobs"])
            monitor.add_tokens(
                SampledTokens.of(
                    row["student_logprobs"], row["teacher_logprobs"], None if same else behavior, row["mask"], **given
                )
            )
            monitor.step(step)
    return monitor.diagnosis("arrays")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The runs as a table of the page."""
    head = (
        "run",
        "student, seed",
        "what became of it",
        "sampled accuracy",
        "KL(p\\|q)",
        "verdict",
        "foreseen at",
        "right",
    )
    return markdown_table(head, [_cells(row) for row in rows])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    verdicts = {each["verdict"] for each in row["said"].values()}
    firsts = {each["first_warning"] for each in row["said"].values()}

    def ends(name: str) -> str:
        return " to ".join("∞" if row[when][name] is None else f"{row[when][name]:.3f}" for when in ("start", "end"))

    foreseen = ", ".join("–" if first is None else f"step {first}" for first in sorted(firsts, key=str))
    return (
        f"`{row['loss']}`" + (", sampled at 0.7" if row["name"] == "mismatch" else ""),
        f"{row['pair_seed']}, {row['seed']}",
        row["word"],
        ends("test_sampled_accuracy"),
        ends("test_reverse_kl"),
        ", ".join(sorted(verdicts)).replace("_", " "),
        foreseen,
        "yes" if row["right"] else "no",
    )


def page_with(text: str, shown: str) -> str:
    """A page with the table between its markers."""
    before, _, rest = text.partition(MARKERS[0])
    return f"{before}{MARKERS[0]}\n{shown}\n{MARKERS[1]}{rest.partition(MARKERS[1])[2]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the runs that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a folder that make.py filled")
    parser.add_argument("--write", action="store_true", help="write record.json and the table of docs/runs.md")
    options = parser.parse_args(arguments)
    rows = []
    for folder in sorted(path.parent for given in options.folders for path in given.glob("*/outcome.json")):
        row = read(folder)
        rows.append(row)
        print(" | ".join(_cells(row)), flush=True)
    rows.sort(key=lambda row: (row["pair_seed"], row["seed"]))
    wrong = [row["loss"] for row in rows if not row["right"]]
    print(f"{len(rows) - len(wrong)} of {len(rows)} runs are read right, in {len(FORMATS)} formats each")
    if options.write:
        RECORD.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), table(rows)), encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
