"""Verdicts from samples: certain, or said not to be."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

import opdtheory as opd
from opdtheory.auditing import quick_verdict
from opdtheory.auditing.sampling.montecarlo import Search, monte_carlo_compare
from opdtheory.auditing.sampling.montecarlo_result import odds
from opdtheory.auditing.scenario import Scenario
from opdtheory.errors import InvalidArgumentError, LossError
from opdtheory.exact import exact_gradient
from opdtheory.objective import Objective
from opdtheory.rollouts import Rollouts
from tests.auditing.sampling.pairs import long_case, small_case
from tests.sparse import some


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


@pytest.mark.parametrize(
    ("batch_size", "name", "divergence", "options"),
    some(_ZOO, 4),
)
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
@pytest.mark.slow
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
    """Four seeds: a top-k reward is zero, and no control equals it."""
    loss = opd.estimator("topk_reward", "jsd", k=2)
    verdicts = [
        _compare(loss, [small_case(4, 2, seed=seed)], "jsd", seed=seed, max_batches=300).verdict for seed in range(4)
    ]
    assert "biased" not in verdicts
    assert "zero" in verdicts


def test_the_error_rate_is_shared_by_all_streams() -> None:
    """Directions and length of each pair, and what differs or is not seen: together no more than the rate."""
    cases = Scenario(1).pairs()[1:4:2]
    search = Search(
        opd.estimator("opd", "jsd"), cases, Objective.of(opd.divergence("jsd")), Scenario(), 0.01, 10**6, 30.0
    )
    streams = sum(len(pair.basis) for pair in search.pairs) + len(search.pairs) + 2
    assert search.each * streams == pytest.approx(0.01, rel=1e-12)
    counts = [search.first]
    with torch.no_grad():
        for _ in range(4):
            search.advance(1e-9, 10**6)
            assert all(pair.stream.projections.count == counts[-1] for pair in search.pairs)
            counts.append(math.ceil(1.25 * counts[-1]))
        # A budget that ends in between is no look: its count would depend on the draws.
        before = [(pair.looks, pair.bounds) for pair in search.pairs]
        search.advance(1e-9, search.batches + 3)
    assert [(pair.looks, pair.bounds) for pair in search.pairs] == before
    assert [looks for looks, _ in before] == [4, 4]


def test_a_smaller_rate_needs_more_observations() -> None:
    found = [_compare(opd.estimator("opd", "jsd"), [small_case()], "jsd", alpha=a, seed=2) for a in (0.2, 1e-6, 1e-12)]
    assert found[0].batches < found[1].batches < found[2].batches
    assert [f.alpha for f in found] == [0.2, 1e-6, 1e-12]
    assert "once in 5 audits" in found[0].words and "once in a million audits" in found[1].words
    assert odds(0.03) == "once in 33 audits" and odds(1e-4) == "once in 10,000 audits"


@pytest.mark.parametrize("at", ["first step", "each step", "behind the end"])
@pytest.mark.parametrize(("size", "seen"), [(1e-3, True), (1e-7, True), (1e-14, False)])
@pytest.mark.slow
def test_a_difference_without_variance_is_compared_to_rounding(at: str, size: float, seen: bool) -> None:
    """The residual is a constant along most directions and zero along the others, so no interval has a length."""
    plain, case = opd.estimator("opd_plus", "jsd"), small_case(3, 2, eos=0)

    def loss(r: Rollouts) -> torch.Tensor:
        logits = {
            "first step": r.student_logits[:, :1, 1],
            "each step": r.student_logits[..., 1] * r.mask,
            "behind the end": r.student_logits[..., 1] * (1.0 - r.mask),
        }[at]
        return plain(r) + size * logits.sum(-1).mean()

    result = _compare(loss, [case], "jsd")
    assert result.verdict == ("biased" if seen else "exact"), result.words
    assert not any(math.isnan(end) for pair in result.by_pair for end in (*pair.scale, *pair.error, *pair.cosine))
    assert (result.least_bias > 0.0) is seen


def _token_mean(weight):
    return lambda r: r.token_mean(-(weight(r) * r.student_logprobs))


def _by_sizes(r: Rollouts) -> torch.Tensor:
    """Divided by the typical size of the batch's log-ratios."""
    log_u = r.log_u.detach()
    return r.token_sum(-(log_u / (log_u.square() * r.mask).mean().sqrt() * r.student_logprobs))


@pytest.mark.parametrize(
    ("loss", "claim", "settings"),
    [
        (_token_mean(lambda r: r.log_u.detach()), "reverse_kl", {"batch_size": 32, "eos": 0}),
        (lambda r: r.token_mean(r.log_u.square() / 2), "reverse_kl", {"batch_size": 24, "eos": 1}),
        (_token_mean(lambda r: r.log_u.detach().exp()), "forward_kl", {"batch_size": 24, "eos": 0}),
        (_by_sizes, "reverse_kl", {"batch_size": 32}),
    ],
    ids=["window mean", "mean of squares", "forward", "by sizes"],
)
@pytest.mark.slow
def test_a_scale_that_differs_by_pair_is_told_from_a_wrong_direction(loss, claim: str, settings: dict) -> None:
    batch_size, eos = settings["batch_size"], settings.get("eos")
    cases = Scenario(1, eos).pairs()[1:4:2]
    result = _compare(loss, cases, claim, batch_size=batch_size, naming=False)
    assert result.verdict == "biased" and result.same_direction
    assert f"The direction is that of {claim} (token_local) on every pair" in result.words
    assert "the scale differs by pair" in result.words and "at any scale" not in result.words
    one, other = result.by_pair
    assert one.scale[0] > other.scale[1] > 0.0, "intervals do not overlap"
    assert min(pair.cosine[0] for pair in result.by_pair) > 0.95
    # The best common scale is between the two, and at least half their distance from one of them.
    assert 0.0 < result.least_bias < one.scale[1] / other.scale[0] - 1.0


@pytest.mark.parametrize("turn", [lambda r: r.sequence_mean, lambda r: lambda x: -r.token_mean(x)], ids=["1/N", "sign"])
def test_a_wrong_direction_is_not_called_right(turn) -> None:
    """Rollouts that weigh by their own length, and a token mean that goes uphill."""
    result = _compare(
        lambda r: turn(r)(-(r.log_u.detach() * r.student_logprobs)),
        Scenario(1, 0).pairs()[1:4:2],
        batch_size=24,
        naming=False,
    )
    assert result.verdict == "biased" and not result.same_direction
    assert "at any scale" in result.words and "The direction is that" not in result.words


@pytest.mark.slow
def test_the_scale_of_a_token_mean_is_near_the_exact_one() -> None:
    """Enumerated at two rollouts, on the same pairs: within the intervals of the samples."""
    loss, cases = _token_mean(lambda r: r.log_u.detach()), Scenario(2, 0).pairs()[1:4:2]
    result = _compare(loss, cases, batch_size=2, naming=False)
    for case, pair in zip(cases, result.by_pair, strict=True):
        expected = torch.cat([g.flatten() for g in opd.expected_gradient(loss, case.student, case.teacher, 2)])
        exact = torch.cat([g.flatten() for g in exact_gradient(case.student, case.teacher, "reverse_kl")])
        scale = float(expected @ exact / (exact @ exact))
        assert pair.label == case.label and pair.scale[0] <= scale <= pair.scale[1]
        assert pair.error[0] <= float((expected - scale * exact).norm() / (scale * exact.norm())) <= pair.error[1]
        assert pair.cosine[0] <= float(expected @ exact / (expected.norm() * exact.norm())) <= pair.cosine[1]


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
