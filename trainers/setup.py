"""From a complete config to the objects of a run."""

import contextlib
import dataclasses
import inspect
import zlib
from typing import Any

import jax
import numpy as np
from absl import logging

from base.errors import UserError
from evaluators import EVALUATORS
from evaluators.strict_source import Whole
from input_pipeline.bad_examples import BadExamples
from input_pipeline.mixture import Languages, Mixture, languages_of
from input_pipeline.order import order_of
from input_pipeline.sources.registry import SOURCES
from input_pipeline.transforms.corrupt import Corruption
from input_pipeline.transforms.preprocess import Preprocess, make_preprocess
from input_pipeline.transforms.tokenizer import TOKENIZERS
from siglip.checkpoints.spec import is_mc4
from siglip.losses import LOSSES, exchange
from siglip.losses.definitions import Loss
from siglip.losses.pairs import log_odds
from siglip.sharding import make_mesh, params_sharding
from siglip.towers.precomputed import Precomputed
from siglip.towers.two_towers import TwoTowers, make_model
from siglip.towers.vit import Patches, images_of
from trainers.config import durations


@dataclasses.dataclass(frozen=True)
class Setup:
    """What training and evaluation share."""

    config: Any
    mesh: jax.sharding.Mesh
    preprocess: Preprocess
    model: TwoTowers
    loss_fn: Loss

    @property
    def inputs(self) -> tuple[Any, np.ndarray]:
        """One image and one text, whose shapes decide those of the parameters."""
        text = np.zeros((1, self.config.input.token_len), np.int32)
        if self.preprocess.embeddings:
            return np.zeros((1, self.model.img.width), np.float32), text
        return _gray(self.preprocess), text

    def abstract_params(self) -> Any:
        with mistakes_of("model"):
            return jax.eval_shape(self.model.init, jax.random.key(0), *self.inputs)["params"]


def make_setup(config: Any) -> Setup:
    """Raises UserError where values of the config do not fit each other."""
    with mistakes_of("mesh"):
        mesh = make_mesh(**without(config.mesh, "cpu_devices"))
    preprocess = make_input(config)
    tokenizer = preprocess.tokenizer
    blocks = without(config.model)
    vocab_size = blocks["txt"].get("vocab_size") or tokenizer.vocab_size
    if is_mc4(rows=vocab_size, vocab_size=tokenizer.vocab_size):
        preprocess.rows = vocab_size
    elif vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"config.model.txt.vocab_size is {vocab_size}, but the tokenizer has "
            f"{tokenizer.vocab_size} ids; leave it unset to take the tokenizer's"
        )
    blocks["txt"]["vocab_size"] = vocab_size
    blocks["b_init"] = initial_bias(config)
    with mistakes_of("model"):
        model = make_model(**blocks)
    _check_images(preprocess, model.img)
    with mistakes_of("loss"):
        loss_fn = LOSSES[config.loss.name](mesh, **without(config.loss, "name"))
    return Setup(config, mesh, preprocess, model, loss_fn)


def _gray(preprocess: Preprocess) -> Any:
    """One image as the tower takes it: its shape is that of all images."""
    gray = np.full((preprocess.res, preprocess.res, 3), 127, np.uint8)
    made = preprocess.pixels({"image": gray, "id": "gray"})
    return images_of({key: value[None] for key, value in made.items()})


def _check_images(preprocess: Preprocess, img: Any) -> None:
    """Raises UserError where config.input.image makes something else than the tower takes. From
    here on embeddings of another width than the tower's are refused by name."""
    if isinstance(img, Precomputed) != preprocess.embeddings:
        raise UserError(
            "config.model.img.variant='precomputed' and config.input.image='embedding' go "
            "together: the one takes embeddings in the place of images, the other reads them"
        )
    if preprocess.embeddings:
        preprocess.width = img.width
        return
    grid = img.naflex_grid
    if preprocess.patches and grid is None:
        raise UserError(
            "config.input.image ends in naflex, but this image tower takes squares; set "
            "config.model.img.naflex_grid (16 in the released models)"
        )
    if grid is not None and not preprocess.patches:
        raise UserError(
            f"config.model.img.naflex_grid={grid} makes a tower of patches, but "
            "config.input.image makes squares; set config.input.image='hf-naflex', or end its "
            "steps with `naflex`"
        )
    if grid is None and (rest := preprocess.res % img.patch_size):
        # As in the released So400m/14 at 384 pixels.
        logging.warning(
            "config.input.res=%d: the last %d rows and columns of pixels are in no patch of %d",
            preprocess.res,
            rest,
            img.patch_size,
        )
    image, p = _gray(preprocess), img.patch_size
    if isinstance(image, Patches) and image.values.shape[-1] != p * p * 3:
        side = round((image.values.shape[-1] / 3) ** 0.5)
        raise UserError(
            f"config.input.image makes patches of {side} pixels a side, config.model.img.variant "
            f"takes patches of {p}; end the image with `naflex(patch_size={p})`"
        )


