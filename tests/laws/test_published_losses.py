"""What the audit finds in the losses of TRL and torchrl, pinned, with independent evidence for each surprise."""

from __future__ import annotations

import dataclasses
import functools
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import opdtheory as opd
from examples.published_losses import gallery, torchrl_losses, trl_losses
from tests.sparse import some
from tests.tolerances import ALGEBRA, ENUMERATION

audit = functools.partial(opd.audit, details=False)


ROOT = Path(__file__).resolve().parents[2]
ENTRY = {entry.function: entry for entry in gallery.IN_README}

# The panel's rollouts have three tokens: a mean over tokens is a third of the sum.
MEAN = 1 / 3


@dataclasses.dataclass(frozen=True)
class Expected:
    """What an audit must say; `bias` and `cosine` to two digits, everything else in full."""

    verdict: str
    descends: tuple[str, dict[str, float]] | None = None
    scale: float | None = None
    at_variable_lengths: str | None = None
    bias: float | None = None
    cosine: float | None = None


def up_to_scale(objective: str, lengths: str, scale: float = MEAN, **parameters: float) -> Expected:
    return Expected("exact_up_to_scale", (objective, parameters), scale, lengths)


EXPECTED = {
    "gkd_jsd_0": up_to_scale("forward_kl", "biased"),
    "gkd_jsd_0_1": up_to_scale("skew_jsd", "biased", beta=0.1),
    "gkd_jsd_0_5": up_to_scale("skew_jsd", "biased", beta=0.5),
    "gkd_jsd_0_9": up_to_scale("skew_jsd", "biased", beta=0.9),
    "gkd_jsd_1": up_to_scale("reverse_kl", "biased"),
    "distillation_chunked_1": up_to_scale("reverse_kl", "biased"),
    "sdpo_sampled_token": up_to_scale("reverse_kl", "biased"),
    "sdpo_full_logits": up_to_scale("reverse_kl", "biased"),
    "sdpo_top_2": Expected("biased", bias=0.88, cosine=0.55),
    "sdpo_top_2_tail": Expected("biased", bias=0.88, cosine=0.52),
    "iw_opd": Expected("biased", bias=0.52, cosine=0.998),
    "server_top_1_tail": Expected("biased", bias=0.89, cosine=0.92),
    "server_top_1": Expected("zero"),
    "server_jsd_tail": Expected("biased", bias=0.79, cosine=0.91),
    "server_forward_top_2_tail": Expected("biased", bias=0.70, cosine=0.96),
    "async_forward_all": up_to_scale("forward_kl", "biased"),
    "async_sampled_tail": Expected("biased", bias=0.89, cosine=0.92),
    "gold_hybrid_0_5": Expected("biased", bias=9.5, cosine=0.20),
    "gold_hybrid_1": Expected("biased", bias=9.4, cosine=0.14),
    "grpo_kl": up_to_scale("reverse_kl", "exact_up_to_scale"),
    "grpo_kl_uncorrected": Expected("other_objective", ("forward_kl", {}), MEAN, "exact_up_to_scale"),
    "k3_reverse": Expected("other_objective", ("forward_kl", {}), 1.0, "exact"),
    "distillation_reverse": Expected("other_objective", ("forward_kl", {}), MEAN, "biased"),
    "distillation_forward": Expected("other_objective", ("neyman_chi2", {}), MEAN / 2, "biased"),
    "grpo_kl_to_ref": Expected("other_objective", ("forward_kl", {}), MEAN, "exact_up_to_scale"),
}


def check(audit: opd.Audit, expected: Expected) -> None:
    assert audit.verdict == expected.verdict
    if expected.descends is None:
        assert audit.descends is None
    else:
        objective, parameters = expected.descends
        assert audit.identified is not None
        assert audit.identified["objective"] == objective
        assert audit.identified["granularity"] == "token_local"
        assert audit.identified["parameters"] == pytest.approx(parameters, abs=1e-9)
        assert audit.identified["scale"] == pytest.approx(expected.scale, rel=audit.tolerance)
    lengths = audit.variable_lengths
    assert (None if lengths is None else lengths["verdict"]) == expected.at_variable_lengths
    if expected.bias is not None:
        assert audit.relative_bias == pytest.approx(expected.bias, rel=0.01)
        assert audit.cosine == pytest.approx(expected.cosine, abs=0.005)


# One entry after the other, so that the two tests of an entry share its audit.
@pytest.fixture(scope="module", params=some(gallery.IN_README, 6), ids=lambda entry: entry.function)
def audited(request: pytest.FixtureRequest) -> Iterator[tuple[gallery.Entry, opd.Audit]]:
    yield request.param, request.param.audit()


