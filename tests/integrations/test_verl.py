"""OPD+ in verl's registries: names, messages, and expected gradients against the exact ones."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import opdtheory as opd
from opdtheory.divergences import Divergence, alpha
from opdtheory.errors import IntegrationError, InvalidArgumentError, LossError
from opdtheory.integrations import verl
from tests.integrations import verl_stand_in
from tests.tolerances import ENUMERATION

ALGORITHMS, DISTILLATION = "verl.trainer.ppo.core_algos", "verl.trainer.distillation.losses"
DIVERGENCES = [opd.divergence(name) for name in ("reverse_kl", "forward_kl", "jsd", "chi2")] + [alpha(0.5)]
REWARDS = {"use_kl_in_reward": True, "kl_penalty": "kl", "kl_ctrl": {"type": "fixed", "kl_coef": 1.0}}

Modules = dict[str, ModuleType]
Loss = Callable[[opd.Rollouts], Tensor]


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Modules:
    found = verl_stand_in.modules()
    for path in [path for path in sys.modules if path == "verl" or path.startswith("verl.")]:
        monkeypatch.delitem(sys.modules, path)
    for path, module in found.items():
        monkeypatch.setitem(sys.modules, path, module)
    return found


def registries(found: Modules) -> list[dict[str, Any]]:
    algorithms = found[ALGORITHMS]
    return [
        *(algorithms.ADV_ESTIMATOR_REGISTRY, algorithms.POLICY_LOSS_REGISTRY),
        found[DISTILLATION].DISTILLATION_LOSS_REGISTRY,
    ]


class Config(SimpleNamespace):
    """A configuration as verl's: read by attribute and by `get`."""

    def get(self, key: str, default: Any = None) -> Any:
        return getattr(self, key, default)


def distilled(kind: verl.DistillationLoss, policy_gradient: bool, mode: str = "seq-mean-token-sum") -> Loss:
    """What verl's `distillation_loss` does with the registered function, by hand."""

    def loss(r: opd.Rollouts) -> Tensor:
        actor, data = Config(global_batch_info={}), batch(r)
        distillation = Config(distillation_loss=Config(loss_max_clamp=None))
        values, _ = kind(actor, distillation, {"log_probs": packed(r.student_logprobs)}, data)
        if policy_gradient:
            ratio = (r.student_logprobs - r.behavior_logprobs).exp()
            values = ratio * values.detach()
        return verl_stand_in.agg_loss(values, data["response_mask"], mode)

    return loss


def batch(r: opd.Rollouts) -> dict[str, Any]:
    # One prompt token each; padding is inside the response and outside its mask.
    ones = torch.ones(r.tokens.shape[0], r.tokens.shape[1] + 1, dtype=torch.int64)
    return {
        "prompts": r.tokens[:, :1] * 0,
        "responses": r.tokens,
        "attention_mask": ones,
        "response_mask": r.mask > 0,
        "teacher_logprobs": packed(r.teacher_logprobs).unsqueeze(-1),
    }


def packed(values: Tensor) -> Tensor:
    """All positions in one row; the one at token n belongs to token n + 1, and the last to none."""
    return torch.cat([values, values[:, -1:]], 1).flatten()


def gap(loss: Loss, divergence: str | Divergence, batch_size: int = 1, horizon: int = 2) -> float:
    """Distance of the expected from the exact gradient, relative."""
    student, teacher = opd.random_pair(3, horizon, eos=0, seed=5)
    exact = torch.cat(opd.exact_gradient(student, teacher, divergence))
    found = torch.cat(opd.expected_gradient(loss, student, teacher, batch_size))
    return float((found - exact).norm() / exact.norm())


def test_register_puts_one_name_in_three_places(stand_in: Modules) -> None:
    assert verl.register("jsd") == "opd_plus_jsd"
    estimators, policies, losses = registries(stand_in)
    assert set(estimators) == {"opd_plus_jsd", "opd_plus_log_ratio"}
    assert set(policies) == set(losses) == {"opd_plus_jsd"}
    assert estimators["opd_plus_jsd"] == verl.AdvantageEstimator(opd.divergence("jsd"))
    assert policies["opd_plus_jsd"] == verl.PolicyLoss(opd.divergence("jsd"))
    assert losses["opd_plus_jsd"] == verl.DistillationLoss(opd.divergence("jsd"))


def test_names_hold_parameters_and_no_signs(stand_in: Modules) -> None:
    assert verl.register(alpha(0.5)) == "opd_plus_alpha_0.5"
    assert verl.register(alpha(0.25)) == "opd_plus_alpha_0.25"
    assert verl.register(opd.divergence("jsd") + 2.0 * opd.divergence("chi2")) == "opd_plus_jsd_2_chi2"
    assert verl.register("chi2", name="mine") == "mine"
    assert "mine" in registries(stand_in)[2]


