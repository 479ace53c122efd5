"""The time and memory of diagnosing a run of many tokens: seconds, tokens a second and peak memory, by file format.

`python benchmarks/diagnose.py --tokens 100000000` writes a synthetic run of each format into a temporary folder, reads
diagnoses it in a process of its own, and deletes it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from opdtheory.machine import machine  # noqa: E402

# Tokens of a rollout at most, and tokens of a step.
LONGEST, STEP = 1024, 1_000_000
# Rows of the text that the synthetic lines are made of.
ROWS = 2_000


def steps(tokens: int) -> Iterator[tuple[int, dict[str, list[np.ndarray]]]]:
    """Rollouts of each step: float32 log-probabilities near each other, and a mask."""
    generator = np.random.default_rng(0)
    for step in range(-(-tokens // STEP)):
        left = min(STEP, tokens - step * STEP)
        columns: dict[str, list[np.ndarray]] = {"log_probs": [], "teacher_log_probs": [], "rollout_log_probs": []}
        columns["loss_masks"] = []
        while left:
            length = min(left, int(generator.integers(LONGEST // 4, LONGEST)))
            left -= length
            student = -generator.exponential(0.7, length).astype(np.float32)
            columns["log_probs"].append(student)
            for name, spread in (("teacher_log_probs", 0.5), ("rollout_log_probs", 0.02)):
                noise = generator.normal(0, spread, length).astype(np.float32)
                columns[name].append(np.minimum(student + noise, 0))
            columns["loss_masks"].append(np.ones(length, dtype=np.int32))
        yield step, columns


def write_jsonl(folder: Path, tokens: int) -> None:
    """Lines of verl's names, with six digits; the same rollouts again in each step, as writing text is slow."""
    names = {"log_probs": "old_log_probs", "teacher_log_probs": "teacher_logprobs"}
    names |= {"rollout_log_probs": "rollout_log_probs", "loss_masks": "response_mask"}
    written, lines, lengths = 0, [], []
    _, columns = next(steps(min(tokens, STEP)))
    for rows in zip(*(columns[name] for name in names), strict=True):
        fields = [f'"{names[n]}":[{",".join(f"{x:.6g}" for x in row)}]' for n, row in zip(names, rows, strict=True)]
        lines.append("," + ",".join(fields) + "}\n")
        lengths.append(len(rows[0]))
    with (folder / "run.jsonl").open("w") as file:
        for step in range(-(-tokens // STEP)):
            for line, length in zip(lines, lengths, strict=True):
                if written + length > tokens:
                    break
                file.write(f'{{"step":{step}{line}')
                written += length


def write_parquet(folder: Path, tokens: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    for step, columns in steps(tokens):
        table = pa.table({"step": pa.array([step] * len(columns["log_probs"]))} | columns)
        writer = writer or pq.ParquetWriter(folder / "run.parquet", table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def write_torch(folder: Path, tokens: int) -> None:
    for step, columns in steps(tokens):
        data = {name: [torch.from_numpy(row) for row in rows] for name, rows in columns.items()}
        torch.save({"rollout_id": step, "rollout_data": data}, folder / f"train_{step}.pt")


FORMATS: dict[str, Callable[[Path, int], None]] = {
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "pt": write_torch,
}


def read(folder: Path) -> None:
    """Diagnose a run and print the figures as JSON; memory is that of this process and its largest child."""
    from opdtheory.monitoring import diagnose_file

    start = time.perf_counter()
    found = diagnose_file(folder, "opd_plus", "jsd")
    assert str(found)
    took = time.perf_counter() - start
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    own, child = (each.ru_maxrss / 1e3 for each in used)
    processor = sum(each.ru_utime + each.ru_stime for each in used)
    print(json.dumps({"tokens": found.tokens, "seconds": took, "processor": processor, "own": own, "child": child}))


def main(arguments: list[str] | None = None) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=float, default=1e7, metavar="N", help="of each run (%(default)g)")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="FORMAT")
    parser.add_argument("--folder", type=Path, help="where to write; the system's temporary folder by default")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch in the reader (%(default)s)")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.read:
        read(options.read)
        return 0
    print(
        f"On {machine()}: {options.tokens:,.0f} tokens, four columns each; {options.threads} thread(s) of the reader.\n"
    )
    head = ("format", "GB", "seconds", "processor seconds", "million tokens a second", "peak MB of the reader")
    print(f"| {' | '.join(head)} | of the largest helper |")
    print("|---" * (len(head) + 1) + "|")
    for name in options.formats:
        with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
            folder = Path(temporary)
            FORMATS[name](folder, int(options.tokens))
            size = sum(path.stat().st_size for path in folder.iterdir()) / 1e9
            command = [sys.executable, str(Path(__file__).resolve()), "--read", str(folder)]
            environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
            child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            found = json.loads(child.stdout)
        took = f"{found['seconds']:.1f} | {found['processor']:.1f} | {found['tokens'] / found['seconds'] / 1e6:.2f}"
        print(f"| {name} | {size:.2f} | {took} | {found['own']:.0f} | {found['child']:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
