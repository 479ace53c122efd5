"""Running coqc: whether it is there, compiling files in parallel, and asking for the axioms of a theorem."""

from __future__ import annotations

import graphlib
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from sources import Problem, Source

__all__ = ["AXIOMS", "Compiled", "Coq", "Missing", "axioms", "compile_all", "questions", "read_axioms", "recheck"]

# Those of Coq's real numbers.
AXIOMS = (
    "ClassicalDedekindReals.sig_not_dec",
    "ClassicalDedekindReals.sig_forall_dec",
    "FunctionalExtensionality.functional_extensionality_dep",
)
INSTALL = (
    "On Debian or Ubuntu:  apt-get install coq libcoq-coquelicot\n"
    "Elsewhere, with opam: opam install coq.8.16.1 coq-coquelicot"
)
# What coqchk must have found none of.
_SWITCHES = ("relying on type-in-type", "relying on unsafe (co)fixpoints", "whose positivity is assumed")
_NAMED = re.compile(r"([\w.']+)(?:$| :)")


class Missing(Exception):
    """Coq or Coquelicot is not installed; the message says what to install."""


@dataclass(frozen=True)
class Compiled:
    """What coqc made of a file.

    Attributes:
        holds: whether it accepts the file; None if it gave no answer in time.
        output: what it printed.
        seconds: how long it took.
    """

    holds: bool | None
    output: str
    seconds: float


@dataclass(frozen=True)
class Coq:
    """A coqc that runs.

    Attributes:
        program: its path.
        version: such as `8.16.1`.
    """

    program: str
    version: str

    @classmethod
    def found(cls, program: str, folder: Path) -> Coq:
        """The coqc of that name, with a Coquelicot that it finds; `folder` is for a file to try.

        Raises:
            Missing: one of them is not there.
        """
        path = shutil.which(program)
        if path is None:
            raise Missing(f"{program!r} is not on the PATH, so the proofs cannot be checked.\n{INSTALL}")
        said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
        version = re.search(r"version (\S+)", said)
        if version is None:
            raise Missing(f"{path} does not say which version of Coq it is, but {said!r}.\n{INSTALL}")
        coq = cls(path, version[1])
        (folder / "Try.v").write_text("From Coquelicot Require Coquelicot.\n", encoding="utf-8")
        tried = coq.compile(folder, "Try")
        if not tried.holds:
            raise Missing(f"Coq {coq.version} is there, but its library Coquelicot is not.\n{INSTALL}\n{tried.output}")
        return coq

    def compile(self, folder: Path, name: str, limit: float | None = None) -> Compiled:
        """Compile one file of the folder, whose compiled files it may require as `OPD`; `limit` is in seconds."""
        # Without -q a file in the home folder could change what is accepted.
        command = [self.program, "-q", "-w", "-ambiguous-paths", "-Q", ".", "OPD", f"{name}.v"]
        start = time.perf_counter()
        try:
            done = subprocess.run(
                command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit, encoding="utf-8"
            )
        except subprocess.TimeoutExpired:
            return Compiled(None, f"coqc gave no answer in {limit:.0f} s", time.perf_counter() - start)
        output = done.stdout.replace('"./', '"proofs/').strip()
        return Compiled(done.returncode == 0, output, time.perf_counter() - start)


def compile_all(
    coq: Coq, folder: Path, sources: Mapping[str, Source], workers: int, done: Callable[[str, float], None]
) -> None:
    """Write the files into the folder and compile them, each as soon as those that it requires are compiled.

    Args:
        coq: the program.
        folder: an empty folder.
        sources: the files by name.
        workers: the most processes at a time.
        done: called with the name of each compiled file and its seconds.

    Raises:
        Problem: coqc refuses a file; the message is its own.
    """
    for name, source in sources.items():
        (folder / f"{name}.v").write_bytes(source.text.encode("utf-8"))
    waiting = graphlib.TopologicalSorter({name: source.requires for name, source in sources.items()})
    waiting.prepare()
    running: dict[Future[Compiled], str] = {}
    with ThreadPoolExecutor(workers) as pool:
        while waiting.is_active():
            running |= {pool.submit(coq.compile, folder, name): name for name in waiting.get_ready()}
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for each in finished:
                name, result = running.pop(each), each.result()
                if not result.holds:
                    pool.shutdown(cancel_futures=True)
                    raise Problem(f"coqc refuses {sources[name].path}:\n{result.output}")
                waiting.done(name)
                done(name, result.seconds)