def test_registering_twice_does_nothing_and_another_is_refused(stand_in: Modules) -> None:
    verl.register("jsd")
    before = [dict(registry) for registry in registries(stand_in)]
    verl.register("jsd")
    assert before == registries(stand_in)
    with pytest.raises(InvalidArgumentError, match="opd_plus_jsd' is registered in verl already"):
        verl.register("jsd", centred=True)


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["", "alpha(0.5)", "a b", 3])
def test_names_that_a_command_line_would_break_are_refused(name: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="name"):
        verl.register("jsd", name=name)


def test_functions_travel_between_processes() -> None:
    for kind in (verl.AdvantageEstimator, verl.PolicyLoss, verl.DistillationLoss):
        made = kind(alpha(0.5), True)
        assert pickle.loads(pickle.dumps(made)) == made != kind(alpha(0.5))
    assert pickle.loads(pickle.dumps(verl.LogRatio())) == verl.LogRatio()


def test_verl_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "verl", None)
    with pytest.raises(IntegrationError, match=r"verl cannot be imported .* opdtheory supports verl 0\.9"):
        verl.register("jsd")


@pytest.mark.parametrize("version", ["0.8.0", "1.0.0", "0.10.1", "unknown"])
def test_verl_of_another_version(stand_in: Modules, version: str) -> None:
    stand_in["verl"].__version__ = version
    with pytest.raises(IntegrationError, match=f"verl {version} is installed; opdtheory supports verl 0"):
        verl.register("jsd")


def test_verl_without_what_is_used(stand_in: Modules, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(stand_in[ALGORITHMS], "register_policy_loss")
    with pytest.raises(IntegrationError, match=r"no register_policy_loss in verl\.trainer\.ppo\.core_algos"):
        verl.register("jsd")
    monkeypatch.setitem(sys.modules, DISTILLATION, None)
    with pytest.raises(IntegrationError):
        verl.register("jsd")


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("policy_gradient", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_distillation_loss_is_exact(divergence: Divergence, policy_gradient: bool, centred: bool) -> None:
    loss = distilled(verl.DistillationLoss(divergence, centred), policy_gradient)
    assert gap(loss, divergence) < ENUMERATION


def test_distillation_loss_is_exact_in_batches_of_unequal_length() -> None:
    loss = distilled(verl.DistillationLoss(opd.divergence("jsd")), True)
    assert gap(loss, "jsd", batch_size=2) < ENUMERATION


def test_wrong_twins_of_the_distillation_loss_are_seen() -> None:
    jsd = opd.divergence("jsd")

    class Generator(verl.DistillationLoss):
        """The divergence as a detached reward, without the slope u f'."""

        def weight(self, log_u: Tensor, mask: Tensor) -> Tensor:
            return -self.divergence.generator(log_u.detach()) * mask

    assert gap(distilled(Generator(jsd), True), "jsd") > 0.1
    assert gap(distilled(verl.DistillationLoss(jsd), True, "token-mean"), "jsd", batch_size=2) > 0.1
    assert gap(distilled(verl.DistillationLoss(opd.divergence("chi2")), True), "jsd") > 0.1


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_advantages_are_the_weights_of_log_ratios(divergence: Divergence) -> None:
    estimator = verl.AdvantageEstimator(divergence)

    def loss(r: opd.Rollouts) -> Tensor:
        rewards = (r.log_u * r.mask).detach()
        advantages, returns = estimator(token_level_rewards=rewards, response_mask=r.mask, config=REWARDS, index=None)
        assert torch.equal(advantages, returns)
        assert not bool(advantages[r.mask == 0].any())
        return -(r.student_logprobs * advantages * r.mask).sum(-1).mean()

    assert gap(loss, divergence) < ENUMERATION
    rewards = torch.tensor([[0.3, -2.0]])
    found = estimator(token_level_rewards=rewards, response_mask=torch.ones(1, 2), config=REWARDS)[0]
    assert torch.equal(found, divergence.weight(rewards))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("use_kl_in_reward", False, "algorithm.use_kl_in_reward: must be True"),
        ("kl_penalty", "low_var_kl", "algorithm.kl_penalty: must be kl,"),
        ("kl_ctrl", {"type": "adaptive", "kl_coef": 1.0}, "algorithm.kl_ctrl.type: must be fixed"),
        ("kl_ctrl", {"type": "fixed", "kl_coef": 0.001}, "algorithm.kl_ctrl.kl_coef: must be 1.0"),
        ("kl_ctrl", None, "algorithm.kl_ctrl.type"),
    ],
)
@pytest.mark.parametrize("estimator", [verl.AdvantageEstimator(alpha(0.5)), verl.LogRatio()], ids=repr)
def test_rewards_that_are_no_log_ratios_are_refused(estimator: Any, key: str, value: Any, said: str) -> None:
    ones = torch.ones(1, 2)
    with pytest.raises(InvalidArgumentError, match=said):
        estimator(token_level_rewards=ones, response_mask=ones, config={**REWARDS, key: value})
    with pytest.raises(InvalidArgumentError, match="algorithm.use_kl_in_reward"):
        estimator(token_level_rewards=ones, response_mask=ones)


