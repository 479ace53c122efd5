"""Language models as the trainer sees them: logits, scores and samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from opdtheory.errors import InvalidArgumentError
from opdtheory.rollouts import Rollouts
from opdtheory.training.models.samples import Cache, Environment, Samples
from opdtheory.training.models.sampling import sample
from opdtheory.training.models.vocabulary import Vocabulary

__all__ = ["LanguageModel", "check_same_vocabulary", "response_logits", "rollouts"]


class LanguageModel(nn.Module, ABC):
    """A causal language model over a vocabulary.

    Masks are 1 on tokens and 0 on padding; padding on the left, on the right or both changes no other row or
    position. A model has no dropout: the same tokens give the same logits.
    """

    vocabulary: Vocabulary

    @abstractmethod
    def logits(
        self, tokens: Int64[Tensor, "B L"], mask: Float[Tensor, "B L"] | None = None, *, since: int = 0
    ) -> Float[Tensor, "B L2 V"]:
        r"""Logits of the next token: row $n$ predicts token $n+1$.

        Args:
            tokens: `(B, L)`.
            mask: `(B, L)`; without it every token counts.
            since: leave out the rows before this one, which a large vocabulary makes expensive.

        Returns:
            `(B, L - since, V)`; finite and meaningless at padding.
        """

    @abstractmethod
    def prefill(
        self, tokens: Int64[Tensor, "B P"], mask: Float[Tensor, "B P"], capacity: int
    ) -> tuple[Float[Tensor, "B V"], Cache]:
        """Read prompts padded on the left; the logits after their last token, and a cache for `capacity` tokens."""

    @abstractmethod
    def decode(self, tokens: Int64[Tensor, " B"], cache: Cache) -> Float[Tensor, "B V"]:
        """Read one more token a row; the logits after it. The cache grows in place."""

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

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        generator: torch.Generator | None = None,
        uniforms: Float[Tensor, "B T"] | None = None,
        temperature: float = 1.0,
        greedy: bool = False,
        environment: Environment | None = None,
    ) -> Samples:
        r"""Sample a response to each prompt from $\mathrm{softmax}(z/\text{temperature})$.

        Row b draws its n-th token by inverting the cumulative probabilities at `uniforms[b, n]`, so a row's
        response does not depend on the rows beside it (but for rounding, which may differ with the batch's size).

        Args:
            prompts: token ids, at least one each; repeat a prompt to sample it more than once.
            max_new_tokens: cap on the length of a response, the environment's tokens included.
            generator: draws `uniforms`, `(B, max_new_tokens)` at once, on the generator's device.
            uniforms: numbers in [0, 1), float64, in the place of `generator`.
            temperature: divides the logits; positive.
            greedy: take the likeliest token.
            environment: answers calls; its tokens count in the history and carry mask 0.

        Raises:
            InvalidArgumentError: no prompt, an empty prompt, or an argument out of its range.
        """
        return sample(
            self,
            prompts,
            max_new_tokens=max_new_tokens,
            generator=generator,
            uniforms=uniforms,
            temperature=temperature,
            greedy=greedy,
            environment=environment,
        )

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return next(self.parameters()).dtype


def response_logits(model: LanguageModel, samples: Samples) -> Float[Tensor, "B T V"]:
    """A model's logits at each response position, given the prompt and the response before it; differentiable."""
    tokens = torch.cat((samples.prompts, samples.tokens[:, :-1]), dim=1)
    mask = torch.cat((samples.prompt_mask, samples.present[:, :-1]), dim=1)
    return model.logits(tokens, mask, since=samples.prompts.shape[1] - 1)


def rollouts(student: LanguageModel, teacher: LanguageModel, samples: Samples, *, temperature: float = 1.0) -> Rollouts:
    r"""The input of every loss: samples with both models' logits, divided by the temperature that sampled.

    Differentiable in the student; the teacher is scored without gradients.

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
    """Refuse two models whose tokens do not mean the same.

    Raises:
        InvalidArgumentError: the fingerprints or the sizes of the vocabularies differ.
    """
    ours, theirs = student.vocabulary, teacher.vocabulary
    if ours.size != theirs.size or ours.fingerprint != theirs.fingerprint:
        raise InvalidArgumentError(
            "teacher",
            f"has a vocabulary of {theirs.size} tokens ({theirs.fingerprint}), the student one of {ours.size} "
            f"({ours.fingerprint}); a teacher must score the student's own tokens",
        )
