"""Verdicts from samples: certain, or said not to be."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import opdtheory as opd
from opdtheory.auditing import quick_verdict
from opdtheory.auditing.sampling.montecarlo import monte_carlo_compare
from opdtheory.auditing.scenario import Scenario
from opdtheory.errors import InvalidArgumentError, LossError
from opdtheory.exact import exact_gradient
from opdtheory.objective import Objective
from opdtheory.rollouts import Rollouts
from tests.auditing.sampling.pairs import long_case, small_case


def _compare(loss, cases, divergence="reverse_kl", granularity="token_local", gamma=1.0, **settings):
    """The comparison, with the settings of the claim, of the scenario and of the budget together."""
    words = {key: settings.pop(key) for key in ("batch_size", "seed", "shared_prompt") if key in settings}
    claim = Objective.of(opd.divergence(divergence), granularity, gamma)
    return monte_carlo_compare(loss, cases, claim, Scenario(**words), **{"seconds": 60.0, **settings})


@pytest.mark.parametrize("shared_prompt", [False, True])
def test_prompts_and_groups_agree_with_the_exact_expectation(shared_prompt: bool) -> None:
    """Centred by the group's mean over whole rollouts: a multiple of the exact gradient either way."""

    def centred(r: Rollouts) -> torch.Tensor:
        advantages = (r.mask * r.log_u.detach()).sum(-1, keepdim=True)
        return r.token_sum(-((advantages - advantages.mean(0)) * r.student_logprobs))

    case = Scenario(2, prompts=2, shared_prompt=shared_prompt).pairs()[3]
    exact = torch.cat([g.flatten() for g in exact_gradient(case.student, case.teacher, "reverse_kl", "sequence")])
    expected = opd.expected_gradient(centred, case.student, case.teacher, 2, shared_prompt=shared_prompt)
    gap = torch.cat([g.flatten() for g in expected]) - exact / 2
    assert float(gap.abs().max()) < 1e-12
    result = _compare(centred, [case], "reverse_kl", "sequence", batch_size=2, shared_prompt=shared_prompt)
    assert result.verdict == "exact_up_to_scale", result.words
    assert result.scale is not None and result.scale[0] <= 0.5 <= result.scale[1]


_ZOO = [
    (1, "opd_plus", "jsd", {}),
    (1, "opd_plus", "chi2", {"importance": "prefix"}),
    (1, "opd", "forward_kl", {}),
    (1, "opd", "jsd", {}),
    (1, "k1_loss", None, {}),
    (1, "k2_loss", None, {}),
    (1, "k3_loss", None, {}),
    (1, "sign", None, {}),
    (1, "full_vocab", "jsd", {}),
    (1, "topk_tail", "jsd", {"k": 1}),
    (1, "topk_reward", "jsd", {"k": 2}),
    (1, "return_to_go", "jsd", {"gamma": 1.0}),
    (1, "return_to_go", "jsd", {"gamma": 0.5}),
    (1, "sequence_opd_plus", "forward_kl", {}),
    (2, "opd_plus", "jsd", {"baseline": "leave_one_out"}),
    (2, "opd_plus", "jsd", {"baseline": "group_mean"}),
    (2, "opd_plus", "jsd", {"zscore": True}),
    (2, "opd_plus", "jsd", {"reduction": "token_mean"}),
]


@pytest.mark.parametrize(("batch_size", "name", "divergence", "options"), _ZOO)
def test_verdicts_agree_with_the_exact_audit(batch_size: int, name: str, divergence: str | None, options: dict) -> None:
    loss = opd.estimator(name, divergence, **options)
    claim = loss.claim
    cases = Scenario(2).pairs()[3:5]
    claimed = (claim.divergence, claim.granularity)
    expected = quick_verdict(loss, *claimed, batch_size=batch_size, gamma=claim.gamma)
    result = _compare(loss, cases, *claimed, gamma=claim.gamma, batch_size=batch_size)
    assert result.verdict == expected, result.words


def test_off_policy_needs_the_ratio() -> None:
    case = small_case(3, 3, off_policy=0.5)
    assert _compare(opd.estimator("opd_plus", "jsd"), [case], "jsd").verdict == "biased"
    assert _compare(opd.estimator("opd_plus", "jsd", importance="prefix"), [case], "jsd").verdict == "exact"


def test_names_what_is_followed_instead() -> None:
    result = _compare(opd.estimator("k3_loss"), Scenario(1).pairs()[3:5], "reverse_kl")
    assert result.verdict == "biased"
    assert result.follows is not None
    assert (result.follows["objective"], result.follows.granularity) == ("forward_kl", "token_local")
    assert _compare(opd.estimator("opd", "forward_kl"), Scenario(1).pairs()[3:5], "forward_kl").follows is None
    assert "follows forward_kl" in result.words


@pytest.mark.bad_input
def test_sequences_that_nobody_can_enumerate() -> None:
    """32**16 sequences in groups of 8, of policies that `Case` is not annotated for."""
    case = long_case()
    for options, verdict in (
        ({"baseline": "leave_one_out"}, "exact"),
        ({"zscore": True}, "biased"),
    ):
        loss = opd.estimator("opd_plus", "forward_kl", **options)
        result = _compare(loss, [case], "forward_kl", batch_size=8)
        assert result.verdict == verdict, result.words
        assert not result.separable


