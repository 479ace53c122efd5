"""Generated calls of the public border, and that their judge sees what is wrong."""

from __future__ import annotations

import random

import pytest
import torch

import opdtheory as opd
from opdtheory.errors import InvalidArgumentError
from tests.fuzz import fused
from tests.fuzz.__main__ import call_number, fuzzed, main
from tests.fuzz.calls import Call, judged

CALLS = 2160


@pytest.mark.bad_input
def test_every_call_is_right_or_refused_by_name():
    counts, failures = fuzzed(7, range(CALLS))
    assert not failures
    # Both kinds are met in every family, but for one of right calls only.
    for name, found in counts.items():
        assert found["right"] > 20, name
        assert found["refused"] > 15 or name == "estimators", name


def test_a_call_can_be_made_again():
    first, second = (call_number(3, 17) for _ in range(2))
    assert first[0] == second[0]
    assert repr(first[1].arguments) == repr(second[1].arguments)


@pytest.mark.parametrize(
    "twin",
    [
        lambda f, a: -f(**a),
        lambda f, a: f(**{**a, "mask": None}),
        lambda f, a: f(**{**a, "temperature": 1.0}),
        lambda f, a: f(**{**a, "student_logits": torch.nan_to_num(a["student_logits"])}),
        lambda f, a: f(**{**a, "teacher_logits": a["teacher_logits"].reshape(a["student_logits"].shape)}),
        lambda f, a: f(**a).detach() + 0.0 * a["student_logits"].sum(-1),
        lambda f, a: f(**a) * 1.01,
        lambda f, a: f(**a).half(),
    ],
    ids=["sign", "no mask", "no temperature", "NaN let through", "any shape", "no gradient", "a percent", "rounded"],
)
def test_the_judge_sees_a_wrong_loss(monkeypatch, twin):
    """Each twin fails some of 400 calls that the library's own function passes."""
    right, calls = opd.fused_divergence, [random.Random(n) for n in range(400)]
    monkeypatch.setattr(opd, "fused_divergence", lambda **arguments: twin(right, arguments))
    assert any(judged(fused.fused(rng)).kind == "failed" for rng in calls)


def _call(run, bad=(), **arguments) -> Call:
    return Call("f", arguments, run, lambda: [torch.ones(2)], set(bad))


def test_every_other_fault_is_a_failure():
    x = torch.ones(2)

    def named():
        raise InvalidArgumentError("x", "is wrong")

    def unnamed():
        raise ValueError("something is wrong")

    def crashed():
        raise IndexError("x")

    def in_place():
        x.add_(1.0)
        return [torch.ones(2)]

    def warned():
        import warnings

        warnings.warn("x", stacklevel=1)
        return [torch.ones(2)]

    assert judged(_call(lambda: [torch.ones(2)])).kind == "right"
    assert judged(_call(named, ["x"])).kind == "refused"
    wrong = {
        "accepted": _call(lambda: [torch.ones(2)], ["x"]),
        "refused a right call": _call(named),
        "names none": _call(unnamed, ["x"]),
        "IndexError": _call(crashed, ["x"]),
        "changed its argument": _call(in_place, x=x),
        "UserWarning": _call(warned),
        "NaN": _call(lambda: [torch.tensor([1.0, torch.nan])]),
        "is finite": _call(lambda: [torch.tensor([1.0, torch.inf])]),
        "off by": _call(lambda: [torch.tensor([1.0, 1.1])]),
        "shape": _call(lambda: [torch.ones(2, 1)]),
        "parts": _call(lambda: []),
    }
    for said, call in wrong.items():
        outcome = judged(call)
        assert outcome.kind == "failed" and said in outcome.why, said


@pytest.mark.bad_input
def test_the_table_counts_the_calls(capsys):
    assert main(["--calls", "36", "--seed", "2"]) == 0
    assert "36 calls, 0 failed" in capsys.readouterr().out
    assert main(["--only", "3"]) == 0
    assert "1 calls" in capsys.readouterr().out


# What the generated calls found.


@pytest.mark.parametrize("name", ["forward_kl", "chi2", "alpha(alpha=1.5)", "jsd", "reverse_kl"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", ["student_logits", "teacher_logits"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rows", [(), (1,), (3,)])
def test_a_logit_that_is_no_number_is_refused_in_every_dtype(name, bad, which, dtype, rows):
    """A NaN of a float64 teacher passed for tokens that it lacks, and a lone row raised without a name."""
    logits = {who: torch.randn(*rows, 6, dtype=dtype) for who in ("student_logits", "teacher_logits")}
    logits[which][..., 2] = bad
    for chunk in (None, 1):
        with pytest.raises(InvalidArgumentError, match=which):
            opd.fused_divergence(**logits, divergence=name, chunk_size=chunk)


def test_rollouts_on_two_devices_are_refused():
    fields = {"tokens": torch.zeros(1, 2, dtype=torch.int64), "student_logits": torch.zeros(1, 2, 3)}
    with pytest.raises(InvalidArgumentError, match="teacher_logits.*meta"):
        opd.Rollouts.from_logits(**fields, teacher_logits=torch.zeros(1, 2, 3, device="meta"))
    with pytest.raises(InvalidArgumentError, match="tokens.*meta"):
        opd.Rollouts.from_logits(fields["tokens"].to("meta"), fields["student_logits"], fields["student_logits"])


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("named", "arguments"),
    [
        ("logits", {"logits": 3}),
        ("logits", {"logits": [None]}),
        ("logits", {"logits": [torch.zeros(1, 0).double()]}),
        ("eos", {"eos": True}),
        ("eos", {"eos": "0"}),
        ("environment", {"environment": 3}),
        ("environment", {"environment": "0"}),
    ],
)
def test_no_table_is_refused_by_name(named, arguments):
    with pytest.raises(InvalidArgumentError, match=named):
        opd.TabularPolicy(**{"logits": [torch.zeros(1, 2).double()], **arguments})


@pytest.mark.bad_input
@pytest.mark.parametrize("gamma", ["1", None, True, float("nan")])
def test_no_discount_is_refused_by_name(gamma):
    with pytest.raises(InvalidArgumentError, match="gamma"):
        opd.exact_value(*opd.random_pair(2, 2), "jsd", "token_return", gamma)


@pytest.mark.bad_input
def test_no_loss_is_refused_by_name():
    with pytest.raises(InvalidArgumentError, match="loss"):
        opd.expected_gradient(3, *opd.random_pair(2, 2))
