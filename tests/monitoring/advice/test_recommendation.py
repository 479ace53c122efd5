"""The ranking, what is listed, and what the advice says."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from opdtheory import Divergence, Rollouts, estimator, u
from opdtheory.errors import InvalidArgumentError
from opdtheory.estimators import Estimator
from opdtheory.monitoring.advice import Advice, recommend
from opdtheory.monitoring.sums import Sums, group_of
from opdtheory.monitoring.tokens import SampledTokens
from opdtheory.rollouts import Payload
from tests.monitoring.advice import brute
from tests.tolerances import ALGEBRA, ENUMERATION


def rollouts(batch: int = 4, length: int = 5, size: int = 6, seed: int = 0, scale: float = 1.5) -> Rollouts:
    student, teacher = (x.view(batch, length, size) for x in brute.pair(batch * length, size, seed, scale))
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.multinomial(student.softmax(-1).flatten(0, 1), 1, generator=generator).view(batch, length)
    mask = torch.ones(batch, length, dtype=torch.float64)
    mask[1, 3:] = 0.0
    return Rollouts.from_logits(tokens, student, teacher, mask)


def by_label(advice: Advice) -> dict[str, Any]:
    return {choice.loss.label: choice for choice in advice.choices}


def kernel(log_p: Tensor) -> Tensor:
    centred = log_p - log_p.mean(-1, keepdim=True)
    unit = centred / centred.norm(dim=-1, keepdim=True)
    return unit @ unit.T


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "hellinger"])
def test_the_numbers_are_those_of_every_next_token(name: str) -> None:
    given = rollouts()
    live = given.mask > 0
    student, teacher = given.student_logits[live], given.teacher_logits[live]
    cosines, target = kernel(student.log_softmax(-1)), brute.exact(name, student, teacher)
    unit = float((cosines * (target @ target.T)).sum())
    advice = recommend(given, "vocabulary", name, k=2)
    assert advice.exact and advice.tokens == advice.batch_tokens == int(live.sum())
    for choice in advice.choices:
        mean, spread, _ = brute.mean_and_spread(choice.loss, student, teacher)
        bias = mean - target
        stated = float((cosines * (bias @ bias.T)).sum()) / unit
        assert choice.bias == pytest.approx(stated, rel=1e-10, abs=ENUMERATION), choice.loss.label
        noise = float(spread.sum()) / unit
        assert choice.variance == pytest.approx(noise, rel=1e-10, abs=ENUMERATION), choice.loss.label
    errors = [choice.error for choice in advice.choices]
    # Choices that are equal up to rounding stand in the order of their cost.
    assert errors[0] == 0.0 and all(a * (1 - ALGEBRA) <= b for a, b in itertools.pairwise(errors))


def test_the_bias_decides_in_large_batches() -> None:
    """The twin that leaves the bias out would recommend cutting the sum after k tokens, in any batch."""
    given = rollouts()
    small, large = (recommend(given, "top_k", "forward_kl", k=2, batch_tokens=n) for n in (1, 10**9))
    assert small.best.name == "topk_tail" and small.best.bias > 0
    assert large.best.name == "topk_tail_sampled" and large.best.bias == 0
    twin = sorted(large.choices, key=lambda choice: choice.variance)
    assert twin[0].name.startswith("topk_") and twin[0].name != "topk_tail_sampled"
    order = [choice.loss.label for choice in large.choices]
    assert order.index("opd_plus(forward_kl)") < order.index("opd(forward_kl)")


def test_rare_outcomes_turn_from_noise_to_bias() -> None:
    given = rollouts(scale=3.0)
    whole, seen = (recommend(given, "sampled", "chi2", batches=n) for n in (None, 2))
    before, after = (by_label(x)["opd_plus(chi2)"] for x in (whole, seen))
    assert before.bias == 0 and after.bias > 0 and after.variance < before.variance
    many = by_label(recommend(given, "sampled", "chi2", batches=10**12))["opd_plus(chi2)"]
    assert many.variance == pytest.approx(before.variance, rel=1e-9)


NEEDS = {"full_vocab": 2, "topk_truncated": 1, "topk_renormalised": 1, "topk_tail": 1, "topk_tail_sampled": 1}


def needs(loss: Estimator) -> int:
    return 2 if loss.settings.get("baseline") in ("vocabulary", "optimal") else NEEDS.get(loss.name, 0)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd"])
def test_what_the_teacher_cannot_send_is_not_listed(name: str) -> None:
    given = rollouts()
    logged = SampledTokens.of(given.student_logprobs, given.teacher_logprobs, mask=given.mask)
    for source in (given, logged):
        for level, have in enumerate(("sampled", "top_k", "vocabulary")):
            choices = recommend(source, have, name, k=2, group=2).choices
            assert max(needs(choice.loss) for choice in choices) == level
        server = recommend(source, "vocabulary", name, k=2, server=True)
        assert max(needs(choice.loss) for choice in server.choices) == 1
        assert "server" in " ".join(server.notes)


def test_what_a_choice_takes_is_counted() -> None:
    found = by_label(recommend(rollouts(), "vocabulary", "jsd", k=2, teachers=3))
    assert {x: (found[x].numbers, found[x].calls) for x in ("full_vocab(jsd)", "opd(jsd)", "topk_tail(jsd, k=2)")} == {
        "full_vocab(jsd)": (12, 18),
        "opd(jsd)": (2, 3),
        "topk_tail(jsd, k=2)": (4, 6),
    }
    assert found["topk_tail_sampled(jsd, k=2)"].calls == 9


def test_groups_of_rollouts_and_of_sampled_tokens_are_the_same() -> None:
    given = rollouts()
    logged = SampledTokens.of(
        given.student_logprobs,
        given.teacher_logprobs,
        mask=given.mask,
        student_logits=given.student_logits,
        teacher_logits=given.teacher_logits,
    )
    one, other = (recommend(x, "vocabulary", "jsd", k=2, group=2) for x in (given, logged))
    assert one.to_dict() == other.to_dict()
    found = by_label(one)
    assert found["opd_plus(jsd, baseline=leave_one_out)"].bias == 0
    assert found["opd_plus(jsd, baseline=group_mean)"].bias > 0  # two tokens have no companion


def test_a_group_with_identical_histories_is_noisier_than_the_best_constant() -> None:
    student, teacher = (x.view(1, 1, 5).expand(4, 1, 5) for x in brute.pair(1, 5))
    found = by_label(
        recommend(
            Rollouts.from_logits(torch.zeros(4, 1, dtype=torch.int64), student, teacher), "sampled", "jsd", group=4
        )
    )
    target, losses = brute.exact("jsd", student[:, 0], teacher[:, 0]), {x: y.loss for x, y in found.items()}
    label = "opd_plus(jsd, baseline=leave_one_out)"
    chance, gradients = brute.outcomes(losses[label], student[:, 0], teacher[:, 0])
    total = gradients.sum(1)
    spread = float((chance * (total - target.sum(0)).square().sum(-1)).sum() / target.sum(0).square().sum())
    assert found[label].variance == pytest.approx(spread, rel=1e-10)


@dataclass(frozen=True)
class Run:
    """A diagnosis, as far as a recommendation reads it."""

    sums: Sums
    tokens: int
    estimator: Any
    divergence: Any

    @property
    def batch_tokens(self) -> float:
        """All tokens are one batch."""
        return float(self.tokens)


def diagnosed(given: Rollouts, loss: Any = "opd", divergence: Any = "forward_kl") -> Run:
    tokens = SampledTokens.of(given.student_logprobs, given.teacher_logprobs, mask=given.mask)
    sums = Sums.empty()
    sums.add(tokens.log_u, tokens.student, group_of(tokens.rollout))
    return Run(sums, len(tokens), loss, divergence)


def test_a_diagnosis_names_target_and_estimator() -> None:
    given = rollouts(16, 20)
    run = diagnosed(given, estimator("opd", "forward_kl"))
    advice = recommend(run, "top_k", k=2, group=2)
    assert not advice.exact and advice.divergence == "forward_kl" and advice.tokens == run.tokens
    assert [choice.loss.label for choice in advice.choices if choice.yours] == ["opd(forward_kl)"]
    found = by_label(advice)
    assert found["opd(forward_kl)"].bias > 0.1 and found["opd_plus(forward_kl)"].bias == 0
    assert not {"topk_tail", "topk_truncated", "topk_renormalised"} & {choice.name for choice in advice.choices}
    logged = SampledTokens.of(given.student_logprobs, given.teacher_logprobs, mask=given.mask)
    same = recommend(logged, "top_k", "forward_kl", k=2, group=2)
    assert [x.error for x in same.choices] == [x.error for x in advice.choices]
    assert recommend(run, divergence="jsd").divergence == "jsd"
    vocabulary = recommend(run, "vocabulary")
    assert vocabulary.best.name == "full_vocab" and vocabulary.best.calls is None and "2 V" in str(vocabulary)


@pytest.mark.parametrize(
    ("running", "label"),
    [
        ("opd", "opd(forward_kl)"),
        ("k3_reward", "k3_reward"),
        (estimator("opd", "forward_kl", reduction="token_mean"), "opd(forward_kl)"),
        (estimator("opd", "forward_kl", clip_log_ratio=2.0), "opd(forward_kl, clip_log_ratio=2.0)"),
        (estimator("opd_plus", "jsd"), "opd_plus(jsd)"),
        (estimator("opd_plus", "jsd", zscore=True), None),
        (estimator("topk_tail", "jsd", k=2), None),
        ("my own", None),
    ],
)
def test_the_estimator_of_the_run_is_marked_or_added(running: Any, label: str | None) -> None:
    advice = recommend(diagnosed(rollouts(8, 20), running))
    yours = [choice.loss.label for choice in advice.choices if choice.yours]
    assert yours == ([] if label is None else [label])
    assert ("* the estimator of the run" in str(advice)) == bool(yours)


def test_as_many_tokens_as_the_vocabulary_leave_nothing() -> None:
    advice = recommend(rollouts(), "top_k", "jsd", k=50)
    assert all(choice.error < 1e-25 for choice in advice.choices if choice.name.startswith("topk"))


def test_a_payload_is_read_as_sampled_tokens() -> None:
    given = rollouts()
    kept = given.teacher_logits.log_softmax(-1).topk(2, -1)
    payload = Payload(kept.indices, kept.values)
    sent = Rollouts.from_payload(given.tokens, given.student_logits, payload, given.teacher_logprobs, given.mask)
    assert not recommend(sent, "top_k", "jsd", k=2).exact


def test_words_and_dictionary() -> None:
    advice = recommend(rollouts(), "vocabulary", "jsd", k=2, teachers=2)
    text = str(advice)
    for part in ("full_vocab(jsd)", "T7c", "OPDTrainer", "verl: cannot", "opdtheory train --estimator", "T16"):
        assert part in text
    assert json.loads(json.dumps(advice.to_dict()))["choices"][0]["name"] == "full_vocab"
    words = {
        name: recommend(rollouts(), "sampled", name, teachers=2).notes[-1] for name in ("reverse_kl", "forward_kl")
    }
    assert "geometric" in words["reverse_kl"] and "arithmetic" in words["forward_kl"]


def test_a_divergence_of_ones_own() -> None:
    mine = Divergence.from_expr((u - 1) ** 2 / 2, name="half chi2")
    advice = recommend(rollouts(), "top_k", mine, k=2)
    assert all(choice.loss.claim.divergence is mine for choice in advice.choices if "loss" not in choice.name)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"have": "logits"}, "have: must be one of"),
    ({"divergence": None}, "divergence: must be named"),
    ({"k": 0}, "k: must be an integer"),
    ({"group": 3}, "group: must divide the number of rollouts, 4, got 3"),
    ({"teachers": 0}, "teachers: must be an integer"),
    ({"batch_tokens": 0}, "batch_tokens: must be an integer"),
    ({"batches": 0}, "batches: must be an integer"),
    ({"coherence": 2.0}, r"coherence: must be a number in \[0, 1\]"),
]


@pytest.mark.bad_input
@pytest.mark.parametrize(("options", "problem"), BAD)
def test_errors_name_the_argument(options: dict[str, Any], problem: str) -> None:
    given = {"have": "sampled", "divergence": "jsd", **options}
    with pytest.raises(InvalidArgumentError, match=problem):
        recommend(rollouts(), **given)


@pytest.mark.bad_input
def test_errors_of_what_is_given() -> None:
    with pytest.raises(InvalidArgumentError, match="found_or_rollouts: must be Rollouts"):
        recommend([1.0], "sampled", "jsd")  # type: ignore[arg-type]
    given = rollouts()
    same = Rollouts.from_logits(given.tokens, given.student_logits, given.student_logits)
    with pytest.raises(InvalidArgumentError, match="found_or_rollouts: must not have a gradient of zero"):
        recommend(same, "sampled", "jsd")
    empty = Rollouts.from_logits(given.tokens, given.student_logits, given.teacher_logits, torch.zeros_like(given.mask))
    with pytest.raises(InvalidArgumentError, match="found_or_rollouts: must hold a token that counts"):
        recommend(empty, "sampled", "jsd")


@pytest.mark.parametrize("held", [1, 40])
def test_chunks_change_nothing(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = recommend(rollouts(), "vocabulary", "jsd", k=2, group=2, batches=5)
    monkeypatch.setattr("opdtheory.monitoring.advice.rows._HELD", held)
    pieces = recommend(rollouts(), "vocabulary", "jsd", k=2, group=2, batches=5)
    for one, other in zip(whole.choices, pieces.choices, strict=True):
        assert one.loss.label == other.loss.label
        assert one.error == pytest.approx(other.error, rel=1e-10, abs=1e-14)
