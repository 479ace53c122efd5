"""Generators written as text, in a configuration or on the command line: read without evaluating them as Python."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from opdtheory.divergences.custom import symbol
from opdtheory.errors import InvalidArgumentError

if TYPE_CHECKING:
    import sympy

__all__ = ["FUNCTIONS", "generator_from_text"]

FUNCTIONS = ("log", "exp", "sqrt", "Abs", "Max", "Min")

_LENGTH = 2000  # characters of an expression
_DIGITS = 400  # of a number as it is written, its exponent included
_EXPONENT = 1000  # largest constant exponent
_MAGNITUDE = 2000  # decimal digits before or after the point of a constant


def generator_from_text(text: str) -> sympy.Expr:
    """An expression in `u` from its text, with every number an exact fraction.

    It may hold `u`, numbers, `+ - * / **`, parentheses, and `log exp sqrt Abs Max Min`.

    Raises:
        InvalidArgumentError: anything else in the text, a division by zero, or a number of thousands of digits.
    """
    text = " ".join(text.split())
    if len(text) > _LENGTH:
        raise InvalidArgumentError("divergence", f"must have at most {_LENGTH} characters, got {len(text)}")
    if not text.isprintable():
        raise _refusal(text, "must have printable characters only")
    try:
        return _Reader(text).read(ast.parse(text, mode="eval").body)
    except InvalidArgumentError:
        raise
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise _refusal(text, f"must be an expression in u ({error})") from None


def _refusal(text: str, problem: str) -> InvalidArgumentError:
    return InvalidArgumentError("divergence", f"{problem}, got {text!r}")


class _Reader:
    """Reads the nodes of one text; each constant that comes out is checked before it is used further."""

    def __init__(self, text: str) -> None:
        self.text = text

    def read(self, node: ast.expr) -> sympy.Expr:
        value = self._value(node)
        if not value.free_symbols:
            self._check_constant(value, node)
        return value

    def _value(self, node: ast.expr) -> sympy.Expr:
        import sympy

        if isinstance(node, ast.Constant):
            return self._number(node)
        if isinstance(node, ast.Name) and node.id == "u":
            return symbol()
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
            operand = self.read(node.operand)
            return -operand if isinstance(node.op, ast.USub) else operand
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
            return self._operation(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS:
            arguments = [self.read(argument) for argument in node.args]
            wanted = "at least 1" if node.func.id in ("Max", "Min") else "1"
            if node.keywords or not arguments or (wanted == "1" and len(arguments) != 1):
                raise _refusal(self.text, f"must give {node.func.id} {wanted} argument")
            found: sympy.Expr = getattr(sympy, node.func.id)(*arguments)
            return found
        name = node.func if isinstance(node, ast.Call) else node
        part = ast.get_source_segment(self.text, name) or type(node).__name__
        needed = f"must contain only u, numbers, + - * / ** and {', '.join(FUNCTIONS)}"
        raise InvalidArgumentError("divergence", f"{needed}, got {part} in {self.text!r}")

    def _number(self, node: ast.Constant) -> sympy.Expr:
        import sympy

        if isinstance(node.value, bool) or not isinstance(node.value, (int, float)):
            raise _refusal(self.text, f"must contain real numbers only, not {node.value!r}")
        written = (ast.get_source_segment(self.text, node) or repr(node.value)).replace("_", "")
        if isinstance(node.value, int):
            if len(written) > _DIGITS:
                raise _refusal(self.text, f"must have numbers of at most {_DIGITS} digits")
            return sympy.Integer(node.value)
        _, _, exponent = written.lower().partition("e")
        if len(written) > _DIGITS or abs(int(exponent or 0)) > _DIGITS:
            raise _refusal(self.text, f"must have numbers of at most {_DIGITS} digits")
        return sympy.Rational(written)

    def _operation(self, node: ast.BinOp) -> sympy.Expr:
        left, right = self.read(node.left), self.read(node.right)
        if isinstance(node.op, ast.Div) and right.is_zero:
            raise _refusal(self.text, "must not divide by zero")
        if isinstance(node.op, ast.Pow):
            if not right.free_symbols and not abs(float(right)) <= _EXPONENT:
                raise _refusal(self.text, f"must have exponents of at most {_EXPONENT}")
            if left.is_zero and right.is_negative:
                raise _refusal(self.text, "must not divide by zero")
            if left.is_number and right.is_number and abs(float(right)) * _size(left) > _MAGNITUDE:
                raise _refusal(self.text, f"must have numbers of at most {_MAGNITUDE} digits")
        result: sympy.Expr = _OPERATIONS[type(node.op)](left, right)
        return result

    def _check_constant(self, value: sympy.Expr, node: ast.expr) -> None:
        if value.is_finite is False or value.is_real is False:
            part = ast.get_source_segment(self.text, node)
            raise _refusal(self.text, f"must have real and finite constants, not {part} = {value}")
        if _size(value) > _MAGNITUDE:
            raise _refusal(self.text, f"must have numbers of at most {_MAGNITUDE} digits")


def _size(value: sympy.Expr) -> float:
    """The number of digits of a constant before or after the point, and of a fraction's numerator and denominator."""
    import sympy

    if isinstance(value, sympy.Rational):
        return max(abs(int(part)).bit_length() for part in (value.p, value.q)) * 0.30103
    approximate = abs(sympy.N(value, 15))
    return float(abs(sympy.log(approximate, 10))) if approximate.is_positive else 0.0


_OPERATIONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Pow: lambda a, b: a**b,
}