def test_the_audit_finds_what_is_pinned(audited):
    entry, audit = audited
    check(audit, EXPECTED[entry.function])
    assert audit.seconds < 20  # the first audit of a package imports it


def test_the_readme_shows_the_entry(audited):
    entry, audit = audited
    table = gallery.between_markers((ROOT / "README.md").read_text(encoding="utf-8"))
    rows = table.splitlines()[2:]
    assert rows[gallery.IN_README.index(entry)] == gallery.row(entry, audit), (
        "regenerate with: python examples/published_losses/gallery.py --write README.md"
    )


def test_the_readme_shows_nothing_else():
    table = gallery.between_markers((ROOT / "README.md").read_text(encoding="utf-8"))
    rows = table.splitlines()[2:]
    assert len(rows) == len(gallery.IN_README)
    assert table == gallery.table(rows)


def test_every_entry_is_pinned():
    assert list(EXPECTED) == [entry.function for entry in gallery.IN_README]


def swapped(r: opd.Rollouts) -> opd.Rollouts:
    return dataclasses.replace(r, student_logits=r.teacher_logits, teacher_logits=r.student_logits)


# Each twin is a published loss used wrongly; the assertions that pass for the right use must refuse it.
TWINS: dict[str, tuple[str, Callable[[opd.Rollouts], torch.Tensor]]] = {
    "sign flipped": ("gkd_jsd_1", lambda r: -trl_losses.gkd_jsd_1(r)),
    "arguments swapped at an end": ("gkd_jsd_0", lambda r: trl_losses.gkd_jsd_0(swapped(r))),
    "arguments swapped between": ("gkd_jsd_0_1", lambda r: trl_losses.gkd_jsd_0_1(swapped(r))),
    "a neighbouring beta": ("gkd_jsd_0_1", trl_losses.gkd_jsd(0.1001)),
    "sampled token with its weight negated": ("sdpo_sampled_token", lambda r: -trl_losses.sdpo_sampled_token(r)),
    "the other direction of k3": ("k3_reverse", torchrl_losses.k3_forward),
    "mean taken for a sum": ("k3_reverse", torchrl_losses.grpo_kl_to_ref),
    "correction left out": ("grpo_kl", trl_losses.grpo_kl_uncorrected),
    "bucket left out": ("server_top_1_tail", trl_losses.server_top_1),
}


_QUICK_TWINS = ("sign flipped", "a neighbouring beta", "mean taken for a sum", "bucket left out")


@pytest.mark.parametrize(
    "twin", [twin if twin in _QUICK_TWINS else pytest.param(twin, marks=pytest.mark.slow) for twin in TWINS]
)
def test_the_same_assertions_refuse_a_false_twin(twin):
    function, loss = TWINS[twin]
    entry = ENTRY[function]
    found = audit(loss, opd.divergence(entry.objective, **entry.parameters), entry.granularity)
    with pytest.raises(AssertionError):
        check(found, EXPECTED[function])


def test_swapping_the_arguments_of_the_jsd_reflects_beta():
    found = audit(lambda r: trl_losses.gkd_jsd_0_1(swapped(r)), opd.divergence("skew_jsd", beta=0.9))
    check(found, EXPECTED["gkd_jsd_0_9"])


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        pytest.param("distillation_chunked_0", up_to_scale("forward_kl", "biased"), marks=pytest.mark.slow),
        ("distillation_chunked_0_5", up_to_scale("skew_jsd", "biased", beta=0.5)),
        ("iw_opd_unweighted", up_to_scale("reverse_kl", "biased")),
        ("iw_opd_jsd_top_2", EXPECTED["sdpo_top_2"]),
        ("iw_opd_jsd_top_2_tail", EXPECTED["sdpo_top_2_tail"]),
        ("k3_forward", Expected("other_objective", ("neyman_chi2", {}), 0.5, "exact_up_to_scale")),
    ],
)
def test_adapters_outside_the_gallery(function, expected):
    module = torchrl_losses if function.startswith("k3") else trl_losses
    objective, parameters = expected.descends or ("reverse_kl", {})
    claim = "forward_kl" if function == "k3_forward" else opd.divergence(objective, **parameters)
    check(audit(getattr(module, function), claim), expected)


# What follows is the evidence: each surprise derived by hand and compared with the enumeration.


def one_step(*rows: torch.Tensor) -> list[opd.TabularPolicy]:
    return [opd.TabularPolicy([row.log().unsqueeze(0)]) for row in rows]


