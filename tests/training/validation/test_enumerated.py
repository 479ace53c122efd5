"""On every rollout of a tiny model only the right loss agrees with its claim."""

from __future__ import annotations

import pytest

from opdtheory.errors import InvalidArgumentError
from opdtheory.training.validation import validate_by_enumeration
from tests.training.validation.pairs import LETTERS, STUDENT, TEACHER, E, transformer

ENUMERATED = {
    "right": (E("return_to_go", "jsd", gamma=0.7), E("return_to_go", "jsd", gamma=0.7), False),
    "sign": (E("sequence_opd_plus", "jsd"), lambda r: -E("sequence_opd_plus", "jsd")(r), False),
    "outer discount": (
        E("return_to_go", "jsd", gamma=0.7, discounted=True),
        E("return_to_go", "jsd", gamma=0.7),
        False,
    ),
    "later tokens": (E("return_to_go", "jsd", gamma=1.0), E("opd_plus", "jsd"), False),
    "clip": (E("sequence_opd_plus", "jsd", clip_log_ratio=0.3), E("sequence_opd_plus", "jsd"), False),
    "prefix": (E("opd_plus", "jsd", importance="prefix"), E("opd_plus", "jsd", importance="token"), True),
    "ratio": (E("sequence_opd_plus", "jsd", importance="sequence"), E("sequence_opd_plus", "jsd"), True),
    "length": (E("opd_plus", "jsd", reduction="sequence_mean"), E("opd_plus", "jsd"), False),
}


@pytest.mark.parametrize("name", ENUMERATED)
def test_only_the_right_loss_agrees_on_every_rollout(name: str) -> None:
    claim, loss, off = ENUMERATED[name]
    student, teacher, stale = (transformer(seed, LETTERS) for seed in range(3))
    settings = {"prompt": [1], "horizon": 3, "eos": 0, "behavior": stale if off else None}
    assert validate_by_enumeration(student, teacher, claim, **settings).discrepancy < 1e-10
    assert validate_by_enumeration(student, teacher, claim, loss=loss, **settings).agrees is (name == "right")


def test_clipped_differentiated_losses_keep_their_constants() -> None:
    student, teacher = (transformer(seed, LETTERS) for seed in range(2))
    for name in ("k1_loss", "k2_loss", "k3_loss"):
        found = validate_by_enumeration(student, teacher, E(name, clip_log_ratio=0.3), prompt=[1], horizon=2)
        assert found.agrees, str(found)
    assert validate_by_enumeration(student, teacher, E("k1_loss"), prompt=[1], horizon=2).cosine is None
    assert abs(validate_by_enumeration(student, teacher, E("k1_loss", clip_log_ratio=0.3), prompt=[1]).cosine) > 0.01


def test_what_cannot_be_enumerated_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="one length"):
        validate_by_enumeration(STUDENT, TEACHER, E("opd", "jsd", zscore=True), prompt=[1], eos=0)
    with pytest.raises(InvalidArgumentError, match="double"):
        validate_by_enumeration(transformer(0).float(), TEACHER, E("k1_loss"), prompt=[1])
