"""Names from samples: confirmed on fresh draws, or not given."""

from __future__ import annotations

import pytest

import opdtheory as opd
from opdtheory.auditing.naming.knob import knob_of
from opdtheory.auditing.naming.recover import RecoveredWeight
from opdtheory.auditing.sampling.followed import CONFIRMATIONS, Named, _coincident, name_followed
from opdtheory.auditing.sampling.montecarlo import Search
from opdtheory.auditing.sampling.scout import Scout
from opdtheory.auditing.scenario import Scenario
from opdtheory.objective import Objective
from tests.auditing.sampling.pairs import Loss
from tests.sparse import some


def named(loss: Loss, claim: str, scout: Scout | None = None, batch_size: int = 1, seed: int = 0) -> Named | None:
    """The name at a batch size, from samples alone unless there is a scout."""
    cases = Scenario(1).pairs()[1:4:2]

    numbers: list[int] = []

    def restart(objective: Objective, number: int) -> Search:
        numbers.append(number)
        return Search(loss, cases, objective, Scenario(batch_size, seed=seed + 100 * number), 1e-6, 20_000, 30.0)

    search = restart(Objective.of(opd.divergence(claim)), 0)
    assert search.run(0.05) == "biased"
    found = name_followed(search, scout, restart, batch_size, 0.05)
    # The first is the search itself; each other one has its share of the error rate, and its own draws.
    assert len(set(numbers)) == len(numbers) <= 1 + CONFIRMATIONS
    return found


@pytest.mark.parametrize(
    ("loss", "label", "granularity", "gamma"),
    some(
        [
            (opd.estimator("return_to_go", "jsd", gamma=0.8, discounted=True), "jsd", "token_return", 0.8),
            (opd.estimator("k3_reward"), "reverse_kl - forward_kl", "token_local", 1.0),
        ],
        2,
    ),
    ids=["discount", "signed sum"],
)
@pytest.mark.slow
def test_names_from_samples_alone(loss: Loss, label: str, granularity: str, gamma: float) -> None:
    found = named(loss, "hellinger")
    assert found is not None
    assert (found.objective.label, found.objective.granularity, found.objective.gamma) == (label, granularity, gamma)
    assert found.identified["error"] < 1e-6
    low, high = found.identified["fitted_range"]
    knob = knob_of(found.objective)
    assert knob is not None and low <= knob.value <= high


def test_a_loss_of_no_objective_is_not_named() -> None:
    """T6: without the outer discount; and a wrong conjecture is not believed."""
    wrong = Scout(2, Objective.of(opd.divergence("forward_kl")), RecoveredWeight.unknown(), None)
    assert named(opd.estimator("return_to_go", "jsd", gamma=0.5), "jsd", wrong) is None


def test_objectives_coincide_for_the_reverse_kl_alone() -> None:
    """T6c: its return and its sequence objective have one gradient."""
    loss = opd.estimator("opd_plus", opd.divergences.skew_jsd(0.25))
    claim = Objective.of(opd.divergence("jsd"))
    search = Search(loss, Scenario().pairs()[3:4], claim, Scenario(seed=3), 0.01, 400, 30.0)
    for name, alike in (("reverse_kl", ["token_return"]), ("forward_kl", [])):
        others = _coincident(Objective.of(opd.divergence(name), "sequence"), search)
        assert [other.granularity for other in others] == alike
