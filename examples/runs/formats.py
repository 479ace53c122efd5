"""Runs written as each trainer writes them: its names, its nesting, padded or ragged."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

Step = dict[str, Tensor]
ROLES = ("student", "teacher", "behavior", "entropy")


def run(steps: int = 3, rollouts: int = 4, longest: int = 12, seed: int = 0) -> list[Step]:
    """Steps of `(B, T)` float32 tensors; the mask ends each rollout and leaves out a token within."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(steps):
        shape = (rollouts, longest)
        step = {role: -3 * torch.rand(shape, generator=generator) for role in ROLES}
        step["entropy"] = -step["entropy"]
        lengths = torch.randint(4, longest + 1, (rollouts, 1), generator=generator)
        step["mask"] = torch.arange(longest) < lengths
        step["mask"][:, 2] = False
        found.append(step)
    return found


def ragged(step: Step) -> list[dict[str, list]]:
    """The rollouts, each up to its last unmasked token."""
    ends = [int(row.nonzero().max()) + 1 for row in step["mask"]]
    return [{role: value[row, :end].tolist() for role, value in step.items()} for row, end in enumerate(ends)]


def renamed(record: dict, names: dict[str, str]) -> dict:
    return {name: record[role] for role, name in names.items() if role in record}


TRL = {"student": "old_per_token_logps", "teacher": "ref_per_token_logps", "behavior": "sampling_per_token_logps"}
TRL |= {"mask": "completion_mask"}
VERL = {"student": "old_log_probs", "teacher": "ref_log_prob", "behavior": "rollout_log_probs"}
VERL |= {"mask": "response_mask", "entropy": "entropys"}
SLIME = {"student": "log_probs", "teacher": "teacher_log_probs", "behavior": "rollout_log_probs"}
SLIME |= {"mask": "loss_masks", "entropy": "entropy"}
PRIME = {"student": "trainer_logprobs", "behavior": "inference_logprobs", "mask": "loss_mask", "entropy": "entropy"}
NEMO = {"student": "prev_logprobs", "behavior": "generation_logprobs", "mask": "token_loss_mask"}
SWIFT = {"student": "old_per_token_logps", "teacher": "teacher_per_token_logps", "behavior": "rollout_per_token_logps"}
SWIFT |= {"mask": "completion_mask"}
OPENRLHF = {"student": "action_log_probs", "teacher": "base_action_log_probs", "behavior": "rollout_log_probs"}
OPENRLHF |= {"mask": "action_mask"}
OWN = {"student": "student_logprobs", "teacher": "teacher_logprobs", "behavior": "behavior_logprobs", "mask": "mask"}
OWN |= {"entropy": "entropy"}


