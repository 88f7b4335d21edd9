"""The schema of the config: which callables define the keys of which block.

The signature is the schema: the keys of a block are the keyword-only parameters of the callables
that the block configures. BLOCKS says which, and a new component or key needs no other line.
"""

import dataclasses
import inspect
from collections import ChainMap
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from evaluators import EVALUATORS
from input_pipeline.loader import NUM_THREADS, PREFETCH
from input_pipeline.sources.registry import SOURCES
from input_pipeline.transforms.preprocess import make_preprocess
from input_pipeline.transforms.tokenizer import TOKENIZERS
from siglip.losses import LOSSES
from siglip.objectives import OBJECTIVES
from siglip.sharding import make_mesh
from siglip.towers.text import make_text
from siglip.towers.two_towers import make_model
from siglip.towers.vit import make_vit
from trainers.config import durations
from trainers.step.averaging import Average
from trainers.step.optimizer import OPTIMIZERS, SCHEDULES

REQUIRED: Any = inspect.Parameter.empty  # the default of a key that has none


def _check_duration(value: str, key: str) -> None:
    durations.to_steps(value, batch_size=1, examples_per_epoch=1, total_steps=1, key=key)


Duration = Annotated[str, _check_duration]  # '2000 steps', '3e9 examples', '5 epochs', '10 percent'


# The keys that belong to the loop, not to one component.


@dataclasses.dataclass(kw_only=True)
class RunKeys:
    """The keys of the whole run."""

    seed: int = 0  # of parameters, order of the data, augmentations and dropout
    # config.total may grow when the run goes on, by the same command or by config.resume. A
    # schedule without the total in its formula (constant, rsqrt) simply goes on; one that would
    # have given other learning rates to steps already made needs stretch_schedule.
    total: Duration = "10 epochs"  # length of the run; may grow when the run goes on
    stretch_schedule: bool = False  # accept a new total that changes the schedule of past steps
    log_every: int = 50  # steps
    lr: float = 1e-3  # the schedule's peak
    wd: float = 1e-4  # weight decay per step, not multiplied by lr; follows the schedule
    wd_mults: tuple = ((".*/kernel", 1.0), ("else", 0.0))  # (regex, factor of wd) of parameters
    lr_mults: tuple = ((".*", 1.0),)  # (regex, factor of lr) of parameters
    frozen: tuple = ((".*", False),)  # (regex, True for no training) of parameters
    clip_norm: float | None = 1.0  # global norm that gradients are clipped to; None: no clipping
    init: str | None = None  # weights to start from: a run, a checkpoint or a released name
    contract: str | None = None  # weights whose model and preprocessing fill what is not set
    init_only: tuple = ()  # parts of init to take, of img, txt, t, b; () takes all
    init_positions: str | None = None  # how image positions are resized, positions.METHODS
    init_text_positions: str | None = None  # how text positions are resized, TEXT_METHODS
    resume: str | None = None  # a run to go on from, in a new workdir
    fresh: tuple[str, ...] = ()  # regexes of names in the state that start anew with resume


@dataclasses.dataclass(kw_only=True)
class MeshKeys:
    """The keys of the mesh that are not make_mesh's."""

    cpu_devices: int = 0  # emulated CPU devices; 0: leave as it is


@dataclasses.dataclass(kw_only=True)
class InputKeys:
    """The keys of the input that are not the preprocessing's."""

    batch_size: int = 256  # over all devices
    microbatch: int = 0  # pairs that are embedded at a time, over all devices; 0: all at once
    num_threads: int = NUM_THREADS  # that decode and transform, in each process
    prefetch: int = PREFETCH  # batches that are prepared ahead
    max_bad_fraction: float = 0.01  # of examples that may be unusable before the run stops
    language_temperature: float | None = None  # see mixture.Languages; None: as they come
    corrupt: str | tuple = ""  # noise on purpose, see corrupt.py


def mixture() -> None:
    """The source whose parts are config.input.mixture, name -> source with a weight."""


@dataclasses.dataclass(kw_only=True)
class PartKeys:
    """The keys of one part of a mixture."""

    weight: float = 1.0  # how often its examples come, relative to those of the other parts


@dataclasses.dataclass(kw_only=True)
class ObjectiveKeys:
    """The keys of every objective."""

    weight: float = 1.0  # of this term in the loss


@dataclasses.dataclass(kw_only=True)
class EvalKeys:
    """The keys of every evaluator."""

    every: Duration = ""  # between two evaluations; '': only at the end
    params: Literal["params", "averaged"] = "params"  # averaged: config.average's, where it has any


