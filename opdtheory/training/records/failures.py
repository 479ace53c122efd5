"""The record of a failed step: its prompts and tokens, in a file that the error names."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from opdtheory.errors import TrainingError
from opdtheory.training.models.language_model import LanguageModel, response_logits
from opdtheory.training.models.samples import Samples
from opdtheory.training.models.storage import whole_file
from opdtheory.training.tasks import Example

__all__ = ["failure"]


def failure(
    problem: str,
    folder: Path | None,
    step: int,
    rank: int,
    models: tuple[LanguageModel, LanguageModel],
    examples: Sequence[Example],
    samples: Samples,
) -> TrainingError:
    """Save the batch of a failed step as JSON, rows with bad logits first, and return the error to raise.

    Args:
        problem: what is wrong, for the message.
        folder: folder of the run; None creates a temporary one.
        step: the step, counted from 1, as in the metrics.
        rank: rank of the process whose share of the batch this is.
        models: student and teacher, with the parameters before the step.
        examples: the problem of each row.
        samples: the rows.
    """
    folder = Path(tempfile.mkdtemp(prefix="opdtheory-")) if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    finite = {who: _finite_rows(model, samples) for who, model in zip(("student", "teacher"), models, strict=True)}
    vocabulary, lengths = models[0].vocabulary, samples.present.sum(-1).long().tolist()
    rows: list[dict[str, object]] = []
    for row, example in enumerate(examples):
        tokens = samples.tokens[row, : lengths[row]].tolist()
        rows.append(
            {
                "row": row,
                **{f"{who}_logits_finite": flags[row] for who, flags in finite.items()},
                "prompt": example.prompt,
                "response": vocabulary.decode(tokens),
                "prompt_tokens": samples.prompts[row][samples.prompt_mask[row] > 0].tolist(),
                "tokens": tokens,
                "mask": [int(value) for value in samples.mask[row, : lengths[row]].tolist()],
            }
        )
    rows.sort(key=lambda entry: bool(entry["student_logits_finite"] and entry["teacher_logits_finite"]))
    path = folder / f"failure_step_{step:08d}_rank_{rank}.json"
    with whole_file(path) as file:
        file.write(json.dumps({"step": step, "problem": problem, "rows": rows}, indent=1).encode())
    return TrainingError(f"step {step}: {problem}; its prompts and tokens are in {path}", path)


@torch.no_grad()
def _finite_rows(model: LanguageModel, samples: Samples) -> list[bool]:
    finite: Tensor = torch.isfinite(response_logits(model, samples)).all(-1) | (samples.mask == 0)
    flags: list[bool] = finite.all(-1).tolist()
    return flags
