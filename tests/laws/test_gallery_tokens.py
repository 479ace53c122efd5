"""The token-level losses of 2025 and 2026: verdicts pinned, and evidence for each finding that is no audit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch

import opdtheory as opd
from examples.published_losses import claims_tokens, gallery, papers, papers_tokens
from opdtheory.adapters import from_advantage, from_logprobs
from opdtheory.errors import NotFiniteError
from tests.laws.test_gallery import ENTRY, RECORDS, Pins, audit, check, gradient, one_step, random_rows
from tests.sparse import some
from tests.tolerances import ALGEBRA, ENUMERATION, FINITE_DIFFERENCE

Law = torch.Tensor
Field = Callable[[Law, Law], torch.Tensor]

BIASED, ZERO = "biased", ("zero", None, None)
EXPECTED: Pins = {
    "opsd_forward_kl": ("exact", "forward_kl", None),
    "opsd_forward_kl_clipped": (BIASED, None, -0.85),
    "eopd": (BIASED, None, 0.98),
    "eopd_top_2": (BIASED, None, 0.57),
    "tropd_mask": (BIASED, None, 0.64),
    "tropd_forward_top_2": (BIASED, None, 0.68),
    "reopold_clip": (BIASED, None, 0.79),
    "aopd": (BIASED, None, 0.67),
    "aopd_top_2": (BIASED, None, 0.52),
    "fire_opd": (BIASED, None, 0.99),
    "veto_forward": (BIASED, None, 0.30),
    "veto_reverse": (BIASED, None, 0.29),
    "taid": (BIASED, None, 0.96),
    "todi": (BIASED, None, 0.996),
    "akl": (BIASED, None, 0.998),
    "akl_not_detached": (BIASED, None, 0.994),
    "distillm2_skew_reverse_kl": ("other_objective", "skew_jsd(beta=0.9)", None),
    "torchforge_forward_kl": (BIASED, None, 0.25),
    "nemo_top_2_tail": (BIASED, None, -0.48),
    "nemo_top_2_tail_centred": ("exact", "reverse_kl", None),
    "nemo_mixed_top_2": (BIASED, None, 0.48),
    "nemo_reverse_zero_outside": (BIASED, None, 0.16),
    "rethinking_opd_top_2": (BIASED, None, 0.55),
    "rethinking_opd_top_1": ZERO,
    "miles_top_2_reward": ZERO,
    "marin_k1_loss": ZERO,
    "marin_opd": ("exact_up_to_scale", "reverse_kl", None),
}


@pytest.fixture(scope="module", params=some(claims_tokens.ENTRIES, 8), ids=lambda entry: entry.function)
def audited(request: pytest.FixtureRequest) -> Iterator[tuple[gallery.Entry, opd.Audit]]:
    yield request.param, request.param.audit()


def test_an_audit_of_today_finds_what_is_pinned_and_recorded(audited):
    entry, found = audited
    check(RECORDS[entry.function], entry.function, EXPECTED)
    assert gallery.record(entry, found) == RECORDS[entry.function], "regenerate with: make gallery"


def test_every_remark_of_a_loss_known_from_notes_says_so():
    notes = {"eopd", "eopd_top_2", "tropd_mask", "tropd_forward_top_2", "reopold_clip", "aopd", "aopd_top_2"}
    notes |= {"veto_forward", "veto_reverse"}
    assert notes == {e.function for e in claims_tokens.ENTRIES if "notes on the paper" in e.remark}


def detached_half(r: opd.Rollouts) -> torch.Tensor:
    """ToDi with its sigmoids differentiated."""
    log_p, log_q = papers_tokens._laws(r)
    log_u = log_q - log_p
    return r.token_sum((log_u.sigmoid() * log_q.exp() * log_u - (-log_u).sigmoid() * log_p.exp() * log_u).sum(-1))


# Each twin is a loss got slightly wrong; what passes for the right one must refuse it.
TWINS = {
    "not clipped": ("opsd_forward_kl_clipped", papers_tokens.opsd_forward_kl),
    "clipped": ("opsd_forward_kl", papers_tokens.opsd_forward_kl_clipped),
    "whole vocabulary": ("eopd_top_2", papers_tokens.eopd),
    "outliers dropped": ("tropd_forward_top_2", papers_tokens.tropd_mask),
    "not masked": ("tropd_mask", papers.thinking_machines_opd),
    "clipped from above": (
        "reopold_clip",
        from_advantage(lambda log_u: log_u.clamp(max=math.log(4.0)), of="log_u", detach=True),
    ),
    "on the top tokens": ("aopd", papers_tokens.aopd_top_2),
    "not weighted": ("fire_opd", papers.thinking_machines_opd),
    "the other bridge": ("veto_forward", papers_tokens.taid),
    "the other direction": ("veto_reverse", papers_tokens.veto_forward),
    "sigmoids differentiated": ("todi", detached_half),
    "all to the forward KL": ("akl", papers_tokens.opsd_forward_kl),
    "all to the reverse KL": ("akl_not_detached", papers_tokens.nemo_top_2_tail_centred),
    "mixture differentiated": ("distillm2_skew_reverse_kl", papers.distillm_skew_reverse_kl),
    "with the ratio": (
        "torchforge_forward_kl",
        from_logprobs(lambda log_p, log_q: (log_q - log_p.detach()).exp() * (log_q - log_p)),
    ),
    "another constant": ("nemo_top_2_tail_centred", papers_tokens.nemo_top_2_tail),
    "no constant": ("nemo_top_2_tail", papers_tokens.nemo_top_2_tail_centred),
    "one token": ("rethinking_opd_top_2", papers_tokens.rethinking_opd_top_1),
    "k2": ("marin_k1_loss", from_logprobs(lambda log_p, log_q: (log_p - log_q) ** 2 / 2, reduction="sequence_mean")),
    "k1": ("marin_opd", papers_tokens.marin_k1_loss),
}


@pytest.mark.parametrize("twin", some(TWINS))
def test_the_same_assertions_refuse_a_false_twin(twin):
    function, loss = TWINS[twin]
    entry = ENTRY[function]
    found = audit(loss, opd.divergence(entry.objective, **entry.parameters), entry.granularity)
    with pytest.raises(AssertionError):
        check(gallery.record(entry, found), function, EXPECTED)


# What follows is the evidence: the expected gradient in logits at a single step, derived by hand. A local weight w
# gives -p (w - E w), and a loss of the two distributions the derivative of its value.


def local(weight: Field) -> Field:
    def field(p: Law, q: Law) -> torch.Tensor:
        w = weight(p, q)
        return -p * (w - (p * w).sum(-1, keepdim=True))

    return field


def derivative(value: Field) -> Field:
    def field(p: Law, q: Law) -> torch.Tensor:
        logits = p.log().requires_grad_()
        (derived,) = torch.autograd.grad(value(logits.softmax(-1), q).sum(), logits)
        return derived

    return field


def kl(one: Law, other: Law) -> torch.Tensor:
    return (one * (one / other).log()).sum(-1)


def on_top(of: Law, k: int = 2) -> torch.Tensor:
    """One on the k likeliest tokens, zero elsewhere."""
    return torch.zeros_like(of).scatter(-1, of.topk(k, -1).indices, 1.0)


def towards(target: Law, p: Law) -> torch.Tensor:
    """The gradient in logits of the cross-entropy to a fixed target, which need not be normalised."""
    return p * target.sum(-1, keepdim=True) - target


def opsd_clipped(p: Law, q: Law) -> torch.Tensor:
    return towards(torch.where(q * (q / p).log() > 0.05, 0.0, q), p)


def uncertain(q: Law) -> torch.Tensor:
    return (-(q * q.log()).sum(-1, keepdim=True) > 0.8).to(q)


def tropd_mask(p: Law, q: Law) -> torch.Tensor:
    return local(lambda p, q: (q / p).clamp(max=1.0) * (q / p).log())(p, q)


def tropd_forward(p: Law, q: Law) -> torch.Tensor:
    distance = (q - p).abs().sum(-1, keepdim=True) / 2
    return tropd_mask(p, q) + distance * towards(q * on_top(q), p)


def aopd(part: Field) -> Field:
    def field(p: Law, q: Law) -> torch.Tensor:
        imitated = (p * (q <= p)).sum(-1, keepdim=True)
        return local(lambda p, q: (q / p).log().clamp(min=0.0))(p, q) + imitated * towards(part(p, q), p)

    return field


def veto(p: Law, q: Law) -> torch.Tensor:
    bridge = q * p**0.8
    return towards(bridge / bridge.sum(-1, keepdim=True), p)


def normalised(law: Law) -> torch.Tensor:
    return law / law.sum(-1, keepdim=True)


def taid(p: Law, q: Law) -> torch.Tensor:
    return towards(normalised(p**0.6 * q**0.4), p)


def akl_shares(p: Law, q: Law) -> torch.Tensor:
    """The share of the forward KL: a token is in the tail if those less likely and itself have less than a half."""
    tail = torch.stack([(q * (q <= each)).sum() < 0.5 for each in q])
    gap = (p - q).abs()
    return gap[~tail].sum() / gap.sum()


def akl(p: Law, q: Law) -> torch.Tensor:
    share = akl_shares(p, q)
    return share * derivative(lambda p, q: kl(q, p))(p, q) + (1 - share) * derivative(kl)(p, q)


def jeffreys(p: Law, q: Law) -> torch.Tensor:
    return kl(p, q) + kl(q, p)


def within(law: Law, top: torch.Tensor) -> torch.Tensor:
    return law[top.bool()] / law[top.bool()].sum()


def nemo_zero_outside(p: Law, q: Law) -> torch.Tensor:
    """As the code writes it: the top k's terms, the entropy of the rest, and 100 times the mass of the rest."""
    top = on_top(q)
    kept = (top * p * (p.log() - normalised(top * q).clamp_min(1e-300).log())).sum()
    rest = (1 - top) * p
    return kept + (rest * p.log()).sum() + 100 * rest.sum()


