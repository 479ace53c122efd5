"""The programs of losses on a few tokens of each row, against float64 on the CPU; interpreted where there is no GPU."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import opdtheory as opd
from opdtheory.errors import InvalidArgumentError
from opdtheory.kernels import sweep

triton = pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no GPU, and nothing is interpreted"),
    pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning"),
]
NAMES = ("reverse_kl", "forward_kl", "jsd", "chi2", "total_variation", "alpha(alpha=0.3)", "2*jsd + reverse_kl")
# The interpreter cuts off what a GPU rounds to bfloat16.
BOUND = {torch.float32: 1e-6, torch.bfloat16: 8e-3 if INTERPRETED else 4e-3, torch.float16: 1e-3}
VALUE = 1e-6
MASK = torch.tensor([1.0, 0.5, 0.0, -2.0, 1.0, 1.0])

Payload = dict[str, Tensor]
Loss = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def programs(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        # A payload in float64 of logits in float64 takes the route of the CPU.
        monkeypatch.setattr(sweep, "has_programs", lambda _: True)


def case(words: int, k: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Payload]:
    """Logits of six rows, and what a teacher server sends, with a sampled token of every sort."""
    generator = torch.Generator().manual_seed(seed)
    student, noise = (torch.randn(6, words, generator=generator, dtype=torch.float64) for _ in range(2))
    student = (3 * student + 20).to(dtype)
    log_q = torch.log_softmax(3 * noise + student.double() / 2, -1)
    logprobs, ids = log_q.topk(k, -1)
    order = torch.randperm(k, generator=generator)
    ids, logprobs = ids[:, order], logprobs[:, order]
    # The teacher lacks a listed token, the student another one.
    tokens = torch.randint(words, (6,), generator=generator)
    own = log_q.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    if words > k > 1:
        # In S, none, and one that is impossible for the student.
        tokens[0], tokens[1] = ids[0, 1], -100
        own[1] = math.nan
        free = sorted(set(range(words)) - set(ids[3].tolist()) - {int(tokens[3])})
        student[3, free[:2]] = -math.inf
        student[4, ids[4, 0]] = -math.inf
        tokens[3] = free[0]
        logprobs[5, 0] = -math.inf
    sent = {"teacher_ids": ids, "teacher_logprobs": logprobs, "tokens": tokens, "token_logprobs": own}
    return student, sent


def top_k(logits: Tensor, sent: Payload, name: str, **options: Any) -> Tensor:
    return opd.fused_top_k_divergence(logits, sent["teacher_ids"], sent["teacher_logprobs"], name, **options)


def sampled(logits: Tensor, sent: Payload, name: str, **options: Any) -> Tensor:
    return opd.fused_sampled_tail(logits, divergence=name, constant=0.3, **sent, **options)


def of_rest(logits: Tensor, sent: Payload, name: str, **options: Any) -> Tensor:
    return opd.fused_sampled_tail(logits, divergence=name, constant="rest", **sent, **options)


LOSSES = {"top_k": top_k, "sampled": sampled, "of_rest": of_rest}


def both(loss: Loss, logits: Tensor, sent: Payload, name: str, mask: Tensor | None, device: str) -> list[Tensor]:
    """Values and gradients on a device."""
    z = logits.detach().to(device).requires_grad_()
    payload = {key: each.to(device) for key, each in sent.items()}
    values = loss(z, payload, name, mask=None if mask is None else mask.to(device), temperature=1.3)
    return [values.detach().cpu(), torch.autograd.grad(values.sum(), z)[0].cpu()]


def errors(found: list[Tensor], wanted: list[Tensor]) -> tuple[float, float]:
    """Of values, relative to one and more, and of the gradients of rows in norm."""
    finite = torch.isfinite(wanted[0])
    assert torch.equal(torch.isfinite(found[0]), finite) and bool(torch.isfinite(found[1]).all())
    assert torch.equal(found[0][~finite].double(), wanted[0][~finite])
    value = ((found[0] - wanted[0]).abs() / (1 + wanted[0].abs()))[finite].max()
    size, distance = wanted[1].norm(dim=-1), (found[1].double() - wanted[1]).norm(dim=-1)
    if found[1].dtype == torch.float16:
        # Half the distance of subnormal numbers.
        distance = distance - 2.0**-25 * found[1].shape[-1] ** 0.5
    return float(value), float((distance / (1e-6 + size)).max())


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_numbers_of_float64(loss: str, name: str, dtype: torch.dtype) -> None:
    student, sent = case(9000, 7, dtype)
    wanted = both(LOSSES[loss], student.double(), sent, name, MASK, "cpu")
    # Nothing is read of a row that is skipped.
    spoilt = student.clone()
    spoilt[2] = math.nan
    found = both(LOSSES[loss], spoilt, sent, name, MASK, DEVICE)
    assert found[0].dtype == torch.float32 and found[1].dtype == dtype
    assert found[0][2] == 0 and not found[1][2].any()
    value, slope = errors(found, wanted)
    assert value < VALUE and slope < BOUND[dtype]
    # To the last bit, on every run.
    again = both(LOSSES[loss], spoilt, sent, name, MASK, DEVICE)
    assert torch.equal(found[0], again[0]) and torch.equal(found[1], again[1])
    other = both(LOSSES[loss], (1.001 * student.double()), sent, name, MASK, "cpu")
    assert errors(found, other)[1] > 1e-4


@pytest.mark.parametrize(("words", "k"), ((1, 1), (5, 1), (9000, 1), (200, 200), (200, 199), (5000, 256)))
@pytest.mark.parametrize("loss", LOSSES)
def test_few_tokens_and_all(loss: str, words: int, k: int) -> None:
    student, sent = case(words, k, torch.float32, seed=1)
    for name in ("forward_kl", "jsd"):
        found, wanted = (
            both(LOSSES[loss], z, sent, name, None, device)
            for z, device in ((student, DEVICE), (student.double(), "cpu"))
        )
        value, slope = errors(found, wanted)
        assert value < 3e-6 and slope < 2e-6, name


def test_more_than_a_few_take_the_other_route(monkeypatch: pytest.MonkeyPatch) -> None:
    from opdtheory.kernels.programs import launch_few

    monkeypatch.setattr(launch_few, "row_sums", None)
    student, sent = case(600, 257, torch.float32)
    both(top_k, student, sent, "jsd", MASK, DEVICE)
    both(top_k, student.double(), sent, "jsd", MASK, DEVICE)
    with pytest.raises(TypeError):
        both(top_k, *case(600, 256, torch.float32), "jsd", MASK, DEVICE)


@pytest.mark.parametrize("loss", LOSSES)
def test_strides(loss: str) -> None:
    student, sent = case(4500, 7, torch.float32)
    wanted = both(LOSSES[loss], student.double(), sent, "jsd", MASK, "cpu")
    z = student.mT.contiguous().to(DEVICE).requires_grad_()
    payload = {key: each.to(DEVICE) for key, each in sent.items()}
    values = LOSSES[loss](z.mT, payload, "jsd", mask=MASK.to(DEVICE), temperature=1.3)
    found = [values.detach().cpu(), torch.autograd.grad(values.sum(), z)[0].mT.cpu()]
    assert max(errors(found, wanted)) < 1e-6
    # A batch that no view makes a matrix.
    twice = torch.stack([student, student.flip(0)], 1).to(DEVICE)[:, :, :-1]
    sent = {
        key: torch.stack([each, each.flip(0)], 1).to(DEVICE) for key, each in case(4499, 7, torch.float32)[1].items()
    }
    slopes = [both(LOSSES[loss], each, sent, "jsd", None, DEVICE)[1] for each in (twice, twice.contiguous())]
    assert torch.equal(*slopes)


@pytest.mark.parametrize("parts", (1, 2, 3))
def test_parts_of_rows_add_up(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from opdtheory.kernels.programs import launch_few

    student, sent = case(9000, 40, torch.float32)
    student[5, 4096:8192] = -math.inf
    wanted = both(top_k, student.double(), sent, "forward_kl", MASK, "cpu")
    monkeypatch.setattr(launch_few, "split_of", lambda *_: launch_few.Split(parts, 4096 * (4 - parts)))
    assert max(errors(both(top_k, student, sent, "forward_kl", MASK, DEVICE), wanted)) < 1e-6
    assert launch_few.split_of(0, 0, torch.device(DEVICE)).parts == parts


@pytest.mark.parametrize("name", ("jsd", "forward_kl", "total_variation"))
def test_a_sampled_token_that_the_teacher_lacks(name: str) -> None:
    student, sent = case(5000, 7, torch.float32)
    sent["token_logprobs"][4:] = -math.inf
    for loss in (sampled, of_rest):
        wanted = both(loss, student.double(), sent, name, MASK, "cpu")
        assert max(errors(both(loss, student, sent, name, MASK, DEVICE), wanted)) < 1e-6


def nearly_all() -> tuple[Tensor, Payload]:
    """The listed tokens hold all but about 1e-9 of the student's mass."""
    student, sent = case(5000, 3, torch.float32, seed=2)
    student = student.clamp(min=0.0)
    student.scatter_(-1, sent["teacher_ids"], 52.0)
    return student, sent


