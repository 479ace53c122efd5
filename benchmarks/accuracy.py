"""The worst errors, in units in the last place, of every function of every divergence in every floating-point dtype.

`python benchmarks/accuracy.py --write docs/accuracy.md` needs python-flint (`pip install python-flint`) besides the
development tools. float64 is measured against balls of arbitrary precision, from the symbolic generators alone;
narrower dtypes are measured against the same functions in float64, whose error is far below their unit. The 16-bit
dtypes are measured at every log-ratio that they can represent.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# sympy must not use the arithmetic of the ball library.
os.environ.setdefault("SYMPY_GROUND_TYPES", "python")

import numpy as np
import sympy
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import opdtheory as opd  # noqa: E402
from opdtheory.divergences import Divergence, symbol  # noqa: E402

FUNCTIONS = ("generator", "log_slope", "weight", "curvature")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MEMBERS = (
    "reverse_kl",
    "forward_kl",
    "jsd",
    "skew_jsd(beta=0.1)",
    "skew_jsd(beta=1e-9)",
    "chi2",
    "neyman_chi2",
    "hellinger",
    "total_variation",
    "le_cam",
    "jeffreys",
    "alpha(alpha=0.3)",
    "alpha(alpha=1.5)",
    "alpha(alpha=0.05)",
    "alpha(alpha=-2.5)",
    "skew_forward_kl(lam=0.1)",
    "skew_forward_kl(lam=0.999)",
    "skew_reverse_kl(lam=0.1)",
    "skew_reverse_kl(lam=0.999)",
)
# Above, the page explains an entry.
MARK = 8.0
SPECIAL = (0.0, -0.0, math.inf, -math.inf, 5e-324, -5e-324, 2.0**-1022, -(2.0**-1022), 1e300, -1e300, 1.7e308, -1.7e308)
SEED = 20261126
# Beyond, every function is constant, linear in log u, a power of u that leaves float64, or zero.
_FAR = 4000.0


def log_ratios(points: int) -> np.ndarray:
    """Special values, values near them and near every branch, log-uniform values of all sizes, and those of models."""
    rng = np.random.default_rng(SEED)
    sizes = [points // 20, points // 4, points // 10, points // 10]
    sign = lambda count: rng.choice([-1.0, 1.0], count)  # noqa: E731
    tiny = sign(sizes[0]) * 10.0 ** rng.uniform(-300, -20, sizes[0])
    small = sign(sizes[1]) * 10.0 ** rng.uniform(-20, math.log10(700), sizes[1])
    far = rng.uniform(-745, 745, sizes[2])
    edges = np.array(
        [-0.5, 0.5, 1.0, -1.0, 1.5, -1.5, 2.0, -2.0, math.log(2), -math.log(2), 600.0, 700.0, 709.78, -708.4]
    )
    near = rng.choice(edges, sizes[3]) * (1 + sign(sizes[3]) * 10.0 ** rng.uniform(-16, -2, sizes[3]))
    models = rng.normal(0, 3, max(0, points - sum(sizes) - len(SPECIAL)))
    return np.concatenate([SPECIAL, tiny, small, far, near, models])


def symbolic(divergence: Divergence) -> list[sympy.Expr]:
    """The four functions by sympy from the generator, without delta functions at kinks."""
    u = symbol()

    def slope(expr: sympy.Expr) -> sympy.Expr:
        return sympy.diff(expr, u).replace(sympy.DiracDelta, lambda *_: sympy.Integer(0))

    f = divergence.expr
    return [f, u * slope(f), u * slope(f) - f, u**2 * slope(slope(f))]


class Reference:
    """The exact values of a divergence's functions, each as a float64 and the rest of it.

    Args:
        divergence: whose generator.
    """

    def __init__(self, divergence: Divergence) -> None:
        import flint

        self._flint, self._order = flint, 1 + min(abs(divergence.parameters.get("alpha", 1.0)), 50.0)
        balls: dict[str, Any] = {
            "mpf": lambda x: flint.arb(x) if isinstance(x, int) else _ball(flint, x),
            "log": lambda x: flint.arb(x).log(),
            "exp": lambda x: flint.arb(x).exp(),
            "sqrt": lambda x: flint.arb(x).sqrt(),
            "Abs": abs,
            "abs": abs,
            "sign": lambda x: flint.arb((x > 0) - (x < 0)),
        }
        exact = symbolic(divergence)
        self._at_one = [float(expr.subs(symbol(), 1)) for expr in exact]
        self._evaluate: Callable[[Any], Sequence[Any]] = sympy.lambdify(
            symbol(), exact, modules=[balls, "mpmath"], cse=True
        )

    def __call__(self, log_u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The nearest float64 and what is left, `(functions, points)` each."""
        high, low = np.empty((2, len(FUNCTIONS), len(log_u)))
        for n, t in enumerate(log_u.tolist()):
            if t == 0.0:
                high[:, n], low[:, n] = self._at_one, 0.0
            elif math.isinf(t):
                high[:, n], low[:, n] = self._limits(t), 0.0
            else:
                high[:, n], low[:, n] = zip(*map(_split, self._balls(t)), strict=True)
        return high, low

    def _balls(self, t: float) -> Sequence[Any]:
        if abs(t) > _FAR:
            return self._scaled(t)
        digits = max(0.0, -math.log2(abs(t)))
        bits = int(100 + 1.5 * abs(t) * self._order + 2.5 * min(digits, 1100))
        while True:
            self._flint.ctx.prec = bits
            found = self._evaluate(self._flint.arb(t).exp())
            # Below the smallest number of float64, and by far.
            least = self._flint.arb(2) ** -1200
            if all(x == 0 or x.rel_accuracy_bits() > 70 or abs(x) < least for x in map(self._flint.arb, found)):
                return [self._flint.arb(x) for x in found]
            if bits > 40_000:
                # Balls around an exact zero never leave it.
                return [
                    self._flint.arb(x) if x == 0 or x.rel_accuracy_bits() > 70 else self._flint.arb(0) for x in found
                ]
            bits *= 2

    def _scaled(self, t: float) -> Sequence[Any]:
        """The continuation from three points: constant, linear, or a power of u that leaves float64 at either end."""
        far = math.copysign(_FAR, t)
        found = []
        for a, b, c in zip(*(self._balls(share * far) for share in (0.25, 0.5, 1.0)), strict=True):
            if b == 0 or c == 0 or abs(c / b - 1) < 1e-6:
                found.append(c)
            elif abs((c - b) / (b - a) - 2) < 1e-6:
                found.append(c + (c - b) / self._flint.arb(far / 2) * (self._flint.arb(t) - self._flint.arb(far)))
            else:
                found.append(
                    self._flint.arb(math.copysign(math.inf, float(c))) if abs(c) > abs(b) else self._flint.arb(0)
                )
        return found

    def _limits(self, t: float) -> list[float]:
        near, far = self._scaled(math.copysign(1e6, t)), self._scaled(math.copysign(1e300, t))
        return [
            float(b) if float(a) == float(b) else math.copysign(math.inf, float(b))
            for a, b in zip(near, far, strict=True)
        ]


