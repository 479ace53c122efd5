"""Numbers, formulas and prose as HTML."""

from __future__ import annotations

from opdtheory.rendering.html import formula, number, prose


def test_numbers_and_formulas_read_as_in_print():
    assert number(-0.5) == "−0.5" and number(1.5e-12) == "1.5 × 10<sup>−12</sup>" and number(3) == "3"
    assert number(None) == "–" and number(float("-inf")) == "−∞" and number(float("nan")) == "not a number"
    assert formula("u**2*log(u)") == "<span class='formula'><var>u</var><sup>2</sup> log(<var>u</var>)</span>"
    assert formula("-u**(1/2)") == "<span class='formula'>−<var>u</var><sup>1/2</sup></span>"
    assert formula("u**(a*(b))") == "<code>u**(a*(b))</code>" and formula(None) == ""
    assert "<b>" not in formula("<b>u</b>")
    assert prose("w - w(1) -> -0.3, like -u^2 as u -> inf <b>") == (
        "w − w(1) → −0.3, like −u<sup>2</sup> as u → ∞ &lt;b&gt;"
    )
    assert prose("whole-vocabulary, k-1, f(u)-1") == "whole-vocabulary, k-1, f(u)-1" and prose(None) == ""