# The local weight or the loss's own value; and the same got wrong.
DERIVED: dict[str, tuple[Field, Field]] = {
    "opsd_forward_kl_clipped": (opsd_clipped, lambda p, q: towards(q, p)),
    "eopd": (
        lambda p, q: derivative(kl)(p, q) + uncertain(q) * towards(q, p),
        derivative(kl),
    ),
    "eopd_top_2": (
        lambda p, q: derivative(kl)(p, q) + uncertain(q) * towards(q * on_top(q), p),
        lambda p, q: derivative(kl)(p, q) + uncertain(q) * towards(q * on_top(p), p),
    ),
    "tropd_mask": (tropd_mask, local(lambda p, q: (q / p).log().clamp(max=1.0))),
    "tropd_forward_top_2": (tropd_forward, tropd_mask),
    "reopold_clip": (
        local(lambda p, q: torch.maximum((q / p).log(), torch.full_like(p, math.log(0.2 / 0.8)))),
        local(lambda p, q: (q / p).log()),
    ),
    "aopd": (aopd(lambda p, q: q), aopd(lambda p, q: q * on_top(q))),
    "aopd_top_2": (aopd(lambda p, q: q * on_top(q)), aopd(lambda p, q: q)),
    "veto_forward": (veto, taid),
    "veto_reverse": (
        lambda p, q: derivative(lambda p, q: kl(p, normalised(q**5)) / 5)(p, q),
        derivative(kl),
    ),
    "taid": (taid, veto),
    "todi": (
        local(lambda p, q: ((q / p) ** 2 - 1 + (q / p).log()) / (1 + q / p)),
        local(lambda p, q: (q / p) + (q / p).log()),
    ),
    "akl": (akl, derivative(jeffreys)),
    "akl_not_detached": (
        derivative(lambda p, q: akl_shares(p, q) * kl(q, p) + (1 - akl_shares(p, q)) * kl(p, q)),
        akl,
    ),
    "distillm2_skew_reverse_kl": (
        derivative(lambda p, q: 9 * kl(q, 0.9 * q + 0.1 * p) + kl(p, 0.9 * q + 0.1 * p)),
        derivative(lambda p, q: kl(p, 0.9 * q + 0.1 * p)),
    ),
    "torchforge_forward_kl": (derivative(lambda p, q: -(p * q).sum()), lambda p, q: towards(q, p)),
    "nemo_top_2_tail": (
        derivative(lambda p, q: kl(p, normalised(q * (-on_top(q)).exp()))),
        derivative(lambda p, q: kl(p, normalised(q * (on_top(q)).exp()))),
    ),
    "nemo_mixed_top_2": (
        derivative(lambda p, q: jeffreys(within(p, on_top(q)), within(q, on_top(q))) / 2),
        derivative(lambda p, q: jeffreys(within(p, on_top(p)), within(q, on_top(p))) / 2),
    ),
    "nemo_reverse_zero_outside": (derivative(nemo_zero_outside), derivative(kl)),
    "rethinking_opd_top_2": (
        derivative(lambda p, q: kl(within(p, on_top(p)), within(q, on_top(p)))),
        derivative(lambda p, q: kl(within(p, on_top(q)), within(q, on_top(q)))),
    ),
}


