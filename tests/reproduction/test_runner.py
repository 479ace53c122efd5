"""The experiment: its plan, what theory reads off its arms, its processes, and that the page says what the rows say."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from opdtheory import divergence, random_pair
from opdtheory.cli import main
from opdtheory.errors import InvalidArgumentError
from opdtheory.exact.tree import pointwise
from opdtheory.reproduction import arm as reproduce_arm
from opdtheory.reproduction import runner as reproduce_runner
from opdtheory.reproduction.claims import claims, difference, noise_floor
from opdtheory.reproduction.page import page_of, read_outcome, write_page
from opdtheory.reproduction.plan import CONTROLS, DIVERGENCES, ESTIMATORS, FULL, QUICK, TWINS, plan_of
from opdtheory.reproduction.runner import Outcome, adopt, reproduce, stored
from opdtheory.reproduction.summary import share_of, summaries
from opdtheory.reproduction.theory import objective_value, reading
from opdtheory.training.intervals import wilson
from opdtheory.training.models.transformer import Transformer, TransformerConfig
from opdtheory.training.tasks import Addition

ROOT = Path(__file__).resolve().parents[2]
ARMS = {arm.name: arm for arm in FULL.arms() if (arm.task, arm.seed) == ("arithmetic", 0)}

# Sampled accuracies at the end of made-up runs; the start is 0.2.
WORLD = {
    "reverse_kl/opd": 0.60,
    "reverse_kl/opd_plus": 0.61,
    "forward_kl/opd": 0.0,
    "forward_kl/opd_plus": 0.45,
    "jsd/opd": 0.0,
    "jsd/opd_plus": 0.59,
    TWINS["reverse_kl/opd"]: 0.62,
    TWINS["jsd/opd_plus"]: 0.57,
}


def row(name: str, accuracy: float, seed: int = 0, task: str = "arithmetic") -> dict:
    """A finished row."""
    arm = next(arm for arm in FULL.arms() if (arm.name, arm.task, arm.seed) == (name, task, seed))

    def evaluation(share: float, distance: float) -> dict:
        measures = {f"test_{each}": distance for each in ("reverse_kl", "forward_kl", "entropy")}
        return {"test_sampled_accuracy": share, "greedy_accuracy": share, **measures}

    curve = {"step": [1, 200], "sampled_accuracy": [0.2, accuracy]}
    curve |= {each: [1.0, 0.5] for each in ("reverse_kl", "entropy", "response_length")}
    return {
        **{key: value for key, value in arm.to_dict().items() if key != "fields"},
        "identity": arm.identity,
        "models": reproduce_arm.model_keys(task, seed),
        "status": "finished",
        "machine": {"processor": "a machine", "cores": 2, "torch": "2", "python": "3"},
        "bias": {"bias": 1.5, "predicted_bias": 1.5, "cosine": -0.5, "variance": 3.0},
        "objective": [1.0, 0.5],
        "start": evaluation(0.2, 0.7),
        "end": evaluation(accuracy, 0.1 if accuracy > 0.2 else 9.0),
        "curve": curve,
        "means": {"gradient_norm": 1.0, "clip_fraction": 0.05},
        "seconds": 30.0,
        "processor_seconds": 30.0,
    }


def world(**changes: float) -> list[dict]:
    """The rows of three seeds, some accuracies changed."""
    values = {**WORLD, **changes}
    return [row(name, max(0.0, value + 0.01 * (seed - 1)), seed) for name, value in values.items() for seed in range(3)]


def test_the_plan_is_the_whole_grid_with_one_budget_of_rollouts():
    arms = FULL.arms()
    assert len({arm.key for arm in arms}) == len(arms) == 2 * 3 * (15 + len(CONTROLS) + len(TWINS))
    grid = {(arm.task, arm.seed, arm.name) for arm in arms if arm.group == "grid"}
    assert len(grid) == 2 * 3 * len(DIVERGENCES) * len(ESTIMATORS)
    shared = {"task": "", "pair_seed": 0, "seed": 0}
    assert all({**arm.fields, **shared} == {**ARMS[arm.name].fields, **shared} for arm in arms)
    configs = {name: arm.config() for name, arm in ARMS.items()}
    budgets = {(each.batch_size * each.steps, each.learning_rate, each.clip_gradient) for each in configs.values()}
    assert len(budgets) == 1
    # The estimators that can be clipped are, all alike, but for the arm that is there to see what the clip does.
    unclipped = {name for name, config in configs.items() if config.clip_log_ratio != 6.0}
    assert unclipped == {f"{name}/full_vocab" for name in DIVERGENCES} | {
        *("supervised", "constant advantage -1", "sign", "reverse_kl/opd, no clip")
    }


def test_an_interrupted_run_has_a_whole_seed_first():
    seeds = [arm.seed for arm in FULL.arms()]
    assert seeds == sorted(seeds)
    groups = [arm.group for arm in FULL.arms() if arm.seed == 0]
    assert groups[:30] == ["grid"] * 30 and "grid" not in groups[30:]


def test_a_twin_differs_in_its_rollouts_only():
    for name, twin in TWINS.items():
        one, two = ARMS[name].fields, ARMS[twin].fields
        assert {key for key in one.keys() | two.keys() if one.get(key) != two.get(key)} == {"seed"}
        assert one["pair_seed"] == two["pair_seed"]


def test_the_quick_plan_is_a_part_of_the_full_one():
    assert {arm.name for arm in QUICK.arms()} < {arm.name for arm in FULL.arms()}
    assert plan_of("quick", seeds=2, tasks=["tools"]).arms()[-1].task == "tools"
    for wrong in ({"seeds": 0}, {"steps": -1}, {"tasks": ["chess"]}):
        with pytest.raises(InvalidArgumentError):
            plan_of("quick", **wrong)
    with pytest.raises(InvalidArgumentError, match="plan"):
        plan_of("slow")


def test_theory_reads_the_weights():
    found = {name: reading(arm.config()) for name, arm in ARMS.items()}
    genuine = {name for name, each in found.items() if each.descends}
    falling = {name for name, each in found.items() if each.descends is False}
    assert falling == {
        *("forward_kl/opd", "jsd/opd", "chi2/opd", "hellinger/opd", "forward_kl -2(u-1)/opd"),
        *("forward_kl/opd, whole vocabulary", "jsd/opd, whole vocabulary"),
    }
    assert found["jsd/opd, whole vocabulary"] == found["jsd/opd"]
    assert {f"{name}/opd_plus" for name in DIVERGENCES} < genuine
    assert {"forward_kl -7(u-1)/opd", "jsd -log(2)/2(u-1)/opd", "sign", "reverse_kl/opd"} < genuine
    assert found["forward_kl/opd"].slope == pytest.approx(-1, abs=1e-3)
    assert found["forward_kl/opd"].falls == pytest.approx((-1, 6), abs=0.01)
    assert found["forward_kl -2(u-1)/opd"].slope == pytest.approx(1, abs=1e-3)
    assert found["forward_kl -2(u-1)/opd"].falls == pytest.approx((1, 6), abs=0.01)
    assert "repels" in str(found["forward_kl/opd"]) and "attracts" in str(found["forward_kl -2(u-1)/opd"])
    assert "zero" in str(found["constant advantage -1"]) and "demonstrations" in str(found["supervised"])


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_objective_followed_is_the_divergence_where_the_estimator_is_exact(name):
    student, teacher = random_pair(9, 1, distance=1.0, seed=3)
    log_p, log_q = (policy.logits[0].log_softmax(-1) for policy in (student, teacher))
    exact = float(pointwise(divergence(name), log_p, log_q).sum(-1).mean())
    assert objective_value(ARMS[f"{name}/full_vocab"].config(), log_p, log_q) == pytest.approx(exact, rel=1e-5)
    followed = objective_value(ARMS[f"{name}/opd"].config(), log_p, log_q)
    assert (followed == pytest.approx(exact, rel=1e-2)) == (name == "reverse_kl")
    assert objective_value(ARMS["supervised"].config(), log_p, log_q) is None


def test_intervals_widen_with_the_spread_between_seeds():
    one = share_of([0.6], 1000)
    assert (one.low, one.high) == pytest.approx(wilson(600, 1000))
    alike, apart = share_of([0.6, 0.6, 0.6], 1000), share_of([0.5, 0.6, 0.7], 1000)
    assert alike.mean == apart.mean
    assert apart.high - apart.low > 3 * (alike.high - alike.low)
    none = share_of([0.0, 0.0], 100)
    assert none.low == 0.0 < none.high


def test_verdicts_follow_from_the_rows():
    table = {each.name: each for each in summaries(world())}
    assert table["forward_kl/opd"].verdict == (
        "collapses: below the student's start in 3 of 3 seeds, further from the teacher in 3 of 3"
    )
    assert table["jsd/opd_plus"].word == "trains"
    assert {each.name: each.word for each in summaries(world(**{"jsd/opd": 0.205}))}["jsd/opd"] == "stays"
    lost = row("jsd/opd", 0.0)
    lost["end"]["test_reverse_kl"] = 1.39  # from 0.7
    assert summaries([lost])[0].word == "declines"
    mixed = [row("jsd/opd", 0.9, 0), row("jsd/opd", 0.0, 1)]
    assert summaries(mixed)[0].word == "mixed"
    failed = [row("jsd/opd", 0.9, 0), {**row("jsd/opd", 0.9, 1), "status": "failed", "error": "the loss is nan"}]
    assert summaries(failed)[0].word == "fails" and summaries(failed)[0].failed == ("seed 1: the loss is nan",)


def test_nothing_below_the_noise_floor_is_claimed():
    rows = world()
    table = summaries(rows)
    floor = noise_floor(table)
    assert floor.pairs == 6 and floor.rms == pytest.approx(0.02) and floor.single > floor.largest
    assert floor.over(3) == pytest.approx(floor.single / 3**0.5)
    gap = {each.name: each for each in table}
    assert difference(gap["reverse_kl/opd_plus"], gap["reverse_kl/opd"]) == (pytest.approx(0.01), 3)
    found = {(claim, task): verdict for claim, task, verdict, _ in claims(table)}
    assert found[("OPD+ gains a little for the reverse KL", "arithmetic")] == "does not reproduce"
    better = claims(summaries(world(**{"reverse_kl/opd_plus": 0.7})))
    assert [verdict for claim, _, verdict, _ in better if claim.startswith("OPD+")] == ["reproduces"]
    # A floor above all that the baseline itself gains leaves nothing to compare.
    dull = claims(
        summaries(world(**{"reverse_kl/opd": 0.21, TWINS["reverse_kl/opd"]: 0.21, "reverse_kl/opd_plus": 0.21}))
    )
    assert [verdict for claim, _, verdict, _ in dull if claim.startswith("OPD+")] == ["not resolved"]
    assert noise_floor(summaries([each for each in rows if each["group"] != "twin"])) is None


def test_claims_turn_with_the_rows():
    def verdicts(rows: list[dict]) -> list[str]:
        return [verdict for _, _, verdict, _ in claims(summaries(rows))]

    # In order: two collapses, two that train, two that match the baseline, the gain.
    assert verdicts(world()) == [*["reproduces"] * 4, "does not reproduce", "reproduces", "does not reproduce"]
    turned = {"forward_kl/opd": 0.6, "jsd/opd_plus": 0.0, TWINS["jsd/opd_plus"]: 0.01}
    assert verdicts(world(**turned)) == [
        *("does not reproduce", "reproduces", "reproduces", "does not reproduce"),
        *("does not reproduce", "does not reproduce", "does not reproduce"),
    ]


def test_the_page_says_what_the_rows_say(tmp_path):
    rows = world()
    outcome = Outcome(FULL, rows, {"tools, sign, seed 1": "not run"}, [], [])
    path = write_page(outcome, tmp_path / "docs" / "reproduction.md")
    again, figures = read_outcome(path.with_suffix(".jsonl"))
    assert page_of(again, figures) == path.read_text(encoding="utf-8")
    assert all((path.parent / file).stat().st_size > 1000 for file, _ in figures) and len(figures) == 3
    page = path.read_text(encoding="utf-8")
    assert (
        f"{len(rows)} of the {len(FULL.arms())} runs" in page
        and f"1 of {len(FULL.arms())} runs of the plan have no row" in page
    )
    assert "collapses: below the student's start in 3 of 3 seeds" in page
    other = dataclasses.replace(outcome, rows=world(**{"forward_kl/opd": 0.6}))
    assert "collapses" in page_of(other, figures) and page_of(other, figures) != page


def test_the_committed_page_is_that_of_the_committed_rows():
    path = ROOT / "docs" / "reproduction.md"
    assert page_of(*read_outcome(path.with_suffix(".jsonl"))) == path.read_text(encoding="utf-8"), (
        "regenerate with: opdtheory reproduce --no-run --page docs/reproduction.md"
    )


@pytest.fixture
def tiny(monkeypatch):
    """Untrained models of a small task in the place of the cache's."""
    task = Addition(2)

    def model(seed: int, width: int) -> Transformer:
        built = Transformer(TransformerConfig(width, 1, 2, 64), task.vocabulary, seed=seed)
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in built.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=noise)
        return built

    monkeypatch.setattr(reproduce_arm, "load_pair", lambda *_, **__: (model(0, 8), model(1, 12)))
    monkeypatch.setattr(reproduce_arm, "task_of", lambda _: task)
    return dataclasses.replace(FULL, steps=2, seeds=1, tasks=("arithmetic",), eval_examples=4)


