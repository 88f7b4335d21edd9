"""Released weights, both towers, on your own pairs.

  python main.py --config configs/finetune.py:model=siglip2-b16-256,init=weights/siglip2-b16-256,\
path=pairs.jsonl,images=photos.zip,val=True --workdir runs/mine

`init`: whatever siglip.load reads: a folder of Hugging Face or open_clip, an .npz, a workdir; pass
tokenizer=FILE where none came with it. `path`, `images`, `val`, `val_path`: see configs/pairs.py.
`res`: another image size, to which positions are resized.
`small` is for towers of random:NAME:small, to try it out.
A hundredth of the learning rate from scratch and no weight decay, as in the paper's continuation
at higher resolutions (4.6): nothing of this was tuned here.
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
    res: int = 0,
    small: bool = False,
) -> ConfigDict:
    config = _released.fine_tuning(
        model, init, path, images, val, val_path, tokenizer, batch_size, total, res, small
    )
    config.lr = 1e-5
    config.wd = 0.0
    return config
