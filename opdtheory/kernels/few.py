r"""Losses on a few tokens of each row, for all rows at once in float64; programs do what takes all other tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.divergences.rest import rest_log_ratio
from opdtheory.errors import InvalidArgumentError
from opdtheory.kernels import payload, sweep
from opdtheory.kernels.arguments import check_weights
from opdtheory.kernels.reference import LogDistributions, form, paired, terms, weight_masses

__all__ = ["Split", "coarse_slopes", "runs_as_program", "sampled_tail_by_programs", "top_k_by_programs"]

# A program looks once more at a block of 1,024 tokens for each listed one.
_FEW = 256


def runs_as_program(logits: Tensor, listed: int) -> bool:
    """Whether programs of `opdtheory.kernels.few` take the rows: not if more than a few tokens of each are listed."""
    narrow = logits.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return narrow and listed <= _FEW and logits.numel() > 0 and sweep.has_programs(logits.device)


def coarse_slopes(divergence: Divergence, distributions: LogDistributions, waits: bool = True) -> Tensor:
    """The gradient in the logits of the tokens and in that of the bucket as one."""
    mass = weight_masses(divergence, distributions, waits)
    return distributions.log_p.exp() * mass.sum(-1, keepdim=True) - mass


class Split:
    """Both log-probabilities of S and of the sampled token at each row, `(..., k + 1)`, from those of the student."""

    def __init__(self, log_p: Tensor, log_q: Tensor, drawn: Tensor, waits: bool = True) -> None:
        chosen, token = drawn[..., :-1], drawn[..., -1:]
        # The sampled token counts where it is one, outside S, and possible for the student.
        outside = (token >= 0) & ~(chosen == token).any(-1, keepdim=True)
        self.outside = (outside & torch.isfinite(log_p[..., -1:])).double()
        log_q = torch.cat([log_q[..., :-1], torch.where(self.outside > 0, log_q[..., -1:], log_p[..., -1:])], -1)
        self._logs, self._waits = paired(log_p, log_q), waits

    def rest_weight(self, divergence: Divergence) -> Tensor:
        r"""$w_f(q(T)/p(T))$ of each row, with $T$ all tokens outside $S$."""
        log_u = rest_log_ratio(self._logs.log_p[..., :-1], self._logs.log_q[..., :-1])
        return form(divergence, "weight", log_u, self._waits).unsqueeze(-1)

    def masses(self, divergence: Divergence, constant: float | Tensor) -> Tensor:
        r"""$p_a (w_a - c)$ on S, and the sampled token's $w_y - c$ or zero."""
        on_set = weight_masses(divergence, LogDistributions(*(x[..., :-1] for x in self._logs)), self._waits)
        on_set = on_set - constant * self._logs.log_p[..., :-1].exp()
        log_u = torch.where(self.outside > 0, self._logs.log_q[..., -1:] - self._logs.log_p[..., -1:], 0.0)
        drawn = self.outside * (form(divergence, "weight", log_u, self._waits) - constant)
        return torch.cat([on_set, torch.where(self.outside > 0, drawn, 0.0)], -1)

    def value(self, divergence: Divergence, constant: float | Tensor, masses: Tensor) -> Tensor:
        """The loss of each row, `(..., 1)`."""
        on_set = LogDistributions(*(x[..., :-1] for x in self._logs))
        exact = terms(divergence, on_set, self._waits).sum(-1, keepdim=True)
        exact = exact + constant * on_set.log_p.exp().sum(-1, keepdim=True)
        return exact - torch.where(self.outside > 0, masses[..., -1:] * self._logs.log_p[..., -1:], 0.0)


