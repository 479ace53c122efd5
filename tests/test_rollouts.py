"""Rollouts: what is refused and by which name, the three reductions, labels, and the adapter for unbound methods."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opdtheory import bind
from opdtheory.errors import InvalidArgumentError, OpdTheoryError
from opdtheory.rollouts import Extras, Payload, Rollouts, Scored
from opdtheory.testing import gradient_gap, rollouts
from tests.tolerances import ALGEBRA

B, T, V = 2, 3, 4
FIELDS = [field.name for field in dataclasses.fields(Rollouts) if field.name != "extras"]


def make(**changes) -> Rollouts:
    """A valid batch of two rollouts, the second one shorter, with some fields replaced."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(B, T, V, generator=generator, dtype=torch.float64) for _ in range(2))
    valid = Rollouts.from_logits(
        torch.tensor([[0, 1, 2], [3, 0, 0]]),
        student.requires_grad_(),
        teacher,
        mask=torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]], dtype=torch.float64),
    )
    fields = {name: getattr(valid, name) for name in FIELDS}
    return Rollouts(**{**fields, **changes})


def with_entry(tensor: torch.Tensor, value: float) -> torch.Tensor:
    changed = tensor.detach().clone()
    changed[(0,) * changed.ndim] = value
    return changed


def refused(argument: str, **changes) -> str:
    with pytest.raises(ValueError) as caught:
        make(**changes)
    assert isinstance(caught.value, (InvalidArgumentError, OpdTheoryError))
    assert caught.value.argument == argument
    assert str(caught.value).startswith(f"{argument}: ")
    return str(caught.value)


@pytest.mark.bad_input
@pytest.mark.parametrize("name", [name for name in FIELDS if name != "tokens"])
def test_a_wrong_shape_is_refused_by_name(name):
    short = getattr(make(), name)[:, :-1]
    message = refused(name, **{name: short})
    assert str(tuple(short.shape)) in message and str((B, T)).strip("()") in message


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["student_logits", "teacher_logits"])
def test_logits_need_three_axes(name):
    assert "(B, T, V)" in refused(name, **{name: torch.zeros(B, T, dtype=torch.float64)})


@pytest.mark.bad_input
@pytest.mark.parametrize("name", FIELDS)
def test_what_is_no_tensor_is_refused(name):
    assert "list" in refused(name, **{name: [[0.0]]})


@pytest.mark.bad_input
@pytest.mark.parametrize("name", [name for name in FIELDS if name != "tokens"])
def test_an_integer_dtype_is_refused(name):
    assert "torch.int64" in refused(name, **{name: getattr(make(), name).detach().long()})


@pytest.mark.bad_input
@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.bool])
def test_tokens_are_int64(dtype):
    message = refused("tokens", tokens=make().tokens.to(dtype))
    assert str(dtype) in message and "torch.int64" in message


@pytest.mark.bad_input
@pytest.mark.parametrize("tokens", [torch.zeros(3, dtype=torch.int64), torch.zeros(1, 2, 3, dtype=torch.int64)])
def test_tokens_have_two_axes(tokens):
    assert str(tuple(tokens.shape)) in refused("tokens", tokens=tokens)


@pytest.mark.bad_input
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_an_empty_batch_is_refused(shape):
    assert str(shape) in refused("tokens", tokens=torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("token", [-1, V, -100])
def test_tokens_out_of_range_are_refused_with_the_range(token):
    tokens = make().tokens.clone()
    tokens[1, 2] = token
    message = refused("tokens", tokens=tokens)
    assert str(token) in message and f"[0, {V})" in message
    with pytest.raises(ValueError, match="tokens"):
        Rollouts.from_logits(tokens, make().student_logits, make().teacher_logits)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["student_logits", "teacher_logits"])
def test_unusable_logits_are_refused_with_the_count(name, value):
    assert f"1 of {B * T} rows" in refused(name, **{name: with_entry(getattr(make(), name), value)})


