"""The pytest plugin: idle without `--opd-audit`, one item for each mark with it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import opdtheory as opd
from tests.losses import k3

pytest_plugins = ["pytester"]
ROOT = Path(__file__).resolve().parents[2]


# An environment that was installed before the plugin came knows no entry point of it.
_INSTALLED = any(point.name == "opdtheory" for point in metadata.entry_points(group="pytest11"))
PLUGIN = [] if _INSTALLED else ["-p", "opdtheory.testing.plugin"]


SOURCE = """
from opdtheory.testing import opd_loss

@opd_loss(claims="reverse_kl")
@opd_loss(claims="reverse_kl", eos=0)
def k2(r):
    return r.token_sum(r.log_u.square() / 2)

@opd_loss(claims="reverse_kl")
def k3(r):
    return r.token_sum(r.log_u.expm1() - r.log_u)

def unmarked(r):
    return r.token_sum(r.log_u)
"""


@pytest.fixture(scope="module", autouse=True)
def warm():
    """What pytester imports in this process it would drop again, and C extensions load once only."""
    from opdtheory.auditing.views import render_audit

    render_audit(opd.audit(k3, "reverse_kl"))


def run(pytester, *arguments):
    return pytester.runpytest_inprocess(*PLUGIN, "-p", "no:cacheprovider", "-p", "no:xdist", *arguments)


def test_the_entry_point_is_declared():
    assert '[project.entry-points.pytest11]\nopdtheory = "opdtheory.testing.plugin"\n' in (
        ROOT / "pyproject.toml"
    ).read_text(encoding="utf-8")


def test_without_the_option_nothing_is_collected(pytester):
    pytester.makepyfile(test_losses=SOURCE + "\ndef test_own(): pass\n")
    result = run(pytester)
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*opd-audit*")


def test_without_the_option_no_heavy_module_is_imported(tmp_path):
    (tmp_path / "test_a.py").write_text(
        "import sys\n"
        "from opdtheory.testing import opd_loss\n"
        "@opd_loss(claims='jsd')\n"
        "def loss(r): return 0\n"
        "def test_light():\n"
        "    heavy = {'torch', 'numpy', 'scipy', 'sympy', 'matplotlib', 'rich'} & set(sys.modules)\n"
        "    ours = {name for name in sys.modules if name.startswith('opdtheory')}\n"
        "    assert not heavy, heavy\n"
        "    assert 'opdtheory.testing.plugin' in ours\n"
        "    assert ours <= {'opdtheory', 'opdtheory.errors', 'opdtheory.testing', 'opdtheory.testing.marks',\n"
        "                    'opdtheory.testing.plugin', 'opdtheory.choices', 'opdtheory.version'}, ours\n",
        encoding="utf-8",
    )
    # Other plugins may import what they like.
    arguments = ["-q", "-p", "no:cacheprovider", "-p", "opdtheory.testing.plugin", str(tmp_path / "test_a.py")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=tmp_path,
        env={"PATH": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_marked_functions_of_test_files_are_audited(pytester):
    pytester.makepyfile(test_losses=SOURCE + "\ndef test_own(): pass\n")
    result = run(pytester, "--opd-audit", "-v")
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(
        [
            "*::k2?reverse_kl-token_local? PASSED*",
            "*::k2?reverse_kl-token_local-eos=0? PASSED*",
            "*::k3?reverse_kl-token_local? FAILED*",
            "*::test_own PASSED*",
            "the audit does not find what was claimed: other objective, forward_kl (token_local), with*",
            "claimed: exact for reverse_kl (token_local)",
            "found: it descends another objective than the one claimed",
            "k3: OTHER OBJECTIVE",
            "The loss does not descend reverse_kl*",
        ]
    )
    result.stdout.no_fnmatch_line("*Traceback*")
    chosen = run(pytester, "--opd-audit", "-m", "opd_audit", "--strict-markers", "-k", "k2")
    chosen.assert_outcomes(passed=2, deselected=2)


@pytest.mark.slow
def test_modules_given_by_path_or_by_name_are_audited(pytester, monkeypatch):
    package = pytester.mkpydir("trainer_losses")
    (package / "kl.py").write_text(SOURCE, encoding="utf-8")
    run(pytester, "--opd-audit").assert_outcomes()
    run(pytester, "--opd-audit", "trainer_losses/kl.py").assert_outcomes(passed=2, failed=1)
    monkeypatch.syspath_prepend(str(pytester.path))
    run(pytester, "--opd-audit", "--pyargs", "trainer_losses.kl", "-k", "k3").assert_outcomes(failed=1, deselected=2)


@pytest.mark.slow
def test_a_known_bias_passes_one_that_grew_fails_one_that_vanished_is_told(pytester):
    source = "from opdtheory.testing import opd_loss\n@opd_loss(claims='reverse_kl')\ndef mine(r):\n    return {}\n"
    biased = "r.token_sum(r.log_u.square() / 2 + {} * r.log_u ** 3)"
    path = pytester.path / "test_mine.py"

    def outcome(body, *arguments):
        path.write_text(source.format(body), encoding="utf-8")
        # The file keeps its length and its second; a stale byte code must not hide the change.
        return run(pytester, "--opd-audit", *arguments)

    monkey = pytest.MonkeyPatch()
    monkey.setattr(sys, "dont_write_bytecode", True)
    try:
        outcome(biased.format(0.1)).assert_outcomes(failed=1)
        written = outcome(biased.format(0.1), "--opd-write-baseline", "known.json")
        written.stdout.fnmatch_lines(["RECORDED test_mine.py::mine*biased*", "*1 recorded*"])
        assert written.ret == 0
        record = json.loads((pytester.path / "known.json").read_text(encoding="utf-8"))
        assert list(record["losses"]) == ["test_mine.py::mine[reverse_kl-token_local]"]
        known = outcome(biased.format(0.1), "--opd-baseline", "known.json")
        known.stdout.fnmatch_lines(["*KNOWN test_mine.py::mine*", "*1 known*"])
        assert known.ret == 0
        grew = outcome(biased.format(0.2), "--opd-baseline", "known.json")
        grew.assert_outcomes(failed=1)
        grew.stdout.fnmatch_lines(["the bias is larger than the one in the file of known biases: it was biased with*"])
        gone = outcome(biased.format(0.0), "--opd-baseline", "known.json")
        gone.stdout.fnmatch_lines(["VANISHED test_mine.py::mine*update the file of known biases", "*1 vanished*"])
        assert gone.ret == 0
    finally:
        monkey.undo()


@pytest.mark.slow
def test_equal_marks_are_told_apart(pytester):
    pytester.makepyfile(
        test_losses="""
        from opdtheory.testing import opd_loss

        @opd_loss(claims="reverse_kl")
        @opd_loss(claims="reverse_kl", verdict="exact_up_to_scale")
        def k2(r):
            return r.token_sum(r.log_u.square() / 2)
        """
    )
    result = run(pytester, "--opd-audit", "-v")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["*::k2?reverse_kl-token_local-0? PASSED*", "*::k2?reverse_kl-token_local-1? PASSED*"])


def test_pages_are_written(pytester):
    pytester.makepyfile(test_losses=SOURCE)
    run(pytester, "--opd-audit", "--opd-report", "pages", "-k", "k3")
    (page,) = (pytester.path / "pages").iterdir()
    assert page.name.startswith("test_losses.py_k3_reverse_kl-token_local") and page.suffix == ".html"
    assert "forward_kl" in page.read_text(encoding="utf-8")


def test_wrong_use_is_said_in_words(pytester):
    pytester.makepyfile(
        test_losses="""
        from opdtheory.testing import opd_loss

        @opd_loss(claims="no_such")
        def unknown(r):
            return r.token_sum(r.log_u)

        @opd_loss(claims="jsd", batchsize=2)
        def misspelt(r):
            return r.token_sum(r.log_u)

        @opd_loss(claims="jsd")
        def vector(r):
            return r.log_u

        @opd_loss(claims="jsd")
        def broken(r):
            raise KeyError("of the user")
        """
    )
    result = run(pytester, "--opd-audit")
    result.assert_outcomes(failed=4)
    result.stdout.fnmatch_lines(
        [
            "unknown?no_such-token_local? cannot be audited: *no_such*",
            "misspelt?jsd-token_local-batchsize=2? cannot be audited: *batchsize*",
            "vector?jsd-token_local? cannot be audited: the loss must return a scalar tensor, got shape*",
            "E*KeyError: 'of the user'",
        ]
    )
    for arguments, words in (
        (["--opd-baseline", "x.json"], "*--opd-baseline needs --opd-audit*"),
        (["--opd-audit", "--opd-baseline", "x.json"], "*--opd-baseline: *x.json cannot be read*"),
        (["--opd-audit", "--opd-write-baseline", "."], "*--opd-baseline: *cannot be read*"),
        (["--opd-audit", "--opd-write-baseline", "test_losses.py"], "*--opd-baseline: *test_losses.py is not JSON*"),
        (["--opd-audit", "--opd-report", "test_losses.py"], "*--opd-report: must be a folder, got the file*"),
    ):
        refused = run(pytester, *arguments)
        assert refused.ret == pytest.ExitCode.USAGE_ERROR
        refused.stderr.fnmatch_lines([words])


@pytest.mark.slow
def test_findings_reach_the_process_that_reports(pytester):
    pytest.importorskip("xdist")
    pytester.makepyfile(test_losses=SOURCE)
    arguments = ["--opd-audit", "--opd-write-baseline", "known.json", "-n", "1", "-k", "k3"]
    result = pytester.runpytest_subprocess(*PLUGIN, "-p", "no:cacheprovider", *arguments, timeout=100)
    result.stdout.fnmatch_lines(["RECORDED test_losses.py::k3*", "*1 recorded*"])
    known = json.loads((pytester.path / "known.json").read_text(encoding="utf-8"))
    assert list(known["losses"]) == ["test_losses.py::k3[reverse_kl-token_local]"]


METHODS = """
import unittest
import torch
import opdtheory as opd
from functools import partial
from opdtheory import testing

