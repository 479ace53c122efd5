"""An audit as one self-contained HTML file."""

from opdtheory.auditing.views.page import render_audit, write_audit

__all__ = ["render_audit", "write_audit"]
