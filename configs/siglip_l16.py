"""Trains SigLIP L/16 from scratch at 256 px: configs/siglip_b16.py with larger towers.

  python main.py --config configs/siglip_l16.py:dataset=my_pairs,data_dir=/data/tfds,\
tokenizer=/data/c4_en.model --workdir runs/siglip_l16

`slice`, `dataset` and the other arguments are those of configs/siglip_b16.py.
Not run at full size here; docs/fit.md has what a step needs of the machines in SLICES.
"""

from ml_collections import ConfigDict

from configs import _slice, siglip_b16

SLICES: dict[str, dict] = {
    "v6e:16x16": {"model.remat": "mlp", "model.scan": True},
    "h200:1x1x1": {"model.remat": "mlp", "input.microbatch": 1024},
    "h200:1x1x8": {"model.remat": "mlp", "input.microbatch": 8192},
}


def get_config(
    dataset: str = "",
    data_dir: str = "",
    text: str = "caption",
    tokenizer: str = "",
    batch_size: int = 32_768,
    res: int = 256,
    slice: str = "",
    runlocal: bool = False,
) -> ConfigDict:
    config = siglip_b16.get_config(dataset, data_dir, text, tokenizer, batch_size, res)
    config.model.img.variant, config.model.txt.variant = "L/16", "L"
    _slice.apply(config, slice, SLICES)
    if runlocal:
        siglip_b16.shrink(config)
    return config
