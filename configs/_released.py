"""Settings of the released models by name, and what fine-tuning configs share.

siglip/presets.py is the whole table; a test holds the two equal.
"""

import json
import os
import re

from ml_collections import ConfigDict

from configs import _source

# How people and files write the sizes -> ours.
_SIZES = {"b": "B", "l": "L", "so400m": "So400m", "g-opt": "g-opt"}
SPEC = "siglip.json"
TOKENIZERS = ("spiece.model", "tokenizer.model", "tokenizer.json")


def settings(model: str) -> dict:
    """img, txt, res, token_len, image, text of 'siglip-b16-224', 'siglip2-so400m14-384', ..."""
    found = re.fullmatch(r"(siglip2?)-(b|l|so400m|g-opt)(\d\d)-(\d+|naflex)(-i18n)?", model)
    if not found:
        raise ValueError(
            f"model={model!r} is no released model; write it as siglip-b16-224, "
            "siglip2-so400m14-384 or siglip2-b16-naflex"
        )
    generation, size, patch, res, languages = found.groups()
    variant, second, naflex = _SIZES[size], generation == "siglip2", res == "naflex"
    image = "hf-naflex" if naflex else "hf-siglip2" if second else "hf-siglip"
    txt = {"variant": "So400m" if size == "g-opt" else variant}
    if languages:
        txt["vocab_size"] = 250_000  # rows of the table; mc4's tokenizer has 100 ids more
    if languages and size == "so400m":
        txt["out_dim"] = 0
    return {
        "img": {"variant": f"{variant}/{patch}"} | ({"naflex_grid": 16} if naflex else {}),
        "txt": txt,
        "res": 256 if naflex else int(res),
        "token_len": 16 if model == "siglip-so400m14-224" else 64,
        "image": image,
        "text": "lower | tokenize(pad_id=0)" if second else "lower | tokenize",
    }


def tokenizer(file: str, init: str) -> dict:
    """The block of a .model or .json file; by default that which came with the weights."""
    if not file:
        return _tokenizer_of(init)
    return _block(file)


def _block(file: str) -> dict:
    name = "huggingface" if file.endswith(".json") else "sentencepiece"
    return {"name": name, "path": file}


def _tokenizer_of(init: str) -> dict:
    """What siglip.json says, which lies in a folder, a workdir (two above a step) or beside an
    .npz; else a tokenizer's file in the folder."""
    stem = init.removesuffix(".npz")
    step = os.path.join(init, os.pardir, os.pardir)
    for path in (f"{stem}.{SPEC}", os.path.join(init, SPEC), os.path.join(step, SPEC)):
        if os.path.isfile(path):
            with open(path) as file:
                found = json.load(file)["tokenizer"]
            if found and "path" in found:
                found["path"] = os.path.join(os.path.dirname(path), os.path.basename(found["path"]))
            if found:
                return found
    for name in TOKENIZERS:
        if os.path.isfile(path := os.path.join(init, name)):
            return _block(path)
    raise ValueError(
        f"init={init!r} came without a tokenizer ({', '.join(TOKENIZERS)}): pass tokenizer=FILE"
    )


def fine_tuning(
    model: str,
    init: str,
    path: str,
    images: str,
    val: bool,
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
        known["txt"] = {**known["txt"], "variant": "mu"}
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
    if val or val_path:
        source = _source.of(val_path or path, "" if val_path else "val", images=images)
        config.evals = ConfigDict(
            {"retrieval": {"type": "retrieval", "every": "10 percent", "source": source}}
        )
    return config
