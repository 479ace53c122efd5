"""T1 to T4: the OPD+ identity, the bias of stop-gradient, the gauge, and the implied divergence."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opdtheory import divergences
from opdtheory.divergences import Divergence
from opdtheory.estimators import estimator
from opdtheory.exact import TabularPolicy, enumerated_value, exact_gradient, expected_gradient, random_pair
from opdtheory.exact.tree import Tree
from opdtheory.rollouts import Rollouts
from opdtheory.theorems.theorem import Identity, Tally

if TYPE_CHECKING:
    import sympy

__all__ = ["identities"]

Weight = Callable[[Divergence, Tensor], Tensor]
Pair = tuple[TabularPolicy, TabularPolicy]

GAUGE = 0.7


def catalogue() -> list[Divergence]:
    """Every catalogue entry, the parameterised ones at several values."""
    d = divergences
    plain = [d.divergence(name) for name in d.names() if name not in _PARAMETERISED]
    return plain + [
        d.divergence(name, **{key: value}) for name, (key, values) in _PARAMETERISED.items() for value in values
    ]


_PARAMETERISED = {
    "skew_jsd": ("beta", (0.1, 0.9)),
    "alpha": ("alpha", (-1.5, 0.0, 0.3, 1.0, 2.5)),
    "skew_forward_kl": ("lam", (0.0, 0.3)),
    "skew_reverse_kl": ("lam", (0.0, 0.3)),
}


@functools.cache
def pairs() -> tuple[Pair, ...]:
    """Pairs with and without an end-of-sequence token, from nearly equal to far apart."""
    return (
        random_pair(4, 2, scale=1.0, distance=0.05, seed=1),
        random_pair(3, 3, scale=1.0, distance=1.0, seed=2),
        random_pair(3, 3, eos=0, scale=0.5, distance=1.5, seed=3),
        random_pair(2, 4, eos=1, scale=2.0, distance=1.0, seed=4),
    )


@functools.cache
def two_atoms() -> tuple[Pair, ...]:
    """One-step pairs on two tokens, so that `u_1 < 1 < u_2`."""
    return tuple(random_pair(2, 1, scale=1.0, distance=1.0, seed=seed) for seed in range(8))


@functools.cache
def sampled_gradient(name: str, divergence: Divergence, pair: Pair) -> list[Tensor]:
    """Expected gradient of a sampled estimator run as a black box; kept, as every twin needs it again."""
    return expected_gradient(estimator(name, divergence), *pair)


def _cases(skip: tuple[str, ...] = ()) -> Iterator[tuple[Divergence, Pair]]:
    for divergence in catalogue():
        if divergence.name not in skip:
            for pair in pairs():
                yield divergence, pair


def descent(pair: Pair, weight: Callable[[Tensor], Tensor]) -> list[Tensor]:
    r"""$-E_p[\sum_n A(u_n) s_n]$ in the logits, row by row: $-P(h)\,p_a (A(u_a) - E_p A)$."""
    tree = Tree.build(*pair)
    levels = []
    for n in range(tree.horizon):
        p, advantage = tree.log_p[n].exp(), weight(tree.log_q[n] - tree.log_p[n])
        centred = advantage - (p * advantage).sum(-1, keepdim=True)
        levels.append(-tree.reach(n).unsqueeze(-1) * p * centred)
    return levels


def autograd_gradient(pair: Pair, value: Callable[[TabularPolicy], Tensor]) -> list[Tensor]:
    """Gradient of a function of the student by automatic differentiation."""
    student = TabularPolicy([z.clone().requires_grad_() for z in pair[0].logits], eos=pair[0].eos)
    return list(torch.autograd.grad(value(student), student.logits, allow_unused=True, materialize_grads=True))


# T1: the OPD+ identity.


def _check_identity(weight: Weight) -> Tally:
    tally = Tally()
    for divergence, pair in _cases():
        by_autograd = autograd_gradient(pair, lambda s, d=divergence, t=pair[1]: enumerated_value(s, t, d))  # type: ignore[misc]
        tally.compare(descent(pair, lambda log_u, d=divergence: weight(d, log_u)), by_autograd)  # type: ignore[misc]
    return tally


def _check_oracle(sign: float) -> Tally:
    """The oracle's closed forms against autograd of the enumerated objectives."""
    tally = Tally()
    for divergence, pair in _cases():
        for objective, gamma in (("token_local", 1.0), ("token_return", 1.0), ("token_return", 0.6), ("sequence", 1.0)):
            exact = exact_gradient(*pair, divergence, objective, gamma)
            by_autograd = autograd_gradient(
                pair,
                lambda s, d=divergence, t=pair[1], o=objective, g=gamma: enumerated_value(s, t, d, o, g),  # type: ignore[misc]
            )
            tally.compare([sign * level for level in exact], by_autograd)
    return tally


