"""config.json and the processor's files of Hugging Face folders: from them to a Spec, and back.

transformers itself is not needed: they are plain JSON.
"""

import dataclasses
import json
import pathlib
from typing import Any

from base.words import one_line
from siglip import presets
from siglip.checkpoints import spec
from siglip.checkpoints.errors import CheckpointError
from siglip.checkpoints.formats import hf_tokenizer
from siglip.checkpoints.spec import Spec
from siglip.towers.text import make_text
from siglip.towers.vit import make_vit

# Pillow's resampling filters: the image program of ours that is equal to the pixel.
RESAMPLE = {2: "bilinear-pil", 3: "bicubic-pil"}
PROGRAMS = {2: "hf-siglip2", 3: "hf-siglip"}


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      CheckpointError: the file is missing or damaged, or holds another JSON value.
    """
    try:
        settings = json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent} has no {file.name}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({one_line(error)})") from None
    if not isinstance(settings, dict):
        raise CheckpointError(
            f"{file} holds a {type(settings).__name__}, not settings (a JSON object)"
        )
    return settings


def write_json(content: dict[str, Any], file: pathlib.Path) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


# config.json -> Spec

VISION = ("siglip_vision_model", "siglip2_vision_model")
TEXT = ("siglip_text_model", "siglip2_text_model")


def spec_of(folder: pathlib.Path) -> Spec:
    """The contract of a folder by its siglip.json, else by its config.json, its processor's and its
    tokenizer's files. Whether the text tower has a head, only the arrays can say.

    Raises:
      CheckpointError: files are missing or damaged, or are not of this family.
    """
    where = folder / "config.json"
    config = read_json(where)
    kind = config.get("model_type", "")
    if kind in ("siglip", "siglip2"):
        vision, text = config.get("vision_config") or {}, config.get("text_config") or {}
    elif kind in VISION:
        vision, text = config, None
    elif kind in TEXT:
        vision, text = None, config
    else:
        raise CheckpointError(
            f"{where}: model_type {kind!r} is none of siglip, siglip2, {', '.join(VISION + TEXT)}"
        )
    own = folder / spec.FILE
    if own.exists():  # written by this project: it says what the other files cannot
        return spec.load(own)
    naflex = kind.startswith("siglip2")
    contract = Spec(None, None, bias=vision is not None and text is not None)
    if text is not None:
        contract = _with_text(contract, text, folder, where)
    if vision is not None:
        contract = _with_vision(contract, vision, naflex, folder, where)
    return with_preset(contract)


def with_preset(contract: Spec) -> Spec:
    """The same contract with the released model's name and vocabulary where exactly one fits."""
    fits = [preset for preset in presets.PRESETS.values() if _is_released(preset, contract)]
    if len(fits) != 1:
        return dataclasses.replace(contract, preset="", vocab_size=None)
    return dataclasses.replace(contract, preset=fits[0].name, vocab_size=fits[0].vocab_size)


def _is_released(preset: presets.Preset, contract: Spec) -> bool:
    model = preset.model()
    sizes = (model["img"], None if preset.naflex else preset.res, preset.token_len)
    # Where the model has no head, transformers has an identity.
    heads = (model["txt"]["out_dim"], preset.out_dim)
    texts = [{**model["txt"], "out_dim": head} for head in heads]
    return (contract.img, contract.res, contract.token_len) == sizes and contract.txt in texts