def recheck(coq: Coq, folder: Path, names: Iterable[str]) -> None:
    """Let coqchk, Coq's second checker, read the compiled files again, with all of the libraries that they require.

    It lists the axioms of these libraries whether they are used or not, so `axioms` alone asks for those.

    Raises:
        Missing: there is no coqchk beside coqc.
        Problem: coqchk refuses a file, or says that a check was switched off.
    """
    program = shutil.which("coqchk", path=str(Path(coq.program).parent))
    if program is None:
        raise Missing(f"there is no coqchk beside {coq.program}.\n{INSTALL}")
    command = [program, "-silent", "-o", "-Q", ".", "OPD", *(f"OPD.{name}" for name in names)]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
    if done.returncode or any(f"{switch}: <none>" not in done.stdout for switch in _SWITCHES):
        raise Problem(f"coqchk refuses the compiled files:\n{done.stdout}")


def questions(source: Source) -> str:
    """A file that asks Coq whether each theorem is of its statement, and for the axioms of its proof.

    It requires the theorem's file without importing it, so that no notation of that file changes what is asked.
    """
    lines = [f"From OPD Require {source.name}."]
    for each in source.statements:
        claim, theorem = f"OPD.{source.name}.{each.name}", f"OPD.{source.name}.{each.theorem}"
        lines += [
            f"Check ({theorem} : {'~ ' * each.is_twin}{claim}).",
            *_says(f"begin {each.name}"),
            f"Print Assumptions {theorem}.",
            *_says(f"end {each.name}"),
        ]
    return "\n".join(lines) + "\n"


def _says(marker: str) -> tuple[str, ...]:
    return "Goal True.", f'idtac "{marker}".', "Abort."


def axioms(coq: Coq, folder: Path, source: Source) -> dict[str, tuple[str, ...]]:
    """The axioms behind each statement and twin of a compiled theorem.

    Raises:
        Problem: a theorem is not that of its statement, or rests on an axiom that is not among `AXIOMS`.
    """
    asked = f"Axioms_{source.name}"
    (folder / f"{asked}.v").write_text(questions(source), encoding="utf-8")
    answer = coq.compile(folder, asked)
    if not answer.holds:
        raise Problem(f"{source.path}: a theorem is not that of its statement:\n{answer.output}")
    return read_axioms(source.path, answer.output, [each.name for each in source.statements])


def read_axioms(path: str, output: str, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The axioms by statement, from what Coq answers to `questions`.

    Raises:
        Problem: an answer is missing, or names an axiom that is not among `AXIOMS`.
    """
    found = {}
    for name in names:
        block = re.search(rf"^begin {re.escape(name)}\n(.*?)^end {re.escape(name)}$", output, re.DOTALL | re.MULTILINE)
        if block is None:
            raise Problem(f"{path}: Coq names no axioms of {name}:\n{output}")
        found[name] = _listed(path, name, block[1].splitlines())
    return found


def _listed(path: str, name: str, lines: list[str]) -> tuple[str, ...]:
    """The axioms of one answer; a line that is neither an axiom's nor indented counts as a forbidden axiom."""
    if lines == ["Closed under the global context"]:
        return ()
    if lines[:1] != ["Axioms:"] or len(lines) < 2:
        raise Problem(f"{path}: Coq's answer about {name} cannot be read:\n" + "\n".join(lines))
    heads = [line for line in lines[1:] if not line.startswith(" ")]
    named = [found[1] if (found := _NAMED.match(line)) else line for line in heads]
    if forbidden := [each for each in named if each not in AXIOMS]:
        raise Problem(f"{path}: {name} rests on more than Coq's real numbers: {', '.join(forbidden)}")
    return tuple(each for each in AXIOMS if each in named)