def _ball(flint: Any, value: Any) -> Any:
    """A number of mpmath, exactly."""
    sign, mantissa, exponent, _ = value if isinstance(value, tuple) else value._mpf_
    ball = flint.arb(int(mantissa)) * flint.arb(2) ** int(exponent)
    return -ball if sign else ball


def _split(ball: Any) -> tuple[float, float]:
    high = float(ball)
    if math.isinf(high):
        return high, 0.0
    return high, float(ball - type(ball)(high))


def unit(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The distance between neighbours of the dtype where its values are."""
    info = torch.finfo(dtype)
    digits = 1 - int(math.log2(info.eps))
    least = math.log2(info.smallest_normal) - digits + 1
    # The exponent of zero is none of its own.
    exponents = np.where(values == 0, least, np.frexp(np.abs(values))[1] - digits)
    return np.exp2(np.maximum(exponents, least).clip(-1074))


def errors(found: np.ndarray, high: np.ndarray, low: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Errors in units in the last place; infinite for a NaN, and for an infinity or a finite value in its place."""
    largest = torch.finfo(dtype).max
    units = unit(np.where(np.isfinite(high), high, 1.0), dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        off = np.abs((found - high) - low) / units
        # Half a unit above the largest number everything rounds to infinity.
        beyond = np.abs(high) > largest * (1 - torch.finfo(dtype).eps)
        overflows = np.isinf(found) & beyond & (np.sign(found) == np.sign(high))
        wrong = np.isnan(found) | (np.isinf(found) ^ np.isinf(high)) | (np.isinf(high) & (found != high))
    return np.where(overflows, 0.0, np.where(wrong, np.inf, np.where(np.isinf(high), 0.0, off)))


@dataclass(frozen=True)
class Worst:
    """The largest error of a function, and where it occurs."""

    ulp: float
    at: float

    def __str__(self) -> str:
        return f"{self.ulp:.2g} at {self.at:.3g}" if self.ulp > MARK else f"{self.ulp:.2g}"


def worst(divergence: Divergence, points: int) -> dict[tuple[str, torch.dtype], Worst]:
    """The worst error of each function in each dtype."""
    found = {}
    log_u = log_ratios(points)
    exact = Reference(divergence)(log_u)
    for dtype in DTYPES:
        narrow = torch.from_numpy(log_u).to(dtype) if dtype.itemsize > 2 else _all_of(dtype)
        for n, function in enumerate(FUNCTIONS):
            values = getattr(divergence, function)(narrow).double().numpy()
            if dtype == torch.float64:
                high, low = exact[0][n], exact[1][n]
            else:
                high = getattr(divergence, function)(narrow.double()).numpy()
                low = np.zeros_like(high)
            off = errors(values, high, low, dtype)
            where = int(off.argmax())
            found[function, dtype] = Worst(float(off[where]), float(narrow[where]))
    return found


def _all_of(dtype: torch.dtype) -> torch.Tensor:
    """Every number of a 16-bit dtype, and both infinities."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return every[~torch.isnan(every)]


def table(members: Sequence[str], points: int) -> list[str]:
    """A row for each divergence and function."""
    names = [str(dtype)[6:] for dtype in DTYPES]
    lines = ["| | function | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    for member in members:
        start = time.process_time()
        found = worst(opd.divergence(member), points)
        for function in FUNCTIONS:
            cells = (str(found[function, dtype]) for dtype in DTYPES)
            lines.append(f"| `{member}` | {function} | " + " | ".join(cells) + " |")
        print(f"{member}: {time.process_time() - start:.0f} s", file=sys.stderr, flush=True)
    return lines


def main(arguments: list[str] | None = None) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=1_000_000, metavar="N", help="log-ratios for each divergence")
    parser.add_argument("--only", nargs="+", default=MEMBERS, metavar="DIVERGENCE")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page")
    options = parser.parse_args(arguments)
    rows = table(options.only, options.points)
    text = "\n".join([f"{options.points:,} log-ratios from seed {SEED}; errors in ulp.", "", *rows])
    print(text)
    if options.write:
        from benchmarks.measure import write

        write(options.write, "benchmarks/accuracy.py", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
