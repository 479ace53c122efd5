"""The page of a trainer's audit holds the findings, and escapes what a user wrote."""

from __future__ import annotations

from opdtheory.end_to_end import audit_update
from opdtheory.end_to_end.page import render_trainer_audit, write_trainer_audit
from tests.end_to_end.update_faults import FAULTS, loop, reverse_kl


def test_the_page_says_what_the_report_says(tmp_path) -> None:
    report = audit_update(FAULTS["k3 loss"][0], "reverse_kl", name="<k3>")
    page = write_trainer_audit(report, tmp_path / "new" / "k3.html").read_text(encoding="utf-8")
    assert "other objective" in page and "forward_kl (token_local)" in page and "&lt;k3&gt;" in page
    assert "<script" not in page and "<k3>" not in page
    for variant in report.variants:
        assert variant.name in page
    assert 'class="verdict bad"' in page
    sound = render_trainer_audit(audit_update(loop(reverse_kl), "reverse_kl", variants=False))
    assert 'class="verdict good"' in sound and "In other settings" not in sound
