"""Sources on command lines: 'name key=value key=value', as in config.input.source."""

import ast
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from base.errors import UserError
from base.words import nearest
from input_pipeline.sources.registry import SOURCES


def make_source(words: Sequence[str]) -> Any:
    """The source that `name key=value key=value` says.

    Raises:
      UserError: there is no such source or setting, or the source refuses.
    """
    name, *pairs = words
    if name not in SOURCES:
        raise UserError(f"there is no source {name!r}; {nearest(name, SOURCES)}")
    return SOURCES[name](**settings_of(SOURCES[name], pairs, f"source {name}"))


def settings_of(function: Callable, pairs: Sequence[str], told: str) -> dict[str, Any]:
    """Keyword arguments out of 'key=value' words, each of the type that its parameter wants.

    Args:
      function: what will be called. One with **options takes any key.
      told: what messages call it.

    Raises:
      UserError: a word is no key=value, a key is unknown or lacking, or a value of another type.
    """
    parameters = inspect.signature(function).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = {k: p for k, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"{pair!r} is no setting of {told}; write key=value")
        if key not in known and not open_ended:
            raise UserError(f"{told} has no setting {key!r}; {nearest(key, known)}")
        kind = known[key].annotation if key in known else Any
        settings[key] = _value(key, value, kind)
    lacking = [k for k, p in known.items() if p.default is p.empty and k not in settings]
    if lacking:
        raise UserError(f"{told} needs {lacking[0]}=...; it has {', '.join(known)}")
    return settings


def _value(setting: str, text: str, kind: Any) -> Any:
    """'1' is a number, or a text where the setting is one."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    several = typing.get_args(kind) if union else (kind,)
    if Any in several or inspect.Parameter.empty in several:
        return text if str in several else value
    kinds = tuple(typing.get_origin(one) or one for one in several)
    if isinstance(value, kinds):
        return value
    if float in kinds and isinstance(value, int):
        return float(value)
    if str in kinds:
        return text
    expected = " or ".join(one.__name__ for one in kinds)
    raise UserError(f"{setting}={text} is not of type {expected}")
