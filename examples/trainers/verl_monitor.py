"""Whether the monitor reads verl's own batches right and leaves its gradients alone.

    build/verl/bin/python examples/trainers/verl_monitor.py

plays a step of verl's FSDP2 engine with and without the monitor around each loss, and reads a padded `DataProto` and
the nested batch of the engine; the models are tables, so every log-probability is known. `--out FOLDER` writes the two
batches as plain tensors.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
import verl_platform  # noqa: F401  (before the rest of verl)
from torch import Tensor
from transformers.utils import logging as transformers_logging
from verl import DataProto
from verl.utils.metric import reduce_metrics
from verl_update import SHIPPED, Setting, Update

from opdtheory.end_to_end import trainer_pair
from opdtheory.integrations import verl as opd_plus
from opdtheory.integrations.verl_monitor import tokens_of, watch
from opdtheory.monitoring.tokens import SampledTokens

# Log-probabilities in single precision.
TOLERANCE = 1e-5

ANSWERS = (("a", "ab"), ("ba", "b"), ("a", ""), ("ba", "a"))


def played(mode: str, policy_gradient: bool) -> tuple[Update, Any, list[list[int]], list[list[int]]]:
    """A step of four rollouts in two micro-batches, and what was sampled."""
    pair = trainer_pair(("a", "ba"), 2, batch_size=2, accumulate=2)
    end = [pair.tokenizer.eos_token_id]
    prompts, answers = (
        [pair.tokenizer.encode(row[which], add_special_tokens=False) for row in ANSWERS] for which in (0, 1)
    )
    answers = [answer + end if len(answer) < pair.horizon else answer for answer in answers]
    distillation = {**SHIPPED, "loss_mode": mode, "use_policy_gradient": policy_gradient}
    update = Update(Setting({"loss_agg_mode": "seq-mean-token-sum"}, distillation))
    update(pair, prompts, answers)
    return update, pair, prompts, answers


def known(model: Any, prompts: list[list[int]], answers: list[list[int]]) -> Tensor:
    """The log-probabilities of all tokens of the answers, one rollout after the other, in float64."""
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            logs = model(ids).logits.double().log_softmax(-1)[0, :-1]
        found.append(logs.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :, 0])
    return torch.cat(found)


def padded(update: Update, prompts: list[list[int]], answers: list[list[int]]) -> DataProto:
    """The step as verl's agent loop and driver hold it: prompts padded on the left, answers on the right."""
    width = max(map(len, prompts)), max(map(len, answers))
    fields: dict[str, Tensor] = {}
    teacher = torch.zeros(len(prompts), sum(width), 1)
    early = update.batch["teacher_logprobs"].unbind()
    for row, (prompt, values) in enumerate(zip(prompts, early, strict=True)):
        start = width[0] - len(prompt)
        teacher[row, start : start + len(values)] = values
    for name in ("old_log_probs", "ref_log_prob", "response_mask", "responses"):
        fields[name] = update.batch[name].to_padded_tensor(0, (len(prompts), width[1]))
    fields["prompts"] = torch.tensor([[0] * (width[0] - len(prompt)) + prompt for prompt in prompts])
    fields["rollout_log_probs"] = fields["old_log_probs"].clone()
    return DataProto.from_dict({**fields, "teacher_logprobs": teacher})


def read(batch: Any) -> SampledTokens:
    """The usable tokens that the monitor is given of a batch."""
    found = tokens_of(batch)
    return SampledTokens.of(found.student, found.teacher, found.behavior, found.mask)


def apart(found: Tensor, wanted: Tensor) -> float:
    """The largest distance; infinite if one has more tokens."""
    return float((found - wanted).abs().max()) if found.shape == wanted.shape else float("inf")


def main() -> int:
    """Compare; exit with 1 if anything is off."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the two batches")
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    failed = False
    plain = {}
    modes = ("k1", "k2", "k3", opd_plus.register("jsd"))
    for watched in (False, True):
        for mode in modes:
            if watched:
                watch(mode)
            for policy_gradient in (True, False):
                if mode == "k1" and not policy_gradient:
                    continue  # verl refuses it: the gradient does not depend on the teacher
                update, pair, prompts, answers = played(mode, policy_gradient)
                gradient = pair.student.model.table.grad
                if not watched:
                    plain[mode, policy_gradient] = gradient
                    continue
                same = torch.equal(gradient, plain[mode, policy_gradient])
                found = {name: float(value) for name, value in reduce_metrics(update.metrics).items() if "opd/" in name}
                failed |= not same or not found
                print(f"{mode}, policy gradient {policy_gradient}: same bits {same}, {found}")
    ours, theirs = known(pair.student, prompts, answers), known(pair.teacher, prompts, answers)
    proto = padded(update, prompts, answers)
    without = DataProto.from_dict(
        {name: proto.batch[name] for name in proto.batch.keys() if name != "teacher_logprobs"}
    )
    for name, batch in (
        ("DataProto with teacher_logprobs", proto),
        ("DataProto with ref_log_prob", without),
        ("nested batch of the engine", update.batch),
    ):
        tokens = read(batch)
        error = max(apart(tokens.student, ours), apart(tokens.teacher, theirs))
        failed |= not error < TOLERANCE
        data = getattr(batch, "batch", batch)
        fields = {key: (tuple(data[key].shape), str(data[key].dtype)) for key in sorted(data.keys())}
        print(f"{name}: {len(tokens)} tokens, error {error:.1e}\n  {fields}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        torch.save({name: proto.batch[name].clone() for name in proto.batch.keys()}, options.out / "verl_batch.pt")
    torch.distributed.destroy_process_group()
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
