"""Narrow dtypes: what a loss's own arithmetic loses, and nothing that rounded inputs lose before it."""

from __future__ import annotations

import dataclasses
import json
import math
import time

import pytest
import torch
from torch import Tensor

import opdtheory as opd
from opdtheory.auditing.checks.numerics import DTYPES, DtypeResult, numerics, realistic_logits
from opdtheory.errors import InvalidArgumentError
from opdtheory.exact import Loss
from opdtheory.rollouts import Rollouts


def results(loss: Loss, **settings: object) -> dict[tuple[str, str], DtypeResult]:
    found = numerics(loss, **settings)  # type: ignore[arg-type]
    return {(result.dtype, result.regime): result for result in found}


def exponential(r: Rollouts) -> Tensor:
    return r.token_sum(r.log_u.exp())


def test_overflow_starts_where_the_exponential_does() -> None:
    found = results(exponential)
    for name, dtype in DTYPES.items():
        overflow = found[name, "adversarial"].overflow
        assert overflow is not None and len(overflow) == 1
        # The bisection's steps and the spacing of log-probabilities leave this much.
        assert overflow[0] == pytest.approx(math.log(torch.finfo(dtype).max), abs=0.5)
        assert f"overflows from log u = {overflow[0]:.3g}" in found[name, "adversarial"].words
        assert found[name, "realistic"].overflow is None
    mirrored = results(lambda r: r.token_sum((-r.log_u).exp()))["float16", "adversarial"].overflow
    assert mirrored is not None and mirrored[0] == pytest.approx(-11.1, abs=0.2)


def test_inputs_that_round_are_not_the_losss_fault() -> None:
    for loss in (opd.estimator("k1_loss"), lambda r: r.token_sum(r.log_u.double().square() / 2)):
        for result in numerics(loss):
            eps = torch.finfo(DTYPES[result.dtype]).eps
            assert result.overflow is result.lost_gradient is result.sign_changed is None
            assert result.worst_error <= eps
    by_hand = results(lambda r: r.token_sum(r.log_u.square() / 2))
    assert by_hand["bfloat16", "adversarial"].worst_error > 1e-3


def test_k3_loses_its_gradient_near_one() -> None:
    """u - 1 is formed from u, and u rounds to one."""
    found = results(opd.estimator("k3_loss"))
    lost = found["bfloat16", "adversarial"].lost_gradient
    assert lost is not None and 0.0 < min(abs(x) for x in lost) < 0.01
    assert found["float32", "adversarial"].lost_gradient is None
    assert results(opd.estimator("k2_loss"))["bfloat16", "adversarial"].lost_gradient is None


def test_a_sign_that_rounding_turns() -> None:
    def loss(r: Rollouts) -> Tensor:
        weight = (r.log_u.detach() + 1000.0) - 1000.0 - 0.3
        return r.token_sum(-weight * r.student_logprobs)

    found = results(loss)
    turned = found["bfloat16", "adversarial"].sign_changed
    assert turned is not None and "changes sign at" in found["bfloat16", "adversarial"].words
    assert found["float32", "adversarial"].sign_changed is None
    assert (
        results(lambda r: r.token_sum(-(r.log_u.detach() - 0.3) * r.student_logprobs))[
            "bfloat16", "adversarial"
        ].sign_changed
        is None
    )


def test_what_float64_neglects_is_not_lost() -> None:
    """The weight u of a token at log u = -40 is zero in float16, as it may be."""
    found = results(opd.estimator("opd_plus", "forward_kl"))
    assert found["float16", "adversarial"].lost_gradient is None
    scaled = results(lambda r: 1e-6 * 1e-6 * exponential(r))
    assert scaled["float16", "realistic"].lost_gradient is not None


def test_whole_vocabulary_overflow_in_float16() -> None:
    squares = results(opd.estimator("full_vocab", "chi2"))
    assert squares["float16", "adversarial"].overflow is not None
    assert squares["float32", "realistic"].worst_error < 1e-4


def test_a_loss_that_refuses_a_dtype() -> None:
    def loss(r: Rollouts) -> Tensor:
        if r.student_logprobs.dtype == torch.bfloat16:
            raise TypeError("float32 or float64, please")
        return r.token_sum(r.log_u.square())

    found = results(loss)
    assert "raises TypeError: float32 or float64" in found["bfloat16", "realistic"].words
    assert math.isnan(found["bfloat16", "adversarial"].worst_error)
    assert found["float16", "adversarial"].worst_error < 0.01


def test_a_loss_without_a_gradient_is_reported() -> None:
    for result in numerics(lambda r: r.teacher_logprobs.sum()):
        assert "raises RuntimeError" in result.words and "in float64 too" in result.words


def test_a_gradient_that_is_not_the_dtypes_is_seen() -> None:
    """A wrong twin of an exact loss: the same weight, formed with a cancellation."""

    def cancelled(r: Rollouts) -> Tensor:
        weight = (r.log_u.detach().exp() + 64.0) - 64.0
        return r.token_sum(-weight * r.student_logprobs)

    plain = results(opd.estimator("opd_plus", "forward_kl"))["bfloat16", "realistic"].worst_error
    assert plain < 0.01 < results(cancelled)["bfloat16", "realistic"].worst_error


def test_groups() -> None:
    for result in numerics(opd.estimator("opd_plus", "jsd", zscore=True), batch_size=2):
        assert result.overflow is None and result.worst_error < 0.5
    with pytest.raises(InvalidArgumentError, match="batch_size"):
        numerics(exponential, batch_size=0)


def test_realistic_logits_are_what_they_say() -> None:
    student, teacher = realistic_logits(tokens=200, vocabulary=512, seed=5)
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    assert entropy.min() < 0.5 and entropy.max() > 4.0
    log_u = (log_q - log_p).abs().flatten()
    assert log_u.median() < 1.0 < 3.0 < log_u.max()
    again = realistic_logits(tokens=200, vocabulary=512, seed=5)
    assert torch.equal(student, again[0]) and torch.equal(teacher, again[1])
    assert not torch.equal(student, realistic_logits(tokens=200, vocabulary=512, seed=6)[0])


def test_a_slow_loss_gets_a_small_vocabulary() -> None:
    calls: list[int] = []

    def slow(r: Rollouts) -> Tensor:
        calls.append(r.student_logits.shape[-1])
        if calls[-1] >= 256:
            end = time.process_time() + 0.04
            while time.process_time() < end:
                pass
        return exponential(r)

    assert "over 128 tokens" in results(slow)["float16", "realistic"].words
    assert max(calls) == 256
    assert "over 2048 tokens" in results(exponential)["float16", "realistic"].words


def test_plain_and_repeatable() -> None:
    loss = opd.estimator("opd_plus", "reverse_kl")
    first, second = numerics(loss, seed=2), numerics(loss, seed=2)
    assert first == second
    assert [(r.dtype, r.regime) for r in first] == [(d, g) for d in DTYPES for g in ("realistic", "adversarial")]
    json.dumps([dataclasses.asdict(r) for r in first])
    assert len(numerics(loss, ("float16",))) == 2
    with pytest.raises(InvalidArgumentError, match="dtypes"):
        numerics(loss, ("int8",))


def test_work_is_bounded() -> None:
    calls = []

    def counted(r: Rollouts) -> Tensor:
        calls.append(None)
        return exponential(r)

    numerics(counted)
    assert len(calls) < 300