def _check_sampled(name: str) -> Tally:
    """The sampled estimator, run as a black box on every rollout."""
    tally = Tally()
    for divergence, pair in _cases():
        tally.compare(sampled_gradient(name, divergence, pair), exact_gradient(*pair, divergence))
    return tally


def _check_non_decreasing(sign: float) -> Tally:
    r"""$dw/d\log u = u^2 f'' \ge 0$, by autograd of the weight."""
    tally = Tally()
    grid = torch.linspace(-6, 6, 49, dtype=torch.float64)
    for divergence in catalogue():
        log_u = grid.clone().requires_grad_()
        (slope,) = torch.autograd.grad(sign * divergence.weight(log_u).sum(), log_u)
        tally.require(bool((slope >= 0).all()))
        tally.compare(slope, sign * divergence.curvature(grid))
    return tally


def _check_conjugate(weight: Weight) -> Tally:
    r"""$f^*(f'(u)) = \sup_x [x f'(u) - f(x)]$: the supremum is the weight, attained at $x = u$ and nowhere exceeded."""
    tally = Tally()
    grid = torch.linspace(-4, 4, 81, dtype=torch.float64)
    for divergence in catalogue():
        slope = divergence.log_slope(grid) * (-grid).exp()
        critic = grid.exp().unsqueeze(-1) * slope - divergence.generator(grid).unsqueeze(-1)
        supremum, claimed = critic.amax(0), weight(divergence, grid)
        # At the kink of the total variation any value of the subdifferential serves.
        smooth = grid.abs() > 1e-9
        tally.compare(claimed[smooth], supremum[smooth])
    return tally


# T2: the bias of stop-gradient.


def _check_bias(bias: Weight) -> Tally:
    r"""$g_{sg} - g_{exact} = E_p[u f'(u) s]$, the left-hand side from the black-box estimator."""
    tally = Tally()
    for divergence, pair in _cases():
        stopped = sampled_gradient("opd", divergence, pair)
        exact = exact_gradient(*pair, divergence)
        predicted = descent(pair, lambda log_u, d=divergence: -bias(d, log_u))  # type: ignore[misc]
        tally.compare([s - e for s, e in zip(stopped, exact, strict=True)], predicted)
    return tally


def _check_value_bias(bias: Weight) -> Tally:
    r"""The first-order gap $E_{p_\theta}[f(u_{\theta_0})] - D_f(\theta)$ on one-step policies."""
    tally = Tally()
    for divergence in catalogue():
        for seed in range(3):
            pair = random_pair(5, 1, seed=seed)

            def gap(student: TabularPolicy, d: Divergence = divergence, pair: Pair = pair) -> Tensor:
                log_p, log_q = (torch.log_softmax(policy.logits[0], -1) for policy in (student, pair[1]))
                frozen = d.generator(log_q - log_p.detach())
                return (log_p.exp() * frozen).sum() - enumerated_value(student, pair[1], d)

            predicted = descent(pair, lambda log_u, d=divergence: -bias(d, log_u))  # type: ignore[misc]
            tally.compare(autograd_gradient(pair, gap), predicted)
    return tally


