"""open_clip's SigLIP models: open_clip_model.safetensors and open_clip_config.json.

Their image towers are timm's, most of which have the exact GELU in the place of its tanh form, and
so do the text towers of the first generation: embeddings differ by about 2e-5 from those of the
same weights here and in Hugging Face's transformers.
"""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from siglip.checkpoints import spec
from siglip.checkpoints.errors import CheckpointError
from siglip.checkpoints.files import safetensors_file
from siglip.checkpoints.files.lazy_array import Leaf
from siglip.checkpoints.formats import hf_tokenizer, huggingface, names
from siglip.checkpoints.spec import Spec
from siglip.checkpoints.weights import Weights, compare
from siglip.towers.text import make_text
from siglip.towers.transformer import SIZES, VARIANTS
from siglip.towers.vit import make_vit

MODEL, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"


def read(path: pathlib.Path) -> Weights:
    """A folder, or the .safetensors file in it.

    Raises:
      CheckpointError: files are missing or damaged, or are not of this family.
    """
    file = path / MODEL if path.is_dir() else path
    theirs = safetensors_file.read(file)
    config = _config(file.with_name(CONFIG))
    shapes = {name: leaf.shape for name, leaf in theirs.items()}
    made = _spec(shapes, config, file)
    ours = made.shapes()
    entries = list(names.open_clip(ours))
    want = {entry.theirs: names.their_shape(entry, ours) for entry in entries}
    have = {n: want[n] if _scalar(s, want.get(n)) else s for n, s in shapes.items()}
    compare(have, want, where=str(file))
    leaves = {
        name: leaf
        for entry in entries
        for name, leaf in names.to_ours(entry, theirs[entry.theirs], ours)
    }
    return Weights({n: leaves[n] for n in ours}, made, str(file), "open_clip")


def _scalar(have: tuple[int, ...], want: tuple[int, ...] | None) -> bool:
    return want == () and have == (1,)


def _config(file: pathlib.Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    found = huggingface.read_json(file)
    return found if "model_cfg" in found else {"model_cfg": found}


def _spec(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], file: Any) -> Spec:
    if (own := file.with_name(spec.FILE)).exists():
        return spec.load(own)
    model = config.get("model_cfg") or {}
    img = txt = None
    res = token_len = None
    try:
        if "visual.trunk.patch_embed.proj.weight" in shapes:
            kernel = shapes["visual.trunk.patch_embed.proj.weight"]
            img = _tower(shapes, "visual.trunk.blocks.", "mlp.fc1", kernel[0], None)
            img = spec.variant_of(img, f"/{kernel[2]}")
            side = round(shapes["visual.trunk.pos_embed"][1] ** 0.5)
            res = (model.get("vision_cfg") or {}).get("image_size", side * kernel[2])
        if "text.token_embedding.weight" in shapes:
            vocab, width = shapes["text.token_embedding.weight"]
            heads = (model.get("text_cfg") or {}).get("heads")
            sizes = _tower(shapes, "text.transformer.resblocks.", "mlp.c_fc", width, heads)
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
    made = Spec(
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
    return huggingface.known_as(made)


def _image(config: Mapping[str, Any], file: Any) -> str:
    """What open_clip's preprocess_cfg does; it has other defaults for models of its own."""
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


def _tower(
    shapes, blocks: str, mlp: str, width: int, heads: int | None
) -> tuple[int, int, int, int]:
    """(width, depth, mlp_dim, heads); heads, where nobody says, of the variant of these sizes."""
    depth = 1 + max(
        (int(found[1]) for n in shapes if (found := re.match(re.escape(blocks) + r"(\d+)\.", n))),
        default=-1,
    )
    mlp_dim = shapes[f"{blocks}0.{mlp}.bias"][0]
    known = [v[3] for v in VARIANTS.values() if v[:3] == (width, depth, mlp_dim)]
    if not heads and not known:
        raise CheckpointError(
            f"how many heads a tower of {dict(zip(SIZES, (width, depth, mlp_dim)))} has cannot be "
            f"seen from its arrays; put {CONFIG} beside them"
        )
    return width, depth, mlp_dim, heads or known[0]


def check(made: Spec) -> None:
    """Raises CheckpointError: open_clip has no such model."""
    huggingface.check_expressible(made, "open_clip")
    if not made.img or not made.txt:
        raise CheckpointError("open_clip has no towers alone; write them as huggingface")
    if made.img.get("naflex_grid"):
        raise CheckpointError("open_clip has no NaFlex models; write it as huggingface")


def write(weights: Weights, folder: pathlib.Path) -> tuple[str, ...]:
    """Writes a folder for `open_clip.create_model('local-dir:FOLDER')`; what is not exact in it.

    Raises:
      CheckpointError: open_clip has no such model.
    """
    made = weights.spec
    check(made)
    assert made.img is not None and made.txt is not None
    notes = []
    name = _TIMM.get((made.img["variant"], made.res or 0))
    if name is None:
        name = f"vit_base_patch16_siglip_{made.res}"
        notes.append(
            f"timm has no image tower like {made.img} at {made.res} pixels: the arrays are right, "
            f"timm_model_name in {CONFIG} is not"
        )
    notes.append(
        "GELU: timm and open_clip choose its exact or tanh form by model, see docs/weights.md"
    )
    leaves = weights.leaves
    shapes = {n: leaf.shape for n, leaf in leaves.items()}
    theirs: dict[str, Leaf] = {
        e.theirs: names.to_theirs(e, leaves) for e in names.open_clip(shapes)
    }
    with huggingface.folder_at_once(folder) as scratch:
        safetensors_file.write(scratch / MODEL, theirs, {"format": "pt"})
        config, exact = _config_of(made, name)
        if not exact:
            notes.append(
                f"images are prepared by {made.image!r} here, by Pillow's bilinear resize there: "
                "not equal to the pixel"
            )
        made, more = hf_tokenizer.write(made, scratch)
        notes += more
        (scratch / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        beside = scratch / spec.FILE
        spec.save(spec.with_tokenizer_beside(made, beside), beside)
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


def _config_of(made: Spec, timm_name: str) -> tuple[dict[str, Any], bool]:
    """The file, and whether its preprocessing is that of the spec."""
    assert made.img is not None and made.txt is not None
    vit, text = make_vit(**made.img), make_text(**made.txt)
    text_cfg = {
        "context_length": made.token_len,
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
        "image_size": made.res,
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
        "interpolation": methods.get(made.image, "bilinear"),
        "resize_mode": "shortest" if made.image in shortest else "squash",
    }
    return {"model_cfg": model, "preprocess_cfg": preprocess}, made.image in methods
