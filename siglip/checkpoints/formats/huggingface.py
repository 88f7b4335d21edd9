"""Hugging Face folders of SiglipModel, Siglip2Model (NaFlex) and their towers alone.

transformers itself is not needed: names and layouts are in names.py, and config.json and the
processor's files are plain JSON.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from siglip.checkpoints import spec
from siglip.checkpoints.errors import CheckpointError
from siglip.checkpoints.files import safetensors_file
from siglip.checkpoints.files.lazy_array import Leaf, of_array
from siglip.checkpoints.formats import hf_tokenizer, names
from siglip.checkpoints.spec import Spec
from siglip.checkpoints.weights import Weights, compare
from siglip.towers.text import make_text
from siglip.towers.vit import make_vit

# Buffers that older versions of transformers saved.
IGNORED = ("embeddings.position_ids",)
HEAD = ("weight", "bias")
RESAMPLE = {2: "bilinear-pil", 3: "bicubic-pil"}
PROGRAMS = {2: "hf-siglip2", 3: "hf-siglip"}


def read(folder: pathlib.Path) -> Weights:
    """
    Raises:
      CheckpointError: files are missing or damaged, or are not of this family.
    """
    config = read_json(folder / "config.json")
    made = _spec(config, folder)
    theirs = safetensors_file.read_folder(folder)
    theirs = {n: leaf for n, leaf in theirs.items() if not n.endswith(IGNORED)}
    if (folder / spec.FILE).exists():
        theirs = _without_fillers(theirs, made)
    if made.txt and "head.weight" in {name.removeprefix("text_model.") for name in theirs}:
        head = {"out_dim": made.txt.get("out_dim") or make_text(**made.txt).width}
        made = dataclasses.replace(made, txt={**made.txt, **head})
    made = dataclasses.replace(made, bias="logit_bias" in theirs)
    shapes = made.shapes()
    prefixes = _prefixes(made, theirs)
    entries = list(names.huggingface(shapes, **prefixes))
    have = {n: leaf.shape for n, leaf in theirs.items()}
    want = {entry.theirs: names.their_shape(entry, shapes) for entry in entries}
    for scalar in ("logit_scale", "logit_bias"):
        if have.get(scalar) == ():
            want[scalar] = ()
    compare(have, want, where=str(folder))
    leaves = {
        name: leaf
        for entry in entries
        for name, leaf in names.to_ours(entry, theirs[entry.theirs], shapes)
    }
    return Weights({n: leaves[n] for n in shapes}, made, str(folder), "huggingface")


def _without_fillers(theirs: dict[str, Leaf], made: Spec) -> dict[str, Leaf]:
    """Without what `write` added for transformers' sake, as long as nobody has trained it."""
    filled: list[str] = []
    bias = theirs.get("logit_bias")
    if bias and not made.bias and not bias.read().any():
        filled.append("logit_bias")
    weight, bias = (f"{_prefixes(made, theirs).get('text', 'text_model.')}head.{x}" for x in HEAD)
    if made.txt and not made.txt.get("out_dim") and weight in theirs and bias in theirs:
        array, rows = theirs[weight].read(), theirs[bias].read()
        if np.array_equal(array, np.eye(len(array), dtype=array.dtype)) and not rows.any():
            filled += [weight, bias]
    return {name: leaf for name, leaf in theirs.items() if name not in filled}


def _prefixes(made: Spec, theirs: Mapping[str, Leaf]) -> dict[str, str]:
    """A tower alone lies in a file with its prefix or without, depending on who wrote it."""
    if made.img and made.txt:
        return {}
    key, prefix = ("vision", "vision_model.") if made.img else ("text", "text_model.")
    return {} if any(name.startswith(prefix) for name in theirs) else {key: ""}


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """Raises CheckpointError: it is missing, or no JSON object."""
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent} has no {file.name}") from None
    except (OSError, ValueError) as error:
        told = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{file} cannot be read ({told})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds no settings but a {type(found).__name__}")
    return found


# config.json -> Spec

VISION = ("siglip_vision_model", "siglip2_vision_model")
TEXT = ("siglip_text_model", "siglip2_text_model")


