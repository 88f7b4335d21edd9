"""Config files and `--config.x.y=v` overrides -> one complete, checked config, before any work.

What a config file leaves out is filled in from the weights of config.contract, if it names some,
and then from the defaults of the schema; what the schema does not know is refused with the nearest
names. Nothing here starts a jax backend.

Why not config_flags.DEFINE_config_file: its overrides reach only keys that the file writes, it
cannot type a key whose value is None, nor a block whose component another override replaces. The
syntax is the same.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from base import values
from base.errors import UserError
from base.nested import flatten
from base.words import listed, nearest, place, show, similar
from trainers.config import contract
from trainers.config import file as config_file
from trainers.config.schema import (
    BLOCKS,
    MOVED,
    REQUIRED,
    children_of,
    join,
    leaf,
    parameters_of,
    parent,
    pattern_of,
)


def load(config_flag: str, overrides: Iterable[tuple[str, str]] = ()) -> ConfigDict:
    """The complete config of 'path.py' or 'path.py:arg=value,flag', overrides applied; locked.

    Args:
      config_flag: a Python file with `get_config(...) -> ConfigDict`, which holds what differs
        from the defaults, and the arguments of that call.
      overrides: (key, text of its value) pairs, see base.command_line.split_overrides.

    Raises:
      UserError: a missing file, an error in it, an unknown key, argument or component, a value of
        another type than its default's annotation, a required key without a value. One line.
    """
    return locked(load_settings(config_flag, overrides))


def load_settings(config_flag: str, overrides: Iterable[tuple[str, str]] = ()) -> dict[str, Any]:
    """The tree of Settings that `load` takes its values from. Raises UserError."""
    given, file = config_file.run(config_flag)
    return completed(given, file, overrides)


# Completing: a nested dict as a file gives it -> the whole tree, every leaf a Setting

DROP = "None"  # --config.evals.NAME=None drops that block


@dataclasses.dataclass
class Setting:
    """One key: what it may hold, and what it holds.

    Attributes:
      of: the components, where the key names one.
      owner: the callable whose parameter the key is.
      source: the place or the flag that gave the value; '' for the default.
    """

    annotation: Any
    default: Any
    value: Any
    of: Mapping[str, Callable] | None = None
    owner: Callable | None = None
    source: str = ""


def locked(tree: dict[str, Any]) -> ConfigDict:
    """The config whose keys a completed tree describes."""
    return ConfigDict(_values(tree)).lock()


def completed(
    given: Mapping[str, Any], file: pathlib.Path, overrides: Iterable[tuple[str, str]]
) -> dict[str, Any]:
    """The tree of Settings of a nested dict that `file` holds, overrides applied.

    Raises:
      UserError: see `load`.
    """
    given, overrides = _without_dropped(_with_initial_children(given), overrides)
    unknown: list[str] = []
    tree = settings(given, unknown=unknown, where=file)
    if unknown:
        messages = (f"{place(file, leaf(key))}: {_unknown(key, tree)}" for key in unknown)
        raise UserError("; ".join(messages))
    in_file = set(flatten(given))
    given = contract.fill(given, overrides)
    of_contract = set(flatten(given)) - in_file
    tree = settings(given, unknown=[], where=file)
    # 1. Components, so that the other overrides see the keys of the new ones. What was set for the
    #    old component goes: the new one starts from its defaults.
    for key, value in overrides:
        choice = _find(tree, key)
        if choice is None and _names_new_child(key):
            _check_component(value, BLOCKS[pattern_of(parent(key))].of, f"--config.{key}")
            child = {leaf(key): value}
            given = _replaced(given, parent(key), lambda _, child=child: child)
            tree = settings(given, unknown=[], where=file)
        elif isinstance(choice, Setting) and choice.of is not None and choice.value != value:
            _check_component(value, choice.of, f"--config.{key}")
            block = pattern_of(parent(key))
            kept = set(parameters_of(*BLOCKS[block].schemas)) | set(children_of(block))
            given = _replaced(
                given,
                parent(key),
                lambda old, kept=kept, key=key, value=value: {
                    **{name: v for name, v in old.items() if name in kept},
                    leaf(key): value,
                },
            )
    tree = settings(given, unknown=[], where=file)
    for key, setting in flatten(tree).items():
        if key in of_contract:
            setting.source = "config.contract"
    # 2. All the others.
    for key, value in overrides:
        setting = _find(tree, key)
        if setting is None:
            raise UserError(_unknown(key, tree, flag=True))
        if not isinstance(setting, Setting):
            raise UserError(
                f"--config.{key} is a block; set one of its keys: "
                + listed(f"--config.{key}.{name}" for name in setting)
                + (f"; {DROP} drops it" if pattern_of(key).endswith(".*") else "")
            )
        setting.source = f"--config.{key}"
        if setting.of is None:
            setting.value = values.parse_key(
                value, setting.annotation, f"config.{key}", f"--config.{key}"
            )
    # 3. What nobody gave.
    if missing := [key for key, setting in flatten(tree).items() if setting.value is REQUIRED]:
        raise UserError(
            f"{show(file)}: {listed(f'config.{key}' for key in missing)} must be given: pass "
            + " ".join(f"--config.{key}=..." for key in missing[:3])
        )
    return tree


def _without_dropped(
    given: Mapping[str, Any], overrides: Iterable[tuple[str, str]]
) -> tuple[Mapping[str, Any], list[tuple[str, str]]]:
    """What is left of both where an override such as ('evals.NAME', 'None') drops a block: it need
    not be valid, and earlier overrides of its keys go too."""
    left: list[tuple[str, str]] = []
    for key, value in overrides:
        if value == DROP and pattern_of(key).endswith(".*"):
            block = _find(given, parent(key))
            in_file = isinstance(block, Mapping) and leaf(key) in block
            others = [override for override in left if not override[0].startswith(f"{key}.")]
            if in_file:
                kept = {name: child for name, child in block.items() if name != leaf(key)}
                given = _replaced(given, parent(key), lambda _, kept=kept: kept)
            if in_file or len(others) < len(left):
                left = others
                continue
        left.append((key, value))
    return given, left


def settings(
    given: Mapping[str, Any],
    *,
    unknown: list[str],
    where: pathlib.Path,
    path: str = "",
) -> dict[str, Any]:
    """The tree of Settings of the block at `path`; names that are no keys go to `unknown`."""
    pattern = pattern_of(path)
    block, children = BLOCKS[pattern], children_of(pattern)
    parameters = parameters_of(*block.schemas)
    owners = {name: fn for fn in block.schemas for name in parameters_of(fn)}
    tree: dict[str, Any] = {}
    if block.choice:
        name = given.get(block.choice, block.default)
        source = place(where, block.choice) if block.choice in given else ""
        tree[block.choice] = Setting(str, block.default, name, block.of, source=source)
        if name is not REQUIRED:
            key = join(path, block.choice)
            _check_component(name, block.of, f"{place(where, leaf(key))}: config.{key}")
            parameters |= parameters_of(block.of[name])
            owners |= dict.fromkeys(parameters_of(block.of[name]), block.of[name])
    for name, (annotation, default) in parameters.items():
        if name in children:
            continue
        value, source = given.get(name, default), ""
        if name in given:
            source = place(where, name)
            value = values.cast_key(value, annotation, f"config.{join(path, name)}", source)
        tree[name] = Setting(annotation, default, value, owner=owners[name], source=source)
    for name in given if "*" in children else children:
        value = given.get(name, {})
        if not isinstance(value, Mapping):
            key = join(path, name)
            raise UserError(
                f"{place(where, leaf(key))}: config.{key} is a block of keys, not {value!r}"
            )
        tree[name] = settings(value, unknown=unknown, where=where, path=join(path, name))
    unknown += [join(path, name) for name in given if name not in tree]
    return tree


def _with_initial_children(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """`given`, where a block that names none of its children gets Block.initial."""
    for path, block in BLOCKS.items():
        if block.initial and not _find(given, path):
            given = _replaced(given, path, lambda old, block=block: dict(block.initial))
    return given


def _names_new_child(key: str) -> bool:
    """'objectives.mine.name', 'evals.mine.type': the choice of a child with a name of one's own."""
    pattern = pattern_of(parent(key))
    return pattern.endswith(".*") and BLOCKS[pattern].choice == leaf(key)