def make_input(config: Any) -> Preprocess:
    """The preprocessing of config.input."""
    tokenizer = chosen(TOKENIZERS, config.input.tokenizer)
    return make_preprocess(tokenizer, **without(config.input, *INPUT_KEYS))


MIXTURE = "mixture"  # as input.source.name: the sources of input.mixture

# The keys of config.input that are not options of make_preprocess.
INPUT_KEYS = (
    "batch_size",
    "microbatch",
    "source",
    "mixture",
    "language_temperature",
    "corrupt",
    "tokenizer",
    "num_threads",
    "prefetch",
    "max_bad_fraction",
)


def make_source(config: Any) -> Any:
    """What config.input.source, mixture and language_temperature say to train on.

    Raises:
      UserError: they do not fit each other, or a source cannot be opened.
    """
    block = config.input
    named, temperature = block.source.name == MIXTURE, block.language_temperature
    if named != bool(block.mixture):
        raise UserError(
            "config.input.mixture and config.input.source.name='mixture' go together: the one "
            "holds the sources, the other says to use them"
        )
    if not named:
        source = chosen(SOURCES, block.source)
        _check_damage({"the source": source}, block.max_bad_fraction)
        return source if temperature is None else Languages(source, temperature)
    parts = {
        name: SOURCES[part.name](**without(part, "name", "weight"))
        for name, part in block.mixture.items()
    }
    _check_damage(parts, block.max_bad_fraction)
    if temperature is not None:
        balanced = [name for name, part in parts.items() if languages_of(part)]
        if not balanced:
            Languages(next(iter(parts.values())), temperature)  # says what is missing
        if others := sorted(parts.keys() - balanced):
            logging.warning("languages: %s of the mixture know none", ", ".join(others))
        parts |= {name: Languages(parts[name], temperature) for name in balanced}
    return Mixture(parts, tuple(part.weight for part in block.mixture.values()))


def _check_damage(sources: dict[str, Any], allowed: float) -> None:
    """What sources have left out when they were opened counts as bad examples do."""
    for name, source in sources.items():
        damage = getattr(source, "damage", {})
        if not damage:
            continue
        bad, total = BadExamples(), sum(damage.values())
        for (kind, shard), count in damage.items():
            bad.add(kind, shard, count)
        told = f"{total} samples of {name} are left out, {len(source)} are not: {bad.worst()}"
        if total > allowed * (len(source) + total):
            raise UserError(f"{told}; more than config.input.max_bad_fraction={allowed}")
        logging.warning("%s", told)


def initial_bias(config: Any) -> float | None:
    """config.model.b_init, where 'auto' is the bias at which the sigmoid is the share of positives
    among the pairs of a batch."""
    b_init, t_init = config.model.b_init, config.model.t_init
    relative = config.loss.get("relative_bias")  # logits t (x.y - b): the bias is a cosine
    if relative and not (b_init == "auto" or (b_init is not None and abs(b_init) <= 1)):
        raise UserError(
            "config.loss.relative_bias makes the bias a cosine, which "
            f"config.model.b_init={b_init} is not; set config.model.b_init=auto"
        )
    if b_init != "auto":
        return b_init
    bias = log_odds(config.input.batch_size, config.loss.get("ratio", 0))
    return -bias / t_init if relative and t_init else bias


def make_evaluators(setup: Setup) -> dict[str, Any]:
    """Name -> evaluator; their sources are opened, so a missing file is found before training."""
    evaluators = {}
    for name, block in setup.config.evals.items():
        evaluators[name] = EVALUATORS[block.type](
            setup.model,
            setup.mesh,
            setup.preprocess,
            Whole(chosen(SOURCES, block.source)),
            setup.loss_fn,
            **without(block, "type", "source", "every"),
        )
    return evaluators