def test_a_bucket_far_below_keeps_its_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The false twin takes the listed tokens from the sum over all."""
    from opdtheory.kernels.programs import launch_few

    student, sent = nearly_all()
    log_p = torch.log_softmax(student.double() / 1.3, -1)
    left = 1 - log_p.gather(-1, sent["teacher_ids"]).exp().sum(-1)
    assert 1e-11 < float(left.min()) and float(left.max()) < 1e-5
    wanted = both(top_k, student.double(), sent, "forward_kl", None, "cpu")
    assert max(errors(both(top_k, student, sent, "forward_kl", None, DEVICE), wanted)) < 1e-6

    def subtracted(logits: Tensor, ids: Tensor, weights: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        tops = logits.amax(-1, keepdim=True)
        every, listed = (torch.exp(scale * (z - tops)).sum(-1, keepdim=True) for z in (logits, logits.gather(-1, ids)))
        return tops.double(), (every - listed).double().clamp(min=1e-12)

    monkeypatch.setattr(launch_few, "row_sums", subtracted)
    value, slope = errors(both(top_k, student, sent, "forward_kl", None, DEVICE), wanted)
    assert value > 1e-4 and slope > 1e-3


def test_a_listed_token_that_stays_in_the_bucket_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from opdtheory.kernels.programs import launch_few

    student, sent = case(5000, 7, torch.float32)
    wanted = both(top_k, student.double(), sent, "jsd", None, "cpu")
    right = launch_few.row_sums
    monkeypatch.setattr(launch_few, "row_sums", lambda z, ids, *rest: right(z, ids[..., :-1].contiguous(), *rest))
    value, slope = errors(both(top_k, student, sent, "jsd", None, DEVICE), wanted)
    assert value > 1e-4 and slope > 1e-3


def test_masks_in_place_of_infinity_are_logits() -> None:
    """The least number of a dtype, as many mask tokens, also where nothing else is left."""
    for dtype in (torch.float32, torch.bfloat16):
        student, sent = case(300, 3, dtype)
        least = torch.finfo(dtype).min
        student[0, 5:] = least
        student[1] = least
        wanted = both(sampled, student.double(), sent, "jsd", None, "cpu")
        value, slope = errors(both(sampled, student, sent, "jsd", None, DEVICE), wanted)
        assert value < VALUE and slope < BOUND[dtype]


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("place", ("listed", "other"))
def test_unusable_rows_are_refused(loss: str, value: float, place: str) -> None:
    student, sent = case(5000, 3, torch.float32)
    if value == -math.inf:
        student[1] = value
    elif place == "listed":
        student[1, sent["teacher_ids"][1, 0]] = value
    else:
        student[1, next(a for a in range(5000) if a not in sent["teacher_ids"][1])] = value
    both(LOSSES[loss], student, sent, "jsd", MASK * (torch.arange(6) != 1), DEVICE)
    with pytest.raises(InvalidArgumentError, match=r"student_logits.*1 of 6 rows"):
        both(LOSSES[loss], student, sent, "jsd", MASK, DEVICE)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"teacher_ids": torch.tensor([0, 1, 5000])}, "teacher_ids"),
        ({"teacher_ids": torch.tensor([0, -1, 2])}, "teacher_ids"),
        ({"teacher_ids": torch.tensor([4, 1, 4])}, "teacher_ids"),
        ({"teacher_logprobs": torch.tensor([-1.0, math.nan, -2.0])}, "teacher_logprobs"),
        ({"mask": torch.tensor(math.nan)}, "mask"),
        ({"tokens": torch.tensor(5000)}, "tokens"),
        ({"tokens": torch.tensor(-1)}, "tokens"),
        ({"token_logprobs": torch.tensor(math.nan)}, "token_logprobs"),
        ({"teacher_logprobs": torch.tensor([-0.1, -0.1, -2.0])}, "teacher_logprobs"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, Tensor], name: str, loss: str) -> None:
    """Also where a row of the logits is unusable, so that arguments are named as without programs."""
    student, sent = case(5000, 3, torch.float32)
    student[0, 0] = math.nan
    mask = MASK.clone()
    for key, each in changed.items():
        target = mask if key == "mask" else sent[key]
        target[5] = each
    if loss == "top_k" and "token" in name:
        return
    with pytest.raises(InvalidArgumentError) as refused:
        both(LOSSES[loss], student, sent, "jsd", mask, DEVICE)
    alone = loss != "top_k" and float(sent["teacher_logprobs"][5].exp().sum()) > 1
    assert refused.value.argument == ("student_logits" if alone else name)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_host_waits_once(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student, sent = case(300, 3, torch.float32)
    z = student.to(DEVICE).requires_grad_()
    payload, mask = {key: each.to(DEVICE) for key, each in sent.items()}, MASK.to(DEVICE)
    waits = []
    for kind in ("__bool__", "__int__", "__float__", "item", "tolist", "__index__"):
        right = getattr(Tensor, kind)

        def counted(self: Tensor, *rest: Any, right: Any = right, kind: str = kind) -> Any:
            waits.append(kind)
            return right(self, *rest)

        monkeypatch.setattr(Tensor, kind, counted)
    LOSSES[loss](z, payload, "jsd", mask=mask)
    assert waits == ["__bool__"]
