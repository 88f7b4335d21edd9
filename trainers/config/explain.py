"""The keys of the config in words: `main.py --show_config`, and the page docs/config.md.

Types and defaults are those of the schema's callables; a meaning is the comment behind the
parameter, or its entry under "Args:" in the docstring.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

from base import values
from base.nested import flatten
from trainers.config.complete import DROP, Setting
from trainers.config.schema import (
    BLOCKS,
    REQUIRED,
    Block,
    Duration,
    children_of,
    join,
    parameters_of,
)

COMMAND = "python -m programs.config_page"  # writes the page
HEAD = f"""\
# Every key of the config

Written by `{COMMAND}` from the signatures that define the keys; do not edit it by hand.
A config file sets what differs from the defaults, the command line replaces any key:
`--config.input.batch_size=512`. `python main.py --config FILE --show_config` prints the complete
config of a file, with the place that each value comes from. `*` is a name of your choice.
"""


def lines(tree: dict[str, Any]) -> Iterator[str]:
    """A line for each key of a completed config: value, type, where it comes from, meaning."""
    for path, setting in flatten(tree).items():
        kind = f"one of {', '.join(setting.of)}" if setting.of else type_of(setting.annotation)
        source = setting.source or f"default of {_name(setting.owner)}".removesuffix(" of ")
        meaning = _meaning(path, setting)
        yield f"{path} = {setting.value!r}  # {kind}; {source}" + (
            f"; {meaning}" if meaning else ""
        )


def _meaning(path: str, setting: Setting) -> str:
    if setting.of:
        component = setting.of.get(setting.value)
        return _first_line(component) if component else ""
    if setting.owner is None:
        return ""
    return meanings(setting.owner).get(path.rpartition(".")[2], "")


def type_of(annotation: Any) -> str:
    """'int', 'float or None', 'duration'."""
    if annotation is Any:
        return "any"
    return (
        "duration" if annotation is Duration else re.sub(r"\ban? ", "", values.describe(annotation))
    )


@functools.cache
def meanings(fn: Callable) -> dict[str, str]:
    """Parameter -> its meaning in one line; parameters without one are absent."""
    fn = getattr(fn, "func", fn)  # of a functools.partial
    try:
        source = inspect.getsource(fn)
    except (OSError, TypeError):
        source = ""
    docs = [inspect.getdoc(fn) or ""]
    if inspect.isclass(fn):
        docs.append(inspect.getdoc(fn.__init__) or "")
    texts = {}
    for name in parameters_of(fn):
        comment = re.search(rf"^\s*{name}\s*:[^\n]*?  # ([^\n]+)$", source, re.MULTILINE)
        entries = [entry for doc in docs if (entry := _entry(name, doc))]
        if comment or entries:
            texts[name] = comment[1] if comment else entries[0]
    return texts


def _entry(name: str, doc: str) -> str:
    """What the docstring's entry 'name: text' says, which may go on in lines further right."""
    rows = doc.splitlines()
    for at, row in enumerate(rows):
        match = re.match(rf"(\s+)(?:\w+, )*{name}(?:, \w+)*: (.+)", row)
        if match:
            text = [match[2]]
            for more in rows[at + 1 :]:
                if not more.startswith(match[1] + " "):
                    break
                text.append(more.strip())
            return re.sub(r"(?<!\.)\.$", "", " ".join(text))
    return ""


def _first_line(fn: Callable) -> str:
    doc = inspect.getdoc(getattr(fn, "func", fn)) or ""
    return " ".join(doc.partition("\n\n")[0].split())


def _name(fn: Callable | None) -> str:
    if fn is None:
        return ""
    plain: Callable = getattr(fn, "func", fn)
    return f"{plain.__module__}.{plain.__qualname__}"


def page() -> str:
    """docs/config.md."""
    parts, listed = [HEAD], {}
    for path, block in BLOCKS.items():
        title = f"`{path}`" if path else "The run"
        parts.append(f"## {title}\n")
        parts += _tables(path, block, listed)
    return "\n".join(parts)


def _tables(path: str, block: Block, listed: dict[Callable, str]) -> Iterator[str]:
    skip = set(children_of(path))
    if table := _table(block.schemas, skip):
        yield table
    if block.initial:
        yield f"Without any, a config gets: {', '.join(f'`{name}`' for name in block.initial)}.\n"
    if not block.choice:
        if not table:
            yield (
                "Names of your choice, each with the keys below. "
                f"`--config.{path}.NAME={DROP}` drops one.\n"
            )
        return
    default = "required" if block.default is REQUIRED else f"default `{block.default}`"
    names = ", ".join(f"`{name}`" for name in block.of)
    yield f"`{join(path, block.choice)}` ({default}) is one of {names}. Its keys stand beside it:\n"
    known = {name: fn for name, fn in block.of.items() if fn in listed}
    if known:
        where = listed[next(iter(known.values()))]
        yield f"Those of `{where}` are described there.\n"
    for name, fn in block.of.items():
        if fn not in listed:
            listed[fn] = path
            yield f"### `{name}`\n\n{_first_line(fn)}\n"
            if table := _table((fn,), skip):
                yield table


def _table(callables: tuple[Callable, ...], skip: set[str]) -> str:
    rows = []
    for fn in callables:
        for name, (annotation, default) in parameters_of(fn).items():
            if name not in skip:
                shown = "required" if default is REQUIRED else f"`{default!r}`"
                cells = (f"`{name}`", type_of(annotation), shown, meanings(fn).get(name, ""))
                rows.append(" | ".join(cell.replace("|", "\\|") for cell in cells))
    if not rows:
        return ""
    head = ["key | type | default | meaning", "--- | --- | --- | ---"]
    return "\n".join(f"| {row} |" for row in [*head, *rows]) + "\n"
