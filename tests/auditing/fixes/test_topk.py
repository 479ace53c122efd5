"""Losses of the k likeliest tokens recognised from outside."""

from __future__ import annotations

import pytest

import opdtheory as opd
from opdtheory.auditing.fixes.topk import TopKForm, recognise
from tests.auditing.fixes.losses import times, zoo


@pytest.mark.parametrize("form", ["topk_truncated", "topk_renormalised", "topk_tail"])
def test_recognises_the_form_of_a_top_k_loss(form: str) -> None:
    divergence = opd.divergence("hellinger")
    expected = TopKForm(form, 2, "student")
    assert recognise(times(2.0, zoo(form, divergence, k=2, support="student")), divergence) == expected
    assert recognise(zoo("full_vocab", "jsd"), divergence) is None
    assert recognise(zoo("opd_plus", divergence), divergence) is None
