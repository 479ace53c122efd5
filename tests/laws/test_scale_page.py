"""The page on scale is what its script makes, and its numbers hold by other routes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import opdtheory as opd
from tests.scripts import loaded

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def script():
    return loaded(DOCS / "generate_scale.py")


@pytest.mark.slow
def test_the_page_is_what_the_script_makes(script):
    assert (DOCS / "scale.md").read_text(encoding="utf-8") == script.page()


def test_deviations_at_a_position_are_those_of_the_recursion(script):
    """The closed form of one position against `rollout_moments` at a horizon of one."""
    student, teacher = (z.unsqueeze(0) for z in script.example())
    stay = torch.zeros(student.shape, dtype=torch.int64)
    pair = [opd.FiniteStatePolicy(z, stay, 1) for z in (student, teacher)]
    found = dict(script.at_a_position("jsd"))
    for label, summed in (("sampled token, OPD+", 0), ("student's top 64 summed, the rest sampled", 64)):
        moments = opd.rollout_moments(*pair, opd.divergence("jsd").weight, summed_tokens=summed)
        relative = moments.variance**0.5 / float(moments.mean[0].norm())
        assert found[label].deviation == pytest.approx(relative, rel=1e-9)
    baseline = found["sampled token, OPD+ with the best constant baseline (T7)"].deviation
    assert baseline <= found["sampled token, OPD+"].deviation


def test_the_bias_of_a_tail_is_that_of_the_coarse_distributions(script):
    student, teacher = script.example()
    z = student.clone().requires_grad_()
    log_p, log_q = torch.log_softmax(z, -1), torch.log_softmax(teacher, -1)
    kept = teacher.topk(16).indices
    coarse = [torch.cat([x[kept], (1 - x[kept].exp().sum()).log()[None]]) for x in (log_p, log_q)]
    d = opd.divergence("jsd")
    value = (coarse[0].exp() * d.generator(coarse[1] - coarse[0])).sum()
    (gradient,) = torch.autograd.grad(value, z, retain_graph=True)
    (exact,) = torch.autograd.grad((log_p.exp() * d.generator(log_q - log_p)).sum(), z)
    bias = float((gradient - exact).norm() / exact.norm())
    assert dict(script.at_a_position("jsd"))["teacher's top 16 with a tail bucket"].bias == pytest.approx(
        bias, rel=1e-6
    )


def test_ranks_reduce_what_the_page_says(script, monkeypatch, tmp_path):
    sent = []
    reduce = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda x, **k: sent.append(x.numel() * x.element_size()) or reduce(x, **k))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        opd.fused_parallel_divergence(
            torch.randn(10, 50, requires_grad=True), torch.randn(10, 50), "jsd"
        ).sum().backward()
    finally:
        dist.destroy_process_group()
    assert sum(sent) / 10 == script.costs()[-1].reduced
