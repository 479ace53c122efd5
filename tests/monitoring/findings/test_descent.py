"""Where a weight falls, what a clip changes, when noise drowns a step; each finding beside a twin that has none."""

from __future__ import annotations

import math

import pytest
import torch

import opdtheory as opd
from opdtheory.monitoring import diagnose
from opdtheory.monitoring.report import Diagnosis
from tests.monitoring.runs import drawn, laws


def names(found: Diagnosis) -> list[str]:
    return [each.name for each in found.findings]


def near(estimator: str, divergence: str | None = None, apart: float = 0.5, **options) -> Diagnosis:
    """A student near its teacher, mostly less certain than it."""
    rows = drawn(*laws(200, 10, seed=0, apart=apart), rollouts=128, length=40, seed=1)
    return diagnose(rows["student"], rows["teacher"], estimator=estimator, divergence=divergence, **options)


@pytest.mark.parametrize("estimator", [("opd", "forward_kl"), ("opd", "chi2"), ("opd", "jsd"), ("k3_reward", None)])
def test_a_weight_that_falls_foresees_a_collapse(estimator):
    found = near(*estimator)
    assert found.verdict == "collapse" and found.foresees_collapse and "T4" in found.warnings[0].theorem


@pytest.mark.parametrize(
    "estimator",
    [("opd", "reverse_kl"), *(("opd_plus", d) for d in ("forward_kl", "jsd", "chi2", "hellinger")), ("k2_loss", None)],
)
def test_a_weight_that_rises_does_not(estimator):
    found = near(*estimator)
    assert not found.foresees_collapse and found.verdict == "nothing_found", str(found)


@pytest.mark.slow
def test_a_gauge_cures_jsd_and_the_finding_goes():
    """T5b: OPD with f - log(2)/2 (u - 1) descends a divergence."""
    u, log = opd.u, __import__("sympy").log
    cured = opd.Divergence.from_expr(opd.divergence("jsd").expr - log(2) / 2 * (u - 1), name="cured")
    assert near("opd", "jsd").verdict == "collapse" and near("opd", cured).verdict == "nothing_found"


def test_attracting_near_and_repelling_far():
    """f = u log u - 2 (u - 1): w'(1) = 1, but the weight falls for u > e."""
    from opdtheory.training.objective import parse_divergence

    two_sided = parse_divergence("u*log(u) - 2*(u-1)")
    close, far = (near("opd", two_sided, apart=apart) for apart in (0.2, 3.0))
    assert not close.foresees_collapse
    assert far.verdict == "collapse" and "attracts near the teacher" in far.warnings[0].sentence


def test_a_constant_weight_learns_nothing():
    found = near("k1_loss")
    assert found.verdict == "no_signal" and "no_pull" not in names(found)


def test_a_weight_that_steps_is_no_constant():
    """The sign is level on both sides of u = 1, and its expected gradient is that of the total variation."""
    found = near("sign")
    assert found.verdict == "nothing_found" and "no_pull" not in names(found)


def test_what_is_advised_is_no_noise_on_the_same_tokens():
    """OPD+ of chi2 is not advised where it would be drowned; on tokens of a thin tail it is."""
    thin = near("opd", "chi2").warnings[0]
    assert "Use opd_plus with chi2" in thin.remedy
    heavy_tail = {each.name: each for each in heavy("chi2", estimator="opd").warnings}
    assert "use opd_plus with jsd" in heavy_tail["collapse"].remedy


def test_ratios_of_whole_rollouts_are_a_limit():
    rows = drawn(*laws(50, 6, seed=3), rollouts=64, length=20, seed=4, temperature=0.8)
    given = (rows["student"], rows["teacher"], rows["behavior"])
    for importance, told in (("gspo", True), ("token", False)):
        found = diagnose(*given, estimator="opd_plus", divergence="jsd", importance=importance)
        assert any("more than the token's own ratio" in each for each in found.limits) == told


def test_the_pull_at_the_teacher_is_noted():
    assert "no_pull" in names(near("opd", "chi2")) and "no_pull" not in names(near("opd_plus", "chi2"))


def test_a_clip_is_judged_by_what_it_changes():
    wide, narrow = (near("opd_plus", "forward_kl", clip_log_ratio=bound) for bound in (8.0, 0.02))
    assert narrow.verdict == "clipped" and wide.verdict == "nothing_found"
    changed = {each.name: each.number.value for each in narrow.findings}["clipping"]
    assert changed > 0.9 and {each.name: each.number.value for each in wide.findings}["clipping"] < 1e-6
    assert "clipping" not in names(near("opd_plus", "forward_kl"))


def heavy(divergence: str, tokens: int = 40_000, estimator: str = "opd_plus") -> Diagnosis:
    """A student that almost never writes what its teacher likes: u is large on rare tokens, with index 1.5."""
    generator = torch.Generator().manual_seed(0)
    log_u = -torch.rand(tokens // 40, 40, dtype=torch.float64, generator=generator).log() / 1.5 - 0.2
    log_q = -1.0 - log_u.clamp(min=0.0) * 0.2
    return diagnose(log_q - log_u, log_q, estimator=estimator, divergence=divergence, batch_tokens=400)


def test_noise_without_a_variance_is_told_from_loud_noise():
    assert heavy("chi2").verdict == "noise"
    assert not any(heavy(divergence).foresees_collapse for divergence in ("jsd", "hellinger", "reverse_kl"))


def test_a_student_that_is_certain_and_far_has_collapsed():
    student = torch.full((40, 30), math.log(0.999))
    gone = diagnose(student, student - 3.0, estimator="opd_plus", divergence="jsd")
    assert gone.verdict == "collapse" and "collapsed onto" in gone.warnings[0].sentence
    at_teacher = diagnose(student, student - 1e-3, estimator="opd_plus", divergence="jsd")
    assert at_teacher.verdict == "nothing_found"


def test_without_rollouts_enough_for_an_interval_no_collapse_is_claimed():
    rows = drawn(*laws(200, 10, seed=0), rollouts=4, length=40, seed=1)
    found = diagnose(rows["student"], rows["teacher"], estimator="opd", divergence="forward_kl")
    assert not found.foresees_collapse and any("fewer than 8" in each for each in found.limits)
