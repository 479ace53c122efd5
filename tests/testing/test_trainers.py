"""`@opd_trainer`: one item for each mark, which passes if the trainer descends its claim."""

from __future__ import annotations

import pytest

from opdtheory.errors import InvalidArgumentError
from opdtheory.testing.marks import opd_trainer, trainer_claims_of
from tests.testing.test_plugin import run

pytest_plugins = ["pytester"]

SOURCE = """
import torch
from opdtheory.testing import opd_trainer

@opd_trainer(claims="reverse_kl", variants=False)
@opd_trainer(claims="forward_kl", variants=False)
def loop(pair, prompts, answers):
    for prompt, answer in zip(prompts, answers):
        ids = torch.tensor([prompt + answer])
        rows = slice(len(prompt) - 1, -1)
        p, q = (model(ids).logits[0, rows].log_softmax(-1) for model in (pair.student, pair.teacher))
        ((p.exp() * (p - q)).sum() / len(prompts)).backward()

@opd_trainer(claims="reverse_kl", batchsize=2)
def misspelt(pair, prompts, answers):
    pass
"""


@pytest.fixture(scope="module", autouse=True)
def warm():
    """What pytester imports in this process it would drop again."""
    import opdtheory.end_to_end  # noqa: F401


def test_each_mark_is_an_item(pytester) -> None:
    pytester.makepyfile(test_mine=SOURCE)
    assert run(pytester).ret == pytest.ExitCode.NO_TESTS_COLLECTED
    result = run(pytester, "--opd-audit", "--opd-report", "pages", "-v")
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(
        ["*loop?reverse_kl-token_local-variants=False? PASSED*", "*loop?forward_kl-token_local-variants=False? FAILED*"]
    )
    text = result.stdout.str()
    assert "It descends reverse_kl" in text and "batchsize" in text
    assert len(list((pytester.path / "pages").glob("*.html"))) == 2


def test_a_mark_is_checked_at_once() -> None:
    with pytest.raises(InvalidArgumentError, match="granularity"):
        opd_trainer("reverse_kl", "word")
    with pytest.raises(InvalidArgumentError, match="claims"):
        opd_trainer(lambda pair: None)
    assert trainer_claims_of(3) == ()
