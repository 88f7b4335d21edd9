"""Config files and `--config.x.y=v` overrides -> one complete, checked config, before any work.

The signature is the schema: the keys of a block are the keyword-only parameters of the callable
that the block configures (BLOCKS says which); what a config file leaves out is filled in from
their defaults, and what they do not know is refused with the nearest names. Nothing here starts
a jax backend.

Why not config_flags.DEFINE_config_file: its overrides reach only keys that the file writes, it
cannot type a key whose value is None, nor a block whose component another override replaces. The
syntax is the same.
"""

import dataclasses
import inspect
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any

from ml_collections import ConfigDict

from base import values
from base.errors import UserError
from base.words import listed, nearest, one_line, place, show, similar
from evaluators import EVALUATORS
from input_pipeline.loader import NUM_THREADS, PREFETCH
from input_pipeline.sources.registry import SOURCES
from input_pipeline.transforms.preprocess import make_preprocess
from input_pipeline.transforms.tokenizer import TOKENIZERS
from siglip.losses import LOSSES
from siglip.sharding import make_mesh
from siglip.towers.text import make_text
from siglip.towers.two_towers import make_model
from siglip.towers.vit import make_vit
from trainers.config import durations
from trainers.config import file as config_file
from trainers.step.optimizer import OPTIMIZERS, SCHEDULES

REQUIRED: Any = inspect.Parameter.empty  # the default of a key that has none
CONFIG_FILE = "config.json"


def _check_duration(value: str, key: str) -> None:
    durations.to_steps(value, batch_size=1, examples_per_epoch=1, total_steps=1, key=key)


Duration = Annotated[str, _check_duration]  # '2000 steps', '3e9 examples', '5 epochs', '10 percent'


# The keys that belong to the loop, not to one component.


@dataclasses.dataclass(kw_only=True)
class Run:
    seed: int = 0
    total: Duration = "10 epochs"
    log_every: int = 50  # steps
    lr: float = 1e-3
    wd: float = 1e-4
    wd_mults: tuple = ((".*/kernel", 1.0), ("else", 0.0))
    lr_mults: tuple = ((".*", 1.0),)
    frozen: tuple = ((".*", False),)
    clip_norm: float | None = 1.0
    init: str | None = None  # weights to start from, see initial.py
    init_only: tuple = ()  # of img, txt, t, b: what to take of them; () takes all
    init_positions: str | None = None  # how image positions are resized, positions.METHODS
    init_text_positions: str | None = None  # and text positions, TEXT_METHODS
    resume: str | None = None  # a run to go on from, in a new workdir


@dataclasses.dataclass(kw_only=True)
class Mesh:
    cpu_devices: int = 0  # emulated CPU devices; 0: leave as it is


@dataclasses.dataclass(kw_only=True)
class Input:
    batch_size: int = 256  # over all devices
    microbatch: int = 0  # pairs that are embedded at a time, over all devices; 0: all at once
    num_threads: int = NUM_THREADS
    prefetch: int = PREFETCH  # batches
    max_bad_fraction: float = 0.01
    language_temperature: float | None = None  # see mixture.Languages; None: as they come
    corrupt: str | tuple = ""  # noise on purpose, see corrupt.py


def mixture() -> None:
    """The source whose parts are config.input.mixture, name -> source with a weight."""


@dataclasses.dataclass(kw_only=True)
class Part:
    weight: float = 1.0  # how often its examples come, relative to those of the other parts


@dataclasses.dataclass(kw_only=True)
class Eval:
    every: Duration = ""  # '': only at the end


@dataclasses.dataclass(kw_only=True)
class Checkpoint:
    every: Duration = "1000 steps"
    keep_last: int = 2
    keep_every: Duration = ""  # '': none beyond the last ones


@dataclasses.dataclass(frozen=True)
class Block:
    """What defines the keys of a block of the config.

    Attributes:
      schemas: callables, whose keyword-only parameters are keys.
      choice: the key that names the block's component, whose parameters are keys too.
      of: the components to choose from.
      default: the component without a choice; REQUIRED for none.
    """

    schemas: tuple[Callable, ...] = ()
    choice: str | None = None
    of: Mapping[str, Callable] = dataclasses.field(default_factory=dict)
    default: str = REQUIRED


