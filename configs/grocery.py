"""Trains on 2,640 photographs of groceries, with captions from their class names.

  python main.py --config configs/grocery.py:data_dir=FOLDER --workdir runs/grocery

FOLDER is what `python -m programs.prepare_table` wrote.
It evaluates zero-shot classification of 2,485 test photos into 81 fine and 43 coarse classes.
"""

from ml_collections import ConfigDict


def get_config(
    data_dir: str = "", batch_size: int = 128, res: int = 64, total: str = "25 epochs"
) -> ConfigDict:
    source = {"name": "files", "path": f"{data_dir}/pairs.jsonl"}
    test = {**source, "split": "test"}
    config = ConfigDict()
    if not data_dir:
        config.missing = (
            "pass the folder of the grocery table, see `python -m programs.prepare_table --help`: "
            "--config configs/grocery.py:data_dir=..."
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
            "image": "decode | random_resized_crop(area=(0.4, 1.0)) | flip",
            "num_threads": 2,
        }
    )
    config.lr = 1e-3
    config.wd = 1e-4
    config.schedule = ConfigDict({"name": "cosine", "warmup": "10 percent"})
    config.log_every = 50
    config.checkpoint = ConfigDict({"every": "200 steps"})
    zeroshot = {"type": "zeroshot", "batch_size": 256, "templates": ("a photo of {}", "{}")}
    config.evals = ConfigDict(
        {
            "fine": {**zeroshot, "source": {**test, "label_column": "class"}},
            "coarse": {**zeroshot, "source": {**test, "label_column": "coarse_class"}},
        }
    )
    return config
