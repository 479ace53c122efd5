"""Language models for the trainer: logits, scores and samples."""

from __future__ import annotations

from abc import abstractmethod

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from opdtheory.errors import InvalidArgumentError
from opdtheory.rollouts import Rollouts
from opdtheory.training.models.samples import Samples
from opdtheory.training.models.sampling import Decoder

__all__ = ["LanguageModel", "check_same_vocabulary", "response_logits", "rollouts"]


class LanguageModel(nn.Module, Decoder):
    """A causal language model over a vocabulary.

    Masks are 1 on tokens and 0 on padding. Padding on the left, on the right or both does not affect other rows or
    positions. A model has no dropout: the same tokens give the same logits.
    """

    @abstractmethod
    def logits(
        self, tokens: Int64[Tensor, "B L"], mask: Float[Tensor, "B L"] | None = None, *, since: int = 0
    ) -> Float[Tensor, "B L2 V"]:
        r"""Logits of the next token: row $n$ predicts token $n+1$.

        Args:
            tokens: `(B, L)`.
            mask: `(B, L)`; by default 1 everywhere.
            since: first row to return; with a large vocabulary the others are expensive.

        Returns:
            `(B, L - since, V)`; finite but meaningless at padding.
        """

    def forward(
        self, tokens: Int64[Tensor, "B L"], mask: Float[Tensor, "B L"] | None = None, *, since: int = 0
    ) -> Float[Tensor, "B L2 V"]:
        """As `logits`."""
        return self.logits(tokens, mask, since=since)

    def score(self, tokens: Int64[Tensor, "B L"], mask: Float[Tensor, "B L"] | None = None) -> Float[Tensor, "B L"]:
        r"""$\log p(y_n \mid y_{<n})$ of each token in nats; 0 at padding and at each row's first token."""
        logits = self.logits(tokens, mask)[:, :-1]
        logprobs = torch.log_softmax(logits, -1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
        if mask is not None:
            logprobs = torch.where((mask[:, 1:] > 0) & (mask[:, :-1] > 0), logprobs, torch.zeros_like(logprobs))
        return torch.cat((logprobs.new_zeros(tokens.shape[0], 1), logprobs), dim=1)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(self.parameters()).dtype


def response_logits(model: LanguageModel, samples: Samples) -> Float[Tensor, "B T V"]:
    """A model's logits at each response position, given the prompt and the response before it; differentiable."""
    tokens = torch.cat((samples.prompts, samples.tokens[:, :-1]), dim=1)
    mask = torch.cat((samples.prompt_mask, samples.present[:, :-1]), dim=1)
    return model.logits(tokens, mask, since=samples.prompts.shape[1] - 1)


def rollouts(student: LanguageModel, teacher: LanguageModel, samples: Samples, *, temperature: float = 1.0) -> Rollouts:
    r"""The input of every loss: samples with both models' logits, divided by the sampling temperature.

    The result is differentiable in the student; the teacher is scored without gradients.

    Raises:
        InvalidArgumentError: the models' vocabularies differ.
    """
    check_same_vocabulary(student, teacher)
    with torch.no_grad():
        teacher_logits = response_logits(teacher, samples)
    student_logits = response_logits(student, samples)
    return Rollouts.from_logits(
        samples.tokens,
        student_logits / temperature,
        teacher_logits / temperature,
        mask=samples.mask.to(student_logits.dtype),
        behavior_logprobs=samples.logprobs.to(student_logits.dtype),
    )


def check_same_vocabulary(student: LanguageModel, teacher: LanguageModel) -> None:
    """Raise unless the tokens of two models mean the same.

    Raises:
        InvalidArgumentError: the fingerprints or the sizes of the vocabularies differ.
    """
    ours, theirs = student.vocabulary, teacher.vocabulary
    if ours.size != theirs.size or ours.fingerprint != theirs.fingerprint:
        raise InvalidArgumentError(
            "teacher",
            f"must have the student's vocabulary, of {ours.size} tokens ({ours.fingerprint}), got one of {theirs.size} "
            f"tokens ({theirs.fingerprint})",
        )
