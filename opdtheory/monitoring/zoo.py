"""The estimators that a diagnosis lays beside the one in use."""

from __future__ import annotations

from collections.abc import Iterator

from opdtheory.divergences import Divergence
from opdtheory.estimators import Estimator
from opdtheory.estimators import estimator as estimator_of
from opdtheory.monitoring.weights import Weight, weight_of

__all__ = ["beside"]

_SAME = ("opd", "opd_plus", "opd_plus_centred")
_OTHERS = (("opd_plus", "jsd"), ("opd_plus", "hellinger"))
_OF_THE_RATIO = ("k1_reward", "k2_reward", "k3_reward", "k2_loss", "k3_loss")


def beside(loss: Estimator) -> Iterator[Weight]:
    """The weights of the others: those of the same divergence, two of slow weight, and the k's."""
    named: list[tuple[str, str | Divergence | None]] = [
        *((name, loss.claim.divergence) for name in _SAME),
        *_OTHERS,
        *((name, None) for name in _OF_THE_RATIO),
    ]
    seen = {loss.label}
    for name, divergence in named:
        other = estimator_of(name, divergence)
        if other.label not in seen:
            seen.add(other.label)
            yield weight_of(other)