@pytest.mark.parametrize("name", ["student_logits", "teacher_logits"])
def test_a_row_of_minus_infinities_is_refused(name):
    logits = getattr(make(), name).detach().clone()
    logits[1, 1] = -torch.inf
    assert f"1 of {B * T} rows" in refused(name, **{name: logits})


@pytest.mark.parametrize("name", ["student_logits", "teacher_logits"])
def test_one_impossible_token_is_accepted(name):
    logits = getattr(make(), name).detach().clone()
    logits[..., -1] = -torch.inf
    assert torch.isneginf(getattr(make(**{name: logits}), name)).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["student_logprobs", "teacher_logprobs", "behavior_logprobs"])
def test_unusable_logprobs_are_refused(name, value):
    refused(name, **{name: with_entry(getattr(make(), name), value)})


@pytest.mark.parametrize("name", ["student_logprobs", "teacher_logprobs", "behavior_logprobs"])
def test_a_positive_logprob_is_refused_with_its_value_unless_masked(name):
    assert "0.25" in refused(name, **{name: with_entry(getattr(make(), name), 0.25)})
    logprobs = getattr(make(), name).detach().clone()
    logprobs[1, 2] = 0.25
    make(**{name: logprobs})


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0, float("nan")])
def test_mask_values_are_zero_or_one(value):
    refused("mask", mask=with_entry(make().mask, value))


@pytest.mark.bad_input
def test_vocabularies_must_agree():
    teacher = torch.zeros(B, T, V + 1, dtype=torch.float64)
    message = refused("teacher_logits", teacher_logits=teacher)
    assert str(V) in message and str(V + 1) in message
    with pytest.raises(ValueError, match="teacher_logits.*vocabulary"):
        Rollouts.from_logits(make().tokens, make().student_logits, teacher)


@pytest.mark.bad_input
@pytest.mark.parametrize("argument", ["student_logits", "teacher_logits"])
def test_from_logits_refuses_by_the_same_names(argument):
    good = {"student_logits": make().student_logits, "teacher_logits": make().teacher_logits}
    for wrong in (good[argument][:1], good[argument].long(), good[argument][..., 0]):
        with pytest.raises(InvalidArgumentError) as caught:
            Rollouts.from_logits(make().tokens, **{**good, argument: wrong})
        assert caught.value.argument == argument


def test_rollouts_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().mask = torch.ones(B, T)


@given(rollouts(off_policy=True))
def test_logprobs_are_gathered_from_the_logits(r):
    for b in range(r.tokens.shape[0]):
        for n in range(r.tokens.shape[1]):
            row = r.student_logits[b, n].detach().softmax(-1)
            assert float(r.student_logprobs[b, n].detach().exp()) == pytest.approx(
                float(row[r.tokens[b, n]]), rel=ALGEBRA
            )
    assert gradient_gap([r.log_u], [r.teacher_logprobs - r.student_logprobs]) == 0.0
    assert r.log_u.requires_grad and not r.behavior_logprobs.requires_grad


def test_defaults_are_an_unmasked_on_policy_batch():
    valid = make()
    r = Rollouts.from_logits(valid.tokens, valid.student_logits, valid.teacher_logits)
    assert torch.equal(r.mask, torch.ones(B, T, dtype=torch.float64))
    assert torch.equal(r.behavior_logprobs, r.student_logprobs.detach())
    assert not r.behavior_logprobs.requires_grad


@given(rollouts())
def test_reductions_are_what_they_say(r):
    values = torch.arange(1.0, 1.0 + r.tokens.numel(), dtype=torch.float64).view_as(r.mask)
    kept = [[float(v) for v, m in zip(row, mask, strict=True) if m] for row, mask in zip(values, r.mask, strict=True)]
    assert float(r.token_sum(values)) == pytest.approx(sum(map(sum, kept)) / len(kept), rel=ALGEBRA)
    means = [sum(row) / len(row) if row else 0.0 for row in kept]
    assert float(r.sequence_mean(values)) == pytest.approx(sum(means) / len(means), rel=ALGEBRA)
    tokens = sum(map(len, kept))
    assert float(r.token_mean(values)) == pytest.approx(sum(map(sum, kept)) / max(tokens, 1), rel=ALGEBRA)