def top_k_by_programs(
    logits: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    divergence: Divergence,
    weights: Tensor | None,
    scale: float,
    wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    """The values of `fused_top_k_divergence`, float32, and the gradient if it is wanted."""
    from opdtheory.kernels.programs.launch_few import write_shares

    vocabulary, ordered = logits.shape[-1], ids.sort(-1).values
    rows = _Rows(logits, ids, ordered, weights, scale)
    distributions = paired(rows.log_p, payload.with_tail(logprobs, vocabulary))
    values = rows.weighed(terms(divergence, distributions, waits=False).sum(-1, keepdim=True))
    gradient = None
    if wanted:
        gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        slopes = rows.weighed(scale * coarse_slopes(divergence, distributions, waits=False))
        write_shares(logits, gradient, rows.tops, rows.shared(slopes[..., -1:]), scale)
        gradient.scatter_(-1, rows.listed, slopes[..., :-1].to(gradient.dtype))
    wrong = payload.payload_is_wrong(vocabulary, ordered, logprobs) | payload.probabilities_are_wrong(logprobs)

    def refuse() -> None:
        payload.check_payload_entries(logits, ids, logprobs)
        check_weights(weights)
        payload.check_probabilities(logprobs)

    return rows.checked(wrong, refuse, values, gradient)


def sampled_tail_by_programs(
    logits: Tensor,
    sent: tuple[Tensor, Tensor, Tensor, Tensor],
    divergence: Divergence,
    constant: float | Literal["rest"],
    weights: Tensor | None,
    scale: float,
    wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    """The values of `fused_sampled_tail`, float32, and the gradient if it is wanted."""
    from opdtheory.kernels.programs.launch_few import write_shares

    ids, logprobs, tokens, token_logprobs = sent
    vocabulary, ordered = logits.shape[-1], ids.sort(-1).values
    rows = _Rows(logits, ids, ordered, weights, scale)
    drawn = torch.cat([ids, tokens.unsqueeze(-1)], -1)
    token = tokens.unsqueeze(-1).clamp(0, vocabulary - 1)
    log_p = torch.cat([rows.log_p[..., :-1], rows.log_probability(logits.gather(-1, token))], -1)
    log_q = torch.cat([logprobs.detach(), token_logprobs.detach().unsqueeze(-1)], -1).double()
    split = Split(log_p, log_q, drawn, waits=False)
    c = split.rest_weight(divergence) if constant == "rest" else constant
    masses = split.masses(divergence, c)
    values = rows.weighed(split.value(divergence, c, masses))
    gradient = None
    if wanted:
        gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        masses = rows.weighed(scale * masses)
        whole = masses.sum(-1, keepdim=True)
        write_shares(logits, gradient, rows.tops, rows.shared(whole * rows.log_p[..., -1:].exp()), scale)
        slopes = whole * log_p.exp() - masses
        # A sampled token that does not count gives way to one of S.
        counts = split.outside > 0
        at = torch.cat([rows.listed, torch.where(counts, token, rows.listed[..., :1])], -1)
        slopes = torch.cat([slopes[..., :-1], torch.where(counts, slopes[..., -1:], slopes[..., :1])], -1)
        gradient.scatter_(-1, at, slopes.to(gradient.dtype))
    wrong = payload.payload_is_wrong(vocabulary, ordered, logprobs)
    wrong = wrong | payload.sampled_is_wrong(vocabulary, tokens, token_logprobs)

    def refuse() -> None:
        payload.check_payload_entries(logits, ids, logprobs)
        payload.check_sampled_entries(vocabulary, tokens, token_logprobs)
        check_weights(weights)

    return rows.checked(wrong, refuse, values, gradient)


class _Rows:
    """The student's distributions on the listed tokens and all others, and which rows are skipped or have none.

    Attributes:
        tops: the largest logit that is not listed, `(..., 1)`.
        listed: the listed tokens, in bounds: those that are not are refused in the end, after all was computed.
        aside: rows whose numbers are not used.
        log_p: `(..., k + 1)`, those of the listed tokens, and of all others as one.
    """

    def __init__(self, logits: Tensor, ids: Tensor, ordered: Tensor, weights: Tensor | None, scale: float) -> None:
        from opdtheory.kernels.programs.launch_few import row_sums

        self.tops, self._sums = row_sums(logits, ordered, None if weights is None else weights.contiguous(), scale)
        self.listed = ids.clamp(0, logits.shape[-1] - 1)
        kept = torch.cat([logits.gather(-1, self.listed).double(), self.tops], -1)
        self._peak = kept.amax(-1, keepdim=True)
        scaled = scale * (kept - self._peak)
        scaled[..., -1:] += self._sums.log()
        self._scale, self._normaliser = scale, scaled.logsumexp(-1, keepdim=True)
        self._weights = None if weights is None else weights.double().unsqueeze(-1)
        unusable = ~torch.isfinite(self._normaliser)
        skipped = torch.zeros_like(unusable) if self._weights is None else self._weights == 0
        self._unusable, self._skipped, self.aside = unusable & ~skipped, skipped, unusable | skipped
        self.log_p = torch.log_softmax(torch.where(self.aside, 0.0, scaled), -1)

    def log_probability(self, logits: Tensor) -> Tensor:
        """Those of other tokens, from their logits."""
        return torch.where(self.aside, -1.0, self._scale * (logits.double() - self._peak) - self._normaliser)

    def shared(self, numbers: Tensor) -> Tensor:
        """Numbers of all other tokens as one, over the sum of their exponentials."""
        return torch.where(self._sums > 0, numbers / self._sums, 0.0)

    def weighed(self, numbers: Tensor) -> Tensor:
        """Numbers of each row times its weight, zero for those that are skipped."""
        return numbers if self._weights is None else torch.where(self._skipped, 0.0, self._weights * numbers)

    def checked(
        self, wrong: Tensor, refuse: Callable[[], None], values: Tensor, gradient: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Values `(..., 1)` as `(...)` with the gradient, unless an argument is refused; the one time that one waits.

        In a graph of the device's nobody can wait, and what would be refused becomes NaN.
        """
        if self._weights is not None:
            wrong = wrong | ~torch.isfinite(self._weights).all()
        found = values.squeeze(-1).float()
        if wrong.is_cuda and torch.cuda.is_current_stream_capturing():
            spoilt = wrong | self._unusable
            if gradient is not None:
                gradient.masked_fill_(spoilt, torch.nan)
            return found.masked_fill(spoilt.squeeze(-1), torch.nan), gradient
        if bool(wrong | self._unusable.any()):
            refuse()
            bad = int(self._unusable.sum())
            raise InvalidArgumentError(
                "student_logits",
                f"must be finite or -inf, and not all -inf; {bad} of {self._unusable.numel()} rows are not",
            )
        return found, gradient
