r"""`recommend`: which estimator has the least error in its gradient, from what the teacher can send."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from opdtheory.divergences import Divergence
from opdtheory.divergences import divergence as as_divergence
from opdtheory.errors import InvalidArgumentError, check_integer
from opdtheory.estimators import Estimator, estimator
from opdtheory.estimators.options import choice as one_of
from opdtheory.monitoring.advice.candidates import HAVES, Candidate, Have, candidates
from opdtheory.monitoring.advice.configs import train_options, trl_lines, verl_settings
from opdtheory.monitoring.advice.measured import measure
from opdtheory.monitoring.advice.proxies import Proxies
from opdtheory.monitoring.advice.record import Advice, Choice
from opdtheory.monitoring.advice.rows import rows_of, sums_of
from opdtheory.monitoring.sums import Sums
from opdtheory.monitoring.tokens import SampledTokens
from opdtheory.monitoring.weights import weight_of
from opdtheory.rollouts import Rollouts

__all__ = ["Found", "recommend"]


@runtime_checkable
class Found(Protocol):
    """What a recommendation takes of a diagnosis."""

    @property
    def sums(self) -> Sums:
        """The sums over the run's tokens."""
        ...

    @property
    def tokens(self) -> int:
        """The number of all tokens."""
        ...

    @property
    def batch_tokens(self) -> float:
        """The number of tokens in a batch of the run."""
        ...

    @property
    def estimator(self) -> Any:
        """The estimator of the run, or its name."""
        ...

    @property
    def divergence(self) -> Any:
        """The divergence of the run, an object or a name."""
        ...


def recommend(
    found_or_rollouts: Rollouts | SampledTokens | Found,
    have: Have = "sampled",
    divergence: str | Divergence | None = None,
    *,
    k: int = 16,
    group: int = 1,
    batch_tokens: int | None = None,
    server: bool = False,
    teachers: int = 1,
    batches: int | None = None,
    coherence: float = 0.001,
) -> Advice:
    r"""Estimators of one $\nabla D_f$ that the teacher's answers suffice for, ranked by their expected squared error.

    The reference is the exact gradient at the same histories, the mean over N tokens; the error of a batch is the
    square of the bias plus the variance of N sampled tokens, both relative to the exact gradient's square. Every
    estimator gets the same number of sampled tokens.

    With both distributions at hand each history's bias, variance and gradient are closed forms in its logits (T7, T9,
    T13, T19). Histories share parameters: biases and gradients of similar histories add up, noise does not. The model
    is a linear layer before the softmax: $|\sum_h x_h|^2 = \sum_{hh'} K_{hh'}\, x_h\cdot x_{h'}$ with
    $K_{hh'}$ the cosine between the student's centred log-probabilities at the two histories, so that $K_{hh} = 1$.
    `benchmarks/recommend.py` holds the ranking against errors measured in the parameters of real models.

    From log-probabilities of the sampled tokens alone the numbers are proxies, as `Proxies` says, and the mean product
    of two histories' gradients is `coherence` times their mean square: some 0.001 on the small arithmetic pair.

    Args:
        found_or_rollouts: rollouts of the student itself with both distributions, sampled tokens, or a diagnosis.
        have: what the teacher can send of a token: the log-probability of the `sampled` one, also those of its `top_k`,
            or those of the whole `vocabulary`.
        divergence: the target, an object or a name; by default that of the diagnosis.
        k: the number of the teacher's likeliest tokens that `top_k` sends.
        group: rollouts of each prompt, which stand next to each other; baselines over a group need 2. Every rollout
            must have a token that counts.
        batch_tokens: sampled tokens of a batch; by default those of a diagnosed run's step, or all that are given.
        server: whether the teacher is behind a server, which never sends whole distributions.
        teachers: the number of teachers (T16); the numbers are those of the first.
        batches: leave out the largest outcomes that a run of so many batches meets less than once, all together: heavy
            tails then cost what is missed, a bias, in place of a variance that no such run sees. By default nothing is
            left out.
        coherence: see above; not read where distributions are known.

    Raises:
        InvalidArgumentError: an argument is out of range or of a wrong type, no divergence is named, or rollouts are
            no multiple of `group`.

    References: T7, T9, T13, T16, T19 of the theory.

    Example:
        >>> import torch
        >>> z = torch.tensor([[[0.0, 1.0, 2.0], [1.0, 0.0, 0.0]]])
        >>> advice = recommend(Rollouts.from_logits(torch.tensor([[2, 0]]), z, z.flip(-1)), "vocabulary", "jsd", k=1)
        >>> advice.best.name, advice.best.error
        ('full_vocab', 0.0)
    """
    one_of("have", have, HAVES)
    for name, value in (("k", k), ("group", group), ("teachers", teachers)):
        check_integer(name, value)
    for name, given in (("batch_tokens", batch_tokens), ("batches", batches)):
        if given is not None:
            check_integer(name, given)
    if isinstance(coherence, bool) or not isinstance(coherence, int | float) or not 0 <= coherence <= 1:
        raise InvalidArgumentError("coherence", f"must be a number in [0, 1], got {coherence!r}")
    source: Any = found_or_rollouts
    diagnosed = isinstance(source, Found) and not isinstance(source, SampledTokens)
    if diagnosed:
        divergence = source.divergence if divergence is None else divergence
    elif not isinstance(source, Rollouts | SampledTokens):
        raise InvalidArgumentError(
            "found_or_rollouts", f"must be Rollouts, SampledTokens or a diagnosis, got {type(source).__name__}"
        )
    if divergence is None:
        raise InvalidArgumentError("divergence", "must be named, such as 'reverse_kl'")
    target = as_divergence(divergence)
    rows = rows_of(source, group)
    if rows is not None:
        k = min(k, rows.student.shape[-1])
    listed = candidates(target, have, k, group, server)
    if diagnosed:
        listed = _with_yours(listed, _running(source))
    if rows is None:
        sums, count = sums_of(source)
        own = round(source.batch_tokens) if diagnosed else count
        tokens = own if batch_tokens is None else batch_tokens
        proxies = Proxies(target, sums, tokens, float(coherence), group)
        measured = proxies.measure(listed)
        vocabulary, notes = None, proxies.notes(have)
    else:
        count, vocabulary = len(rows.student), rows.student.shape[-1]
        tokens = count if batch_tokens is None else batch_tokens
        measured = measure(rows, target, listed, tokens, batches)
        notes = ()
    choices = [_choice(*each, vocabulary, teachers, group) for each in measured]
    order = sorted(range(len(choices)), key=lambda i: (_rounded(choices[i].error), choices[i].calls or math.inf, i))
    return Advice(
        target.label,
        have,
        tuple(choices[i] for i in order),
        count,
        tokens,
        rows is not None,
        (*notes, *_notes(target, have, server, teachers)),
    )