def rows() -> Iterator[tuple[Law, Law]]:
    """Pairs whose top tokens differ, with teachers on both sides of EOPD's threshold."""
    for seed in itertools.count():
        p, q = random_rows(5, seed, scale=2.0)
        if not torch.equal(on_top(p), on_top(q)):
            yield p, q


@pytest.mark.parametrize("function", DERIVED)
def test_the_expected_gradient_is_the_one_derived_by_hand(function):
    right, wrong = DERIVED[function]
    pairs = list(itertools.islice(rows(), 8))
    assert {float(uncertain(q)) for _, q in pairs} == {0.0, 1.0}
    loss, gap = getattr(papers_tokens, function), 0.0
    for p, q in pairs:
        actual = gradient(loss, p, q)
        # An entry that costs 100 nats is 100 times an entry of the others, and so is its rounding.
        scale = max(1.0, float(actual.abs().max()))
        assert actual / scale == pytest.approx(right(p, q) / scale, abs=ALGEBRA)
        gap = max(gap, float((actual - wrong(p, q)).abs().max()))
    assert gap > 1e-3


# Where each rests, with the teacher in the first column: whether it is stationary at q, and a point where it is.
Q = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
TOP = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
RESTS = {
    "opsd_forward_kl_clipped": (True, None),
    "eopd": (True, None),
    "eopd_top_2": (False, None),
    "tropd_mask": (True, None),
    "tropd_forward_top_2": (True, None),
    "reopold_clip": (True, None),
    "aopd": (True, None),
    "aopd_top_2": (False, None),
    "veto_forward": (False, normalised(Q**5)),
    "veto_reverse": (False, normalised(Q**5)),
    "taid": (True, None),
    "todi": (True, None),
    "distillm2_skew_reverse_kl": (True, None),
    "torchforge_forward_kl": (False, torch.tensor([1.0 - 3e-13, 1e-13, 1e-13, 1e-13], dtype=torch.float64)),
    "nemo_top_2_tail": (False, normalised(Q * (-TOP).exp())),
    "nemo_top_2_tail_centred": (True, None),
    "nemo_mixed_top_2": (True, torch.tensor([0.2, 0.15, 0.05, 0.6], dtype=torch.float64)),
    "nemo_reverse_zero_outside": (False, None),
    "rethinking_opd_top_2": (True, torch.tensor([0.45, 0.3375, 0.02, 0.1925], dtype=torch.float64)),
}


