"""The families of theorems, by which a verification's page is ordered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from opdtheory.theorems import Theorem

__all__ = ["FAMILIES", "by_family", "family"]

# The folders of `opdtheory.theorems`, in the order in which they are read.
FAMILIES = {
    "gradient": "The gradient of a divergence",
    "weight": "The divergence that a weight implies",
    "stability": "Whether the teacher attracts",
    "sequences": "Objectives of whole sequences",
    "variance": "Variance",
    "samplers": "Rollouts of another policy",
    "truncation": "The top k tokens",
    "teachers": "Several teachers, and other teachers",
    "reductions": "Sums and means over tokens",
    "vocabulary": "The whole vocabulary",
    "others": "Others",
}


def by_family(theorems: Iterable[tuple[str, Theorem | None]]) -> Iterator[tuple[str, list[str]]]:
    """Each family that is not empty, with the numbers of its theorems in the order given."""
    found: dict[str, list[str]] = {name: [] for name in FAMILIES}
    for number, theorem in theorems:
        found[family(theorem)].append(number)
    return ((name, numbers) for name, numbers in found.items() if numbers)


def family(theorem: Theorem | None) -> str:
    """The folder whose code decides the theorem's steps and checks; `others` if there is none."""
    if theorem is None:
        return "others"
    deciding = [step.holds for step in theorem.derivation] + [identity.check for identity in theorem.identities]
    for function in deciding:
        package, _, rest = (getattr(function, "__module__", None) or "").partition("opdtheory.theorems.")
        name = rest.partition(".")[0]
        if not package and name in FAMILIES:
            return name
    return "others"
