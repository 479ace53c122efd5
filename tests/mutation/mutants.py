"""The mutants of a module: its syntax tree with one operator, sign, comparison or constant changed.

A mutant flips a sign, drops either term of a sum, swaps a factor for a divisor, turns a comparison round or adds one
to a constant. Left alone are annotations, messages, module constants in capitals (budgets, tolerances), axes written as
-1, and, in the theorems, the numbers that choose instances and the false twins, which are false already.
"""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Methods whose integer arguments are axes and sizes: on the matrices here, axis -1 is axis 1.
_OF_AXES = {"amax", "cumsum", "expand", "flip", "gather", "log_softmax", "logcumsumexp", "logsumexp", "max", "mean"}
_OF_AXES |= {"softmax", "sort", "squeeze", "sum", "unsqueeze", "view"}

_SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
_TURNS = {ast.Lt: ast.GtE, ast.LtE: ast.Gt, ast.Gt: ast.LtE, ast.GtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}


@dataclass(frozen=True)
class Mutant:
    """One change: in which module and function, what becomes of the site, and how often the same came before."""

    path: Path
    function: str
    line: int
    lines: tuple[int, ...]
    before: str
    after: str
    nth: int
    site: int
    variant: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line} in {self.function}: {self.before}  ->  {self.after}"

    def tree(self) -> ast.Module:
        """The module with the change made."""
        tree = source_tree(self.path)
        node = _sites(tree, self.path)[self.site][1]
        _Replace(node, _changed(node, self.variant)).visit(tree)
        return ast.fix_missing_locations(tree)


def source_tree(path: Path) -> ast.Module:
    """The module as it is."""
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def mutants(path: Path, *, terms: bool) -> Iterator[Mutant]:
    """The mutants of a module that negate or drop a term, or every one."""
    seen: Counter[tuple[str, str, str]] = Counter()
    for site, (function, node, statement) in enumerate(_sites(source_tree(path), path)):
        if terms and not _is_term(node):
            continue
        # A folded constant leaves no trace of its own line: fall back on the statement's.
        own, whole = (tuple(range(n.lineno, (n.end_lineno or n.lineno) + 1)) for n in (node, statement))
        lines = own if len(whole) > 40 else tuple(dict.fromkeys(own + whole))
        for variant in range(_variants(node)):
            before, after = ast.unparse(node), ast.unparse(_changed(node, variant))
            nth = seen[function, before, after]
            seen[function, before, after] += 1
            yield Mutant(path, function, node.lineno, lines, before, after, nth, site, variant)


def _sites(tree: ast.Module, path: Path) -> list[tuple[str, ast.AST, ast.stmt]]:
    kinds: tuple[type[ast.AST], ...] = (ast.BinOp, ast.UnaryOp, ast.Compare, ast.AugAssign)
    if "theorems" not in path.parts:
        kinds += (ast.Constant,)
    return [found for found in _code(tree, "", tree.body[0]) if isinstance(found[1], kinds)]


def _code(node: ast.AST, function: str, statement: ast.stmt) -> Iterator[tuple[str, ast.AST, ast.stmt]]:
    """The nodes that compute, each with its function and the statement around it: no annotations or messages."""
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
            if isinstance(child, (ast.Assign, ast.AnnAssign)) and _assigned(child).isupper():
                continue
            if _is_last_axis(node, child):
                continue
            inside = function
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                inside = f"{function}.{child.name}" if function else child.name
            around = child if isinstance(child, ast.stmt) else statement
            yield inside, child, around
            yield from _code(child, inside, around)


def _assigned(statement: ast.Assign | ast.AnnAssign) -> str:
    return ast.unparse(statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0])


def _is_last_axis(call: ast.AST, argument: ast.AST) -> bool:
    """Whether this is the -1 of `x.sum(-1)` or `dim=-1`."""
    of_axes = isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in _OF_AXES
    named = isinstance(call, ast.keyword) and call.arg == "dim"
    return (of_axes or named) and ast.unparse(argument) == "-1"


def _is_term(node: ast.AST) -> bool:
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant)
    return isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, (ast.Add, ast.Sub))


def _variants(node: ast.AST) -> int:
    if isinstance(node, ast.BinOp):
        return 3 if isinstance(node.op, (ast.Add, ast.Sub)) else int(type(node.op) in _SWAPS)
    if isinstance(node, ast.AugAssign):
        return 2 if isinstance(node.op, (ast.Add, ast.Sub)) else int(type(node.op) in _SWAPS)
    if isinstance(node, ast.UnaryOp):
        return int(isinstance(node.op, ast.USub))
    if isinstance(node, ast.Compare):
        return int(len(node.ops) == 1 and type(node.ops[0]) in _TURNS)
    return int(isinstance(node, ast.Constant) and type(node.value) in (int, float))


def _changed(node: ast.AST, variant: int) -> ast.AST:
    changed = copy.deepcopy(node)
    if isinstance(changed, ast.BinOp):
        if variant == 1:
            return changed.left
        if variant == 2:
            return changed.right if isinstance(changed.op, ast.Add) else ast.UnaryOp(ast.USub(), changed.right)
        changed.op = _SWAPS[type(changed.op)]()
    elif isinstance(changed, ast.AugAssign):
        if variant == 1:
            return ast.Pass()
        changed.op = _SWAPS[type(changed.op)]()
    elif isinstance(changed, ast.UnaryOp):
        return changed.operand
    elif isinstance(changed, ast.Compare):
        changed.ops = [_TURNS[type(changed.ops[0])]()]
    elif isinstance(changed, ast.Constant):
        changed.value = changed.value + 1
    return changed


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def generic_visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else super().generic_visit(node)

    visit_Constant = generic_visit
