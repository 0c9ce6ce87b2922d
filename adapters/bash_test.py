"""Tests and arithmetic of bash on known values; ``None`` where the outcome cannot be known."""

from __future__ import annotations

import ast
import fnmatch
import operator
import re
from collections.abc import Callable, Mapping, Sequence

from .bash_text import Text, Variable, known, unknown

_MAX_ARITHMETIC = 200
_LARGEST = 10**15
_NAMES = re.compile(r"\$?\{?([A-Za-z_]\w*)\}?")
_ALLOWED = re.compile(r"[\d\s()+\-*/%<>=!]*\Z")

_NUMERIC: Mapping[str, Callable[[int, int], bool]] = {
    "-eq": operator.eq,
    "-ne": operator.ne,
    "-lt": operator.lt,
    "-le": operator.le,
    "-gt": operator.gt,
    "-ge": operator.ge,
}
_COMPUTE: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda a, b: int(a / b) if abs(a) < 2**52 else a // b,  # bash divides towards zero
    ast.Mod: lambda a, b: a - b * int(a / b),
}
_COMPARE: Mapping[type[ast.cmpop], Callable[[int, int], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def test(words: Sequence[Text], variables: Mapping[str, Variable]) -> bool | None:
    """``[ … ]``, ``[[ … ]]`` or ``test …``; files are not looked at."""
    inner = [*words[1:]]
    if words[0].text != "test" and inner and inner[-1].text in ("]", "]]"):
        inner.pop()
    return _either(inner, variables)


def _either(words: Sequence[Text], variables: Mapping[str, Variable]) -> bool | None:
    for joint, decides in (("||", True), ("-o", True), ("&&", False), ("-a", False)):
        places = [i for i, word in enumerate(words) if word.text == joint and not word.quoted and i > 0]
        if places:
            first = _either(words[: places[0]], variables)
            if first is decides:
                return decides
            rest = _either(words[places[0] + 1 :], variables)
            return rest if rest is decides or first is not None else None
    return _single(words, variables)


def _single(words: Sequence[Text], variables: Mapping[str, Variable]) -> bool | None:
    if words and words[0].text == "!":
        outcome = _single(words[1:], variables)
        return None if outcome is None else not outcome
    if any(word.unknown for word in words):
        return None
    texts = [word.text for word in words]
    match texts:
        case ["-v", name]:
            return name in variables
        case ["-z", text]:
            return not text
        case ["-n", text] | [text] if not text.startswith("-"):
            return bool(text)
        case ["-n", text]:
            return bool(text)
        case [left, "=" | "==", right]:
            return left == right or fnmatch.fnmatchcase(left, right)
        case [left, "!=", right]:
            return not (left == right or fnmatch.fnmatchcase(left, right))
        case [left, sign, right] if sign in _NUMERIC:
            numbers = [_whole(left), _whole(right)]
            return None if None in numbers else _NUMERIC[sign](numbers[0] or 0, numbers[1] or 0)
    return None


def _whole(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\s*-?\d{1,15}\s*", text, re.ASCII) else None


def arithmetic(variables: Mapping[str, Variable], body: str) -> Text:
    """``$((…))`` of whole numbers."""
    value = _number(variables, body)
    if isinstance(value, str):
        return unknown(value)
    return known(str(int(value)))


def arithmetic_truth(variables: Mapping[str, Variable], body: str) -> bool | None:
    """``((…))``: whether it is not zero."""
    value = _number(variables, body)
    return None if isinstance(value, str) else bool(value)


def _number(variables: Mapping[str, Variable], body: str) -> int | str:
    """The value, or why there is none."""
    reasons: list[str] = []

    def value(match: re.Match[str]) -> str:
        variable = variables.get(match.group(1))
        text = variable.values[0] if variable is not None and variable.values else None
        if text is None or text.unknown:
            reasons.append(text.unknown if text is not None else f"${match.group(1)}, which is not set")
        return text.text if text is not None else "0"

    reason = f"the arithmetic $(({body[:40]}))"
    if len(body) > _MAX_ARITHMETIC:
        return reason
    text = _NAMES.sub(value, body)
    if reasons:
        return reasons[0]
    if len(text) > _MAX_ARITHMETIC or not _ALLOWED.match(text) or "**" in text:
        return reason
    try:
        return _evaluate(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return reason


def _evaluate(node: ast.expr) -> int:
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand)
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _COMPUTE:
            value = _COMPUTE[type(sign)](_evaluate(left), _evaluate(right))
            if abs(value) > _LARGEST:
                raise OverflowError
            return value
        case ast.Compare(left=left, ops=[sign], comparators=[right]) if type(sign) in _COMPARE:
            return int(_COMPARE[type(sign)](_evaluate(left), _evaluate(right)))
    raise ValueError
