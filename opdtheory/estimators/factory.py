r"""The entry point: `estimator(name, divergence, **options)` composes a loss from its parts and derives its claim."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from opdtheory.choices import REDUCTIONS, Baseline, Importance, Reduction, Support
from opdtheory.divergences import Divergence, symbol
from opdtheory.divergences import divergence as divergence_of
from opdtheory.errors import InvalidArgumentError
from opdtheory.estimators.base import Claim, Estimator, TokenLoss
from opdtheory.estimators.claims import claim_of, divided_by_length
from opdtheory.estimators.options import (
    Build,
    Entry,
    Formula,
    Options,
    check_applicable,
    check_on_policy,
    checked,
    choice,
    nearest,
)
from opdtheory.estimators.sampled import (
    BoxCox,
    CentredWeight,
    Differentiated,
    LogRatioFunction,
    PowerAdvantage,
    RatioAdvantage,
    ReturnToGo,
    ScoreFunction,
    SequenceWeight,
    StopGradientReward,
    k1,
    k1_reward,
    k2,
    k2_reward,
    k3,
    k3_reward,
)
from opdtheory.estimators.vocabulary import SampledTail, TopK, TopKReward, VocabularyLoss

if TYPE_CHECKING:
    import sympy

__all__ = ["ENTRIES", "estimator", "estimator_names", "examples", "formula_of"]

_SCORE = frozenset(
    {"baseline", "baseline_value", "zscore", "eps", "importance", "clip_range", "keep_range", "clip_weight"}
)
_RATIO = _SCORE | {"clip_log_ratio"}
_TOP = frozenset({"importance", "k", "support"})
_GROUP_BASELINES = ("constant", "group_mean", "leave_one_out")
_RATIOS = ("importance", "clip_range", "keep_range")
_MODIFIERS = ("clip_weight", "baseline", "baseline_value", "zscore", "eps", *_RATIOS)


def _score(advantage: Callable[..., Any], o: Options) -> ScoreFunction:
    return ScoreFunction(advantage, **_given(o, _MODIFIERS))


def _given(o: Options, keys: Iterable[str]) -> Options:
    return {key: o[key] for key in keys if key in o}


def _ratio(function: Callable[[Divergence, Options], Callable[..., Any]]) -> Build:
    return lambda d, o: _score(RatioAdvantage(function(d, o), o.get("clip_log_ratio")), o)


def _loss(function: LogRatioFunction, formula: Formula, descends: str | None = None) -> Entry:
    """A differentiated function of the log-ratio, for the reverse KL."""
    return Entry(
        lambda d, o: Differentiated(function, o.get("clip_log_ratio"), **_given(o, _RATIOS)),
        frozenset({*_RATIOS, "clip_log_ratio"}),
        "T4",
        "reverse_kl",
        descends=descends,
        importance=tuple(kind for kind in get_args(Importance) if kind != "ppo"),
        formula=formula,
    )


def _reward(function: LogRatioFunction, formula: Formula, descends: str | None = None) -> Entry:
    """A function of the log-ratio as a detached reward, for the reverse KL."""
    return Entry(_ratio(lambda d, o: function), _RATIO, "T4", "reverse_kl", descends=descends, formula=formula)


def _top_k(form: Literal["truncated", "renormalised", "tail"], o: Options) -> TopK:
    return TopK(o["k"], form, o.get("support", "teacher"))


def _top_entry(form: Literal["truncated", "renormalised", "tail"], theorem: str) -> Entry:
    return Entry(
        lambda d, o: VocabularyLoss(d, _top_k(form, o), o.get("importance")),
        _TOP,
        theorem,
        required=("k",),
        importance=("prefix",),
        examples=_TOP_TWO,
    )


def _of(*names: str) -> tuple[Options, ...]:
    return tuple({"divergence": name} for name in names)


def _box_cox_weight(sympy: Any, f: sympy.Expr, u: sympy.Symbol, o: Options) -> sympy.Expr:
    order = sympy.Rational(str(o["alpha"]))
    return (u**order - 1) / order if order else sympy.log(u)


_TOP_TWO: tuple[Options, ...] = ({"divergence": "reverse_kl", "k": 2},)
_WHOLE_ROLLOUT = ("sequence", "ppo", "sequence_mask", "gspo")
_TAIL = ("k", "support", "baseline", "baseline_value", "importance")
ENTRIES: dict[str, Entry] = {
    "opd": Entry(
        _ratio(lambda d, o: StopGradientReward(d)),
        _RATIO,
        "T2",
        examples=_of("reverse_kl", "forward_kl", "jsd", "chi2"),
        formula=lambda sympy, f, u, o: -f,
    ),
    "opd_plus": Entry(
        _ratio(lambda d, o: d.weight),
        _RATIO,
        "T1",
        examples=_of("reverse_kl", "forward_kl", "jsd", "chi2", "skew_jsd(beta=0.1)", "alpha(alpha=0.5)"),
        formula=lambda sympy, f, u, o: u * f.diff(u) - f,
    ),
    "opd_plus_centred": Entry(_ratio(lambda d, o: CentredWeight(d)), _RATIO, "T1, T7a", examples=_of("forward_kl")),
    "k1_loss": _loss(k1, lambda sympy, f, u, o: 0 * u),
    "k2_loss": _loss(k2, lambda sympy, f, u, o: sympy.log(u)),
    "k3_loss": _loss(k3, lambda sympy, f, u, o: u, "forward_kl"),
    "k1_reward": _reward(k1_reward, lambda sympy, f, u, o: sympy.log(u)),
    "k2_reward": _reward(k2_reward, lambda sympy, f, u, o: -(sympy.log(u) ** 2) / 2),
    "k3_reward": _reward(k3_reward, lambda sympy, f, u, o: sympy.log(u) - u + 1, "the reverse KL minus the forward KL"),
    "box_cox": Entry(
        _ratio(lambda d, o: BoxCox(o["alpha"])),
        _RATIO | {"alpha"},
        "T4",
        "alpha",
        ("alpha",),
        examples=({"alpha": 0.5},),
        formula=_box_cox_weight,
    ),
    "power": Entry(
        lambda d, o: _score(PowerAdvantage(o["alpha"]), o),
        _SCORE | {"alpha"},
        "T4",
        "reverse_kl",
        ("alpha",),
        descends="a density-power (Bregman) divergence",
        examples=({"alpha": 0.5},),
    ),
    # No clip_log_ratio: it does not change a sign.
    "sign": Entry(
        _ratio(lambda d, o: torch.sign),
        _SCORE,
        "T4",
        "total_variation",
        formula=lambda sympy, f, u, o: sympy.sign(u - 1),
    ),
    "return_to_go": Entry(
        lambda d, o: _score(ReturnToGo(d, o["gamma"], o.get("discounted", False), o.get("clip_log_ratio")), o),
        _RATIO | {"gamma", "discounted"},
        "T6",
        required=("gamma",),
        importance=_WHOLE_ROLLOUT,
        baseline=_GROUP_BASELINES,
        examples=(
            *({"divergence": "jsd", "gamma": gamma} for gamma in (0.0, 1.0, 0.5)),
            {"divergence": "jsd", "gamma": 0.5, "discounted": True},
        ),
    ),
    "sequence_opd_plus": Entry(
        lambda d, o: _score(SequenceWeight(d, o.get("clip_log_ratio")), o),
        _RATIO,
        "T6",
        importance=_WHOLE_ROLLOUT,
        baseline=_GROUP_BASELINES,
        examples=_of("hellinger"),
    ),
    "full_vocab": Entry(
        lambda d, o: VocabularyLoss(d, None, o.get("importance")),
        frozenset({"importance"}),
        "T12",
        importance=("prefix",),
        examples=({"divergence": "jsd"}, {"divergence": "jsd", "importance": "prefix"}),
    ),
    "topk_truncated": _top_entry("truncated", "T9"),
    "topk_renormalised": _top_entry("renormalised", "T9c"),
    "topk_tail": _top_entry("tail", "T9d"),
    "topk_tail_sampled": Entry(
        lambda d, o: SampledTail(d, **_given(o, _TAIL)),
        frozenset(_TAIL),
        "T13",
        required=("k",),
        importance=("token", "prefix"),
        baseline=("constant", "optimal", "rest"),
        examples=(
            {"divergence": "forward_kl", "k": 2},
            {"divergence": "jsd", "k": 1, "baseline": "optimal"},
            {"divergence": "hellinger", "k": 1, "baseline": "rest"},
            {"divergence": "chi2", "k": 2, "support": "student", "importance": "prefix"},
        ),
    ),
    "topk_reward": Entry(
        lambda d, o: _score(TopKReward(d, _top_k("truncated", o)), o),
        _SCORE | {"k", "support"},
        "T9e",
        required=("k",),
        baseline=_GROUP_BASELINES,
        examples=_TOP_TWO,
    ),
}


def estimator_names() -> tuple[str, ...]:
    """The names that `estimator` accepts."""
    return tuple(ENTRIES)


def examples() -> Iterator[Estimator]:
    """Every named estimator, with the options of each example in its entry."""
    for name, entry in ENTRIES.items():
        for options in entry.examples:
            yield estimator(name, **options)


def formula_of(name: str, divergence: Divergence, options: Mapping[str, Any]) -> sympy.Expr | None:
    """The local weight of a named estimator as a formula in `u`, without clips; None if its entry has none."""
    import sympy

    formula = ENTRIES[name].formula if name in ENTRIES else None
    return None if formula is None else formula(sympy, divergence.expr, symbol(), dict(options))


def estimator(
    name: str,
    divergence: str | Divergence | None = None,
    *,
    reduction: Reduction = "token_sum",
    baseline: Baseline | None = None,
    baseline_value: float | None = None,
    zscore: bool = False,
    eps: float | None = None,
    importance: Importance | None = None,
    clip_range: float | None = None,
    keep_range: tuple[float, float] | None = None,
    clip_log_ratio: float | None = None,
    clip_weight: tuple[float, float] | None = None,
    gamma: float | None = None,
    discounted: bool = False,
    alpha: float | None = None,
    k: int | None = None,
    support: Support | None = None,
    **unknown: object,
) -> Estimator:
    r"""An estimator of the distillation gradient by name: a callable `loss(rollouts)` with a claim.

    Every estimator of the sampled token descends $-\sum_n A_n s_n$ with $s_n = \nabla\log p(y_n|h_n)$ and
    $u_n = q(y_n|h_n)/p(y_n|h_n)$:

    | name | advantage $A_n$, or loss | divergence |
    |---|---|---|
    | `opd` | $-f(u_n)$ | any |
    | `opd_plus` | $w_f(u_n) = u_n f'(u_n) - f(u_n)$ | any |
    | `opd_plus_centred` | $w_f(u_n) - w_f(1)$ | any |
    | `sequence_opd_plus` | $w_f(\prod_m u_m)$ | any |
    | `return_to_go` | $w_f(u_n) - \sum_{m>n} \gamma^{m-n} f(u_m)$; `discounted`: times $\gamma^{n-1}$ | any |
    | `k1_reward` `k2_reward` `k3_reward` | $-k_i(u_n)$, detached | reverse KL |
    | `k1_loss` `k2_loss` `k3_loss` | loss $k_i(u_n)$, differentiated | reverse KL |
    | `box_cox` | $(u_n^\alpha - 1)/\alpha$ | alpha |
    | `power` | $q^\alpha - p^\alpha$ | reverse KL |
    | `sign` | $\mathrm{sign}(\log u_n)$ | total variation |
    | `full_vocab` | loss $\sum_a p_a f(q_a/p_a)$ | any |
    | `topk_truncated` `topk_renormalised` `topk_tail` | the same on `k` tokens | any |
    | `topk_tail_sampled` | loss $\sum_S p f(q/p)$; where $y_n \notin S$, the advantage $w_f(u_n)$ | any |
    | `topk_reward` | $-\sum_{S} p f(q/p)$, detached | any |

    Args:
        name: one of `estimator_names()`.
        divergence: a catalogue name or a `Divergence`, if the table says "any".
        reduction: `token_sum` (the objectives of the theory), `token_mean` or `sequence_mean` (T11).
        baseline: `constant` (with `baseline_value`), `group_mean`, `leave_one_out`, `vocabulary` or `optimal` (T7;
            these two take the teacher's whole distribution), or `rest` of `topk_tail_sampled`, which the top tokens
            suffice for (T19b).
        baseline_value: the constant, in the unit of the advantage.
        zscore: whether to centre and scale by the group's standard deviation plus `eps`, instead of a baseline.
        eps: added to the standard deviation (default: 1e-6).
        importance: weight by $\rho = p/\mu$ of the `token`, of the `prefix` up to it or of the whole `sequence`, or
            `ppo` for the clipped surrogate (T8). Exact only if $\mu$ gives probability to everything that $p$ does.
            `tis` truncates the token's ratio, `mask` drops tokens by it, `sequence_mask` drops rollouts by theirs, and
            `gspo` takes the rollout's geometric mean (T14): exact on-policy only, and off-policy the teacher stays a
            fixed point of `opd_plus_centred` only.
        clip_range: clip range of `ppo` (default: 0.2), or the largest ratio of `tis` (default: 2).
        keep_range: ends of the range of ratios that `mask` and `sequence_mask` keep (default: 0.5 and 5).
        clip_log_ratio: bound $C$; $\log u$ is clamped to $[-C, C]$ nats first.
        clip_weight: interval to which the advantage is clamped, before the baseline.
        gamma: discount of `return_to_go`, in [0, 1].
        discounted: whether `return_to_go` has the outer $\gamma^{n-1}$ that makes it exact.
        alpha: order of `box_cox`, or positive power of `power`.
        k: number of tokens.
        support: which of the two ranks the `k` likeliest tokens, `teacher` or `student` (default: `teacher`).
        **unknown: any other option, which raises an error.

    Raises:
        InvalidArgumentError: the name or an option is unknown, an option does not apply to this estimator or is
            missing, or a value is out of range.

    References:
        OPD+ 2606.01039; GRPO 2402.03300; PPO 1707.06347; PowerOPD 2606.17199; Schulman, *Approximating KL divergence*.

    Example:
        >>> loss = estimator("opd", "forward_kl", baseline="leave_one_out")
        >>> loss
        estimator('opd', 'forward_kl', baseline='leave_one_out')
        >>> loss.claim.verdict
        'biased'
    """
    entry = ENTRIES[choice("name", name, ENTRIES)]
    given: Options = {
        "baseline": baseline,
        "baseline_value": baseline_value,
        "zscore": None if zscore is False else zscore,
        "eps": eps,
        "importance": importance,
        "clip_range": clip_range,
        "keep_range": keep_range,
        "clip_log_ratio": clip_log_ratio,
        "clip_weight": clip_weight,
        "gamma": gamma,
        "discounted": None if discounted is False else discounted,
        "alpha": alpha,
        "k": k,
        "support": support,
    }
    for option in unknown:
        raise InvalidArgumentError(option, f"is not an option of estimator(){nearest(option, ('reduction', *given))}")
    choice("reduction", reduction, REDUCTIONS)
    options = {key: value for key, value in given.items() if value is not None}
    check_applicable(name, entry, options)
    options = {key: checked(name, key, value) for key, value in options.items()}
    check_on_policy(options)
    nominal = _nominal(name, entry, divergence, options)
    loss = entry.build(nominal, options)
    shown = {"divergence": nominal.label} if entry.nominal is None else {}
    shown |= {} if reduction == "token_sum" else {"reduction": reduction}
    return Estimator(
        name=name,
        claim=_claim(entry, loss, nominal, reduction, options),
        token_loss=loss,
        reduction=reduction,
        options=tuple({**shown, **options}.items()),
    )


def _claim(entry: Entry, loss: TokenLoss, nominal: Divergence, reduction: str, options: Options) -> Claim:
    if entry.claim is not None:
        return divided_by_length(entry.claim(nominal, options), reduction)
    return claim_of(loss, nominal, reduction, entry.theorem, entry.descends)


def _nominal(name: str, entry: Entry, divergence: str | Divergence | None, options: Options) -> Divergence:
    if entry.nominal is None:
        if divergence is None:
            raise InvalidArgumentError("divergence", f"must be given for estimator {name!r}, such as 'reverse_kl'")
        return divergence_of(divergence)
    if divergence is not None:
        raise InvalidArgumentError("divergence", f"does not apply to estimator {name!r}, which is for {entry.nominal}")
    return divergence_of("alpha", alpha=options["alpha"]) if entry.nominal == "alpha" else divergence_of(entry.nominal)
