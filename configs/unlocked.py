"""A pretrained image tower that keeps learning, and a text tower from scratch: section 4.5 of
arXiv 2303.15343.

  python main.py --config configs/unlocked.py:model=siglip-b16-224,init=weights/siglip-b16-224,\
path='pairs/{00000..01242}.tar' --workdir runs/unlocked

Only the image tower is taken from `init`. It learns at 0.1 x the learning rate and has no weight
decay: with decay, the paper's figure 4 shows it falling back to barely above from scratch. The
paper fine-tunes AugReg's ViT-B/16 on 2.4e9 examples in batches of 16k and 16 tokens: 71.0 %
ImageNet zero-shot. Other arguments: configs/finetune.py. Not run at full size here.
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
    total: str = "2.4e9 examples",
    token_len: int = 16,
    res: int = 0,
    small: bool = False,
) -> ConfigDict:
    config = _released.fine_tuning(
        model, init, path, images, val, val_path, tokenizer, batch_size, total, res, small
    )
    config.init_only = ("img",)
    config.input.token_len = token_len
    config.lr = 1e-3
    config.wd = 1e-4
    config.lr_mults = (("img/.*", 0.1), ("else", 1.0))
    config.wd_mults = (("(?!img/).*/kernel", 1.0), ("else", 0.0))
    return config
