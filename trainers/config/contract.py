"""config.contract: model and preprocessing as some weights expect them, where the config is silent.

The contract of weights (siglip.json beside them, or the shapes and files of a released format) says
what the model is and how its inputs are prepared, so that nobody writes it twice.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from base import values
from base.errors import UserError
from base.nested import flatten, insert
from siglip.towers.two_towers import PARTS, TOWERS

INPUT_KEYS = ("res", "token_len", "image", "text")
KEYS = (
    *(f"model.{tower}.variant" for tower in TOWERS),
    *(f"input.{key}" for key in INPUT_KEYS),
    "input.tokenizer.name",
)


def fill(given: Mapping[str, Any], overrides: Iterable[tuple[str, str]]) -> Mapping[str, Any]:
    """`given`, with the keys that neither it nor an override sets taken from config.contract.

    A tower whose variant is set takes nothing from the contract. A complete config, such as a
    stored one, has all keys, so that its weights need not be there any more.

    Args:
      given: a config as its file gives it.
      overrides: (key, text of its value) pairs from the command line.

    Raises:
      UserError: the weights cannot be read, or came without a tokenizer. One line.
    """
    flags = dict(overrides)

    def value_of(key: str, annotation: Any) -> Any:
        if key in flags:
            return values.parse_key(flags[key], annotation, f"config.{key}", f"--config.{key}")
        return given.get(key)

    source, init = value_of("contract", str | None), value_of("init", str | None)
    is_set = {*flatten(given), *flags}
    if not isinstance(source, str) or not source or is_set >= set(KEYS):
        return given
    contract = _read(source)
    own_tokenizer = any(key.startswith("input.tokenizer.") for key in is_set)
    taken = (value_of("init_only", tuple) or PARTS) if init else ()
    from_contract: dict[str, Any] = {
        f"input.{key}": value for key in INPUT_KEYS if (value := getattr(contract, key)) is not None
    }
    for tower in TOWERS:
        block = getattr(contract, tower)
        if block and f"model.{tower}.variant" not in is_set:
            from_contract |= {f"model.{tower}.{key}": value for key, value in block.items()}
    if own_tokenizer and "txt" not in taken:  # the text tower is new, and so is its vocabulary
        from_contract.pop("model.txt.vocab_size", None)
    if not contract.bias and "b" in taken:
        from_contract["model.b_init"] = None
    filled = _merged(given, {k: v for k, v in from_contract.items() if k not in is_set})
    if own_tokenizer:
        return filled
    tokenizer = contract.tokenizer
    if not tokenizer and init and init != source:
        tokenizer = _read(init).tokenizer
    if not tokenizer:
        raise UserError(
            f"config.contract={source!r} came without a tokenizer; pass tokenizer=FILE to the "
            "config, or --config.input.tokenizer.name=... and .path=..."
        )
    return _merged(filled, {f"input.tokenizer.{k}": v for k, v in tokenizer.items()})


def _read(source: str) -> Any:
    from siglip import checkpoints  # imports take seconds, and most configs name no weights

    try:
        return checkpoints.contract_of(source)
    except checkpoints.CheckpointError as error:
        raise UserError(f"config.contract: {error}") from None


def _merged(tree: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a nested dict with these leaves set."""
    merged: dict[str, Any] = {
        name: _merged(value, {}) if isinstance(value, Mapping) else value
        for name, value in tree.items()
    }
    for path, value in leaves.items():
        insert(merged, path, value)
    return merged
