"""Cut three of the runs that `make.py` made to a size that ships: `python examples/runs/small.py FOLDER`.

Every other step: forty rollouts of each of the first ten, eight of each later one, log-probabilities to four digits, in
the field names of our own trainer. The sampler's are kept where it is not the student.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.runs.check import steps_of

HERE = Path(__file__).resolve().parent
KEPT = {"healthy": "opd_plus_jsd", "stop_gradient_forward_kl": "opd_forward_kl", "engine_at_0.7": "mismatch"}
EVERY, DIGITS = 2, 4
EARLY, MANY, FEW = 10, 40, 8


def lines(folder: Path, behavior: bool) -> list[str]:
    """A line for each rollout."""
    names = ("student_logprobs", "teacher_logprobs", *(("behavior_logprobs",) if behavior else ()))
    found = []
    for row in steps_of(folder):
        step = int(row["step"])
        if step % EVERY == 1:
            for number in range(MANY if step <= EARLY else FEW):
                length = int(row["mask"][number].sum())
                kept = {name: _rounded(row[name][number, :length]) for name in names}
                found.append(json.dumps({"step": step, **kept}))
    return found


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values.double().tolist()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the three files beside this one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what make.py filled")
    options = parser.parse_args(arguments)
    for name, run in KEPT.items():
        text = "\n".join(lines(options.folder / run, behavior=run == "mismatch")) + "\n"
        path = HERE / f"{name}.jsonl.gz"
        # Without a time, the same run gives the same bytes.
        path.write_bytes(gzip.compress(text.encode(), mtime=0))
        print(f"{path.name}: {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