@pytest.mark.parametrize("function", RESTS)
def test_where_the_expected_gradient_vanishes(function):
    at_teacher, elsewhere = RESTS[function]
    loss = getattr(papers_tokens, function)
    size = float(gradient(loss, Q, Q).abs().max())
    assert size < ALGEBRA if at_teacher else size > 0.01
    if elsewhere is not None:
        assert float(gradient(loss, elsewhere, Q).abs().max()) < ALGEBRA
        assert float((elsewhere - Q).abs().max()) > 0.05


def test_the_shares_of_akl_are_undefined_at_the_teacher_and_nowhere_near():
    for loss in (papers_tokens.akl, papers_tokens.akl_not_detached):
        with pytest.raises(NotFiniteError, match="nan"):
            gradient(loss, Q, Q)
        near = normalised(Q + 1e-9 * torch.tensor([1.0, -1.0, 0.0, 0.0], dtype=torch.float64))
        assert float(gradient(loss, near, Q).abs().max()) < 1e-8


def flow(field: Field, p: Law, q: Law, steps: int = 4000, step: float = 0.05) -> Law:
    """The end of gradient descent in logits, with the exact gradient, for many bandits at once."""
    logits = p.log()
    for _ in range(steps):
        logits = logits - step * field(logits.softmax(-1), q)
    return logits.softmax(-1)


