"""Parser for steps written as a string: 'decode | random_resized_crop(area=(0.5, 1)) | flip'.

The syntax is that of a Python expression, which is parsed and never evaluated: arguments are
literals.
"""

import ast
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from base.errors import UserError
from base.words import nearest

Steps = list[tuple[str, Callable]]


def parse_steps(steps: str | tuple, functions: Mapping[str, Callable], key: str) -> Steps:
    """(name, function with its options bound) of each step.

    A step's options are the keyword-only parameters of its function, given by name or in their
    order; the positional parameters are for the caller.

    Args:
      steps: steps separated by bars, or a tuple of steps.
      functions: name -> function.
      key: key of the config, for messages.

    Raises:
      UserError: the text cannot be parsed, or a name or an option is unknown; with the nearest
        names.
    """
    text = steps if isinstance(steps, str) else " | ".join(map(str, steps))
    if not text.strip():
        return []
    try:
        node = ast.parse(f"({text})", mode="eval").body  # parentheses allow line breaks
    except (SyntaxError, ValueError, RecursionError) as error:
        raise UserError(
            f"config.{key}={text[:200]!r} cannot be read ({getattr(error, 'msg', error)}); "
            "write steps as in 'first | second(0.5) | third(name=1)'"
        ) from error
    nodes = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        nodes.append(node.right)
        node = node.left
    return [_parse_step(step, functions, key) for step in [node, *reversed(nodes)]]


def format_steps(steps: Steps) -> str:
    """The string that parse_steps reads as these steps: "decode | resize(method='area')"."""

    def format_step(name: str, function: Any) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in sorted(function.keywords.items()))
        return f"{name}({options})" if options else name

    return " | ".join(format_step(name, function) for name, function in steps)


def _parse_step(
    node: ast.expr, functions: Mapping[str, Callable], key: str
) -> tuple[str, Callable]:
    call = node if isinstance(node, ast.Call) else None
    name = call.func if call else node
    if not isinstance(name, ast.Name):
        raise UserError(f"config.{key}: {ast.unparse(node)!r} is not the name of a step")
    if name.id not in functions:
        raise UserError(f"config.{key}: there is no {name.id!r}; {nearest(name.id, functions)}")
    function = functions[name.id]
    options = [
        p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY
    ]
    signature = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in options]
    usage = f"{name.id}({', '.join(signature)})"
    given: dict[str, Any] = {}
    for place, argument in enumerate(call.args if call else []):
        if place >= len(options):
            raise UserError(f"config.{key}: {ast.unparse(node)} has too many values; it is {usage}")
        given[options[place].name] = _literal(argument, key)
    for keyword in call.keywords if call else []:
        if keyword.arg not in [p.name for p in options]:
            raise UserError(f"config.{key}: {name.id} has no option {keyword.arg!r}; it is {usage}")
        if keyword.arg in given:
            raise UserError(f"config.{key}: {name.id} is given {keyword.arg!r} twice")
        given[keyword.arg] = _literal(keyword.value, key)
    if missing := [p.name for p in options if p.default is p.empty and p.name not in given]:
        raise UserError(f"config.{key}: {name.id} needs {', '.join(missing)}; it is {usage}")
    return name.id, functools.partial(function, **given)


def _literal(node: ast.expr, key: str) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise UserError(
            f"config.{key}: {ast.unparse(node)} is not a plain value (a number, 'text', a tuple)"
        ) from error
