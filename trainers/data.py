"""The preprocessing and the training source that config.input describes."""

import contextlib
from typing import Any

from absl import logging

from base.errors import UserError
from input_pipeline.bad_examples import BadExamples
from input_pipeline.mixture import Languages, Mixture, languages_of
from input_pipeline.sources.registry import SOURCES
from input_pipeline.transforms.preprocess import Preprocess, make_preprocess
from input_pipeline.transforms.tokenizer import TOKENIZERS


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
    """The source to train on, by config.input.source, mixture and language_temperature.

    Raises:
      UserError: they do not fit each other, or a source cannot be opened.
    """
    block = config.input
    is_mixture, temperature = block.source.name == MIXTURE, block.language_temperature
    if is_mixture != bool(block.mixture):
        raise UserError(
            "config.input.mixture and config.input.source.name='mixture' go together: the one "
            "holds the sources, the other says to use them"
        )
    if not is_mixture:
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
            # This raises the error that says what is missing.
            Languages(next(iter(parts.values())), temperature)
        if others := sorted(parts.keys() - balanced):
            logging.warning("languages: %s of the mixture know none", ", ".join(others))
        parts |= {name: Languages(parts[name], temperature) for name in balanced}
    return Mixture(parts, tuple(part.weight for part in block.mixture.values()))


def _check_damage(sources: dict[str, Any], allowed: float) -> None:
    """Holds what sources left out when they were opened to the limit for bad examples."""
    for name, source in sources.items():
        damage = getattr(source, "damage", {})
        if not damage:
            continue
        bad, total = BadExamples(), sum(damage.values())
        for (kind, shard), count in damage.items():
            bad.add(kind, shard, count)
        message = f"{total} samples of {name} are left out, {len(source)} are not: {bad.worst()}"
        # The exact share: too_many lets a single one pass, as it judges a run's first examples.
        if total > allowed * (len(source) + total):
            raise UserError(f"{message}; more than config.input.max_bad_fraction={allowed}")
        logging.warning("%s", message)


def chosen(components: dict[str, Any], block: Any) -> Any:
    """The component that a block names, called with the block's other keys."""
    return components[block.name](**without(block, "name"))


def without(block: Any, *keys: str) -> dict[str, Any]:
    """A plain dict of the block's other keys."""
    return {k: v for k, v in block.to_dict().items() if k not in keys}


@contextlib.contextmanager
def mistakes_of(block: str):
    """Turns ValueErrors of siglip, which knows no configs, into UserErrors about a config block."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"config.{block}: {error}") from error
