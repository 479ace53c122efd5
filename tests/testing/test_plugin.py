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
            "k3: OTHER OBJECTIVE",
            "The loss does not descend reverse_kl*",
        ]
    )
    result.stdout.no_fnmatch_line("*Traceback*")
    chosen = run(pytester, "--opd-audit", "-m", "opd_audit", "--strict-markers", "-k", "k2")
    chosen.assert_outcomes(passed=2, deselected=2)


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
