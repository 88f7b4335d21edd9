"""Trains SigLiT from precomputed image embeddings (arXiv 2303.15343, 4.1 and 4.4).

  python -m programs.embed --model siglip-b16-224 --source files path=pairs.jsonl --what image \
--out embedded
  python main.py --config configs/siglit.py:path=embedded,width=768,tokenizer=c4_en.model \
--workdir runs/siglit

A text tower learns against image embeddings from disk: no image is decoded, no image tower runs,
and a batch of 32k needs the memory of its texts alone. `width`: of the embeddings. `tokenizer`: a
file, or the folder of weights whose tokenizer and text preprocessing are taken; without it texts
are read as bytes. `val_path`: embeddings to measure retrieval on. Afterwards
`python -m siglip.checkpoints.convert runs/siglit DST --img TOWER` joins the text tower with that of
the images.
The paper reports 79.8 % (AugReg B/8) and 84.5 % (ViT-g/14) ImageNet zero-shot, with text towers of
L's width (12 and 24 layers), Lion, 16 tokens and 20k to 32k pairs a batch. Not run at full size
here.
"""

import os

from ml_collections import ConfigDict

from configs import _tokenizer


def get_config(
    path: str = "",
    width: int = 768,
    txt: str = "B",
    tokenizer: str = "",
    token_len: int = 16,
    val_path: str = "",
    batch_size: int = 32_768,
    total: str = "65000 steps",
) -> ConfigDict:
    config = ConfigDict()
    if not path:
        config.missing = "pass path=FOLDER, which python -m programs.embed has written"
    config.total = total
    config.model = ConfigDict(
        {
            "img": {"variant": "precomputed", "width": width},
            "txt": {"variant": txt, "out_dim": width},
            "dtype": "bfloat16",
        }
    )
    config.input = ConfigDict(
        {
            "batch_size": batch_size,
            "token_len": token_len if tokenizer else max(token_len, 64),
            "image": "embedding",
            "source": {"name": "embeddings", "path": path},
        }
    )
    if os.path.isdir(tokenizer):
        config.contract = tokenizer
    elif tokenizer:
        config.input.tokenizer = ConfigDict(_tokenizer.of(tokenizer))
    config.optimizer = ConfigDict({"name": "lion"})
    config.lr = 1e-4
    config.wd = 1e-7
    config.schedule = ConfigDict({"name": "cosine", "warmup": "10 percent"})
    config.log_every = 50
    config.checkpoint = ConfigDict({"every": "1000 steps"})
    if val_path:
        source = {"name": "embeddings", "path": val_path}
        config.evals = ConfigDict({"retrieval": {"type": "retrieval", "source": source}})
    return config
