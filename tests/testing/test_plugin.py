"""The pytest plugin: idle without `--opd-audit`, one item for each mark with it; and the distributions beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import opdtheory as opd
from opdtheory.errors import InvalidArgumentError, LossError
from opdtheory.testing import assert_minimises, assert_same_gradient, opd_loss
from opdtheory.testing.marks import claims_of

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


def k2(r):
    return r.token_sum(r.log_u.square() / 2)


def k3(r):
    return r.token_sum(r.log_u.expm1() - r.log_u)


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
        grew.stdout.fnmatch_lines(["the bias is larger than the one that the baseline records: it was biased with*"])
        gone = outcome(biased.format(0.0), "--opd-baseline", "known.json")
        gone.stdout.fnmatch_lines(["VANISHED test_mine.py::mine*update the baseline", "*1 vanished*"])
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


# Marks.


def test_marks_leave_the_function_alone_and_add_up():
    def loss(r):
        return r.token_sum(r.log_u)

    marked = opd_loss("jsd", "sequence", "biased", gamma=0.5, eos=0)(
        opd_loss(claims=opd.divergence("alpha", alpha=0.5))(loss)
    )
    assert marked is loss
    assert [claim.label for claim in claims_of(loss)] == [
        "jsd-sequence-eos=0-gamma=0.5",
        "alpha(alpha=0.5)-token_local",
    ]
    assert claims_of(print) == () and claims_of(object) == () and claims_of(None) == ()


@pytest.mark.parametrize(
    ("asked", "met"), [("exact", {"exact"}), ("exact_up_to_scale", {"exact", "exact_up_to_scale"})]
)
def test_which_verdicts_meet_a_mark(asked, met):
    @opd_loss("jsd", verdict=asked)
    def loss(r):
        return r

    (claim,) = claims_of(loss)
    assert {verdict for verdict in ("exact", "exact_up_to_scale", "biased", "zero") if claim.is_met_by(verdict)} == met


def test_marks_that_make_no_sense_are_refused():
    for arguments, name in (({"granularity": "word"}, "granularity"), ({"verdict": "fine"}, "verdict")):
        with pytest.raises(InvalidArgumentError, match=name):
            opd_loss("jsd", **arguments)
    with pytest.raises(InvalidArgumentError, match="claims"):
        opd_loss(k2)
    with pytest.raises(InvalidArgumentError, match="Estimator"):
        opd_loss("jsd")(opd.estimator("opd_plus", "jsd"))


# Distributions.


def test_minimising_is_up_to_a_positive_scale():
    report = assert_minimises(lambda r: 3 * k2(r), "reverse_kl", seed=1)
    assert report.scale == pytest.approx(3.0) and report.settings["seed"] == 1
    assert assert_minimises(k3, opd.divergence("forward_kl"), eos=0).verdict == "exact"
    with pytest.raises(AssertionError) as caught:
        assert_minimises(k3, "reverse_kl")
    assert str(caught.value).startswith(
        "k3 does not minimise reverse_kl (token_local): it descends another objective than the one claimed; "
        "relative bias 0.631, cosine 0.808088, best scale 0.717"
    )
    with pytest.raises(AssertionError, match="relative bias 2, cosine -1"):
        assert_minimises(lambda r: -k2(r), "reverse_kl")
    with pytest.raises(AssertionError, match="k2 does not minimise reverse_kl .sequence"):
        assert_minimises(k2, "reverse_kl", "sequence")


def test_losses_with_the_same_mean_gradient_are_alike():
    def reward(r):
        return r.token_sum(-(r.log_u.detach() + 1.0) * r.student_logprobs)

    assert assert_same_gradient(k2, reward, eos=0) < 1e-9
    # A value with no gradient in the mean is added; the mean gradient of both is zero in the second case.
    assert assert_same_gradient(k3, lambda r: k3(r) + r.token_sum(r.log_u)) < 1e-9
    assert assert_same_gradient(lambda r: r.token_sum(r.log_u), lambda r: r.token_sum(-r.log_u)) == 0.0
    assert assert_same_gradient(lambda r: k2(r).float(), k2) < 1e-4


def test_losses_that_differ_are_told_apart_by_their_numbers():
    with pytest.raises(AssertionError) as caught:
        assert_same_gradient(k2, k3)
    assert str(caught.value).startswith("the expected gradients of k2 and k3 differ by 0.")
    assert str(caught.value).count("sharpness") == 6
    small = pytest.raises(AssertionError, match="more than 1e-09")
    with small:
        assert_same_gradient(k2, lambda r: (1 + 1e-8) * k2(r))
    assert assert_same_gradient(k2, lambda r: (1 + 1e-8) * k2(r), tolerance=1e-6) > 1e-9
    with pytest.raises(AssertionError):
        assert_same_gradient(k2, lambda r: -k2(r))

    # Alike on policy, apart off policy.
    def on_behaviour(r):
        return r.token_sum((r.teacher_logprobs - r.behavior_logprobs) * -r.student_logprobs)

    assert_same_gradient(k2, on_behaviour)
    with pytest.raises(AssertionError):
        assert_same_gradient(k2, on_behaviour, off_policy=0.3)


def test_the_group_of_a_coupled_loss_is_seen():
    def group(r):
        sums = (r.log_u.detach() * r.mask).sum(-1)
        return -((sums - sums.mean()) * (r.student_logprobs * r.mask).sum(-1)).mean()

    def alone(r):
        return -((r.log_u.detach() * r.mask).sum(-1) * (r.student_logprobs * r.mask).sum(-1)).mean() / 2

    assert assert_same_gradient(group, alone, batch_size=2) < 1e-9
    with pytest.raises(AssertionError):
        assert_same_gradient(group, lambda r: 2 * alone(r), batch_size=2)


def test_positions_that_an_environment_writes_are_seen():
    def first_too(r):
        """Trains the first token whoever wrote it."""
        every = r.log_u.detach() * -r.student_logprobs
        return r.token_sum(every) + ((1 - r.mask) * every)[:, 0].mean()

    assert assert_same_gradient(k2, first_too) < 1e-9
    with pytest.raises(AssertionError):
        assert_same_gradient(k2, first_too, environment=[0])
    assert assert_same_gradient(k2, lambda r: k2(r) + 0 * r.log_u.sum(), prompts=2, environment=[1]) < 1e-9


def test_what_cannot_be_compared_is_an_error():
    with pytest.raises(InvalidArgumentError, match="off_policy"):
        assert_same_gradient(k2, k3, off_policy=-1.0)
    with pytest.raises(InvalidArgumentError, match="tolerance"):
        assert_same_gradient(k2, k3, tolerance=-1.0)
    with pytest.raises(LossError, match="scalar"):
        assert_same_gradient(k2, lambda r: r.log_u)
    assert torch.get_default_dtype() == torch.float32
