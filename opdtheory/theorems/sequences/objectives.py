"""T6a to T6f: the weight of a token when the objective is a sum over tokens or a divergence of whole sequences."""

from __future__ import annotations

import operator
from fractions import Fraction

import sympy

from opdtheory.theorems.instances.trees import product
from opdtheory.theorems.instances.two_steps import two_steps
from opdtheory.theorems.sequences import checks
from opdtheory.theorems.sequences.checks import ratio_before, return_weight
from opdtheory.theorems.theorem import Identity, Step, Theorem

__all__ = ["theorems"]

ONE = Fraction(1)


def theorems() -> list[Theorem]:
    """T6a to T6f."""
    return [_weights(), _gap(), _chain_rule(), _forward(), _ends(), _environment()]


def _weights() -> Theorem:
    return Theorem(
        number="T6a",
        name="weights of a sum over tokens and of a whole sequence",
        statement=r"\nabla E_p\sum_n\gamma^{n-1}f(u_n) = "
        r"-E_p\sum_n \gamma^{n-1}\Big[w_f(u_n) - \sum_{m>n}\gamma^{m-n}f(u_m)\Big]s_n,"
        r"\qquad \nabla D_f(Q\|P) = -E_p\sum_n w_f(U)\,s_n,\ U = \prod_n u_n",
        hypotheses=("f differentiable, f(1) = 0", "p_θ differentiable and positive where q is", "0 ≤ γ ≤ 1"),
        source="derived here from T1 and the policy-gradient theorem",
        advice="Choose the objective first, then its weight: a student that cannot match the teacher has a different "
        "minimiser under each.",
        derivation=(
            Step(
                r"E_p[s_n \mid h_n] = 0",
                "a row sums to one, so a reward already earned is multiplied by a score of mean zero",
                _step_score,
            ),
            Step(
                r"\nabla E_p[f(u_1) + \gamma f(u_2)] = -E_p[(w_1 - \gamma f(u_2))\,s_1 + \gamma w_2\,s_2]",
                "T1 for the token itself, the score function for later tokens; f and the distributions undefined",
                _step_return,
            ),
            Step(r"\nabla E_p f(U) = -E_p[w_f(U)(s_1 + s_2)]", "T1 with a sequence as the atom", _step_sequence),
        ),
        identities=(
            Identity(
                "discounted sum",
                r"A_n = \gamma^{n-1}[w_f(u_n) - \sum_{m>n}\gamma^{m-n}f(u_m)],\ f \text{ free}",
                checks.check_return_weight,
                return_weight,
                {
                    "sign of later rewards flipped": lambda gamma: return_weight(gamma, sign=1),
                    "later rewards dropped": lambda gamma: return_weight(gamma, keep=False),
                    "its own f counted among the later rewards": lambda gamma: return_weight(gamma, start=0),
                    "outer discount dropped": lambda gamma: return_weight(gamma, outer=False),
                },
                "exact",
            ),
            Identity(
                "whole sequence",
                r"A_n = w_f(U),\ f \text{ free}",
                checks.check_sequence_weight,
                lambda t, y, us, n: product(us).weight(),
                {
                    "the token's own ratio": lambda t, y, us, n: us[n].weight(),
                    "-f(U) (stop-gradient)": lambda t, y, us, n: product(us).f().scaled(-ONE),
                    "the ratio up to the token": lambda t, y, us, n: product(us[: n + 1]).weight(),
                    "the ratio from the token on": lambda t, y, us, n: product(us[n:]).weight(),
                },
                "exact",
            ),
            Identity(
                "losses as black boxes",
                r"E_p[\hat g] = \nabla J \text{ for both objectives}",
                checks.check_estimators,
                {},
                {
                    "outer discount dropped": {"token_return": ("return_to_go", {"gamma": 0.6})},
                    "undiscounted": {"token_return": ("return_to_go", {"gamma": 1.0})},
                    "per-token weight for the sequence": {"sequence": ("opd_plus", {})},
                },
            ),
        ),
    )


