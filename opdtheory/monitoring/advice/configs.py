"""How a choice is written down for TRL, for verl and for the library's own trainer."""

from __future__ import annotations

from opdtheory.estimators import Estimator

__all__ = ["train_options", "trl_lines", "verl_settings"]

# Whether the weight is less its value at one.
_CENTRED = {"opd_plus": False, "opd_plus_centred": True}

# The settings of verl under which a step is the sum over tokens, and nothing else is added or cut.
_VERL = (
    "distillation.distillation_loss.use_task_rewards=false",
    "distillation.distillation_loss.loss_max_clamp=null",
    "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum",
)


def train_options(loss: Estimator, group: int = 1) -> str:
    """The command `opdtheory train` with its options."""
    parts = [f"opdtheory train --estimator {loss.name}"]
    for key, value in loss.options:
        shown = _text(loss) if key == "divergence" else f"{value:g}" if isinstance(value, float) else str(value)
        parts.append(f"--{key.replace('_', '-')} {_quoted(shown)}")
    parts.append("--reduction token_sum")
    if loss.settings.get("baseline") in ("leave_one_out", "group_mean"):
        parts.append(f"--rollouts-per-prompt {group}")
    return " ".join(parts)


def trl_lines(loss: Estimator, group: int = 1) -> str | None:
    """The lines of the plug-in's trainer; None where it has no such loss."""
    if loss.name == "full_vocab":
        named = f"student, teacher, divergence={_python(loss)}, args=DistillationConfig(...)"
        return f"trainer = OPDTrainer({named})"
    given = _sampled(loss)
    if given is None:
        return None
    arguments = [f"divergence={_python(loss)}"]
    arguments += [f"{key}={value!r}" for key, value in given.items() if value is not None and value is not False]
    config = [
        'loss_type="dr_grpo"',
        *([f"num_generations={group}"] if given.get("baseline") == "leave_one_out" else []),
    ]
    lines = [f"trainer = OPDPlusTrainer(student, teacher, {', '.join(arguments)},"]
    return "\n".join([*lines, f"                         args=GRPOConfig({', '.join(config)}, ...))"])


def _sampled(loss: Estimator) -> dict[str, object] | None:
    """The arguments of `OPDPlusTrainer` beside the divergence."""
    options = loss.settings
    if loss.name == "topk_tail_sampled":
        if options.get("baseline") == "optimal" or options.get("support") == "student":
            return None
        return {"top_k": options["k"], "baseline": options.get("baseline"), **_some(options, "baseline_value")}
    # Of the reverse KL, -f(u) and the weight of k2 are log u, the centred weight.
    same = loss.name == "k2_loss" or (loss.name == "opd" and loss.claim.divergence.label == "reverse_kl")
    if not same and loss.name not in _CENTRED:
        return None
    if options.get("baseline") not in (None, "constant", "leave_one_out"):
        return None
    kept = ("baseline", "baseline_value", "clip_log_ratio")
    if not options.keys() <= {"divergence", *kept}:
        return None
    return {"centred": _CENTRED.get(loss.name, True), **_some(options, *kept)}


def _some(options: dict[str, object], *keys: str) -> dict[str, object]:
    return {key: options[key] for key in keys if key in options}


def verl_settings(loss: Estimator) -> str | None:
    """The settings of verl; None where neither the plug-in nor verl has such a loss."""
    name, options = loss.name, loss.settings
    if options.keys() - {"divergence"}:
        return None
    own = {"k2_loss": ("k2", False), "k3_loss": ("k3", False), "k3_reward": ("k3", True)}
    if name == "opd" and loss.claim.divergence.label == "reverse_kl":
        return _mode("k1", True)
    if name in own:
        return _mode(*own[name])
    if name not in _CENTRED:
        return None
    centred = ", centred=True" if _CENTRED[name] else ""
    first = (
        f'verl.register({_python(loss)}, name="opd_plus_advised"{centred})  # in a file of VERL_USE_EXTERNAL_MODULES'
    )
    return f"{first}\n{_mode('opd_plus_advised', True)}"


def _mode(loss_mode: str, policy_gradient: bool) -> str:
    return "\n".join(
        [
            f"distillation.distillation_loss.loss_mode={loss_mode}",
            f"distillation.distillation_loss.use_policy_gradient={str(policy_gradient).lower()}",
            *_VERL,
        ]
    )


def _text(loss: Estimator) -> str:
    """The divergence as the command line reads it."""
    divergence = loss.claim.divergence
    return divergence.label if divergence._own_expr is None else str(divergence.expr)


def _python(loss: Estimator) -> str:
    """The divergence in Python: its label, or the name of the caller's own object."""
    divergence = loss.claim.divergence
    return f'"{divergence.label}"' if divergence._own_expr is None else "divergence"


def _quoted(text: str) -> str:
    return f"'{text}'" if set(text) & set("(*) +/") else text