def describe_loss(setup: Setup) -> str:
    """The loss in a line: its settings, and the exchange with the estimates it was chosen by."""
    config, mesh = setup.config, setup.mesh
    known = inspect.signature(LOSSES[config.loss.name]).parameters
    told = "".join(
        f", {key} {value}"
        for key, value in without(config.loss, "name").items()
        if value != known[key].default
    )
    if config.loss.get("exchange") != "auto":
        return config.loss.name + told
    choice = exchange.choose(
        mesh,
        n=config.input.batch_size // mesh.size,
        d=setup.model.img.out_dim or setup.model.img.width,
        devices=mesh.size,
        itemsize=2 if config.loss.dtype == "bfloat16" else 4,
    )
    return f"{config.loss.name}{told}, exchange {choice.name} ({choice.why})"


LEAST = {
    "seed": 0,
    "log_every": 1,
    "input.microbatch": 0,
    "input.num_threads": 0,
    "input.prefetch": 1,
}


def check_batch(config: Any, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError for a number out of range, or a batch that the devices do not divide."""
    for key, least in LEAST.items():
        block, _, name = key.rpartition(".")
        value = (config[block] if block else config)[name]
        if value < least:
            raise UserError(f"config.{key}={value} must be at least {least}")
    Corruption(config.input.corrupt, seed=0, batch_size=1)  # its mistakes, before any work
    if not 0 <= config.input.max_bad_fraction < 1:
        raise UserError(
            f"config.input.max_bad_fraction={config.input.max_bad_fraction} must be from 0 to 1, "
            "as 0.01 for one in a hundred"
        )
    batch_size = config.input.batch_size
    if batch_size < 1 or batch_size % mesh.size:
        near = max(1, round(batch_size / mesh.size)) * mesh.size
        raise UserError(
            f"config.input.batch_size={batch_size} does not divide over {mesh.size} devices; "
            f"the nearest that does is {near}"
        )
    microbatch = config.input.microbatch
    if microbatch and (microbatch % mesh.size or batch_size % microbatch):
        local = batch_size // mesh.size
        fitting = [mesh.size * k for k in range(1, local + 1) if local % k == 0]
        raise UserError(
            f"config.input.microbatch={microbatch} must divide config.input.batch_size="
            f"{batch_size} and be a multiple of {mesh.size} devices: one of "
            f"{', '.join(map(str, fitting))}"
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """The durations of a run in steps."""

    epoch: int  # examples
    order: int  # see order_hash
    total: int
    save_every: int | None
    keep_every: int | None
    evals: dict[str, int | None]  # None: only at the end


def order_hash(config: Any, source: Any) -> int:
    """A number that differs where another example, or other noise, stands at some positions."""
    order = order_of(source, config.seed)
    places = [order[position] for position in range(0, 64 * 4099, 4099)]
    return zlib.crc32(repr((places, config.input.corrupt)).encode())


def make_plan(config: Any, examples_per_epoch: int, order: int = 0) -> Plan:
    """Raises UserError for a duration that is none, or a run without steps."""
    if examples_per_epoch < 1:
        raise UserError("config.input.source holds no examples")

    def steps(text: str, key: str, total: int | None = None) -> int | None:
        return durations.to_steps(
            text,
            batch_size=config.input.batch_size,
            examples_per_epoch=examples_per_epoch,
            total_steps=total,
            key=f"config.{key}",
        )

    total = steps(config.total, "total")
    if not total:
        raise UserError(f"config.total={config.total!r} is no step at all")
    return Plan(
        examples_per_epoch,
        order,
        total,
        steps(config.checkpoint.every, "checkpoint.every", total),
        steps(config.checkpoint.keep_every, "checkpoint.keep_every", total),
        {k: steps(v.every, f"evals.{k}.every", total) for k, v in config.evals.items()},
    )


def sharded(abstract: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shapes with the sharding that params_sharding gives them."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract,
        params_sharding(abstract, mesh),
    )


def chosen(components: dict[str, Any], block: Any) -> Any:
    """The component that a block names, made with the block's other keys."""
    return components[block.name](**without(block, "name"))


def without(block: Any, *keys: str) -> dict[str, Any]:
    """A plain dict of the block's other keys."""
    return {k: v for k, v in block.to_dict().items() if k not in keys}


@contextlib.contextmanager
def mistakes_of(block: str):
    """siglip knows no configs: its ValueErrors become mistakes in a block of the config."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"config.{block}: {error}") from error
