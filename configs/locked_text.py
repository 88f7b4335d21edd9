"""A locked text tower, and an image tower that learns to fit it, from scratch.

  python main.py --config configs/locked_text.py:model=siglip2-b16-256,\
init=weights/siglip2-b16-256,path='pairs/{00000..01242}.tar' --workdir runs/locked_text

For images of another kind (drawings, X-rays, satellites) in the space of a released model's texts,
whose temperature and bias it starts with. With init_only=img,txt,t,b the image tower starts from
the released one too: --config.init_only="('img','txt','t','b')". Other arguments:
configs/finetune.py. Not run at full size here.
"""

from ml_collections import ConfigDict

from configs import _released


def get_config(
    model: str = "siglip2-b16-256",
    init: str = "",
    path: str = "",
    images: str = "",
    val: bool = False,
    val_path: str = "",
    tokenizer: str = "",
    batch_size: int = 16_384,
    total: str = "900e6 examples",
    res: int = 0,
    small: bool = False,
) -> ConfigDict:
    config = _released.fine_tuning(
        model, init, path, images, val, val_path, tokenizer, batch_size, total, res, small
    )
    config.init_only = ("txt", "t", "b")
    config.frozen = (("txt/.*", True), ("else", False))
    config.lr = 1e-3
    config.wd = 1e-4
    return config
