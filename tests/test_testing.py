"""The testing layer as a whole: its names, and what importing it loads."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

import opdtheory
from opdtheory import testing


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )


def test_all_public_names_are_there():
    assert testing is opdtheory.testing
    assert set(testing.__all__) <= set(dir(testing))
    for name in testing.__all__:
        assert getattr(testing, name).__doc__
    with pytest.raises(AttributeError, match="no_such"):
        testing.no_such  # noqa: B018


def test_importing_the_library_leaves_the_testing_layer_alone():
    done = python("import opdtheory, sys; assert not any('testing' in m for m in sys.modules if 'opdtheory' in m)")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_assertions_work_without_hypothesis_and_strategies_say_what_is_missing():
    done = python(
        """
        import sys
        sys.modules["hypothesis"] = None
        from opdtheory.testing import assert_unbiased
        assert_unbiased(lambda r: r.token_sum(r.log_u.square() / 2), "reverse_kl")
        try:
            from opdtheory.testing import policies
        except ImportError as error:
            assert "pip install opdtheory[testing]" in str(error), error
        else:
            raise SystemExit("no ImportError")
        """
    )
    assert done.returncode == 0, done.stderr
