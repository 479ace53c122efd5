"""The findings on a trainer, in sentences."""

from __future__ import annotations

from opdtheory.end_to_end.descent import Descent, stopped
from opdtheory.end_to_end.played import Played
from opdtheory.end_to_end.report import TrainerAudit
from opdtheory.end_to_end.sampler import sampler_of
from opdtheory.rendering.text import percent

__all__ = ["words_of"]

# What the frequency of a prompt may be off by.
_EVEN = 1e-3

# An objective that is farther off than this is not worth a name.
_NEAR = 0.25

_LEAKS = {
    "inside a prompt": "The prompt's tokens carry {share} of the squared gradient: the loss reads labels inside the "
    "prompt.",
    "after EOS": "Positions after the end of the sequence carry {share} of the squared gradient: they are not masked.",
    "past the horizon": "Positions past the last token carry {share} of the squared gradient: labels are one token "
    "late, or prompts are longer than those of the dataset.",
    "padding read as text": "{share} of the squared gradient is at prefixes that hold padding: the attention mask or "
    "the positions are wrong.",
    "not a prefix of these prompts": "{share} of the squared gradient is at prefixes of no prompt: prompts are cut, "
    "doubled or templated differently.",
    "longer than prompt and response": "{share} of the squared gradient is at prefixes longer than prompt and answer.",
}


def words_of(report: TrainerAudit, main: Played, followed: Descent | None, nearest: Descent | None) -> tuple[str, ...]:
    """The findings: verdict, what is descended, the reading, the scale, leaks, prompts, sampler, modes, variants."""
    claim = f"{report.claim.label} ({report.claim.granularity})"
    found = list(report.words)
    if report.monte_carlo is not None:
        return (*found, *_leaks(report), *_prompts(main), *_modes(main))
    if report.verdict == "exact":
        found.append(f"Its expected gradient is exactly that of {claim}.")
    elif report.verdict == "exact_up_to_scale":
        found.append(f"Its expected gradient is exactly that of {claim}, times {report.scale:.6g}.")
    elif report.verdict == "zero":
        found.append("Its expected gradient is zero.")
    else:
        uphill = " It points uphill." if report.cosine < 0 else ""
        found.append(
            f"Its expected gradient is not that of {claim}: at the best scale it is off by {percent(report.error)}, "
            f"with a cosine of {report.cosine:.4f}.{uphill}"
        )
        if followed is not None and stopped(followed):
            found.append(f"It takes {followed.objective} as a reward.")
        elif followed is not None and str(followed.objective) != str(report.claim):
            found.append(f"It descends {followed.objective}.")
        elif nearest is not None and report.cosine > 0 and nearest.distance.error < _NEAR:
            found.append(
                f"The nearest catalogue objective is {nearest.objective}, off by {percent(nearest.distance.error)}."
            )
    found += report.reading
    found += [report.scale_cause] if report.scale_cause else []
    found += _leaks(report)
    if main.pair.teacher_answers and followed is not None and followed.objective.granularity == "token_local":
        found.append("Its histories are the teacher's answers (T15).")
    found += _prompts(main)
    law = sampler_of(main).words
    found += [law] if law else []
    found += _modes(main)
    found += [each.words for each in report.variants if each.words and each.holds is not None]
    return tuple(found)


def _leaks(report: TrainerAudit) -> list[str]:
    """Where the gradient should not be."""
    # Squares of rounding are not a leak.
    return [
        _LEAKS[kind].format(share=percent(share))
        for kind, share in report.where.items()
        if kind in _LEAKS and share > report.tolerance**2
    ]


def _prompts(main: Played) -> list[str]:
    """Whether the student was asked what the dataset asks, each prompt as often as the others."""
    decode, known = main.pair.tokenizer.decode, main.pair.prompt_tokens
    shares: dict[tuple[int, ...], float] = {tuple(prompt): 0.0 for prompt in known}
    for leaf in main.leaves:
        for prompt, _ in leaf.rollouts:
            key = tuple(prompt)
            shares[key] = shares.get(key, 0.0) + leaf.probability / len(leaf.rollouts)
    if all(list(key) in known and abs(share - 1 / len(known)) < _EVEN for key, share in shares.items()):
        return []
    seen = ", ".join(f"{decode(list(key))!r} {100 * share:.3g} %" for key, share in shares.items())
    return [
        f"It generates after {seen} of the time, where the dataset has {len(known)} prompts equally often: prompts are "
        "cut, doubled, left out or templated differently, or their padding is read as text."
    ]


def _modes(main: Played) -> list[str]:
    ours, theirs = main.modes
    found = []
    if ours and True not in ours:
        found.append("The loss was computed in eval mode: dropout would be off.")
    if True in theirs:
        found.append("The teacher was scored in train mode, with a gradient: dropout would be on.")
    return found
