"""Trains SigLIP So400m/14 from scratch at 224 px: configs/siglip_b16.py with larger towers.

  python main.py --config configs/siglip_so400m.py:dataset=my_pairs,data_dir=/data/tfds,\
tokenizer=/data/c4_en.model --workdir runs/siglip_so400m

`slice`, `dataset` and the other arguments are those of configs/siglip_b16.py.
Not run at full size here; docs/fit.md has what a step needs of the machines in SLICES.
"""

from ml_collections import ConfigDict

from configs import _slice, siglip_b16

SLICES: dict[str, dict] = {
    "v5e:16x16": {"model.remat": "full", "model.scan": True, "mesh.fsdp": 16},
    "v4:4x4x4": {
        "model.remat": "full",
        "model.scan": True,
        "model.img.group": 16,
        "mesh.fsdp": 4,
    },
}


def get_config(
    dataset: str = "",
    data_dir: str = "",
    text: str = "caption",
    tokenizer: str = "",
    batch_size: int = 32_768,
    res: int = 224,
    slice: str = "",
    runlocal: bool = False,
) -> ConfigDict:
    config = siglip_b16.get_config(dataset, data_dir, text, tokenizer, batch_size, res)
    config.model.img.variant, config.model.txt.variant = "So400m/14", "So400m"
    _slice.apply(config, slice, SLICES)
    if runlocal:
        siglip_b16.shrink(config)
    return config