def _replaced(tree: Mapping[str, Any], path: str, change: Callable[[dict], dict]) -> dict[str, Any]:
    """A copy of a nested dict with the dict at `path` changed (made where it is absent)."""
    head, _, rest = path.partition(".")
    old = dict(tree.get(head, {}))
    return {**tree, head: _replaced(old, rest, change) if rest else change(old)}


def _find(tree: Mapping[str, Any], path: str) -> Any:
    """The Setting or block at `path`, None where there is none."""
    node: Any = tree
    for name in path.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


def _values(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        n: node.value if isinstance(node, Setting) else _values(node) for n, node in tree.items()
    }


# Messages


def _unknown(key: str, tree: dict[str, Any], *, flag: bool = False) -> str:
    """'unknown key ...' with the nearest valid ones."""
    prefix = "--config." if flag else "config."
    message = f"unknown key {prefix}{key}"
    head, _, rest = key.partition(".")
    if head in MOVED:
        return f"{message}; it is {prefix}{join(MOVED[head], rest) if rest else MOVED[head]} now"
    siblings = _find(tree, parent(key)) if parent(key) else tree
    siblings = siblings if isinstance(siblings, dict) else {}
    # A key of a component that is not the chosen one?
    block = BLOCKS[pattern_of(parent(key))]
    if block.choice and block.choice in siblings:
        owners = [name for name, fn in block.of.items() if leaf(key) in parameters_of(fn)]
        if owners:
            choice, chosen = join(parent(key), block.choice), siblings[block.choice].value
            chosen = "none was chosen" if chosen is REQUIRED else f"not of {chosen!r}"
            return f"{message}: it is a key of {prefix}{choice}={' or '.join(owners)}, {chosen}"
    keys = list(flatten(tree))
    near = [join(parent(key), name) for name in similar(leaf(key), siblings)]
    same_name = [path for path in keys if leaf(path) == leaf(key)]
    near += similar(key, same_name, always=True)
    near = near or similar(key, keys)
    if near := list(dict.fromkeys(near))[:3]:
        message += f"; the nearest: {listed(prefix + path for path in near)}"
        if not siblings and pattern_of(parent(key)).endswith(".*"):
            name = f"{prefix}{join(parent(key), block.choice or '')}"
            message += f"; or add {leaf(parent(key))!r} by {name}=..."
        return message
    if siblings:
        names = [prefix + join(parent(key), name) for name in siblings]
        return f"{message}; the keys there: {listed(names)}"
    return f"{message}; the keys there: {listed(prefix + name for name in tree)}"


def _check_component(name: Any, of: Mapping[str, Any], what: str) -> None:
    if name not in of:
        raise UserError(f"{what} = {name!r} is unknown; {nearest(str(name), of)}")
