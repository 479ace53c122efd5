"""Log-probabilities of some tokens from hidden states, against autograd on the logits."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from opdtheory.kernels import products
from opdtheory.kernels.chosen import OutputLayer, chosen_log_probs, likeliest
from opdtheory.kernels.heads import HeadForm
from tests.tolerances import ALGEBRA

FORMS = [HeadForm(), HeadForm(0.7), HeadForm(1.3, 2.0)]


def case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias, tokens (one of them twice) and what comes from upstream."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    leaves = [draw(*shape).to(dtype).requires_grad_() for shape in ((5, 4), (7, 4), (7,))]
    ids = torch.tensor([[0, 3, 3], [6, 1, 2], [4, 5, 0], [1, 2, 3], [2, 2, 2]])
    return *leaves, ids, draw(5, 3)


def by_autograd(hidden: Tensor, weight: Tensor, bias: Tensor | None, form: HeadForm, temperature: float) -> Tensor:
    logits = (hidden @ weight.T + (0.0 if bias is None else bias)) * form.scale
    if form.softcap is not None:
        logits = form.softcap * torch.tanh(logits / form.softcap)
    return (logits / temperature).log_softmax(-1)


def worst(mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> float:
    return max(float((a.double() - b).abs().max()) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("form", FORMS, ids=["plain", "scaled", "capped"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients(form: HeadForm, with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "CHUNK_BYTES", 2 * 14 * 8)  # two positions at a time
    hidden, weight, bias, ids, upstream = case()
    leaves = [hidden, weight, bias] if with_bias else [hidden, weight]
    given = bias if with_bias else None
    found = chosen_log_probs(hidden, OutputLayer(weight, given, form, 1.5, torch.float64), ids)
    wanted = by_autograd(hidden, weight, given, form, 1.5).gather(-1, ids)
    assert float((found - wanted).detach().abs().max()) < ALGEBRA
    mine, theirs = (torch.autograd.grad((each * upstream).sum(), leaves) for each in (found, wanted))
    assert worst(mine, theirs) < ALGEBRA
    # The twin leaves the temperature out.
    false = chosen_log_probs(hidden, OutputLayer(weight, given, form, 1.0, torch.float64), ids)
    assert worst(torch.autograd.grad((false * upstream).sum(), leaves), theirs) > 1e-3


def test_a_weight_of_low_precision_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "CHUNK_BYTES", 2 * 7 * 4)
    hidden, weight, bias, ids, upstream = case(torch.bfloat16)
    exact = [each.detach().double().requires_grad_() for each in (hidden, weight, bias)]
    found = chosen_log_probs(hidden, OutputLayer(weight, bias, dtype=torch.bfloat16), ids)
    wanted = by_autograd(*exact, HeadForm(), 1.0).gather(-1, ids)
    assert float((found - wanted).detach().abs().max()) < 1e-5
    mine = torch.autograd.grad((found * upstream).sum(), [hidden, weight, bias])
    theirs = torch.autograd.grad((wanted * upstream).sum(), exact)
    assert [each.dtype for each in mine] == [torch.bfloat16] * 3
    for a, b in zip(mine, theirs, strict=True):
        assert float((a.double() - b).abs().max()) <= 2**-8 * float(b.abs().max())


def test_what_is_frozen_gets_no_gradient_and_there_is_no_second_one() -> None:
    hidden, weight, _, ids, upstream = case()
    layer = OutputLayer(weight.detach(), None, dtype=torch.float64)
    (chosen_log_probs(hidden, layer, ids) * upstream).sum().backward()
    assert hidden.grad is not None
    nothing = chosen_log_probs(hidden[:0], OutputLayer(weight, None, dtype=torch.float64), ids[:0])
    assert not torch.autograd.grad(nothing.sum(), weight)[0].any()
    (first,) = torch.autograd.grad(chosen_log_probs(hidden, layer, ids).sum(), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="chosen_log_probs has first derivatives only"):
        torch.autograd.grad(first.sum(), hidden)


def test_the_likeliest_of_a_smaller_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "CHUNK_BYTES", 2 * 14 * 8)
    hidden, weight, bias, ids, _ = case()
    logs = by_autograd(hidden, weight, bias, HeadForm(), 0.8).detach()
    found, scores, of_tokens = likeliest(
        hidden, OutputLayer(weight, bias, HeadForm(), 0.8, torch.float64), 2, 4, ids[:, 0]
    )
    wanted = logs[:, :4].topk(2, -1)
    assert torch.equal(found, wanted.indices) and float((scores - wanted.values).abs().max()) < ALGEBRA
    assert float((of_tokens - logs.gather(-1, ids[:, :1])[:, 0]).abs().max()) < ALGEBRA
    assert not scores.requires_grad and int(logs.argmax(-1).max()) >= 4  # one beyond is likelier, and is not taken
