"""The adapters hand over what they say, reduce as they say, and refuse what is no loss."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import opdtheory as opd
from opdtheory import adapters
from opdtheory.adapters import from_advantage, from_hidden, from_logits, from_logprobs, from_top_k
from opdtheory.errors import InvalidArgumentError
from tests.tolerances import ALGEBRA

audit = functools.partial(opd.audit, details=False)


def rollouts(vocab_size: int = 4, mask: list[list[float]] | None = None) -> opd.Rollouts:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, vocab_size, generator=generator, dtype=torch.float64)
    tokens = torch.randint(vocab_size, (2, 3), generator=generator)
    weights = torch.tensor(mask or [[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    behavior = torch.full((2, 3), -1.3, dtype=torch.float64)
    return opd.Rollouts.from_logits(tokens, student.requires_grad_(), teacher, mask=weights, behavior_logprobs=behavior)


def kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
    return kl(teacher_logits.log_softmax(-1), student_logits.log_softmax(-1))


def test_per_token_values_are_masked_and_reduced():
    r = rollouts()
    values = r.student_logprobs * 2 - r.teacher_logprobs
    for reduction in ("token_sum", "token_mean", "sequence_mean"):
        loss = from_logprobs(lambda p, q: 2 * p - q, reduction=reduction)
        assert torch.equal(loss(r), getattr(r, reduction)(values))
    assert len({float(getattr(r, x)(values).detach()) for x in ("token_sum", "token_mean", "sequence_mean")}) == 3


def test_a_scalar_is_taken_as_it_is():
    r = rollouts()
    assert torch.equal(from_logprobs(lambda p, q: (q - p).sum())(r), (r.teacher_logprobs - r.student_logprobs).sum())


def test_names_are_keywords_and_none_is_left_out():
    def f(*, ref: Tensor, policy: Tensor) -> Tensor:
        return policy - ref

    r = rollouts()
    assert torch.equal(from_logprobs(f, names=("policy", "ref"))(r), r.token_sum(-r.log_u))
    assert torch.equal(from_logprobs(lambda x: x, names=("x", None))(r), r.token_sum(r.student_logprobs))


def test_labels_are_the_tokens_and_minus_100_where_masked():
    r = rollouts()
    seen = []
    from_logits(lambda student, teacher, labels: seen.append(labels) or student.sum())(r)
    assert torch.equal(seen[0], r.labels)


def shifting(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    valid = labels[:, 1:] != -100
    return (forward_kl(student[:, :-1], teacher[:, :-1]) * valid).sum() / len(labels)


def not_shifting(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return (forward_kl(student, teacher) * (labels != -100)).sum() / len(labels)


def test_a_trainer_that_shifts_gets_one_position_more():
    r = rollouts()
    expected = from_logits(forward_kl)(r)
    assert float((from_logits(shifting, shifted=True)(r) - expected).detach()) == pytest.approx(0, abs=ALGEBRA)
    assert audit(from_logits(shifting, shifted=True), "forward_kl").verdict == "exact"
    # Either mistake is caught: a trainer that does not shift given the rows of one that does, and the reverse.
    assert audit(from_logits(not_shifting, shifted=True), "forward_kl").verdict == "biased"
    assert audit(from_logits(shifting), "forward_kl").verdict == "biased"


def test_a_detached_advantage_has_the_gradient_of_the_score_alone():
    for detach in (True, False):
        r = rollouts()
        value = from_advantage(lambda p, q: q * p, detach=detach)(r)
        (actual,) = torch.autograd.grad(value, r.student_logits, retain_graph=True)
        weight = r.teacher_logprobs * r.student_logprobs
        weight = weight.detach() if detach else 2 * weight.detach()  # d(q p^2) = 2 q p dp
        (expected,) = torch.autograd.grad(r.token_sum(-weight * r.student_logprobs), r.student_logits)
        assert actual == pytest.approx(expected, abs=ALGEBRA)


def test_the_importance_ratio_stands_in_for_the_log_probability():
    r = rollouts()
    actual = from_advantage(lambda log_u: log_u, of="log_u", detach=True, importance_ratio=True)(r)
    ratio = (r.student_logprobs - r.behavior_logprobs).exp()
    assert torch.equal(actual, r.token_sum(-r.log_u.detach() * ratio))
    off_policy = {"off_policy": 0.5}
    loss = from_advantage(lambda log_u: log_u, of="log_u", detach=True)
    assert audit(loss, "reverse_kl", **off_policy).verdict == "biased"


def fused(student: Tensor, student_head: Tensor, teacher: Tensor, teacher_head: Tensor, labels: Tensor) -> Tensor:
    return forward_kl(student @ student_head.T, teacher @ teacher_head.T)


FUSED_TWINS = {
    "student's head transposed": lambda s, a, t, b, y: forward_kl(s @ a, t @ b.T),
    "teacher's head transposed": lambda s, a, t, b, y: forward_kl(s @ a.T, t @ b),
    "heads exchanged": lambda s, a, t, b, y: forward_kl(s @ b.T, t @ a.T),
    "one head for both": lambda s, a, t, b, y: forward_kl(s @ a.T, t @ a.T),
}


def test_hidden_states_and_heads_give_back_the_logits():
    r = rollouts()
    assert float((from_hidden(fused)(r) - from_logits(forward_kl)(r)).detach()) == pytest.approx(0, abs=1e-11)
    assert audit(from_hidden(fused, seed=3), "forward_kl").verdict == "exact"


@pytest.mark.parametrize("twin", FUSED_TWINS)
def test_a_fused_loss_with_a_wrong_head_is_caught(twin):
    assert audit(from_hidden(FUSED_TWINS[twin]), "forward_kl").verdict == "biased"


def test_a_fused_loss_may_take_rows():
    def rows(student: Tensor, student_head: Tensor, teacher: Tensor, teacher_head: Tensor, labels: Tensor) -> Tensor:
        assert student.ndim == 2 and labels.ndim == 1
        return fused(student, student_head, teacher, teacher_head, labels)

    r = rollouts()
    assert float((from_hidden(rows, flat=True)(r) - from_hidden(fused)(r)).detach()) == pytest.approx(0, abs=ALGEBRA)


@pytest.mark.parametrize("vocab_size", [2, 5, 40])
def test_heads_are_well_conditioned_and_not_symmetric(vocab_size):
    heads = []
    from_hidden(lambda s, a, t, b, y: heads.extend((a, b)) or s.sum())(rollouts(vocab_size))
    for head in heads:
        assert float(torch.linalg.cond(head)) == pytest.approx(4.0)
        assert float((head - head.T).abs().max()) > 0.1
    assert float((heads[0] - heads[1]).abs().max()) > 0.1


@pytest.mark.parametrize("vocab_size", [2, 128, 129, 400])
def test_gradients_pass_through_heads_of_any_size(vocab_size):
    r = rollouts(vocab_size)
    found, exact = (
        torch.autograd.grad(loss(r), r.student_logits)[0] for loss in (from_hidden(fused), from_logits(forward_kl))
    )
    assert float((found - exact).abs().max()) < ALGEBRA * float(exact.abs().max())


def test_a_top_k_payload_is_the_teachers_likeliest_tokens():
    r = rollouts()
    seen = []
    from_top_k(lambda logits, ids, logprobs, labels: seen.extend((ids, logprobs)) or logits.sum(), 2)(r)
    ids, logprobs = seen
    assert torch.equal(ids, r.teacher_logits.argsort(-1, descending=True)[..., :2])
    assert torch.equal(logprobs, r.teacher_logits.log_softmax(-1).gather(-1, ids))
    assert not logprobs.requires_grad


def test_the_name_of_the_function_is_kept():
    top_k = from_top_k(forward_kl, 2, names=("student_logits", None, "teacher_logits", "labels"))
    assert from_logprobs(opd.bind(Trainer.pair, beta=1.0)).__name__ == "pair"
    for loss in (from_logits(forward_kl), top_k, from_hidden(fused)):
        assert loss.__name__ in ("forward_kl", "fused")


BAD_SETTINGS = {
    "reduction": lambda: from_logprobs(forward_kl, reduction="sum"),
    "names": lambda: from_logits(forward_kl, names=("student", "teacher")),
    "of": lambda: from_advantage(forward_kl, of="u", detach=True),
    "k": lambda: from_top_k(forward_kl, 0),
    "f": lambda: from_logits("forward_kl"),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("argument", BAD_SETTINGS)
def test_a_bad_setting_is_refused_by_name(argument):
    with pytest.raises(InvalidArgumentError, match=f"^{argument}: "):
        BAD_SETTINGS[argument]()


def test_a_function_of_other_arguments_is_refused_with_what_it_would_get():
    with pytest.raises(
        InvalidArgumentError, match=r"must take 2 arguments, student_logprobs, .*got f\(p, q, mask\): .*'mask'"
    ):

        def f(p: Tensor, q: Tensor, mask: Tensor) -> Tensor:
            return (p - q) * mask

        from_logprobs(f)
    with pytest.raises(InvalidArgumentError, match="must take 3 arguments.*names="):
        from_logits(lambda student, teacher: student)
    from_logits(lambda student, teacher, labels=None, temperature=1.0: student)
    from_logits(lambda *logits: logits[0])
    with pytest.raises(InvalidArgumentError, match="must be a function as on its class, Trainer.loss, got one that is"):
        opd.bind(Trainer().loss, beta=1.0)


class Trainer:
    def loss(self, x: Tensor) -> Tensor:
        return x

    def pair(self, p: Tensor, q: Tensor) -> Tensor:
        return self.beta * (p - q)


MENDED = {
    r"one value per rollout; \.mean\(\)": from_logprobs(lambda p, q: (p - q).sum(-1)),
    r"one value per entry of the vocabulary; \.sum\(-1\)": from_logits(lambda s, t, labels: s - t),
    r"all tokens in a row; \.reshape\(2, 3\)": from_logprobs(lambda p, q: (p - q).flatten()),
    r"one per rollout; \.unsqueeze\(-1\)": from_advantage(lambda p, q: (q - p).sum(-1), detach=True),
}


@pytest.mark.parametrize("words", MENDED)
def test_a_result_of_a_common_shape_is_refused_with_what_mends_it(words):
    with pytest.raises(InvalidArgumentError, match=words):
        MENDED[words](rollouts())


BAD_RESULTS = {
    "one value per vocabulary entry": from_logits(lambda s, t, y: s - t),
    "one value per rollout": from_logprobs(lambda p, q: p.sum(-1)),
    "no tensor": from_logprobs(lambda p, q: 1.0),
    "an advantage that is a scalar": from_advantage(lambda p, q: (q - p).mean(), detach=True),
    "an advantage of wrong shape": from_advantage(lambda p, q: (q - p)[:, :1], detach=True),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("result", BAD_RESULTS)
def test_a_bad_result_is_refused(result):
    with pytest.raises(InvalidArgumentError, match="must return"):
        BAD_RESULTS[result](rollouts())


def test_logits_that_no_hidden_state_gives_are_refused():
    student = torch.zeros(1, 1, 2, dtype=torch.float64)
    student[0, 0, 1] = -torch.inf
    r = opd.Rollouts.from_logits(torch.zeros(1, 1, dtype=torch.int64), student, torch.zeros_like(student))
    with pytest.raises(InvalidArgumentError, match="student_logits: must be finite"):
        from_hidden(fused)(r)


def test_every_adapter_is_listed():
    assert set(adapters.__all__) == {"bind", *(name for name in dir(adapters) if name.startswith("from_"))}
