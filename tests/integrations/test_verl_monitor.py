"""The monitor of verl's batches: which fields it reads, in each layout, and what it puts around a loss."""

from __future__ import annotations

import importlib
import pickle
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import opdtheory as opd
from opdtheory.errors import InvalidArgumentError, LossError
from opdtheory.exact.sampling import sample_rollouts
from opdtheory.integrations import verl, verl_monitor
from opdtheory.integrations.verl_monitor import feed, tokens_of, watch
from opdtheory.monitoring.tokens import SampledTokens
from opdtheory.monitoring.weights import weight_of
from tests.integrations import verl_stand_in
from tests.integrations.test_verl import Config, batch, packed

DISTILLATION = "verl.trainer.distillation.losses"
NAMES = {"k1": "k1", "k3": "k3"}
LOGGED = ("tokens", "mask", "student_logprobs", "teacher_logprobs")


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """verl's registry, with its own k1 and k3."""
    found = verl_stand_in.modules()
    for path in [path for path in sys.modules if path == "verl" or path.startswith("verl.")]:
        monkeypatch.delitem(sys.modules, path)
    for path, module in found.items():
        monkeypatch.setitem(sys.modules, path, module)
    losses: dict[str, Any] = found[DISTILLATION].DISTILLATION_LOSS_REGISTRY
    losses.update(dict.fromkeys(NAMES, estimated))
    return losses


def estimated(config: Any, distillation_config: Any, model_output: Any, data: Any) -> tuple[Tensor, dict[str, Any]]:
    """verl's loss on sampled tokens, which reads its own name."""
    padding = sys.modules["verl.workers.utils.padding"].no_padding_2_padding
    log_p = padding(model_output["log_probs"], data)
    log_q = padding(data["teacher_logprobs"], data).squeeze(-1)
    log_u = log_q - log_p
    mode = NAMES[distillation_config.distillation_loss.loss_mode]
    return (-log_u if mode == "k1" else log_u.exp() - 1 - log_u), {"distillation/abs_loss": 1.0}


@pytest.fixture
def monitored() -> ModuleType:
    return importlib.import_module("opdtheory.monitoring.monitor")


def rollouts() -> opd.Rollouts:
    """Seven rollouts of unequal length in float64."""
    student, teacher = opd.random_pair(4, 5, eos=0, seed=3)
    found = sample_rollouts(student, teacher, 7).rollouts
    fields = {name: getattr(found, name).detach() for name in LOGGED}
    return Config(**fields, log_u=fields["teacher_logprobs"] - fields["student_logprobs"])


def nested(values: Tensor, lengths: list[int]) -> Tensor:
    rows = [row[:length] for row, length in zip(values, lengths, strict=True)]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


class DataProto:
    """What holds a batch in verl."""

    def __init__(self, **tensors: Tensor) -> None:
        self.batch = tensors
        self.non_tensor_batch: dict[str, Any] = {}


def proto(r: opd.Rollouts, **others: Tensor) -> DataProto:
    return DataProto(
        old_log_probs=r.student_logprobs.detach().float(),
        ref_log_prob=r.teacher_logprobs.float(),
        response_mask=(r.mask > 0).long(),
        **others,
    )


def same(found: Any, r: opd.Rollouts) -> bool:
    alive = r.mask > 0
    pairs = ((found.student, r.student_logprobs.detach()), (found.teacher, r.teacher_logprobs), (found.mask, r.mask))
    return all(torch.allclose(a[alive].double(), b[alive].double(), atol=1e-6) for a, b in pairs)


def test_padded_and_nested_batches_are_read_alike() -> None:
    r = rollouts()
    lengths = [int(n) for n in r.mask.sum(-1)]
    assert same(tokens_of(proto(r)), r)
    assert same(tokens_of(proto(r).batch), r)
    jagged = {name: nested(value, lengths) for name, value in proto(r).batch.items()}
    found = tokens_of(jagged)
    width = max(lengths)
    assert torch.equal(found.student, (r.student_logprobs.detach().float() * r.mask)[:, :width])
    assert torch.equal(found.mask, (r.mask > 0).long()[:, :width])
    swapped = {**proto(r).batch, "old_log_probs": proto(r).batch["ref_log_prob"]}
    assert not same(tokens_of(swapped), r)


