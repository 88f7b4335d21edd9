"""A config without its data: all of a step's shapes follow from the rest."""

from collections.abc import Iterable
from typing import Any

from base.nested import insert
from trainers.config import complete
from trainers.config import file as config_file

VOCAB_SIZE = 32_000  # of c4_en, for a tokenizer whose file is not there
IGNORED = ("input.source", "input.tokenizer", "input.mixture", "evals", "init", "input.corrupt")


def load(config_flag: str, overrides: Iterable[tuple[str, str]] = ()) -> tuple[Any, list[str]]:
    """The complete config of 'path.py:arg=value' for compiling alone, and notes about it.

    No data is opened and no tokenizer file read; where the config does not say how many ids the
    tokenizer has, a note says how many are assumed.

    Raises:
      UserError: as complete.load.
    """
    given, file = config_file.run(config_flag, without_data=True)
    given = {name: value for name, value in given.items() if name not in ("evals", "init")}
    block = dict(given.get("input", {}))
    tokenizer = block.pop("tokenizer", {"name": "bytes"})
    for key in ("mixture", "language_temperature", "corrupt"):
        block.pop(key, None)
    given["input"] = block | {"source": {"name": "scenes"}, "tokenizer": {"name": "bytes"}}
    kept, notes = [], []
    for key, value in overrides:
        if any(key == name or key.startswith(f"{name}.") for name in IGNORED):
            notes.append(f"--config.{key} changes nothing here")
        else:
            kept.append((key, value))
        if key == "input.tokenizer.name":
            tokenizer = {"name": value}
    model = dict(given.get("model", {}))
    has_size = "vocab_size" in model.get("txt", {}) or "model.txt.vocab_size" in dict(kept)
    if tokenizer.get("name", "bytes") != "bytes" and not has_size:
        given = {**given, "model": {name: dict_of(value) for name, value in model.items()}}
        insert(given, "model.txt.vocab_size", VOCAB_SIZE)
        notes.append(
            f"the tokenizer is taken to have {VOCAB_SIZE:,} ids; else set "
            "--config.model.txt.vocab_size"
        )
    return complete.locked(complete.completed(given, file, kept)), notes


def dict_of(value: Any) -> Any:
    """A copy of a block; a value as it is."""
    return dict(value) if isinstance(value, dict) else value
