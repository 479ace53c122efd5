"""The noise floor, and the claims held to it."""

from __future__ import annotations

import pytest

from opdtheory.reproduction.claims import claims, difference, noise_floor
from opdtheory.reproduction.plan import TWINS
from opdtheory.reproduction.summary import summaries
from tests.reproduction.rows import world


def test_nothing_below_the_noise_floor_is_claimed():
    rows = world()
    table = summaries(rows)
    floor = noise_floor(table)
    assert floor.pairs == 6 and floor.rms == pytest.approx(0.02) and floor.single > floor.largest
    assert floor.over(3) == pytest.approx(floor.single / 3**0.5)
    gap = {each.name: each for each in table}
    assert difference(gap["reverse_kl/opd_plus"], gap["reverse_kl/opd"]) == (pytest.approx(0.01), 3)
    found = {(claim, task): verdict for claim, task, verdict, _ in claims(table)}
    assert found[("OPD+ gains a little for the reverse KL", "arithmetic")] == "does not reproduce"
    better = claims(summaries(world(**{"reverse_kl/opd_plus": 0.7})))
    assert [verdict for claim, _, verdict, _ in better if claim.startswith("OPD+")] == ["reproduces"]
    # A floor above all that the baseline itself gains leaves nothing to compare.
    dull = claims(
        summaries(world(**{"reverse_kl/opd": 0.21, TWINS["reverse_kl/opd"]: 0.21, "reverse_kl/opd_plus": 0.21}))
    )
    assert [verdict for claim, _, verdict, _ in dull if claim.startswith("OPD+")] == ["not resolved"]
    assert noise_floor(summaries([each for each in rows if each["group"] != "twin"])) is None


def test_claims_turn_with_the_rows():
    def verdicts(rows: list[dict]) -> list[str]:
        return [verdict for _, _, verdict, _ in claims(summaries(rows))]

    # In order: two collapses, two that train, two that match the baseline, the gain.
    assert verdicts(world()) == [*["reproduces"] * 4, "does not reproduce", "reproduces", "does not reproduce"]
    turned = {"forward_kl/opd": 0.6, "jsd/opd_plus": 0.0, TWINS["jsd/opd_plus"]: 0.01}
    assert verdicts(world(**turned)) == [
        *("does not reproduce", "reproduces", "reproduces", "does not reproduce"),
        *("does not reproduce", "does not reproduce", "does not reproduce"),
    ]