# The verdict alone, which is found sooner.
opd_loss = partial(testing.opd_loss, details=False)

def k2_of_two(teacher, student):
    return (teacher - student).square() / 2

class Losses:
    @opd_loss(claims="reverse_kl")
    def bound(self, r):
        return r.token_sum(r.log_u.square() / 2) * self.one

    one = 1.0

    @opd_loss(claims="reverse_kl")
    @staticmethod
    def static(r):
        return r.token_sum(r.log_u.square() / 2)

    @classmethod
    @opd_loss(claims="reverse_kl", verdict="exact_up_to_scale")
    def of_the_class(cls, r):
        return 2 * cls.static(r)

    def unmarked(self, r):
        raise AssertionError

    class Inner:
        @opd_loss(claims="reverse_kl")
        def wrong(self, r):
            return r.token_sum(r.log_u.expm1() - r.log_u)

class Child(Losses):
    one = 2.0

class Module(torch.nn.Module):
    @opd_loss(claims="reverse_kl", call="r.token_sum(f(opdtheory, r.student_logits, r.teacher_logits))")
    def forward(self, student, teacher):
        log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

class Trainer:
    def __init__(self, scale):
        self.scale = scale

    @opd_loss(claims="reverse_kl")
    def unmakeable(self, r):
        return r.token_sum(r.log_u.square() / 2)

    @opd_loss(claims="reverse_kl", call=lambda f, r: r.token_sum(opd.bind(f, scale=1.0)(r.log_u)))
    def called(self, log_u):
        return self.scale * log_u.square() / 2

