"""Makes sources from words of a command line: name key=value ..., as in config.input.source."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from base import values
from base.errors import UserError
from base.words import nearest
from input_pipeline.sources.registry import SOURCES


def make_source(words: Sequence[str]) -> Any:
    """The source that the words `name key=value key=value` describe.

    Raises:
      UserError: there is no such source or setting, or the source refuses.
    """
    name, *pairs = words
    if name not in SOURCES:
        raise UserError(f"there is no source {name!r}; {nearest(name, SOURCES)}")
    return SOURCES[name](**settings_of(SOURCES[name], pairs, f"source {name}"))


def settings_of(function: Callable, pairs: Sequence[str], name: str) -> dict[str, Any]:
    """Keyword arguments from 'key=value' words, each of its parameter's type.

    Args:
      function: what will be called. One with **options takes any key.
      name: its name in messages.

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
            raise UserError(f"{pair!r} is no setting of {name}; write key=value")
        if key not in known and not open_ended:
            raise UserError(f"{name} has no setting {key!r}; {nearest(key, known)}")
        kind = known[key].annotation if key in known else Any
        kind = Any if kind is inspect.Parameter.empty else kind
        settings[key] = values.parse_key(value, kind, key, key)
    lacking = [k for k, p in known.items() if p.default is p.empty and k not in settings]
    if lacking:
        raise UserError(f"{name} needs {lacking[0]}=...; it has {', '.join(known)}")
    return settings