def test_a_leak_over_padding_is_seen() -> None:
    def leaky(r: Rollouts) -> torch.Tensor:
        kept = r.token_sum(-(r.log_u.detach() * r.student_logprobs))
        return kept + 0.3 * ((1 - r.mask) * r.student_logprobs).sum() / len(r.tokens)

    case = small_case(4, 4, eos=0, seed=1)
    assert _compare(leaky, [case], "reverse_kl").verdict == "biased"
    assert _compare(opd.estimator("k2_loss"), [case], "reverse_kl").verdict == "exact"


@pytest.mark.parametrize("size", [1e-2, 1e-6])
def test_a_small_smooth_bias_is_found(size: float) -> None:
    """The control leaves the bias alone, and its noise is as small as it is."""

    def loss(r: Rollouts) -> torch.Tensor:
        log_u = r.log_u.detach()
        return r.token_sum(-((log_u + size * torch.sin(3 * log_u)) * r.student_logprobs))

    result = _compare(loss, Scenario(1).pairs()[3:4], "reverse_kl")
    assert result.verdict == "biased"
    assert 0.0 < result.relative_bias[0] < size


def test_a_tiny_budget_ends_undecided() -> None:
    loss = opd.estimator("opd_plus", "jsd", zscore=True)
    result = _compare(loss, [small_case()], "jsd", batch_size=4, max_batches=8, seconds=30.0)
    assert result.verdict == "undecided"
    assert "budget ended" in result.words
    assert result.relative_bias[1] == float("inf")
    assert result.batches <= 8


def test_a_margin_that_is_not_reached_ends_undecided() -> None:
    """Without bias, but noisy beside every control: only more rollouts could certify it."""

    def noisy(r: Rollouts) -> torch.Tensor:
        wild = 30.0 * torch.cos(5.0 * r.tokens[1, 0])
        return r.token_sum(r.log_u.square() / 2) + wild * r.student_logprobs[0].sum()

    result = _compare(noisy, [small_case()], "reverse_kl", batch_size=2, max_batches=640)
    assert result.verdict == "undecided"
    low, high = result.relative_bias
    assert low == 0.0 and high > 0.05


def test_an_unbiased_loss_is_never_found_biased() -> None:
    """Four seeds at 99 %: a top-k reward is zero, and no control equals it."""
    loss = opd.estimator("topk_reward", "jsd", k=2)
    verdicts = [
        _compare(loss, [small_case(4, 2, seed=seed)], "jsd", seed=seed, max_batches=300).verdict for seed in range(4)
    ]
    assert "biased" not in verdicts
    assert "zero" in verdicts


def test_equal_seeds_give_equal_results() -> None:
    loss = opd.estimator("opd", "jsd")
    first, second, other = (
        dataclasses.replace(_compare(loss, [small_case()], "jsd", seed=seed), seconds=0.0) for seed in (1, 1, 2)
    )
    assert first == second
    assert first.relative_bias != other.relative_bias
    assert json.loads(json.dumps(dataclasses.asdict(first)))["verdict"] == "biased"


def test_words_claim_what_was_certified() -> None:
    exact = _compare(opd.estimator("opd_plus", "jsd"), [small_case()], "jsd", margin=0.02)
    assert exact.identical and 0.0 < exact.hidden < 0.5
    assert "below 2%" in exact.words and f"{exact.directions} directions" in exact.words
    assert "may have gone unseen" in exact.words
    scaled = _compare(lambda r: 3.0 * opd.estimator("opd_plus", "jsd")(r), [small_case()], "jsd")
    assert scaled.verdict == "exact_up_to_scale"
    assert scaled.scale is not None and scaled.scale[0] <= 3.0 <= scaled.scale[1]
    zero = _compare(opd.estimator("k1_loss"), [small_case()], "reverse_kl")
    assert "zero or nearly so" in zero.words
    uphill = _compare(lambda r: -opd.estimator("opd_plus", "jsd")(r), [small_case()], "jsd")
    assert uphill.verdict == "biased" and uphill.cosine[1] < 0.0


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"margin": 0.0}, "margin"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": 0.5}, "alpha"),
        ({"max_batches": 0}, "max_batches"),
        ({"seconds": 0.0}, "seconds"),
        ({"divergence": opd.divergences.skew_jsd(0.0)}, "objective: must have a nonzero gradient"),
    ],
)
def test_bad_settings_are_named(settings: dict, argument: str) -> None:
    with pytest.raises(InvalidArgumentError, match=argument):
        _compare(opd.estimator("k2_loss"), [small_case()], **settings)


def test_bad_losses_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="cases"):
        _compare(opd.estimator("k2_loss"), [])
    with pytest.raises(LossError, match="not deterministic"):
        _compare(lambda r: r.token_sum(r.log_u * torch.rand(())), [small_case()])
    with pytest.raises(LossError, match="no gradient"):
        _compare(lambda r: r.teacher_logprobs.sum(), [small_case()])
    with pytest.raises(LossError, match="shape"):
        _compare(lambda r: r.log_u, [small_case()])
