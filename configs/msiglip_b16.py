"""Trains mSigLIP: SigLIP B/16 on pairs in a hundred languages (arXiv 2303.15343, 4.3).

  python main.py --config configs/msiglip_b16.py:dataset=my_pairs,data_dir=/data/tfds,\
tokenizer=/data/mc4.model --workdir runs/msiglip_b16

It differs from configs/siglip_b16.py in the data, the vocabulary of 250k pieces, whose table is a
bottleneck of width K = 96 with a projection (half a percent of ImageNet for 7.9 times fewer
parameters in the table), and the length of 30e9 examples. The paper reports 73.2 % ImageNet
zero-shot at batch 32k, and on XM3600 34.9 % text-to-image and 47.4 % image-to-text R@1.
Not run at full size here.
"""

from ml_collections import ConfigDict

from configs import siglip_b16


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
    config = siglip_b16.get_config(
        dataset, data_dir, text, tokenizer, batch_size, res, slice, runlocal
    )
    config.model.txt.bottleneck = 96
    if not runlocal:
        config.total = "30e9 examples"
    return config
