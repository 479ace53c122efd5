"""Run the arms of a plan, each in its own process, and keep their rows.

Finished arms stay as JSON files. Another run, or one with a longer plan, does only what is missing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from opdtheory.errors import InvalidArgumentError
from opdtheory.machine import cores
from opdtheory.reproduction.arm import machine, model_keys, recipe_of
from opdtheory.reproduction.plan import Arm, Plan
from opdtheory.training.models.storage import cache_folder, checked_record
from opdtheory.training.models.storage import stored as is_stored
from opdtheory.training.pairs import Role

__all__ = ["NOT_RUN", "Outcome", "adopt", "reproduce", "stored"]

NOT_RUN = "not run"

COMMAND = (sys.executable, "-m", "opdtheory.reproduction.arm")
_WAIT = 0.1  # seconds between looks at the processes


@dataclass
class Job:
    """One process: a model to train, or an arm.

    Attributes:
        name: how the job is reported.
        description: what the process reads.
        needs: names of the jobs that must finish first.
        arm: the arm, if it is one.
    """

    name: str
    description: dict[str, Any]
    needs: frozenset[str] = frozenset()
    arm: Arm | None = None


@dataclass
class Outcome:
    """The results of a plan.

    Attributes:
        plan: the plan.
        rows: rows of the plan's arms, finished or failed, in the plan's order.
        missing: labels of the arms without a row, each with the reason.
        models: records of the teachers and students.
        sessions: what each run in this folder did, with its wall-clock time.
        others: by name, whether a further plan has a page beside this one's.
    """

    plan: Plan
    rows: list[dict[str, Any]]
    missing: dict[str, str] = field(default_factory=dict)
    models: list[dict[str, Any]] = field(default_factory=list)
    sessions: list[dict[str, Any]] = field(default_factory=list)
    others: dict[str, bool] = field(default_factory=dict)


def reproduce(
    plan: Plan,
    out: Path,
    *,
    workers: int | None = None,
    cache: str | None = None,
    device: str = "auto",
    report: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Run the arms of a plan that have no row in the folder yet; those at a tuned rate once the rates are known.

    Args:
        plan: the arms.
        out: folder of the rows; kept between runs.
        workers: number of processes at a time, each with one thread; by default the plan's, else one per core.
        cache: folder of teachers and students.
        device: device of the arms.
        report: called with a line for each finished process.

    Raises:
        KeyboardInterrupt: after the running processes have been ended; finished rows stay.
    """
    folder = out / "arms"
    folder.mkdir(parents=True, exist_ok=True)
    workers = workers or plan.workers or cores()
    first = plan.arms()
    problems = _run_all(plan, out, list(_jobs(first, folder, cache, device)), workers, report)
    tuned = plan.tuned_arms(_rows(first, folder))
    problems |= _run_all(plan, out, list(_jobs(tuned, folder, cache, device)), workers, report)
    return stored(plan, out, cache=cache, problems=problems)


def _run_all(plan: Plan, out: Path, jobs: Sequence[Job], workers: int, report: Callable[[str], None]) -> dict[str, str]:
    """Run jobs, and return the problems of those that failed by name."""
    folder, problems = out / "arms", dict[str, str]()
    started = time.perf_counter()
    done: list[Job] = []
    try:
        if jobs:
            report(f"{len(jobs)} processes to run, {workers} at a time")
        for job, problem in _run(jobs, folder, workers):
            done.append(job)
            if problem is not None:
                problems[job.name] = problem
            seconds = time.perf_counter() - started
            left = seconds / len(done) * (len(jobs) - len(done))
            clock = f"{len(done)}/{len(jobs)}, {seconds:.0f} s, about {left:.0f} s left"
            report(f"[{clock}] {job.name}: {problem or _says(job, folder)}")
    finally:
        if done:
            _note_session(out, plan, done, time.perf_counter() - started, workers)
    return problems


def stored(plan: Plan, out: Path, *, cache: str | None = None, problems: dict[str, str] | None = None) -> Outcome:
    """The results of a plan that a folder holds, without running anything."""
    folder, problems = out / "arms", problems or {}
    first = plan.arms()
    arms = [*first, *plan.tuned_arms(_rows(first, folder))]
    rows = _rows(arms, folder)
    known = {Arm.of_row(row).label for row in rows}
    missing = {arm.label: problems.get(arm.label, NOT_RUN) for arm in arms if arm.label not in known}
    return Outcome(plan, rows, missing, _records(rows, cache), _sessions(out))


