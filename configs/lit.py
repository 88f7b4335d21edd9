"""Locked-image tuning (LiT, arXiv 2111.07991) with the sigmoid loss: SigLiT of arXiv 2303.15343.

  python main.py --config configs/lit.py:model=siglip-b16-224,init=weights/siglip-b16-224,\
path='pairs/{00000..01242}.tar' --workdir runs/lit

Only the image tower is taken from `init`, and it stays as it is; the text tower learns from
scratch. The backward pass of the image tower and its side of the loss are never computed. Where
the same images come many times, embed them once: configs/siglit.py. Batch, length and warm-up are
of the paper's study with precomputed ViT-g embeddings (table 8: 82.7 % ImageNet zero-shot). Other
arguments: configs/finetune.py. Not run at full size here.
"""

from ml_collections import ConfigDict

from configs import _released


def get_config(
    model: str = "siglip-b16-224",
    init: str = "",
    path: str = "",
    images: str = "",
    val: bool = False,
    val_path: str = "",
    tokenizer: str = "",
    batch_size: int = 16_384,
    total: str = "900e6 examples",
    token_len: int = 16,
    res: int = 0,
    small: bool = False,
) -> ConfigDict:
    config = _released.fine_tuning(
        model, init, path, images, val, val_path, tokenizer, batch_size, total, res, small
    )
    config.init_only = ("img",)
    config.frozen = (("img/.*", True), ("else", False))
    config.input.token_len = token_len
    config.schedule.warmup = "22 percent"  # 200e6 of 900e6 examples
    config.lr = 1e-3
    config.wd = 1e-4
    return config
