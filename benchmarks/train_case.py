"""A case of the benchmark of training, with towers, batch and precision, and its FLOPs.

The standard library alone (siglip.chips has no more), because workers of other environments read it
too.
"""

import dataclasses
from typing import Any

from siglip.chips import find_kind

SMALL = {"width": 384, "depth": 6, "mlp_dim": 1536, "num_heads": 6}

# Name -> (arguments of make_model, resolution, default batch). Texts have 64 tokens of 32,000.
# `small` is S/16 with half its layers, in both towers: a step takes about a second on two cores.
MODELS: dict[str, tuple[dict[str, Any], int, int]] = {
    "small": ({"img": {"variant": "S/16", **SMALL}, "txt": {"variant": "S", **SMALL}}, 224, 32),
    "B/16": ({"img": {"variant": "B/16"}, "txt": {"variant": "B"}}, 224, 8),
    "L/16": ({"img": {"variant": "L/16"}, "txt": {"variant": "L"}}, 256, 8),
}
TOKEN_LEN, VOCAB_SIZE = 64, 32_000


@dataclasses.dataclass(frozen=True)
class TrainCase:
    """One training step; it travels to the workers as JSON.

    Attributes:
      name: of the model, for tables.
      model: arguments of siglip.towers.two_towers.make_model.
      img, txt: the sizes that follow from it: width, depth, mlp_dim, num_heads, pool, out_dim, and
        patch_size and drop_patches, or vocab_size and bottleneck.
      batch: pairs of a step, over all devices.
      precision: of matmuls, "float32" or "bfloat16". Parameters are float32 in any case.
    """

    name: str
    model: dict[str, Any]
    img: dict[str, Any]
    txt: dict[str, Any]
    batch: int
    res: int
    token_len: int
    precision: str

    def __str__(self) -> str:
        return f"{self.name}, batch {self.batch}, {self.precision}"

    @property
    def title(self) -> str:
        return f"{self}, {self.res} px, {self.token_len} tokens"


def forward_flops(case: TrainCase) -> tuple[int, int]:
    """FLOPs of one image and of one text through their towers, 2 per multiply-add of a matmul.

    Element-wise work, the token table and the loss are not counted, as in open_clip's profiles.
    """
    img, txt = case.img, case.txt
    patches = (case.res // img["patch_size"]) ** 2
    image = 2 * patches * 3 * img["patch_size"] ** 2 * img["width"]
    tokens = max(1, round(patches * (1 - img["drop_patches"]))) + (img["pool"] == "tok")
    image += _encoder(img, tokens) + _head(img, tokens)
    text = _encoder(txt, case.token_len) + _head(txt, case.token_len)
    if txt["bottleneck"]:
        text += 2 * case.token_len * txt["bottleneck"] * txt["width"]
    return image, text


def step_flops(case: TrainCase) -> int:
    """FLOPs of a training step: the backward pass costs two forward ones; nothing is recomputed."""
    return 3 * case.batch * sum(forward_flops(case))


def _encoder(tower: dict[str, Any], tokens: int) -> int:
    width, mlp_dim = tower["width"], tower["mlp_dim"]
    projections = 2 * tokens * (4 * width * width + 2 * width * mlp_dim)
    attention = 2 * 2 * tokens * tokens * width
    return tower["depth"] * (projections + attention)


def _head(tower: dict[str, Any], tokens: int) -> int:
    """Attention pooling by one query, and the Dense head."""
    width, flops = tower["width"], 0
    if tower["pool"] == "map":
        flops += 2 * width * width * (2 + 2 * tokens) + 2 * 2 * tokens * width
        flops += 2 * 2 * width * tower["mlp_dim"]
    if tower["out_dim"]:
        flops += 2 * width * tower["out_dim"]
    return flops


def peak_flops(device_kind: str) -> float | None:
    """The chip's peak in FLOP/s; None if it is not known, as for every CPU."""
    chip = find_kind(device_kind)
    return chip and chip.flops
