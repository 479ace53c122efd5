"""Mutation testing: break one operator or constant of the library at a time and see whether a check fails.

    python tests/mutation.py                        # every mutant of the default modules
    python tests/mutation.py --sample 200 --seed 0  # a random sample of them
    python tests/mutation.py --terms opdtheory/exact/oracle.py   # signs and dropped terms only

A mutant flips a sign, drops a term, swaps a factor for a divisor, turns a comparison round or adds one to a
constant. It is killed when a test that covers its module fails; a mutant of a theorem, when that theorem's own steps,
checks or twins no longer pass. Those that survive are printed with their line. Module constants in capitals (budgets,
tolerances) and, in the theorems, the numbers that choose instances and the false twins are left alone.
"""

from __future__ import annotations

import argparse
import ast
import copy
import functools
import importlib
import importlib.abc
import importlib.util
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Which tests stand guard over a module, quickest first.
GUARDS = {
    "opdtheory/divergences": ["tests/unit/test_logspace.py", "tests/unit/test_divergences.py"],
    "opdtheory/divergences/quadrature.py": ["tests/unit/test_transform.py"],
    "opdtheory/divergences/transform.py": ["tests/unit/test_transform.py", "tests/unit/test_divergences.py"],
    "opdtheory/exact": [
        "tests/unit/test_oracle.py",
        "tests/unit/test_policies.py",
        "tests/unit/test_expectation.py",
        "tests/unit/test_environment.py",
    ],
    "opdtheory/exact/sampling.py": ["tests/unit/test_montecarlo.py"],
    "opdtheory/theorems/theorem.py": ["tests/laws/test_theorems.py"],
    "opdtheory/theorems/pages.py": ["tests/laws/test_theorems.py"],
}
DEFAULT = [
    "opdtheory/divergences/catalogue.py",
    "opdtheory/divergences/logspace.py",
    "opdtheory/exact/oracle.py",
    "opdtheory/exact/tree.py",
    "opdtheory/exact/chain.py",
    "opdtheory/exact/enumeration.py",
    "opdtheory/exact/expectation.py",
    "opdtheory/theorems/opd_plus.py",
    "opdtheory/theorems/stop_gradient.py",
    "opdtheory/theorems/gauge.py",
]
TIMEOUT = 300

# Methods whose integer arguments are axes and sizes: on the matrices here, axis -1 is axis 1.
_OF_AXES = {"amax", "cumsum", "expand", "flip", "gather", "log_softmax", "logcumsumexp", "logsumexp", "max", "mean"}
_OF_AXES |= {"softmax", "sort", "squeeze", "sum", "unsqueeze", "view"}

_SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
_TURNS = {ast.Lt: ast.GtE, ast.LtE: ast.Gt, ast.Gt: ast.LtE, ast.GtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}


@dataclass(frozen=True)
class Mutant:
    """One change: in which module, at which of its sites, and what the site becomes."""

    path: Path
    line: int
    before: str
    after: str
    site: int
    variant: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.before}  ->  {self.after}"

    def tree(self) -> ast.Module:
        """The module with the change made."""
        tree = ast.parse((ROOT / self.path).read_text(encoding="utf-8"))
        node = _sites(tree, self.path)[self.site]
        _Replace(node, _changed(node, self.variant)).visit(tree)
        return ast.fix_missing_locations(tree)


def mutants(path: Path, terms: bool = False) -> Iterator[Mutant]:
    """Every mutant of a module, or those that negate or drop a term."""
    for site, node in enumerate(_sites(ast.parse((ROOT / path).read_text(encoding="utf-8")), path)):
        if terms and not _is_term(node):
            continue
        for variant in range(_variants(node)):
            after = ast.unparse(_changed(node, variant))
            yield Mutant(path, node.lineno, ast.unparse(node), after, site, variant)


def _sites(tree: ast.Module, path: Path) -> list[ast.expr]:
    kinds: tuple[type[ast.expr], ...] = (ast.BinOp, ast.UnaryOp, ast.Compare)
    if "theorems" not in path.parts:
        kinds += (ast.Constant,)
    return [node for node in _code(tree) if isinstance(node, kinds)]


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that compute: no annotations, messages, docstrings, decorators or imports."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list") or isinstance(node, (ast.Raise, ast.JoinedStr)):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, (ast.Raise, ast.JoinedStr, ast.Import)):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            # The twins of a theorem are false already; another falsehood in their place proves nothing.
            if isinstance(child, ast.Dict) and isinstance(node, ast.Call) and ast.unparse(node.func) == "Identity":
                continue
            if isinstance(child, ast.Assign) and ast.unparse(child.targets[0]).isupper():
                continue
            if _is_last_axis(node, child):
                continue
            yield child
            yield from _code(child)


def _is_last_axis(call: ast.AST, argument: ast.AST) -> bool:
    """Whether this is the -1 of `x.sum(-1)` or `dim=-1`."""
    of_axes = isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in _OF_AXES
    named = isinstance(call, ast.keyword) and call.arg == "dim"
    return (of_axes or named) and ast.unparse(argument) == "-1"


def _is_term(node: ast.AST) -> bool:
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant)
    return isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub))


def _variants(node: ast.AST) -> int:
    if isinstance(node, ast.BinOp):
        return 2 if isinstance(node.op, (ast.Add, ast.Sub)) else int(type(node.op) in _SWAPS)
    if isinstance(node, ast.UnaryOp):
        return int(isinstance(node.op, ast.USub))
    if isinstance(node, ast.Compare):
        return int(len(node.ops) == 1 and type(node.ops[0]) in _TURNS)
    return int(isinstance(node, ast.Constant) and type(node.value) in (int, float))


