"""The auditor: verdicts, identification, the recovered weight, and its messages."""

from __future__ import annotations

import functools
import json

import pytest
import torch

import opdtheory as opd
from opdtheory.auditing import VERDICTS, quick_verdict
from opdtheory.auditing.naming.bandits import bandit_parts, bandits, far_bandit, far_grid, log_u_grid
from opdtheory.auditing.naming.fit import fit_scale
from opdtheory.auditing.scenario import Case, Scenario
from opdtheory.errors import BudgetExceededError, InvalidArgumentError, LossError
from opdtheory.rollouts import Rollouts
from tests.tolerances import ALGEBRA, ENUMERATION

# Verdicts and names alone: the details have tests of their own.
audit = functools.partial(opd.audit, details=False)


def k3(r: Rollouts) -> torch.Tensor:
    return r.token_sum(r.log_u.expm1() - r.log_u)


def full_jsd(r: Rollouts, beta: float = 0.5) -> torch.Tensor:
    """The generalised JSD between whole vocabularies, written out without the library's divergences."""
    log_p, log_q = torch.log_softmax(r.student_logits, -1), torch.log_softmax(r.teacher_logits, -1)
    log_m = torch.log(beta * log_q.exp() + (1 - beta) * log_p.exp())
    value = beta * (log_q.exp() * (log_q - log_m)).sum(-1) + (1 - beta) * (log_p.exp() * (log_p - log_m)).sum(-1)
    return r.token_sum(value)


def test_k3_as_a_loss_descends_the_forward_kl() -> None:
    report = audit(k3, "reverse_kl")
    assert report.verdict == "other_objective"
    assert report.descends == "forward_kl"
    assert report.identified is not None
    assert report.identified["granularity"] == "token_local"
    assert report.identified["error"] < 1e-12
    assert report.identified["scale"] == pytest.approx(1.0, abs=1e-12)
    assert not report.faithful


@pytest.mark.parametrize(
    ("name", "divergence", "verdict"),
    [
        ("opd_plus", "jsd", "exact"),
        ("opd_plus", "le_cam", "exact"),
        ("opd", "reverse_kl", "exact"),
        ("opd", "forward_kl", "biased"),
        ("opd", "jsd", "biased"),
        ("k1_loss", None, "zero"),
        ("k2_loss", None, "exact"),
        ("k3_reward", None, "biased"),
        ("sign", None, "exact_up_to_scale"),
    ],
)
def test_verdicts(name: str, divergence: str | None, verdict: str) -> None:
    loss = opd.estimator(name, divergence)
    report = audit(loss, loss.claim.divergence)
    assert report.verdict == verdict
    assert verdict in VERDICTS
    assert quick_verdict(loss, loss.claim.divergence) == verdict


@pytest.mark.parametrize("beta", [0.1, 0.3, 0.9])
def test_names_the_member_of_a_family(beta: float) -> None:
    report = audit(lambda r: full_jsd(r, beta), "reverse_kl")
    assert report.verdict == "other_objective"
    assert report.identified is not None
    assert report.identified["objective"] == "skew_jsd"
    assert report.identified["parameters"] == {"beta": beta}
    assert report.identified["error"] < 1e-9


def test_prefers_the_entry_without_a_parameter() -> None:
    report = audit(full_jsd, "reverse_kl")
    assert report.descends == "jsd"


@pytest.mark.parametrize(
    ("loss", "label"),
    [
        (opd.estimator("box_cox", alpha=0.3), "alpha(alpha=0.3)"),
        (opd.estimator("box_cox", alpha=2.0), "chi2"),
        (opd.estimator("opd_plus", opd.divergences.skew_forward_kl(0.2)), "skew_forward_kl(lam=0.2)"),
        (opd.estimator("opd_plus", opd.divergences.skew_reverse_kl(0.2)), "skew_reverse_kl(lam=0.2)"),
    ],
    ids=str,
)
def test_identifies_against_a_false_claim(loss: opd.Estimator, label: str) -> None:
    report = audit(loss, "total_variation")
    assert report.verdict == "other_objective"
    assert report.descends == label


