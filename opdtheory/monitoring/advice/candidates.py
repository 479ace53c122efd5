r"""The estimators that a recommendation compares, by what the teacher can send."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

from opdtheory.divergences import Divergence
from opdtheory.estimators import Estimator, estimator

__all__ = ["CLIP", "HAVES", "Candidate", "Have", "candidates"]

# What the teacher can send of a token: its own log-probability, those of some likeliest ones too, or all.
Have = Literal["sampled", "top_k", "vocabulary"]
HAVES: tuple[Have, ...] = get_args(Have)

# The bound of |log u| that is tried, in nats.
CLIP = 6.0


@dataclass(frozen=True)
class Candidate:
    """An estimator, what it asks of the teacher, and why.

    Attributes:
        loss: the estimator; with `best`, the constant is not known yet and 0.
        needs: what the teacher has to send.
        reason: one sentence.
        theorem: what it rests on.
        best: whether the constant of its baseline is the best one for all rows.
        grouped: whether rollouts of one prompt are compared.
        yours: whether it is the estimator of the run.
    """

    loss: Estimator
    needs: Have
    reason: str
    theorem: str
    best: bool = False
    grouped: bool = False
    yours: bool = False

    def with_constant(self, constant: float) -> Candidate:
        """The same with its constant found, to six digits."""
        options = {key: value for key, value in self.loss.settings.items() if key != "divergence"}
        options["baseline_value"] = float(f"{constant:.6g}")
        return replace(self, loss=estimator(self.loss.name, self.loss.claim.divergence, **options))

    @property
    def k(self) -> int:
        """The number of likeliest tokens that it takes; 0 for none."""
        return int(self.loss.settings.get("k", 0))

    def calls(self, vocabulary: int | None) -> int | None:
        """The log-probabilities that the teacher sends of a token; None for a vocabulary of unknown size."""
        if self.needs == "vocabulary":
            return vocabulary
        if self.needs == "sampled":
            return 1
        return self.k + (self.loss.name == "topk_tail_sampled")


def candidates(divergence: Divergence, have: Have, k: int, group: int, server: bool) -> list[Candidate]:
    """All that the teacher's answers suffice for, the simplest first; a server never sends whole distributions."""
    found = list(_sampled(divergence, group))
    if have != "sampled":
        found += _top(divergence, k)
    if have == "vocabulary" and not server:
        found = [*_whole(divergence, k), *found]
    return found


def _sampled(d: Divergence, group: int) -> Iterator[Candidate]:
    exact = "weighs the sampled token by w_f(u): its expected gradient is exact for any f"
    plain = estimator("opd", d)
    kind = "is exact: for this f, -f(u) is the exact weight up to a constant"
    if plain.claim.verdict != "exact":
        kind = "is biased: it stops the gradient of the ratio, which is right for the reverse KL alone"
    yield Candidate(estimator("opd_plus_centred", d), "sampled", f"{exact}, and nothing is left at the teacher", "T7a")
    yield Candidate(estimator("opd_plus", d), "sampled", exact, "T1")
    yield Candidate(plain, "sampled", kind, "T2")
    best = estimator("opd_plus", d, baseline="constant", baseline_value=0.0)
    words = "takes off the constant of least variance, which does not bias and is estimated from these tokens"
    yield Candidate(best, "sampled", words, "T19", best=True)
    for name in ("opd_plus", "opd"):
        bounded = "bounds log u: less noise, and a bias wherever the bound is met"
        if name == "opd" and plain.claim.verdict != "exact":
            bounded = "bounds log u, and keeps the bias of the stopped gradient"
        yield Candidate(estimator(name, d, clip_log_ratio=CLIP), "sampled", bounded, "T4")
    for loss, verdict, theorem in _KS.get(d.label, ()):
        yield Candidate(estimator(loss), "sampled", verdict, theorem)
    if group > 1:
        words = "takes off the mean of the other rollouts of the prompt, which does not bias"
        yield Candidate(estimator("opd_plus", d, baseline="leave_one_out"), "sampled", words, "T7e", grouped=True)
        words = (
            "takes off the mean of the group with the rollout itself in it: the same times (G - 1)/G, here divided by "
        )
        words += "that, and nothing is left of tokens that no other rollout reaches"
        yield Candidate(estimator("opd_plus", d, baseline="group_mean"), "sampled", words, "T7e", grouped=True)


_KS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "reverse_kl": (
        ("k2_loss", "is exact: differentiated, k2 weighs a token by log u", "T4"),
        ("k1_loss", "has no expected gradient: differentiated, k1 weighs every token alike", "T4"),
        ("k3_loss", "descends the forward KL: differentiated, k3 weighs a token by u - 1", "T4"),
        ("k3_reward", "descends the reverse KL less the forward KL, which is no divergence", "T4"),
    ),
    "forward_kl": (("k3_loss", "is exact for the forward KL: differentiated, k3 weighs a token by u - 1", "T4"),),
}


def _top(d: Divergence, k: int) -> Iterator[Candidate]:
    split = f"sums the teacher's {k} likeliest tokens and lets the sampled one stand for the others: exact for any f"
    words = f"{split}, with the weight of the others as one for a constant"
    yield Candidate(estimator("topk_tail_sampled", d, k=k, baseline="rest"), "top_k", words, "T13, T19b")
    yield Candidate(estimator("topk_tail_sampled", d, k=k), "top_k", split, "T13")
    best = estimator("topk_tail_sampled", d, k=k, baseline="constant", baseline_value=0.0)
    words = f"{split}, less the best constant for all of these tokens"
    yield Candidate(best, "top_k", words, "T13, T19", best=True)
    words = "is exact for a coarser divergence, with all other tokens as one: no noise, and a bias within the rest"
    yield Candidate(estimator("topk_tail", d, k=k), "top_k", words, "T9d")
    words = f"compares the {k} tokens among themselves: no noise, and nothing is said of the rest"
    yield Candidate(estimator("topk_renormalised", d, k=k), "top_k", words, "T9c")
    words = f"cuts the sum after {k} tokens: no noise, and the teacher is no longer where it ends"
    yield Candidate(estimator("topk_truncated", d, k=k), "top_k", words, "T9a")


def _whole(d: Divergence, k: int) -> Iterator[Candidate]:
    words = "sums over the whole vocabulary: no noise is left at a history"
    yield Candidate(estimator("full_vocab", d), "vocabulary", words, "T7c")
    words = f"sums the teacher's {k} likeliest tokens and samples the others, with the best constant of each history"
    split = estimator("topk_tail_sampled", d, k=k, baseline="optimal")
    yield Candidate(split, "vocabulary", words, "T13, T19")
    words = "takes off the best constant of each history: the least that a sampled token alone allows"
    yield Candidate(estimator("opd_plus", d, baseline="optimal"), "vocabulary", words, "T19")
    words = "takes off the mean weight of each history, which does not bias"
    yield Candidate(estimator("opd_plus", d, baseline="vocabulary"), "vocabulary", words, "T7b")
