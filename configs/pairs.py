"""Your own image-text pairs: from scratch, or fine-tuning with config.init.

  python main.py --config configs/pairs.py:path=pairs.jsonl,images=photos.zip --workdir runs/mine

`path`: a .jsonl, .csv or .tsv file with the columns image and caption, and optionally split
(train, val; without it all are train). `images`: the folder or .zip that image names are relative
to (default: the folder of `path`). With val=True retrieval is measured on the split `val`.
The defaults suit some 1,000 to 100,000 pairs and one GPU; on a CPU pass variant=Ti,res=64.
"""

from ml_collections import ConfigDict


def get_config(
    path: str = "",
    images: str = "",
    val: bool = False,
    variant: str = "S",
    patch_size: int = 16,
    res: int = 224,
    batch_size: int = 256,
    total: str = "30 epochs",
) -> ConfigDict:
    config = ConfigDict()
    config.total = total
    config.model = ConfigDict(
        {"img": {"variant": f"{variant}/{patch_size}"}, "txt": {"variant": variant}}
    )
    source = {"name": "files", "images": images}
    if path:  # otherwise --config.input.source.path=... gives it
        source["path"] = path
    config.input = ConfigDict(
        {
            "batch_size": batch_size,
            "res": res,
            "token_len": 64,
            "source": {**source, "split": "train"},
            "tokenizer": {"name": "bytes"},
        }
    )
    config.lr = 1e-3
    config.schedule = ConfigDict({"name": "cosine", "warmup": "10 percent"})
    config.log_every = 20
    config.checkpoint = ConfigDict({"every": "500 steps"})
    if val:
        config.evals = ConfigDict(
            {
                "retrieval": {
                    "type": "retrieval",
                    "every": "10 percent",
                    "source": {**source, "split": "val"},
                }
            }
        )
    return config