@pytest.mark.parametrize("granularity", ["token_return", "sequence"])
def test_finds_the_granularity(granularity: str) -> None:
    names = {"token_return": ("return_to_go", {"gamma": 1.0}), "sequence": ("sequence_opd_plus", {})}
    name, options = names[granularity]
    loss = opd.estimator(name, "hellinger", **options)
    assert audit(loss, "hellinger", granularity).verdict == "exact"
    report = audit(loss, "hellinger", "token_local")
    assert report.verdict == "other_objective"
    assert report.identified is not None
    assert (report.identified["objective"], report.identified["granularity"]) == ("hellinger", granularity)


def test_sign_flipped_is_not_faithful_even_up_to_scale() -> None:
    loss = opd.estimator("opd_plus", "jsd")
    report = audit(lambda r: -loss(r), "jsd")
    assert report.verdict == "biased"
    assert report.cosine == pytest.approx(-1.0)
    assert report.scale == pytest.approx(-1.0)
    assert "uphill" in report.summary()


def test_one_common_scale_over_the_panel() -> None:
    """A loss that is a different multiple of the right gradient on each pair is no multiple of it."""

    def loss(r: Rollouts) -> torch.Tensor:
        kl = opd.estimator("full_vocab", "reverse_kl")(r)
        # Of the teacher's row for the first token alone, so that every rollout of a pair has the same factor.
        return kl * (1.0 + torch.log_softmax(r.teacher_logits[:, 0], -1).square().mean()).detach()

    report = audit(loss, "reverse_kl")
    assert report.cosine == pytest.approx(1.0)
    assert report.verdict == "biased"


def test_scale_is_reported() -> None:
    loss = opd.estimator("opd_plus", "chi2")
    report = audit(lambda r: 3.0 * loss(r), "chi2")
    assert report.verdict == "exact_up_to_scale"
    assert report.scale == pytest.approx(3.0, abs=1e-12)


def test_group_mean_scales_by_g_minus_one_over_g() -> None:
    loss = opd.estimator("opd_plus", "jsd", baseline="group_mean")
    report = audit(loss, "jsd", batch_size=2)
    assert report.verdict == "exact_up_to_scale"
    assert report.scale == pytest.approx(0.5, abs=1e-12)


def test_variable_lengths_are_looked_at() -> None:
    local = opd.estimator("opd_plus", "jsd")
    kept = audit(local, "jsd").variable_lengths
    assert kept is not None and kept["verdict"] == "exact"
    mean = audit(opd.estimator("opd_plus", "jsd", reduction="token_mean"), "jsd")
    assert mean.verdict == "exact_up_to_scale"
    assert mean.variable_lengths is not None and mean.variable_lengths["verdict"] == "biased"
    assert "T11" in mean.summary()
    assert audit(opd.estimator("opd_plus", "jsd", reduction="token_mean"), "jsd", eos=0).verdict == "biased"


def test_off_policy_needs_the_prefix_ratio() -> None:
    plain, weighted = opd.estimator("opd_plus", "jsd"), opd.estimator("opd_plus", "jsd", importance="prefix")
    assert audit(plain, "jsd", off_policy=0.5).verdict == "biased"
    assert audit(weighted, "jsd", off_policy=0.5).verdict == "exact"


def test_recovered_weight_is_the_weight() -> None:
    for name in ("forward_kl", "jsd", "neyman_chi2", "le_cam"):
        divergence = opd.divergence(name)
        weight = audit(opd.estimator("opd_plus", name), name).weight
        expected = divergence.weight(weight["log_u"]) - divergence.weight(torch.zeros((), dtype=torch.float64))
        assert weight["depends_on_ratio_only"] and weight["non_decreasing"]
        torch.testing.assert_close(weight["weight"], expected, rtol=1e-10, atol=1e-10)
        curvature = float(divergence.curvature(torch.zeros((), dtype=torch.float64)))
        assert weight["slope_at_teacher"] == pytest.approx(curvature, rel=1e-6)