# Path of a block -> its definition; `*` is any name. A parameter that is itself the path of a
# block here (img and txt of make_model) is that block.
BLOCKS: dict[str, Block] = {
    "": Block((Run,)),
    "mesh": Block((make_mesh, Mesh)),
    "model": Block((make_model,)),
    "model.img": Block((make_vit,)),
    "model.txt": Block((make_text,)),
    "loss": Block((), "name", LOSSES, "sigmoid"),
    "input": Block((Input, make_preprocess)),
    "input.source": Block((), "name", {**SOURCES, "mixture": mixture}),
    "input.mixture": Block(),
    "input.mixture.*": Block((Part,), "name", SOURCES),
    "input.tokenizer": Block((), "name", TOKENIZERS, "bytes"),
    "optimizer": Block((), "name", OPTIMIZERS, "adamw"),
    "schedule": Block((), "name", SCHEDULES, "cosine"),
    "evals": Block(),
    "evals.*": Block((Eval,), "type", EVALUATORS),
    "evals.*.source": Block((), "name", SOURCES),
    "checkpoint": Block((Checkpoint,)),
}

# What a run may change when it goes on (a key or a whole block): nothing of it decides what is
# learned from which batch ...
FREE = (
    "log_every",
    "evals",
    "checkpoint",
    "mesh",
    "input.microbatch",
    "loss.exchange",
    "loss.tile",
    "loss.unroll",
    "input.num_threads",
    "input.prefetch",
    "input.max_bad_fraction",
    # ... and where the same files lie.
    "input.source.path",
    "input.source.images",
    "input.source.data_dir",
    "input.source.cache",
    "input.tokenizer.path",
    "init",
)


# Reading


def load(config_flag: str, overrides: Iterable[tuple[str, str]] = ()) -> ConfigDict:
    """The complete config of 'path.py' or 'path.py:arg=value,flag', overrides applied; locked.

    Args:
      config_flag: a Python file with `get_config(...) -> ConfigDict`, which holds what differs
        from the defaults, and the arguments of that call.
      overrides: (key, text of its value) pairs from the command line: see `split_overrides`.

    Raises:
      UserError: a missing file, an error in it, an unknown key, argument or component, a value of
        another type than its default's annotation, a required key without a value. One line.
    """
    given, file = config_file.run(config_flag)
    return _finish(given, file, overrides)


def read(workdir: str | os.PathLike, overrides: Iterable[tuple[str, str]] = ()) -> ConfigDict:
    """The config that the run in `workdir` was started with, overrides applied; locked.

    Raises:
      UserError: as `load` does, or there is no run.
    """
    file = pathlib.Path(workdir) / CONFIG_FILE
    return _finish(_read_json(file), file, overrides)


