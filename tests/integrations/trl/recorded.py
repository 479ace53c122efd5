"""What a real run of TRL's `GRPOTrainer` holds and what the monitor records of it, as small files for other tests.

`python -m tests.integrations.trl.recorded` writes them to `tests/monitoring/data`: the object that
`_generate_and_score_completions` returns, on-policy and with an engine's log-probabilities, and the record of a run.
`examples/trainers/verl_monitor.py --out tests/monitoring/data` writes verl's batch.
"""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from opdtheory.end_to_end.pair import TrainerPair
from opdtheory.integrations.trl.monitor import OPDMonitor
from tests.integrations.trl.monitored import a_pair, built, trained

FOLDER = Path(__file__).parents[2] / "monitoring" / "data"

# Nats between the engine's log-probabilities and the student's.
NOISE = 0.05


class Engine(GRPOTrainer):
    """Returns log-probabilities of its own with the completions, as vLLM does; one token has none."""

    pair: TrainerPair

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        completions, _ = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        draw = random.Random(0)
        rows: list[list[float | None]] = []
        for prompt, answer in zip(prompt_ids, completions, strict=True):
            ids = torch.tensor([[*prompt, *answer]])
            with torch.no_grad():
                logs = self.model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
            rows.append([float(x) - NOISE * draw.random() for x in logs])
        rows[0][0] = None
        return completions, rows


def output(kind: type = GRPOTrainer, **settings: Any) -> dict[str, Tensor]:
    """What a step of a run generates and scores."""
    pair, kept = a_pair(), []

    class Kept(kind):
        def _generate_and_score_completions(self, inputs):
            kept.append(super()._generate_and_score_completions(inputs))
            return kept[-1]

    trained(built(Kept, pair, max_steps=1, **settings))
    return {name: value.clone() for name, value in kept[0].items()}


def record(path: Path) -> None:
    """The record of three steps."""
    trainer = built(GRPOTrainer, a_pair())
    with OPDMonitor(record=path).attach(trainer):
        trained(trainer)


def main() -> None:
    """Write the files."""
    warnings.simplefilter("ignore")
    FOLDER.mkdir(parents=True, exist_ok=True)
    torch.save(output(), FOLDER / "trl_grpo.pt")
    torch.save(output(Engine, num_iterations=2), FOLDER / "trl_grpo_engine.pt")
    path = FOLDER / "trl_grpo_record.jsonl"
    path.unlink(missing_ok=True)
    record(path)


if __name__ == "__main__":
    main()
