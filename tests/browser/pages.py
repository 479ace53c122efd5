"""The pages that are walked: the site, and one report of every sort that the commands write."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.browser.walk import Target, fits

__all__ = ["REPORTS", "build_site", "reports", "scratch"]

ROOT = Path(__file__).resolve().parents[2]

# A name that is longer than a narrow page, as the tests of a project have them.
_LONG = "test_distillation_losses_of_the_whole_project"
_LOSSES = """
import torch
import opdtheory as opd

sound = opd.estimator("opd_plus", "jsd")
k3 = opd.estimator("k3_loss")
biased = opd.estimator("opd", "forward_kl")

def test_distillation_losses_of_the_whole_project_with_a_clipped_and_normalised_log_ratio(rollouts):
    return rollouts.token_mean(rollouts.log_u.clamp(-0.2, 0.2).square())

def coupled(rollouts):
    return (rollouts.log_u.sum(-1).square() / 2).mean()

def logs(pair, prompt, answer):
    ids, where = torch.tensor([prompt + answer]), slice(len(prompt) - 1, -1)
    return [model(ids).logits[0, where].log_softmax(-1) for model in (pair.student, pair.teacher)]

def trainer(pair, prompts, answers):
    for prompt, answer in zip(prompts, answers):
        p, q = logs(pair, prompt, answer)
        ((p.exp() * (p - q)).sum() / len(prompts)).backward()

def forward_trainer(pair, prompts, answers):
    for prompt, answer in zip(prompts, answers):
        p, q = logs(pair, prompt, answer)
        ((q.exp() * (q - p)).sum() / len(prompts)).backward()
"""
_FILE = f"{_LONG}.py"
_LONG_LOSS = f"{_FILE}:{_LONG}_with_a_clipped_and_normalised_log_ratio"
_RUNS = ROOT / "examples" / "runs"

# The commands, in a folder that holds the losses above; each writes the page of its name.
REPORTS: dict[str, list[str]] = {
    "audit-exact": ["audit", f"{_FILE}:sound"],
    "audit-other": ["audit", f"{_FILE}:k3"],
    "audit-biased": ["audit", f"{_FILE}:biased"],
    "audit-long-name": [
        "audit",
        _LONG_LOSS,
        "--objective",
        "skew_forward_kl(lam=0.125)",
        "--granularity",
        "token_return",
    ],
    "audit-coupled": ["audit", f"{_FILE}:coupled", "--batch-size", "2"],
    "audit-sampled": ["audit", f"{_FILE}:k3", "--method", "monte_carlo", "--alpha", "1e-3"],
    "trainer-exact": ["audit-trainer", f"{_FILE}:trainer"],
    "trainer-other": ["audit-trainer", f"{_FILE}:forward_trainer"],
    "diagnose-collapse": [
        *("diagnose", str(_RUNS / "stop_gradient_forward_kl.jsonl.gz"), "--divergence", "forward_kl"),
        *("--together", "4", "--have", "sampled"),
    ],
    "diagnose-healthy": [
        *("diagnose", str(_RUNS / "healthy.jsonl.gz"), "--estimator", "opd_plus", "--divergence", "jsd"),
        *("--have", "top_k"),
    ],
    "diagnose-engine": ["diagnose", str(_RUNS / "engine_at_0.7.jsonl.gz")],
    "verify": ["verify"],
}


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def build_site(folder: Path) -> Path:
    """Build the documentation in a folder and return it.

    Raises:
        SystemExit: it cannot be built.
    """
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if built.returncode:
        raise SystemExit(f"mkdocs build failed\n{built.stdout}{built.stderr}")
    return folder


def reports(folder: Path | None, verification: Path | None, work: Path, only: str = "*") -> list[Target]:
    """The reports in a folder; without one, those of the commands above, made in `work`.

    Args:
        folder: HTML files to walk as they are, or None.
        verification: the page of a verification, which takes a minute to make, or None.
        work: an empty folder.
        only: the names to make.
    """
    if folder is not None:
        targets = [Target(path.stem, path) for path in sorted(folder.rglob("*.html"))]
    else:
        made = {name: call for name, call in REPORTS.items() if fits(name, only)}
        if verification is not None:
            made.pop("verify", None)
        targets = [Target(name, make(name, call, work)) for name, call in made.items()]
    return targets + ([] if verification is None else [Target("verify", verification)])


def make(name: str, call: list[str], work: Path) -> Path:
    """Run a command in `work` and return the page that it writes.

    Raises:
        SystemExit: it wrote none.
    """
    from opdtheory.cli import main

    (work / _FILE).write_text(_LOSSES, encoding="utf-8")
    path = work / f"{name}.html"
    said = io.StringIO()
    with contextlib.chdir(work), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        with contextlib.suppress(SystemExit):
            main([*call, "--report" if call[0] == "verify" else "--html", str(path)])
    if not path.is_file():
        raise SystemExit(f"opdtheory {' '.join(call)} wrote no page\n{said.getvalue()}")
    return path
