"""An audit as a self-contained HTML page, in a terminal, and as a JSON schema."""

from opdtheory.auditing.views.page import render_audit, write_audit

__all__ = ["render_audit", "write_audit"]
