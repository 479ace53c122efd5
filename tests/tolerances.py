"""The tolerances of the suite, in one table. Monte Carlo results are held to intervals instead."""

from __future__ import annotations

ALGEBRA = 1e-12  # one closed form against another in float64: a few thousand ulp of headroom
ENUMERATION = 1e-12  # sums over every sequence in float64: rounding grows with the root of the count
FINITE_DIFFERENCE = 1e-6  # central differences: truncation h^2 and rounding eps/h meet near h = 1e-5