@pytest.mark.parametrize("layout", ["padded", "packed", "nested"])
def test_the_teachers_log_probabilities_are_one_position_early(layout: str) -> None:
    r = rollouts()
    data = proto(r).batch
    del data["ref_log_prob"]
    early = torch.cat([r.teacher_logprobs, torch.full_like(r.teacher_logprobs[:, :1], 5.0)], 1).unsqueeze(-1)
    layouts = {"padded": early, "packed": early.flatten(0, 1), "nested": nested(early, [early.shape[1]] * len(early))}
    found = tokens_of({**batch(r), **data, "teacher_logprobs": layouts[layout]})
    assert same(found, r)
    late = early.roll(1, 1)
    assert not same(tokens_of({**batch(r), **data, "teacher_logprobs": late}), r)


def test_the_engines_own_log_probabilities_are_the_behaviour(monitored: ModuleType) -> None:
    r = rollouts()
    others = {"rollout_log_probs": r.student_logprobs.detach() + 0.1, "entropys": -r.student_logprobs.detach()}
    found = tokens_of(proto(r, **others))
    assert torch.equal(found.behavior, others["rollout_log_probs"])
    assert torch.equal(found.entropy, others["entropys"])
    assert tokens_of(proto(r)).behavior is None


def test_a_batch_is_fed_and_its_metrics_returned(monitored: ModuleType) -> None:
    r = rollouts()
    found = feed(monitored.Monitor("k1_reward"), proto(r), 3)
    alive = r.mask > 0
    assert all(name.startswith("opd/") for name in found)
    assert found["opd/reverse_kl"] == pytest.approx(float(-r.log_u.detach()[alive].mean()), abs=1e-6)


def test_what_a_batch_lacks_is_named() -> None:
    data = proto(rollouts()).batch
    for missing in ("old_log_probs", "response_mask"):
        with pytest.raises(LossError, match=f"must hold {missing}"):
            tokens_of({name: value for name, value in data.items() if name != missing})
    with pytest.raises(LossError, match="teacher_logprobs or ref_log_prob"):
        tokens_of({name: value for name, value in data.items() if name != "ref_log_prob"})
    with pytest.raises(LossError, match="last dimension of 1"):
        tokens_of({**data, "teacher_logprobs": torch.zeros(7, 6, 2)})


def called(loss: Any, r: opd.Rollouts, mode: str = "k1", **settings: Any) -> tuple[Tensor, dict[str, Any]]:
    given = {"loss_mode": mode, "use_policy_gradient": True, "loss_max_clamp": None, **settings}
    return loss(
        config=Config(global_batch_info={}),
        distillation_config=Config(distillation_loss=Config(**given)),
        model_output={"log_probs": packed(r.student_logprobs)},
        data=batch(r),
    )


@pytest.mark.parametrize("mode", ["k1", "k3", "opd_plus_jsd"])
def test_a_watched_loss_is_the_same_to_the_bit(mode: str, registry: dict[str, Any]) -> None:
    verl.register("jsd")
    outcomes = []
    for watched in (False, True):
        if watched:
            watch(mode)
        r = rollouts()
        r.student_logprobs = r.student_logprobs.detach().requires_grad_()
        losses, metrics = called(registry[mode], r, mode)
        (gradient,) = torch.autograd.grad(losses.sum(), r.student_logprobs)
        outcomes.append((losses.detach(), gradient))
        assert any(name.startswith("opd/") for name in metrics) == watched
        assert any(name.startswith("distillation/") for name in metrics)
    for plain, with_monitor in zip(*outcomes, strict=True):
        assert torch.equal(plain, with_monitor)