def _changed(node: ast.AST, variant: int) -> ast.expr:
    changed = copy.deepcopy(node)
    if isinstance(changed, ast.BinOp):
        if variant == 1:
            return changed.left  # the right-hand term dropped
        changed.op = _SWAPS[type(changed.op)]()
    elif isinstance(changed, ast.UnaryOp):
        return changed.operand
    elif isinstance(changed, ast.Compare):
        changed.ops = [_TURNS[type(changed.ops[0])]()]
    elif isinstance(changed, ast.Constant):
        changed.value = changed.value + 1
    assert isinstance(changed, ast.expr)
    return changed


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def generic_visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else super().generic_visit(node)

    visit_Constant = generic_visit


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a mutated syntax tree."""

    def __init__(self, mutant: Mutant) -> None:
        self.name = ".".join(mutant.path.with_suffix("").parts)
        self.mutant = mutant

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        return importlib.util.spec_from_loader(name, self, origin=str(ROOT / self.mutant.path))

    def exec_module(self, module):
        module.__file__ = str(ROOT / self.mutant.path)
        exec(compile(self.mutant.tree(), module.__file__, "exec"), module.__dict__)


def killed(mutant: Mutant) -> bool:
    """In a fork: whether a guard fails on the mutant."""
    sys.meta_path.insert(0, _Finder(mutant))
    return fails(mutant.path)


def guards_of(path: Path) -> list[str]:
    """What stands guard over a module: test files, or modules that gather theorems."""
    if "theorems" in path.parts and str(path) not in GUARDS:
        return statements_on(path)
    return GUARDS[max((key for key in GUARDS if str(path).startswith(key)), key=len)]


def fails(path: Path) -> bool:
    """Whether a guard of a module fails."""
    import pytest

    guards = guards_of(path)
    if not guards or not guards[0].endswith(".py"):
        run: set[str] = set()
        for name in guards:
            for theorem in importlib.import_module(name).theorems():
                if theorem.number not in run and not theorem.run().passed:
                    return True
                run.add(theorem.number)
        return False
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header"]
    return pytest.main([*options, *guards]) != 0


def statements_on(path: Path) -> list[str]:
    """The modules that gather theorems and import this one, directly or through others: the smallest first."""
    package = path.parent
    imports = {
        file.stem: _imported(ROOT / file)
        for file in map(package.joinpath, os.listdir(ROOT / package))
        if file.suffix == ".py"
    }
    gather = [name for name in imports if name != "__init__" and _defines_theorems(ROOT / package / f"{name}.py")]

    def reach(name: str) -> set[str]:
        seen, waiting = set(), [name]
        while waiting:
            module = waiting.pop()
            if module not in seen:
                seen.add(module)
                waiting += imports.get(module, ())
        return seen

    return [
        ".".join([*package.parts, name])
        for name in sorted(gather, key=lambda n: (len(reach(n)), n))
        if path.stem in reach(name)
    ]


def _imported(file: Path) -> set[str]:
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("opdtheory.theorems"):
            last = node.module.split(".")[2:]
            found |= {last[0]} if last else {alias.name for alias in node.names}
    return found


def _defines_theorems(file: Path) -> bool:
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return any(isinstance(node, ast.FunctionDef) and node.name == "theorems" for node in body)


def run(check: Callable[[], bool]) -> int:
    """Start a fork that exits with 0 unless the check finds a failure; returns its process number."""
    pid = os.fork()
    if pid:
        return pid
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    signal.alarm(TIMEOUT)
    try:
        dead = check()
    except Exception:
        dead = True
    os._exit(1 if dead else 0)


def main() -> int:
    """Run the mutants, print the kill rate and the survivors; 0 if the rate is at least 95 %."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=DEFAULT)
    parser.add_argument("--sample", type=int, help="how many mutants to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--terms", action="store_true", help="negate or drop terms only")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()

    os.chdir(ROOT)
    found = [mutant for module in options.modules for mutant in mutants(Path(module), options.terms)]
    if options.sample is not None and options.sample < len(found):
        found = random.Random(options.seed).sample(found, options.sample)
    # Imported once, before the forks; the library itself is imported by each.
    import hypothesis  # noqa: F401
    import mpmath  # noqa: F401
    import pytest  # noqa: F401
    import scipy.optimize  # noqa: F401
    import sympy  # noqa: F401
    import torch

    torch.set_num_threads(1)
    # A guard that fails on the library as it is kills every mutant and shows nothing.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    for path in {tuple(guards_of(mutant.path)): mutant.path for mutant in found}.values():
        if os.waitpid(run(functools.partial(fails, path)), 0)[1]:
            raise SystemExit(f"the guards of {path} fail without any change")
    start, waiting, running, survivors, timeouts, done = time.time(), list(found), {}, [], 0, 0
    per_module: dict[str, list[int]] = {}
    while waiting or running:
        while waiting and len(running) < options.workers:
            mutant = waiting.pop()
            running[run(functools.partial(killed, mutant))] = mutant
        pid, status = os.wait()
        mutant = running.pop(pid)
        counts = per_module.setdefault(str(mutant.path), [0, 0])
        counts[1] += 1
        done += 1
        if status == 0:
            survivors.append(mutant)
            print(f"survives: {mutant}", flush=True)
        else:
            counts[0] += 1
            timeouts += os.WIFSIGNALED(status)
        if done % 50 == 0:
            print(f"... {done} of {len(found)} in {time.time() - start:.0f} s", flush=True)
    for module, (dead, total) in sorted(per_module.items()):
        print(f"{module}: {dead} of {total} killed")
    rate = 1.0 - len(survivors) / max(len(found), 1)
    print(
        f"{len(found) - len(survivors)} of {len(found)} mutants killed ({100 * rate:.1f} %), {timeouts} of them by "
        f"time-out, in {time.time() - start:.0f} s"
    )
    return 0 if rate >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