@pytest.mark.parametrize("reduction", ["token_sum", "sequence_mean", "token_mean"])
def test_masked_values_never_leak(reduction):
    r = make()
    values = torch.where(r.mask > 0, 1.0, torch.nan).requires_grad_()
    total = getattr(r, reduction)(values)
    (gradient,) = torch.autograd.grad(total, values)
    assert torch.isfinite(total)
    assert torch.equal(gradient == 0, r.mask == 0)


@pytest.mark.bad_input
@pytest.mark.parametrize("reduction", ["token_sum", "sequence_mean", "token_mean"])
def test_reductions_refuse_values_of_another_shape(reduction):
    with pytest.raises(ValueError, match=r"values: must have one value per token, \(2, 3\), got \(2, 4\)"):
        getattr(make(), reduction)(torch.zeros(2, 4))


def test_labels_are_minus_hundred_where_masked():
    assert make().labels.tolist() == [[0, 1, 2], [3, 0, -100]]


def test_bind_calls_an_unbound_method_on_the_given_attributes():
    class Trainer:
        def __init__(self):
            raise AssertionError("the trainer must not be built")

        def scaled(self, x, shift=0.0):
            return self.beta * x + shift

        def forgetful(self, x):
            return self.temperature * x

    assert bind(Trainer.scaled, beta=0.5)(4.0, shift=1.0) == 3.0
    with pytest.raises(AttributeError, match=r"self\.temperature.*temperature=\.\.\."):
        bind(Trainer.forgetful, beta=0.5)(4.0)


# Top-k payloads.


@given(rollouts(), st.integers(1, 4))
def test_a_teacher_server_sends_its_likeliest_tokens_in_order(r, k):
    k = min(k, r.teacher_logits.shape[-1])
    ids, logprobs = r.teacher_top_k(k)
    rows = torch.log_softmax(r.teacher_logits, -1).flatten(0, 1).tolist()
    ranked = [sorted(range(len(row)), key=lambda a, row=row: (-row[a], a))[:k] for row in rows]
    assert ids.flatten(0, 1).tolist() == ranked
    assert logprobs.flatten(0, 1).tolist() == [[row[a] for a in kept] for row, kept in zip(rows, ranked, strict=True)]


def test_equal_tokens_come_in_ascending_order():
    tied = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64).expand(B, T, V)
    assert make(teacher_logits=tied).teacher_top_k(3)[0][0, 0].tolist() == [1, 3, 0]


def test_what_a_server_sends_is_detached():
    teacher = make().teacher_logits.clone().requires_grad_()
    ids, logprobs = make(teacher_logits=teacher).teacher_top_k(2)
    assert ids.dtype == torch.int64 and not logprobs.requires_grad


def test_impossible_tokens_come_last():
    logits = make().teacher_logits.clone()
    logits[..., 0] = -torch.inf
    ids, logprobs = make(teacher_logits=logits).teacher_top_k(V)
    assert (ids[..., -1] == 0).all() and torch.isneginf(logprobs[..., -1]).all()
    assert torch.isfinite(logprobs[..., :-1]).all()


@pytest.mark.bad_input
@pytest.mark.parametrize("k", [0, -1, V + 1, 1.0, True, None])
def test_k_out_of_range_is_refused(k):
    with pytest.raises(ValueError, match=rf"^k: must be an integer in \[1, {V}\], got {k!r}") as caught:
        make().teacher_top_k(k)
    assert caught.value.argument == "k"


