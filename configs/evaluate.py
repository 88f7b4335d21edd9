"""Evaluates released or own weights on ImageNet (zero-shot) and COCO (retrieval).

  python main.py --eval_only --config configs/evaluate.py:init=FOLDER,data_dir=/data/tfds \
--workdir runs/judged

`data_dir` holds imagenet2012 and coco_captions prepared by TFDS as ArrayRecord; `what` chooses one.
path=pairs.jsonl,images=photos.zip measures retrieval on pairs of your own: on all of them, or on
one `split` of a table. `init`, `model`, `tokenizer` and `res` are as in configs/finetune.py.
"""

from ml_collections import ConfigDict

from configs import _source, finetune


def get_config(
    init: str = "",
    data_dir: str = "",
    what: str = "imagenet,coco",
    path: str = "",
    images: str = "",
    split: str = "",
    model: str = "",
    tokenizer: str = "",
    batch_size: int = 256,
    res: int = 0,
) -> ConfigDict:
    if not (init and (data_dir or path)):
        raise ValueError("pass init=WEIGHTS and data_dir=FOLDER (or path=PAIRS)")
    # --eval_only never reads the training data, so any source will do.
    config = finetune.get_config(
        init=init,
        path=path or data_dir,
        images=images,
        model=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        total="1 steps",
        res=res,
    )
    config.frozen = ((".*", True),)  # without --eval_only nothing would learn
    tfds = {"name": "tfds", "data_dir": data_dir}
    known = {
        "imagenet": {
            "type": "zeroshot",
            "batch_size": batch_size,
            "classnames": "imagenet",
            "templates": ("clip_paper",),
            "source": tfds | {"dataset": "imagenet2012", "split": "validation", "label": "label"},
        },
        "coco": {
            "type": "retrieval",
            "batch_size": batch_size,
            "source": tfds | {"dataset": "coco_captions", "split": "test", "text": "captions/text"},
        },
    }
    evals = {name: known[name] for name in what.split(",")} if data_dir else {}
    if path:
        source = _source.of(path, split, images=images)
        evals["retrieval"] = {"type": "retrieval", "batch_size": batch_size, "source": source}
    config.evals = ConfigDict(evals)
    return config
