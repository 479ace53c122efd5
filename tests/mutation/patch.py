"""Put a mutant in the place of the library's code, in a process that has imported the library already.

Where the change lies inside functions that have not run yet, their code objects are exchanged where they stand, which
costs milliseconds. Anything else, such as a line that ran when the module was imported, needs the library anew.
"""

from __future__ import annotations

import ast
import gc
import importlib.abc
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path

from tests.mutation.mutants import ROOT, Mutant, source_tree


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a syntax tree."""

    def __init__(self, path: Path, tree: ast.Module) -> None:
        self.path, self.tree = path, tree

    def find_spec(self, name, path=None, target=None):
        """That module only."""
        if name != ".".join(self.path.with_suffix("").parts):
            return None
        return importlib.util.spec_from_loader(name, self, origin=str(ROOT / self.path))

    def exec_module(self, module):
        """Run the tree."""
        module.__file__ = str(ROOT / self.path)
        exec(compile(self.tree, module.__file__, "exec"), module.__dict__)


def import_anew(path: Path, tree: ast.Module) -> None:
    """Forget the library and its tests, so that the next import of the module takes the tree."""
    for name in [n for n in sys.modules if n.split(".")[0] in ("opdtheory", "tests")]:
        if not name.startswith("tests.mutation") and name != "tests":
            del sys.modules[name]
    sys.meta_path.insert(0, Finder(path, tree))


def exchange(mutant: Mutant) -> bool:
    """Exchange the code objects that differ, in every function that has them; False where that cannot be done."""
    file = str(ROOT / mutant.path)
    old, new = (compile(tree, file, "exec") for tree in (source_tree(mutant.path), mutant.tree()))
    changed = list(_changed(old, new))
    if not changed or any(a is old for a, _ in changed):
        return False
    functions = [f for f in gc.get_objects() if type(f) is types.FunctionType and f.__code__.co_filename == file]
    found = False
    for before, after in changed:
        for function in functions:
            if function.__code__ == before:
                if before.co_freevars != after.co_freevars:
                    return False
                function.__code__ = after
                found = True
    return found


def _changed(old: types.CodeType, new: types.CodeType) -> Iterator[tuple[types.CodeType, types.CodeType]]:
    """Pairs of code objects that differ, from the outside in; the module itself only for what is its own."""
    inside = [list(filter(lambda c: isinstance(c, types.CodeType), code.co_consts)) for code in (old, new)]
    if len(inside[0]) != len(inside[1]):
        yield old, new
        return
    is_module = old.co_name == "<module>"
    if is_module:
        if _own(old) != _own(new):
            yield old, new
    elif old != new:
        yield old, new
    for a, b in zip(*inside, strict=True):
        if a != b:
            # The body of a class runs once, when it is defined, and is no function.
            yield from _changed(a, b)


def _own(code: types.CodeType) -> tuple[object, ...]:
    return code.co_code, code.co_names, tuple(c for c in code.co_consts if not isinstance(c, types.CodeType))