def _spec(config: dict[str, Any], folder: pathlib.Path) -> Spec:
    kind = config.get("model_type", "")
    if kind in ("siglip", "siglip2"):
        vision, text = config.get("vision_config") or {}, config.get("text_config") or {}
    elif kind in VISION:
        vision, text = config, None
    elif kind in TEXT:
        vision, text = None, config
    else:
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type {kind!r} is none of siglip, siglip2, "
            f"{', '.join(VISION + TEXT)}"
        )
    own = folder / spec.FILE
    if own.exists():  # written here: it knows what the other files cannot say
        return spec.load(own)
    naflex = kind.startswith("siglip2")
    where = folder / "config.json"
    made = Spec(None, None, bias=vision is not None and text is not None)
    if text is not None:
        made = _with_text(made, text, folder, where)
    if vision is not None:
        made = _with_vision(made, vision, naflex, folder, where)
    return known_as(made)


def known_as(made: Spec) -> Spec:
    """With the name of the released model that it is, and the size of its vocabulary."""
    name = released(made)
    size = spec.presets.PRESETS[name].vocab_size if name else None
    return dataclasses.replace(made, preset=name, vocab_size=size)


def released(made: Spec) -> str:
    """The name of the only released model that it may be, or ''."""
    found = [p.name for p in spec.presets.PRESETS.values() if _is_released(p, made)]
    return found[0] if len(found) == 1 else ""


def _is_released(preset: Any, made: Spec) -> bool:
    model = preset.model()
    res = None if preset.naflex else preset.res
    same = made.img == model["img"] and made.res == res and made.token_len == preset.token_len
    # transformers has an identity in the place of no head.
    heads = (model["txt"]["out_dim"], preset.out_dim)
    return same and made.txt in [{**model["txt"], "out_dim": head} for head in heads]


def _with_vision(
    made: Spec, config: dict[str, Any], naflex: bool, folder: pathlib.Path, where: pathlib.Path
) -> Spec:
    known = {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "patch_size": 16,
        "image_size": 224,
        "num_patches": 256,
    }  # transformers leaves out what is its default
    got = {key: config.get(key, default) for key, default in known.items()}
    _check_common(config, where)
    if not config.get("vision_use_head", True):
        raise CheckpointError(f"{where}: vision_use_head is false; SigLIP's image tower has one")
    for key in ("patch_size", "image_size"):
        if isinstance(got[key], list):
            if len(set(got[key])) != 1:
                raise CheckpointError(f"{where}: {key} {got[key]} is no square")
            got[key] = got[key][0]
    img = _variant(got, f"/{got['patch_size']}")
    processor = _processor(folder)
    if naflex:
        img["naflex_grid"] = _root(got["num_patches"], where)
        most = processor.get("max_num_patches", got["num_patches"])
        default = most == 256 and got["patch_size"] == 16
        program = f"decode | naflex({most}, {got['patch_size']}, 'bilinear-pil')"
        return dataclasses.replace(made, img=img, image="hf-naflex" if default else program)
    # The processor's default; of SigLIP 2, which has Gemma's vocabulary, what it was trained with.
    gemma = made.txt is not None and made.txt["vocab_size"] >= 256_000
    resample = processor.get("resample", 2 if gemma else 3)
    if resample not in PROGRAMS:
        raise CheckpointError(
            f"{folder}: images are resized by Pillow's resample {resample} there, which is none of "
            f"{', '.join(map(str, PROGRAMS))} (2 bilinear, 3 bicubic)"
        )
    _check_size(processor.get("size"), got["image_size"], folder)
    return dataclasses.replace(made, img=img, res=got["image_size"], image=PROGRAMS[resample])


def _with_text(
    made: Spec, config: dict[str, Any], folder: pathlib.Path, where: pathlib.Path
) -> Spec:
    known = {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "vocab_size": 32000,
        "max_position_embeddings": 64,
    }
    got = {key: config.get(key, default) for key, default in known.items()}
    _check_common(config, where)
    txt = _variant(got, "")
    txt["vocab_size"] = got["vocab_size"]
    txt["out_dim"] = config.get("projection_size") or got["hidden_size"]
    # Released config.json files say nothing reliable of ids (their defaults are CLIP's): SigLIP
    # pads with EOS, SigLIP 2, which has Gemma's vocabulary, with 0.
    eos, pad = 1, spec.pad_id_of(txt)
    tokenizer = hf_tokenizer.find(folder)
    return dataclasses.replace(
        made,
        txt=txt,
        token_len=got["max_position_embeddings"],
        eos_id=eos,
        pad_id=pad,
        text=spec.text_program(eos, pad),
        tokenizer=tokenizer,
    )