def _check_unbiased_iff(unbiased: Callable[[Divergence], bool]) -> Tally:
    """Stop-gradient is unbiased on two atoms with `u_1 < 1 < u_2` exactly for the generators claimed."""
    tally = Tally()
    for divergence in catalogue():
        worst = 0.0
        for pair in two_atoms():
            gap = sampled_gradient("opd", divergence, pair)[0] - exact_gradient(*pair, divergence)[0]
            worst = max(worst, float(gap.abs().max()))
        tally.require((worst < 1e-12) == unbiased(divergence) and not 1e-12 <= worst < 1e-6)
    return tally


def _constant_slope(divergence: Divergence) -> bool:
    grid = torch.linspace(-3, 3, 13, dtype=torch.float64)
    slope = divergence.log_slope(grid)
    return float(slope.max() - slope.min()) < 1e-12


# T3: the gauge.


def _shifted_value(pair: Pair, divergence: Divergence, shift: Callable[[Tensor], Tensor]) -> Tensor:
    tree = Tree.build(*pair)
    total = torch.zeros((), dtype=torch.float64)
    for n in range(tree.horizon):
        log_u = tree.log_q[n] - tree.log_p[n]
        rows = (tree.log_p[n].exp() * (divergence.generator(log_u) + GAUGE * shift(log_u))).sum(-1)
        total = total + (tree.reach(n) * rows).sum()
    return total


def _check_gauge_value(shift: Callable[[Tensor], Tensor]) -> Tally:
    r"""$D_{f + c(u-1)} = D_f$."""
    tally = Tally()
    for divergence, pair in _cases():
        tally.compare(_shifted_value(pair, divergence, shift), enumerated_value(*pair, divergence))
    return tally


def _check_gauge_direction(direction: str) -> Tally:
    r"""A change of gauge moves the stop-gradient direction by $-c\,\nabla KL(q\|p)$."""
    tally = Tally()
    for divergence, pair in _cases():
        gauged = descent(pair, lambda log_u, d=divergence: -(d.generator(log_u) + GAUGE * torch.expm1(log_u)))  # type: ignore[misc]
        plain = sampled_gradient("opd", divergence, pair)
        moved = [a - b for a, b in zip(gauged, plain, strict=True)]
        tally.compare(moved, [-GAUGE * level for level in exact_gradient(*pair, direction)])
    return tally


def _check_gauge_return(shift: Callable[[Tensor], Tensor]) -> Tally:
    """The `token_return` estimator keeps its expected gradient in every gauge."""
    tally = Tally()
    for divergence, pair in _cases():

        def loss(r: Rollouts, d: Divergence = divergence) -> Tensor:
            log_u = r.log_u.detach()
            reward = torch.where(r.mask > 0, d.generator(log_u) + GAUGE * shift(log_u), 0.0)
            later = reward.flip(-1).cumsum(-1).flip(-1) - reward
            return r.token_sum(-(d.weight(log_u) + GAUGE - later) * r.student_logprobs)

        tally.compare(expected_gradient(loss, *pair), exact_gradient(*pair, divergence, "token_return"))
    return tally


def _check_control_variate(sign: float) -> Tally:
    r"""$c^* = -\mathrm{Cov}(f(u), u-1)/\mathrm{Var}(u)$ makes the variance of $f(u) + c(u-1)$ stationary."""
    tally = Tally()
    for divergence in catalogue():
        for seed in range(3):
            student, teacher = random_pair(6, 1, seed=seed)
            log_p, log_q = (torch.log_softmax(policy.logits[0][0], -1) for policy in (student, teacher))
            p, f, control = log_p.exp(), divergence.generator(log_q - log_p), torch.expm1(log_q - log_p)
            covariance = (p * (f - (p * f).sum()) * control).sum()
            best = (sign * covariance / (p * control.square()).sum()).requires_grad_()
            value = f + best * control
            variance = (p * (value - (p * value).sum()).square()).sum()
            (slope,) = torch.autograd.grad(variance, best)
            tally.compare(slope, torch.zeros_like(slope))
    return tally


# T4: the implied divergence.


