"""What the loss descends, by itself (the mark in `losses.py`, which `--opd-audit` finds here) and in the trainer."""

from tinydistil.losses import distillation_loss  # noqa: F401  its mark is collected from here
from tinydistil.trainer import DistillationTrainer

import opdtheory as opd
from opdtheory.testing import assert_unbiased


def test_the_trainer_descends_the_jsd():
    compute_loss = opd.bind(DistillationTrainer.compute_loss)
    # It shifts logits and labels itself.
    assert_unbiased(opd.from_logits(compute_loss, shifted=True), "jsd", reduction="token_mean")