def _check_common(config: dict[str, Any], where: pathlib.Path) -> None:
    activation = config.get("hidden_act", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise CheckpointError(f"{where}: hidden_act {activation!r}; SigLIP has gelu_pytorch_tanh")
    epsilon = config.get("layer_norm_eps", 1e-6)
    if epsilon != 1e-6:
        raise CheckpointError(f"{where}: layer_norm_eps {epsilon}; SigLIP has 1e-6")


def _variant(got: dict[str, int], patch: str) -> dict[str, Any]:
    sizes = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
    width, depth, mlp_dim, heads = (got[key] for key in sizes)
    return spec.variant_of((width, depth, mlp_dim, heads), patch)


def _root(patches: int, where: pathlib.Path) -> int:
    side = round(patches**0.5)
    if side * side != patches:
        raise CheckpointError(f"{where}: num_patches {patches} is no square of a side")
    return side


def _processor(folder: pathlib.Path) -> dict[str, Any]:
    """What the folder says of its images; {} where it says nothing."""
    if (file := folder / "preprocessor_config.json").exists():
        found = read_json(file)
    elif (file := folder / "processor_config.json").exists():
        found = read_json(file).get("image_processor") or {}
    else:
        return {}
    for key in ("image_mean", "image_std"):
        if found.get(key) not in (None, [0.5] * 3):
            raise CheckpointError(
                f"{file}: {key} {found[key]}; SigLIP's images are in [-1, 1]: 0.5"
            )
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if found.get(key) is False:
            raise CheckpointError(f"{file}: {key} is false; SigLIP's images are resized to [-1, 1]")
    return found


def _check_size(size: Any, image_size: int, folder: pathlib.Path) -> None:
    sides = set(size.values()) if isinstance(size, dict) else {size}
    if size is not None and sides != {image_size}:
        raise CheckpointError(
            f"{folder}: the processor makes images of {size}, the model takes {image_size} pixels"
        )


# Spec -> files


def write(weights: Weights, folder: pathlib.Path) -> tuple[str, ...]:
    """Writes a folder for AutoModel, AutoProcessor and AutoTokenizer; what is not exact in it.

    The folder appears whole or not at all.

    Raises:
      CheckpointError: transformers has no such model.
    """
    with folder_at_once(folder) as scratch:
        return _write(weights, scratch)


@contextlib.contextmanager
def folder_at_once(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to write to, which becomes `folder` at the end, or nothing after an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        os.chmod(scratch, 0o755)  # mkdtemp's is for one user alone
        yield scratch
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _write(weights: Weights, folder: pathlib.Path) -> tuple[str, ...]:
    made, notes = weights.spec, []
    check_expressible(made, "transformers")
    leaves = dict(weights.leaves)
    if made.txt and "txt/head/kernel" not in leaves:
        width = make_text(**made.txt).width
        dtype = leaves["txt/pos_embedding"].dtype
        leaves["txt/head/kernel"] = of_array(np.eye(width, dtype=dtype), "the identity")
        leaves["txt/head/bias"] = of_array(np.zeros(width, dtype), "zeros")
        notes.append("the text tower has no head: an identity was written")
    if made.img and made.txt and "b" not in leaves:
        leaves["b"] = of_array(np.zeros(1, leaves["t"].dtype), "zero")
        notes.append("the model has no bias: 0 was written")
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    theirs = {e.theirs: names.to_theirs(e, leaves) for e in names.huggingface(shapes)}
    safetensors_file.write(folder / "model.safetensors", theirs, {"format": "pt"})
    dtypes = {str(leaf.dtype) for leaf in theirs.values()}
    config = config_of(made, dtypes.pop() if len(dtypes) == 1 else "float32")
    _dump(config, folder / "config.json")
    if made.img:
        processor, exact = _processor_of(made)
        _dump(processor, folder / "preprocessor_config.json")
        if not exact:
            notes.append(
                f"images are prepared by {made.image!r} here, by Pillow's bilinear resize there: "
                "not equal to the pixel"
            )
    if made.txt:
        made, more = hf_tokenizer.write(made, folder)
        notes += more
    spec.save(spec.with_tokenizer_beside(made, folder / spec.FILE), folder / spec.FILE)
    return tuple(notes)


def check_expressible(made: Spec, where: str) -> None:
    """Raises CheckpointError for a model that only this project has."""
    odd: list[str] = []
    if made.img:
        if made.img["variant"] == "precomputed":
            odd.append("an image tower of precomputed embeddings")
        if made.img.get("pool", "map") != "map":
            odd.append(f"an image tower with pool {made.img['pool']!r}, not 'map'")
        if made.img.get("out_dim"):
            odd.append("an image tower with a head")
    if made.txt:
        if made.txt.get("pool", "last") != "last":
            odd.append(f"a text tower with pool {made.txt['pool']!r}, not 'last'")
        if made.txt.get("bottleneck"):
            odd.append("a vocabulary with a bottleneck")
    if odd:
        raise CheckpointError(
            f"{where} has no model with {' and '.join(odd)}; write it as big_vision"
        )


def config_of(made: Spec, dtype: str) -> dict[str, Any]:
    """config.json."""
    naflex = bool(made.img and made.img.get("naflex_grid"))
    kind, name = ("siglip2", "Siglip2") if naflex else ("siglip", "Siglip")
    vision = text = None
    common = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "attention_dropout": 0.0}
    if made.img:
        tower = make_vit(**made.img)
        vision = {**_sizes(tower), **common, "num_channels": 3, "patch_size": tower.patch_size}
        vision |= {"vision_use_head": True, "model_type": f"{kind}_vision_model"}
        if naflex:
            vision["num_patches"] = made.img["naflex_grid"] ** 2
        else:
            vision["image_size"] = made.res
    if made.txt:
        tower = make_text(**made.txt)
        text = {**_sizes(tower), **common, "vocab_size": tower.vocab_size}
        text |= {
            "max_position_embeddings": made.token_len,
            "projection_size": tower.out_dim or tower.width,
            "pad_token_id": made.pad_id,
            "eos_token_id": made.eos_id,
            "bos_token_id": None,
            "model_type": f"{kind}_text_model",
        }
    if vision and text:
        config = {"architectures": [f"{name}Model"], "model_type": kind}
        config |= {"vision_config": vision, "text_config": text, "initializer_factor": 1.0}
    elif vision:
        config = {"architectures": [f"{name}VisionModel"], **vision}
    else:
        config = {"architectures": [f"{name}TextModel"], **(text or {})}
    return {**config, "dtype": dtype}


def _sizes(tower: Any) -> dict[str, int]:
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_dim,
        "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.num_heads,
    }