def test_weight_that_is_no_function_of_the_ratio() -> None:
    report = audit(opd.estimator("power", alpha=0.5), "reverse_kl")
    assert not report.weight["depends_on_ratio_only"]
    assert "no function of the ratio" in report.summary()


def test_weight_that_depends_on_more_than_this_token() -> None:
    """Weighted by what the later tokens' ratios are: on one step nothing is seen of it."""

    def loss(r: Rollouts) -> torch.Tensor:
        later = r.log_u.detach().flip(-1).cumsum(-1).flip(-1) - r.log_u.detach()
        return r.token_sum(-(r.log_u.detach() * (1.0 + later.square())) * r.student_logprobs)

    report = audit(loss, "reverse_kl")
    assert report.verdict == "biased"
    assert report.weight["depends_on_ratio_only"] and not report.weight["explains_panel"]
    assert "over several tokens it depends on more" in report.summary().replace("\n", " ")
    assert "f-divergence is minimised" not in report.summary()
    assert audit(opd.estimator("opd", "chi2"), "chi2").weight["explains_panel"]
    assert audit(opd.estimator("sign"), "total_variation").weight["explains_panel"]


def test_a_zero_scale_prints() -> None:
    assert "zero" in str(audit(lambda r: (r.student_logits * 0).sum(), "reverse_kl"))


def test_falling_weight_and_stability_are_told() -> None:
    forward = audit(opd.estimator("opd", "forward_kl"), "forward_kl")
    assert not forward.weight["non_decreasing"]
    assert forward.weight["slope_at_teacher"] == pytest.approx(-1.0, rel=1e-6)
    assert "repelling" in forward.summary() and "T4" in forward.summary()
    jsd = audit(opd.estimator("opd", "jsd"), "jsd")
    assert "does not attract to first order" in jsd.summary()
    assert "attract" not in audit(opd.estimator("opd_plus", "jsd"), "jsd").summary()


def test_clipped_weight_is_some_f_divergence() -> None:
    report = audit(opd.estimator("opd_plus", "forward_kl", clip_weight=(0.5, 1.5)), "forward_kl")
    assert report.verdict == "biased"
    assert "some f-divergence is minimised" in report.summary()


def test_variance_beside_the_whole_vocabulary() -> None:
    report = audit(opd.estimator("full_vocab", "jsd"), "jsd")
    for pair in report.pairs:
        assert pair.variance == pytest.approx(pair.full_vocabulary_variance, rel=1e-9)
    sampled = audit(opd.estimator("opd_plus", "jsd"), "jsd")
    assert all(pair.variance > pair.full_vocabulary_variance for pair in sampled.pairs)


def test_a_float32_loss_is_judged_by_its_own_rounding() -> None:
    def loss(r: Rollouts) -> torch.Tensor:
        log_p, log_q = torch.log_softmax(r.student_logits.float(), -1), torch.log_softmax(r.teacher_logits.float(), -1)
        return r.token_sum((log_p.exp() * (log_p - log_q)).sum(-1))

    report = audit(loss, "reverse_kl")
    assert report.verdict == "exact"
    assert report.weight["depends_on_ratio_only"]
    assert report.tolerance > 1e-9
    assert report.relative_bias > ENUMERATION


def test_report_is_json_and_reads() -> None:
    report = audit(k3, "reverse_kl")
    record = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert record["verdict"] == "other_objective"
    assert record["schema_version"] == 1
    assert record["identified"]["objective"] == "forward_kl"
    assert len(record["weight"]["log_u"]) == len(record["weight"]["weight"])
    text = str(report)
    assert text.startswith("k3: OTHER OBJECTIVE")
    assert "forward_kl" in text and "relative bias" in text
    assert max(map(len, text.splitlines())) <= 100


