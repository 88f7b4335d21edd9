"""Settings of the released models by name, and what fine-tuning configs share.

siglip/presets.py is the whole table; a test holds the two equal.
"""

import os
import re

from ml_collections import ConfigDict

from configs import _source

# How people and files write the sizes -> ours.
_SIZES = {"b": "B", "l": "L", "so400m": "So400m", "g-opt": "g-opt"}
TOKENIZERS = ("spiece.model", "tokenizer.model", "tokenizer.json")


def settings(model: str) -> dict:
    """img, txt, res, token_len, image, text of 'siglip-b16-224', 'siglip2-so400m14-384', ..."""
    found = re.fullmatch(r"(siglip2?)-(b|l|so400m|g-opt)(\d\d)-(\d+|naflex)(-i18n)?", model)
    if not found:
        raise ValueError(
            f"model={model!r} is no released model; write it as siglip-b16-224, "
            "siglip2-so400m14-384 or siglip2-b16-naflex"
        )
    generation, size, patch, res, _ = found.groups()
    variant, second, naflex = _SIZES[size], generation == "siglip2", res == "naflex"
    image = "hf-naflex" if naflex else "hf-siglip2" if second else "hf-siglip"
    return {
        "img": {"variant": f"{variant}/{patch}"} | ({"naflex_grid": 16} if naflex else {}),
        "txt": {"variant": "So400m" if size == "g-opt" else variant},
        "res": 256 if naflex else int(res),
        "token_len": 16 if model == "siglip-so400m14-224" else 64,
        "image": image,
        "text": "lower | tokenize(pad_id=0)" if second else "lower | tokenize",
    }


def tokenizer(file: str, init: str) -> dict:
    """The block of a .model or .json file; by default that in the folder of the weights."""
    if not file:
        found = [p for name in TOKENIZERS if os.path.isfile(p := os.path.join(init, name))]
        if not found:
            raise ValueError(
                f"init={init!r} is no folder with {', '.join(TOKENIZERS)}: pass tokenizer=FILE"
            )
        file = found[0]
    name = "huggingface" if file.endswith(".json") else "sentencepiece"
    return {"name": name, "path": file}


def fine_tuning(
    model: str,
    init: str,
    path: str,
    images: str,
    val_path: str,
    tokenizer_file: str,
    batch_size: int,
    total: str,
    res: int,
    small: bool,
) -> ConfigDict:
    """What all recipes on pairs have in common; see configs/pairs.py for the data."""
    if not (init and path):
        raise ValueError("pass init=WEIGHTS and path=PAIRS: --config configs/...:init=...,path=...")
    known = settings(model)
    if res and res != known["res"]:
        known["res"] = res
        positions = "bilinear-corners"  # as big_vision resizes them
    else:
        positions = None
    if small:  # the towers of random:NAME:small
        patch = known["img"]["variant"].partition("/")[2]
        known["img"] = {**known["img"], "variant": f"mu/{patch}"}
        known["txt"] = {"variant": "mu"}
    config = ConfigDict()
    config.total = total
    config.init = init
    config.init_positions = positions
    config.model = ConfigDict({"img": known["img"], "txt": known["txt"]})
    if not small:
        config.model.dtype = "bfloat16"
    config.input = ConfigDict(
        {
            "batch_size": batch_size,
            **{key: known[key] for key in ("res", "token_len", "image", "text")},
            "source": _source.of(path, "train", images=images),
            "tokenizer": tokenizer(tokenizer_file, init),
        }
    )
    config.optimizer = ConfigDict({"name": "adafactor", "b1": 0.9, "beta2_cap": 0.95})
    config.schedule = ConfigDict({"name": "cosine", "warmup": "10 percent"})
    config.log_every = 50
    config.checkpoint = ConfigDict({"every": "1000 steps"})
    if val_path:
        source = _source.of(val_path, "val" if val_path == path else "", images=images)
        config.evals = ConfigDict(
            {"retrieval": {"type": "retrieval", "every": "10 percent", "source": source}}
        )
    return config