class TestOwn:
    @opd_loss(claims="reverse_kl")
    def loss(self, r):
        return r.token_sum(r.log_u.square() / 2)

    def test_one(self):
        pass

class OfUnittest(unittest.TestCase):
    @opd_loss(claims="reverse_kl")
    def loss(self, r):
        return r.token_sum(r.log_u.square() / 2)

    def test_two(self):
        pass
"""


@pytest.mark.slow
def test_marked_methods_of_classes_are_audited(pytester):
    pytester.makepyfile(test_methods=METHODS)
    result = run(pytester, "--opd-audit", "-v")
    outcomes = {
        "Losses.bound": "PASSED",
        "Losses.static": "PASSED",
        "Losses.of_the_class": "PASSED",
        "Losses.Inner.wrong": "FAILED",
        "Child.bound": "FAILED",
        "Child.static": "PASSED",
        "Child.of_the_class": "PASSED",
        "Module.forward": "PASSED",
        "Trainer.unmakeable": "FAILED",
        "Trainer.called": "PASSED",
        "TestOwn.loss": "PASSED",
        "OfUnittest.loss": "PASSED",
    }
    for name, outcome in outcomes.items():
        result.stdout.fnmatch_lines([f"test_methods.py::{name}?reverse_kl-token_local-details=False? {outcome}*"])
    # The classes' own tests are collected as without the option.
    result.stdout.fnmatch_lines(["test_methods.py::TestOwn::test_one PASSED*"])
    result.stdout.fnmatch_lines(["test_methods.py::OfUnittest::test_two PASSED*"])
    result.assert_outcomes(passed=11, failed=3)
    result.stdout.fnmatch_lines(
        [
            "Trainer.unmakeable?reverse_kl-token_local-details=False? cannot be audited: opd_loss: must mark a method "
            "of a class that can be made without arguments, got Trainer.unmakeable (TypeError: *scale*"
        ]
    )
    run(pytester).assert_outcomes(passed=2)


@pytest.mark.slow
def test_a_mark_says_how_to_call_a_function(pytester):
    pytester.makepyfile(
        test_calls="""
        from opdtheory.testing import opd_loss

        @opd_loss(claims="reverse_kl", call="r.token_sum(f(r.teacher_logprobs, r.student_logprobs))")
        def text(teacher, student):
            return (teacher - student).square() / 2

        @opd_loss(claims="reverse_kl", call=lambda f, r: r.token_sum(f(r.log_u)))
        def function(log_u):
            return log_u.square() / 2

        @opd_loss(claims="reverse_kl", call="f(r, 3.0)", verdict="exact_up_to_scale")
        @opd_loss(claims="reverse_kl", call="f(r, -1.0)")
        def scaled(r, scale):
            return scale * r.token_sum(r.log_u.square() / 2)

        @opd_loss(claims="reverse_kl")
        def silent(teacher, student):
            return (teacher - student).square() / 2

        @opd_loss(claims="reverse_kl", call="f(r).no_such")
        def broken(r):
            return r.token_sum(r.log_u.square() / 2)
        """
    )
    result = run(pytester, "--opd-audit", "-v")
    result.assert_outcomes(passed=3, failed=3)
    result.stdout.fnmatch_lines(
        [
            "*::text?reverse_kl-token_local? PASSED*",
            "*::function?reverse_kl-token_local? PASSED*",
            "*::scaled?reverse_kl-token_local-0? PASSED*",
            "*::scaled?reverse_kl-token_local-1? FAILED*",
            "*::silent?reverse_kl-token_local? FAILED*",
            "silent?reverse_kl-token_local? cannot be audited: opd_loss: silent(teacher, student) does not take "
            "rollouts alone; say how to call it: call='r.token_sum(f(r.teacher_logprobs, r.student_logprobs))'",
            "E*AttributeError: 'Tensor' object has no attribute 'no_such'",
        ]
    )


def test_an_unsound_loss_fails_its_mark(pytester):
    pytester.makepyfile(
        test_losses="""
        from opdtheory.testing import opd_loss

        @opd_loss(claims="reverse_kl")
        def unmasked(r):
            return (r.log_u.square() / 2).sum() / len(r.tokens)

        @opd_loss(claims="reverse_kl", verdict="exact_up_to_scale")
        def unmasked_mean(r):
            return (r.log_u.square() / 2).mean()
        """
    )
    run(pytester, "--opd-audit").assert_outcomes(failed=2)


def test_an_object_with_a_mark_is_audited_whatever_its_name(pytester):
    """pytest warns of an object that is named like a test and is no function."""
    pytester.makepyfile(
        test_losses="""
        from opdtheory.testing import opd_loss

        class Loss:
            def __call__(self, r):
                return r.token_sum(r.log_u.square() / 2)

        test_me = opd_loss("reverse_kl")(Loss())
        """
    )
    run(pytester, "--opd-audit", "-W", "error").assert_outcomes(passed=1)


def test_failures_are_short(pytester):
    pytester.makepyfile(
        test_losses="""
        from opdtheory.testing import opd_loss

        @opd_loss(claims="reverse_kl", name="\\n".join(f"line {n}" for n in range(100)))
        def long(r):
            return r.token_sum(r.log_u)

        def deeper(n):
            return deeper(n - 1) if n else 1 / 0

        @opd_loss(claims="reverse_kl")
        def broken(r):
            return deeper(2)

        def left(n):
            return right(n - 1) if n else 1 / 0

        def right(n):
            return left(n - 1) if n else 1 / 0

        @opd_loss(claims="reverse_kl")
        def deep(r):
            return left(50)
        """
    )
    result = run(pytester, "--opd-audit")
    lines = result.stdout.lines
    names = [n for n, line in enumerate(lines) if line.startswith("_ opd-audit long[")]
    headers = [n for n, line in enumerate(lines) if line.startswith("____") or line.startswith("=====")]
    for name in (" long[", " broken[", " deep["):
        start = next(n for n in headers + names if name in lines[n])
        end = next(n for n in headers if n > start)
        assert 3 < end - start - 1 <= 40
    assert any(line.endswith("print(report) for the rest, where report is opdtheory.audit(...)]") for line in lines)
    # A failing loss shows the user's own lines, not those of the audit.
    assert any("ZeroDivisionError" in line for line in lines) and not any("expectation.py" in line for line in lines)


def test_the_projects_settings_hold_and_a_mark_wins_over_them(pytester):
    (pytester.path / "pyproject.toml").write_text("[tool.opdtheory]\nobjective = 'forward_kl'\neos = 0\n")
    pytester.makepyfile(
        test_losses="""
        from opdtheory.testing import opd_loss

        @opd_loss()
        @opd_loss("reverse_kl", eos=None, verdict="other_objective")
        def k3(r):
            return r.token_sum(r.log_u.expm1() - r.log_u)
        """
    )
    result = run(pytester, "--opd-audit", "-v")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["*::k3?forward_kl-token_local-eos=0? *", "*::k3?reverse_kl-token_local-eos=None? *"])
    (pytester.path / "pyproject.toml").write_text("[tool.opdtheory]\neos = 0\n")
    result = run(pytester, "--opd-audit", "-k", "objective")
    result.assert_outcomes(failed=1, deselected=1)
    result.stdout.fnmatch_lines(["*cannot be audited: claims: must be given, by the mark or as objective in*"])


def test_a_wrong_project_file_is_a_usage_error(pytester):
    pytester.makepyfile(test_losses=SOURCE)
    for text, words in (
        ("objetive = 'jsd'", "*objetive: is not a setting of*pyproject.toml; did you mean 'objective'?"),
        ("eos = '0'", "*eos: must be an integer*pyproject.toml, got '0'"),
    ):
        (pytester.path / "pyproject.toml").write_text(f"[tool.opdtheory]\n{text}\n")
        refused = run(pytester, "--opd-audit")
        assert refused.ret == pytest.ExitCode.USAGE_ERROR
        refused.stderr.fnmatch_lines([words])
        # Without the option the plugin reads nothing.
        run(pytester).assert_outcomes()


def test_settings_that_the_mark_states_otherwise_are_refused(pytester):
    pytester.makepyfile(
        test_losses="""
        from opdtheory.testing import opd_loss

        @opd_loss("reverse_kl", objective="jsd")
        def twice(r):
            return r.token_sum(r.log_u)
        """
    )
    result = run(pytester, "--opd-audit")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*must hold settings of opdtheory.audit only, got objective*"])
