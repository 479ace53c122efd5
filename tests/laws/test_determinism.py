"""Same seed, same bits, whatever the number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import opdtheory as opd
from opdtheory.exact import rollout_gradients
from opdtheory.exact.sampling import sample_rollouts
from tests.sparse import some


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _logits(words: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(24, words, generator=generator) for _ in range(2)]


def _fused(name: str, words: int) -> list[Tensor]:
    student, teacher = _logits(words)
    leaf = student.requires_grad_()
    values = opd.fused_divergence(leaf, teacher, name)
    return [values.detach(), *torch.autograd.grad(values.sum(), leaf)]


def _top_k(words: int) -> list[Tensor]:
    student, teacher = _logits(words)
    log_q = torch.log_softmax(teacher, -1)
    ids = log_q.topk(16).indices
    leaf = student.requires_grad_()
    values = opd.fused_top_k_divergence(leaf, ids, log_q.gather(-1, ids), "jsd")
    return [values.detach(), *torch.autograd.grad(values.sum(), leaf)]


def _objective(name: str, objective: str) -> list[Tensor]:
    pair = opd.random_pair(8, 6, seed=0)
    return [opd.exact_value(*pair, name, objective), *opd.exact_gradient(*pair, name, objective)]


def _rollouts() -> list[Tensor]:
    sample = sample_rollouts(*opd.random_pair(8, 4), 20_000)
    r = sample.rollouts
    return [r.tokens, r.teacher_logprobs, rollout_gradients(opd.estimator("opd_plus", "jsd"), sample)]


def _expected() -> list[Tensor]:
    return opd.expected_gradient(opd.estimator("opd_plus", "jsd", zscore=True), *opd.random_pair(3, 2), batch_size=2)


def _moments() -> list[Tensor]:
    d, pair = opd.divergence("jsd"), [opd.MarkovPolicy.random(40, 30, seed=s) for s in (0, 1)]
    found = opd.rollout_moments(*pair, d.weight, d.generator)
    return [*found.mean, torch.tensor(found.variance)]


def _functions() -> list[Tensor]:
    log_u = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [opd.divergence(name).generator(log_u) for name in ("jsd", "chi2", "alpha(alpha=0.3)")]


SAME: dict[str, Callable[[], list[Tensor]]] = {
    "functions of log u": _functions,
    "token_local": lambda: _objective("jsd", "token_local"),
    "token_return": lambda: _objective("jsd", "token_return"),
    "sequence": lambda: _objective("chi2", "sequence"),
    "expected_gradient": _expected,
    "rollouts": _rollouts,
    "rollout_moments": _moments,
}


@pytest.mark.parametrize("work", some(SAME.values(), ids=SAME))
def test_the_number_of_threads_changes_no_bit(work):
    found = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        found.append(work())
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("work", [lambda n: _fused("jsd", n), lambda n: _fused("chi2", n), _top_k])
def test_a_vocabulary_is_added_up_in_as_many_parts_as_threads(work):
    """As `docs/determinism.md` says: the same bits with the same number of threads, and nearly with another."""
    found = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        found.append(work(42_768))
    for one, two, again in zip(*found, strict=True):
        assert torch.equal(two, again)
        assert float((one - two).abs().max() / one.abs().max()) < 2e-6


def test_an_audit_says_the_same_with_any_number_of_threads():
    said = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        said.append(opd.audit(opd.estimator("opd", "jsd"), "jsd", details=False).to_dict())
    for report in said:
        report.pop("seconds", None)
    assert repr(said[0]) == repr(said[1])
