"""The recipes for trainers that are not run here: each block compiles, and with stand-ins gives the library's weight.

The stand-ins have the names, signatures and formulas that `docs/other_trainers.md` says were read.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import opdtheory as opd
from tests.tolerances import ALGEBRA

PAGE = Path(__file__).resolve().parents[2] / "docs" / "other_trainers.md"

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def blocks(page: str) -> dict[str, str]:
    """The code of a page by its title."""
    return dict(re.findall(r'^```py title="([^"]+)"\n(.*?)^```$', page, re.MULTILINE | re.DOTALL))


CODE = blocks(PAGE.read_text(encoding="utf-8"))


def log_probabilities() -> tuple[Tensor, Tensor]:
    """Log-probabilities of student and teacher, padded with values that no model gives."""
    noise = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_p, log_q = noise.abs().neg()
    padding = MASK == 0
    return log_p.masked_fill(padding, -3.0), log_q.masked_fill(padding, 500.0)


def weight(name: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    """u f'(u) - f(u) by differentiating the generator in log u, and 0 at padding."""
    log_u = ((log_q - log_p) * MASK).requires_grad_()
    generator = opd.divergence(name).generator(log_u)
    (slope,) = torch.autograd.grad(generator.sum(), log_u)
    return (slope - generator).detach() * MASK


