"""What the action runs: `opdtheory audit` of each target, with a report in the job summary and annotations.

Everything comes through the environment: OPD_TARGETS, OPD_OBJECTIVE, OPD_ARGUMENTS and OPD_FOLDER are the inputs of
`action.yml`, GITHUB_STEP_SUMMARY is the file of the summary. The exit status is that of the audits, the largest.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import subprocess
import sys
from pathlib import Path, PurePosixPath

HEADLINES = {0: "as claimed", 1: "not what it claims", 2: "cannot be audited"}


def main() -> int:
    """Audit every target and return the exit status."""
    targets = [line.strip() for line in os.environ["OPD_TARGETS"].splitlines() if line.strip()]
    if not targets:
        print("::error title=opdtheory audit::the input `targets` names no loss")
        return 2
    try:
        options = shlex.split(os.environ.get("OPD_ARGUMENTS", ""))
    except ValueError as error:
        print(
            f"::error title=opdtheory audit::the input `arguments` is not quoted as in a shell{escaped(f': {error}')}"
        )
        return 2
    if objective := os.environ.get("OPD_OBJECTIVE", "").strip():
        options = ["--objective", objective, *options]
    return max(audit(target, options) for target in targets)


def audit(target: str, options: list[str]) -> int:
    """Audit one target; returns its exit status."""
    # After `--` a target is never an option.
    command = [sys.executable, "-m", "opdtheory", "audit", *options, "--", target]
    done = subprocess.run(command, text=True, encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    # What a loss prints must not be read as a command of the workflow.
    token = secrets.token_hex(16)
    print(f"::group::{escaped(target)}\n::stop-commands::{token}\n{done.stdout}\n::{token}::\n::endgroup::")
    found = report_of(done.stdout, target)
    # Python ends with 1 too if there is no report, as without the package.
    status = done.returncode if found and done.returncode in HEADLINES else 2
    if status:
        print(f"::error {place(target)}title=opdtheory audit::{escaped(message(found or done.stdout, target))}")
    summarise(target, HEADLINES[status], done.stdout)
    sys.stdout.flush()
    return status


def report_of(printed: str, target: str) -> str:
    """The report in what was printed, below whatever the loss itself prints; nothing if there is none."""
    found = re.search(rf"^{re.escape(target)}: .*", printed, re.MULTILINE | re.DOTALL)
    return found[0] if found else ""


def message(report: str, target: str) -> str:
    """The headline and the first paragraph of a report."""
    paragraphs = [" ".join(each.split())[:1000] for each in report.split("\n\n") if each.strip()]
    return "\n".join(paragraphs[:2]) or f"{target} printed nothing"


def place(target: str) -> str:
    """Where to show an annotation: the file of the target, and the line of its function."""
    path, _, name = target.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        return ""
    source = Path(path).read_text(encoding="utf-8", errors="replace")
    found = re.search(rf"^\s*(?:def\s+)?{re.escape(name.rpartition('.')[2])}\b", source, re.MULTILINE)
    line = f",line={source.count(chr(10), 0, found.end()) + 1}" if found else ""
    shown = PurePosixPath(os.environ.get("OPD_FOLDER") or ".") / PurePosixPath(Path(path).as_posix())
    return f"file={escaped(str(shown), in_property=True)}{line},"


def escaped(text: str, in_property: bool = False) -> str:
    """Text as the data, or as a property, of a workflow command."""
    pairs = [("%", "%25"), ("\r", "%0D"), ("\n", "%0A"), *([(":", "%3A"), (",", "%2C")] if in_property else [])]
    for plain, code in pairs:
        text = text.replace(plain, code)
    return text


def summarise(target: str, headline: str, report: str) -> None:
    """Add a report to the summary of the job."""
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if not path:
        return
    # A fence longer than any in the report, so that nothing in it ends the block.
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", f"{target}{report}")), 3)
    with open(path, "a", encoding="utf-8") as summary:
        summary.write(f"### opdtheory audit: {headline}\n\n{fence}text\n{target}\n\n{report.strip()}\n{fence}\n\n")


if __name__ == "__main__":
    sys.exit(main())
