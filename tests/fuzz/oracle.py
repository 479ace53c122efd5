"""Calls of the policies and of the oracle, beside sums over spelled-out sequences."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

import opdtheory as opd
from opdtheory.exact import enumerated_value
from tests.fuzz.calls import Call, Parts, chosen
from tests.fuzz.corruptions import JUNK, rearranged

__all__ = ["automata", "objectives", "policies"]

_NAMES = ("reverse_kl", "forward_kl", "jsd", "chi2", "hellinger")
_GAMMAS = (-0.1, 1.5, float("nan"), float("inf"), "1", None)


def _levels(rng: random.Random, size: int, horizon: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    return [torch.randn(size**n, size, generator=generator, dtype=torch.float64) for n in range(horizon)]


def _wrong_level(rng: random.Random, level: Tensor) -> Any:
    spoilt = level.clone()
    spoilt[0, 0] = chosen(rng, torch.nan, torch.inf)
    nothing = torch.full_like(level, -torch.inf)
    junk = (value for value in JUNK if not hasattr(value, "shape"))
    return chosen(rng, spoilt, nothing, level.float(), level.long(), level[..., :0], level.unsqueeze(0), *junk)


def policies(rng: random.Random) -> Call:
    """`TabularPolicy`: its logits come back as they were, or what is wrong is named."""
    size, horizon = chosen(rng, 1, 2, 3), chosen(rng, 1, 2, 3)
    levels: Any = [rearranged(rng, level) for level in _levels(rng, size, horizon)]
    arguments: dict[str, Any] = {"logits": levels, "eos": chosen(rng, None, 0, size - 1), "environment": ()}
    bad: set[str] = set()
    if rng.random() < 0.6:
        name = chosen(rng, *arguments)
        bad.add(name)
        if name == "logits":
            where = rng.randrange(horizon)
            levels[where] = _wrong_level(rng, levels[where])
            if rng.random() < 0.2:
                arguments[name] = chosen(rng, [], (), None, 3, "x")
        elif name == "eos":
            arguments[name] = chosen(rng, -1, size, 1.5, "0", True, [0])
        else:
            arguments[name] = chosen(rng, (horizon,), (-1,), (0.5,), ("0",), 3, (True,))

    def run() -> Parts:
        return list(opd.TabularPolicy(**arguments).logits)

    return Call("TabularPolicy", arguments, run, lambda: list(levels), bad)


def objectives(rng: random.Random) -> Call:
    """`exact_value`, `exact_gradient` and `expected_gradient`, by the definition of the objective."""
    size, horizon = chosen(rng, 2, 3), chosen(rng, 1, 2)
    eos = chosen(rng, None, 0)
    student, teacher = (opd.TabularPolicy(_levels(rng, size, horizon), eos=eos) for _ in range(2))
    what = chosen(rng, "exact_value", "exact_gradient", "expected_gradient")
    objective = "token_local" if what == "expected_gradient" else chosen(rng, "token_local", "token_return", "sequence")
    name = chosen(rng, *_NAMES)
    gamma = chosen(rng, 1.0, 0.0, 0.6) if objective == "token_return" else 1.0
    arguments: dict[str, Any] = {"student": student, "teacher": teacher}
    if what == "expected_gradient":
        arguments = {"loss": opd.estimator("opd_plus", name), **arguments, "batch_size": chosen(rng, 1, 2)}
    else:
        arguments |= {"divergence": name, "objective": objective, "gamma": gamma}
    bad: set[str] = set()
    if rng.random() < 0.5:
        wrong = chosen(rng, *arguments)
        bad |= {wrong}
        others: dict[str, tuple[Any, ...]] = {
            "loss": (None, 3, lambda r: r, lambda r: None, lambda r: r.tokens.sum(), lambda r: r.mask.sum()),
            "student": (None, "x", student.logits, opd.TabularPolicy(_levels(rng, size + 1, horizon), eos=eos)),
            "teacher": (None, "x", teacher.logits, opd.TabularPolicy(_levels(rng, size, horizon + 1), eos=eos)),
            "divergence": ("kl", None, 3, "alpha"),
            "objective": ("tokens", None, 3, ""),
            "gamma": _GAMMAS if objective == "token_return" else (*_GAMMAS, 0.5),
            "batch_size": (0, -1, 1.5, "1", None, True),
        }
        arguments[wrong] = chosen(rng, *others[wrong])
        if wrong in ("student", "teacher"):
            # Of a pair that does not match, either may be the wrong one.
            bad |= {"student", "teacher"}
        if arguments.get("divergence") == "alpha":
            bad |= {"alpha"}

    def run() -> Parts:
        found = getattr(opd, what)(**arguments)
        return [found] if what == "exact_value" else list(found)

    def expected() -> Parts:
        leaves = [level.detach().clone().requires_grad_() for level in student.logits]
        value = enumerated_value(opd.TabularPolicy(leaves, eos=eos), teacher, name, objective, gamma)
        if what == "exact_value":
            return [value]
        return list(torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True))

    return Call(what, arguments, run, expected, bad, (1e-9,))


def automata(rng: random.Random) -> Call:
    """`rollout_moments` and the oracle on two chains, beside their tables."""
    size, horizon, eos = chosen(rng, 2, 3), chosen(rng, 1, 2, 3), chosen(rng, None, 0)
    pair = [opd.MarkovPolicy(_levels(rng, size, 1)[0][0], _levels(rng, size, 2)[1], horizon, eos=eos) for _ in range(2)]
    d = opd.divergence(chosen(rng, *_NAMES))
    arguments: dict[str, Any] = {
        "student": pair[0],
        "teacher": pair[1],
        "weight": d.weight,
        "cost": chosen(rng, None, d.generator),
        "summed_tokens": chosen(rng, 0, 1, size),
    }
    arguments["gamma"] = chosen(rng, 1.0, 0.5) if arguments["cost"] is not None else 1.0
    bad: set[str] = set()
    if rng.random() < 0.4:
        wrong = chosen(rng, "student", "teacher", "weight", "summed_tokens", "gamma")
        bad.add(wrong)
        arguments[wrong] = {
            "student": chosen(rng, None, pair[0].tabulate(), "x"),
            "teacher": chosen(rng, None, 3, opd.MarkovPolicy(*pair[1].logits, horizon + 1, eos=eos)),
            "weight": chosen(
                rng, lambda t: t / 0.0, lambda t: t * torch.nan, None, 3, lambda t: "x", lambda t: t[:1, :1]
            ),
            "summed_tokens": chosen(rng, -1, size + 1, 1.5, True, "1", None),
            "gamma": chosen(rng, *_GAMMAS),
        }[wrong]
        bad |= {"log_u"} if wrong == "weight" else set()

    def run() -> Parts:
        return list(opd.rollout_moments(**arguments).mean)

    def expected() -> Parts:
        objective = "token_local" if arguments["cost"] is None else "token_return"
        tables = [policy.tabulate() for policy in pair]
        return pair[0].pull_back(opd.exact_gradient(*tables, d, objective, arguments["gamma"]))

    return Call("rollout_moments", arguments, run, expected, bad, (1e-9,))