def small(plan, name):
    arm = next(arm for arm in plan.arms() if arm.name == name)
    return dataclasses.replace(arm, fields={**arm.fields, "prompts_per_step": 3, "max_new_tokens": 5})


def test_an_arm_measures_its_start_and_its_end(tiny):
    found = reproduce_arm.run_arm(small(tiny, "forward_kl/opd"), device="cpu")
    assert found["status"] == "finished" and found["curve"]["step"] == [1, 2]
    assert found["bias"]["bias"] == pytest.approx(found["bias"]["predicted_bias"]) and found["bias"]["bias"] > 0.1
    assert found["start"]["step"] == 0 and found["end"]["step"] == 2
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert summaries([found])[0].seeds == (0,)
    more = reproduce_arm.run_arm(small(tiny, "supervised"), device="cpu")
    assert more["bias"] is None and more["objective"] == [None, None]
    whole = reproduce_arm.run_arm(small(tiny, "forward_kl/opd, whole vocabulary"), device="cpu")
    assert whole["bias"] is None and whole["objective"][0] == found["objective"][0]


def test_the_optimal_baseline_leaves_the_least_variance(tiny):
    arm = small(tiny, "reverse_kl/opd, optimal baseline")
    found = reproduce_arm.run_arm(arm, device="cpu")
    best = found["baseline_value"]
    variance = {best: found["bias"]["variance"]}
    for shift in (-1.0, 1.0):
        fields = {**arm.fields, "baseline_value": best + shift}
        variance[best + shift] = reproduce_arm.run_arm(dataclasses.replace(arm, fields=fields), device="cpu")["bias"][
            "variance"
        ]
    assert min(variance, key=variance.get) == best


