"""How a function is called that does not take rollouts alone."""

from __future__ import annotations

import pytest

import opdtheory as opd
from opdtheory.errors import InvalidArgumentError
from opdtheory.testing.calls import called
from tests.losses import k2


def half_square(teacher, student):
    return (teacher - student).square() / 2


@pytest.mark.parametrize(
    "call",
    [
        "r.token_sum(f(r.teacher_logprobs, r.student_logprobs))",
        " r.token_sum(f(*[r.teacher_logprobs, r.student_logprobs])) ",
        "opdtheory.from_logprobs(f)(r)",
        "torch.where(r.mask > 0, f(r.teacher_logprobs, r.student_logprobs), 0.0).sum() / len(r.mask)",
        lambda f, r: r.token_sum(f(r.teacher_logprobs, r.student_logprobs)),
    ],
)
def test_an_expression_or_a_function_calls_it(call):
    assert opd.audit(called(half_square, call), "reverse_kl", details=False).verdict == "exact"


def test_without_a_call_it_is_the_function_itself():
    assert called(k2, None) is k2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("r.token_sum(", "must be an expression of f and r, got 'r.token_sum(': "),
        ("x = f(r)", "must be an expression of f and r"),
        ("return f(r)", "must be an expression of f and r"),
        ("", "must be an expression of f and r"),
        ("f(r)\0", "must be an expression of f and r"),
        ("(" * 5000 + ")" * 5000, "must be an expression of f and r"),
    ],
)
def test_what_is_no_expression_is_refused(call, words):
    with pytest.raises(InvalidArgumentError) as caught:
        called(k2, call)
    assert caught.value.argument == "call" and words in str(caught.value)


@pytest.mark.bad_input
@pytest.mark.parametrize("call", [3, ("f", "r"), b"f(r)"])
def test_what_is_neither_is_refused(call):
    with pytest.raises(InvalidArgumentError, match="must be an expression or a function"):
        called(k2, call)
