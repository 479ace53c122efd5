"""TRL's trainers that make a claim about a divergence, at the settings that people are told to use.

Each builder takes the pair of exactly known models and returns the trainer, unstarted, as a user would write it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import Trainer
from trl import (
    DistillationConfig,
    DistillationTrainer,
    GRPOConfig,
    GRPOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.gold import GOLDConfig, GOLDTrainer
from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer

from examples.trainers.entry import Entry
from examples.trainers.gkd import gkd
from opdtheory.end_to_end import TrainerPair
from opdtheory.integrations.trl import OPDPlusTrainer, OPDTrainer

__all__ = ["ENTRIES"]

Build = Callable[[TrainerPair], Trainer]


def distillation(**settings: Any) -> Build:
    """`DistillationTrainer`."""

    def build(pair: TrainerPair) -> Trainer:
        return DistillationTrainer(
            model=pair.student,
            teacher_model=pair.teacher,
            args=DistillationConfig(**pair.arguments, max_completion_length=pair.horizon, **settings),
            train_dataset=pair.dataset.select_columns(["prompt"]),
            processing_class=pair.tokenizer,
        )

    return build


def gold(**settings: Any) -> Build:
    """`GOLDTrainer` with one tokenizer for both models, on the student's own answers."""

    def build(pair: TrainerPair) -> Trainer:
        plain = {"lmbda": 1.0, "temperature": 1.0, "top_p": 1.0, "max_length": 64, **settings}
        return GOLDTrainer(
            model=pair.student,
            teacher_model=pair.teacher,
            args=GOLDConfig(**pair.arguments, max_completion_length=pair.horizon, **plain),
            train_dataset=pair.dataset.select_columns(["messages"]),
            processing_class=pair.tokenizer,
        )

    return build


def iw_opd(**settings: Any) -> Build:
    """`IWOPDTrainer`."""

    def build(pair: TrainerPair) -> Trainer:
        plain = {"top_p": 1.0, "max_length": 64, **settings}
        return IWOPDTrainer(
            model=pair.student,
            teacher_model=pair.teacher,
            args=IWOPDConfig(**pair.arguments, max_completion_length=pair.horizon, **plain),
            train_dataset=pair.dataset.select_columns(["messages"]),
            processing_class=pair.tokenizer,
        )

    return build


def sdft(**settings: Any) -> Build:
    """`SDFTTrainer`, whose base model is the teacher here, without privileged context."""

    def build(pair: TrainerPair) -> Trainer:
        data = pair.dataset.select_columns(["prompt"])
        plain = {"num_generations": 1, "teacher_prompt_template": "{prompt}{privileged_context}", **settings}
        return SDFTTrainer(
            model=pair.student,
            args=SDFTConfig(**pair.arguments, max_completion_length=pair.horizon, **plain),
            train_dataset=data.add_column("privileged_context", [""] * len(data)),
            processing_class=pair.tokenizer,
        )

    return build


def whole_vocabulary(divergence: str) -> Build:
    """The plug-in `OPDTrainer`."""

    def build(pair: TrainerPair) -> Trainer:
        return OPDTrainer(
            model=pair.student,
            teacher_model=pair.teacher,
            divergence=divergence,
            args=DistillationConfig(**pair.arguments, max_completion_length=pair.horizon),
            train_dataset=pair.dataset.select_columns(["prompt"]),
            processing_class=pair.tokenizer,
        )

    return build


def sampled_tokens(divergence: str, **options: Any) -> Build:
    """The plug-in `OPDPlusTrainer`."""

    def build(pair: TrainerPair) -> Trainer:
        settings = {"loss_type": "dr_grpo", "num_generations": 2}
        return OPDPlusTrainer(
            pair.student,
            pair.teacher,
            divergence=divergence,
            args=GRPOConfig(**pair.arguments, max_completion_length=pair.horizon, **settings),
            train_dataset=pair.dataset.select_columns(["prompt"]),
            processing_class=pair.tokenizer,
            **options,
        )

    return build


def sft(**settings: Any) -> Build:
    """`SFTTrainer` on answers of the teacher."""

    def build(pair: TrainerPair) -> Trainer:
        return SFTTrainer(
            model=pair.student,
            args=SFTConfig(**pair.arguments, max_length=64, **settings),
            train_dataset=pair.dataset.select_columns(["prompt", "completion"]),
            processing_class=pair.tokenizer,
        )

    return build


def no_reward(completions: list[str], **_: Any) -> list[float]:
    """Zero for every completion: what remains is the KL penalty."""
    return [0.0] * len(completions)


def grpo(**settings: Any) -> Build:
    """`GRPOTrainer` with a zero reward: its KL penalty towards the reference model, the teacher here."""

    def build(pair: TrainerPair) -> Trainer:
        plain = {"num_generations": 2, "beta": 1.0, **settings}
        return GRPOTrainer(
            model=pair.student,
            reward_funcs=no_reward,
            args=GRPOConfig(**pair.arguments, max_completion_length=pair.horizon, **plain),
            train_dataset=pair.dataset.select_columns(["prompt"]),
            processing_class=pair.tokenizer,
        )

    return build