def _check_implied(weight_of: Callable[[sympy.Expr, sympy.Symbol], sympy.Expr]) -> Tally:
    r"""$w_{V[w]} - w$ is constant, symbolically, for the weights of the corollary table."""
    import sympy

    tally = Tally()
    u = divergences.symbol()
    for weight in corollary_weights(u).values():
        implied = divergences.implied_generator(weight)
        rest = sympy.simplify(sympy.diff(weight_of(implied, u) - weight, u))
        tally.require(rest == 0)
    return tally


def _check_round_trip(gauge: Callable[[sympy.Symbol], sympy.Expr]) -> Tally:
    r"""$V[w_f] = f$ up to the gauge $c(u - 1)$, symbolically, for the catalogue."""
    import sympy

    tally = Tally()
    u = divergences.symbol()
    for name in ("reverse_kl", "forward_kl", "jsd", "chi2", "neyman_chi2", "hellinger", "le_cam", "jeffreys"):
        f = divergences.divergence(name).expr
        implied = divergences.implied_generator(u * sympy.diff(f, u) - f)
        slope = sympy.diff(f, u).subs(u, 1)
        tally.require(sympy.simplify(implied + slope * gauge(u) - f) == 0)
    return tally


def _check_convexity(genuine: Callable[[sympy.Expr, sympy.Symbol], bool]) -> Tally:
    r"""$V[w]'' = w'/u$, so that $V[w]$ is convex exactly if $w$ never falls."""
    import sympy

    tally = Tally()
    u = divergences.symbol()
    for weight in corollary_weights(u).values():
        implied = divergences.implied_generator(weight)
        tally.require(sympy.simplify(sympy.diff(implied, u, 2) - sympy.diff(weight, u) / u) == 0)
        tally.require(divergences.is_convex(implied) == genuine(weight, u))
    return tally


def _never_falls(weight: sympy.Expr, u: sympy.Symbol) -> bool:
    import sympy

    slope = sympy.lambdify(u, sympy.diff(weight, u), "math")
    return all(slope(10.0 ** (k / 8)) >= -1e-12 for k in range(-40, 41))


def _check_bregman(advantage: Callable[[Tensor, Tensor, float], Tensor]) -> Tally:
    r"""A weight $A(p, q)$ of both probabilities follows $\sum_a H(p_a, q_a)$ with $\partial H/\partial p = -A$.

    For $A = q^\alpha - p^\alpha$ that is the density-power divergence,
    $H = p^{1+\alpha}/(1+\alpha) - q^\alpha p$ and a term of $q$ alone.
    """
    tally = Tally()
    for alpha in (0.25, 0.5, 1.0, 2.0):
        loss = estimator("power", alpha=alpha)
        for seed in range(3):
            pair = random_pair(5, 1, seed=seed)

            def bregman(student: TabularPolicy, pair: Pair = pair, alpha: float = alpha) -> Tensor:
                p, q = (torch.softmax(policy.logits[0], -1) for policy in (student, pair[1]))
                return (p ** (1 + alpha) / (1 + alpha) - q**alpha * p).sum()

            by_autograd = autograd_gradient(pair, bregman)
            tally.compare(expected_gradient(loss, *pair), by_autograd)
            p, q = (torch.softmax(policy.logits[0], -1) for policy in pair)
            weight = advantage(p, q, alpha)
            tally.compare(-p * (weight - (p * weight).sum(-1, keepdim=True)), by_autograd[0])
    return tally


def _check_table(table: Callable[[sympy.Symbol], dict[str, sympy.Expr]]) -> Tally:
    """Each estimator of the corollary table follows the exact gradient of its implied divergence."""
    import sympy

    tally = Tally()
    u = divergences.symbol()
    pair = random_pair(4, 2, distance=0.7, seed=5)
    for name, implied in table(u).items():
        # The implied generator need not be convex, so its weight is taken straight from the expression.
        weight = sympy.lambdify(u, sympy.simplify(u * sympy.diff(implied, u) - implied), "torch")
        black_box = expected_gradient(_TABLE_LOSSES[name](), *pair)
        tally.compare(black_box, descent(pair, lambda log_u, w=weight: w(log_u.exp()) + 0.0 * log_u))  # type: ignore[misc]
    return tally