def _gap() -> Theorem:
    twins = {"sign flipped": (-1, 1), "the token's own reward included": (1, 0)}
    return Theorem(
        number="T6b",
        name="what the per-token weight leaves out",
        statement=r"\nabla E_p\sum_n f(u_n) - g_{\gamma=0} = E_p\Big[\sum_n s_n\sum_{m>n}f(u_m)\Big],\quad "
        r"g_{\gamma=0} = -E_p\sum_n w_f(u_n)\,s_n",
        hypotheses=("as T6a, γ = 1",),
        source="derived here; the estimator is that of OPD+, arXiv 2606.01039",
        advice="The per-token estimator ignores that a token changes which histories follow. If that matters, add the "
        "return-to-go -Σ_{m>n} f(u_m) to the weight, at the price of its variance.",
        derivation=(
            Step(
                r"\nabla E_p[f(u_1) + f(u_2)] + E_p[w_1 s_1 + w_2 s_2] = E_p[s_1 f(u_2)]",
                "T6a at γ = 1 minus its own first terms",
                _step_gap,
            ),
        ),
        identities=(
            Identity(
                "gap",
                r"\nabla J_{\mathrm{return}} - g_{\gamma=0} = E[\textstyle\sum_n s_n\sum_{m>n}f(u_m)],\ f \text{ free}",
                checks.check_gap,
                (1, 1),
                twins,
                "exact",
            ),
            Identity(
                "gap of the sampled losses",
                r"\nabla J_{\mathrm{return}} - E[\hat g_{\mathrm{OPD+}}] = E[\textstyle\sum_n s_n\sum_{m>n}f(u_m)]",
                checks.check_gap_sampled,
                (1, 1),
                twins,
            ),
        ),
    )


def _chain_rule() -> Theorem:
    claim = ("reverse_kl", ONE)
    twins = {"forward KL": ("forward_kl", ONE), "JSD": ("jsd", ONE), "discounted": ("reverse_kl", Fraction(1, 2))}
    return Theorem(
        number="T6c",
        name="chain rule of the reverse KL",
        statement=r"KL(P\|Q) = -E_P\sum_n\log u_n: \text{ token\_return at } \gamma = 1 \text{ is sequence}",
        hypotheses=("f = -log u", "γ = 1"),
        source="the chain rule of the relative entropy",
        advice="For the reverse KL the undiscounted return-to-go trains the whole sequence's divergence.",
        derivation=(
            Step(
                r"w_f(U) - \Big[w_f(u_n) - \sum_{m>n}f(u_m)\Big] = \sum_{m<n}\log u_m",
                "log U is a sum; the history determines the difference, so it is a baseline (T6a, first step)",
                _step_log,
            ),
        ),
        identities=(
            Identity(
                "values and gradients",
                r"J_{\mathrm{return}} = J_{\mathrm{sequence}}, \text{ and so are their gradients}",
                checks.check_chain_rule,
                claim,
                twins,
                "rigorous",
                1e-40,
            ),
            Identity(
                "sixty tokens",
                r"\text{the same by two dynamic programmes along a chain}",
                checks.check_long_chains,
                claim,
                {k: v for k, v in twins.items() if k != "JSD"},  # the JSD of a sequence does not factor
            ),
        ),
    )