def write_lines(path: Path, records: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return path


def own_jsonl(folder: Path, steps: list[Step]) -> Path:
    records = [{"step": n, **renamed(row, OWN)} for n, step in enumerate(steps) for row in ragged(step)]
    return write_lines(folder / "run.jsonl", records)


def own_gzip(folder: Path, steps: list[Step]) -> Path:
    records = [{"step": n, **renamed(row, OWN)} for n, step in enumerate(steps) for row in ragged(step)]
    return write_lines(folder / "run.jsonl.gz", records)


def own_json(folder: Path, steps: list[Step]) -> Path:
    path = folder / "run.json"
    path.write_text(
        json.dumps([{"step": n, **renamed(row, OWN)} for n, step in enumerate(steps) for row in ragged(step)])
    )
    return path


def trl_jsonl(folder: Path, steps: list[Step]) -> Path:
    """A line for each batch, padded."""
    lists = [{role: value.tolist() for role, value in step.items()} for step in steps]
    return write_lines(
        folder / "grpo.jsonl", [{"global_step": n, **renamed(step, TRL)} for n, step in enumerate(lists)]
    )


def trl_pt(folder: Path, steps: list[Step]) -> Path:
    """A file for each batch, as `_generate_and_score_completions` returns it."""
    for n, step in enumerate(steps):
        ids = torch.zeros(step["mask"].shape, dtype=torch.long)
        batch = renamed(step, TRL) | {"completion_ids": ids, "advantages": torch.zeros(len(ids))}
        batch["completion_mask"] = batch["completion_mask"].long()
        torch.save(batch, folder / f"batch_{n}.pt")
    return folder


def verl_pt(folder: Path, steps: list[Step]) -> Path:
    """DataProto's parts: padded tensors, arrays and meta information."""
    import numpy as np

    for n, step in enumerate(steps):
        batch = renamed(step, VERL) | {"log_probs": step["student"] - 1, "token_level_rewards": step["student"] + 9}
        meta = {"global_steps": n, "temperature": 1.0}
        others = {"reward": np.zeros(len(step["mask"]), dtype=np.float32)}
        torch.save({"batch": batch, "non_tensor_batch": others, "meta_info": meta}, folder / f"dump{n}.pt")
    return folder


def slime_pt(folder: Path, steps: list[Step]) -> Path:
    """A ragged list of tensors for each field, under `rollout_data`."""
    for n, step in enumerate(steps):
        rows = ragged(step)
        data = {
            name: [torch.tensor(row[role], dtype=torch.int if role == "mask" else torch.float32) for row in rows]
            for role, name in SLIME.items()
            if role in step
        }
        data["response_lengths"] = [len(row["student"]) for row in rows]
        torch.save({"rollout_id": n, "rank": 0, "rollout_data": data}, folder / f"train_{n}_0.pt")
    return folder


def slime_samples_pt(folder: Path, steps: list[Step]) -> Path:
    """The newer layout: a record for each of `samples`."""
    for n, step in enumerate(steps):
        samples = [
            {
                name: torch.tensor(row[role], dtype=torch.int if role == "mask" else torch.float32)
                for role, name in SLIME.items()
                if role in step
            }
            | {"data_parallel_rank": 0, "rollout_position": place}
            for place, row in enumerate(ragged(step))
        ]
        layout = [{"rank": 0, "data_parallel_rank": 0, "partition": list(range(len(samples)))}]
        dump = {"format_version": 2, "rollout_id": n, "rank": 0, "samples": samples, "dp_shards": layout}
        torch.save(dump, folder / f"{n}.pt")
    return folder


def prime_rl(folder: Path, steps: list[Step], *, teacher: str | None = "teacher_logprobs") -> Path:
    """Token exports, a line for each rollout; the teacher's field is the user's own."""
    names = PRIME | ({} if teacher is None else {"teacher": teacher})
    for n, step in enumerate(steps):
        records = [
            {"schema_version": 1, "step": n, "rank": 0, "env_name": "math", **renamed(row, names), "mismatch_kl": None}
            for row in ragged(step)
        ]
        write_lines(folder / "token_exports" / f"step_{n}" / "rank_0.jsonl", records)
    return folder


def nemo_rl(folder: Path, steps: list[Step], *, teacher: str | None = "teacher_logprobs") -> Path:
    """A batch of one in each line, padded; the mask of rollouts leaves out one that is added here."""
    names = NEMO | ({} if teacher is None else {"teacher": teacher})
    for n, step in enumerate(steps):
        lists = {role: value.tolist() for role, value in step.items()}
        lists["mask"] = step["mask"].float().tolist()
        records = [
            {
                **{name: [lists[role][row]] for role, name in names.items() if role in lists},
                "sample_loss_mask": [1.0],
                "idx": row,
            }
            for row in range(len(step["mask"]))
        ]
        records.append(records[0] | {"sample_loss_mask": [0.0], "idx": len(records)})
        write_lines(folder / f"train_data_step{n}.jsonl", records)
    return folder


def ms_swift(folder: Path, steps: list[Step]) -> Path:
    records = [{"step": n, **renamed(row, SWIFT)} for n, step in enumerate(steps) for row in ragged(step)]
    return write_lines(folder / "completions.jsonl", records)


def openrlhf(folder: Path, steps: list[Step]) -> Path:
    records = [{"step": n, **renamed(row, OPENRLHF)} for n, step in enumerate(steps) for row in ragged(step)]
    return write_lines(folder / "experience.jsonl", records)


def parquet(folder: Path, steps: list[Step], names: dict[str, str] = VERL) -> Path:
    """A row for each rollout; two row groups."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = [{"step": n, **renamed(row, names)} for n, step in enumerate(steps) for row in ragged(step)]
    pq.write_table(pa.Table.from_pylist(records), folder / "run.parquet", row_group_size=max(1, len(records) // 2))
    return folder / "run.parquet"


def parquet_nested(folder: Path, steps: list[Step]) -> Path:
    """A row for each batch, its fields lists of rows within a struct."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = [
        {
            "global_step": n,
            "rollout_data": {name: [row[role] for row in ragged(step)] for role, name in SLIME.items() if role in step},
        }
        for n, step in enumerate(steps)
    ]
    pq.write_table(pa.Table.from_pylist(records), folder / "run.parquet")
    return folder / "run.parquet"


def written(name: str, folder: Path, steps: list[tuple[int, Step]]) -> Path:
    """The steps of a run in a format of `WRITERS`; roles that a step lacks are not written.

    Their numbers are kept where the format has one; else they are the places in the list.
    """
    missing = [role for role in ROLES if role not in steps[0][1]]
    filled = [step | {role: torch.full_like(step["student"], torch.nan) for role in missing} for _, step in steps]
    with _without(missing):
        return WRITERS[name][1](folder, filled)


@contextlib.contextmanager
def _without(roles: list[str]) -> Iterator[None]:
    """Leave some roles out of what is written."""
    tables = (TRL, VERL, SLIME, PRIME, NEMO, SWIFT, OPENRLHF, OWN)
    kept = [dict(table) for table in tables]
    try:
        for table in tables:
            for role in roles:
                table.pop(role, None)
        yield
    finally:
        for table, before in zip(tables, kept, strict=True):
            table.update(before)


# The trainer that must be recognised, and the writer.
WRITERS: dict[str, tuple[str, Callable[[Path, list[Step]], Path]]] = {
    "own jsonl": ("opdtheory", own_jsonl),
    "own jsonl.gz": ("opdtheory", own_gzip),
    "own json": ("opdtheory", own_json),
    "TRL jsonl": ("TRL", trl_jsonl),
    "TRL pt": ("TRL", trl_pt),
    "verl pt": ("verl", verl_pt),
    "slime pt": ("slime", slime_pt),
    "slime samples": ("slime", slime_samples_pt),
    "prime-rl": ("prime-rl", prime_rl),
    "NeMo-RL": ("NeMo-RL", nemo_rl),
    "ms-swift": ("ms-swift", ms_swift),
    "OpenRLHF": ("OpenRLHF", openrlhf),
    "verl parquet": ("verl", parquet),
    "slime parquet": ("slime", parquet_nested),
}