def _processor_of(made: Spec) -> tuple[dict[str, Any], bool]:
    """(preprocessor_config.json, whether it is what spec.image says to the pixel)."""
    assert made.img is not None
    common = {
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "do_convert_rgb": True,
    }
    if made.img.get("naflex_grid"):
        tower = make_vit(**made.img)
        most = _most_patches(made)
        found = {"image_processor_type": "Siglip2ImageProcessor", **common, "resample": 2}
        found |= {"patch_size": tower.patch_size, "max_num_patches": most or 256}
        return found, most is not None
    known = {v: k for k, v in PROGRAMS.items()}
    known |= {f"decode | resize('{method}')": k for k, method in RESAMPLE.items()}
    exact = made.image in known
    found = {"image_processor_type": "SiglipImageProcessor", **common}
    found |= {"resample": known.get(made.image, 2)}
    return {**found, "size": {"height": made.res, "width": made.res}}, exact


def _most_patches(made: Spec) -> int | None:
    """max_patches of a NaFlex program that transformers has too."""
    if made.image == "hf-naflex":
        return 256
    head, _, rest = made.image.partition("decode | naflex(")
    parts = [part.strip() for part in rest.removesuffix(")").split(",")]
    exact = not head and len(parts) == 3 and parts[2] == "'bilinear-pil'"
    return int(parts[0]) if exact and parts[0].isdigit() else None


def _dump(content: dict[str, Any], file: pathlib.Path) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
