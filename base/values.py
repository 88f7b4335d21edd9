"""Values checked against type annotations, and values parsed from the text of a command line.

Annotations are those of keyword-only parameters: int, float, str, bool, tuple, tuple[str, ...],
dict, Literal, unions of them and None, and Annotated[type, check] with check(value, key).
"""

import ast
import re
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any

from base.errors import UserError


def cast(value: Any, annotation: Any) -> Any:
    """Converts a value to the annotated type (1 -> 1.0, lists -> tuples); TypeError otherwise."""
    kind, args = _split(annotation)
    if kind is Any:
        return value
    if kind in (typing.Union, types.UnionType):
        if type(value) in args:
            return value
        for arg in args:
            try:
                return cast(value, arg)
            except TypeError:
                pass
    elif kind is typing.Literal:
        if value in args:
            return value
    elif kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif kind is tuple:
        if isinstance(value, list | tuple):
            element = args[0] if len(args) == 2 and args[1] is Ellipsis else Any
            return tuple(cast(_deep_tuple(v), element) for v in value)
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise TypeError(f"{value!r} is not {describe(annotation)}")


def parse(text: str, annotation: Any) -> Any:
    """The value of the annotated type that the text stands for; ValueError or TypeError otherwise.

    A bool is true, t, 1, false, f or 0 in any case; an int may be 0x.. or 0o..; the quotes around
    a quoted str go. A tuple is a Python literal, or words: en,de.
    """
    kind, args = _split(annotation)
    if kind in (typing.Union, types.UnionType):
        return _parse_union(text, annotation, args)
    if kind is typing.Literal:
        for arg in args:
            if text == str(arg):
                return arg
    elif kind in _PARSERS:
        return _PARSERS[kind](text)
    elif kind is tuple and (words := re.fullmatch(r"[(\[]?([^()\[\]{}'\"]*)[)\]]?", text)):
        return cast([parse(word.strip(), Any) for word in words[1].split(",") if word], annotation)
    else:
        try:
            return cast(ast.literal_eval(text), annotation)
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            if kind is Any:
                return text
    raise ValueError(f"{text!r} is not {describe(annotation)}")


def _parse_union(text: str, annotation: Any, args: tuple) -> Any:
    if text == "None" and types.NoneType in args:
        return None
    # Any text is a str, so that is tried last, and beside it a tuple needs brackets or quotes.
    for arg in sorted(args, key=lambda arg: arg is str):
        if _split(arg)[0] is tuple and str in args and text[:1] not in "(['\"":
            continue
        try:
            return parse(text, arg)
        except (ValueError, TypeError):
            pass
    raise ValueError(f"{text!r} is not {describe(annotation)}")


def _parse_bool(text: str) -> bool:
    if text.lower() in ("true", "t", "1"):
        return True
    if text.lower() in ("false", "f", "0"):
        return False
    raise ValueError(f"{text!r} is not a bool")


def _parse_int(text: str) -> int:
    return int(text, {"0x": 16, "0o": 8}.get(text[:2], 10))


def _parse_str(text: str) -> str:
    quoted = re.fullmatch(r"""(['"])((?:(?!\1).)*)\1""", text, re.DOTALL)
    return quoted[2] if quoted else text


_PARSERS: dict[Any, Callable[[str], Any]] = {
    bool: _parse_bool,
    int: _parse_int,
    float: float,
    str: _parse_str,
}


def cast_key(value: Any, annotation: Any, key: str, place: str) -> Any:
    """`cast`, then the annotation's own check; UserError names the key and its place."""
    try:
        value = cast(value, annotation)
    except TypeError:
        raise UserError(
            f"{place}: {key} = {value!r} must be {describe(annotation)}, "
            f"not {describe(type(value))}"
        ) from None
    _check(value, annotation, key)
    return value


def parse_key(text: str, annotation: Any, key: str, flag: str) -> Any:
    """`parse`, then the annotation's own check; UserError names the flag."""
    try:
        value = parse(text, annotation)
    except (ValueError, TypeError):
        raise UserError(f"{flag}={text} is not {describe(annotation)}") from None
    _check(value, annotation, key)
    return value


def describe(annotation: Any) -> str:
    """The annotation in words: 'an int', 'a float or None', ..."""
    kind, args = _split(annotation)
    if kind in (typing.Union, types.UnionType):
        return " or ".join(map(describe, args))
    if kind is typing.Literal:
        return f"one of {', '.join(map(repr, args))}"
    if kind in (None, types.NoneType):
        return "None"
    name = getattr(kind, "__name__", str(kind))
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _split(annotation: Any) -> tuple[Any, tuple]:
    """(origin, arguments) of an annotation, Annotated removed; (int, ()) for int."""
    if typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    return typing.get_origin(annotation) or annotation, typing.get_args(annotation)


def _check(value: Any, annotation: Any, key: str) -> None:
    if typing.get_origin(annotation) is Annotated:
        typing.get_args(annotation)[1](value, key)


def _deep_tuple(value: Any) -> Any:
    return tuple(map(_deep_tuple, value)) if isinstance(value, list | tuple) else value