def split_overrides(argv: Iterable[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Command line -> the overrides as (key, text) pairs, in order, and all the other arguments.

    Understands --config.a.b=v, --config.a.b v, --config.flag and --noconfig.flag.
    """
    overrides, rest, argv = [], [], list(argv)
    while argv:
        arg = argv.pop(0)
        match = re.match(r"--?(no)?config\.([^=]*)(=.*)?$", arg, re.DOTALL)
        if not match:
            rest.append(arg)
            continue
        no, key, value = match.groups()
        if value is not None:
            value = value[1:]
        elif no:
            value = "false"
        elif argv and re.match(r"[^-]|-[\d.]|$", argv[0]):  # -10 is a value, --workdir is not
            value = argv.pop(0)
        else:
            value = "true"
        overrides.append((key, value))
    return overrides, rest


# The config of a workdir


def save(config: ConfigDict, workdir: str | os.PathLike) -> None:
    """Writes config.json, whole or not at all (a power cut leaves the old one)."""
    file = pathlib.Path(workdir) / CONFIG_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f".{CONFIG_FILE}.{os.getpid()}")
    scratch.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    scratch.replace(file)


def check_workdir(config: ConfigDict, workdir: str | os.PathLike) -> None:
    """Refuses a workdir that holds a run of another configuration.

    Keys in FREE may differ. Raises UserError, one line, with the differences.
    """
    workdir = pathlib.Path(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file, not a folder")
    if differing := [d for d in differences(config, workdir) if not d.free]:
        shown = "; ".join(map(str, differing[:6]))
        more = f"; and {len(differing) - 6} more" if len(differing) > 6 else ""
        raise UserError(
            f"{workdir} holds a run of another configuration: {shown}{more} (use another "
            "--workdir, or the settings of the run to go on with it)"
        )


@dataclasses.dataclass(frozen=True)
class Difference:
    key: str
    there: str
    here: str

    @property
    def free(self) -> bool:
        # Of a part of a mixture the same is free as of a source.
        key = re.sub(r"^input\.mixture\.[^.]+\.", "input.source.", f"{self.key}.")
        return any(key.startswith(f"{free}.") for free in FREE)

    def __str__(self) -> str:
        return f"{self.key}: there {self.there}, here {self.here}"


def differences(config: ConfigDict, workdir: str | os.PathLike) -> list[Difference]:
    """Where `config` and the one in `workdir` differ; [] where there is none, or no difference.

    A key that the stored config lacks (of an older version) is taken to have had its default.
    The settings of a component are not listed where the component itself is another one.
    """
    file = pathlib.Path(workdir) / CONFIG_FILE
    if not file.exists():
        return []
    plain = json.loads(json.dumps(config.to_dict()))
    defaults = {
        path: json.loads(json.dumps(setting.default))
        for path, setting in _leaves(_complete(plain, unknown=[], where=file))
        if setting.default is not REQUIRED
    }
    here, there = _flat(plain), _flat(_read_json(file))
    there = {**{key: defaults[key] for key in here if key in defaults}, **there}
    found, other_component = [], []
    # Choices before the keys beside them.
    for key in sorted(here | there, key=lambda key: (_parent(key), not _is_choice(key), key)):
        if here.get(key, REQUIRED) == there.get(key, REQUIRED):
            continue
        if any(key.startswith(block) for block in other_component):
            continue
        if _is_choice(key):
            other_component.append(f"{_parent(key)}.")
        shown = [repr(c[key]) if key in c else "absent" for c in (there, here)]
        found.append(Difference(key, *shown))
    return found


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file.parent} holds no run: there is no {file.name} in it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {one_line(error)}") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} is no config: it holds a {type(config).__name__}")
    return config


# Completing: a nested dict as a file gives it -> the whole tree, every leaf a Setting


@dataclasses.dataclass
class Setting:
    """One key: what it may hold, and what it holds. `of` are the components, where it names one."""

    annotation: Any
    default: Any
    value: Any
    of: Mapping[str, Callable] | None = None


def _finish(
    given: dict[str, Any], file: pathlib.Path, overrides: Iterable[tuple[str, str]]
) -> ConfigDict:
    unknown: list[str] = []
    tree = _complete(given, unknown=unknown, where=file)
    if unknown:
        told = "; ".join(f"{place(file, _leaf(key))}: {_unknown(key, tree)}" for key in unknown)
        raise UserError(told)
    overrides = list(overrides)
    # 1. Components, so that the other overrides see the keys of the new ones. What was set for
    #    the old component goes: the new one starts from its defaults.
    for key, value in overrides:
        choice = _find(tree, key)
        if isinstance(choice, Setting) and choice.of is not None and choice.value != value:
            _check_component(value, choice.of, f"--config.{key}")
            block = _pattern(_parent(key))
            kept = set(parameters_of(*BLOCKS[block].schemas)) | set(_children(block))
            given = _replaced(
                given,
                _parent(key),
                lambda old, kept=kept, key=key, value=value: {
                    **{name: v for name, v in old.items() if name in kept},
                    _leaf(key): value,
                },
            )
    tree = _complete(given, unknown=[], where=file)
    # 2. All the others.
    for key, value in overrides:
        setting = _find(tree, key)
        if setting is None:
            raise UserError(_unknown(key, tree, flag=True))
        if not isinstance(setting, Setting):
            raise UserError(
                f"--config.{key} is a block; set one of its keys: "
                + listed(f"--config.{key}.{name}" for name in setting)
            )
        if setting.of is None:
            setting.value = values.parse_key(value, setting.annotation, key, f"--config.{key}")
    # 3. What nobody gave.
    if missing := [key for key, setting in _leaves(tree) if setting.value is REQUIRED]:
        raise UserError(
            f"{show(file)}: {listed(missing)} must be given: pass "
            + " ".join(f"--config.{key}=..." for key in missing[:3])
        )
    return ConfigDict(_values(tree)).lock()


def _complete(
    given: Mapping[str, Any],
    *,
    unknown: list[str],
    where: pathlib.Path,
    path: str = "",
) -> dict[str, Any]:
    """The tree of Settings of the block at `path`; names that are no keys go to `unknown`."""
    pattern = _pattern(path)
    block, children = BLOCKS[pattern], _children(pattern)
    parameters = parameters_of(*block.schemas)
    tree: dict[str, Any] = {}
    if block.choice:
        name = given.get(block.choice, block.default)
        tree[block.choice] = Setting(str, block.default, name, block.of)
        if name is not REQUIRED:
            key = _join(path, block.choice)
            _check_component(name, block.of, f"{place(where, _leaf(key))}: {key}")
            parameters |= parameters_of(block.of[name])
    for name, (annotation, default) in parameters.items():
        if name in children:
            continue
        value = given.get(name, default)
        if name in given:
            key = _join(path, name)
            value = values.cast_key(value, annotation, key, place(where, name))
        tree[name] = Setting(annotation, default, value)
    for name in given if "*" in children else children:
        value = given.get(name, {})
        if not isinstance(value, Mapping):
            key = _join(path, name)
            raise UserError(f"{place(where, _leaf(key))}: {key} is a block of keys, not {value!r}")
        tree[name] = _complete(value, unknown=unknown, where=where, path=_join(path, name))
    unknown += [_join(path, name) for name in given if name not in tree]
    return tree


def parameters_of(*callables: Callable) -> dict[str, tuple[Any, Any]]:
    """{name: (annotation, default)} of the keyword-only parameters."""
    found = {}
    for fn in callables:
        signature = inspect.signature(fn)
        if any(isinstance(p.annotation, str) for p in signature.parameters.values()):
            signature = inspect.signature(fn, eval_str=True)
        for p in signature.parameters.values():
            if p.kind is p.KEYWORD_ONLY:
                found[p.name] = (Any if p.annotation is p.empty else p.annotation, p.default)
    return found


def _pattern(path: str) -> str:
    """'evals.emoji.source' -> 'evals.*.source', the block's path in BLOCKS ('' where none is)."""
    if path in BLOCKS:
        return path
    parts = path.split(".")
    for pattern in BLOCKS:
        wanted = pattern.split(".")
        if len(wanted) == len(parts) and all(w in ("*", p) for w, p in zip(wanted, parts)):
            return pattern
    return ""


def _children(pattern: str) -> list[str]:
    return [_leaf(p) for p in BLOCKS if p and _parent(p) == pattern]


def _is_choice(key: str) -> bool:
    block = _pattern(_parent(key))
    return bool(block) and BLOCKS[block].choice == _leaf(key)


def _replaced(tree: Mapping[str, Any], path: str, change: Callable[[dict], dict]) -> dict[str, Any]:
    """A copy of a nested dict with the dict at `path` changed (made where it is absent)."""
    head, _, rest = path.partition(".")
    old = dict(tree.get(head, {}))
    return {**tree, head: _replaced(old, rest, change) if rest else change(old)}


def _find(tree: dict[str, Any], path: str) -> Any:
    """The Setting or block at `path`, None where there is none."""
    node: Any = tree
    for name in path.split("."):
        node = node.get(name) if isinstance(node, dict) else None
    return node


def _leaves(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Setting]]:
    for name, node in tree.items():
        if isinstance(node, Setting):
            yield _join(path, name), node
        else:
            yield from _leaves(node, _join(path, name))


def _values(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        n: node.value if isinstance(node, Setting) else _values(node) for n, node in tree.items()
    }


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


# Messages


def _unknown(key: str, tree: dict[str, Any], *, flag: bool = False) -> str:
    """'unknown key ...' with the nearest valid ones."""
    prefix = "--config." if flag else ""
    told = f"unknown key {prefix}{key}"
    siblings = _find(tree, _parent(key)) if _parent(key) else tree
    siblings = siblings if isinstance(siblings, dict) else {}
    # A key of a component that is not the chosen one?
    block = BLOCKS[_pattern(_parent(key))]
    if block.choice and block.choice in siblings:
        owners = [name for name, fn in block.of.items() if _leaf(key) in parameters_of(fn)]
        if owners:
            choice, chosen = _join(_parent(key), block.choice), siblings[block.choice].value
            chosen = "none was chosen" if chosen is REQUIRED else f"not of {chosen!r}"
            return f"{told}: it is a key of {prefix}{choice}={' or '.join(owners)}, {chosen}"
    keys = [path for path, _ in _leaves(tree)]
    near = [_join(_parent(key), name) for name in similar(_leaf(key), siblings)]
    same_name = [path for path in keys if _leaf(path) == _leaf(key)]
    near += similar(key, same_name, always=True)
    near = near or similar(key, keys)
    if near := list(dict.fromkeys(near))[:3]:
        return f"{told}; the nearest: {listed(prefix + path for path in near)}"
    if siblings:
        names = [prefix + _join(_parent(key), name) for name in siblings]
        return f"{told}; the keys there: {listed(names)}"
    return f"{told}; the keys there: {listed(prefix + name for name in tree)}"


def _check_component(name: Any, of: Mapping[str, Any], what: str) -> None:
    if name not in of:
        raise UserError(f"{what} = {name!r} is unknown; {nearest(str(name), of)}")
