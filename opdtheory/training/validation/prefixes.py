"""Prefixes of a student's own rollouts, with the next-token distributions there and the Jacobian in its parameters."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.errors import InvalidArgumentError
from opdtheory.exact.tree import pointwise
from opdtheory.training.models.language_model import LanguageModel, check_same_vocabulary, response_logits
from opdtheory.training.models.samples import Environment, Samples

__all__ = ["Prefixes"]

Vector = list[Tensor]

_ROWS = 16  # prefixes that are differentiated over the whole vocabulary at once


@dataclass(frozen=True)
class Prefixes:
    r"""N prefixes from B rollouts, with maps between directions in the parameters and in the logits at the prefixes.

    Attributes:
        student: the model whose parameters are differentiated.
        samples: the rollouts.
        names: names of the selected parameters.
        temperature: divides the logits of all models.
        log_p: next-token log-probabilities of the student, `(N, V)`, float64.
        log_q: next-token log-probabilities of the teacher.
        log_mu: next-token log-probabilities of the policy that sampled the rollouts.
    """

    student: LanguageModel
    samples: Samples
    names: tuple[str, ...]
    temperature: float
    log_p: Float[Tensor, "N V"]
    log_q: Float[Tensor, "N V"]
    log_mu: Float[Tensor, "N V"]

    @classmethod
    def sample(
        cls,
        student: LanguageModel,
        teacher: LanguageModel,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        behavior: LanguageModel | None = None,
        temperature: float = 1.0,
        sampling_temperature: float | None = None,
        environment: Environment | None = None,
        parameters: Callable[[str], bool] | None = None,
        seed: int = 0,
    ) -> Prefixes:
        """The prefixes of one response to each prompt.

        Args:
            student: the student.
            teacher: the model that scores.
            prompts: token ids.
            max_new_tokens: largest length of a response.
            behavior: the model that samples; by default the student.
            temperature: divides all logits, in sampling and in the loss.
            sampling_temperature: divides the logits in sampling, in place of `temperature`.
            environment: answers calls; its tokens make no prefixes.
            parameters: selects parameters that require a gradient by name; by default all.
            seed: seed of the samples.

        Raises:
            InvalidArgumentError: the vocabularies differ, no parameter is selected, or no rollout has a token.
        """
        check_same_vocabulary(student, teacher)
        sampler = student if behavior is None else behavior
        sampled_at = temperature if sampling_temperature is None else sampling_temperature
        samples = sampler.sample(
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=sampled_at,
            environment=environment,
            generator=torch.Generator(device=student.device).manual_seed(seed),
        )
        if not bool(samples.mask.any()):
            raise InvalidArgumentError(
                "prompts", f"must get answers, but {len(prompts)} rollouts have no token of the student"
            )
        names = tuple(
            name
            for name, parameter in student.named_parameters()
            if parameter.requires_grad and (parameters is None or parameters(name))
        )
        if not names:
            raise InvalidArgumentError("parameters", "must select a parameter of the student that requires a gradient")
        live = samples.mask > 0

        def distribution(model: LanguageModel, divisor: float) -> Tensor:
            with torch.no_grad(), _differentiable(model):
                return torch.log_softmax(response_logits(model, samples)[live].double() / divisor, dim=-1)

        log_p = distribution(student, temperature)
        itself = sampler is student and sampled_at == temperature
        log_mu = log_p if itself else distribution(sampler, sampled_at)
        return cls(student, samples, names, temperature, log_p, distribution(teacher, temperature), log_mu)

    def __len__(self) -> int:
        return self.log_p.shape[0]

    @property
    def on_policy(self) -> bool:
        """Whether the student itself sampled the rollouts."""
        return self.log_mu is self.log_p

    @cached_property
    def live(self) -> Tensor:
        """Which positions of the rollouts are prefixes, `(B, T)`; prefixes are numbered row by row."""
        return self.samples.mask > 0

    @cached_property
    def rollout(self) -> Int64[Tensor, " N"]:
        """The index of each prefix's rollout."""
        return self.live.nonzero()[:, 0]

    @cached_property
    def parameters(self) -> Vector:
        """The selected parameters."""
        found = dict(self.student.named_parameters())
        return [found[name] for name in self.names]

    @cached_property
    def grids(self) -> tuple[Tensor, Tensor, Tensor]:
        """All three log-distributions at every position of the rollouts, `(B, T, V)`; uniform where no prefix is."""

        def spread(log: Tensor) -> Tensor:
            grid = log.new_full((*self.live.shape, log.shape[-1]), -math.log(log.shape[-1]))
            grid[self.live] = log
            return grid

        log_p = spread(self.log_p)
        return log_p, spread(self.log_q), log_p if self.on_policy else spread(self.log_mu)

    @property
    def dimension(self) -> int:
        """The dimension of the selected parameters."""
        return sum(parameter.numel() for parameter in self.parameters)

    def shares(self, reduction: str) -> Float[Tensor, " N"]:
        """The factor of each prefix's loss in the loss of the batch of all rollouts (T11)."""
        rollouts, ones = len(self.samples), torch.ones(len(self), dtype=torch.float64, device=self.log_p.device)
        if reduction == "token_sum":
            return ones / rollouts
        if reduction == "token_mean":
            return ones / len(self)
        lengths = self.live.sum(-1).double()
        return 1 / (rollouts * lengths[self.rollout])

    def pull_back(self, logits: Float[Tensor, "N V"]) -> Vector:
        r"""$J^\top c$: the gradient in the parameters, from the gradient in the logits at every prefix."""
        weights = (logits / self.temperature).to(self._logits.dtype)
        return list(
            torch.autograd.grad(self._logits, self.parameters, weights, retain_graph=True, materialize_grads=True)
        )

    def push_forward(self, direction: Vector) -> Float[Tensor, "N V"]:
        r"""$J v$: how the logits at every prefix, divided by the temperature, move along a direction."""
        weights, gradients = self._transposed
        some = [(g, v) for g, v in zip(gradients, direction, strict=True) if g.requires_grad]
        outputs, tangents = [g for g, _ in some], [v for _, v in some]
        (moved,) = torch.autograd.grad(outputs, weights, tangents, retain_graph=True)
        return moved / self.temperature

    def random(self, number: int, seed: int = 0) -> Vector:
        """A random direction of length one, uniform on the sphere, the same for the same number and seed."""
        generator = torch.Generator().manual_seed(1_000_003 * seed + number)
        found = [torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for p in self.parameters]
        size = math.sqrt(sum(float(x.double().square().sum()) for x in found))
        return [x.div_(size) for x in found]

    @cached_property
    def _logits(self) -> Tensor:
        """The student's logits at the prefixes, with their graph, which is kept."""
        with torch.enable_grad(), _differentiable(self.student):
            return response_logits(self.student, self.samples)[self.live]

    def exact(self, divergence: Divergence) -> Float[Tensor, "N V"]:
        """The gradient of the divergence at each prefix in the student's logits, by autograd over the vocabulary."""
        if divergence not in self._exact:
            found = []
            for p, q in zip(self.log_p.split(_ROWS), self.log_q.split(_ROWS), strict=True):
                leaf = p.clone().requires_grad_()
                with torch.enable_grad():
                    value = pointwise(divergence, torch.log_softmax(leaf, dim=-1), q).sum()
                    found.append(torch.autograd.grad(value, leaf)[0])
            self._exact.clear()
            self._exact[divergence] = torch.cat(found)
        return self._exact[divergence]

    @cached_property
    def _exact(self) -> dict[Divergence, Tensor]:
        """The last gradient, since estimators of one divergence follow each other."""
        return {}

    @cached_property
    def _transposed(self) -> tuple[Tensor, Vector]:
        """Weights of the logits and their gradient, which is linear in the weights: its own gradient is $J v$."""
        weights = torch.zeros_like(self._logits, requires_grad=True)
        with torch.enable_grad():
            gradients = torch.autograd.grad(
                self._logits, self.parameters, weights, create_graph=True, materialize_grads=True
            )
        return weights, list(gradients)


@contextlib.contextmanager
def _differentiable(model: LanguageModel) -> Iterator[None]:
    """Use eager attention: fused kernels cannot be differentiated twice."""
    config = getattr(getattr(model, "network", None), "config", None)
    before = getattr(config, "_attn_implementation", None)
    if config is None or before in (None, "eager"):
        yield
        return
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before
