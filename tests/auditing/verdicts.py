"""Audits without the details, which have tests of their own."""

from __future__ import annotations

import functools

import opdtheory as opd

audit = functools.partial(opd.audit, details=False)