_TABLE_LOSSES: dict[str, Callable[[], Callable[[Rollouts], Tensor]]] = {
    "k1_loss": lambda: estimator("k1_loss"),
    "k2_loss": lambda: estimator("k2_loss"),
    "k3_loss": lambda: estimator("k3_loss"),
    "k1_reward": lambda: estimator("k1_reward"),
    "k3_reward": lambda: estimator("k3_reward"),
    "opd(forward_kl)": lambda: estimator("opd", "forward_kl"),
    "opd(chi2)": lambda: estimator("opd", "chi2"),
}


def corollary_weights(u: sympy.Symbol) -> dict[str, sympy.Expr]:
    """Local weights of the corollary table of T4."""
    import sympy

    log_u = sympy.log(u)
    return {
        "k1_loss": sympy.Integer(1),
        "k2_loss": log_u,
        "k3_loss": u,
        "k1_reward": log_u,
        "k3_reward": log_u - u + 1,
        "opd(forward_kl)": -u * log_u,
        "opd(chi2)": -((u - 1) ** 2),
        "box_cox(1/2)": 2 * (sympy.sqrt(u) - 1),
        "box_cox(2)": (u**2 - 1) / 2,
    }


def corollary_generators(u: sympy.Symbol) -> dict[str, sympy.Expr]:
    """Implied generators of the corollary table of T4, as the table states them."""
    import sympy

    log_u = sympy.log(u)
    return {
        "k1_loss": sympy.Integer(0),
        "k2_loss": u - 1 - log_u,
        "k3_loss": u * log_u - u + 1,
        "k1_reward": -log_u,
        "k3_reward": -log_u - u * log_u + 2 * u - 2,
        "opd(forward_kl)": -u * log_u**2 / 2,
        "opd(chi2)": 2 * u * log_u - u**2 + 1,
    }


def _without_score(u: sympy.Symbol) -> dict[str, sympy.Expr]:
    """The corollary table as it is often believed: each loss descends what its value estimates."""
    import sympy

    return {name: -sympy.log(u) for name in corollary_generators(u)}


