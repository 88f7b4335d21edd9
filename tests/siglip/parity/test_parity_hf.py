"""Models written for transformers say there what they say here, and the other way round.

float32, matmuls at their highest precision, every array random: what is left is rounding.
"""

import numpy as np
import pytest
from random_weights import T_PRIME, B, difference, embed, random_inputs, random_weights, tower

from siglip import checkpoints
from siglip.checkpoints import Spec
from siglip.towers.vit import Patches

TOLERANCE = {"image_embeds": 1e-6, "text_embeds": 1e-6, "logits_per_image": 1e-5}
SQUARE = {
    # The head size of B and L, and an MLP of 4 widths.
    "head-64": Spec(
        tower("mu/16", 128, 3, 512, 2),
        tower("mu", 128, 2, 512, 2, vocab_size=120, out_dim=128),
        res=80,
        token_len=64,
    ),
    # So400m's head size, patches, texts and a width of its MLP that is no multiple.
    "head-72": Spec(
        tower("mu/14", 144, 2, 538, 2),
        tower("mu", 144, 3, 538, 2, vocab_size=120, out_dim=144),
        res=70,
        token_len=16,
    ),
    # g-opt's head size, beside a narrower text tower.
    "head-96": Spec(
        tower("mu/16", 192, 2, 768, 2),
        tower("mu", 144, 2, 538, 2, vocab_size=120, out_dim=192),
        res=64,
        token_len=64,
        pad_id=0,
    ),
}
NAFLEX = Spec(
    tower("mu/16", 128, 3, 512, 2, naflex_grid=16),
    tower("mu", 128, 2, 512, 2, vocab_size=120, out_dim=128),
    token_len=64,
    image="hf-naflex",
    pad_id=0,
)
GRIDS = [(16, 16), (9, 28), (22, 11), (5, 7)]  # of patches: rows, columns


def square_inputs(spec: Spec):
    """Images and texts for us, and the same as transformers takes them."""
    image, text = random_inputs(spec)
    theirs = {"pixel_values": image.transpose(0, 3, 1, 2), "input_ids": text}
    return image, text.astype(np.int32), theirs


def naflex_inputs(spec: Spec, length: int = 256):
    """Images of GRIDS. What stands in padding is noise too: nobody may look at it."""
    rng = np.random.default_rng(2)
    values = rng.uniform(-1, 1, (len(GRIDS), length, 16 * 16 * 3)).astype(np.float32)
    shape = np.asarray(GRIDS, np.int32)
    mask = np.arange(length) < shape.prod(axis=1)[:, None]
    text = rng.integers(0, spec.txt["vocab_size"], (5, spec.token_len))
    theirs = {
        "pixel_values": values,
        "pixel_attention_mask": mask.astype(np.int64),
        "spatial_shapes": shape.astype(np.int64),
        "input_ids": text,
    }
    return Patches(values, mask, shape), text.astype(np.int32), theirs


def inputs_of(spec: Spec):
    return naflex_inputs(spec) if spec.img.get("naflex_grid") else square_inputs(spec)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """name -> (folder of transformers, inputs.npz, what we say); each made once."""
    made = {}

    def make(name: str):
        if name not in made:
            spec = {**SQUARE, "naflex": NAFLEX}[name]
            folder = tmp_path_factory.mktemp(name)
            weights = random_weights(spec)
            checkpoints.write(weights, folder / "hf", "huggingface")
            image, text, theirs = inputs_of(spec)
            np.savez(folder / "inputs.npz", **theirs)
            made[name] = folder, theirs, embed(weights, image, text)
        return made[name]

    return make