def install(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> ModuleType:
    """A module of that name with these members, and packages around it."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        path = ".".join(parts[:count])
        if count < len(parts) and path in sys.modules and not hasattr(sys.modules[path], "stand_in"):
            monkeypatch.delitem(sys.modules, path)
        if path not in sys.modules:
            module: Any = ModuleType(path)
            module.stand_in, module.__path__ = True, []
            monkeypatch.setitem(sys.modules, path, module)
            if count > 1:
                setattr(sys.modules[".".join(parts[: count - 1])], parts[count - 1], module)
    vars(sys.modules[name]).update(members)
    return sys.modules[name]


def executed(code: str) -> dict[str, Any]:
    """The names of a block."""
    namespace: dict[str, Any] = {"__name__": "recipe"}
    exec(compile(code, "recipe", "exec"), namespace)
    return namespace


def slime(monkeypatch: pytest.MonkeyPatch, code: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Lists of tensors, one a rollout; padding does not exist, and the mask is applied in the loss."""
    lengths = MASK.sum(1).tolist()
    cut = [[row[:n] for row, n in zip(rows, lengths, strict=True)] for rows in (log_p, log_q)]
    advantage = executed(code)["advantage"]
    found = []
    for used, own in ((False, "log_probs"), (True, "rollout_log_probs")):
        data = {"log_probs": [], "rollout_log_probs": [], "teacher_log_probs": cut[1], own: cut[0]}
        advantage(SimpleNamespace(use_rollout_logprobs=used), data)
        assert data["advantages"] is not data["returns"]
        found.append(torch.nn.utils.rnn.pad_sequence(data["advantages"], batch_first=True))
    assert torch.equal(*found)
    return found[0]


@dataclass
class LossInputs:
    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    loss_mask: Tensor


def prime_rl(monkeypatch: pytest.MonkeyPatch, code: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The gradient of each token's log-probability, on-policy, is the advantage."""

    def ref_kl_loss_fn(inputs: LossInputs) -> Tensor:
        ratio = (inputs.trainer_logprobs - inputs.inference_logprobs).exp()
        assert inputs.ref_logprobs is not None
        ref_kl = inputs.ref_logprobs - inputs.trainer_logprobs
        return -(inputs.loss_mask * ref_kl.detach() * ratio).sum()

    module = install(monkeypatch, "prime_rl.trainer.rl.loss", ref_kl_loss_fn=ref_kl_loss_fn)
    executed(code)
    assert module.ref_kl_loss_fn is not ref_kl_loss_fn
    leaf = log_p.clone().requires_grad_()
    module.ref_kl_loss_fn(LossInputs(leaf, log_p, log_q, MASK.bool())).backward()
    assert leaf.grad is not None
    return -leaf.grad


def nemo_rl(monkeypatch: pytest.MonkeyPatch, code: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The estimator is called as the asynchronous loop does."""

    class OPDAdvantageEstimator:
        def __init__(self, estimator_config: dict[str, str], loss_config: Any) -> None:
            self.last_metrics: dict[str, float] = {}

        def _compute_metrics(self, distill_advantages: Tensor, advantages: Tensor, mask: Tensor) -> None:
            self.last_metrics = {"gap": float(torch.masked_select(distill_advantages, mask.bool()).mean())}

    module = install(monkeypatch, "nemo_rl.algorithms.grpo", OPDAdvantageEstimator=OPDAdvantageEstimator)
    executed(code)
    made = module.OPDAdvantageEstimator({"name": "opd"}, None)
    found: Tensor = made.compute_advantage(
        prompt_ids=None,
        rewards=None,
        mask=MASK.double(),
        repeated_batch=None,
        logprobs_policy=log_p,
        teacher_logprobs=log_q,
        prev_logprobs=log_p,
        sample_mask=None,
    )
    assert made.last_metrics["gap"] == pytest.approx(float((log_q - log_p)[MASK == 1].mean()))
    return found


class TensorData:
    def __init__(self, data: Tensor) -> None:
        self.data = data

    @classmethod
    def from_torch(cls, data: Tensor) -> TensorData:
        return cls(data)

    def to_torch(self) -> Tensor:
        return self.data


def tinker(monkeypatch: pytest.MonkeyPatch, code: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The original adds to the advantages in place; those of a reward stay."""

    async def original(data: list[Any], teachers: list[Any], indices: list[int], coefficient: float, discount: float):
        assert discount == 0
        for datum, teacher in zip(data, teachers, strict=True):
            mask = datum.loss_fn_inputs["mask"].to_torch().float()
            reverse_kl = (datum.loss_fn_inputs["logprobs"].to_torch() - teacher) * mask
            changed = datum.loss_fn_inputs["advantages"].to_torch() - coefficient * mask * reverse_kl
            datum.loss_fn_inputs["advantages"] = TensorData.from_torch(changed)
        return {"teacher_kl": 0.0}

    install(monkeypatch, "tinker", TensorData=TensorData)
    module = install(monkeypatch, "tinker_cookbook.distillation.train_on_policy", incorporate_kl_penalty=original)
    executed(code)
    rewards, coefficient = 0.25, 3.0
    data = [
        SimpleNamespace(
            loss_fn_inputs={
                "advantages": TensorData(torch.full_like(p, rewards)),
                "logprobs": TensorData(p),
                "mask": TensorData(m),
            }
        )
        for p, m in zip(log_p, MASK, strict=True)
    ]
    metrics = asyncio.run(module.incorporate_kl_penalty(data, list(log_q), [0, 0], coefficient, 0.9))
    assert metrics == {"teacher_kl": 0.0}
    found = torch.stack([datum.loss_fn_inputs["advantages"].to_torch() for datum in data])
    return (found - rewards) / coefficient


def swift(monkeypatch: pytest.MonkeyPatch, code: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    """What is added to GRPO's advantage looks the function up when it is called."""

    def compute_teacher_logratio(teacher: Tensor, policy: Tensor, mask: Tensor) -> Tensor:
        return (teacher - policy).masked_fill(~mask.bool(), 0.0)

    module = install(monkeypatch, "swift.rl_core.advantage", compute_teacher_logratio=compute_teacher_logratio)
    executed(code)
    found: Tensor = module.compute_teacher_logratio(log_q, log_p, MASK)
    return found


def openrlhf(monkeypatch: pytest.MonkeyPatch, code: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The original clears `kl`, and leaves other advantages."""

    class RemoteExperienceMaker:
        def compute_advantages_and_returns(self, experiences: list[Any]) -> list[Any]:
            for experience in experiences:
                experience.advantages = experience.returns = torch.full_like(experience.kl, 7.0)
                experience.kl = None
            return experiences

    install(
        monkeypatch,
        "openrlhf.trainer.ppo_utils.experience_maker",
        RemoteExperienceMaker=RemoteExperienceMaker,
    )
    executed(code)
    experiences = [
        SimpleNamespace(kl=p - q, action_mask=m, advantages=None)
        for p, q, m in zip(log_p.split(1), log_q.split(1), MASK.split(1), strict=True)
    ]
    RemoteExperienceMaker().compute_advantages_and_returns(experiences)
    return torch.cat([experience.advantages for experience in experiences])


HOOKS: dict[str, Callable[[pytest.MonkeyPatch, str, Tensor, Tensor], Tensor]] = {
    "slime_opd_plus.py": slime,
    "prime_rl_opd_plus.py": prime_rl,
    "nemo_rl_opd_plus.py": nemo_rl,
    "tinker_opd_plus.py": tinker,
    "swift_opd_plus.py": swift,
    "openrlhf_opd_plus.py": openrlhf,
}


def error(monkeypatch: pytest.MonkeyPatch, title: str, code: str, name: str) -> float:
    """How far the advantages of a recipe are from the weight."""
    log_p, log_q = log_probabilities()
    with monkeypatch.context() as patch:
        found = HOOKS[title](patch, code, log_p, log_q)
    return float((found - weight(name, log_p, log_q)).abs().max())


def test_every_block_has_a_stand_in() -> None:
    assert list(CODE) == list(HOOKS)


@pytest.mark.parametrize("title", HOOKS)
def test_the_advantage_is_the_weight(monkeypatch: pytest.MonkeyPatch, title: str) -> None:
    for name in ("jsd", "reverse_kl", "forward_kl", "chi2"):
        code = CODE[title].replace('opd.divergence("jsd")', f'opd.divergence("{name}")')
        assert error(monkeypatch, title, code, name) < ALGEBRA


@pytest.mark.parametrize("title", HOOKS)
@pytest.mark.parametrize(
    ("right", "wrong"),
    [("DIVERGENCE.weight(", "-DIVERGENCE.generator("), ("DIVERGENCE.weight(", "DIVERGENCE.weight(-")],
)
def test_a_wrong_recipe_is_seen(monkeypatch: pytest.MonkeyPatch, title: str, right: str, wrong: str) -> None:
    """A detached reward in place of the weight (T2), and the ratio upside down."""
    assert right in CODE[title]
    assert error(monkeypatch, title, CODE[title].replace(right, wrong), "jsd") > 1e-2


def test_the_page_names_commit_and_date_of_every_recipe() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert '!!! warning "Not run here"' in page
    sections = page.split("\n## ")[1:]
    assert len(sections) == len(HOOKS)
    for section in sections:
        assert re.search(r"commit\s+`[0-9a-f]{7}`\s+of\s+2026-\d\d-\d\d", section), section.splitlines()[0]
