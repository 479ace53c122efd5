"""Least squares over few columns."""

from __future__ import annotations

import numpy as np

from opdtheory.auditing.naming.sparse import Curve, best_subset, fit_parameter, snap


def test_sparse_search_and_its_false_twin() -> None:
    points = np.linspace(-2, 2, 25)
    curve = Curve(points, 2 * np.sin(points) - 6 * np.cos(points), np.ones(25))
    columns = np.column_stack([np.sin(points), points, np.cos(points), points**2])
    subset = best_subset(curve, columns, 2)
    assert subset is not None and subset.indices == (0, 2) and subset.error < 1e-14
    assert snap(curve, columns, subset, 1e-9).coefficients.tolist() == [2.0, -6.0]
    without = best_subset(curve, columns[:, [0, 1, 3]], 2)
    assert without is not None and without.error > 1e-2
    # Twice the same column: no coefficients mean anything.
    assert best_subset(curve, columns[:, [0, 0]], 2) is None
    assert fit_parameter(curve, lambda v: np.exp(v * points), -3.0, 3.0, np.empty((25, 0)), 1e-9) is None
