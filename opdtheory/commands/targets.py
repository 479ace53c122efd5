"""From `PATH.py:FUNCTION` or `package.module:FUNCTION` to a function, whatever its module does when it is imported."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from opdtheory.commands.console import UsageError

__all__ = ["Target", "failure", "find", "importable"]

# The frames of this package say nothing of the user's code.
_MACHINERY = f"{Path(__file__).resolve().parents[1]}{os.sep}"

# Characters of an exception's text or of a line of code that are shown.
_LONGEST = 300


@dataclass(frozen=True)
class Target:
    """A function that the command line names.

    Attributes:
        function: the function.
        file: the file that defines its module, as a path to show, or None if it is not known.
        folder: the folder whose modules the function's own imports find, as `python FILE` and `python -m` do.
        stem: the name of the file where it was named by its path, else None.
    """

    function: Callable[..., Any]
    file: Path | None
    folder: Path
    stem: str | None


def find(target: str) -> Target:
    """Import the function that `PATH.py:FUNCTION` or `package.module:FUNCTION` names.

    Raises:
        UsageError: there is no such file, module or function, it is not callable, or the module cannot be imported: it
            raises, exits or is not Python.
    """
    where, colon, name = target.rpartition(":")
    if not colon or not where or not name:
        raise UsageError(f"the loss must be PATH.py:FUNCTION or package.module:FUNCTION, got {target!r}")
    path = Path(where) if where.endswith(".py") else None
    if path is not None and not path.is_file():
        raise UsageError(f"there is no file {path}")
    folder = Path.cwd() if path is None else path.resolve().parent
    stem = None if path is None else path.stem
    with importable(folder, stem):
        module = _imported(where, path)
        file = path or _shown(getattr(module, "__file__", None))
        found = _attribute(module, name, where, file)
    if not callable(found):
        raise UsageError(f"{target} must be a function of rollouts, got {type(found).__name__}")
    return Target(found, file, folder, stem)


def _imported(where: str, path: Path | None) -> Any:
    try:
        return importlib.import_module(where) if path is None else _loaded(path)
    except KeyboardInterrupt:
        raise
    # A module may exit or raise what is no Exception, as pytest.importorskip does.
    except BaseException as error:
        if path is None and isinstance(error, ModuleNotFoundError) and _names(where, error):
            raise UsageError(f"module {where!r} cannot be imported: {error}") from None
        raise failure(f"{where} cannot be imported", error, path) from error


def _attribute(module: Any, name: str, where: str, file: Path | None) -> Any:
    found: Any = module
    try:
        for part in name.split("."):
            if not hasattr(found, part):
                raise UsageError(f"{where} has no {name!r}; it has {_functions(module)}")
            found = getattr(found, part)
    except (KeyboardInterrupt, UsageError):
        raise
    except BaseException as error:
        raise failure(f"{where} has a {name!r} that cannot be read", error, file) from error
    return found


@contextmanager
def importable(folder: Path, stem: str | None = None) -> Iterator[None]:
    """Let imports find the modules of a folder, except a module `stem` that exists elsewhere too.

    Where the loss is in a file named `copy.py`, `import copy` still means the standard library.
    """
    entry = str(folder)
    finder = None if stem is None else _Elsewhere(stem, entry)
    sys.path.insert(0, entry)
    if finder is not None:
        sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        # What ran in between may have changed either list.
        if entry in sys.path:
            sys.path.remove(entry)
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)


@dataclass(frozen=True)
class _Elsewhere:
    """Find a module of one name outside a folder; where there is none, leave it to the other finders."""

    name: str
    folder: str

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> Any:
        """The specification of the module, or None."""
        if name != self.name or path is not None:
            return None
        elsewhere = [each for each in sys.path if each != self.folder]
        return importlib.machinery.PathFinder.find_spec(name, elsewhere)


def failure(what: str, error: BaseException, file: Path | None) -> UsageError:
    """The usage error, of two lines, for an exception that the user's code raised: what it is, and where.

    Args:
        what: what failed, such as `losses.py cannot be imported`.
        error: the exception.
        file: the file whose line to name if it is in the traceback.
    """
    return UsageError(f"{what}: {_in_a_line(error)}\n{_place(error, file)}")


def _in_a_line(error: BaseException) -> str:
    try:
        text = " ".join(str(error).split())
    # An exception of the user's may fail to describe itself.
    except Exception:
        text = ""
    name = type(error).__name__
    if isinstance(error, SystemExit):
        text = f"it exits with status {error.code}"
    return f"{name}: {text[:_LONGEST]}" if text else name


def _place(error: BaseException, file: Path | None) -> str:
    """The line of the user's code that raised, if there is one."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return _line(_shown(error.filename), error.lineno, error.text)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _of_the_machinery(frame.filename)]
    ours = [frame for frame in frames if file is not None and _same(frame.filename, file)]
    if not frames:
        return "--traceback shows where"
    frame = (ours or frames)[-1]
    return _line(_shown(frame.filename), frame.lineno, frame.line)


def _line(file: Path | None, number: int | None, text: str | None) -> str:
    source = f": {text.strip()}" if text and text.strip() else ""
    return f"at {file}:{number}{source[:_LONGEST]} (--traceback shows all)"


def _of_the_machinery(filename: str) -> bool:
    return filename.startswith("<frozen") or filename.startswith(_MACHINERY)


def _same(filename: str, file: Path) -> bool:
    return Path(filename).name == file.name and Path(filename).resolve() == file.resolve()


def _shown(filename: str | None) -> Path | None:
    """A path as a reader of this directory would write it."""
    if filename is None:
        return None
    path, here = Path(filename), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _loaded(path: Path) -> Any:
    """The module of a file, under a name that no other module has; dataclasses and pickles find it there."""
    digest = hashlib.sha256(str(path.resolve()).encode(errors="surrogateescape")).hexdigest()[:12]
    name = f"_opdtheory_loss_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # the path ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    # A module may put another object in its place.
    return sys.modules.get(name, module)


def _names(module: str, error: ModuleNotFoundError) -> bool:
    """Whether it is the module itself, or a package of it, that was not found."""
    return error.name is not None and f"{module}.".startswith(f"{error.name}.")


def _functions(module: Any) -> str:
    members = getattr(module, "__dict__", {})
    return ", ".join(sorted(n for n, value in members.items() if callable(value) and n[:1] != "_")) or "no function"
