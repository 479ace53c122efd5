r"""The ways in which a trainer may read its rollouts, and the expected gradient that each leaves.

A rollout's token $y_n$ is predicted at the prefix $h_n$. A faithful trainer takes $\nabla D_f(h_n)$ at each of them,
sums over tokens and averages over rollouts. Another *reading* keeps other positions, divides by something else, looks
one token beside, or reads a padding token as text. Its expected gradient is a sum over the outcomes that were played,

$$-\sum_{\text{outcomes}} P \sum_{b,n} \omega_{bn}\; E_{p}\big[(A_a - \bar A)\, e_a\big](h_{bn}),$$

with $A = w_f(u)$, or $-f(u)$ where the divergence is a detached reward (T2), and the shares $\omega$ of the reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.end_to_end.played import Leaf, Played
from opdtheory.objective import Objective

__all__ = ["DENOMINATORS", "KEPT", "PLAIN", "Denominator", "Kept", "Read", "Reading", "Shares", "gradient_of", "shares"]

Denominator = Literal["rollouts", "tokens", "micro-batch", "own length", "padded length", "with prompt"]
Kept = Literal["all", "no end", "no first", "no last", "ended", "unended"]

DENOMINATORS: dict[Denominator, str] = {
    "rollouts": "It sums over tokens and averages over rollouts.",
    "tokens": "It divides by the tokens of the whole step: rollouts weigh by 1/N within a batch (T11, token_mean).",
    "micro-batch": "It averages the means of micro-batches: each divides by its own tokens, so that the gradient "
    "depends on how a step is split (T17).",
    "own length": "It averages over each rollout's own tokens: short rollouts weigh more (T11, sequence_mean).",
    "padded length": "It averages over padded positions too: the denominator is the longest answer of the micro-batch.",
    "with prompt": "It divides by the tokens of prompts and answers together.",
}
KEPT: dict[Kept, str] = {
    "all": "",
    "no end": "The position at which the end of the sequence is written gets no gradient: nothing teaches when to "
    "stop.",
    "no first": "The first token of each answer gets no gradient.",
    "no last": "The last token of each answer gets no gradient.",
    "ended": "Answers that reach the horizon without an end get no gradient.",
    "unended": "Answers that end before the horizon get no gradient.",
}


@dataclass(frozen=True)
class Reading:
    """One way to read rollouts; the defaults are the faithful one.

    Attributes:
        denominator: what a step divides by.
        keep: which positions of an answer count.
        shift: how many tokens late the student's row is read.
        prompt: how many of the prompt's last tokens count as if they were written by the student; -1 for all.
        after: whether padded positions after an answer's end count.
        student_padding: whether the student reads padding as text.
        teacher_padding: whether the teacher does.
        teacher_shift: how many tokens late the teacher's row is read, beside the student's.
        sampled: whether only the sampled token is scored, so that denominators and tokens vary together.
        stopped: whether the divergence is a detached reward.
        centred: whether $w_f(1)$ is subtracted from the weight, which matters where denominators vary with the tokens.
        student_temperature: divides the student's logits in the divergence.
        teacher_temperature: divides the teacher's.
    """

    denominator: Denominator = "rollouts"
    keep: Kept = "all"
    shift: int = 0
    prompt: int = 0
    after: bool = False
    student_padding: bool = False
    teacher_padding: bool = False
    teacher_shift: int = 0
    sampled: bool = False
    stopped: bool = False
    centred: bool = False
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0

    def words(self, objective: Objective) -> tuple[str, ...]:
        """What is unlike the faithful reading of an objective, in sentences."""
        found = [DENOMINATORS[self.denominator]] if self.denominator != "rollouts" else []
        found += [KEPT[self.keep]] if self.keep != "all" else []
        late = {1: "late", -1: "early"}
        if self.shift:
            found.append(f"Logits and labels are off by one: each token is scored one position {late[self.shift]}.")
        if self.prompt:
            many = "all of the prompt counts" if self.prompt < 0 else "labels start one token early, inside the prompt"
            found.append(f"The loss reads the prompt: {many}.")
        if self.after:
            found.append("Padded positions after the end of an answer count.")
        if self.student_padding and self.teacher_padding:
            found.append("Padding is read as text by student and teacher: the attention mask is missing.")
        elif self.student_padding or self.teacher_padding:
            who = "student" if self.student_padding else "teacher"
            found.append(f"The {who} reads padding as text: its attention mask is missing.")
        if self.teacher_shift:
            found.append(f"The teacher is read one token {late[self.teacher_shift]} beside the student.")
        # Detached or not, the reverse KL has the same gradient: only a constant is between them.
        if self.stopped and objective.label != "reverse_kl":
            found.append("The divergence is a detached reward, which leaves out the slope u f'(u) (T2).")
        found += self._temperatures()
        return tuple(found)

    def _temperatures(self) -> list[str]:
        ours, theirs = self.student_temperature, self.teacher_temperature
        if ours == theirs == 1.0:
            return []
        if abs(ours - theirs) < 1e-6:
            return [f"The divergence is that of both models at temperature {ours:.4g} (T16)."]
        who, value = ("student", ours) if theirs == 1.0 else ("teacher", theirs)
        return [f"Only the {who} is scored at temperature {value:.4g} (T16)."]


PLAIN = Reading()

# The row of the student, that of the teacher and the sampled token, with the share of the loss that it has.
Shares = dict[tuple[int, int, int], float]


def shares(played: Played, reading: Reading) -> Shares:
    """The share of each row, and of each token if only sampled tokens are scored (else -1), over all outcomes."""
    found: Shares = {}
    size = played.pair.batch_size
    for leaf in played.leaves:
        for first in range(0, len(leaf.rollouts), size):
            _add_part(found, played, leaf, first, size, reading)
    return found


def _add_part(found: Shares, played: Played, leaf: Leaf, first: int, size: int, reading: Reading) -> None:
    """Add the shares of one micro-batch."""
    rows, end = played.pair.student.model.rows, played.pair.tokenizer.eos_token_id
    pad, rollouts = played.pair.tokenizer.pad_token_id, leaf.rollouts[first : first + size]
    longest_prompt = max(len(prompt) for prompt, _ in rollouts)
    longest = max(len(answer) for _, answer in rollouts)
    positions = [_positions(prompt, answer, longest, end, reading) for prompt, answer in rollouts]
    factors = _factors(played, leaf, first, size, positions, reading)
    for (prompt, answer), kept, factor in zip(rollouts, positions, factors, strict=True):
        text = [*prompt, *answer]
        padding = [pad] * (longest_prompt - len(prompt))
        for n in kept:
            at = len(prompt) + n
            read = max(0, at + reading.shift)
            ours, theirs = text[:read], text[: max(0, read + reading.teacher_shift)]
            student = rows.row([*(padding if reading.student_padding else []), *ours])
            teacher = rows.row([*(padding if reading.teacher_padding else []), *theirs])
            token = (text[at] if at < len(text) else end) if reading.sampled else -1
            key = (student, teacher, token)
            found[key] = found.get(key, 0.0) + leaf.probability * factor


def _positions(prompt: list[int], answer: list[int], longest: int, end: int, reading: Reading) -> list[int]:
    """The positions that count, from 0 at the first token of the answer; negative inside the prompt."""
    ended, kept = answer[-1] == end, list(range(len(answer)))
    if (reading.keep == "ended" and not ended) or (reading.keep == "unended" and ended):
        kept = []
    elif reading.keep == "no first":
        kept = kept[1:]
    elif reading.keep == "no last" or (reading.keep == "no end" and ended):
        kept = kept[:-1]
    if reading.prompt:
        many = len(prompt) if reading.prompt < 0 else min(reading.prompt, len(prompt))
        kept = [*range(-many, 0), *kept]
    if reading.after:
        kept = [*kept, *range(len(answer), longest)]
    return kept


def _factors(
    played: Played, leaf: Leaf, first: int, size: int, positions: list[list[int]], reading: Reading
) -> list[float]:
    """What one token of each rollout of a micro-batch is multiplied by."""
    everyone, parts = len(leaf.rollouts), len(leaf.rollouts) / size
    rollouts = leaf.rollouts[first : first + size]
    counts = [len(kept) for kept in positions]
    if reading.denominator == "rollouts":
        return [1.0 / everyone] * len(counts)
    if reading.denominator == "own length":
        return [1.0 / (everyone * max(1, count)) for count in counts]
    if reading.denominator == "padded length":
        longest = max(len(answer) for _, answer in rollouts)
        return [1.0 / (parts * len(rollouts) * longest)] * len(counts)
    if reading.denominator == "micro-batch":
        return [1.0 / (parts * max(1, sum(counts)))] * len(counts)
    total = 0
    for start in range(0, everyone, size):
        some = leaf.rollouts[start : start + size]
        longest = max(len(answer) for _, answer in some)
        for prompt, answer in some:
            total += len(_positions(prompt, answer, longest, played.pair.tokenizer.eos_token_id, reading))
            total += len(prompt) if reading.denominator == "with prompt" else 0
    return [1.0 / max(1, total)] * len(counts)


@dataclass(frozen=True)
class Read:
    """The rows that a reading reads, at given temperatures, and their shares.

    Attributes:
        rows: the rows of the student, `(N,)`.
        tokens: the sampled token of each, or -1 if the whole vocabulary is scored.
        log_p: the student's log-probabilities, `(N, V)`.
        log_u: the log-ratios of teacher to student.
        factor: the share of each row's gradient in the logits, `(N, 1)`.
        shape: of the table.
        given: whether the teacher wrote the answers, whose likelihood is then what a sampled token is scored by.
    """

    rows: Int64[Tensor, " N"]
    tokens: Int64[Tensor, " N"]
    log_p: Float[Tensor, "N V"]
    log_u: Float[Tensor, "N V"]
    factor: Float[Tensor, "N 1"]
    shape: torch.Size
    given: bool

    @classmethod
    def of(cls, played: Played, reading: Reading, given: Shares | None = None) -> Read:
        """What a reading reads; its shares may be known already."""
        found = shares(played, reading) if given is None else given
        ours, theirs = (model.model.table.detach().double() for model in (played.pair.student, played.pair.teacher))
        keys = torch.tensor(list(found), dtype=torch.int64).reshape(-1, 3)
        log_p = (ours[keys[:, 0]] / reading.student_temperature).log_softmax(-1)
        log_q = (theirs[keys[:, 1]] / reading.teacher_temperature).log_softmax(-1)
        factor = torch.tensor(list(found.values()), dtype=torch.float64).unsqueeze(-1) / reading.student_temperature
        return cls(keys[:, 0], keys[:, 2], log_p, log_q - log_p, factor, ours.shape, played.pair.teacher_answers)

    def gradient(self, divergence: Divergence, stopped: bool = False, centred: bool = False) -> Float[Tensor, "R V"]:
        """The expected gradient in the student's table."""
        p = self.log_p.exp()
        weight = divergence.centred_weight if centred else divergence.weight
        advantage = -divergence.generator(self.log_u) if stopped else weight(self.log_u)
        if bool((self.tokens >= 0).all()):
            token = self.tokens.unsqueeze(-1)
            if self.given:
                # The likelihood of the teacher's tokens is the forward KL; of other divergences nothing is known.
                known = divergence.name == "forward_kl"
                advantage = torch.ones_like(advantage) if known else torch.zeros_like(advantage)
            rows = advantage.gather(-1, token) * (torch.zeros_like(p).scatter(-1, token, 1.0) - p)
        else:
            rows = p * (advantage - (p * advantage).sum(-1, keepdim=True))
        return torch.zeros(self.shape, dtype=torch.float64).index_add(0, self.rows, -self.factor * rows)


def gradient_of(played: Played, reading: Reading, objective: Objective) -> Float[Tensor, "R V"]:
    """The expected gradient of a reading in the student's table.

    Args:
        played: the outcomes.
        reading: how they are read.
        objective: what is scored; token-local.
    """
    read = Read.of(played, reading)
    total = torch.zeros(read.shape, dtype=torch.float64)
    for coefficient, divergence in objective.terms:
        total += coefficient * read.gradient(divergence, reading.stopped, reading.centred)
    return total
