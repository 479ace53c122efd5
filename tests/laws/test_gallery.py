"""The gallery beyond TRL and torchrl: verdicts pinned, the page kept to them, and evidence that is no audit.

Packages that are not installed are held to what `make gallery` recorded of them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import opdtheory as opd
from examples.published_losses import claims_packages, claims_papers, gallery, papers
from examples.published_losses.entry import OURS
from opdtheory.adapters import from_advantage
from tests.tolerances import ALGEBRA, ENUMERATION

audit = functools.partial(opd.audit, details=False)


RECORDS = json.loads(gallery.RECORD.read_text(encoding="utf-8"))
ENTRY = {entry.function: entry for entry in gallery.ENTRIES}

# Verdict, what it descends, and for a biased one the cosine to two digits.
SCALED, OTHER, BIASED = "exact_up_to_scale", "other_objective", "biased"
Pins = dict[str, tuple[str, str | None, float | None]]
EXPECTED: Pins = {
    "liger_jsd_0": (SCALED, "forward_kl", None),
    "liger_jsd_0_5": (SCALED, "skew_jsd(beta=0.5)", None),
    "liger_jsd_1": (SCALED, "reverse_kl", None),
    "liger_jsd_default": (SCALED, "skew_jsd(beta=0.5)", None),
    "swift_gkd_0": (SCALED, "forward_kl", None),
    "swift_gkd_0_1": (SCALED, "skew_jsd(beta=0.1)", None),
    "swift_gkd_0_5": (SCALED, "skew_jsd(beta=0.5)", None),
    "swift_gkd_1": (SCALED, "reverse_kl", None),
    "swift_gkd_top_2": (BIASED, None, 0.56),
    "twinkle_gkd_0": (SCALED, "forward_kl", None),
    "twinkle_gkd_0_5": (SCALED, "skew_jsd(beta=0.5)", None),
    "twinkle_gkd_1": (SCALED, "reverse_kl", None),
    "twinkle_gkd_top_2": (BIASED, None, 0.56),
    "verl_k3_loss": (BIASED, None, 0.81),
    "verl_k1_reward": (SCALED, "reverse_kl", None),
    "verl_k3_reward": (BIASED, None, -0.01),
    "verl_k2_loss": (SCALED, "reverse_kl", None),
    "verl_k1_loss": ("zero", None, None),
    "verl_abs_reward": (BIASED, None, 0.26),
    "verl_forward_kl_top_2": (BIASED, None, 0.64),
    "verl_kl_k3": (BIASED, None, 0.81),
    "verl_kl_k3_plus": ("exact", "reverse_kl", None),
    "verl_kl_k1_plus": ("exact", "reverse_kl", None),
    "verl_kl_abs": (OTHER, "total_variation", None),
    "openrlhf_k3": (BIASED, None, 0.81),
    "openrlhf_k2": (BIASED, None, 0.33),
    "openrlhf_k3_unbiased": (SCALED, "reverse_kl", None),
    "tinker_opd": ("exact", "reverse_kl", None),
    "tinker_opd_discounted": ("exact", "reverse_kl", None),
    "textbrewer_kd_ce": (SCALED, "forward_kl", None),
    "textbrewer_kd_ce_hot": (BIASED, None, 0.88),
    "textbrewer_kd_mse": (BIASED, None, 0.45),
    "torchdistill_kd": (SCALED, "forward_kl", None),
    "thinking_machines_opd": ("exact", "reverse_kl", None),
    "minillm": ("exact", "reverse_kl", None),
    "minillm_normalised": (BIASED, None, 0.93),
    "minillm_discounted": (BIASED, None, 0.99),
    "gkd": ("exact", "skew_jsd(beta=0.3)", None),
    "distillm_skew_kl": ("exact", "skew_forward_kl(lam=0.1)", None),
    "distillm_skew_reverse_kl": ("exact", "skew_reverse_kl(lam=0.1)", None),
    "power_opd_1": (BIASED, None, 0.80),
    "power_opd_5": (BIASED, None, 0.48),
    "tv_opd": (SCALED, "total_variation", None),
    "vopd": ("exact", "reverse_kl", None),
    "vopd_top_2": ("exact", "reverse_kl", None),
    "grpo_k3": (OTHER, "forward_kl", None),
    "grpo_k3_corrected": ("exact", "reverse_kl", None),
    "top_2_forward_kl": (BIASED, None, 0.53),
    "top_2_forward_kl_renormalised": (BIASED, None, 0.56),
    "top_2_forward_kl_tail": (BIASED, None, 0.96),
    "top_2_reverse_kl": (BIASED, None, -0.49),
}


# Test files that pin further modules of losses in an `EXPECTED` of their own, in the order of the gallery.
PINNED_ELSEWHERE = ("test_gallery_tokens", "test_gallery_rollouts")


def check(found: dict[str, object], function: str, expected: Pins = EXPECTED) -> None:
    verdict, descends, cosine = expected[function]
    assert (found["verdict"], found["descends"]) == (verdict, descends)
    if cosine is not None:
        assert float(str(found["cosine"])) == pytest.approx(cosine, abs=0.0051)


def test_every_entry_is_pinned_and_recorded():
    pinned = list(EXPECTED)
    for name in PINNED_ELSEWHERE:
        pinned += importlib.import_module(f"tests.laws.{name}").EXPECTED
    assert pinned == [entry.function for entry in gallery.ENTRIES if entry not in gallery.IN_README]
    assert list(RECORDS) == [entry.function for entry in gallery.ENTRIES]


def test_every_module_of_claims_is_in_the_gallery():
    names = sorted(path.stem for path in Path(gallery.__file__).parent.glob("claims_*.py"))
    modules = [importlib.import_module(f"examples.published_losses.{name}") for name in names]
    claimed = [entry.function for module in modules for entry in module.ENTRIES]
    assert sorted(claimed) == sorted(entry.function for entry in gallery.ENTRIES) and len(set(claimed)) == len(claimed)


@pytest.mark.parametrize("function", EXPECTED)
def test_the_record_says_what_is_pinned(function):
    check(RECORDS[function], function)


def test_the_page_shows_the_record_and_nothing_else():
    table = gallery.between_markers(gallery.PAGE.read_text(encoding="utf-8"))
    assert table == gallery.page(RECORDS), "regenerate with: make gallery"
    assert sum(line.startswith("| ") for line in table.splitlines()) == len(gallery.ENTRIES) + 2 * table.count("### ")


INSTALLED = [e for e in (*claims_packages.ENTRIES, *claims_papers.ENTRIES) if e.version is not None]


@pytest.fixture(scope="module", params=INSTALLED, ids=lambda entry: entry.function)
def audited(request: pytest.FixtureRequest) -> Iterator[tuple[gallery.Entry, opd.Audit]]:
    yield request.param, request.param.audit()


# Importing the packages warns of what they import.
@pytest.mark.filterwarnings("default")
def test_an_audit_of_today_finds_what_is_recorded(audited):
    entry, audit = audited
    assert gallery.record(entry, audit) == RECORDS[entry.function], "regenerate with: make gallery"


def swapped(r: opd.Rollouts) -> torch.Tensor:
    return from_advantage(lambda log_p, log_q: log_p - log_q, detach=True, importance_ratio=True)(r)


# Each twin is an estimator got slightly wrong; what passes for the right one must refuse it.
TWINS = {
    "arguments swapped": ("thinking_machines_opd", swapped),
    "later tokens forgotten": ("minillm", papers.vopd),
    "signs instead of log-ratios": ("vopd", papers.tv_opd),
    "ratio forgotten": ("grpo_k3_corrected", papers.grpo_k3),
    "the other skew": ("distillm_skew_kl", papers.distillm_skew_reverse_kl),
    "renormalised": ("top_2_forward_kl", papers.top_2_forward_kl_renormalised),
    "another order": ("power_opd_5", papers.power_opd_1),
    "sign flipped": ("gkd", lambda r: -papers.gkd(r)),
}


@pytest.mark.parametrize("twin", TWINS)
def test_the_same_assertions_refuse_a_false_twin(twin):
    function, loss = TWINS[twin]
    entry = ENTRY[function]
    found = audit(loss, opd.divergence(entry.objective, **entry.parameters), entry.granularity)
    with pytest.raises(AssertionError):
        check(gallery.record(entry, found), function)


# What follows is the evidence: what is said of a loss beyond its verdict, derived by hand.


def one_step(*rows: torch.Tensor) -> list[opd.TabularPolicy]:
    return [opd.TabularPolicy([row.log().unsqueeze(0)]) for row in rows]


def random_rows(vocab_size: int, seed: int, scale: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p, q = (scale * torch.randn(2, vocab_size, generator=generator, dtype=torch.float64)).softmax(-1)
    return p, q


def gradient(loss, p: torch.Tensor, q: torch.Tensor, behavior: torch.Tensor | None = None) -> torch.Tensor:
    student, teacher = one_step(p, q)
    sampler = None if behavior is None else one_step(behavior)[0]
    return opd.expected_gradient(loss, student, teacher, behavior=sampler)[0][0]


@pytest.mark.parametrize(("loss", "alpha"), [(papers.power_opd_1, 1.0), (papers.power_opd_5, 5.0)])
def test_power_opd_descends_the_density_power_divergence(loss, alpha):
    p, q = random_rows(5, seed=1)
    logits = p.log().requires_grad_()
    distribution = logits.softmax(-1)
    divergence = (
        (distribution ** (alpha + 1) + alpha * q ** (alpha + 1)) / (alpha + 1) - distribution * q**alpha
    ).sum()
    (derived,) = torch.autograd.grad(divergence, logits)
    assert gradient(loss, p, q) == pytest.approx(derived, abs=ALGEBRA)
    assert float(divergence.detach()) > 0
    assert gradient(loss, q, q) == pytest.approx(torch.zeros_like(q), abs=ALGEBRA)


@pytest.mark.parametrize("loss", [papers.power_opd_1, papers.power_opd_5])
def test_power_opd_is_no_density_power_divergence_of_another_order(loss):
    p, q = random_rows(5, seed=1)
    logits = p.log().requires_grad_()
    distribution = logits.softmax(-1)
    (derived,) = torch.autograd.grad((distribution**4 / 4 - distribution * q**3).sum(), logits)
    assert float((gradient(loss, p, q) - derived).norm()) > 1e-3


def test_minillm_is_the_token_local_reverse_kl_at_discount_0_and_the_sequences_at_1():
    student = opd.TabularPolicy.random(vocab_size=3, horizon=3, eos=0, seed=0)
    teacher = opd.TabularPolicy.random(vocab_size=3, horizon=3, eos=0, seed=1)

    def at(gamma: float) -> torch.Tensor:
        levels = opd.expected_gradient(lambda r: papers._minillm(r, papers._later(r, gamma)), student, teacher)
        return torch.cat([level.flatten() for level in levels])

    def exact(objective: str) -> torch.Tensor:
        levels = opd.exact_gradient(student, teacher, "reverse_kl", objective)
        return torch.cat([level.flatten() for level in levels])

    assert at(0.0) == pytest.approx(exact("token_local"), abs=ENUMERATION)
    assert at(1.0) == pytest.approx(exact("sequence"), abs=ENUMERATION)
    for objective in ("token_local", "sequence"):
        assert float(torch.cosine_similarity(at(0.5), exact(objective), dim=0)) < 0.9999


def test_truncated_forward_kl_rests_at_the_renormalised_teacher_only_without_a_tail():
    q = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    # Mass outside the top tokens is kept tiny: zero has no logit.
    epsilon = 1e-9
    at_minimum = torch.tensor([0.625, 0.375, epsilon, epsilon], dtype=torch.float64)
    at_minimum = at_minimum / at_minimum.sum()
    assert float(gradient(papers.top_2_forward_kl, at_minimum, q).norm()) < 1e-8
    assert float(gradient(papers.top_2_forward_kl, q, q).norm()) > 0.05
    assert float(gradient(papers.top_2_forward_kl_tail, q, q).norm()) < ALGEBRA
    spread = torch.tensor([0.5, 0.3, 0.05, 0.15], dtype=torch.float64)
    assert float(gradient(papers.top_2_forward_kl_tail, spread, q).norm()) < ALGEBRA


def test_truncated_reverse_kl_pushes_mass_off_the_top_tokens():
    q = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    on_top = gradient(papers.top_2_reverse_kl, q, q)[:2]
    assert float(on_top.min()) > 0.05  # descending lowers both
    top = q[:2] / math.e
    p = torch.cat([top, (1 - top.sum()) * torch.tensor([0.4, 0.6], dtype=torch.float64)])
    assert float(gradient(papers.top_2_reverse_kl, p, q).norm()) < ALGEBRA


def kept(distribution: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    return distribution[top]


def within(distribution: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    return distribution[top] / distribution[top].sum()


def with_the_rest(distribution: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    return torch.cat([distribution[top], 1 - distribution[top].sum().unsqueeze(0)])


# What each follows, with the set of tokens held fixed: the divergence, of which part of the
# distributions, and whose top 2.
TRUNCATED = {
    "sdpo_top_2": ("reverse_kl", within, "student"),
    "sdpo_top_2_tail": ("reverse_kl", with_the_rest, "student"),
    "server_forward_top_2_tail": ("forward_kl", with_the_rest, "teacher"),
    "swift_gkd_top_2": ("jsd", within, "teacher"),
    "twinkle_gkd_top_2": ("jsd", within, "teacher"),
    "verl_forward_kl_top_2": ("forward_kl", kept, "teacher"),
    "top_2_forward_kl": ("forward_kl", kept, "teacher"),
    "top_2_forward_kl_renormalised": ("forward_kl", within, "teacher"),
    "top_2_forward_kl_tail": ("forward_kl", with_the_rest, "teacher"),
    "top_2_reverse_kl": ("reverse_kl", kept, "teacher"),
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("function", TRUNCATED)
def test_a_truncated_divergence_is_followed_with_its_set_held_fixed(function):
    entry = ENTRY[function]
    if entry.version is None:
        pytest.skip(f"{entry.package} is not installed; `make gallery` does")
    name, _, whose = TRUNCATED[function]
    p, q = random_rows(5, seed=2)
    top = (p if whose == "student" else q).topk(2).indices
    assert set(top.tolist()) != set((q if whose == "student" else p).topk(2).indices.tolist())
    actual = gradient(entry.loss, p, q)
    for part in (kept, within, with_the_rest):
        logits = p.log().requires_grad_()
        ours, theirs = part(logits.softmax(-1), top), part(q, top)
        value = (ours * opd.divergence(name).generator(theirs.log() - ours.log())).sum()
        (derived,) = torch.autograd.grad(value, logits)
        assert (float((actual - derived).norm()) < 1e-5) is (part is TRUNCATED[function][1])


def test_corrections_hold_on_stale_rollouts_and_their_absence_does_not():
    p, q = random_rows(4, seed=5)
    stale, _ = random_rows(4, seed=6)
    exact = opd.exact_gradient(*one_step(p, q), "reverse_kl")[0][0]
    for loss in (papers.grpo_k3_corrected, papers.thinking_machines_opd):
        assert gradient(loss, p, q, behavior=stale) == pytest.approx(exact, abs=ALGEBRA)
    for loss in (papers.vopd, papers.grpo_k3):
        assert float((gradient(loss, p, q, behavior=stale) - exact).norm() / exact.norm()) > 0.1


# A pair with log-ratios on both sides of both clamps.
FAR = (
    torch.tensor([0.30, 0.002, 0.398, 0.30], dtype=torch.float64),
    torch.tensor([0.002, 0.30, 0.398, 0.30], dtype=torch.float64),
)


def k2(log_u: torch.Tensor) -> torch.Tensor:
    return log_u**2 / 2


def k3(log_u: torch.Tensor) -> torch.Tensor:
    return log_u.expm1() - log_u


# The weight as said in the gallery, and the one without the clamp. A loss v(log u) per token has the weight v'(log u),
# and none where it is clamped; a reward has itself for a weight, and its own value at the clamp.
CLAMPED = {
    "verl_kl_k3": (lambda t: torch.where(k3(t) > 10, 0.0, t.expm1()), torch.expm1),
    "openrlhf_k3": (lambda t: torch.where(k3(t) > 10, 0.0, t.expm1()), torch.expm1),
    "openrlhf_k2": (lambda t: torch.where(k2(t) > 10, 0.0, t), lambda t: t),
    "verl_k3_reward": (lambda t: -k3(t).clamp(max=10), lambda t: -k3(t)),
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("function", CLAMPED)
def test_a_clamp_moves_the_weight_only_where_it_bites(function):
    entry = ENTRY[function]
    if entry.version is None:
        pytest.skip(f"{entry.package} is not installed; `make gallery` does")
    p, q = FAR
    log_u = q.log() - p.log()
    actual = gradient(entry.loss, p, q)
    for weight, holds in zip(CLAMPED[function], (True, False), strict=True):
        values = weight(log_u)
        derived = -p * (values - (p * values).sum())
        assert (float((actual - derived).norm()) < 1e-5) is holds


def plain(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"[`#\"']", "", text)).strip()


@functools.cache
def sources(package: str) -> str:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    files = Path(spec.submodule_search_locations[0]).rglob("*.py")
    return plain(" ".join(file.read_text(encoding="utf-8", errors="ignore") for file in files))


def test_every_claim_rests_on_words_of_the_package():
    quoted = [entry for entry in gallery.ENTRIES if entry.quote and entry.version is not None]
    for entry in quoted:
        for part in entry.quote.split("[...]"):
            assert plain(part) in sources(entry.source.split(".")[0]), entry.function
    assert plain("words that nobody wrote") not in sources("trl")
    assert all(entry.quote or entry.package == OURS for entry in gallery.ENTRIES)
