"""Trains on emoji and their names in up to 36 languages: a small real set of 1,461 pictures.

  python main.py --config configs/emoji.py:data_dir=FOLDER --workdir runs/emoji
  python main.py --config "configs/emoji.py:data_dir=FOLDER,languages='en,de,fr'" --workdir runs/e3

FOLDER is what `python -m programs.prepare_table` wrote; languages=all takes every language of it.
It evaluates retrieval among 175 held-out pictures, and classification into their 8 groups.
"""

from ml_collections import ConfigDict


def get_config(
    data_dir: str = "",
    languages: str = "en",
    batch_size: int = 128,
    res: int = 64,
    total: str = "40 epochs",
) -> ConfigDict:
    source = {
        "name": "files",
        "path": f"{data_dir}/pairs.jsonl",
        "language_column": "languages",
        "languages": () if languages == "all" else tuple(languages.split(",")),
        "label_column": "class",
    }
    config = ConfigDict()
    if not data_dir:
        config.missing = (
            "pass the folder of the emoji table, see `python -m programs.prepare_table --help`: "
            "--config configs/emoji.py:data_dir=..."
        )
    config.total = total
    sizes = {"width": 128, "mlp_dim": 512, "num_heads": 4}
    config.model = ConfigDict(
        {
            "img": {"variant": "S/8", "depth": 3, **sizes},
            "txt": {"variant": "S", "depth": 2, **sizes},
        }
    )
    config.input = ConfigDict(
        {
            "batch_size": batch_size,
            "res": res,
            "token_len": 64,
            "source": {**source, "split": "train"},
            "image": "decode | random_resized_crop(area=(0.6, 1.0))",
            # No flip: "backhand index pointing left".
            "num_threads": 2,
        }
    )
    config.lr = 1e-3
    config.wd = 1e-4
    config.schedule = ConfigDict({"name": "cosine", "warmup": "10 percent"})
    config.log_every = 50
    config.checkpoint = ConfigDict({"every": "200 steps"})
    held_out = {**source, "split": "val"}
    config.evals = ConfigDict(
        {
            "retrieval": {"type": "retrieval", "batch_size": 64, "source": held_out},
            "groups": {
                "type": "zeroshot",
                "batch_size": 64,
                "templates": ("{}",),
                "source": held_out,
            },
        }
    )
    return config