def bandits(vocab_size: int) -> tuple[Law, Law]:
    generator = torch.Generator().manual_seed(0)
    p, q = (1.5 * torch.randn(2, 60, vocab_size, generator=generator, dtype=torch.float64)).softmax(-1)
    return p, q


def total_variation(p: Law, q: Law) -> torch.Tensor:
    return (p - q).abs().sum(-1) / 2


def farther(field: Field) -> int:
    """In how many of 60 bandits the flow ends with a larger forward KL than it started with."""
    p, q = bandits(4)
    return int((kl(q, flow(field, p, q)) > kl(q, p)).sum())


def test_the_flow_of_opsd_with_its_clip_ends_farther_from_the_teacher():
    assert farther(opsd_clipped) == 58
    assert farther(lambda p, q: towards(q, p)) == 0
    # Where no entry exceeds the clip it is the forward KL, so the teacher attracts from near.
    _, q = bandits(4)
    assert float(total_variation(flow(opsd_clipped, 0.99 * q + 0.01 / 4, q), q).max()) < 1e-3


def test_the_clip_of_opsd_lowers_the_tokens_it_clips():
    for p, q in itertools.islice(rows(), 8):
        clipped = q * (q / p).log() > 0.05
        assert bool(clipped.any()) and bool((q[clipped] > p[clipped]).all())
        downhill = -gradient(papers_tokens.opsd_forward_kl_clipped, p, q)
        assert bool((downhill[clipped] < 0).all())
        assert bool((-gradient(papers_tokens.opsd_forward_kl, p, q)[clipped] > 0).all())


def test_truncated_imitation_draws_mass_to_the_top_tokens_unless_it_fades_near_the_teacher():
    p, q = bandits(5)
    fields = (aopd(lambda p, q: q * on_top(q)), tropd_forward)
    distances = [total_variation(flow(field, p, q, step=0.25), q) for field in fields]
    assert [int((distance < 5e-3).sum()) for distance in distances] == [6, 60]
    assert float(distances[0].median()) > 0.05


def test_torchforge_collapses_onto_the_teachers_likeliest_token():
    p, q = bandits(4)
    end = flow(local(lambda p, q: q), p, q, step=2.0)
    likeliest = end.gather(-1, q.argmax(-1, keepdim=True)).squeeze(-1)
    assert int((likeliest > 0.99).sum()) >= 50 and int((q.amax(-1) > 0.99).sum()) == 0


def test_the_weight_of_todi_rises_and_that_of_tropd_falls_below_one_over_e():
    u = torch.logspace(-6, 6, 20_001, dtype=torch.float64)
    todi = (u**2 - 1 + u.log()) / (1 + u)
    assert bool((todi.diff() > 0).all())
    slope = (u**2 + 2 * u + 2 + 1 / u - u.log()) / (1 + u) ** 2
    # The derivative by hand, against a finite difference at u = 1.
    h = 1e-5
    difference = sum(sign * ((1 + sign * h) ** 2 - 1 + math.log1p(sign * h)) / (2 + sign * h) for sign in (1, -1))
    assert difference / (2 * h) == pytest.approx(1.5, abs=FINITE_DIFFERENCE)
    assert float(slope[10_000]) == pytest.approx(1.5, abs=ALGEBRA) and float(slope.min()) > 0
    tropd = u.clamp(max=1.0) * u.log()
    assert float(u[tropd.argmin()]) == pytest.approx(1 / math.e, rel=1e-3)
    assert bool((tropd[u < 0.36].diff() < 0).all()) and bool((tropd[u > 0.37].diff() > 0).all())


