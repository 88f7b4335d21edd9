"""Trains SigLIP B/16 from scratch at 224 px, the reference run of arXiv 2303.15343 (4.2).

  python main.py --config configs/siglip_b16.py:dataset=my_pairs,data_dir=/data/tfds,\
tokenizer=/data/c4_en.model --workdir runs/siglip_b16

`dataset` is a TFDS dataset prepared as ArrayRecord, with an image and a text feature, or a pattern
of .tar (WebDataset), .parquet or .array_record files ('gs://bucket/pairs/{00000..41407}.tar').
imagenet2012 and coco_captions, prepared by TFDS in data_dir, are what it is evaluated on.
The paper's data are private; it reports 73.4 % ImageNet zero-shot after 9e9 examples.
Not run at full size here. `:runlocal` shrinks model, batch and length to try the same files.

`slice` sets what a machine needs to hold the batch: one of SLICES, named as by
`python -m programs.compile_only`, which says whether a step fits and how long it may take:

  python -m programs.compile_only --config configs/siglip_b16.py:slice=v4:4x4x2
"""

from ml_collections import ConfigDict

from configs import _slice, _source

# Settings with which a batch of 32,768 fits, measured by compiling: docs/fit.md.
SLICES: dict[str, dict] = {
    "v4:4x4x2": {"model.remat": "full", "model.scan": True, "model.img.group": 32},
    "v5e:16x16": {},
    "v6e:8x8": {"model.remat": "mlp"},
    "h200:1x1x1": {"model.remat": "elementwise", "input.microbatch": 1024},
    "h200:1x1x8": {"model.remat": "elementwise", "input.microbatch": 8192},
}


def get_config(
    dataset: str = "",
    data_dir: str = "",
    text: str = "caption",
    tokenizer: str = "",
    batch_size: int = 32_768,
    res: int = 224,
    slice: str = "",
    runlocal: bool = False,
) -> ConfigDict:
    source = {"name": "tfds", "dataset": dataset, "data_dir": data_dir}
    source |= {"split": "train", "text": text}
    if _source.of(dataset, "")["name"] != "files":
        source = _source.of(dataset, "")
    config = ConfigDict()
    if not (dataset and data_dir and (tokenizer or runlocal)):
        config.missing = (
            "pass your data: --config configs/...:dataset=NAME,data_dir=FOLDER,tokenizer=FILE"
        )
    config.total = "9e9 examples"
    config.model = ConfigDict(
        {
            "img": {"variant": "B/16"},
            "txt": {"variant": "B"},
            "t_init": 10.0,  # the parameter starts at t' = log 10
            "b_init": -10.0,
            "dtype": "bfloat16",
        }
    )
    contrastive = {"name": "sigmoid", "dtype": "bfloat16"}
    config.objectives = ConfigDict({"contrastive": contrastive})
    config.input = ConfigDict(
        {
            "batch_size": batch_size,
            "res": res,
            "token_len": 16,
            "source": source,
            "tokenizer": {"name": "sentencepiece", "path": tokenizer},  # c4_en, 32k pieces
        }
    )

    config.lr = 1e-3
    config.wd = 1e-4  # not multiplied by lr: 0.1 in AdamW's terms
    config.clip_norm = 1.0
    config.optimizer = ConfigDict({"name": "adafactor", "b1": 0.9, "beta2_cap": 0.95})
    config.schedule = ConfigDict({"name": "cosine", "warmup": "200e6 examples"})

    config.log_every = 50
    config.checkpoint = ConfigDict({"every": "1000 steps", "keep_last": 2})
    config.evals = ConfigDict(
        {
            "imagenet": {
                "type": "zeroshot",
                "every": "10 percent",
                "batch_size": 4096,
                "classnames": "imagenet",
                "templates": ("clip_paper",),
                "source": {
                    "name": "tfds",
                    "dataset": "imagenet2012",
                    "data_dir": data_dir,
                    "split": "validation",
                    "label": "label",
                },
            },
            "coco": {
                "type": "retrieval",
                "every": "10 percent",
                "batch_size": 4096,
                "source": {
                    "name": "tfds",
                    "dataset": "coco_captions",
                    "data_dir": data_dir,
                    "split": "test",
                    "text": "captions/text",
                },
            },
        }
    )
    _slice.apply(config, slice, SLICES)
    if runlocal:
        shrink(config)
    return config


def shrink(config: ConfigDict) -> None:
    """Shrinks the run to a few steps of a tiny model on the same files: a minute on a laptop."""
    config.total = "6 steps"
    config.log_every = 1
    config.input.batch_size = 32
    config.input.res = 32
    config.model.img.variant = "mu/16"
    config.model.txt.variant = "mu"
    config.model.dtype = config.objectives.contrastive.dtype = "float32"
    config.schedule.warmup = "2 steps"
    config.checkpoint.every = "3 steps"
    for block in config.evals.values():
        block.batch_size = 64
        block.every = ""  # at the end
    config.evals.imagenet.templates = ("clip_best",)
    if not config.input.tokenizer.path:
        config.input.tokenizer = ConfigDict({"name": "bytes"})
