"""The mutation run itself: what it changes, how it puts a mutant in place, and when it counts as passed."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest
import torch

from opdtheory.exact import tree  # noqa: F401  (imported, so that its code can be exchanged)
from tests.mutation import report
from tests.mutation.mutants import Mutant, mutants, source_tree
from tests.mutation.patch import exchange

LOGSPACE = Path("opdtheory/divergences/logspace.py")


def in_a_fork(work) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            status = work()
        except BaseException:
            status = 99
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("path", ["opdtheory/exact/recursions.py", "opdtheory/theorems/gradient/gauge.py"])
def test_each_mutant_is_another_module(path):
    source = ast.unparse(source_tree(Path(path)))
    found = list(mutants(Path(path), terms=True))
    changed = {ast.unparse(mutant.tree()) for mutant in found}
    assert source not in changed
    assert len(changed) == len(found) > 20
    assert len(list(mutants(Path(path), terms=False))) > len(found)


def test_a_sum_loses_its_sign_and_each_of_its_terms(tmp_path, monkeypatch):
    (tmp_path / "sum.py").write_text("def f(a, b):\n    total = a - b\n    total += -a\n    return total\n")
    monkeypatch.setattr("tests.mutation.mutants.ROOT", tmp_path)
    changes = {(mutant.before, mutant.after) for mutant in mutants(Path("sum.py"), terms=True)}
    sums = {("a - b", "a + b"), ("a - b", "a"), ("a - b", "-b")}
    assert changes == sums | {("total += -a", "total -= -a"), ("total += -a", "pass"), ("-a", "a")}


def expm1_mutant() -> Mutant:
    return next(m for m in mutants(LOGSPACE, terms=True) if m.function == "exp_remainder")


def test_a_mutant_takes_the_place_of_the_function_and_leaves_the_parent_alone():
    from opdtheory.divergences import logspace

    mutant, t = expm1_mutant(), torch.tensor([0.3, -2.0, 1.5], dtype=torch.float64)
    before = logspace.exp_remainder(t)

    def differs() -> int:
        return int(exchange(mutant) and not torch.equal(logspace.exp_remainder(t), before))

    assert in_a_fork(differs) == 1, mutant
    assert torch.equal(logspace.exp_remainder(t), before)


def test_what_ran_at_import_is_not_exchanged():
    found = [m for m in mutants(Path("opdtheory/divergences/catalogue.py"), terms=True) if m.before == "-_LOG2"]
    assert found and not found[0].function
    assert in_a_fork(lambda: int(exchange(found[0]))) == 0


def test_survivors_that_are_explained_are_mutants_of_today():
    known = report.explanations()
    modules = {module for module, *_ in known}
    today = {
        (str(m.path), m.function, m.before, m.after) for module in modules for m in mutants(Path(module), terms=True)
    }
    assert set(known) - today == set()
    assert {kind for kind, _ in known.values()} <= set(report.KINDS)
    assert all(reason.endswith(".") for _, reason in known.values())


def outcome(how: str, after: str = "a") -> report.Outcome:
    return report.Outcome("opdtheory/exact/oracle.py", "f", 1, "a - b", after, 0, how)


def test_a_run_passes_only_if_enough_die_and_the_rest_is_explained(monkeypatch):
    dead = [outcome("killed", str(i)) for i in range(19)]
    assert report.is_success(dead)
    assert not report.is_success([*dead, outcome("survived")])
    assert not report.is_success([*dead, outcome("no check runs it")])
    monkeypatch.setattr(
        report, "explanations", lambda: {("opdtheory/exact/oracle.py", "f", "a - b", "a"): ("equivalent", "b is 0.")}
    )
    assert report.is_success([*dead, outcome("survived")])
    assert not report.is_success([*dead[:18], outcome("survived")])
    assert "1 equivalent, 0 unexplained" in report.summary([*dead, outcome("survived")], 20, 1.0)
