"""Numbers fitted to samples."""

from __future__ import annotations

import math

import opdtheory as opd
from opdtheory.auditing.naming.knob import knob_of
from opdtheory.auditing.sampling.fitting import _least, fitted, knob_range, shortened
from opdtheory.auditing.sampling.montecarlo import Search
from opdtheory.auditing.scenario import Scenario
from opdtheory.objective import Objective


def test_the_range_of_a_fitted_number_is_that_of_the_samples() -> None:
    """With a control that leaves noise the truth is inside, a far value is not, and the shortest decimal is chosen."""
    loss = opd.estimator("opd_plus", opd.divergences.skew_jsd(0.25))
    claim = Objective.of(opd.divergence("jsd"))
    search = Search(loss, Scenario().pairs()[3:4], claim, Scenario(seed=3), 0.01, 400, 30.0)
    search.run(0.05)
    knob = knob_of(next(each for each in fitted(search) if each.divergence.name == "skew_jsd"))
    assert knob is not None
    low, high = knob_range(search, knob)
    assert low < 0.25 < high and high - low < 0.5
    assert search.excludes(knob.turned(min(high + 0.05, 0.99))) and not search.excludes(knob.turned(0.25))
    assert low <= shortened(knob, (low, high)) <= high
    assert shortened(knob, (knob.value, knob.value)) == knob.value


def test_an_infinite_misfit_is_no_number_to_reckon_with() -> None:
    """Warnings are errors: differences of infinities would be one."""
    value, misfit = _least(lambda x: math.inf if x < 0.5 else (x - 0.7) ** 2, 0.0, 1.0)
    assert abs(value - 0.7) < 1e-3 and misfit < 1e-6
    assert _least(lambda x: math.inf, 0.0, 1.0)[1] == math.inf
