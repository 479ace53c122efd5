"""Backward passes held against central differences, and hand-written ones that are wrong."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
from torch import Tensor

import opdtheory as opd
from opdtheory.auditing.checks.backward import _recorded, backward_report
from opdtheory.exact import Loss
from opdtheory.rollouts import Rollouts
from tests.auditing.checks.subjects import checks
from tests.losses import k2


class Square(torch.autograd.Function):
    """x^2 with a derivative of its own: right for factor 2."""

    @staticmethod
    def forward(ctx: object, x: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x)  # type: ignore[attr-defined]
        ctx.factor = factor  # type: ignore[attr-defined]
        return x.square()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return ctx.factor * x * grad, None  # type: ignore[attr-defined]


bound_early = Square.apply


def custom(r: Rollouts, factor: float, detach: bool = False, apply: object = None) -> Tensor:
    square = (apply or Square.apply)(r.log_u, factor) / 2  # type: ignore[operator]
    return r.token_sum(square * (1.0 + r.log_u.detach().square()) if detach else square)


@pytest.mark.parametrize(
    ("loss", "passed", "words"),
    [
        (k2, True, "agrees"),
        (functools.partial(custom, factor=2.0), True, "agrees"),
        (functools.partial(custom, factor=2.0 + 1e-4), False, "Square disagrees with its forward by 5e-05"),
        (functools.partial(custom, factor=2.0, detach=True), None, "surrogate"),
        (functools.partial(custom, factor=3.0, detach=True), False, "Square disagrees"),
        (functools.partial(custom, factor=3.0, apply=bound_early), None, "either a stop-gradient"),
        (opd.estimator("opd_plus", "chi2"), None, "surrogate"),
        (lambda r: r.token_sum(r.log_u.data * r.log_u), None, "surrogate"),
        (lambda r: r.token_sum(r.log_u * r.log_u.square().mean().item()), None, "surrogate"),
    ],
    ids=["plain", "right", "wrong", "right, detached", "wrong, detached", "unseen", "no_grad", ".data", ".item()"],
)
def test_backward_against_differences(loss: Loss, passed: bool | None, words: str) -> None:
    check = checks(loss)["backward is the derivative of the value"]
    assert check.passed is passed
    assert words in check.detail
    assert "apply" not in Square.__dict__


def test_a_gradient_hook_is_no_stop_gradient() -> None:
    def hooked(r: Rollouts) -> Tensor:
        log_u = r.log_u * 1.0
        log_u.register_hook(lambda g: 1.01 * g)
        return r.token_sum(log_u.square() / 2)

    check = checks(hooked)["backward is the derivative of the value"]
    assert check.passed is False and "nothing is detached" in check.detail


def test_float32_inside_is_judged_by_its_own_rounding() -> None:
    logits = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    teacher = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens = torch.zeros(3, 2, dtype=torch.int64)

    def rollouts_of(z: Tensor) -> Rollouts:
        return Rollouts.from_logits(tokens, z, teacher)

    def single(r: Rollouts, factor: float = 1.0) -> Tensor:
        value = (r.log_u.float().square() / 2).sum()
        return value if factor == 1.0 else factor * value + (1.0 - factor) * value.detach()

    right, wrong = (
        backward_report(single, rollouts_of, logits),
        backward_report(functools.partial(single, factor=1.3), rollouts_of, logits),
    )
    assert right.error <= right.limit and not right.stopped
    assert wrong.error > wrong.limit and wrong.stopped


class Doubled(torch.autograd.Function):
    """Twice its argument."""

    @staticmethod
    def forward(ctx, x):
        return 2.0 * x

    @staticmethod
    def backward(ctx, grad):
        return 2.0 * grad


class Tripled(Doubled):
    """A subclass, whose calls are its own."""

    @staticmethod
    def forward(ctx, x):
        return 3.0 * x


def test_a_recorded_function_is_left_as_it_was() -> None:
    x = torch.ones(())
    outer: list = []
    inner: list = []
    before = dict(Doubled.__dict__)
    with pytest.raises(ZeroDivisionError), _recorded(Doubled, outer):
        with _recorded(Doubled, inner):
            assert float(Doubled.apply(x)) == 2.0 and float(Tripled.apply(x)) == 3.0
        Doubled.apply(x)
        worker = threading.Thread(target=lambda: Doubled.apply(x))
        worker.start()
        worker.join()
        raise ZeroDivisionError
    assert (len(inner), len(outer)) == (1, 2)
    assert dict(Doubled.__dict__) == before and "apply" not in Tripled.__dict__
    Doubled.apply(x)
    assert len(outer) == 2