@pytest.mark.parametrize(
    "name, model, attention",
    [
        ("head-64", "AutoModel", "eager"),
        ("head-64", "SiglipModel", "sdpa"),
        ("head-72", "AutoModel", "sdpa"),
        ("head-72", "SiglipModel", "eager"),
        ("head-96", "AutoModel", "sdpa"),
        ("naflex", "AutoModel", "sdpa"),
        ("naflex", "Siglip2Model", "eager"),
    ],
)
def test_our_folder_in_transformers_says_what_we_say(peer, case, tmp_path, name, model, attention):
    folder, _, ours = case(name)
    answer = peer(
        "transformers_embed",
        folder=folder / "hf",
        inputs=folder / "inputs.npz",
        out=tmp_path / "out.npz",
        model=model,
        attention=attention,
    )
    assert answer.pop("is") == ["Siglip2Model" if name == "naflex" else "SiglipModel"]
    assert not any(answer.values()), answer  # each array has its place, and each place an array
    theirs = np.load(tmp_path / "out.npz")
    for what, tolerance in TOLERANCE.items():
        assert difference(ours[what], theirs[what]) < tolerance, what


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "name, model", [("head-72", "SiglipVisionModel"), ("naflex", "Siglip2VisionModel")]
)
def test_the_image_tower_of_our_folder_alone(peer, case, tmp_path, name, model, attention):
    folder, inputs, ours = case(name)
    image = {k: v for k, v in inputs.items() if k != "input_ids"}
    np.savez(tmp_path / "inputs.npz", **image)
    answer = peer(
        "transformers_embed",
        folder=folder / "hf",
        inputs=tmp_path / "inputs.npz",
        out=tmp_path / "out.npz",
        model=model,
        attention=attention,
    )
    assert answer["is"] == [model]
    assert not answer["missing"] and not answer["mismatched"], answer
    theirs = np.load(tmp_path / "out.npz")
    pooled, tokens = theirs["pooler_output"], theirs["last_hidden_state"]
    unit = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    assert difference(ours["image_embeds"], unit) < 1e-6
    assert difference(ours["pooler_output"], pooled) < 1e-6
    mask = inputs.get("pixel_attention_mask", np.ones(tokens.shape[:2])).astype(bool)
    assert difference(ours["last_hidden_state"][mask], tokens[mask]) < 1e-6


def config_of(spec: Spec) -> dict:
    """The configuration that a user of transformers would write for such a model."""
    keys = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
    sizes = ("width", "depth", "mlp_dim", "num_heads")
    vision, text = ({k: block[s] for k, s in zip(keys, sizes)} for block in (spec.img, spec.txt))
    vision["patch_size"] = int(spec.img["variant"].partition("/")[2])
    if spec.res:
        vision["image_size"] = spec.res
    text |= {
        "vocab_size": spec.txt["vocab_size"],
        "max_position_embeddings": spec.token_len,
        "projection_size": spec.txt["out_dim"],
        "bos_token_id": 2,  # by default the ids of CLIP, which such a vocabulary has not
        "eos_token_id": 1,
    }
    return {"vision_config": vision, "text_config": text}


@pytest.mark.parametrize(
    "name, model",
    [("head-64", "SiglipModel"), ("head-96", "SiglipModel"), ("naflex", "Siglip2Model")],
)
def test_a_folder_that_transformers_saved_says_here_what_it_says_there(peer, tmp_path, name, model):
    spec = {**SQUARE, "naflex": NAFLEX}[name]
    image, text, theirs = inputs_of(spec)
    folder, inputs, out = (tmp_path / x for x in ("hf", "inputs.npz", "out.npz"))
    np.savez(inputs, **theirs)
    peer("transformers_random", folder=folder, model=model, config=config_of(spec))
    peer(
        "transformers_embed", folder=folder, inputs=inputs, out=out, model=model, attention="eager"
    )
    weights = checkpoints.read(folder)
    assert weights.format == "huggingface"
    assert weights.spec.make_model() == spec.make_model()
    for name, value in (("t", T_PRIME), ("b", B)):
        np.testing.assert_array_equal(weights.arrays[name].read(), np.float32([value]))
    ours, theirs = embed(weights, image, text), np.load(out)
    for what, tolerance in TOLERANCE.items():
        assert difference(ours[what], theirs[what]) < tolerance, what