def _with_vision(
    contract: Spec, config: dict[str, Any], naflex: bool, folder: pathlib.Path, where: pathlib.Path
) -> Spec:
    defaults = {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "patch_size": 16,
        "image_size": 224,
        "num_patches": 256,
    }  # transformers leaves out what is its default
    sizes = {key: config.get(key, default) for key, default in defaults.items()}
    _check_common(config, where)
    if not config.get("vision_use_head", True):
        raise CheckpointError(f"{where}: vision_use_head is false; SigLIP's image tower has one")
    for key in ("patch_size", "image_size"):
        if isinstance(sizes[key], list):
            if len(set(sizes[key])) != 1:
                raise CheckpointError(f"{where}: {key} {sizes[key]} is no square")
            sizes[key] = sizes[key][0]
    img = _variant(sizes, f"/{sizes['patch_size']}")
    processor = _processor(folder)
    if naflex:
        img["naflex_grid"] = _root(sizes["num_patches"], where)
        max_patches = processor.get("max_num_patches", sizes["num_patches"])
        default = max_patches == 256 and sizes["patch_size"] == 16
        program = f"decode | naflex({max_patches}, {sizes['patch_size']}, 'bilinear-pil')"
        return dataclasses.replace(contract, img=img, image="hf-naflex" if default else program)
    # Without the processor's file: SigLIP 2, which has Gemma's vocabulary, was trained with
    # bilinear images (2); transformers' default is bicubic (3).
    gemma = contract.txt is not None and contract.txt["vocab_size"] >= 256_000
    resample = processor.get("resample", 2 if gemma else 3)
    if resample not in PROGRAMS:
        raise CheckpointError(
            f"{folder}: its processor resizes images by Pillow's resample {resample}, which is "
            f"none of {', '.join(map(str, PROGRAMS))} (2 bilinear, 3 bicubic)"
        )
    _check_size(processor.get("size"), sizes["image_size"], folder)
    return dataclasses.replace(contract, img=img, res=sizes["image_size"], image=PROGRAMS[resample])


def _with_text(
    contract: Spec, config: dict[str, Any], folder: pathlib.Path, where: pathlib.Path
) -> Spec:
    defaults = {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "vocab_size": 32000,
        "max_position_embeddings": 64,
    }
    sizes = {key: config.get(key, default) for key, default in defaults.items()}
    _check_common(config, where)
    txt = _variant(sizes, "")
    txt["vocab_size"] = sizes["vocab_size"]
    txt["out_dim"] = config.get("projection_size") or sizes["hidden_size"]
    # The ids in released config.json files are CLIP's defaults, which no SigLIP has: SigLIP pads
    # with EOS, SigLIP 2, which has Gemma's vocabulary, with 0.
    eos, pad = 1, spec.pad_id_of(txt)
    return dataclasses.replace(
        contract,
        txt=txt,
        token_len=sizes["max_position_embeddings"],
        eos_id=eos,
        pad_id=pad,
        text=spec.text_program(eos, pad),
        tokenizer=hf_tokenizer.find(folder),
    )