def _forward() -> Theorem:
    return Theorem(
        number="T6d",
        name="forward KL on the student's own prefixes",
        statement=r"KL(Q\|P) = \sum_n E_P[U_{<n}\,KL(q\|p)(h_n)],\quad \nabla KL(Q\|P) = -E_P\sum_n U_{<n}u_n s_n = "
        r"\sum_h Q(h)(p-q)(h)",
        hypotheses=("f = u log u", "p positive where q is"),
        source="derived here; the second form is supervised distillation on the teacher's texts",
        advice="Forward KL on student rollouts is not the objective of distillation on teacher rollouts. Weighting "
        "prefixes by U_{<n} turns one into the other, at a variance that grows with the length.",
        derivation=(
            Step(
                r"E_P[U\log U] = E_P[u_1\log u_1 + u_1\,u_2\log u_2]",
                "the chain rule under Q, and E_Q = E_P U",
                _step_forward,
            ),
            Step(
                r"E_P[U\,s_1] = E_P[u_1 s_1]",
                "w_f(U) = U + const, and E[u_m | h_m] = 1 for every later token",
                _step_forward_weight,
            ),
        ),
        identities=(
            Identity(
                "gradient",
                r"-E_P\textstyle\sum_n U_{<n}u_n s_n = \sum_h Q(h)(p-q)(h)",
                checks.check_prefix_weight,
                lambda t, y, us, n: ratio_before(us, n) * us[n],
                {
                    "prefixes of the student (token_local)": lambda t, y, us, n: us[n],
                    "u_n dropped": lambda t, y, us, n: ratio_before(us, n),
                },
                "exact",
            ),
            Identity(
                "whole ratio",
                r"-E_P[U S] = \sum_h Q(h)(p-q)(h)",
                checks.check_prefix_weight,
                lambda t, y, us, n: product(us),
                {"the ratio from the token on": lambda t, y, us, n: product(us[n:])},
                "exact",
            ),
            Identity(
                "value",
                r"KL(Q\|P) = \sum_n E_P[U_{<n}\,KL(q\|p)(h_n)]",
                checks.check_prefix_value,
                1,
                {"prefixes of the student (token_local)": 0, "U squared": 2},
                "rigorous",
                1e-40,
            ),
            Identity(
                "weighted loss as a black box",
                r"E[\hat g] = \nabla KL(Q\|P) \text{ for } A_n = U_{<n}u_n",
                checks.check_prefix_loss,
                1,
                {"prefixes of the student (token_local)": 0, "U squared": 2},
            ),
        ),
    )


def _ends() -> Theorem:
    return Theorem(
        number="T6e",
        name="end of sequence and length cap",
        statement=r"\text{T6a with sums over } n \le L: \text{ after the end } u = 1,\ s = 0,\ f(1) = 0; "
        r"\text{ the end token itself counts, and so does a rollout cut at the cap}",
        hypotheses=(
            "a sequence ends after its EOS token or at T tokens; the same cap applies to both models",
            "f(1) = 0",
        ),
        source="derived here",
        advice="Mask what follows EOS, keep EOS, and keep truncated rollouts: dropping them conditions on the outcome.",
        derivation=(
            Step(
                r"\nabla E_P f(U) = -E_P[w_f(U)\textstyle\sum_{n \le L} s_n]",
                "a first token that may end the sequence; f and the distributions undefined",
                lambda: _step_sequence(ends=True),
            ),
        ),
        identities=(
            Identity(
                "variable length",
                r"A_n \text{ as in T6a for } n \le L,\ f \text{ free}",
                checks.check_endings,
                {},
                {"EOS token not scored": {"end": "unscored"}, "truncated rollouts dropped": {"cap": "dropped"}},
                "exact",
            ),
            Identity(
                "padding",
                r"E[\hat g] = \nabla J \text{ with padding masked}",
                checks.check_padding,
                True,
                {"padding counted": False},
            ),
            Identity(
                "longer caps",
                r"D_f(Q_{\le T}\|P_{\le T}) \le D_f(Q_{\le T+1}\|P_{\le T+1})",
                checks.check_cap,
                operator.le,
                {"reversed": operator.ge},
            ),
        ),
    )