def identities() -> list[Identity]:
    """Every identity of T1 to T4 that this module checks."""
    import sympy

    return [
        Identity(
            "T1",
            "OPD+ identity",
            r"\nabla D_f(q\|p) = -E_p[w_f(u)\,s],\quad w_f(u) = u f'(u) - f(u)",
            _check_identity,
            lambda d, log_u: d.weight(log_u),
            {
                "sign of f flipped": lambda d, log_u: d.log_slope(log_u) + d.generator(log_u),
                "u f' dropped (stop-gradient)": lambda d, log_u: -d.generator(log_u),
                "f dropped": lambda d, log_u: d.log_slope(log_u),
            },
        ),
        Identity(
            "T1",
            "oracle's closed forms",
            r"\nabla J = -E_p\left[\textstyle\sum_n A_n s_n\right]\ \text{for token\_local, token\_return, sequence}",
            _check_oracle,
            1.0,
            {"sign flipped": -1.0},
        ),
        Identity(
            "T1",
            "sampled OPD+ is unbiased",
            r"E_p[\hat g_{\mathrm{OPD+}}] = \nabla D_f(q\|p)",
            _check_sampled,
            "opd_plus",
            {"stop-gradient instead": "opd"},
        ),
        Identity(
            "T1b",
            "weights never fall",
            r"dw_f/d\log u = u^2 f''(u) \ge 0",
            _check_non_decreasing,
            1.0,
            {"sign flipped": -1.0},
        ),
        Identity(
            "T1b",
            "weights are conjugates",
            r"w_f(u) = f^*(f'(u)) = \sup_x\,[x f'(u) - f(x)]",
            _check_conjugate,
            lambda d, log_u: d.weight(log_u),
            {"-f (stop-gradient)": lambda d, log_u: -d.generator(log_u), "u f'": lambda d, log_u: d.log_slope(log_u)},
        ),
        Identity(
            "T2",
            "bias of stop-gradient",
            r"g_{sg} = \nabla D_f + E_p[u f'(u)\,s]",
            _check_bias,
            lambda d, log_u: d.log_slope(log_u),
            {
                "no bias": lambda d, log_u: torch.zeros_like(log_u),
                "w_f for u f'": lambda d, log_u: d.weight(log_u),
                "sign flipped": lambda d, log_u: -d.log_slope(log_u),
            },
        ),
        Identity(
            "T2",
            "bias of the frozen value",
            r"\nabla_\theta\left(E_{p_\theta}[f(u_{\theta_0})] - D_f(\theta)\right) = E_p[u f'(u)\,s]",
            _check_value_bias,
            lambda d, log_u: d.log_slope(log_u),
            {"no bias": lambda d, log_u: torch.zeros_like(log_u)},
        ),
        Identity(
            "T2",
            "unbiased only for the reverse KL",
            r"\text{bias} = 0\ \forall p, q \iff u f'(u) = \text{const}",
            _check_unbiased_iff,
            _constant_slope,
            {
                "unbiased for every f": lambda d: True,
                "unbiased for none": lambda d: False,
                "unbiased if f'(1) = 0": lambda d: abs(float(d.log_slope(torch.zeros(1, dtype=torch.float64)))) < 1e-12,
            },
        ),
        Identity(
            "T3",
            "the gauge leaves the value",
            r"D_{f + c(u-1)} = D_f",
            _check_gauge_value,
            torch.expm1,
            {"c u for c (u - 1)": torch.exp, "c log u for c (u - 1)": lambda log_u: log_u},
        ),
        Identity(
            "T3",
            "the gauge moves stop-gradient",
            r"g_{sg}[f + c(u-1)] - g_{sg}[f] = -c\,\nabla KL(q\|p)",
            _check_gauge_direction,
            "forward_kl",
            {"the reverse KL instead": "reverse_kl"},
        ),
        Identity(
            "T3",
            "the gauge is a free control variate",
            r"E\left[\textstyle\sum_n (w_f + c - \sum_{m>n}(f + c(u_m - 1)))\,s_n\right]\ \text{does not depend on } c",
            _check_gauge_return,
            torch.expm1,
            {"c log u for c (u - 1)": lambda log_u: log_u},
        ),
        Identity(
            "T3",
            "optimal control variate",
            r"c^* = -\mathrm{Cov}(f(u), u - 1)/\mathrm{Var}(u)",
            _check_control_variate,
            -1.0,
            {"sign flipped": 1.0, "no control variate": 0.0},
        ),
        Identity(
            "T4",
            "implied generator",
            r"V[w](u) = u\int_1^u w(t)\,t^{-2}dt,\quad w_{V[w]} = w + \text{const}",
            _check_implied,
            lambda f, u: u * sympy.diff(f, u) - f,
            {"f' dropped": lambda f, u: -f, "sign of f flipped": lambda f, u: u * sympy.diff(f, u) + f},
        ),
        Identity(
            "T4",
            "round trip",
            r"V[w_f] = f \ \text{up to}\ c(u-1)",
            _check_round_trip,
            lambda u: u - 1,
            {"no gauge term": lambda u: sympy.Integer(0)},
        ),
        Identity(
            "T4",
            "genuine exactly if monotone",
            r"V[w]'' = w'/u,\quad V[w]\ \text{convex} \iff w\ \text{non-decreasing}",
            _check_convexity,
            _never_falls,
            {"always genuine": lambda weight, u: True, "never genuine": lambda weight, u: False},
        ),
        Identity(
            "T4",
            "beyond the ratio",
            r"A = q^\alpha - p^\alpha:\quad \nabla\textstyle\sum_a H(p_a, q_a) = -E_p[A\,s],\ \partial_p H = -A",
            _check_bregman,
            lambda p, q, alpha: q**alpha - p**alpha,
            {
                "sign flipped": lambda p, q, alpha: p**alpha - q**alpha,
                "of the ratio alone": lambda p, q, alpha: (q / p) ** alpha - 1,
            },
        ),
        Identity(
            "T4",
            "corollary table",
            r"\text{each loss follows}\ \nabla D_{V[w]}\ \text{of its local weight}",
            _check_table,
            corollary_generators,
            {"what their values estimate": _without_score},
        ),
    ]
