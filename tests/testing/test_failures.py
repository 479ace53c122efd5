"""Messages of failing assertions: whole if they are short, else cut where they say so."""

from __future__ import annotations

import pytest

from opdtheory.auditing import VERDICTS, audit
from opdtheory.testing.failures import LONGEST, reason, shortened, shortened_traceback
from tests.losses import k2, k3


@pytest.mark.parametrize("count", [1, LONGEST - 1, LONGEST])
def test_what_fits_is_left_alone(count):
    text = "\n".join(map(str, range(count)))
    assert shortened(text) == text


@pytest.mark.parametrize("count", [LONGEST + 1, 10 * LONGEST])
def test_what_does_not_fit_is_cut_and_says_so(count):
    lines = shortened("\n".join(map(str, range(count)))).splitlines()
    assert len(lines) == LONGEST == 40
    assert lines[:-1] == [str(n) for n in range(LONGEST - 1)]
    assert lines[-1].startswith(f"[{count - LONGEST + 1} more lines: print(report) for the rest")


def test_the_end_of_a_traceback_is_kept():
    text = "\n".join(map(str, range(LONGEST)))
    assert shortened_traceback(text) == text
    lines = shortened_traceback(f"{text}\nlast").splitlines()
    assert len(lines) == LONGEST and lines[-1] == "last" and lines[1] == "2" and lines[0].startswith("[2 more lines")


def no_mask(r):
    return (r.log_u.square() / 2).sum() / len(r.tokens)


def test_the_reason_is_the_verdict_or_the_check_that_fails():
    assert reason(audit(k3, "reverse_kl")) == VERDICTS["other_objective"]
    assert reason(audit(k2, "reverse_kl")) == VERDICTS["exact"]
    report = audit(no_mask, "reverse_kl")
    assert (
        report.verdict != "exact"
        or reason(report) == f"{VERDICTS['exact']} on the panel, but it is wrong beyond it or unsound"
    )
