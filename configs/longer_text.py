"""Released weights for longer texts: text positions extended, then fine-tuned.

  python main.py --config configs/longer_text.py:model=siglip2-b16-256,\
init=weights/siglip2-b16-256,token_len=256,path=pairs.jsonl --workdir runs/longer

`positions` says how the 64 positions become token_len: 'keep' leaves all but the last where they
are, moves the last one, at which the model reads its embedding, to the new end, and fills up
between; 'linear' stretches them. The image tower stays as it is, so that images need not be
embedded again. Other arguments: configs/finetune.py. Nothing of this was tuned here.
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
    batch_size: int = 1024,
    total: str = "5 epochs",
    token_len: int = 256,
    positions: str = "keep",
    res: int = 0,
    small: bool = False,
) -> ConfigDict:
    config = _released.fine_tuning(
        model, init, path, images, val, val_path, tokenizer, batch_size, total, res, small
    )
    config.init_text_positions = positions
    config.input.token_len = token_len
    config.frozen = (("img/.*", True), ("else", False))
    config.lr = 1e-5
    config.wd = 0.0
    return config