def test_same_seed_same_report() -> None:
    first, second = (audit(k3, "reverse_kl", seed=3).to_dict() for _ in range(2))
    for record in (first, second):
        record.pop("seconds")
    assert first == second
    assert audit(k3, "reverse_kl", seed=4).relative_bias != first["relative_bias"]


def test_takes_under_three_seconds_in_evaluations() -> None:
    """The work is bounded by the number of calls, which a busy machine does not change."""
    assert audit(k3, "reverse_kl").evaluations < 400
    assert opd.audit(k3, "reverse_kl").evaluations < 1000
    assert audit(opd.estimator("opd_plus", "jsd", baseline="leave_one_out"), "jsd", batch_size=2).evaluations < 2500


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"objective": "revers_kl"}, "divergence"),
        ({"granularity": "token"}, "objective"),
        ({"gamma": 0.5}, "gamma"),
        ({"granularity": "token_return", "gamma": 1.5}, "gamma"),
        ({"batch_size": 0}, "batch_size"),
        ({"eos": 9}, "eos"),
        ({"off_policy": -1.0}, "off_policy"),
        ({"off_policy": float("nan")}, "off_policy"),
    ],
)
def test_bad_settings_name_the_argument(settings: dict[str, object], argument: str) -> None:
    with pytest.raises(ValueError, match=argument):
        audit(k3, **settings)  # type: ignore[arg-type]


def test_identically_zero_claim_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="zero gradient everywhere"):
        audit(k3, opd.divergences.skew_jsd(0.0))


def test_a_batch_too_large_states_the_count() -> None:
    with pytest.raises(BudgetExceededError, match=r"needs [\d,]+") as caught:
        audit(opd.estimator("opd_plus", "jsd", baseline="group_mean"), "jsd", batch_size=64, method="exact")
    assert caught.value.count > caught.value.budget


@pytest.mark.parametrize(
    ("loss", "cause"),
    [
        (lambda r: r.log_u, r"shape \(.*\)"),
        (lambda r: r.teacher_logprobs.sum(), "no gradient"),
        (lambda r: r.token_sum(r.log_u.detach()), "no gradient"),
        (lambda r: r.token_sum(r.log_u * torch.rand(())), "not deterministic"),
        (lambda r: r.token_sum(r.log_u) / 0.0 * 0.0, "finite"),
        (lambda r: 1.0, "float"),
        (lambda r: r.token_sum(torch.where(r.log_u > 9e9, r.log_u.sqrt(), r.student_logprobs)), "NaN or inf"),
    ],
    ids=["not a scalar", "constant", "detached", "random", "NaN", "no tensor", "NaN gradient"],
)
def test_losses_that_cannot_be_audited(loss: object, cause: str) -> None:
    with pytest.raises(LossError, match=cause):
        audit(loss, "reverse_kl")  # type: ignore[arg-type]


def test_zero_gradient_loss_is_zero_not_an_error() -> None:
    report = audit(lambda r: 0.0 * r.token_sum(r.student_logprobs), "reverse_kl")
    assert report.verdict == "zero"
    assert report.identified is None


def test_panel_pairs_differ_in_distance_and_length() -> None:
    for eos in (None, 0):
        cases = Scenario(eos=eos).pairs()
        assert len(cases) == 6
        assert all(case.student.eos == eos for case in cases)
        distances = [float(opd.exact_value(case.student, case.teacher, "jsd")) for case in cases]
        assert max(distances) > 100 * min(distances)