def adopt(path: Path, out: Path) -> int:
    """Copy the rows and sessions of a page's JSON lines into a folder that lacks them; return the number of rows.

    A row counts for an arm only if its settings and models are the same; other arms are run again.

    Raises:
        InvalidArgumentError: the file is missing or does not hold rows of the experiment.
    """
    try:
        head, *rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        arms = [(Arm.of_row(row), row) for row in rows]
        sessions = [json.dumps(session) + "\n" for session in head["sessions"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"must be the file of JSON lines next to a page, got {path} ({type(error).__name__}: {error})"
        raise InvalidArgumentError("adopt", problem) from None
    folder = out / "arms"
    folder.mkdir(parents=True, exist_ok=True)
    missing = [(arm, row) for arm, row in arms if not (folder / f"{arm.key}.json").exists()]
    for arm, row in missing:
        (folder / f"{arm.key}.json").write_text(json.dumps(row, allow_nan=False), encoding="utf-8")
    if missing and not (out / "sessions.jsonl").exists():
        (out / "sessions.jsonl").write_text("".join(sessions), encoding="utf-8")
    return len(missing)


def _jobs(arms: Sequence[Arm], folder: Path, cache: str | None, device: str) -> Iterator[Job]:
    known = set[tuple[str, Role, int, str | None]]()
    for arm in arms:
        if _stored_row(arm, folder) is not None:
            continue
        pair: list[tuple[Role, int]] = [("teacher", 0), ("student", arm.seed)]
        needed = []
        for role, seed in pair:
            if is_stored(cache_folder(cache) / f"{recipe_of(arm.task, role, seed, arm.base).key}.safetensors"):
                continue
            needed.append(f"{role} {seed} of {arm.task}")
            if (arm.task, role, seed, arm.base) not in known:  # before the first arm that needs it
                known.add((arm.task, role, seed, arm.base))
                model = {"task": arm.task, "role": role, "seed": seed, "base": arm.base, "cache": cache}
                yield Job(needed[-1], model)
        out = str(folder / f"{arm.key}.json")
        description = {"arm": arm.to_dict(), "cache": cache, "device": device, "out": out}
        yield Job(arm.label, description, frozenset(needed), arm)


def _run(jobs: Sequence[Job], folder: Path, workers: int) -> Iterator[tuple[Job, str | None]]:
    """Each job as it ends, with its problem, if there was one; no process outlives this."""
    waiting, running = list(jobs), dict[int, tuple[Job, subprocess.Popen[str], IO[str]]]()
    finished, broken = set[str](), set[str]()
    try:
        while waiting or running:
            for job in [job for job in waiting if job.needs & broken]:
                waiting.remove(job)
                broken.add(job.name)
                yield job, f"needs {', '.join(sorted(job.needs & broken))}, which failed"
            ready = [job for job in waiting if job.needs <= finished]
            for job in ready[: max(0, workers - len(running))]:
                waiting.remove(job)
                process, log = _start(job, folder)
                running[process.pid] = (job, process, log)
            for pid, (job, process, log) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[pid]
                log.close()
                problem = None if process.returncode == 0 else _last_words(Path(log.name), process.returncode)
                (finished if problem is None else broken).add(job.name)
                yield job, problem
            time.sleep(_WAIT)
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for _, process, log in running.values():
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            log.close()


def _start(job: Job, folder: Path) -> tuple[subprocess.Popen[str], IO[str]]:
    log = open(folder / f"{_file_name(job)}.log", "w", encoding="utf-8")
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(
        COMMAND,
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        text=True,
        env={**os.environ, **one_thread},
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(job.description))
    process.stdin.close()
    return process, log


def _last_words(log: Path, status: int) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    how = f"ended by signal {-status}" if status < 0 else f"status {status}"
    return f"{how}: {lines[-1].strip()}" if lines else how


def _rows(arms: Sequence[Arm], folder: Path) -> list[dict[str, Any]]:
    """The stored rows of some arms, in their order."""
    return [row for arm in arms if (row := _stored_row(arm, folder)) is not None]


def _stored_row(arm: Arm, folder: Path) -> dict[str, Any] | None:
    """The row of an arm, if it is complete and was measured with these settings and models."""
    try:
        row = json.loads((folder / f"{arm.key}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if row.get("identity") != arm.identity or row.get("models") != model_keys(arm.task, arm.seed, arm.base):
        return None
    return dict(row)


def _records(rows: Sequence[dict[str, Any]], cache: str | None) -> list[dict[str, Any]]:
    keys = dict.fromkeys(row["models"][role] for role in ("teacher", "student") for row in rows)
    paths = [cache_folder(cache) / f"{key}.safetensors" for key in keys]
    return [checked_record(path) for path in paths if is_stored(path)]


def _note_session(out: Path, plan: Plan, done: Sequence[Job], seconds: float, workers: int) -> None:
    session = {
        "plan": plan.name,
        "arms": sum(job.arm is not None for job in done),
        "models": sum(job.arm is None for job in done),
        "seconds": round(seconds, 1),
        "workers": workers,
        "machine": machine(),
    }
    with open(out / "sessions.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(session) + "\n")


def _sessions(out: Path) -> list[dict[str, Any]]:
    path = out / "sessions.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _says(job: Job, folder: Path) -> str:
    """The result of a finished job, in a few words."""
    if job.arm is None:
        return "trained"
    row = _stored_row(job.arm, folder)
    if row is None:
        return "FAILED: no row"
    if row["status"] == "failed":
        return f"failed: {row['error']}"
    start, end = (row[when]["test_sampled_accuracy"] for when in ("start", "end"))
    return f"sampled accuracy {start:.3f} to {end:.3f} in {row['seconds']:.0f} s"


def _file_name(job: Job) -> str:
    return job.arm.key if job.arm is not None else job.name.replace(" ", "-")
