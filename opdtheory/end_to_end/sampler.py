"""From which law a trainer draws its tokens, read off while it generates."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from opdtheory.end_to_end.played import Played

__all__ = ["Sampler", "sampler_of"]

# A float32 sampler's rounding, relative to a probability.
_CLOSE = 1e-5

# A token that the student writes this often and the sampler never was cut off.
_SEEN = 1e-6


@dataclass(frozen=True)
class Sampler:
    """What was found of the sampling law.

    Attributes:
        kind: `student`, `tempered`, `truncated`, `teacher` or `other`.
        temperature: of the student's logits, if that explains the law.
        kept: the largest number of tokens that a law keeps, if it cuts some off.
    """

    kind: str
    temperature: float = 1.0
    kept: int | None = None

    @property
    def words(self) -> str:
        """The law in a sentence; empty if it is the student's own."""
        if self.kind == "student":
            return ""
        if self.kind == "teacher":
            return "It samples from the teacher, not from the student."
        if self.kind == "other":
            return "It samples from a law that is not the student's at the tokens it has written."
        hot = "" if abs(self.temperature - 1.0) < _CLOSE else f" at temperature {self.temperature:.4g}"
        cut = "" if self.kept is None else f", of which it keeps at most {self.kept} tokens (top-k, top-p or min-p)"
        return f"It samples from the student{hot}{cut}: its histories are those of its sampler (T15)."


def sampler_of(played: Played) -> Sampler:
    """Compare the laws that were drawn from with the student's and the teacher's; the student's if none was."""
    if not played.laws:
        return Sampler("student")
    model = played.pair.student.model
    tables = {
        name: each.model.table.detach().double()
        for name, each in (("student", played.pair.student), ("teacher", played.pair.teacher))
    }
    rows = torch.tensor([model.rows.row(list(prefix)) for prefix in played.laws])
    laws = torch.tensor(list(played.laws.values()), dtype=torch.float64)
    for name, table in tables.items():
        if float((laws - table[rows].softmax(-1)).abs().max()) < _CLOSE:
            return Sampler(name)
    logits = tables["student"][rows]
    kept = (laws > 0) & (logits.softmax(-1) > _SEEN)
    cut = bool(((logits.softmax(-1) > _SEEN) & ~kept).any())
    inverse = _slope(logits, laws, kept)
    if inverse <= 0:
        return Sampler("other")
    tempered = torch.where(kept, logits * inverse, -torch.inf).softmax(-1)
    if float((laws - tempered).abs().max()) > 10 * _CLOSE:
        return Sampler("other")
    return Sampler("truncated" if cut else "tempered", round(1 / inverse, 6), int(kept.sum(-1).max()) if cut else None)


def _slope(logits: torch.Tensor, laws: torch.Tensor, kept: torch.Tensor) -> float:
    """The multiple of the logits that the logarithms of the laws are, by least squares around each row's mean."""
    count = kept.sum(-1, keepdim=True).clamp_min(1)
    z = torch.where(kept, logits, 0.0)
    y = torch.where(kept, laws.clamp_min(1e-300).log(), 0.0)
    z = torch.where(kept, z - z.sum(-1, keepdim=True) / count, 0.0)
    y = torch.where(kept, y - y.sum(-1, keepdim=True) / count, 0.0)
    below = float((z * z).sum())
    return float((z * y).sum()) / below if below > 0 else 1.0
