"""Trains on your own image-text pairs, from scratch or from the weights of config.init.

  python main.py --config configs/pairs.py:path=pairs.jsonl,images=photos.zip --workdir runs/mine
  python main.py --config "configs/pairs.py:path='cc/{0000..0331}.tar',val_path='cc/0332.tar'" ...

`path`: a .jsonl, .csv or .tsv file with the columns image and caption, and optionally split
(train, val; without it all are train). `images`: the folder or .zip that image names are relative
to (default: the folder of `path`). With val=True retrieval is measured on the split `val`.
Or a pattern of WebDataset (.tar), .parquet or .array_record files, local or behind gs://, s3://,
https://; retrieval is then measured on the files of `val_path`. docs/input.md has their settings.
The defaults suit some 1,000 to 100,000 pairs and one GPU; on a CPU pass variant=Ti,res=64.
"""

from ml_collections import ConfigDict

from configs import _source


def get_config(
    path: str = "",
    images: str = "",
    val: bool = False,
    val_path: str = "",
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
    # Without `path`, --config.input.source.path=... must give one.
    settings = {"images": images}
    config.input = ConfigDict(
        {
            "batch_size": batch_size,
            "res": res,
            "token_len": 64,
            "source": _source.of(path, "train", **settings),
            "tokenizer": {"name": "bytes"},
        }
    )
    config.lr = 1e-3
    config.schedule = ConfigDict({"name": "cosine", "warmup": "10 percent"})
    config.log_every = 20
    config.checkpoint = ConfigDict({"every": "500 steps"})
    if val or val_path:
        config.evals = ConfigDict(
            {
                "retrieval": {
                    "type": "retrieval",
                    "every": "10 percent",
                    "source": _source.of(val_path or path, "" if val_path else "val", **settings),
                }
            }
        )
    return config
