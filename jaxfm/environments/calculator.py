"""A calculator: numbers, + - * / and parentheses, computed as fractions. Nothing is executed."""

import ast
import operator
import re
import warnings
from fractions import Fraction

from jaxfm.environments.tool import Tool

# There are no powers, so no result has more digits than the expression allows: the limit on its
# length limits numbers, depth and time.
MAX_LENGTH = 200  # characters of an expression
MAX_DIGITS = 60  # of a result
_ALLOWED = re.compile(r'[-+*/().\d\s]*', re.ASCII)
_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_UNARY = {ast.UAdd: operator.pos, ast.USub: operator.neg}


class _Wrong(Exception):
    """What is wrong with an expression."""


class Calculator(Tool):
    """The tool; its config has the marks of a call."""

    name = 'calculator'
    argument = 'expression'
    description = 'Computes an expression exactly.'
    of_argument = 'Numbers with + - * / and parentheses, such as 12*(3+4).'

    def answer(self, asked: str) -> str:
        """The value of an expression as a number, or 'error: ' and what is wrong with it."""
        return calculate(asked)


def calculate(expression: str) -> str:
    """The value of an expression: a whole number, or a decimal of at most 10 significant digits.

    What is wrong with an expression is an answer as well: 'error: division by zero'.
    """
    try:
        return _show(_value(_parse(expression)))
    except _Wrong as error:
        return f'error: {error}'


def _parse(expression: str) -> ast.expr:
    if len(expression) > MAX_LENGTH:
        raise _Wrong(f'more than {MAX_LENGTH} characters')
    if not _ALLOWED.fullmatch(expression):
        raise _Wrong('only numbers, + - * / and parentheses are allowed')
    with warnings.catch_warnings():
        # They concern what the model wrote, not this program.
        warnings.simplefilter('ignore')
        try:
            return ast.parse(expression.strip(), mode='eval').body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise _Wrong('that is no expression') from None


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(repr(node.value))  # a decimal as it is written, not its binary neighbour
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Div) and not right:
            raise _Wrong('division by zero')
        return _BINARY[type(node.op)](left, right)
    raise _Wrong('only numbers, + - * / and parentheses are allowed')


def _show(value: Fraction) -> str:
    if abs(value) >= 10**MAX_DIGITS:
        raise _Wrong(f'the result has more than {MAX_DIGITS} digits')
    return str(value.numerator) if value.denominator == 1 else f'{float(value):.10g}'
