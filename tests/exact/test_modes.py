"""Exact numbers do not depend on torch's global modes, which are left as they were."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

import opdtheory as opd
from opdtheory.exact.modes import plain_modes
from tests.sparse import some


def k2(r: opd.Rollouts) -> torch.Tensor:
    return r.token_sum(r.log_u.square() / 2)


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("mode", some(MODES))
def test_audits_and_expectations_are_the_same_under_every_mode(mode):
    pair = opd.random_pair(3, 2, eos=0)
    plain, expected = opd.audit(k2), opd.expected_gradient(k2, *pair)
    with MODES[mode]():
        found, gradient = opd.audit(k2), opd.expected_gradient(k2, *pair)
    assert found.passes and found.verdict == "exact" and found.worlds == plain.worlds or not plain.passes
    assert str(found) == str(plain)
    assert all(torch.equal(a, b) for a, b in zip(gradient, expected, strict=True))


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_the_gradient_of_a_module_is_not_silently_zero(mode):
    torch.manual_seed(0)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(3, 3, dtype=torch.float64)

        def forward(self, prefixes):
            return self.table(prefixes)

    student = opd.ModulePolicy(Model(), 3, 2, prompt=[0])
    teacher = opd.TabularPolicy.random(3, 2, seed=1)
    plain = opd.exact_gradient(student, teacher, "jsd")
    with MODES[mode]():
        found = opd.exact_gradient(student, teacher, "jsd")
    assert float(plain[0].abs().max()) > 1e-3
    torch.testing.assert_close(found[0], plain[0], rtol=1e-12, atol=1e-15)


def test_modes_and_threads_are_restored_even_after_an_error():
    before = torch.get_num_threads(), torch.get_default_dtype()
    with torch.no_grad(), default_dtype(torch.float64):
        with pytest.raises(ValueError, match="inside"), plain_modes():
            assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
            assert torch.get_num_threads() == 1
            raise ValueError("inside")
        assert not torch.is_grad_enabled() and torch.get_default_dtype() == torch.float64
    assert (torch.get_num_threads(), torch.get_default_dtype()) == before