def _running(source: Any) -> Estimator | None:
    """The estimator of a diagnosed run; None if its name alone does not make it."""
    given = source.estimator
    if isinstance(given, Estimator):
        return given
    for arguments in ((given, source.divergence), (given,)):
        try:
            return estimator(*arguments)
        except InvalidArgumentError:
            continue
    return None


def _with_yours(listed: list[Candidate], running: Estimator | None) -> list[Candidate]:
    """The candidates with the run's estimator marked, or added at the end where its weight is known."""
    if running is None:
        return listed
    options = {key: value for key, value in running.settings.items() if key != "reduction"}
    marked = [replace(x, yours=(x.loss.name, x.loss.settings) == (running.name, options)) for x in listed]
    # What else a loss does to the sampled token's weight is not told by the weight alone.
    known = options.keys() <= {"divergence", "clip_log_ratio", "clip_weight", "alpha"} and "k" not in options
    if any(each.yours for each in marked) or not known or running.name == "full_vocab":
        return marked
    try:
        weight_of(running)
    except InvalidArgumentError:
        return marked
    reason = "is the estimator of the run, whose bias is that against this target"
    return [*marked, Candidate(replace(running, reduction="token_sum"), "sampled", reason, "T4", yours=True)]


def _rounded(error: float) -> float:
    """What rounding tells apart is the same; an error of rounding is none."""
    return float(f"{error:.9e}") if error > 1e-24 else 0.0


def _notes(divergence: Divergence, have: Have, server: bool, teachers: int) -> tuple[str, ...]:
    found = []
    if server and have == "vocabulary":
        found.append("A server does not send whole distributions, so nothing that needs them is listed.")
    if teachers > 1:
        kind = {
            "reverse_kl": "the weights log q_k/p average to that of the geometric mixture of the teachers, less a "
            "constant of each history: one divergence with one minimiser",
            "forward_kl": "the weights average to that of the arithmetic mixture: one divergence with one minimiser",
        }.get(divergence.label)
        kind = kind or "the weights add, and the minimiser is neither the arithmetic nor the geometric mixture"
        found.append(
            f"With {teachers} teachers {kind} [T16]; the numbers are those of the first teacher, and teacher calls "
            "count all."
        )
    return tuple(found)


def _choice(
    candidate: Candidate, bias: float, variance: float, vocabulary: int | None, teachers: int, group: int
) -> Choice:
    loss, calls = candidate.loss, candidate.calls(vocabulary)
    return Choice(
        loss=loss,
        bias=bias,
        variance=variance,
        numbers=None if calls is None else 2 * calls,
        calls=None if calls is None else calls * teachers,
        reason=candidate.reason,
        theorem=candidate.theorem,
        trl=trl_lines(loss, group),
        verl=verl_settings(loss),
        train=train_options(loss, group),
        yours=candidate.yours,
    )
