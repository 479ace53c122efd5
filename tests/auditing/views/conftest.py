"""The audits that all views show."""

from __future__ import annotations

import pytest

import opdtheory as opd
from opdtheory.auditing import Audit
from tests.losses import k3


@pytest.fixture(scope="session")
def report() -> Audit:
    return opd.audit(k3, "reverse_kl")


@pytest.fixture(scope="session")
def reports(report: Audit) -> list[Audit]:
    """One of every verdict that a full run gives, and one of a coupled loss, whose grid is coarse."""
    return [
        report,
        opd.audit(k3, "forward_kl"),
        opd.audit(lambda r: r.token_mean(r.log_u.square()), "reverse_kl"),
        opd.audit(lambda r: r.token_sum(-r.log_u), "reverse_kl"),
        opd.audit(opd.estimator("opd", "forward_kl"), "forward_kl"),
        opd.audit(lambda r: (r.log_u.sum(-1).square() / 2).mean(), "reverse_kl", batch_size=2),
    ]