def policy_gap(divergence: Divergence, fresh: bool) -> float:
    """After the student has moved away from its sampler, at the one history that all share."""
    student, teacher = opd.random_pair(4, 1, seed=2)
    sampler = student.perturbed(0.7, seed=9)

    def loss(r: opd.Rollouts) -> Tensor:
        rewards = (r.teacher_logprobs - r.behavior_logprobs).detach()
        log_ratios, _ = verl.LogRatio()(rewards, r.mask, REWARDS)
        if not fresh:
            ratio = (r.student_logprobs - r.behavior_logprobs).exp()
            return -(ratio * divergence.weight(log_ratios)).mean()
        config = Config(global_batch_info={"global_batch_size": len(rewards)})
        loss, _ = verl.PolicyLoss(divergence)(
            old_log_prob=r.behavior_logprobs,
            log_prob=r.student_logprobs,
            advantages=log_ratios,
            response_mask=r.mask,
            loss_agg_mode="seq-mean-token-sum",
            config=config,
        )
        return loss

    exact = torch.cat(opd.exact_gradient(student, teacher, divergence))
    found = torch.cat(opd.expected_gradient(loss, student, teacher, behavior=sampler))
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_policy_loss_is_exact_after_the_student_has_moved(divergence: Divergence) -> None:
    assert policy_gap(divergence, fresh=True) < ENUMERATION
    assert policy_gap(divergence, fresh=False) > 0.01


def test_policy_loss_takes_weights_of_another_sampler() -> None:
    log_prob, mask = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True), torch.ones(1, 2)
    ratios = torch.tensor([[0.5, -0.5]], dtype=torch.float64)
    weights = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    loss, metrics = verl.PolicyLoss(opd.divergence("forward_kl"))(
        log_prob.detach(), log_prob, ratios, mask, "seq-mean-token-sum", None, weights
    )
    loss.backward()
    assert torch.equal(log_prob.grad, -ratios.exp() * weights)
    assert metrics["actor/ppo_kl"] == 0.0
    assert metrics["actor/divergence"] == pytest.approx(float((ratios * ratios.exp() - ratios.expm1()).mean()))


def test_policy_loss_refuses_advantages_of_another_estimator() -> None:
    ones = torch.ones(1, 2)
    with pytest.raises(
        LossError, match="opd_plus_jsd as a policy loss needs algorithm.adv_estimator=opd_plus_log_ratio"
    ):
        verl.PolicyLoss(opd.divergence("jsd"))(ones, ones, ones, ones)


def test_masked_positions_count_for_nothing() -> None:
    packed_student = torch.tensor([-1.0, -torch.inf, -3.0], requires_grad=True)
    data = {
        "prompts": torch.zeros(1, 1, dtype=torch.int64),
        "responses": torch.zeros(1, 2, dtype=torch.int64),
        "attention_mask": torch.ones(1, 3, dtype=torch.int64),
        "response_mask": torch.tensor([[True, False]]),
        "teacher_logprobs": torch.tensor([[-0.5], [-torch.inf], [0.0]]),
    }
    config = Config(distillation_loss=Config(loss_max_clamp=None))
    forward = opd.divergence("forward_kl")
    values, metrics = verl.DistillationLoss(forward)(None, config, {"log_probs": packed_student}, data)
    weight = float(forward.weight(torch.tensor(0.5)))
    assert values.tolist() == [[pytest.approx(-weight), 0.0]]
    values.sum().backward()
    assert packed_student.grad.tolist() == [pytest.approx(-weight), 0.0, 0.0]
    assert metrics["distillation/divergence"] == pytest.approx(0.5 * weight - (weight - 1.0))


def test_a_clamp_is_warned_of_and_several_tokens_are_refused() -> None:
    student, teacher = opd.random_pair(3, 2, seed=1)
    kind = verl.DistillationLoss(opd.divergence("jsd"))
    config = Config(distillation_loss=Config(loss_max_clamp=10.0))

    def clamped(r: opd.Rollouts) -> Tensor:
        return kind(None, config, {"log_probs": packed(r.student_logprobs)}, batch(r))[0].sum()

    with pytest.warns(UserWarning, match="loss_max_clamp=10.0 clips"):
        opd.expected_gradient(clamped, student, teacher)

    def several(r: opd.Rollouts) -> Tensor:
        data = batch(r)
        data["teacher_logprobs"] = data["teacher_logprobs"].expand(-1, 2)
        plain = Config(distillation_loss=Config(loss_max_clamp=None))
        return kind(None, plain, {"log_probs": packed(r.student_logprobs)}, data)[0].sum()

    with pytest.raises(LossError, match=r"teacher_logprobs must have shape \(B, T, 1\)"):
        opd.expected_gradient(several, student, teacher)