def test_what_a_watched_loss_adds(
    registry: dict[str, Any], monitored: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    add = monitored.Monitor.add

    def spy(self: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(args)
        add(self, *args, **kwargs)

    monkeypatch.setattr(monitored.Monitor, "add", spy)
    watch("k1")
    r = rollouts()
    with torch.no_grad():
        called(registry["k1"], r)
    assert not calls  # verl scores rollouts too, which is no step
    called(registry["k1"], r)
    tokens = SampledTokens.of(*calls[0])
    alive = r.mask > 0
    assert torch.allclose(tokens.log_u, r.log_u[alive].detach().double()) and tokens.behavior is None
    assert not calls[0][0].requires_grad


def test_watching_twice_does_nothing_and_another_monitor_is_refused(registry: dict[str, Any]) -> None:
    watch("k1")
    once = registry["k1"]
    watch("k1")
    assert registry["k1"] is once and once.loss is estimated
    with pytest.raises(InvalidArgumentError, match="'k1' is watched already"):
        watch("k1", "opd", "forward_kl")
    with pytest.raises(InvalidArgumentError, match="loss_mode: must be one of k1, k3, got 'k7'"):
        watch("k7")


def test_settings_of_their_own_have_sums_of_their_own(registry: dict[str, Any]) -> None:
    watch("k3")
    for gradient in (True, False, True):
        called(registry["k3"], rollouts(), "k3", use_policy_gradient=gradient)
    assert len(registry["k3"]._monitors) == 2


def test_sums_stay_in_their_process(registry: dict[str, Any], monitored: ModuleType) -> None:
    watch("k3", "k3_loss")
    called(registry["k3"], rollouts(), "k3")
    copy = pickle.loads(pickle.dumps(registry["k3"]))
    assert copy == registry["k3"] and registry["k3"]._monitors and not copy._monitors


@pytest.mark.parametrize(
    ("loss", "settings", "wanted"),
    [
        (estimated, {"loss_mode": "k1"}, ("k1_reward", None, {})),
        (estimated, {"loss_mode": "low_var_kl", "use_policy_gradient": False}, ("k3_loss", None, {})),
        (estimated, {"loss_mode": "mse", "use_policy_gradient": False}, ("k2_loss", None, {})),
        (
            estimated,
            {"loss_mode": "k3", "loss_max_clamp": 10.0},
            ("k3_reward", None, {"clip_weight": (-10.0, 10.0)}),
        ),
        (verl.DistillationLoss(opd.divergence("jsd")), {}, ("opd_plus", opd.divergence("jsd"), {})),
        (verl.DistillationLoss(opd.divergence("chi2"), True), {}, ("opd_plus_centred", opd.divergence("chi2"), {})),
    ],
)
def test_by_default_it_asks_for_what_the_loss_is(loss: Any, settings: dict[str, Any], wanted: Any) -> None:
    given = {"loss_mode": "k1", "use_policy_gradient": True, "loss_max_clamp": None, **settings}
    assert verl_monitor.estimator_of(loss, Config(**given)) == wanted
    opd.estimator(wanted[0], wanted[1], **wanted[2])
    with pytest.raises(InvalidArgumentError, match="estimator: must be given for the loss 'abs'"):
        verl_monitor.estimator_of(estimated, Config(**{**given, "loss_mode": "abs"}))


def test_the_clamp_of_a_loss_is_the_clip_of_its_weight() -> None:
    """verl clamps the losses, whose negatives are the advantages."""
    log_u = torch.linspace(-4, 4, 9, dtype=torch.float64)
    name, _, options = verl_monitor.estimator_of(
        estimated, Config(loss_mode="k3", use_policy_gradient=True, loss_max_clamp=3.0)
    )
    losses = (log_u.exp() - 1 - log_u).clamp(-3.0, 3.0)
    assert torch.allclose(weight_of(opd.estimator(name, **options))(log_u), -losses)