def random_rows(vocab_size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(2, vocab_size, generator=generator, dtype=torch.float64)
    p, q = logits.softmax(-1)
    return p, q


def one_step_gradient(loss, p, q, behavior=None) -> torch.Tensor:
    student, teacher = one_step(p, q)
    if behavior is not None:
        (behavior,) = one_step(behavior)
    return opd.expected_gradient(loss, student, teacher, behavior=behavior)[0][0]


def exact_one_step(objective, p, q) -> torch.Tensor:
    return opd.exact_gradient(*one_step(p, q), objective)[0][0]


def flat(levels: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([level.flatten() for level in levels])


@pytest.mark.parametrize(("end", "near", "limit"), [(0, 1e-3, "forward_kl"), (1, 1 - 1e-3, "reverse_kl")])
def test_the_generalised_jsd_jumps_at_its_end_points(end, near, limit):
    # T12: D_beta tends to 0 with its gradient, D_beta / min(beta, 1 - beta) to the KL that beta = 0 or 1 returns.
    student = opd.TabularPolicy.random(vocab_size=3, horizon=2, seed=0)
    teacher = opd.TabularPolicy.random(vocab_size=3, horizon=2, seed=1)
    inside = flat(opd.expected_gradient(trl_losses.gkd_jsd(near), student, teacher))
    at_end = flat(opd.expected_gradient(trl_losses.gkd_jsd(end), student, teacher))
    exact = flat(opd.exact_gradient(student, teacher, limit)) / 2
    assert at_end == pytest.approx(exact, abs=ENUMERATION)
    assert float(at_end.norm() / inside.norm()) == pytest.approx(1e3, rel=0.01)
    assert 1e3 * inside == pytest.approx(exact, abs=0.01 * float(exact.norm()))


@pytest.mark.parametrize("vocab_size", [2, 3, 6])
def test_the_sampled_token_and_its_complement_descend_no_kl(vocab_size):
    # Per sampled token a the loss is the binary KL of p_a against q_a, whose slope in p_a is logit p_a - logit q_a.
    # Weighted by the sampling probability: sum_a p_a (logit p_a - logit q_a) dp_a, the differential of
    # sum_a [p_a^2 (logit p_a - logit q_a) + p_a + log(1 - p_a)] / 2.
    p, q = random_rows(vocab_size, seed=1)
    logits = p.log().requires_grad_()
    distribution = logits.softmax(-1)
    potential = (
        distribution**2 * (distribution.logit() - q.logit()) + distribution + (1 - distribution).log()
    ).sum() / 2
    (derived,) = torch.autograd.grad(potential, logits)
    gradient = one_step_gradient(trl_losses.server_top_1_tail, p, q)
    assert gradient == pytest.approx(derived, abs=ALGEBRA)
    reverse_kl = exact_one_step("reverse_kl", p, q)
    if vocab_size == 2:
        assert gradient == pytest.approx(reverse_kl, abs=ALGEBRA)
    else:
        assert float((gradient - reverse_kl).norm() / reverse_kl.norm()) > 0.1


def test_near_the_teacher_the_bucket_corrects_a_token_p_over_one_minus_p_times_as_hard():
    # Near the teacher the weight is -dp_a / (1 - p_a) against -dp_a / p_a for the reverse KL.
    q = torch.tensor([0.5, 0.499, 0.001], dtype=torch.float64)
    p = q + 1e-6 * torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)

    def rare_over_common(gradient):
        weight = -gradient / p
        return float((weight[2] - weight[1]) / (weight[0] - weight[1]))

    bucket = rare_over_common(one_step_gradient(trl_losses.server_top_1_tail, p, q))
    reverse_kl = rare_over_common(exact_one_step("reverse_kl", p, q))
    assert bucket / reverse_kl == pytest.approx(0.001 / 0.999, rel=0.01)


def test_that_loss_is_what_the_teacher_server_trainer_does_by_default():
    from trl.experimental.server_distillation import ServerDistillationConfig

    fields = ServerDistillationConfig.__dataclass_fields__
    defaults = {name: fields[name].default for name in ("beta", "loss_top_k", "loss_add_tail")}
    assert defaults == {"beta": 1.0, "loss_top_k": 1, "loss_add_tail": True}


def test_renormalising_a_single_token_leaves_no_gradient_at_all():
    p, q = random_rows(4, seed=3)
    assert torch.count_nonzero(one_step_gradient(trl_losses.server_top_1, p, q)) == 0


def test_top_k_without_the_tail_does_not_see_how_much_lies_in_it():
    # T9: the teacher's distribution on the top two, but 30% instead of 70% of the mass outside.
    q = torch.tensor([0.2, 0.1, 0.4, 0.3], dtype=torch.float64)
    p = torch.tensor([0.7 * 2 / 3, 0.7 / 3, 0.3 * 0.5, 0.3 * 0.5], dtype=torch.float64)
    assert float(one_step_gradient(trl_losses.sdpo_top_2, p, q).norm()) < ALGEBRA
    assert float(exact_one_step("reverse_kl", p, q).norm()) > 0.1
    assert float(one_step_gradient(trl_losses.sdpo_top_2_tail, p, q).norm()) > 0.1


def test_iw_opd_weighs_a_token_by_what_is_sampled_after_it():
    student = opd.TabularPolicy.random(vocab_size=4, horizon=3, seed=0)
    teacher = opd.TabularPolicy.random(vocab_size=4, horizon=3, seed=1)
    actual = opd.expected_gradient(trl_losses.iw_opd, student, teacher)
    exact = opd.exact_gradient(student, teacher, "reverse_kl")
    # The first token weighs 1 + gamma whatever follows; a later one depends, through the total, on itself and on
    # its future: not even the direction at one history is that of the reverse KL, which no prefix weight would turn.
    assert 3 * actual[0] == pytest.approx(1.5 * exact[0], abs=ENUMERATION)
    for level in (1, 2):
        cosine = torch.cosine_similarity(actual[level], exact[level], dim=-1)
        assert 0.99 < float(cosine.min()) < 1 - 1e-5
    # Its weights are positive, so the teacher stays a fixed point.
    assert float(flat(opd.expected_gradient(trl_losses.iw_opd, teacher, teacher)).norm()) < ENUMERATION


def test_gold_pushes_mass_off_the_shared_tokens_at_beta_1():
    # On the shared tokens S the reverse KL is not renormalised (T9 b). With a share a = |S|/V of the loss and mass m
    # on S it is a m log(m/q(S)) + (1 - a) |m - q(S)|: for a > 1/2 least at m = q(S) exp((1 - 2a)/a).
    _, q = random_rows(4, seed=3)
    at_teacher = one_step_gradient(trl_losses.gold_hybrid_1, q, q)
    assert float(at_teacher[3]) < -0.1 * float(q[3])
    assert float(one_step_gradient(trl_losses.gold_hybrid_0_5, q, q).norm()) < ALGEBRA

    share = 3 / 4
    shared = q[:3] * math.exp((1 - 2 * share) / share)
    p = torch.cat([shared, 1 - shared.sum().unsqueeze(0)])
    assert float(one_step_gradient(trl_losses.gold_hybrid_1, p, q).norm()) < ALGEBRA


def test_the_forward_direction_of_torchrl_is_right_on_the_teachers_rollouts():
    student = opd.TabularPolicy.random(vocab_size=3, horizon=3, seed=0)
    teacher = opd.TabularPolicy.random(vocab_size=3, horizon=3, seed=1)
    actual = flat(opd.expected_gradient(torchrl_losses.k3_forward, student, teacher, behavior=teacher))
    exact = flat(opd.exact_gradient(student, teacher, "forward_kl", objective="sequence"))
    assert actual == pytest.approx(exact, abs=ENUMERATION)
    on_student = flat(opd.expected_gradient(torchrl_losses.k3_forward, student, teacher))
    chi2 = flat(opd.exact_gradient(student, teacher, "neyman_chi2")) / 2
    assert on_student == pytest.approx(chi2, abs=ENUMERATION)


def test_grpo_keeps_the_reverse_kl_on_stale_rollouts():
    p, q = random_rows(4, seed=5)
    stale, _ = random_rows(4, seed=6)
    exact = exact_one_step("reverse_kl", p, q)
    assert one_step_gradient(trl_losses.grpo_kl, p, q, behavior=stale) == pytest.approx(exact, abs=ALGEBRA)
    uncorrected = one_step_gradient(trl_losses.grpo_kl_uncorrected, p, q, behavior=stale)
    assert float((uncorrected - exact).norm() / exact.norm()) > 0.1


def test_importing_the_adapters_loads_neither_package():
    code = (
        "import sys; from examples.published_losses import gallery, torchrl_losses, trl_losses; "
        "print(sorted({'trl', 'torchrl', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_write_replaces_what_stands_between_the_markers(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"before\n{gallery.START}\nold\n{gallery.END}\nafter\n", encoding="utf-8")
    gallery.write(path, gallery.table(["| new |"]))
    text = path.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert gallery.between_markers(text) == gallery.table(["| new |"])
    path.write_text("no markers", encoding="utf-8")
    with pytest.raises(ValueError, match="gallery:start"):
        gallery.write(path, "")