def test_bandits_have_the_grid_as_log_ratios() -> None:
    for batch_size in (1, 2, 4, 8):
        grid = log_u_grid(batch_size)
        assert float(grid[len(grid) // 2]) == 0.0
        torch.testing.assert_close(grid, -grid.flip(0), rtol=0, atol=0)
        parts = bandit_parts(batch_size)
        torch.testing.assert_close(torch.cat(parts).unique(), grid, rtol=0, atol=0)
        for part in parts:
            for case in bandits(part, Scenario()):
                torch.testing.assert_close(log_ratios(case), part, rtol=0, atol=ALGEBRA)
    for sign in (-1, 1):
        far = far_grid(sign)
        torch.testing.assert_close(log_ratios(far_bandit(far, Scenario()))[:-1], far, rtol=0, atol=ALGEBRA)


def log_ratios(case: Case) -> torch.Tensor:
    return (torch.log_softmax(case.teacher.logits[0], -1) - torch.log_softmax(case.student.logits[0], -1))[0]


def test_fit_scale_of_zero_gradients_does_not_divide_by_zero() -> None:
    ones, zeros = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    fit = fit_scale([zeros, zeros], [ones, ones])
    assert fit.scale == 0.0 and fit.worst_error == float("inf")
    assert fit_scale([2 * ones, 2 * ones], [ones, ones]).scale == pytest.approx(2.0)


def test_batches_too_large_to_enumerate_are_exact_if_their_rollouts_do_not_meet() -> None:
    report = opd.audit(opd.estimator("opd_plus", "jsd"), "jsd", batch_size=64)
    assert report.verdict == "exact" and report.monte_carlo is None
    assert report.relative_bias < ENUMERATION


@pytest.mark.parametrize("baseline", ["leave_one_out", "group_mean"])
def test_coupled_batches_too_large_to_enumerate_are_sampled(baseline: str) -> None:
    report = opd.audit(opd.estimator("opd_plus", "jsd", baseline=baseline), "jsd", batch_size=16, details=False)
    assert report.monte_carlo is not None and report.monte_carlo["rollouts"] > 0
    assert report.verdict == ("exact" if baseline == "leave_one_out" else "exact_up_to_scale")
    assert report.summary() == report.monte_carlo["words"]
    json.dumps(report.to_dict(), allow_nan=False)
    assert str(report) and not report.pairs


def test_unsound_losses_are_not_faithful() -> None:
    """Exact wherever lengths are fixed, and it reads what padding holds where they are not."""

    def leaks(r: Rollouts) -> torch.Tensor:
        return (r.log_u.square() / 2).sum() / len(r.tokens)

    report = opd.audit(leaks, "reverse_kl")
    assert report.verdict == "exact" and not report.faithful
    assert "masked positions" in report.summary().replace("\n", " ")
    assert opd.audit(lambda r: r.token_sum(r.log_u.square() / 2), "reverse_kl").faithful


def test_methods_and_settings_are_checked() -> None:
    for settings, argument in (
        ({"method": "guess"}, "method"),
        ({"batch_size": 1.5}, "batch_size"),
        ({"seed": "a"}, "seed"),
    ):
        with pytest.raises(InvalidArgumentError, match=argument):
            opd.audit(k3, "reverse_kl", **settings)  # type: ignore[arg-type]


def test_prompts_and_tools_change_nothing_of_an_exact_estimator() -> None:
    loss = opd.estimator("opd_plus", "forward_kl")
    assert opd.audit(loss, "forward_kl", prompts=3, environment=(1,), details=False).verdict == "exact"
    biased = opd.audit(opd.estimator("opd", "forward_kl"), "forward_kl", prompts=3, environment=(1,), details=False)
    assert biased.verdict == "biased"


def test_a_signed_sum_is_identified_but_is_no_catalogue_objective() -> None:
    report = opd.audit(opd.estimator("k3_reward"), "reverse_kl", details=False)
    assert report.verdict == "biased" and report.descends is None
    assert report.identified is not None and report.identified["error"] < report.tolerance
    assert report.identified["terms"] == pytest.approx({"reverse_kl": 1.0, "forward_kl": -1.0}, abs=1e-9)
    assert "that of reverse_kl - forward_kl" in report.summary().replace("\n", " ")
    assert opd.audit(k3, "reverse_kl", details=False).descends == "forward_kl"