def test_a_step_that_cannot_be_taken_makes_a_row(tiny, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arm = small(tiny, "jsd/opd_plus")
    arm = dataclasses.replace(arm, fields={**arm.fields, "learning_rate": 1e30, "clip_gradient": None, "steps": 3})
    found = reproduce_arm.run_arm(arm, device="cpu")
    assert found["status"] == "failed" and found["error"]
    assert summaries([found])[0].word == "fails"


# What stands for an arm or a model here: it writes the row at once, or does what the job's name says.
STAND_IN = """
import json, pathlib, sys, time
job = json.load(sys.stdin)
where = pathlib.Path(sys.argv[1])
with open(where / "order", "a") as order:
    order.write(f"{job.get('role', '')}{job.get('arm', {}).get('name', '')}\\n")
name = job.get("arm", {}).get("name", "")
if name == "jsd/opd":
    sys.exit("out of memory")
if name == "jsd/full_vocab":
    time.sleep(60)
if "role" not in job:
    path = pathlib.Path(job["out"])
    row = json.loads((where / "rows" / path.name).read_text())
    path.write_text(json.dumps(row))
"""


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Processes that write made-up rows, and the plan of which they are."""
    (tmp_path / "rows").mkdir()
    plan = dataclasses.replace(
        FULL,
        seeds=1,
        tasks=("arithmetic",),
        divergences=("reverse_kl", "jsd"),
        estimators=("opd", "opd_plus"),
        controls=(),
        twins=(),
    )
    for arm in plan.arms():
        made = {**row(arm.name, WORLD[arm.name]), "identity": arm.identity}
        (tmp_path / "rows" / f"{arm.key}.json").write_text(json.dumps(made))
    monkeypatch.setattr(reproduce_runner, "COMMAND", (sys.executable, "-c", STAND_IN, str(tmp_path)))
    return plan


def test_arms_wait_for_their_models_and_failures_are_told(stand_in, tmp_path):
    lines: list[str] = []
    outcome = reproduce(stand_in, tmp_path / "out", workers=2, cache=str(tmp_path / "cache"), report=lines.append)
    order = (tmp_path / "order").read_text().split()
    assert set(order[:2]) == {"teacher", "student"}
    assert [each["name"] for each in outcome.rows] == ["reverse_kl/opd", "reverse_kl/opd_plus", "jsd/opd_plus"]
    assert outcome.missing == {"arithmetic, jsd/opd, seed 0": "status 1: out of memory"}
    assert any("out of memory" in line for line in lines)
    # Again: what is finished is not run once more, what has no row is.
    (tmp_path / "order").unlink()
    reproduce(stand_in, tmp_path / "out", workers=2, cache=str(tmp_path / "cache"))
    assert "reverse_kl/opd" not in (tmp_path / "order").read_text().split()
    assert "jsd/opd" in (tmp_path / "order").read_text().split()


def test_rows_of_another_configuration_are_not_taken_for_these(stand_in, tmp_path):
    folder = tmp_path / "out" / "arms"
    folder.mkdir(parents=True)
    arm = stand_in.arms()[0]
    path = folder / f"{arm.key}.json"
    made = json.loads((tmp_path / "rows" / path.name).read_text())
    path.write_text(json.dumps(made))
    assert len(stored(stand_in, tmp_path / "out").rows) == 1
    for key, value in (("models", {"student": "x", "teacher": "y"}), ("identity", {**made["identity"], "format": 0})):
        path.write_text(json.dumps({**copy.deepcopy(made), key: value}))
        assert stored(stand_in, tmp_path / "out").rows == []
    path.write_text(json.dumps(made)[:-9])
    assert stored(stand_in, tmp_path / "out").rows == []


def test_rows_beside_a_page_are_adopted_for_the_same_arms_only(stand_in, tmp_path, capsys):
    first = dataclasses.replace(stand_in, divergences=("reverse_kl",))
    page = write_page(reproduce(first, tmp_path / "first", workers=1), tmp_path / "docs" / "page.md")
    rows, out = page.with_suffix(".jsonl"), tmp_path / "second"
    assert adopt(rows, out) == 2 and adopt(rows, out) == 0
    found = stored(stand_in, out)
    assert {each["name"] for each in found.rows} == {"reverse_kl/opd", "reverse_kl/opd_plus"}
    assert len(found.missing) == 2 and found.sessions == stored(first, tmp_path / "first").sessions
    longer = dataclasses.replace(stand_in, steps=stand_in.steps + 1)
    assert stored(longer, out).rows == []
    assert main(["reproduce", "--no-run", "--adopt", str(tmp_path / "none.jsonl"), "--out", str(out)]) == 2
    assert "none.jsonl" in capsys.readouterr().err


def test_an_interrupt_ends_the_processes_and_keeps_the_rows(stand_in, tmp_path, monkeypatch):
    plan = dataclasses.replace(stand_in, estimators=("opd_plus", "full_vocab"), divergences=("jsd",))
    started = time.perf_counter()

    def interrupt(line: str) -> None:
        if "jsd/opd_plus" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reproduce(plan, tmp_path / "out", workers=2, cache=str(tmp_path / "cache"), report=interrupt)
    assert time.perf_counter() - started < 30
    assert [each["name"] for each in stored(plan, tmp_path / "out").rows] == ["jsd/opd_plus"]


def test_a_termination_ends_the_processes_too(stand_in, tmp_path, monkeypatch, capsys):
    plan = dataclasses.replace(stand_in, estimators=("full_vocab",), divergences=("jsd",))
    monkeypatch.setattr("opdtheory.commands.reproduce.plan_of", lambda *_, **__: plan)
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    started = time.perf_counter()
    assert main(["reproduce", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]) == 1
    assert time.perf_counter() - started < 30
    assert "stopped" in capsys.readouterr().err and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_command_writes_the_page_of_what_is_there(stand_in, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("opdtheory.commands.reproduce.plan_of", lambda *_, **__: stand_in)
    out = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    assert main(["reproduce", "--no-run", *out]) == 1
    assert "no row" in capsys.readouterr().err
    assert main(["reproduce", "--workers", "2", *out]) == 1  # one arm fails
    printed = capsys.readouterr()
    assert "trains: above" in printed.out and "out of memory" in printed.err
    assert "3 of the 4 runs" in (tmp_path / "out" / "reproduction.md").read_text(encoding="utf-8")
    assert main(["reproduce", "--no-run", "--json", *out]) == 0
    assert [each["name"] for each in json.loads(capsys.readouterr().out)][0] == "reverse_kl/opd"
    monkeypatch.undo()
    assert main(["reproduce", "--seeds", "0", *out]) == 2