def test_the_student_is_differentiable_at_given_tokens():
    r = make()
    at = r.student_at(r.tokens.unsqueeze(-1))
    assert torch.equal(at.squeeze(-1), r.student_logprobs)
    ids, _ = r.teacher_top_k(2)
    p = r.student_logits.detach().softmax(-1)
    (gradient,) = torch.autograd.grad(r.student_at(ids).sum(), r.student_logits)
    chosen = torch.nn.functional.one_hot(ids, V).sum(-2).double()
    assert gradient_gap([gradient], [chosen - 2 * p]) <= ALGEBRA


def test_the_student_at_impossible_tokens_is_finite_where_masked_only():
    logits = make().student_logits.detach().clone()
    logits[..., 3] = -torch.inf
    logits.requires_grad_()
    at = make(student_logits=logits).student_at(torch.full((B, T, 1), 3)).detach()
    assert float(at[1, 2, 0]) == 0.0 and int(torch.isneginf(at).sum()) == B * T - 1


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([[0]], "list"),
        (torch.zeros(B, T, dtype=torch.int64), r"\(2, 3\)"),
        (torch.zeros(B, T + 1, 1, dtype=torch.int64), r"\(2, 4, 1\)"),
        (torch.zeros(B, T, 1), "torch.int64"),
        (torch.zeros(B, T, 0, dtype=torch.int64), r"\(2, 3, 0\)"),
        (torch.full((B, T, 1), V), rf"must lie in \[0, {V}\), got 4 to 4"),
        (torch.full((B, T, 1), -1), r"got -1 to -1"),
    ],
)
def test_ids_that_are_no_tokens_are_refused(ids, words):
    with pytest.raises(ValueError, match=f"^ids: .*{words}") as caught:
        make().student_at(ids)
    assert caught.value.argument == "ids"


def test_unchecked_rollouts_are_the_same_rollouts():
    r = make()
    again = Rollouts.unchecked(**{name: getattr(r, name) for name in FIELDS})
    assert all(getattr(again, name) is getattr(r, name) for name in FIELDS)
    assert torch.equal(again.log_u, r.log_u) and torch.equal(again.labels, r.labels)
    with pytest.raises(dataclasses.FrozenInstanceError):
        again.mask = r.mask


def test_they_move_to_another_device_and_gradients_come_back():
    batch = make()
    moved = batch.to("cpu")
    assert all(torch.equal(getattr(moved, name), getattr(batch, name)) for name in FIELDS)
    assert {getattr(batch.to("meta"), name).device.type for name in FIELDS} == {"meta"}
    (gradient,) = torch.autograd.grad(moved.student_logits.square().sum(), batch.student_logits)
    assert torch.equal(gradient, 2 * batch.student_logits)


def scored(seed: int) -> Scored:
    logits = torch.randn(B, T, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Scored(logits, logits.log_softmax(-1)[..., 0])


def extras() -> Extras:
    return Extras((scored(1), scored(2)), scored(3), torch.tensor([0.5, -1.0], dtype=torch.float64))


def test_extras_are_read_by_name():
    batch, given_ = make(extras=extras()), extras()
    assert len(batch.teachers) == 3
    assert torch.equal(batch.teachers[0].logits, batch.teacher_logits)
    assert torch.equal(batch.teachers[0].logprobs, batch.teacher_logprobs)
    assert torch.equal(batch.teachers[2].logprobs, given_.teachers[1].logprobs)
    assert torch.equal(batch.base_logits, given_.base.logits)
    assert torch.equal(batch.base_logprobs, given_.base.logprobs)
    assert torch.equal(batch.rewards, given_.rewards)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("teachers", "teachers=2"),
        ("base_logits", "base=True"),
        ("base_logprobs", "base=True"),
        ("rewards", "reward=True"),
    ],
)
@pytest.mark.parametrize("given_", [None, Extras()])
def test_what_rollouts_lack_names_the_setting_that_supplies_it(name, setting, given_):
    with pytest.raises(InvalidArgumentError, match=setting) as caught:
        getattr(make(extras=given_), name)
    assert caught.value.argument == name


