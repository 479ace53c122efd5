"""The monitor inside TRL: what it reads is what the models say, and nothing of the run changes."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl import DistillationTrainer, GRPOTrainer, RLOOTrainer
from trl.experimental.gkd import GKDTrainer

import opdtheory as opd
from opdtheory.end_to_end.auditor import audit_trainer
from opdtheory.end_to_end.pair import TrainerPair
from opdtheory.errors import IntegrationError, InvalidArgumentError
from opdtheory.integrations.trl import OPDPlusTrainer, OPDTrainer
from opdtheory.integrations.trl import monitor as monitor_module
from opdtheory.integrations.trl.monitor import OPDMonitor, own_loss
from opdtheory.integrations.trl.taps import HiddenStatesTap, Taken
from opdtheory.monitoring import Monitor
from opdtheory.monitoring.tokens import SampledTokens
from tests.integrations.trl.builders import quiet
from tests.integrations.trl.monitored import TRAINERS, a_pair, built, scores, trained
from tests.sparse import some

pytestmark = [quiet, pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")]

# The tables are of float64, what TRL makes of them of float32.
SINGLE = 1e-5


@pytest.fixture(autouse=True)
def added(monkeypatch: pytest.MonkeyPatch) -> list[SampledTokens]:
    """The tokens of each call of `Monitor.add`."""
    calls: list[SampledTokens] = []
    add = Monitor.add

    def spy(self: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(SampledTokens.of(*args, **kwargs))
        add(self, *args, **kwargs)

    monkeypatch.setattr(Monitor, "add", spy)
    return calls


def watched(kind: type, pair: TrainerPair | None = None, monitor: OPDMonitor | None = None, **settings: Any) -> Any:
    """A trainer after a run with a monitor."""
    trainer = built(kind, pair or a_pair(), **settings)
    with (monitor or OPDMonitor()).attach(trainer):
        return trained(trainer)


def logged(trainer: Any, name: str = "opd/reverse_kl") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("kind", some(TRAINERS), ids=lambda kind: kind.__name__)
def test_a_run_ends_in_the_same_bits_and_has_the_metrics_in_its_log(kind: type) -> None:
    pair, other = a_pair(), a_pair()
    before = pair.student.model.table.detach().clone()
    trained(built(kind, pair))
    trainer = watched(kind, other)
    after = other.student.model.table.detach()
    assert torch.equal(pair.student.model.table.detach(), after) and not torch.equal(after, before)
    assert len(logged(trainer)) == 3
    assert not vars(trainer).keys() & {"log", "_compute_loss", "generalized_jsd_loss", "_get_last_hidden_state"}
    assert not any(isinstance(each, OPDMonitor) for each in trainer.callback_handler.callbacks)


def apart(found: Tensor, wanted: Tensor) -> float:
    """The largest distance of two sets of numbers; infinite if one has more."""
    if found.shape != wanted.shape:
        return float("inf")
    return float((found.sort().values - wanted.sort().values).abs().max())


@pytest.mark.parametrize("kind", some(TRAINERS), ids=lambda kind: kind.__name__)
def test_the_tokens_are_those_of_the_loss(kind: type, added: list[SampledTokens]) -> None:
    pair, seen = a_pair(), []
    temperature = 1.0 if kind is GKDTrainer else 0.7  # GKD's is of sampling alone
    watched(kind, pair, keep=seen, learning_rate=0.0, temperature=temperature)
    assert len(added) == 3 and len(seen) == 6
    for step, tokens in enumerate(added):
        batches = seen[2 * step : 2 * step + 2]
        ours, theirs = (
            torch.cat([scores(each, b, temperature) for b in batches]) for each in (pair.student, pair.teacher)
        )
        assert tokens.rollouts == 8 and not tokens.left_out
        assert apart(tokens.student, ours) < SINGLE and apart(tokens.teacher, theirs) < SINGLE
        assert apart(tokens.log_u, theirs - ours) < SINGLE
        assert apart(tokens.log_u, ours - theirs) > 0.1
        assert tokens.behavior is None or apart(tokens.behavior, ours) < SINGLE


def test_a_twin_that_is_off_by_one_token_is_seen(added: list[SampledTokens], monkeypatch: pytest.MonkeyPatch) -> None:
    right = HiddenStatesTap._log_probs
    monkeypatch.setattr(
        HiddenStatesTap,
        "_log_probs",
        lambda self, model, hidden, ids, alive: right(self, model, hidden, ids.roll(1, 1), alive),
    )
    pair, seen = a_pair(), []
    watched(DistillationTrainer, pair, keep=seen, learning_rate=0.0, max_steps=1)
    assert apart(added[0].student, torch.cat([scores(pair.student, b) for b in seen])) > 0.1


def test_later_passes_over_rollouts_have_a_sampler_of_their_own(added: list[SampledTokens]) -> None:
    watched(OPDPlusTrainer, num_iterations=2, learning_rate=0.5, max_steps=2, loss_type="dr_grpo")
    first, second = added
    assert first.behavior is not None and second.behavior is not None  # TRL then always keeps them
    assert apart(first.student, first.behavior) < SINGLE < apart(second.student, second.behavior)
    assert apart(first.behavior, second.behavior) < SINGLE


def test_gkd_samples_at_another_temperature_than_it_scores(added: list[SampledTokens]) -> None:
    pair, seen = a_pair(), []
    watched(GKDTrainer, pair, keep=seen, learning_rate=0.0, max_steps=1, temperature=0.5)
    behavior = torch.cat([scores(pair.student, batch, 0.5) for batch in seen])
    assert added[0].behavior is not None and apart(added[0].behavior, behavior) < SINGLE
    assert apart(added[0].behavior, added[0].student) > 0.1


def test_answers_of_the_dataset_are_no_rollouts(added: list[SampledTokens]) -> None:
    trainer = watched(GKDTrainer, lmbda=0.0, max_steps=1)
    assert not added and not logged(trainer)
    watched(GKDTrainer, lmbda=0.0, seq_kd=True, max_steps=1)
    assert not added


def test_the_record_holds_the_tokens(tmp_path: Path, added: list[SampledTokens]) -> None:
    path = tmp_path / "run.jsonl"
    watched(GRPOTrainer, monitor=OPDMonitor(record=path, every=2))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row.pop("step") for row in rows] == [1] * 8 + [3] * 8
    names = ("old_per_token_logps", "ref_per_token_logps", "completion_mask")
    assert all(set(row) == set(names) for row in rows)
    student, teacher, mask = ([row[name] for row in rows] for name in names)
    assert all(len(row) == sum(row) for row in mask)
    read = SampledTokens.of(student, teacher, mask=mask)
    # A file has the digits of single precision.
    assert torch.equal(read.student.float(), torch.cat([tokens.student for tokens in added]).float())
    assert torch.equal(read.teacher.float(), torch.cat([tokens.teacher for tokens in added]).float())
    with pytest.raises(InvalidArgumentError, match="record: must be a new file"):
        OPDMonitor(record=path)


def test_the_record_of_a_sampler_and_of_another_teacher(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    settings = {"num_iterations": 2, "max_steps": 1, "loss_type": "dr_grpo"}
    watched(OPDPlusTrainer, monitor=OPDMonitor(record=path), **settings)
    row = json.loads(path.read_text().splitlines()[0])
    assert {"teacher_per_token_logps", "sampling_per_token_logps"} < set(row)


def test_numbers_that_json_lacks_are_null() -> None:
    numbers = monitor_module._numbers
    assert numbers(torch.tensor([-0.5, float("nan"), -float("inf")])) == [-0.5, None, None]
    assert numbers(torch.tensor([1, 0])) == [1, 0]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).double().exp().to(dtype)
        assert torch.equal(torch.tensor(numbers(values), dtype=dtype), values)
    of = monitor_module._of_process
    assert (of(Path("a/run.jsonl"), 0), of(Path("a/run.jsonl"), 3)) == (Path("a/run.jsonl"), Path("a/run.3.jsonl"))


@pytest.mark.slow
def test_the_log_has_means_over_its_steps() -> None:
    every = logged(watched(GRPOTrainer, max_steps=4))
    two = logged(watched(GRPOTrainer, max_steps=4, logging_steps=2))
    assert two == pytest.approx([sum(every[:2]) / 2, sum(every[2:]) / 2], abs=1e-12)
    third = logged(watched(GRPOTrainer, monitor=OPDMonitor(every=3), max_steps=4))
    assert third == [every[0], every[3]]


def test_an_evaluation_is_not_read(added: list[SampledTokens]) -> None:
    trainer = built(GRPOTrainer, a_pair(), max_steps=1, per_device_eval_batch_size=4)
    with OPDMonitor().attach(trainer):
        trained(trainer)
        trainer.evaluate(trainer.train_dataset.select(range(4)))
    assert len(added) == 1 and "eval_loss" in trainer.state.log_history[-1]
    assert not any("opd/" in name for name in trainer.state.log_history[-1])


def test_a_collapse_is_warned_of_once() -> None:
    pair = a_pair(batch_size=64, distance=2.0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        watched(GRPOTrainer, pair, OPDMonitor("opd", "forward_kl"), max_steps=12)
        sound = watched(GRPOTrainer, a_pair(batch_size=64, distance=2.0), OPDMonitor("k1_reward", "reverse_kl"))
    assert [each.category.__name__ for each in said].count("CollapseWarning") == 1
    assert logged(sound, "opd/falls") == [0.0] * 3


def test_rollouts_of_a_prompt_are_put_together() -> None:
    def batch(prompts: list[list[int]], length: int, entropy: bool) -> Taken:
        ids = torch.tensor(prompts)
        values = ids[:, -1:].double().expand(-1, length)
        return Taken(values, -values, torch.ones_like(values), None, values if entropy else None, ids)

    joined = monitor_module._joined([batch([[-1, 1], [2, 3]], 2, True), batch([[-1, -1, 1], [-1, 2, 3]], 3, False)])
    assert joined.student[:, 0].tolist() == [1.0, 1.0, 3.0, 3.0]
    assert joined.mask.tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 1, 1]]
    assert torch.equal(joined.teacher * joined.mask, -joined.student * joined.mask)
    assert joined.behavior is None and joined.entropy is None  # not of all tokens


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [({}, 2), ({"steps_per_generation": 4}, 1), ({"per_device_train_batch_size": 3, "num_generations": 4}, 1)],
)
def test_how_many_stand_together(settings: dict[str, int], wanted: int) -> None:
    given = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "num_generations": 2, **settings}
    trainer = SimpleNamespace(args=SimpleNamespace(**given), num_generations=given["num_generations"])
    assert monitor_module._together(trainer) == wanted


def test_by_default_it_asks_for_what_the_trainer_does() -> None:
    pair = a_pair()
    assert own_loss(built(GRPOTrainer, pair)) == own_loss(built(RLOOTrainer, pair)) == ("k1_reward", None, {})
    assert own_loss(built(GRPOTrainer, pair, use_bias_correction_kl=False)) == ("k3_loss", None, {})
    assert own_loss(built(OPDTrainer, pair)) == ("full_vocab", opd.divergence("jsd"), {})
    assert own_loss(built(OPDPlusTrainer, pair)) == ("opd_plus", opd.divergence("jsd"), {})
    plus = OPDPlusTrainer(
        pair.student,
        pair.teacher,
        args=built(OPDPlusTrainer, pair).args,
        train_dataset=pair.dataset,
        processing_class=pair.tokenizer,
        centred=True,
        clip_weight=3.0,
    )
    assert own_loss(plus) == ("opd_plus_centred", opd.divergence("reverse_kl"), {"clip_weight": (-3.0, 3.0)})
    for beta, name in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        for kind in (DistillationTrainer, GKDTrainer):
            assert own_loss(built(kind, pair, beta=beta)) == ("full_vocab", name, {})
    assert own_loss(built(GKDTrainer, pair, beta=0.5))[1].label == "skew_jsd(beta=0.5)"


@pytest.mark.slow
@pytest.mark.parametrize(("corrected", "descends"), [(True, "reverse_kl"), (False, "forward_kl")])
def test_the_penalty_of_grpo_descends_what_that_estimator_does(corrected: bool, descends: str) -> None:
    def build(pair: TrainerPair) -> Any:
        settings = {"learning_rate": 0.0, "max_steps": -1, "loss_type": "dr_grpo", "beta": 1.0}
        return built(GRPOTrainer, pair, use_bias_correction_kl=corrected, **settings)

    report = audit_trainer(build, "reverse_kl", variants=False, prompts=("ba",))
    assert (report.descends or "").startswith(descends)
    name = own_loss(built(GRPOTrainer, a_pair(), use_bias_correction_kl=corrected))[0]
    claim = opd.estimator(name).claim
    assert (claim.descends or "reverse_kl").startswith(descends)


def test_the_lines_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[3] / "docs" / "trl.md"
    (code,) = (block for block in page.read_text(encoding="utf-8").split("```") if ".attach(trainer)" in block)
    namespace = {"trainer": built(OPDPlusTrainer, a_pair(), max_steps=1, disable_tqdm=True)}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code.removeprefix("py"), page.name, "exec"), namespace)
    assert len((tmp_path / "run.jsonl").read_text().splitlines()) == 8


def test_what_cannot_be_watched_is_refused() -> None:
    pair = a_pair()
    with (
        pytest.raises(InvalidArgumentError, match="beta: must not be 0"),
        OPDMonitor().attach(built(GRPOTrainer, pair, beta=0.0)),
    ):
        pass
    with pytest.raises(InvalidArgumentError, match="trainer: must be a GRPOTrainer"), OPDMonitor().attach(object()):
        pass
    with pytest.raises(InvalidArgumentError, match="estimator: must be given"):
        OPDMonitor(divergence="jsd")
    trainer, monitor = built(GRPOTrainer, pair), OPDMonitor()
    with pytest.raises(IntegrationError, match="seen no trainer"):
        monitor.diagnosis()
    trainer.add_callback(monitor)
    with pytest.raises(IntegrationError, match="no batch as a callback alone"):
        trained(trainer)
    with monitor.attach(trainer):
        with pytest.raises(InvalidArgumentError, match="one at a time"), monitor.attach(trainer):
            pass
        trained(trainer)
    assert monitor in trainer.callback_handler.callbacks  # it was there before
    assert monitor.diagnosis() is not None


def test_a_loss_that_is_not_seen_is_an_error() -> None:
    class Fused(GRPOTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return sum(each.sum() for each in model.parameters() if each.requires_grad)

    class Silent(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return sum(each.sum() for each in model.parameters() if each.requires_grad)

    for kind, said in ((Fused, "saw no loss"), (Silent, "finds no log-probabilities of the student")):
        trainer = built(GRPOTrainer, a_pair())
        trainer.__class__ = kind
        with pytest.raises(IntegrationError, match=said), OPDMonitor().attach(trainer):
            trained(trainer)
        assert "_compute_loss" not in vars(trainer)