@dataclasses.dataclass(kw_only=True)
class CheckpointKeys:
    """The keys of the checkpoints."""

    every: Duration = "1000 steps"  # between two checkpoints; '': only when stopped and at the end
    keep_last: int = 2  # newest checkpoints that stay
    keep_every: Duration = ""  # multiples of it stay for ever; '': none beyond the last ones


@dataclasses.dataclass(frozen=True)
class Block:
    """What defines the keys of a block of the config.

    Attributes:
      schemas: callables, whose keyword-only parameters are keys.
      choice: the key that names the block's component, whose parameters are keys too.
      of: the components to choose from.
      default: the component without a choice; REQUIRED for none.
      initial: name -> settings of the children of a config that names none; for a block whose
        children have names of the user's choice.
    """

    schemas: tuple[Callable, ...] = ()
    choice: str | None = None
    of: Mapping[str, Callable] = dataclasses.field(default_factory=dict)
    default: str = REQUIRED
    initial: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


# Path of a block -> its definition; `*` is any name. A parameter that is itself the path of a
# block here (img and txt of make_model) is that block.
BLOCKS: dict[str, Block] = {
    "": Block((RunKeys,)),
    "mesh": Block((make_mesh, MeshKeys)),
    "model": Block((make_model,)),
    "model.img": Block((make_vit,)),
    "model.txt": Block((make_text,)),
    "objectives": Block(initial={"contrastive": {}}),
    "objectives.*": Block((ObjectiveKeys,), "name", ChainMap(OBJECTIVES, LOSSES), "sigmoid"),
    "average": Block((Average,)),
    "input": Block((InputKeys, make_preprocess)),
    "input.source": Block((), "name", {**SOURCES, "mixture": mixture}),
    "input.mixture": Block(),
    "input.mixture.*": Block((PartKeys,), "name", SOURCES),
    "input.tokenizer": Block((), "name", TOKENIZERS, "bytes"),
    "optimizer": Block((), "name", OPTIMIZERS, "adamw"),
    "schedule": Block((), "name", SCHEDULES, "cosine"),
    "evals": Block(),
    "evals.*": Block((EvalKeys,), "type", EVALUATORS),
    "evals.*.source": Block((), "name", SOURCES),
    "checkpoint": Block((CheckpointKeys,)),
}

# Block of an earlier version -> where its keys are now, for the message that refuses it.
MOVED = {"loss": "objectives.contrastive"}

# What a run may change when it goes on (a key or a whole block): nothing of it decides what is
# learned from which batch ...
FREE = (
    "log_every",
    "total",  # see state/prolong.py, which refuses what would change steps that are made
    "stretch_schedule",
    "evals",
    "checkpoint",
    "mesh",
    "input.microbatch",
    "model.remat",
    "model.attention",
    "model.img.group",
    "model.txt.group",
    "objectives.*.exchange",
    "objectives.*.tile",
    "objectives.*.unroll",
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
    "contract",
)


def parameters_of(*callables: Callable) -> dict[str, tuple[Any, Any]]:
    """{name: (annotation, default)} of the keyword-only parameters."""
    parameters = {}
    for fn in callables:
        signature = inspect.signature(fn)
        if any(isinstance(p.annotation, str) for p in signature.parameters.values()):
            signature = inspect.signature(fn, eval_str=True)
        for p in signature.parameters.values():
            if p.kind is p.KEYWORD_ONLY:
                parameters[p.name] = (Any if p.annotation is p.empty else p.annotation, p.default)
    return parameters


def pattern_of(path: str) -> str:
    """'evals.emoji.source' -> 'evals.*.source', the block's path in BLOCKS ('' where none is)."""
    if path in BLOCKS:
        return path
    parts = path.split(".")
    for pattern in BLOCKS:
        wanted = pattern.split(".")
        if len(wanted) == len(parts) and all(w in ("*", p) for w, p in zip(wanted, parts)):
            return pattern
    return ""


def children_of(pattern: str) -> list[str]:
    return [leaf(p) for p in BLOCKS if p and parent(p) == pattern]


def is_choice(key: str) -> bool:
    block = pattern_of(parent(key))
    return bool(block) and BLOCKS[block].choice == leaf(key)


# Paths of keys


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def parent(path: str) -> str:
    return path.rpartition(".")[0]


def leaf(path: str) -> str:
    return path.rpartition(".")[2]