def test_extras_go_along():
    batch = make(extras=extras())
    copies = (batch.to("cpu"), dataclasses.replace(batch, mask=batch.mask), Rollouts.unchecked(**vars(batch)))
    for copy in copies:
        assert torch.equal(copy.rewards, batch.rewards) and torch.equal(copy.base_logits, batch.base_logits)
        assert torch.equal(copy.teachers[1].logits, batch.teachers[1].logits)
    # Without extras, every field is a tensor, in a copy too.
    for plain in (
        make(),
        make().to("cpu"),
        dataclasses.replace(make()),
        Rollouts.unchecked(**vars(make()), extras=None),
    ):
        assert plain.extras is None and set(vars(plain)) == set(FIELDS)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("argument", "wrong"),
    [
        ("extras", (scored(1),)),
        ("teachers[1].logits", Extras((Scored(scored(1).logits[..., 1:], scored(1).logprobs),))),
        ("base.logprobs", Extras(base=Scored(scored(1).logits, scored(1).logprobs[:, 1:]))),
        ("base.logits", Extras(base=Scored(scored(1).logits * torch.nan, scored(1).logprobs))),
        ("rewards", Extras(rewards=torch.zeros(B, T))),
        ("rewards", Extras(rewards=torch.zeros(B, dtype=torch.int64))),
    ],
)
def test_wrong_extras_are_refused_by_name(argument, wrong):
    refused(argument, extras=wrong)


def sent(k: int = 2) -> Payload:
    return Payload(*make().teacher_top_k(k))


def payloaded(**changes) -> Rollouts:
    batch = make()
    given_ = {
        "tokens": batch.tokens,
        "student_logits": batch.student_logits,
        "payload": sent(),
        "teacher_logprobs": batch.teacher_logprobs,
        "mask": batch.mask,
        "behavior_logprobs": batch.behavior_logprobs,
    }
    return Rollouts.from_payload(**{**given_, **changes})


def test_a_payload_is_what_the_teachers_server_sends():
    batch, whole = payloaded(), make()
    for k in (1, 2):
        for found, exact in zip(batch.teacher_top_k(k), whole.teacher_top_k(k), strict=True):
            assert torch.equal(found, exact)
    assert torch.equal(batch.log_u, whole.log_u) and torch.equal(
        batch.student_at(sent().ids), whole.student_at(sent().ids)
    )
    assert torch.isnan(batch.teacher_logits).all() and batch.teacher_logits.untyped_storage().nbytes() == 8
    # A server need not sort.
    turned = payloaded(payload=Payload(*(each.flip(-1) for each in dataclasses.astuple(sent()))))
    assert torch.equal(turned.teacher_top_k(2)[0], sent().ids)
    # It goes along, and is cut and cast like the rest.
    assert batch.to(torch.float32).payload.logprobs.dtype == torch.float32 and batch.cut(1).payload.ids.shape[1] == 1
    assert make().payload is None
    with pytest.raises(InvalidArgumentError, match="k"):
        batch.teacher_top_k(3)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("argument", "wrong"),
    [
        ("payload", lambda: sent().ids),
        ("payload.ids", lambda: Payload(sent().ids[:, 1:], sent().logprobs)),
        ("payload.ids", lambda: Payload(sent().ids + V, sent().logprobs)),
        ("payload.ids", lambda: Payload(sent().ids[..., :1].expand(-1, -1, 2), sent().logprobs - 5.0)),
        ("payload.logprobs", lambda: Payload(sent().ids, sent().logprobs[..., :1])),
        ("payload.logprobs", lambda: Payload(sent().ids, sent().logprobs * torch.nan)),
        ("payload.logprobs", lambda: Payload(sent().ids, torch.zeros_like(sent().logprobs))),
        ("payload.logprobs", lambda: Payload(sent().ids, 1 - sent().logprobs)),
    ],
)
def test_a_wrong_payload_is_refused_by_name(argument, wrong):
    with pytest.raises(InvalidArgumentError) as caught:
        payloaded(payload=wrong())
    assert caught.value.argument == argument
