"""Fine-tunes released or own weights on your own pairs, by one of five recipes.

  python main.py --config configs/finetune.py:init=weights/siglip2-b16-256,path=pairs.jsonl \
--workdir runs/mine
  python main.py --config configs/finetune.py:recipe=lit,init=FOLDER,path='cc/{0000..0331}.tar' ...

`recipe`:
  full         both towers from `init`, both learn.
  unlocked     image tower from `init`, at 0.1 x the learning rate and without weight decay; text
               tower from scratch (arXiv 2303.15343, section 4.5: 71.0 % ImageNet zero-shot with
               AugReg's ViT-B/16; with decay, figure 4 shows it falling to barely above scratch).
  lit          image tower from `init`, locked; text tower from scratch: LiT (arXiv 2111.07991)
               with the sigmoid loss, SigLiT. Batch, length and warm-up are those of table 8 (82.7 %
               with precomputed ViT-g embeddings). Locked images can be embedded once:
               configs/siglit.py.
  locked_text  text tower, temperature and bias from `init`, text locked; image tower from scratch:
               for images of another kind in the space of a released model's texts. To start from
               its image tower too: --config.init_only="('img','txt','t','b')".
  longer_text  both from `init`, images locked, text positions extended to `token_len` (default
               256). `positions`: 'keep' moves only the last position, where the model reads its
               embedding, to the new end; 'linear' stretches all.

`init`: whatever siglip.load reads: a folder of Hugging Face or open_clip, an .npz, a workdir. The
model, tokenizer, resolution and preprocessing are those of the weights; pass tokenizer=FILE if none
came with them. `model`: a released model's name (siglip2-b16-256) where the weights do not say what
they are. `res`: another image size, to which positions are resized. `path`, `images`, `val`,
`val_path`: see configs/pairs.py.
full and longer_text have a hundredth of the learning rate from scratch and no weight decay, as the
paper's continuation at higher resolutions (4.6). None of this was tuned or run at full size here.
"""

from ml_collections import ConfigDict

from configs import _source, _tokenizer

# batch_size, total, token_len (0: the weights'), lr, wd
RECIPES = {
    "full": (1024, "5 epochs", 0, 1e-5, 0.0),
    "unlocked": (16_384, "2.4e9 examples", 16, 1e-3, 1e-4),
    "lit": (16_384, "900e6 examples", 16, 1e-3, 1e-4),
    "locked_text": (16_384, "900e6 examples", 0, 1e-3, 1e-4),
    "longer_text": (1024, "5 epochs", 256, 1e-5, 0.0),
}


def get_config(
    recipe: str = "full",
    init: str = "",
    path: str = "",
    images: str = "",
    val: bool = False,
    val_path: str = "",
    model: str = "",
    tokenizer: str = "",
    batch_size: int = 0,
    total: str = "",
    res: int = 0,
    token_len: int = 0,
    positions: str = "keep",
) -> ConfigDict:
    if recipe not in RECIPES:
        raise ValueError(f"recipe={recipe!r} is none of {', '.join(RECIPES)}")
    lacking = "pass init=WEIGHTS and path=PAIRS: --config configs/...:init=...,path=..."
    if not init:
        raise ValueError(lacking)
    recipe_batch_size, recipe_total, recipe_token_len, lr, wd = RECIPES[recipe]
    config = ConfigDict()
    if not path:
        config.missing = lacking
    config.total = total or recipe_total
    config.init = init
    config.contract = model or init
    config.model = ConfigDict({"dtype": "bfloat16"})
    config.input = ConfigDict(
        {
            "batch_size": batch_size or recipe_batch_size,
            "source": _source.of(path, "train", images=images),
        }
    )
    if token_len or recipe_token_len:
        config.input.token_len = token_len or recipe_token_len
    if tokenizer:
        config.input.tokenizer = ConfigDict(_tokenizer.of(tokenizer))
    if res:
        config.input.res = res
        config.init_positions = "bilinear-corners"  # as big_vision resizes them
    config.lr, config.wd = lr, wd
    config.optimizer = ConfigDict({"name": "adafactor", "b1": 0.9, "beta2_cap": 0.95})
    config.schedule = ConfigDict({"name": "cosine", "warmup": "10 percent"})
    config.log_every = 50
    config.checkpoint = ConfigDict({"every": "1000 steps"})
    if val or val_path:
        source = _source.of(val_path or path, "" if val_path else "val", images=images)
        config.evals = ConfigDict(
            {"retrieval": {"type": "retrieval", "every": "10 percent", "source": source}}
        )
    if recipe == "unlocked":
        config.init_only = ("img",)
        config.lr_mults = (("img/.*", 0.1), ("else", 1.0))
        config.wd_mults = (("(?!img/).*/kernel", 1.0), ("else", 0.0))
    elif recipe == "lit":
        config.init_only = ("img",)
        config.frozen = (("img/.*", True), ("else", False))
        config.schedule.warmup = "22 percent"  # 200e6 of 900e6 examples
    elif recipe == "locked_text":
        config.init_only = ("txt", "t", "b")
        config.frozen = (("txt/.*", True), ("else", False))
    elif recipe == "longer_text":
        config.init_text_positions = positions
        config.frozen = (("img/.*", True), ("else", False))
    return config