def _environment() -> Theorem:
    return Theorem(
        number="T6f",
        name="tokens of an environment",
        statement=r"P = \prod p\prod\kappa,\ Q = \prod q\prod\kappa: \text{ its tokens have } u = 1,\ s = 0: "
        r"\text{ each is in the history and nowhere else}",
        hypotheses=(
            "the environment's distribution κ(e|h) does not depend on θ",
            "both models meet the same environment",
        ),
        source="derived here",
        advice="Mask tool results out of the score and out of the reward; the models' probabilities of them do not "
        "count.",
        derivation=(
            Step(
                r"\nabla E_P f(U) = -E_P[w_f(U)(s_1 + s_3)],\quad U = u_1 u_3",
                "three tokens, the second drawn from κ(.|y_1): κ cancels in U and has no score; f and the "
                "distributions undefined",
                lambda: _step_sequence(environment=True),
            ),
        ),
        identities=(
            Identity(
                "neither score nor reward",
                r"A_n = w_f(u_n) - \sum_{m>n}f(u_m),\ A_n = w_f(U) \text{ over the student's tokens},\ f \text{ free}",
                checks.check_environment,
                {},
                {
                    "scored": {"scored": True},
                    "rewarded": {"rewarded": True},
                    "scored and rewarded": {"scored": True, "rewarded": True},
                },
                "exact",
            ),
            Identity(
                "masked losses as black boxes",
                r"E[\hat g] = \nabla J \text{ with the environment's tokens masked}",
                checks.check_environment_sampled,
                True,
                {"not masked": False},
            ),
        ),
    )


# The derivations, with f and the distributions undefined.


def _step_score() -> bool:
    tree = two_steps()
    p = tree.sequences[0][0][1]
    return sympy.simplify(p * tree.score(p) + (1 - p) * tree.score(1 - p)) == 0


def _step_return() -> bool:
    t, gamma = two_steps(), sympy.Symbol("gamma", positive=True)
    value = t.expect(lambda p, u: t.f(u[0]) + gamma * t.f(u[1]))
    weighed = t.expect(lambda p, u: (t.w(u[0]) - gamma * t.f(u[1])) * t.score(p[0]) + gamma * t.w(u[1]) * t.score(p[1]))
    return t.zero(sympy.diff(value, t.theta) + weighed)


def _step_sequence(ends: bool = False, environment: bool = False) -> bool:
    t = two_steps(ends, environment)
    value = t.expect(lambda p, u: t.f(sympy.Mul(*u)))
    own = (lambda p: [p[0], p[2]]) if environment else list
    weighed = t.expect(lambda p, u: t.w(sympy.Mul(*u)) * sum(t.score(x) for x in own(p)))
    return t.zero(sympy.diff(value, t.theta) + weighed)


def _step_gap() -> bool:
    t = two_steps()
    value = t.expect(lambda p, u: t.f(u[0]) + t.f(u[1]))
    local = t.expect(lambda p, u: t.w(u[0]) * t.score(p[0]) + t.w(u[1]) * t.score(p[1]))
    gap = t.expect(lambda p, u: t.score(p[0]) * t.f(u[1]))
    return t.zero(sympy.diff(value, t.theta) + local - gap)


def _step_log() -> bool:
    x, y = sympy.symbols("x y", positive=True)

    def f(u: sympy.Expr) -> sympy.Expr:
        return -sympy.log(u)

    def w(u: sympy.Expr) -> sympy.Expr:
        return -1 - f(u)

    # The weights agree on the first token and differ by log x on the second, whose history determines x.
    gaps = [sympy.expand_log(w(x * y) - each) for each in (w(x) - f(y), w(y))]
    return gaps == [0, sympy.log(x)]


def _step_forward() -> bool:
    t = two_steps()
    value = t.expect(lambda p, u: u[0] * u[1] * sympy.log(u[0] * u[1]))
    rows = t.expect(lambda p, u: u[0] * sympy.log(u[0]) + u[0] * (u[1] * sympy.log(u[1])))
    return sympy.simplify(sympy.expand_log(value - rows, force=True)) == 0


def _step_forward_weight() -> bool:
    """The second token's ratio has mean one, which leaves $u_1$ of $U$ on the first token."""
    t = two_steps()
    gap = t.expect(lambda p, u: u[0] * u[1] * t.score(p[0])) - t.expect(lambda p, u: u[0] * t.score(p[0]))
    return sympy.simplify(gap) == 0
