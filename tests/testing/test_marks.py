"""Marks: what they keep, which verdicts meet them, and which make no sense."""

from __future__ import annotations

import pytest

import opdtheory as opd
from opdtheory.errors import InvalidArgumentError
from opdtheory.testing import (
    opd_loss,
)
from opdtheory.testing.marks import claims_of
from tests.losses import k2


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
    assert {verdict for verdict in ("exact", "exact_up_to_scale", "biased", "zero") if claim.is_met_by(verdict)} == met


def test_marks_that_make_no_sense_are_refused():
    for arguments, name in (({"granularity": "word"}, "granularity"), ({"verdict": "fine"}, "verdict")):
        with pytest.raises(InvalidArgumentError, match=name):
            opd_loss("jsd", **arguments)
    with pytest.raises(InvalidArgumentError, match="claims"):
        opd_loss(k2)
    with pytest.raises(InvalidArgumentError, match="Estimator"):
        opd_loss("jsd")(opd.estimator("opd_plus", "jsd"))
