"""Sampling in place of enumeration: the sampler, the controls, and verdicts that are certain or say they are not."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from scipy import stats

import opdtheory as opd
from opdtheory.auditing import quick_verdict
from opdtheory.auditing.sampling.bounds import Bounds, Target, relative_bias, scale_range
from opdtheory.auditing.sampling.montecarlo import monte_carlo_compare
from opdtheory.auditing.sampling.projections import controls, directions, fit_controls
from opdtheory.auditing.scenario import Case, Scenario
from opdtheory.errors import BudgetExceededError, InvalidArgumentError, LossError
from opdtheory.exact import Enumeration, MarkovPolicy, TabularPolicy, exact_gradient, random_pair
from opdtheory.exact.sampling import Sample, Sampler, sample_rollouts
from opdtheory.objective import Objective
from opdtheory.rollouts import Rollouts
from tests.tolerances import ENUMERATION


def _case(
    vocab_size: int = 3, horizon: int = 2, eos: int | None = None, off_policy: float = 0.0, seed: int = 0
) -> Case:
    student, teacher = random_pair(vocab_size, horizon, eos=eos, scale=1.0, distance=1.0, seed=seed)
    behavior = student.perturbed(off_policy, seed=77) if off_policy else None
    return Case(student, teacher, behavior, "small")


def _chains(vocab_size: int = 32, horizon: int = 16, eos: int | None = 0) -> Case:
    """A pair with 32**16 sequences."""
    student = MarkovPolicy.random(vocab_size, horizon, eos=eos, seed=0)
    noise = MarkovPolicy.random(vocab_size, horizon, eos=eos, seed=1)
    teacher = MarkovPolicy(
        student.initial + 0.5 * noise.initial, student.transition + 0.5 * noise.transition, horizon, eos=eos
    )
    return Case(student, teacher, None, "chains")  # type: ignore[arg-type]


def _compare(loss, cases, divergence="reverse_kl", granularity="token_local", gamma=1.0, **settings):
    """The comparison, with the settings of the claim, of the scenario and of the budget together."""
    words = {key: settings.pop(key) for key in ("batch_size", "seed", "shared_prompt") if key in settings}
    claim = Objective.of(opd.divergence(divergence), granularity, gamma)
    return monte_carlo_compare(loss, cases, claim, Scenario(**words), **{"seconds": 60.0, **settings})


@pytest.mark.parametrize("off_policy", [0.0, 0.7])
@pytest.mark.parametrize("eos", [None, 1])
def test_draws_follow_the_behaviour_distribution(eos: int | None, off_policy: float) -> None:
    """20000 rollouts, seed 5: a chi-square test of all sequences at 1e-4."""
    case = _case(3, 3, eos, off_policy)
    everything = Enumeration.build(case.student, case.teacher, case.behavior)
    sample = sample_rollouts(case.student, case.teacher, 20_000, case.behavior, torch.Generator().manual_seed(5))
    index = {tuple(tokens): i for i, tokens in enumerate(everything.tokens.tolist())}
    drawn = torch.tensor([index[tuple(tokens)] for tokens in sample.rollouts.tokens.tolist()])
    counts = torch.bincount(drawn, minlength=len(everything)).numpy()
    expected = (20_000 * everything.probability / everything.probability.sum()).numpy()
    assert stats.chisquare(counts, expected).pvalue > 1e-4
    if off_policy:
        student_distribution = Enumeration.build(case.student, case.teacher).probability
        assert (
            stats.chisquare(counts, (20_000 * student_distribution / student_distribution.sum()).numpy()).pvalue < 1e-9
        )


@pytest.mark.parametrize(("eos", "written"), [(None, ()), (1, ()), (1, (0,)), (1, (1,))])
def test_a_sample_has_the_form_of_an_enumeration(eos: int | None, written: tuple[int, ...]) -> None:
    student = TabularPolicy.random(3, 3, eos=eos, seed=0, environment=written)
    case = Case(student, student.perturbed(1.0, seed=1), student.perturbed(0.4, seed=2), "small")
    everything = Enumeration.build(case.student, case.teacher, case.behavior)
    index = {tuple(tokens): i for i, tokens in enumerate(everything.tokens.tolist())}
    sampler = Sampler.build(case.student, case.teacher, case.behavior)
    sample = sampler.draw(200, torch.Generator().manual_seed(0))
    drawn = torch.tensor([index[tuple(tokens)] for tokens in sample.rollouts.tokens.tolist()])
    spelled = everything.rollouts(drawn)
    first = torch.tensor([0, 1, 4])
    assert torch.equal(sample.rows, everything.rows[drawn] + first)
    for field in dataclasses.fields(Rollouts):
        ours, theirs = getattr(sample.rollouts, field.name), getattr(spelled, field.name)
        if isinstance(theirs, torch.Tensor):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=ENUMERATION, msg=field.name)
    assert sample.rollouts.student_logits.is_leaf and sample.rollouts.student_logits.requires_grad


@pytest.mark.parametrize("chain", [False, True])
def test_padding_reads_rows_that_no_live_position_reads(chain: bool) -> None:
    case = _chains(4, 5) if chain else _case(4, 5, eos=0)
    sample = sample_rollouts(case.student, case.teacher, 3000)
    live = sample.rollouts.mask > 0
    assert not set(sample.rows[live].tolist()) & set(sample.rows[~live].tolist())
    assert len(set(sample.rows[~live].tolist())) >= 1


def test_environment_tokens_are_masked_and_end_nothing() -> None:
    student = TabularPolicy.random(3, 3, eos=0, seed=0, environment=(1,))
    sample = sample_rollouts(student, student.perturbed(1.0, seed=1), 500)
    tokens, mask = sample.rollouts.tokens, sample.rollouts.mask
    assert float(mask[:, 1].sum()) == 0.0
    written_zero = (tokens[:, 0] != 0) & (tokens[:, 1] == 0)
    assert bool(written_zero.any()) and bool((mask[written_zero, 2] == 1).all())


def test_the_rollouts_of_a_group_share_their_prompt() -> None:
    student = TabularPolicy.random(4, 3, seed=0, environment=(0,))
    sampler = Sampler.build(student, student.perturbed(1.0, seed=1))
    tokens = sampler.draw(400, torch.Generator().manual_seed(0), group=4).rollouts.tokens.view(100, 4, 3)
    assert bool((tokens[..., 0] == tokens[:, :1, 0]).all()) and len(tokens[:, 0, 0].unique()) == 4
    assert not bool((tokens[..., 1] == tokens[:, :1, 1]).all())
    apart = sampler.draw(400, torch.Generator().manual_seed(0)).rollouts.tokens.view(100, 4, 3)
    assert not bool((apart[..., 0] == apart[:, :1, 0]).all())


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


def test_a_table_is_stacked_and_unstacked() -> None:
    for case in (_case(3, 3), _chains(3, 3)):
        sampler = Sampler.build(case.student, case.teacher)
        gradient = exact_gradient(case.student, case.teacher, "jsd")
        for there, back in zip(gradient, sampler.unstack(sampler.stack(gradient)), strict=True):
            torch.testing.assert_close(there, back, rtol=0, atol=0)


def test_zero_probability_is_never_drawn() -> None:
    student, teacher = random_pair(5, 3, zeros=2, seed=3)
    assert int(sample_rollouts(student, teacher, 5000).rollouts.tokens.max()) <= 2


@pytest.mark.parametrize("off_policy", [0.0, 0.5])
@pytest.mark.parametrize("granularity", ["token_local", "token_return", "sequence"])
def test_controls_have_the_expectation_they_claim(granularity: str, off_policy: float) -> None:
    """By spelling out every sequence; a control without its importance weights fails the same check."""
    case = _case(3, 3, eos=0, off_policy=off_policy, seed=4)
    sampler = Sampler.build(case.student, case.teacher, case.behavior)
    everything = Enumeration.build(case.student, case.teacher, case.behavior)
    rows = everything.rows + torch.tensor([0, 1, 4])
    sample = Sample(everything.rollouts(), rows)
    weight = (everything.probability * len(everything)).view(-1, 1, 1)

    def expectation(control) -> torch.Tensor:
        return sampler.scatter(rows, weight * control.gradient(sample)).flatten()

    divergence = opd.divergence("jsd")
    found = controls(case, sampler, divergence, granularity, 0.7 if granularity == "token_return" else 1.0, 1)
    for control in found:
        torch.testing.assert_close(expectation(control), control.mean, rtol=0, atol=1e-12)
    if off_policy:
        careless = controls(
            Case(case.student, case.teacher, None, ""), Sampler.build(case.student, case.teacher), divergence,
            "token_local", 1.0, 1,
        )  # fmt: skip
        assert float((expectation(careless[0]) - careless[0].mean).abs().max()) > 1e-3


def test_the_control_of_a_baseline_has_expectation_zero() -> None:
    """Over all ordered pairs of sequences."""
    case = _case(2, 2, eos=0, seed=2)
    sampler, everything = Sampler.build(case.student, case.teacher), Enumeration.build(case.student, case.teacher)
    control = controls(case, sampler, opd.divergence("jsd"), "token_local", 1.0, 2)[-2]
    total = torch.zeros_like(control.mean)
    for i in range(len(everything)):
        for j in range(len(everything)):
            index = torch.tensor([i, j])
            rows = everything.rows[index] + torch.tensor([0, 1])
            part = control.gradient(Sample(everything.rollouts(index), rows))
            assert float(part.abs().max()) > 0.0
            total += everything.probability[index].prod() * sampler.scatter(rows, part).flatten()
    assert float(total.abs().max()) < 1e-14


def test_directions_are_orthonormal_and_begin_with_the_exact_gradient() -> None:
    case = _case(3, 3, eos=0)
    sampler = Sampler.build(case.student, case.teacher)
    exact, other = (sampler.stack(exact_gradient(case.student, case.teacher, n)).flatten() for n in ("jsd", "chi2"))
    basis = directions(sampler, exact, [other, exact], torch.Generator().manual_seed(0))
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis), dtype=basis.dtype), rtol=0, atol=1e-12)
    torch.testing.assert_close(basis[0], exact / exact.norm())
    assert float((other - basis[:2].T @ (basis[:2] @ other)).norm()) < 1e-10


def test_fit_controls_finds_the_combination() -> None:
    generator = torch.Generator().manual_seed(0)
    known = torch.randn(20, 3, 5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        fit_controls(2.0 * known[:, 1] + 4.0, known, 1e-10), torch.tensor([0.0, 2.0, 0.0], dtype=torch.float64)
    )
    mixed = known[:, 0] - 0.5 * known[:, 2]
    torch.testing.assert_close(fit_controls(mixed, known, 1e-10), torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64))
    known[:, 1] = known[:, 0]
    factors = fit_controls(mixed, known, 1e-10)
    assert float(factors[0] + factors[1]) == pytest.approx(1.0)


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
    case = _case(3, 3, off_policy=0.5)
    assert _compare(opd.estimator("opd_plus", "jsd"), [case], "jsd").verdict == "biased"
    assert _compare(opd.estimator("opd_plus", "jsd", importance="prefix"), [case], "jsd").verdict == "exact"


def test_names_what_is_followed_instead() -> None:
    result = _compare(opd.estimator("k3_loss"), Scenario(1).pairs()[3:5], "reverse_kl")
    assert result.verdict == "biased"
    assert result.follows is not None
    assert (result.follows["objective"], result.follows.granularity) == ("forward_kl", "token_local")
    assert _compare(opd.estimator("opd", "forward_kl"), Scenario(1).pairs()[3:5], "forward_kl").follows is None
    assert "follows forward_kl" in result.words


def test_sequences_that_nobody_can_enumerate() -> None:
    """32**16 sequences in groups of 8."""
    case = _chains()
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

    case = _case(4, 4, eos=0, seed=1)
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
    result = _compare(loss, [_case()], "jsd", batch_size=4, max_batches=8, seconds=30.0)
    assert result.verdict == "undecided"
    assert "budget ended" in result.words
    assert result.relative_bias[1] == float("inf")
    assert result.batches <= 8


def test_a_margin_that_is_not_reached_ends_undecided() -> None:
    """Without bias, but noisy beside every control: only more rollouts could certify it."""

    def noisy(r: Rollouts) -> torch.Tensor:
        wild = 30.0 * torch.cos(5.0 * r.tokens[1, 0])
        return r.token_sum(r.log_u.square() / 2) + wild * r.student_logprobs[0].sum()

    result = _compare(noisy, [_case()], "reverse_kl", batch_size=2, max_batches=640)
    assert result.verdict == "undecided"
    low, high = result.relative_bias
    assert low == 0.0 and high > 0.05


def test_an_unbiased_loss_is_never_found_biased() -> None:
    """Four seeds at 99 %: a top-k reward is zero, and no control equals it."""
    loss = opd.estimator("topk_reward", "jsd", k=2)
    verdicts = [
        _compare(loss, [_case(4, 2, seed=seed)], "jsd", seed=seed, max_batches=300).verdict for seed in range(4)
    ]
    assert "biased" not in verdicts
    assert "zero" in verdicts


def test_equal_seeds_give_equal_results() -> None:
    loss = opd.estimator("opd", "jsd")
    first, second, other = (
        dataclasses.replace(_compare(loss, [_case()], "jsd", seed=seed), seconds=0.0) for seed in (1, 1, 2)
    )
    assert first == second
    assert first.relative_bias != other.relative_bias
    assert json.loads(json.dumps(dataclasses.asdict(first)))["verdict"] == "biased"


def test_words_claim_what_was_certified() -> None:
    exact = _compare(opd.estimator("opd_plus", "jsd"), [_case()], "jsd", margin=0.02)
    assert exact.identical and 0.0 < exact.hidden < 0.5
    assert "below 2%" in exact.words and f"{exact.directions} directions" in exact.words
    assert "may have gone unseen" in exact.words
    scaled = _compare(lambda r: 3.0 * opd.estimator("opd_plus", "jsd")(r), [_case()], "jsd")
    assert scaled.verdict == "exact_up_to_scale"
    assert scaled.scale is not None and scaled.scale[0] <= 3.0 <= scaled.scale[1]
    zero = _compare(opd.estimator("k1_loss"), [_case()], "reverse_kl")
    assert "zero or nearly so" in zero.words
    uphill = _compare(lambda r: -opd.estimator("opd_plus", "jsd")(r), [_case()], "jsd")
    assert uphill.verdict == "biased" and uphill.cosine[1] < 0.0


def test_the_whole_bias_is_bounded_by_what_the_directions_and_the_length_say() -> None:
    """For random truths within their intervals; without the product of the two ways the bound would fail."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 3, generator=generator, dtype=torch.float64)).Q.T
    careless = 0
    for _ in range(300):
        truth, known, vector = torch.randn(3, 6, generator=generator, dtype=torch.float64)
        low = basis @ truth - 0.3 * torch.rand(3, generator=generator, dtype=torch.float64)
        bound = Bounds(low, low + 0.3, known, basis @ known, float((truth - known).norm()) * 1.01)
        distance = float((truth - vector).norm())
        assert bound.distance(vector, basis @ vector) >= distance
        careless += (bound.unseen**2 + float((known - vector).square().sum())) ** 0.5 < distance
    assert careless > 0


