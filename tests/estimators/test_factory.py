"""The door to the estimators: names, options, and what is refused."""

from __future__ import annotations

import math

import pytest

from opdtheory.errors import InvalidArgumentError
from opdtheory.estimators import estimator


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "options", "argument"),
    [
        (("opd_pluss", "jsd"), {}, "name"),
        (("opd_plus",), {}, "divergence"),
        (("opd_plus", "jds"), {}, "divergence"),
        (("k1_loss", "jsd"), {}, "divergence"),
        (("k1_loss",), {"baseline": "group_mean"}, "baseline"),
        (("k1_loss",), {"importance": "ppo"}, "importance"),
        (("k1_reward",), {"gamma": 0.5}, "gamma"),
        (("k1_reward",), {"alpha": 0.5}, "alpha"),
        (("k1_reward",), {"k": 2}, "k"),
        (("k1_reward",), {"support": "teacher"}, "support"),
        (("k1_reward",), {"discounted": True}, "discounted"),
        (("k1_reward",), {"beta": 0.5}, "beta"),
        (("k1_reward",), {"zscore": "yes"}, "zscore"),
        (("k1_reward",), {"zscore": True, "baseline": "group_mean"}, "zscore"),
        (("k1_reward",), {"eps": 1e-3}, "eps"),
        (("k1_reward",), {"zscore": True, "eps": 0.0}, "eps"),
        (("k1_reward",), {"baseline": "groupmean"}, "baseline"),
        (("k1_reward",), {"baseline": "constant"}, "baseline_value"),
        (("k1_reward",), {"baseline_value": 1.0}, "baseline_value"),
        (("k1_reward",), {"baseline": "constant", "baseline_value": math.nan}, "baseline_value"),
        (("k1_reward",), {"clip_range": 0.2}, "clip_range"),
        (("k1_reward",), {"importance": "ppo", "clip_range": 0}, "clip_range"),
        (("k1_reward",), {"importance": "tokens"}, "importance"),
        (("k1_reward",), {"importance": "tis", "clip_range": 0.5}, "clip_range"),
        (("k1_reward",), {"importance": "tis", "keep_range": (0.5, 2.0)}, "keep_range"),
        (("k1_reward",), {"importance": "mask", "keep_range": (2.0, 5.0)}, "keep_range"),
        (("k1_reward",), {"importance": "mask", "keep_range": (0.0, 5.0)}, "keep_range"),
        (("k1_reward",), {"importance": "mask", "keep_range": (5.0, 0.5)}, "keep_range"),
        (("k1_reward",), {"importance": "gspo", "clip_range": 2.0}, "clip_range"),
        (("sequence_opd_plus", "jsd"), {"importance": "mask"}, "importance"),
        (("topk_tail_sampled", "jsd"), {}, "k"),
        (("topk_tail_sampled", "jsd"), {"k": 2, "importance": "sequence"}, "importance"),
        (("topk_tail_sampled", "jsd"), {"k": 2, "baseline": "vocabulary"}, "baseline"),
        (("topk_tail_sampled", "jsd"), {"k": 2, "baseline_value": 0.5}, "baseline_value"),
        (("k1_reward",), {"clip_log_ratio": -1.0}, "clip_log_ratio"),
        (("k1_reward",), {"clip_weight": 1.0}, "clip_weight"),
        (("k1_reward",), {"clip_weight": (1.0, 0.0)}, "clip_weight"),
        (("k1_reward",), {"reduction": "mean"}, "reduction"),
        (("sign",), {"clip_log_ratio": 1.0}, "clip_log_ratio"),
        (("power",), {"alpha": 0.5, "clip_log_ratio": 1.0}, "clip_log_ratio"),
        (("power",), {"alpha": 0.0}, "alpha"),
        (("box_cox",), {}, "alpha"),
        (("box_cox",), {"alpha": math.inf}, "alpha"),
        (("full_vocab", "jsd"), {"importance": "token"}, "importance"),
        (("full_vocab", "jsd"), {"clip_log_ratio": 1.0}, "clip_log_ratio"),
        (("return_to_go", "jsd"), {}, "gamma"),
        (("return_to_go", "jsd"), {"gamma": 1.5}, "gamma"),
        (("return_to_go", "jsd"), {"gamma": 1.0, "importance": "prefix"}, "importance"),
        (("return_to_go", "jsd"), {"gamma": 1.0, "baseline": "vocabulary"}, "baseline"),
        (("topk_tail", "jsd"), {}, "k"),
        (("topk_tail", "jsd"), {"k": 0}, "k"),
        (("topk_tail", "jsd"), {"k": 2.0}, "k"),
        (("topk_tail", "jsd"), {"k": 2, "support": "both"}, "support"),
    ],
)
def test_bad_options_are_refused_by_name(arguments: tuple[str, ...], options: dict[str, object], argument: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^{argument}: ") as caught:
        estimator(*arguments, **options)
    assert isinstance(caught.value, ValueError)
    assert caught.value.argument == argument


def test_unknown_names_come_with_a_suggestion() -> None:
    with pytest.raises(InvalidArgumentError, match="did you mean 'opd_plus'"):
        estimator("opd_pluss", "jsd")
    with pytest.raises(InvalidArgumentError, match="did you mean 'baseline'"):
        estimator("opd_plus", "jsd", basline="constant")
