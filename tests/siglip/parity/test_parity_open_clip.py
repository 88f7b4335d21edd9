"""Models written for open_clip say there what they say here, but for the form of their GELUs.

SigLIP has the tanh approximation. The image towers of timm that open_clip takes for B/16 have the
exact form, with erf, and so have the text towers of its SigLIP (not SigLIP 2) configurations.
"""

import numpy as np
import pytest
from random_weights import difference, embed, random_inputs, random_weights, tower

from siglip import checkpoints
from siglip.checkpoints import Spec

TOLERANCE = {"image_embeds": 1e-6, "text_embeds": 1e-6, "logits_per_image": 1e-5}
SPECS = {
    # A tower that timm has, so that the folder is read as it is: the largest one here.
    "B/16": Spec(
        {"variant": "B/16"},
        tower("mu", 128, 2, 512, 2, vocab_size=120, out_dim=768),
        res=224,
        token_len=64,
    ),
    "head-72": Spec(
        tower("mu/14", 144, 3, 538, 2),
        tower("mu", 144, 3, 538, 2, vocab_size=120, out_dim=144),
        res=70,
        token_len=16,
    ),
}
TIMM = {
    "B/16": None,
    "head-72": dict(
        img_size=70, patch_size=14, embed_dim=144, depth=3, num_heads=2, mlp_ratio=538.5 / 144
    ),
}


GELUS = ("as configured", "tanh", "none")


@pytest.fixture(scope="module", params=SPECS)
def case(request, peer, tmp_path_factory):
    """(image tower, what we say, form of GELU -> what open_clip says, how many are not tanh)."""
    spec, folder = SPECS[request.param], tmp_path_factory.mktemp("open_clip")
    weights = random_weights(spec)
    checkpoints.write(weights, folder / "model", "open_clip")
    image, text = random_inputs(spec, n=2)
    np.savez(folder / "inputs.npz", image=image.transpose(0, 3, 1, 2), text=text)
    not_tanh = peer(
        "open_clip_embed",
        folder=folder / "model",
        inputs=folder / "inputs.npz",
        out=folder / "out.npz",
        gelus=GELUS,
        timm_model=TIMM[request.param],
    )
    (folder / "model" / "open_clip_model.safetensors").unlink()  # of B/16, 370 MB
    ours = embed(weights, image, text.astype(np.int32))
    ours = {what: ours[what] for what in TOLERANCE}  # open_clip has no other outputs
    out = np.load(folder / "out.npz")
    theirs = {gelu: {what: out[f"{gelu} {what}"] for what in ours} for gelu in GELUS}
    return spec.make_model().img, ours, theirs, not_tanh


def test_our_folder_in_open_clip_says_what_we_say_with_tanh(case):
    _, ours, theirs, _ = case
    for what, tolerance in TOLERANCE.items():
        assert difference(ours[what], theirs["tanh"][what]) < tolerance, what


def test_as_configured_only_the_image_tower_differs_by_the_form_of_gelu(case):
    vit, ours, theirs, not_tanh = case
    assert not_tanh == vit.depth + 1  # its blocks and the pooling head
    found = {what: difference(ours[what], theirs["as configured"][what]) for what in ours}
    assert found["text_embeds"] < TOLERANCE["text_embeds"]  # our configuration asks for tanh there
    assert 2e-6 < found["image_embeds"] < 2e-3


def test_the_form_of_gelu_makes_a_small_difference_in_texts_too(case):
    _, ours, theirs, _ = case
    assert 2e-6 < difference(ours["text_embeds"], theirs["none"]["text_embeds"]) < 2e-3