def _check_common(config: dict[str, Any], where: pathlib.Path) -> None:
    activation = config.get("hidden_act", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise CheckpointError(f"{where}: hidden_act {activation!r}; SigLIP has gelu_pytorch_tanh")
    epsilon = config.get("layer_norm_eps", 1e-6)
    if epsilon != 1e-6:
        raise CheckpointError(f"{where}: layer_norm_eps {epsilon}; SigLIP has 1e-6")


def _variant(sizes: dict[str, int], patch: str) -> dict[str, Any]:
    keys = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
    width, depth, mlp_dim, heads = (sizes[key] for key in keys)
    return spec.variant_of((width, depth, mlp_dim, heads), patch)


def _root(patches: int, where: pathlib.Path) -> int:
    side = round(patches**0.5)
    if side * side != patches:
        raise CheckpointError(f"{where}: num_patches {patches} is not the square of a number")
    return side


def _processor(folder: pathlib.Path) -> dict[str, Any]:
    """The settings of the folder's image processor; {} where it has none."""
    if (file := folder / "preprocessor_config.json").exists():
        settings = read_json(file)
    elif (file := folder / "processor_config.json").exists():
        settings = read_json(file).get("image_processor") or {}
    else:
        return {}
    for key in ("image_mean", "image_std"):
        if settings.get(key) not in (None, [0.5] * 3):
            raise CheckpointError(
                f"{file}: {key} {settings[key]}; SigLIP's images are in [-1, 1]: 0.5"
            )
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if settings.get(key) is False:
            raise CheckpointError(f"{file}: {key} is false; SigLIP's images are resized to [-1, 1]")
    return settings


def _check_size(size: Any, image_size: int, folder: pathlib.Path) -> None:
    sides = set(size.values()) if isinstance(size, dict) else {size}
    if size is not None and sides != {image_size}:
        raise CheckpointError(
            f"{folder}: the processor makes images of {size}, the model takes {image_size} pixels"
        )


# Spec -> config.json


def check_expressible(contract: Spec, where: str) -> None:
    """
    Raises:
      CheckpointError: `where`, the other project, has no such model.
    """
    own: list[str] = []
    if contract.img:
        if contract.img["variant"] == "precomputed":
            own.append("an image tower of precomputed embeddings")
        if contract.img.get("pool", "map") != "map":
            own.append(f"an image tower with pool {contract.img['pool']!r}, not 'map'")
        if contract.img.get("out_dim"):
            own.append("an image tower with a head")
    if contract.txt:
        if contract.txt.get("pool", "last") != "last":
            own.append(f"a text tower with pool {contract.txt['pool']!r}, not 'last'")
        if contract.txt.get("bottleneck"):
            own.append("a vocabulary with a bottleneck")
    if own:
        raise CheckpointError(
            f"{where} has no model with {' and '.join(own)}; write it as big_vision"
        )


def config_of(contract: Spec, dtype: str) -> dict[str, Any]:
    """The content of config.json.

    Args:
      dtype: of the arrays, by which transformers loads them.
    """
    naflex = bool(contract.img and contract.img.get("naflex_grid"))
    kind, name = ("siglip2", "Siglip2") if naflex else ("siglip", "Siglip")
    vision = text = None
    common = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "attention_dropout": 0.0}
    if contract.img:
        tower = make_vit(**contract.img)
        vision = {**_sizes(tower), **common, "num_channels": 3, "patch_size": tower.patch_size}
        vision |= {"vision_use_head": True, "model_type": f"{kind}_vision_model"}
        if naflex:
            vision["num_patches"] = contract.img["naflex_grid"] ** 2
        else:
            vision["image_size"] = contract.res
    if contract.txt:
        tower = make_text(**contract.txt)
        text = {**_sizes(tower), **common, "vocab_size": tower.vocab_size}
        text |= {
            "max_position_embeddings": contract.token_len,
            "projection_size": tower.out_dim or tower.width,
            "pad_token_id": contract.pad_id,
            "eos_token_id": contract.eos_id,
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


def processor_of(contract: Spec) -> tuple[dict[str, Any], bool]:
    """The content of preprocessor_config.json, and whether it gives the contract's images to the
    pixel."""
    assert contract.img is not None
    common = {
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "do_convert_rgb": True,
    }
    if contract.img.get("naflex_grid"):
        tower = make_vit(**contract.img)
        max_patches = _max_patches(contract)
        settings = {"image_processor_type": "Siglip2ImageProcessor", **common, "resample": 2}
        settings |= {"patch_size": tower.patch_size, "max_num_patches": max_patches or 256}
        return settings, max_patches is not None
    filters = {program: k for k, program in PROGRAMS.items()}
    filters |= {f"decode | resize('{method}')": k for k, method in RESAMPLE.items()}
    exact = contract.image in filters
    settings = {"image_processor_type": "SiglipImageProcessor", **common}
    settings |= {"resample": filters.get(contract.image, 2)}
    return {**settings, "size": {"height": contract.res, "width": contract.res}}, exact


def _max_patches(contract: Spec) -> int | None:
    """The bound on patches of a NaFlex program; None where transformers has no such program."""
    if contract.image == "hf-naflex":
        return 256
    head, _, rest = contract.image.partition("decode | naflex(")
    parts = [part.strip() for part in rest.removesuffix(")").split(",")]
    exact = not head and len(parts) == 3 and parts[2] == "'bilinear-pil'"
    return int(parts[0]) if exact and parts[0].isdigit() else None