def test_bounds_contain_what_they_bound() -> None:
    target = Target.of(torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64), torch.eye(2, 3, dtype=torch.float64))
    truth = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    near = truth + 0.01
    bound = Bounds(truth[:2] - 0.1, truth[:2] + 0.1, near, near[:2], 0.02)
    low, high = relative_bias(bound, target)
    assert low <= float((truth - target.vector).norm()) / 2.0 <= high
    low, high = bound.cosine(target)
    assert low <= 1.0 / float(truth.norm()) <= high
    assert scale_range([bound], [target]) is None
    wide = Bounds(truth[:2] - 0.6, truth[:2] + 0.6, truth, truth[:2], 0.0)
    assert scale_range([wide], [target]) == pytest.approx((0.2, 0.8))


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"margin": 0.0}, "margin"),
        ({"confidence": 1.0}, "confidence"),
        ({"max_batches": 0}, "max_batches"),
        ({"seconds": 0.0}, "seconds"),
        ({"divergence": opd.divergences.skew_jsd(0.0)}, "divergence"),
    ],
)
def test_bad_settings_are_named(settings: dict, argument: str) -> None:
    with pytest.raises(InvalidArgumentError, match=argument):
        _compare(opd.estimator("k2_loss"), [_case()], **settings)


def test_bad_losses_and_sizes_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="cases"):
        _compare(opd.estimator("k2_loss"), [])
    with pytest.raises(LossError, match="not deterministic"):
        _compare(lambda r: r.token_sum(r.log_u * torch.rand(())), [_case()])
    with pytest.raises(LossError, match="no gradient"):
        _compare(lambda r: r.teacher_logprobs.sum(), [_case()])
    with pytest.raises(LossError, match="shape"):
        _compare(lambda r: r.log_u, [_case()])
    with pytest.raises(BudgetExceededError):
        Sampler.build(*random_pair(4, 6), budget=1000)
    with pytest.raises(InvalidArgumentError, match="count"):
        sample_rollouts(*random_pair(2, 2), 0)