def rloo(**settings: Any) -> Build:
    """`RLOOTrainer` with a zero reward: its KL penalty, as a reward."""

    def build(pair: TrainerPair) -> Trainer:
        plain = {"num_generations": 2, "beta": 1.0, **settings}
        return RLOOTrainer(
            model=pair.student,
            reward_funcs=no_reward,
            args=RLOOConfig(**pair.arguments, max_completion_length=pair.horizon, **plain),
            train_dataset=pair.dataset.select_columns(["prompt"]),
            processing_class=pair.tokenizer,
        )

    return build


_GKD = "documentation: `beta` interpolates between the forward KL (0) and the reverse KL (1)"
_KL = "documentation: `beta` is the KL coefficient, of a KL to the reference model"


def _entry(name: str, build: Build, claim: str, says: str, **settings: Any) -> Entry:
    return Entry.of(name, "trl", build, claim, says, **settings)


_OWN = ("reverse_kl", "forward_kl", "jsd", "chi2", "alpha(alpha=0.5)")

ENTRIES: tuple[Entry, ...] = (
    _entry("GKDTrainer, beta=1, temperature=1", gkd(beta=1.0, temperature=1.0), "reverse_kl", _GKD),
    _entry("GKDTrainer, beta=0, temperature=1", gkd(beta=0.0, temperature=1.0), "forward_kl", _GKD),
    _entry("GKDTrainer, beta=0.5, temperature=1", gkd(beta=0.5, temperature=1.0), "jsd", _GKD),
    _entry("GKDTrainer, beta=0.1, temperature=1", gkd(beta=0.1, temperature=1.0), "skew_jsd(beta=0.1)", _GKD),
    _entry("GKDTrainer, beta=1, default temperature", gkd(beta=1.0), "reverse_kl", _GKD),
    _entry("DistillationTrainer, defaults", distillation(), "reverse_kl", _GKD),
    _entry("DistillationTrainer, beta=0", distillation(beta=0.0), "forward_kl", _GKD),
    _entry("DistillationTrainer, beta=0.5", distillation(beta=0.5), "jsd", _GKD),
    _entry("DistillationTrainer, defaults, as a token mean", distillation(), "reverse_kl", _GKD, reduction="any"),
    _entry("GOLDTrainer, beta=1, no ULD", gold(beta=1.0), "reverse_kl", _GKD),
    _entry("GOLDTrainer, beta=0, no ULD", gold(beta=0.0), "forward_kl", _GKD),
    _entry("GOLDTrainer, beta=0.5, no ULD", gold(beta=0.5), "jsd", _GKD),
    _entry("IWOPDTrainer, defaults", iw_opd(), "reverse_kl", "name: on-policy distillation, importance-weighted"),
    _entry(
        "SDFTTrainer, full logits", sdft(distillation_mode="full_logits", distillation_alpha=1.0), "reverse_kl", _GKD
    ),
    _entry(
        "SDFTTrainer, sampled token",
        sdft(distillation_mode="sampled_token", distillation_alpha=1.0),
        "reverse_kl",
        _GKD,
    ),
    _entry(
        "SDFTTrainer, top 2",
        sdft(distillation_mode="topk_logits", distillation_topk=2, distillation_alpha=1.0),
        "reverse_kl",
        _GKD,
    ),
    _entry("GRPOTrainer, dr_grpo", grpo(loss_type="dr_grpo"), "reverse_kl", _KL),
    _entry("GRPOTrainer, defaults", grpo(), "reverse_kl", _KL),
    _entry("GRPOTrainer, bnpo", grpo(loss_type="bnpo"), "reverse_kl", _KL),
    _entry("GRPOTrainer, grpo", grpo(loss_type="grpo"), "reverse_kl", _KL),
    _entry(
        "GRPOTrainer, dr_grpo, sequence ratios",
        grpo(loss_type="dr_grpo", importance_sampling_level="sequence"),
        "reverse_kl",
        _KL,
    ),
    _entry(
        "GRPOTrainer, dr_grpo, truncated completions masked",
        grpo(loss_type="dr_grpo", mask_truncated_completions=True),
        "reverse_kl",
        _KL,
    ),
    _entry("RLOOTrainer, defaults", rloo(), "reverse_kl", _KL, granularity="sequence"),
    _entry(
        "SFTTrainer on the teacher's answers",
        sft(),
        "forward_kl",
        "common knowledge: the likelihood of the teacher's samples is the forward KL of sequences",
        granularity="sequence",
        teacher_answers=True,
        reduction="token_mean",
    ),
    _entry(
        "GKDTrainer, lmbda=0, beta=0, temperature=1, on the teacher's answers",
        gkd(beta=0.0, temperature=1.0, lmbda=0.0),
        "forward_kl",
        _GKD,
        granularity="sequence",
        teacher_answers=True,
        reduction="any",
    ),
    *(_entry(f"OPDTrainer, {name}", whole_vocabulary(name), name, "our plug-in's documentation") for name in _OWN),
    *(
        _entry(f"OPDPlusTrainer, {name}, dr_grpo", sampled_tokens(name), name, "our plug-in's documentation")
        for name in _OWN
    ),
    *(
        _entry(
            f"OPDPlusTrainer, {name}, dr_grpo, top_k=1",
            sampled_tokens(name, top_k=1, baseline="rest"),
            name,
            "our plug-in's documentation",
        )
        for name in ("forward_kl", "jsd")
    ),
)
