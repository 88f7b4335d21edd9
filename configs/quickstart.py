"""Trains a small model in a minute, on drawn scenes, with the loss over 4 emulated CPU devices.

make quickstart
python main.py --config configs/quickstart.py --workdir runs/quickstart
"""

from ml_collections import ConfigDict

# A prompt is a whole caption, so the embeddings of prompts with many second shapes are averaged.
TEMPLATES = tuple(
    f"a {{}} {relation} a small {second} on {ground}"
    for relation, second, ground in [
        ("above", "red disc", "black"),
        ("below", "blue star", "white"),
        ("left of", "lime ring", "navy"),
        ("right of", "gold plus", "tan"),
        ("above", "pink moon", "white"),
        ("below", "cyan box", "black"),
        ("left of", "plum disc", "tan"),
        ("right of", "gray star", "navy"),
    ]
)


def get_config(batch_size: int = 64, res: int = 32, total: str = "500 steps") -> ConfigDict:
    config = ConfigDict()
    config.total = total
    config.mesh = ConfigDict({"cpu_devices": 4})
    sizes = {"width": 64, "depth": 2, "mlp_dim": 256, "num_heads": 4}
    config.model = ConfigDict(
        {
            "img": {"variant": "S/4", **sizes},
            "txt": {"variant": "S", **sizes},
        }
    )
    config.input = ConfigDict(
        {
            "batch_size": batch_size,
            "res": res,
            "token_len": 48,
            "source": {"name": "scenes", "split": "train", "res": res},
            "num_threads": 2,
        }
    )
    config.lr = 2e-3
    config.schedule = ConfigDict({"name": "cosine", "warmup": "10 percent"})
    config.log_every = 50
    config.checkpoint = ConfigDict({"every": "200 steps"})
    held_out = {"name": "scenes", "split": "val", "res": res}
    config.evals = ConfigDict(
        {
            "zeroshot": {
                "type": "zeroshot",
                "batch_size": 128,
                "templates": TEMPLATES,
                "source": held_out,
            },
            "retrieval": {"type": "retrieval", "batch_size": 128, "source": held_out},
            "val": {"type": "loss", "batch_size": 128, "source": held_out},
        }
    )
    return config
