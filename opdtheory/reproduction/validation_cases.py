"""The estimators, models and prompts of `docs/validation.md`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from opdtheory.estimators import Estimator, estimator
from opdtheory.estimators.factory import examples
from opdtheory.training.models.transformer import Transformer, TransformerConfig
from opdtheory.training.models.vocabulary import CharacterVocabulary
from opdtheory.training.tasks import task
from opdtheory.training.validation.comparison import compare, random_images
from opdtheory.training.validation.enumerated import validate_by_enumeration
from opdtheory.training.validation.prefixes import Prefixes
from opdtheory.training.validation.report import Validation

if TYPE_CHECKING:
    from opdtheory.training.models.huggingface import HuggingFaceModel

__all__ = [
    "ENUMERATED",
    "QUICK",
    "SMALL",
    "SMOLLM2",
    "Case",
    "enumerated",
    "small",
    "small_prefixes",
    "smollm2",
    "smollm2_prefixes",
]


@dataclass(frozen=True)
class Case:
    """One row: an estimator, and who samples.

    Attributes:
        name: name of the estimator.
        divergence: label of the divergence, if the estimator has one.
        options: options of the estimator.
        off_policy: whether another model samples.
        eos: whether rollouts may end early in an enumeration.
        draws: number of draws of each next token (default: the section's).
    """

    name: str
    divergence: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    off_policy: bool = False
    eos: bool = True
    draws: int | None = None

    def estimator(self) -> Estimator:
        """The estimator."""
        return estimator(self.name, self.divergence, **self.options)


_DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "chi2", "hellinger", "alpha(alpha=0.3)")
_BOTH = tuple(Case(name, divergence) for divergence in _DIVERGENCES for name in ("opd", "opd_plus"))
_OTHERS = (
    Case("opd_plus_centred", "forward_kl"),
    Case("k1_loss"),
    Case("k2_loss"),
    Case("k3_loss"),
    Case("k1_reward"),
    Case("k2_reward"),
    Case("k3_reward"),
    Case("box_cox", options={"alpha": 0.3}),
    Case("power", options={"alpha": 0.5}),
    Case("sign"),
    Case("full_vocab", "chi2"),
    Case("topk_truncated", "reverse_kl", {"k": 2}),
    Case("topk_truncated", "forward_kl", {"k": 2, "support": "student"}),
    Case("topk_renormalised", "jsd", {"k": 2}),
    Case("topk_tail", "jsd", {"k": 2}),
    Case("topk_reward", "jsd", {"k": 2}),
    Case("return_to_go", "jsd", {"gamma": 0.0}),
)
_MODIFIED = (
    Case("opd_plus", "reverse_kl", {"clip_log_ratio": 1.0}),
    Case("opd_plus", "chi2", {"clip_log_ratio": 1.0}),
    Case("opd", "forward_kl", {"clip_log_ratio": 1.0}),
    Case("k1_loss", options={"clip_log_ratio": 1.0}),
    Case("k3_loss", options={"clip_log_ratio": 1.0}),
    Case("opd_plus", "forward_kl", {"clip_weight": (-1.0, 2.0)}),
    Case("opd_plus", "reverse_kl", {"baseline": "constant", "baseline_value": -1.0}),
    Case("opd", "jsd", {"baseline": "group_mean"}, eos=False),
    Case("opd_plus", "jsd", {"baseline": "leave_one_out"}, eos=False),
    Case("opd_plus", "jsd", {"zscore": True}, eos=False),
    Case("opd_plus", "jsd", {"reduction": "sequence_mean"}),
    Case("opd_plus", "forward_kl", off_policy=True),
    Case("opd_plus", "forward_kl", {"importance": "token"}, off_policy=True),
    Case("opd_plus", "forward_kl", {"importance": "ppo"}, off_policy=True),
    Case("k2_loss", off_policy=True),
    Case("k2_loss", options={"importance": "token"}, off_policy=True),
    Case("opd_plus", "forward_kl", {"baseline": "optimal"}),
    Case("opd_plus_centred", "forward_kl", {"importance": "tis", "clip_range": 1.05}, off_policy=True),
    Case("k2_loss", options={"importance": "mask", "keep_range": (0.9, 1.1)}, off_policy=True),
    Case("topk_tail_sampled", "forward_kl", {"k": 2}),
    Case("topk_tail_sampled", "jsd", {"k": 2, "support": "student", "baseline": "optimal"}),
    Case("topk_tail_sampled", "forward_kl", {"k": 2}, off_policy=True),
    Case("topk_tail_sampled", "chi2", {"k": 2, "importance": "token"}, off_policy=True),
)

_WHOLE_ROLLOUT = ("return_to_go", "sequence_opd_plus")


def _unlisted(token_local: bool) -> tuple[Case, ...]:
    """The examples of estimators that the lists here do not have."""
    listed = {*_WHOLE_ROLLOUT, *(case.name for case in (*_BOTH, *_OTHERS))}
    losses = [loss for loss in examples() if loss.name not in listed and loss.is_token_local == token_local]
    return tuple(
        Case(loss.name, loss.settings.get("divergence"), {k: v for k, v in loss.settings.items() if k != "divergence"})
        for loss in losses
    )


SMALL = (
    *_BOTH,
    *_OTHERS,
    *_MODIFIED,
    *_unlisted(token_local=True),
    Case("opd_plus", "jsd", {"baseline": "vocabulary"}),
    Case("opd_plus", "jsd", {"reduction": "token_mean"}),
)
ENUMERATED = (
    Case("return_to_go", "jsd", {"gamma": 1.0}),
    Case("return_to_go", "forward_kl", {"gamma": 1.0, "clip_log_ratio": 1.0}),
    Case("return_to_go", "jsd", {"gamma": 0.7}),
    Case("return_to_go", "jsd", {"gamma": 0.7, "discounted": True}),
    Case("return_to_go", "jsd", {"gamma": 1.0, "importance": "sequence"}, off_policy=True),
    Case("return_to_go", "chi2", {"gamma": 1.0, "baseline": "leave_one_out"}, eos=False),
    Case("opd_plus", "jsd", {"importance": "gspo"}, off_policy=True),
    Case("opd_plus", "jsd", {"importance": "sequence_mask", "keep_range": (0.8, 1.25)}, off_policy=True),
    Case("topk_tail_sampled", "jsd", {"k": 2, "importance": "prefix"}, off_policy=True),
    Case("sequence_opd_plus", "reverse_kl"),
    Case("sequence_opd_plus", "hellinger"),
    Case("sequence_opd_plus", "hellinger", {"clip_log_ratio": 1.0}),
    Case("sequence_opd_plus", "jsd", {"importance": "sequence"}, off_policy=True),
    *_unlisted(token_local=False),
    *_BOTH,
    *_OTHERS,
    *_MODIFIED,
    Case("opd_plus", "jsd", {"importance": "prefix"}, off_policy=True),
    Case("opd_plus", "jsd", {"importance": "sequence"}, off_policy=True),
    Case("full_vocab", "jsd", off_policy=True),
    Case("full_vocab", "jsd", {"importance": "prefix"}, off_policy=True),
)
# The last read whole distributions beside the sampled token: they are run on the tokens drawn, and are given fewer.
SMOLLM2 = (
    *_BOTH,
    *(dataclasses.replace(case, draws=128) if case.name == "topk_reward" else case for case in _OTHERS),
    Case("opd_plus", "reverse_kl", {"clip_log_ratio": 6.0}),
    Case("opd_plus", "chi2", {"clip_log_ratio": 6.0}),
    Case("full_vocab", "reverse_kl"),
    Case("topk_tail_sampled", "reverse_kl", {"k": 16}, draws=128),
    Case("topk_tail_sampled", "forward_kl", {"k": 16, "baseline": "rest"}, draws=128),
    Case("topk_tail_sampled", "jsd", {"k": 16, "baseline": "optimal"}, draws=128),
    Case("topk_tail_sampled", "hellinger", {"k": 64, "baseline": "optimal"}, draws=128),
    Case("opd_plus", "forward_kl", {"baseline": "optimal"}, draws=128),
)

# What a quick run and the tests repeat.
QUICK = {
    "small": tuple(Case("opd", divergence) for divergence in ("reverse_kl", "forward_kl"))
    + (Case("k3_loss"), Case("topk_tail", "jsd", {"k": 2}), Case("opd_plus", "jsd", {"zscore": True}, eos=False)),
    "enumerated": (
        Case("return_to_go", "jsd", {"gamma": 0.7}),
        Case("sequence_opd_plus", "hellinger"),
        Case("opd_plus", "jsd", {"importance": "prefix"}, off_policy=True),
    ),
}

_PROMPTS = (
    "The capital of France is",
    "To add 27 and 58, first",
    "Water boils when",
    "Once upon a time there was",
    "The derivative of x squared is",
    "In Python, a list is",
    "The largest planet of the solar system",
    "She opened the door and",
)


def small_prefixes(off_policy: bool = False) -> Prefixes:
    """Prefixes of the arithmetic task after which the small student and the small teacher are compared."""
    addition = task("arithmetic")
    length = addition.max_prompt + addition.max_response

    def model(seed: int) -> Transformer:
        built = Transformer(TransformerConfig(48, 2, 2, length), addition.vocabulary, seed=seed).double()
        return _sharpened(built, 0.25, seed)

    prompts = addition.prompts(addition.examples("test", 8, 0))
    behavior = model(2) if off_policy else None
    return Prefixes.sample(model(0), model(1), prompts, max_new_tokens=12, behavior=behavior, seed=0)


def small(cases: tuple[Case, ...] = SMALL, *, draws: int = 1024) -> Iterator[Validation]:
    """The cases on transformers of 2 layers and width 48, in float64: a student, a teacher and another sampler."""
    met = {off: small_prefixes(off) for off in sorted({case.off_policy for case in cases})}
    pushed = {off: random_images(prefixes, 8, 0) for off, prefixes in met.items()}
    for case in cases:
        off = case.off_policy
        yield compare(met[off], case.estimator(), draws=draws, seed=0, pushed=pushed[off])


def enumerated(cases: tuple[Case, ...] = ENUMERATED) -> Iterator[Validation]:
    """The cases on every rollout of at most 3 tokens out of 4, or of 2 where pairs are enumerated, in float64."""
    vocabulary = CharacterVocabulary("abc")

    def model(seed: int) -> Transformer:
        return _sharpened(Transformer(TransformerConfig(8, 2, 2, 8), vocabulary, seed=seed).double(), 0.4, seed)

    student, teacher, stale = model(0), model(1), model(2)
    for case in cases:
        yield validate_by_enumeration(
            student,
            teacher,
            case.estimator(),
            prompt=vocabulary.encode("a"),
            horizon=3 if case.eos else 2,
            eos=vocabulary.eos if case.eos else None,
            behavior=stale if case.off_policy else None,
        )


def smollm2(
    cases: tuple[Case, ...] = SMOLLM2, *, tokens: int = 25, draws: int = 1024, layer: int | None = None
) -> Iterator[Validation]:
    """The cases with SmolLM2-135M as teacher, and a student with noise in its weights or without one layer.

    Gradients are in the parameters of the last block and the final norm.

    Args:
        cases: the estimators.
        tokens: largest length of each answer.
        draws: number of draws of each next token.
        layer: leave out this layer, instead of adding noise of a tenth of each matrix's standard deviation.

    Raises:
        ImportError: the extra `lm` is missing.
    """
    prefixes = smollm2_prefixes(tokens=tokens, layer=layer)
    pushed = random_images(prefixes, 4, 0)
    for case in cases:
        yield compare(prefixes, case.estimator(), draws=case.draws or draws, seed=0, pushed=pushed)


def smollm2_prefixes(*, tokens: int = 25, layer: int | None = None) -> Prefixes:
    """Prefixes of a student made from SmolLM2-135M, with noise or without a layer, beside the model itself.

    Args:
        tokens: as in `smollm2`.
        layer: as in `smollm2`.

    Raises:
        ImportError: the extra `lm` is missing.
    """
    from opdtheory.training.models.huggingface import smollm2 as load
    from opdtheory.training.models.variants import drop_layer, perturb

    teacher = load()
    student = perturb(teacher, 0.1) if layer is None else drop_layer(teacher, layer)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(_counts(name, student))
    teacher.requires_grad_(False)
    prompts = [teacher.vocabulary.encode(prompt) for prompt in _PROMPTS]
    return Prefixes.sample(student, teacher, prompts, max_new_tokens=tokens, seed=0)


def _counts(name: str, student: HuggingFaceModel) -> bool:
    config: Any = student.network.config
    last = f".layers.{config.num_hidden_layers - 1}."
    return last in name or name.endswith("model.norm.weight")


def _sharpened(model: Transformer, scale: float, seed: int) -> Transformer:
    """The model with noise in its output layer, so that its next-token distributions are not uniform."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        weight = model.head.weight
        weight += scale * torch.randn(weight.shape, dtype=weight.dtype, generator=noise)
    return model
