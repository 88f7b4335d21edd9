"""Trains with CLIP's softmax loss in SigLIP's setting, the baseline of arXiv 2303.15343.

  python main.py --config configs/clip_b16.py:dataset=my_pairs,data_dir=/data/tfds,\
tokenizer=/data/c4_en.model --workdir runs/clip_b16

It differs from configs/siglip_b16.py in the loss alone, and the softmax has no bias. The paper
reports 72.9 % ImageNet zero-shot after 9e9 examples (73.4 % with the sigmoid).
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
    config.objectives.contrastive.name = "softmax"
    config.model.b_init = None
    return config
