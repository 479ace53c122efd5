"""Whether two processes of verl's FSDP2 engine leave the gradient that one leaves, outcome by outcome.

    build/verl/bin/python examples/trainers/verl_two_processes.py

starts itself under torchrun with one process and with two, on gloo, and compares.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

NAME = "opd_plus_jsd"
MODES = ("seq-mean-token-sum", "token-mean")


def play(out: Path) -> None:
    """Every outcome's gradient, by reduction, and the rows of the table that each process holds.

    Each of two processes gets half of the rollouts of a step.
    """
    import verl_platform  # noqa: F401  (before the rest of verl)
    from transformers.utils import logging as transformers_logging
    from verl_update import SHIPPED, Setting, Update

    from opdtheory.end_to_end import trainer_pair
    from opdtheory.end_to_end.played import play_update
    from opdtheory.integrations import verl

    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    distillation = {**SHIPPED, "loss_mode": verl.register("jsd"), "use_policy_gradient": True}
    found = {}
    for mode in MODES:
        # Of one prompt, so that both processes add to the same rows.
        pair, update = trainer_pair(("ba",)), Update(Setting({"loss_agg_mode": mode}, distillation))
        found[mode] = torch.stack([leaf.gradient for leaf in play_update(update, pair).leaves])
    held: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(held, len(update.engine(pair).module.model.table.to_local()))
    if torch.distributed.get_rank() == 0:
        torch.save({**found, "held": held}, out)
    torch.distributed.destroy_process_group()


def difference(one: torch.Tensor, two: torch.Tensor) -> float:
    """The largest relative distance over outcomes."""
    return float(((one - two).flatten(1).norm(dim=1) / one.flatten(1).norm(dim=1)).max())


def main() -> None:
    """Start one process and two, and compare; exit with 1 if they differ by more than the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where a process writes its gradients; given by the script itself")
    parser.add_argument("--tolerance", type=float, default=1e-6)
    options = parser.parse_args()
    if options.out:
        play(options.out)
        return
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 2):
            out = Path(folder) / f"{count}.pt"
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run([sys.executable, *launcher, __file__, "--out", str(out)], check=True, env=environment)
            found.append(torch.load(out))
    one, two = found
    print(f"rows of the table that each process holds: {one['held']} and {two['held']}")
    if len(two["held"]) != 2 or sum(two["held"]) != sum(one["held"]) or 0 in two["held"]:
        sys.exit("the table is not sharded over two processes")
    errors = {mode: difference(one[mode], two[mode]) for mode in MODES}
    for mode, error in errors.items():
        print(f"{NAME}, {mode}: {len(one[mode])} outcomes, two processes against one: {error:.1e}")
    wrong = difference(one[MODES[0]], two[MODES[1]])
    print(f"for comparison, two processes under the other reduction: {wrong:.1e}")
    sys.exit(int(max(errors.values()) > options.tolerance or wrong <= options.tolerance))


if __name__ == "__main__":
    main()
