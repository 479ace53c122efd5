"""Suggested calls: read from the parameters' names, and right when they are run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from opdtheory.auditing.auditor import quick_verdict
from opdtheory.testing.calls import called
from opdtheory.testing.hints import signature_of, suggestion, takes_rollouts_alone
from tests.losses import k2


def k2_of_two(teacher, student):
    return (teacher - student).square() / 2


def k2_of_names(log_p, *, log_q, loss_mask=None):
    assert loss_mask is not None
    return ((log_q - log_p).square() / 2 * loss_mask).sum() / len(loss_mask)


def camel(policyLogProbs, refLogProbs, paddingMask):
    return torch.where(paddingMask, 0.0, (refLogProbs - policyLogProbs).square() / 2)


def reward(per_token_logps, advantages, completion_mask):
    return -(per_token_logps * advantages * completion_mask).sum() / len(completion_mask)


def ratio(logprobs, old_logprobs, ref_logprobs):
    return -(ref_logprobs - logprobs).detach() * (logprobs - old_logprobs).exp()


def of_logits(logits, teacher_logits, temperature=1.0):
    log_p, log_q = (each.div(temperature).log_softmax(-1) for each in (logits, teacher_logits))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def of_distributions(p, q):
    return (p * (p / q).log()).sum(-1)


def of_log_distributions(student_log_probs, teacher_log_probs):
    return F.kl_div(teacher_log_probs, student_log_probs, log_target=True, reduction="none").sum(-1)


def entries(student_logits, teacher_logits):
    return F.kl_div(teacher_logits.log_softmax(-1), student_logits.log_softmax(-1), log_target=True, reduction="none")


def of_labels(labels, t_logits, s_logits):
    return of_logits(s_logits, t_logits)


def of_optional_labels(student, teacher, labels=None, beta=1.0):
    assert labels is not None
    return beta * of_logits(student, teacher)


def of_top_k(student_logits, teacher_topk_logprobs, teacher_topk_ids):
    log_p = student_logits.log_softmax(-1).gather(-1, teacher_topk_ids)
    return (teacher_topk_logprobs.exp() * (teacher_topk_logprobs - log_p)).sum(-1)


def of_top_k_in_order(student_logits, indices, values, labels):
    return of_top_k(student_logits, values, indices)


def of_mixed_owners(ref_policy_logps, old_policy_logps, new_policy_logps):
    return ratio(new_policy_logps, old_policy_logps, ref_policy_logps)


def fused(student_input, student_weight, teacher_input, teacher_weight, true_labels):
    return of_logits(student_input @ student_weight.T, teacher_input @ teacher_weight.T)


def fused_by_keyword(*, teacher_hidden, teacher_head, hidden_states, lm_head):
    return fused(hidden_states, lm_head, teacher_hidden, teacher_head, None)


class Trainer:
    def loss(self, student_logps, teacher_logps):
        return k2_of_two(teacher_logps, student_logps)

    def of_rollouts(self, rollouts):
        return k2(rollouts)

    def of_labels(self, logits, teacher_logits, labels):
        return of_logits(logits, teacher_logits)


class Module(torch.nn.Module):
    def forward(self, student_logits, teacher_logits):
        return of_logits(student_logits, teacher_logits)


class Callable_:
    def __call__(self, student, teacher):
        return k2_of_two(teacher, student)


# The function, the whole call, and the divergence that the call then minimises.
SUGGESTED = [
    (k2_of_two, "r.token_sum(f(r.teacher_logprobs, r.student_logprobs))", "reverse_kl"),
    (k2_of_names, "f(r.student_logprobs, log_q=r.teacher_logprobs, loss_mask=r.mask)", "reverse_kl"),
    (camel, "r.token_sum(f(r.student_logprobs, r.teacher_logprobs, r.mask == 0))", "reverse_kl"),
    (reward, "f(r.student_logprobs, r.log_u.detach(), r.mask)", "reverse_kl"),
    (ratio, "r.token_sum(f(r.student_logprobs, r.behavior_logprobs, r.teacher_logprobs))", "reverse_kl"),
    (of_logits, "r.token_sum(f(r.student_logits, r.teacher_logits))", "reverse_kl"),
    (of_distributions, "r.token_sum(f(r.student_logits.softmax(-1), r.teacher_logits.softmax(-1)))", "reverse_kl"),
    (
        of_log_distributions,
        "r.token_sum(f(r.student_logits.log_softmax(-1), r.teacher_logits.log_softmax(-1)))",
        "reverse_kl",
    ),
    (entries, "r.token_sum(f(r.student_logits, r.teacher_logits).sum(-1))", "reverse_kl"),
    (of_labels, 'opdtheory.from_logits(f, names=("s_logits", "t_logits", "labels"))(r)', "reverse_kl"),
    (of_optional_labels, "opdtheory.from_logits(f)(r)", "reverse_kl"),
    (
        of_top_k,
        'opdtheory.from_top_k(f, 2, names=("student_logits", "teacher_topk_ids", "teacher_topk_logprobs", None))(r)',
        None,
    ),
    (of_top_k_in_order, "opdtheory.from_top_k(f, 2)(r)", None),
    (
        of_mixed_owners,
        "r.token_sum(f(r.teacher_logprobs, r.behavior_logprobs, r.student_logprobs))",
        "reverse_kl",
    ),
    (fused, "opdtheory.from_hidden(f)(r)", "reverse_kl"),
    (
        fused_by_keyword,
        'opdtheory.from_hidden(f, names=("hidden_states", "lm_head", "teacher_hidden", "teacher_head", None))(r)',
        "reverse_kl",
    ),
    (Trainer.loss, "r.token_sum(opdtheory.bind(f)(r.student_logprobs, r.teacher_logprobs))", "reverse_kl"),
    (Trainer.of_rollouts, "opdtheory.bind(f)(r)", "reverse_kl"),
    (Trainer.of_labels, "opdtheory.from_logits(opdtheory.bind(f))(r)", "reverse_kl"),
    (Module, "r.token_sum(f()(r.student_logits, r.teacher_logits))", "reverse_kl"),
    (Module(), "r.token_sum(f(r.student_logits, r.teacher_logits))", "reverse_kl"),
    (Callable_, "r.token_sum(f()(r.student_logprobs, r.teacher_logprobs))", "reverse_kl"),
    (Callable_(), "r.token_sum(f(r.student_logprobs, r.teacher_logprobs))", "reverse_kl"),
]


@pytest.mark.parametrize(
    ("function", "call", "objective"), SUGGESTED, ids=[getattr(f, "__qualname__", "instance") for f, *_ in SUGGESTED]
)
def test_the_whole_call_is_suggested_and_right(function, call, objective):
    found = suggestion(function)
    assert found is not None and found.call == call
    loss = called(function, found.call)
    if objective is None:
        # The two likeliest tokens are not the whole vocabulary.
        assert quick_verdict(loss, "forward_kl") == "biased"
    else:
        assert quick_verdict(loss, objective) == "exact"


def test_the_words_name_the_adapter():
    for function, word in ((of_labels, "from_logits"), (of_top_k, "from_top_k"), (Trainer.loss, "bind")):
        assert f"opdtheory.{word}" in suggestion(function).words
    assert "shifted=True" in suggestion(of_labels).words
    both = suggestion(Trainer.of_labels).words
    assert "bind" in both and "from_logits" in both


def needs_values(student_logprobs, teacher_logprobs, beta, *, something):
    raise AssertionError("is not called with dots")


def test_dots_stand_for_what_is_not_known():
    found = suggestion(needs_values)
    assert found.call == "r.token_sum(f(r.student_logprobs, r.teacher_logprobs, beta=..., something=...))"
    assert "your values in place of the dots" in found.words


class Configured:
    def loss(self, student_logps, teacher_logps):
        self.calls = self.args.beta
        return self.args.beta * (student_logps - teacher_logps) + self.offset


def test_the_attributes_that_a_method_reads_are_named():
    call = "r.token_sum(opdtheory.bind(f, args=..., calls=..., offset=...)(r.student_logprobs, r.teacher_logprobs))"
    assert suggestion(Configured.loss).call == call


def of_labels_and_fails(logits, labels):
    raise KeyError(labels)


def noisy(teacher, student):
    print("noise")
    raise SystemExit(0)


def test_a_function_that_fails_on_the_trial_is_still_told_how(capsys):
    found = suggestion(noisy)
    assert found.call == "r.token_sum(f(r.teacher_logprobs, r.student_logprobs))"
    assert found.words == "say how to call it, though this failed when it was tried"
    assert "failed" not in suggestion(k2_of_two).words + suggestion(of_labels).words + suggestion(needs_values).words
    assert "failed" in suggestion(of_labels_and_fails).words
    assert capsys.readouterr().out == ""


def test_what_has_no_parameters_gets_no_suggestion():
    assert suggestion(lambda: 0) is None and suggestion(print) is None and suggestion(dict) is None


def test_which_functions_take_rollouts_alone():
    assert takes_rollouts_alone(k2) and takes_rollouts_alone(print) and takes_rollouts_alone(Trainer().of_rollouts)
    assert takes_rollouts_alone(lambda r, scale=1.0: r)
    for function in (k2_of_two, Trainer.of_rollouts, Module, lambda: 0, lambda r, *, k: r):
        assert not takes_rollouts_alone(function)


def test_a_signature_is_shown_as_it_was_written():
    assert signature_of(k2_of_two) == "k2_of_two(teacher, student)"
    assert signature_of(Trainer.loss) == "loss(self, student_logps, teacher_logps)"
