"""At fixed prefixes only the right loss agrees with its claim, and samples show the bias that is predicted."""

from __future__ import annotations

import pytest

from opdtheory.errors import InvalidArgumentError, LossError
from opdtheory.training.validation import Prefixes, compare
from tests.training.validation.pairs import E

# Beside each: a claim, and a loss that is not it.
TWINS = {
    "right": (E("opd_plus", "jsd"), E("opd_plus", "jsd"), False),
    "sign": (E("opd_plus", "jsd"), lambda r: -E("opd_plus", "jsd")(r), False),
    "stop-gradient": (E("opd_plus", "forward_kl"), E("opd", "forward_kl"), False),
    "clip": (E("k1_reward", clip_log_ratio=0.3), E("k1_reward"), False),
    "ratio": (E("opd_plus", "reverse_kl", importance="token"), E("opd_plus", "reverse_kl"), True),
    "ratio that is not claimed": (E("opd_plus", "reverse_kl"), E("opd_plus", "reverse_kl", importance="token"), True),
    "top-k": (E("topk_tail", "jsd", k=2), E("topk_truncated", "jsd", k=2), False),
    "group": (E("opd", "jsd", baseline="group_mean"), E("opd", "jsd", baseline="leave_one_out"), False),
}


@pytest.mark.parametrize("name", TWINS)
def test_only_the_right_loss_agrees(name: str, prefixes: Prefixes, off_policy: Prefixes) -> None:
    claim, loss, off = TWINS[name]
    met = off_policy if off else prefixes
    found = compare(met, claim, loss, draws=1000, directions=4)
    assert found.agrees is (name == "right"), str(found)
    assert (found.discrepancy <= found.tolerance) is (name == "right")
    if found.draws:
        assert (abs(found.z) <= found.z_limit) is (name == "right"), str(found)
    honest = compare(met, claim, draws=1000, directions=4)
    assert honest.agrees, str(honest)
    assert honest.bias == pytest.approx(honest.predicted_bias, abs=1e-12)


READ_ROWS = {
    "plain": E("topk_tail_sampled", "reverse_kl", k=2),
    "rest": E("topk_tail_sampled", "forward_kl", k=2, baseline="rest"),
    "optimal": E("topk_tail_sampled", "jsd", k=3, support="student", baseline="optimal"),
    "constant": E("topk_tail_sampled", "chi2", k=1, baseline="constant", baseline_value=-0.5),
    "no set": E("opd_plus", "hellinger", baseline="optimal"),
    "mean": E("opd_plus", "hellinger", baseline="vocabulary"),
    "reward": E("topk_reward", "jsd", k=2),
    "biased": E("opd", "forward_kl"),
    "clip": E("opd_plus", "forward_kl", clip_log_ratio=0.3),
}


@pytest.mark.parametrize("name", READ_ROWS)
def test_the_tokens_drawn_stand_for_all_where_theory_states_the_weight(name: str, prefixes: Prefixes) -> None:
    loss = READ_ROWS[name]
    some, every = (compare(prefixes, loss, draws=30, directions=4, every_token=x) for x in (False, True))
    assert some.agrees and some.run_on < every.run_on == 1 and "own code was run on the tokens drawn" in str(some)
    for number in ("z", "bias", "predicted_bias", "variance", "along"):
        assert getattr(some, number) == pytest.approx(getattr(every, number), rel=1e-9, abs=1e-11), number
    wrong = compare(prefixes, loss, lambda r: 1.02 * loss(r), draws=30, directions=4, every_token=False)
    assert wrong.discrepancy > wrong.tolerance


def test_a_weight_that_is_wrong_on_one_drawn_token_alone_is_seen(prefixes: Prefixes) -> None:
    """Changed up on one token and down on another, so that their sum with the probabilities stays as it is."""
    loss = E("opd_plus", "hellinger", baseline="optimal")
    p = prefixes.log_p.exp().mean(0)
    likely, other = p.topk(2).indices.tolist()

    def wrong(r):
        shift = 1e-3 * ((r.tokens == likely).double() / p[likely] - (r.tokens == other).double() / p[other])
        return loss(r) + r.token_sum(shift * r.student_logprobs)

    found = compare(prefixes, loss, wrong, draws=200, directions=4, every_token=False)
    assert not found.agrees and found.discrepancy > found.tolerance


def test_a_ratio_is_part_of_the_weight_of_the_tokens_drawn(off_policy: Prefixes) -> None:
    for loss in (
        E("topk_tail_sampled", "chi2", k=2, importance="token"),
        E("opd_plus_centred", "forward_kl", importance="tis", clip_range=1.05),
    ):
        assert compare(off_policy, loss, draws=30, directions=4, every_token=False).agrees


def test_the_tokens_drawn_do_not_suffice_without_a_weight(prefixes: Prefixes) -> None:
    for loss in (
        E("opd_plus", "jsd", baseline="leave_one_out"),
        E("opd_plus", "forward_kl", baseline="optimal", clip_log_ratio=1.0),
    ):
        assert compare(prefixes, loss, draws=30, directions=4).run_on == 1
        with pytest.raises(InvalidArgumentError, match="theory states no weight"):
            compare(prefixes, loss, draws=30, directions=4, every_token=False)


def test_samples_show_the_bias_that_is_predicted(prefixes: Prefixes) -> None:
    found = compare(prefixes, E("opd", "forward_kl"), draws=1000, directions=4)
    assert found.agrees and found.bias > 1 and abs(found.z_exact) > found.z_limit
    low, high = found.along_interval
    assert low < found.along < high and abs(found.along - found.along_predicted) < high - low
    assert found.noise(4) == pytest.approx(2 * found.noise(1))
    assert found.rollouts_for(1.0) == pytest.approx(found.signal_to_noise**-2)
    assert compare(prefixes, E("opd", "reverse_kl"), draws=8).bias < 1e-12


def test_what_cannot_be_compared_is_refused(prefixes: Prefixes, off_policy: Prefixes) -> None:
    with pytest.raises(InvalidArgumentError, match="what comes after it"):
        compare(prefixes, E("return_to_go", "jsd", gamma=1.0))
    with pytest.raises(InvalidArgumentError, match="must depend only on each token and its prefix"):
        compare(prefixes, E("opd_plus", "jsd"), E("return_to_go", "jsd", gamma=1.0))
    with pytest.raises(InvalidArgumentError, match="on-policy only"):
        compare(off_policy, E("opd_plus", "jsd", baseline="leave_one_out"))
    with pytest.raises(InvalidArgumentError, match="a baseline without importance biases"):
        compare(off_policy, E("opd_plus", "jsd", baseline="constant", baseline_value=1.0))
    with pytest.raises(LossError, match="log-probabilities"):
        compare(prefixes, E("opd_plus", "jsd"), lambda r: r.token_sum(r.teacher_logprobs))
    for argument in ({"draws": 0}, {"directions": 0}):
        with pytest.raises(InvalidArgumentError, match=next(iter(argument))):
            compare(prefixes, E("opd_plus", "jsd"), **argument)
