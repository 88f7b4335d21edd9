"""open_clip's SigLIP models: open_clip_model.safetensors and open_clip_config.json.

Their image towers are timm's. Most of these, and the text towers of the first generation, have the
exact GELU where SigLIP has its tanh form: embeddings differ by about 2e-5 from those of the same
weights here and in Hugging Face's transformers.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from base import whole_file
from siglip.checkpoints import spec
from siglip.checkpoints.errors import CheckpointError
from siglip.checkpoints.files import safetensors_file
from siglip.checkpoints.files.lazy_array import LazyArray
from siglip.checkpoints.formats import hf_config, hf_tokenizer, names
from siglip.checkpoints.spec import Spec
from siglip.checkpoints.weights import Weights, compare
from siglip.towers.text import make_text
from siglip.towers.transformer import SIZES, VARIANTS
from siglip.towers.vit import make_vit

MODEL, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"


def read(path: pathlib.Path) -> Weights:
    """The model of a folder, or of the .safetensors file in it.

    Raises:
      CheckpointError: files are missing or damaged, or are not of this family.
    """
    file, theirs = _open(path)
    in_file = {name: array.shape for name, array in theirs.items()}
    contract = _contract(in_file, file)
    shapes = contract.shapes()
    entries = list(names.open_clip(shapes))
    in_model = {entry.theirs: names.their_shape(entry, shapes) for entry in entries}
    for name, shape in in_file.items():
        if shape == (1,) and in_model.get(name) == ():  # the temperature, in some files
            in_file[name] = ()
    compare(in_file, in_model, where=str(file))
    ours = {
        name: array
        for entry in entries
        for name, array in names.to_ours(entry, theirs[entry.theirs], shapes)
    }
    return Weights({name: ours[name] for name in shapes}, contract, str(file), "open_clip")


def read_contract(path: pathlib.Path) -> Spec:
    """The contract of the model that `read` gives, from headers and JSON files.

    Raises:
      CheckpointError: files are missing or damaged, or are not of this family.
    """
    file, theirs = _open(path)
    return _contract({name: array.shape for name, array in theirs.items()}, file)


def _open(path: pathlib.Path) -> tuple[pathlib.Path, dict[str, LazyArray]]:
    """The file of arrays, and its arrays by name."""
    file = path / MODEL if path.is_dir() else path
    return file, safetensors_file.read(file)


def _config(file: pathlib.Path) -> dict[str, Any]:
    """{'model_cfg': ..., 'preprocess_cfg': ...} of a file that may be the model_cfg alone."""
    if not file.exists():
        return {}
    config = hf_config.read_json(file)
    return config if "model_cfg" in config else {"model_cfg": config}


def _contract(shapes: Mapping[str, tuple[int, ...]], file: pathlib.Path) -> Spec:
    if (own := file.with_name(spec.FILE)).exists():
        return spec.load(own)
    config = _config(file.with_name(CONFIG))
    model = config.get("model_cfg") or {}
    img = txt = None
    res = token_len = None
    try:
        if "visual.trunk.patch_embed.proj.weight" in shapes:
            kernel = shapes["visual.trunk.patch_embed.proj.weight"]
            sizes = _sizes(shapes, "visual.trunk.blocks.", "mlp.fc1", kernel[0], None)
            img = spec.variant_of(sizes, f"/{kernel[2]}")
            side = round(shapes["visual.trunk.pos_embed"][1] ** 0.5)
            res = (model.get("vision_cfg") or {}).get("image_size", side * kernel[2])
        if "text.token_embedding.weight" in shapes:
            vocab, width = shapes["text.token_embedding.weight"]
            heads = (model.get("text_cfg") or {}).get("heads")
            sizes = _sizes(shapes, "text.transformer.resblocks.", "mlp.c_fc", width, heads)
            txt = spec.variant_of(sizes, "")
            txt["vocab_size"] = vocab
            txt["out_dim"] = shapes.get("text.text_projection.bias", (0,))[0]
            token_len = shapes["text.positional_embedding"][0]
    except KeyError as error:
        raise CheckpointError(
            f"{file} is no SigLIP model of open_clip: {error} is missing"
        ) from None
    if img is None and txt is None:
        first = ", ".join(list(shapes)[:4])
        raise CheckpointError(f"{file} is no SigLIP model of open_clip; its arrays: {first}, ...")
    pad = spec.pad_id_of(txt) if txt else 1
    contract = Spec(
        img,
        txt,
        bias="logit_bias" in shapes,
        res=res,
        token_len=token_len,
        pad_id=pad,
        image=_image(config.get("preprocess_cfg") or {}, file.with_name(CONFIG)),
        text=spec.text_program(1, pad),
        tokenizer=hf_tokenizer.find(file.parent) if txt else None,
    )
    return hf_config.with_preset(contract)


def _image(config: Mapping[str, Any], file: Any) -> str:
    """The image program of a preprocess_cfg. Its defaults are those of open_clip's SigLIP models,
    not of its other models."""
    for key in ("mean", "std"):
        if config.get(key) not in (None, [0.5] * 3):
            raise CheckpointError(
                f"{file}: {key} {config[key]}; SigLIP's images are in [-1, 1]: 0.5"
            )
    mode, method = config.get("resize_mode", "squash"), config.get("interpolation", "bicubic")
    if mode not in ("squash", "shortest") or method not in ("bicubic", "bilinear"):
        raise CheckpointError(
            f"{file}: images are resized by {mode!r}, {method!r} there, which is none of squash, "
            "shortest and bicubic, bilinear"
        )
    if mode == "shortest":
        return _shortest(method)
    return "hf-siglip2" if method == "bilinear" else "hf-siglip"


def _shortest(method: str) -> str:
    return f"decode | shorter_side(method='{method}-pil') | center_crop"


def _sizes(
    shapes: Mapping[str, tuple[int, ...]], blocks: str, mlp: str, width: int, heads: int | None
) -> tuple[int, int, int, int]:
    """(width, depth, mlp_dim, heads) of a tower; heads=None: those of the variant of that size."""
    layers = [re.match(re.escape(blocks) + r"(\d+)\.", name) for name in shapes]
    depth = 1 + max((int(layer[1]) for layer in layers if layer), default=-1)
    mlp_dim = shapes[f"{blocks}0.{mlp}.bias"][0]
    known = [v[3] for v in VARIANTS.values() if v[:3] == (width, depth, mlp_dim)]
    if not heads and not known:
        raise CheckpointError(
            f"how many heads a tower of {dict(zip(SIZES, (width, depth, mlp_dim)))} has cannot be "
            f"seen from its arrays; put {CONFIG} beside them"
        )
    return width, depth, mlp_dim, heads or known[0]


def check(contract: Spec) -> None:
    """
    Raises:
      CheckpointError: open_clip has no such model.
    """
    hf_config.check_expressible(contract, "open_clip")
    if not contract.img or not contract.txt:
        raise CheckpointError("open_clip has no towers alone; write them as huggingface")
    if contract.img.get("naflex_grid"):
        raise CheckpointError("open_clip has no NaFlex models; write it as huggingface")


def write(weights: Weights, folder: pathlib.Path) -> tuple[str, ...]:
    """Writes a folder for `open_clip.create_model('local-dir:FOLDER')`, whole or not at all.

    Returns:
      A note for each thing that is not exact in it.

    Raises:
      CheckpointError: open_clip has no such model.
    """
    contract = weights.spec
    check(contract)
    assert contract.img is not None and contract.txt is not None
    notes = []
    name = _TIMM.get((contract.img["variant"], contract.res or 0))
    if name is None:
        name = f"vit_base_patch16_siglip_{contract.res}"
        notes.append(
            f"timm has no image tower like {contract.img} at {contract.res} pixels: the arrays are "
            f"right, timm_model_name in {CONFIG} is not"
        )
    notes.append(
        "GELU: timm and open_clip choose its exact or tanh form by model, see docs/weights.md"
    )
    shapes = {name: array.shape for name, array in weights.arrays.items()}
    theirs = {e.theirs: names.to_theirs(e, weights.arrays) for e in names.open_clip(shapes)}
    with whole_file.create_folder(folder) as scratch:
        safetensors_file.write(scratch / MODEL, theirs, {"format": "pt"})
        config, exact = _config_of(contract, name)
        if not exact:
            notes.append(
                f"images are prepared by {contract.image!r} here, by Pillow's bilinear resize "
                "there: not equal to the pixel"
            )
        contract, more = hf_tokenizer.write(contract, scratch)
        notes += more
        hf_config.write_json(config, scratch / CONFIG)
        beside = scratch / spec.FILE
        spec.save(spec.with_tokenizer_beside(contract, beside), beside)
    return tuple(notes)


_TIMM = {
    (f"{variant}/{patch}", res): f"vit_{timm}_patch{patch}_siglip_{res}"
    for variant, timm, patch, sizes in (
        ("B", "base", 16, (224, 256, 384, 512)),
        ("B", "base", 32, (256,)),
        ("L", "large", 16, (256, 384, 512)),
        ("So400m", "so400m", 14, (224, 378, 384)),
        ("So400m", "so400m", 16, (256, 384, 512)),
        ("g-opt", "giantopt", 16, (256, 384)),
    )
    for res in sizes
}


def _config_of(contract: Spec, timm_name: str) -> tuple[dict[str, Any], bool]:
    """The content of open_clip_config.json, and whether its preprocessing gives the contract's
    images to the pixel."""
    assert contract.img is not None and contract.txt is not None
    vit, text = make_vit(**contract.img), make_text(**contract.txt)
    text_cfg = {
        "context_length": contract.token_len,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "heads": text.num_heads,
        "layers": text.depth,
        "no_causal_mask": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
        "act_kwargs": {"approximate": "tanh"},
        # Without a name open_clip would take CLIP's tokenizer, whatever lies in the folder.
        "hf_tokenizer_name": "of this folder",
    }
    if text.mlp_dim != 4 * text.width:
        # Rounded as int(width * ratio) there; a little more never falls below.
        text_cfg["mlp_ratio"] = float(np.nextafter(text.mlp_dim / text.width, np.inf))
    if text.out_dim:
        text_cfg["proj_bias"] = True
    else:
        text_cfg["proj_type"] = "none"
    vision_cfg = {
        "image_size": contract.res,
        "timm_model_name": timm_name,
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    }
    model = {
        "embed_dim": vit.width,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": vision_cfg,
        "text_cfg": text_cfg,
    }
    shortest = {_shortest(method): method for method in ("bicubic", "bilinear")}
    methods = {"hf-siglip": "bicubic", "hf-siglip2": "bilinear", **shortest}
    preprocess = {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": methods.get(contract.image, "bilinear"),
        "resize_mode": "shortest" if contract.image in shortest else "squash",
    }
    return {"model_cfg": model, "preprocess_cfg": preprocess}, contract.image in methods