def test_fire_opd_is_the_reverse_kl_at_a_single_step_and_turns_within_a_history():
    for p, q in itertools.islice(rows(), 4):
        assert gradient(papers_tokens.fire_opd, p, q) == pytest.approx(derivative(kl)(p, q), abs=ALGEBRA)
    student, teacher = (opd.TabularPolicy.random(vocab_size=4, horizon=2, seed=seed) for seed in (0, 1))
    exact = opd.exact_gradient(student, teacher, "reverse_kl")[0].flatten()

    def at_first_token(loss: Callable[[opd.Rollouts], torch.Tensor]) -> float:
        first = opd.expected_gradient(loss, student, teacher)[0].flatten()
        return 1.0 - float(torch.cosine_similarity(first, exact, dim=0))

    def fixed(r: opd.Rollouts) -> torch.Tensor:
        """The same with weights from the position alone."""
        log_p, log_q = papers_tokens._laws(r)
        weight = (2.0 - papers_tokens._entropy(log_q)) * (1.0 + papers_tokens._entropy(log_p).detach())
        return r.token_sum(-weight * r.log_u.detach() * r.student_logprobs)

    assert at_first_token(papers_tokens.fire_opd) > 1e-5
    assert abs(at_first_token(fixed)) < ENUMERATION
    at_teacher = opd.expected_gradient(papers_tokens.fire_opd, teacher, teacher)
    assert max(float(level.abs().max()) for level in at_teacher) < ENUMERATION


def test_what_moves_under_a_loss_with_no_expected_gradient():
    p, q = random_rows(5, seed=3)
    student, teacher = one_step(p, q)
    for name in ("rethinking_opd_top_1", "miles_top_2_reward", "marin_k1_loss"):
        assert float(gradient(getattr(papers_tokens, name), p, q).abs().max()) < ALGEBRA

    def backpropagated(r: opd.Rollouts) -> torch.Tensor:
        log_p, log_q = papers_tokens._laws(r)
        return r.token_sum(papers_tokens._kl(*papers_tokens._on_top(log_p, log_p, log_q)))

    assert float(opd.expected_gradient(backpropagated, student, teacher)[0].abs().max()) > 0.01


def mean_inverse_length(logits: list[torch.Tensor]) -> torch.Tensor:
    """E[1/N] of three tokens that may end early with token 0, by walking the tree."""

    def walk(level: int, row: int, reached: torch.Tensor) -> torch.Tensor:
        law = logits[level][row].softmax(-1)
        if level == 2:
            return reached / 3
        ended = reached * law[0] / (level + 1)
        # Rows of the next level are the histories in the order of their tokens.
        return ended + sum(walk(level + 1, row * 3 + token, reached * law[token]) for token in (1, 2))

    return walk(0, 0, torch.ones((), dtype=torch.float64))


def test_marins_k1_loss_lengthens_rollouts_whatever_the_reference():
    student = opd.TabularPolicy.random(vocab_size=3, horizon=3, eos=0, seed=0)
    logits = [level.detach().clone().requires_grad_() for level in student.logits]
    derived = torch.autograd.grad(mean_inverse_length(logits), logits, materialize_grads=True)
    for seed in (1, 2):
        reference = opd.TabularPolicy.random(vocab_size=3, horizon=3, eos=0, seed=seed)
        found = opd.expected_gradient(papers_tokens.marin_k1_loss, student, reference)
        for actual, by_hand in zip(found, derived, strict=True):
            assert actual == pytest.approx(by_hand, abs=ENUMERATION)
        assert float(found[0].abs().max()) > 1e-3
        sums = opd.expected_gradient(from_logprobs(lambda log_p, log_q: log_p - log_q), student, reference)
        assert max(float(level.abs().max()) for level in sums) < ENUMERATION


def test_marins_advantage_on_stale_rollouts_is_that_of_the_sampler():
    p, q = random_rows(4, seed=5)
    stale, _ = random_rows(4, seed=6)
    actual = gradient(papers_tokens.marin_opd, p, q, behavior=stale)
    assert actual == pytest.approx(local(lambda p, q: (q / stale).log())(p, q), abs=ALGEBRA)
    exact = derivative(kl)(p, q)
    assert float((actual - exact).norm() / exact.norm()) > 0.1
    assert gradient(papers.thinking_machines_opd, p, q, behavior=stale) == pytest.approx(exact, abs=ALGEBRA)
