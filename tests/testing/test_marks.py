"""Marks: what they keep, which verdicts meet them, and which make no sense."""

from __future__ import annotations

import functools

import pytest

import opdtheory as opd
from opdtheory.errors import InvalidArgumentError
from opdtheory.testing import (
    opd_loss,
)
from opdtheory.testing.marks import claims_of
from tests.losses import k2


@functools.cache
def reports() -> dict[float, opd.Audit]:
    return {scale: opd.audit(lambda r, scale=scale: scale * k2(r), "reverse_kl") for scale in (0.0, 1.0, 2.0)}


def test_marks_leave_the_function_alone_and_add_up():
    def loss(r):
        return r.token_sum(r.log_u)

    marked = opd_loss("jsd", "sequence", "biased", gamma=0.5, eos=0)(
        opd_loss(claims=opd.divergence("alpha", alpha=0.5))(loss)
    )
    assert marked is loss
    assert [claim.label for claim in claims_of(loss)] == [
        "jsd-sequence-eos=0-gamma=0.5",
        "alpha(alpha=0.5)-token_local",
    ]
    assert claims_of(print) == () and claims_of(object) == () and claims_of(None) == ()


@pytest.mark.parametrize(
    ("asked", "met"), [("exact", {"exact"}), ("exact_up_to_scale", {"exact", "exact_up_to_scale"})]
)
def test_which_verdicts_meet_a_mark(asked, met):
    @opd_loss("jsd", verdict=asked)
    def loss(r):
        return r

    (claim,) = claims_of(loss)
    named = {"exact": reports()[1.0], "exact_up_to_scale": reports()[2.0], "zero": reports()[0.0]}
    assert {name: report.verdict for name, report in named.items()} == {name: name for name in named}
    assert {name for name, report in named.items() if claim.is_met_by(report)} == met


def unmasked(r):
    """Right at fixed length, and padding is counted as text."""
    return (r.log_u.square() / 2).sum() / len(r.tokens)


def test_an_unsound_loss_meets_no_claim_of_exactness():
    report = opd.audit(unmasked, "reverse_kl")
    assert not report.faithful
    for verdict in ("exact", "exact_up_to_scale"):
        (claim,) = claims_of(opd_loss("reverse_kl", verdict=verdict)(lambda r: r))
        assert not claim.is_met_by(report)
    # What is said to be wrong is: a claim of the verdict that was found.
    (claim,) = claims_of(opd_loss("jsd", verdict="biased")(lambda r: r))
    assert claim.is_met_by(opd.audit(lambda r: r.token_sum(r.log_u**3), "jsd"))


def test_the_projects_settings_fill_in_what_a_mark_leaves_out():
    project = {"objective": "jsd", "granularity": "sequence", "eos": 0, "seed": 3}
    (bare,) = claims_of(opd_loss()(lambda r: r))
    (own,) = claims_of(opd_loss("chi2", "token_local", eos=None, batch_size=2)(lambda r: r))
    assert bare.within(project).label == "jsd-sequence-eos=0-seed=3"
    assert own.within(project).label == "chi2-token_local-batch_size=2-eos=None-seed=3"
    assert bare.within({}).label == "no objective-token_local" and own.within({}) == own


def test_marks_of_static_and_class_methods_are_found_in_either_order():
    class Losses:
        @opd_loss("jsd")
        @staticmethod
        def above(r):
            return r

        @staticmethod
        @opd_loss("jsd")
        def below(r):
            return r

        @opd_loss("chi2")
        @classmethod
        @opd_loss("jsd")
        def both(cls, r):
            return r

        @staticmethod
        def unmarked(r):
            return r

    found = {name: [claim.claims for claim in claims_of(member)] for name, member in vars(Losses).items()}
    assert {name: found[name] for name in ("above", "below", "both", "unmarked")} == {
        **{"above": ["jsd"], "below": ["jsd"]},
        **{"both": ["chi2", "jsd"], "unmarked": []},
    }


def test_marks_that_make_no_sense_are_refused():
    for arguments, name in (({"granularity": "word"}, "granularity"), ({"verdict": "fine"}, "verdict")):
        with pytest.raises(InvalidArgumentError, match=name):
            opd_loss("jsd", **arguments)
    with pytest.raises(InvalidArgumentError, match="claims"):
        opd_loss(k2)
    with pytest.raises(InvalidArgumentError, match="loss: must be a function, got class Losses; mark its method"):
        opd_loss("jsd")(type("Losses", (), {}))
    with pytest.raises(InvalidArgumentError, match="call: must be an expression"):
        opd_loss("jsd", call="f(")
    with pytest.raises(InvalidArgumentError, match="Estimator"):
        opd_loss("jsd")(opd.estimator("opd_plus", "jsd"))
