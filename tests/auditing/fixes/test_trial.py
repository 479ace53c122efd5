"""The verdict on changed losses: that of an audit; a change with a wrong sign or factor is refused."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

import opdtheory as opd
from opdtheory.auditing import quick_verdict
from opdtheory.auditing.fixes import changes
from opdtheory.auditing.fixes.trial import Trial
from opdtheory.exact import Loss
from opdtheory.rollouts import Rollouts
from tests.auditing.fixes.losses import FAITHFUL, asked, k1_loss, times, zoo


def log_slope(r: Rollouts) -> Tensor:
    return opd.divergence("forward_kl").log_slope(r.log_u.detach())


WRONG: dict[str, tuple[Loss, Loss, str, dict[str, Any]]] = {
    "slope subtracted": (
        changes.advantage_added(zoo("opd", "forward_kl"), log_slope),
        changes.advantage_added(zoo("opd", "forward_kl"), lambda r: -log_slope(r)),
        "forward_kl",
        {},
    ),
    "slope by a thousandth too large": (
        changes.advantage_added(zoo("opd", "forward_kl"), log_slope),
        changes.advantage_added(zoo("opd", "forward_kl"), lambda r: 1.001 * log_slope(r)),
        "forward_kl",
        {},
    ),
    "reward of the wrong sign": (
        changes.value_as_reward(k1_loss),
        changes.scaled(changes.value_as_reward(k1_loss), -1.0),
        "reverse_kl",
        {},
    ),
    "ratio upside down": (
        zoo("opd_plus", "jsd", importance="prefix"),
        changes.weighted_tokens(
            zoo("opd_plus", "jsd"), lambda r: (r.behavior_logprobs - r.student_logprobs).cumsum(-1).exp()
        ),
        "jsd",
        {"off_policy": 0.5},
    ),
    "divided by the length": (
        changes.weighted_tokens(zoo("opd_plus", "jsd", reduction="sequence_mean"), changes.rollout_lengths),
        changes.weighted_tokens(
            zoo("opd_plus", "jsd", reduction="sequence_mean"), lambda r: 1 / changes.rollout_lengths(r)
        ),
        "jsd",
        {"eos": 0},
    ),
    "G-1 over G": (
        changes.scaled(zoo("opd_plus", "jsd", baseline="group_mean"), 2.0),
        changes.scaled(zoo("opd_plus", "jsd", baseline="group_mean"), -2.0),
        "jsd",
        {"batch_size": 2},
    ),
}


@pytest.mark.parametrize("twin", WRONG)
def test_a_wrong_twin_is_refused(twin: str) -> None:
    right, wrong, objective, settings = WRONG[twin]
    trial = Trial(right, *asked(objective, **settings))
    assert trial(right)[0] in FAITHFUL
    assert trial(wrong)[0] == "biased"


@pytest.mark.parametrize(
    ("loss", "objective", "settings"),
    [
        (zoo("opd_plus", "jsd"), "jsd", {}),
        (times(2.0, zoo("k2_loss")), "reverse_kl", {"eos": 0}),
        (zoo("opd", "chi2"), "chi2", {}),
        (k1_loss, "reverse_kl", {}),
        (zoo("opd_plus", "jsd"), "jsd", {"off_policy": 0.3}),
        (zoo("opd_plus", "jsd", baseline="leave_one_out"), "jsd", {"batch_size": 2}),
        (zoo("opd_plus", "jsd", zscore=True), "jsd", {"batch_size": 2}),
    ],
    ids=["exact", "scale", "biased", "zero", "off-policy", "group", "z-score"],
)
def test_a_trial_says_what_the_audit_says(loss: Loss, objective: str, settings: dict[str, Any]) -> None:
    trial = Trial(loss, *asked(objective, **settings))
    assert trial(loss)[0] == quick_verdict(loss, objective, **settings)


def test_a_trial_may_look_at_every_pair() -> None:
    loss = zoo("opd", "chi2")
    trial = Trial(loss, *asked("chi2"))
    early, late = trial(loss), trial(loss, to_the_end=True)
    assert early[0] == late[0] == "biased" and early[1] < late[1]
