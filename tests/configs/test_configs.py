"""Every config loads and builds; the reference run is the paper's, and its parts run."""

import importlib
import io
import json
import os
import pathlib
import sys

import jax
import numpy as np
import processes
import pytest
import tensorflow_datasets as tfds

import main as program
from base.errors import UserError
from base.nested import flatten
from configs import finetune
from input_pipeline.sources.files import Files
from siglip import presets
from siglip.checkpoints import spec
from siglip.leaf_names import path_names
from siglip.towers.two_towers import make_model
from trainers import data
from trainers.config import complete
from trainers.plan import make_plan
from trainers.step.rules import match_rules

FOLDER = pathlib.Path(program.__file__).parent / "configs"
FILES = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))
# What a config cannot do without, where there is such a thing.
ARGUMENTS = {
    "pairs": "path=pairs.jsonl,val",
    "emoji": "data_dir=folder",
    "grocery": "data_dir=folder",
    **dict.fromkeys(
        ("siglip_b16", "siglip_l16", "siglip_so400m", "clip_b16", "msiglip_b16"),
        "dataset=my_pairs,data_dir=folder,tokenizer=pieces.model",
    ),
    **dict.fromkeys(
        ("finetune", "evaluate"),
        "init=random:siglip-b16-224,path=pairs.jsonl,tokenizer=pieces.model",
    ),
    "siglit": "path=embedded",
}


def load(name: str, arguments: str = ""):
    arguments = arguments or ARGUMENTS.get(name, "")
    return complete.load(f"{FOLDER / name}.py" + (f":{arguments}" if arguments else ""))


def differences(name: str) -> dict:
    """Key -> its values in siglip_b16 and in the config of that name."""
    one, other = (flatten(load(n).to_dict()) for n in ("siglip_b16", name))
    keys = sorted(one.keys() | other.keys())
    return {k: (one.get(k), other.get(k)) for k in keys if one.get(k) != other.get(k)}


@pytest.mark.parametrize("name", FILES)
def test_every_config_loads_and_builds_its_model(name):
    config = load(name)
    blocks = data.without(config.model)
    blocks["txt"]["vocab_size"] = blocks["txt"]["vocab_size"] or 260
    size = config.input.res
    image = np.zeros((1, size, size, 3), np.uint8)
    if config.input.image == "embedding":
        image = np.zeros((1, config.model.img.width), np.float32)
    inputs = image, np.zeros((1, config.input.token_len), np.int32)
    model = make_model(**blocks)
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    assert set(params) >= {"txt", "t"} and ("img" in params) == (name != "siglit")
    plan = make_plan(config, 10_000)
    assert plan.total > 0 and plan.save_every and set(plan.evals) == set(config.evals)


WITH_SLICES = ("siglip_b16", "siglip_l16", "siglip_so400m")


@pytest.mark.parametrize("name", WITH_SLICES)
def test_a_slice_sets_what_its_machine_needs_and_nothing_else(name):
    slices = importlib.import_module(f"configs.{name}").SLICES
    plain = flatten(load(name).to_dict())
    assert slices
    for topology, settings in slices.items():
        chosen = flatten(load(name, f"{ARGUMENTS[name]},slice={topology}").to_dict())
        assert {k: x for k, x in chosen.items() if x != plain.get(k)} == settings


def test_a_slice_that_no_config_knows_is_one_line():
    with pytest.raises(UserError, match=r"slice='v4:1' is none of v4:4x4x2, .*--fit finds"):
        load("siglip_b16", f"{ARGUMENTS['siglip_b16']},slice=v4:1")


@pytest.mark.parametrize("name", [name for name in FILES if name != "siglit"])  # no pixels there
def test_every_config_takes_batch_size_and_res(name):
    given = ",".join(filter(None, (ARGUMENTS.get(name), "batch_size=8,res=32")))
    config = load(name, given)
    assert (config.input.batch_size, config.input.res) == (8, 32)


def test_the_reference_run_is_that_of_the_paper():
    """arXiv 2303.15343, 4.2 and table 1; wd in the sense of trainers/step/optimizer.py."""
    config = flatten(load("siglip_b16").to_dict())
    expected = {
        "total": "9e9 examples",
        "input.batch_size": 32_768,
        "input.res": 224,
        "input.token_len": 16,
        "input.image": "decode | resize",
        "input.text": "lower | tokenize",
        "input.tokenizer.name": "sentencepiece",
        "model.img.variant": "B/16",
        "model.img.pool": "map",
        "model.img.drop_patches": 0.0,
        "model.txt.variant": "B",
        "model.txt.bottleneck": None,
        "model.t_init": 10.0,
        "model.b_init": -10.0,
        "objectives.contrastive.name": "sigmoid",
        "optimizer.name": "adafactor",
        "optimizer.b1": 0.9,
        "optimizer.beta2_cap": 0.95,
        "lr": 1e-3,
        "wd": 1e-4,
        "clip_norm": 1.0,
        "schedule.name": "cosine",
        "schedule.warmup": "200e6 examples",
        "evals.imagenet.type": "zeroshot",
        "evals.imagenet.source.dataset": "imagenet2012",
        "evals.imagenet.source.split": "validation",
        "evals.coco.type": "retrieval",
        "evals.coco.source.dataset": "coco_captions",
        "evals.coco.source.split": "test",
        "frozen": ((".*", False),),
        "init": None,
        "resume": None,
    }
    assert {key: config[key] for key in expected} == expected
    assert make_plan(load("siglip_b16"), 10**9).total == round(9e9 / 32_768)


def test_the_baseline_differs_in_the_loss_alone():
    assert differences("clip_b16") == {
        "objectives.contrastive.name": ("sigmoid", "softmax"),
        "objectives.contrastive.negatives": ("all", None),  # of the sigmoid alone
        "objectives.contrastive.ratio": (0, None),
        "objectives.contrastive.relative_bias": (False, None),
        "model.b_init": (-10.0, None),
    }


def test_the_multilingual_run_differs_in_vocabulary_and_length():
    assert differences("msiglip_b16") == {
        "model.txt.bottleneck": (None, 96),
        "total": ("9e9 examples", "30e9 examples"),
    }


@pytest.mark.parametrize("name", presets.PRESETS)
@pytest.mark.parametrize("file", ["finetune", "evaluate"])
def test_the_settings_of_released_weights_need_not_be_given(file, name):
    config = load(file, f"init=random:{name},path=pairs.jsonl,tokenizer=pieces.model")
    contract = spec.of_preset(presets.PRESETS[name])
    for tower, expected in (("img", contract.img), ("txt", contract.txt)):
        assert {key: config.model[tower][key] for key in expected} == expected
    keys = ("token_len", "image", "text") + (("res",) if contract.res else ())
    assert {key: config.input[key] for key in keys} == {k: getattr(contract, k) for k in keys}
    assert config.input.tokenizer.to_dict() == {"name": "sentencepiece", "path": "pieces.model"}
    assert config.init_positions is None


def test_the_model_can_be_named_where_the_weights_do_not_say_it():
    config = load("finetune", f"{ARGUMENTS['finetune']},model=siglip2-b16-256")
    assert (config.input.res, config.input.image) == (256, "hf-siglip2")
    assert config.init == "random:siglip-b16-224"


def abstract_params(config):
    blocks = data.without(config.model)
    blocks["txt"]["vocab_size"], size = 32, config.input.res
    inputs = np.zeros((1, size, size, 3), np.uint8), np.zeros((1, config.input.token_len), np.int32)
    return jax.eval_shape(make_model(**blocks).init, jax.random.key(0), *inputs)["params"]


# Of each recipe: batch size, total, token_len (the weights' is 64).
LENGTHS = {
    "full": (1024, "5 epochs", 64),
    "unlocked": (16_384, "2.4e9 examples", 16),
    "lit": (16_384, "900e6 examples", 16),
    "locked_text": (16_384, "900e6 examples", 64),
    "longer_text": (1024, "5 epochs", 256),
}


def test_another_recipe_is_refused_by_name():
    with pytest.raises(UserError, match="recipe='lti' is none of full, unlocked, lit, locked_text"):
        load("finetune", f"{ARGUMENTS['finetune']},recipe=lti")


@pytest.mark.parametrize("name", finetune.RECIPES)
def test_what_a_recipe_learns_from_where_and_how(name):
    """Length, lr and wd multipliers, frozen towers and init_only of every parameter."""
    config = load("finetune", f"{ARGUMENTS['finetune']},recipe={name}")
    lengths = config.input.batch_size, config.total, config.input.token_len
    assert lengths == LENGTHS[name]
    assert config.schedule.warmup == ("22 percent" if name == "lit" else "10 percent")
    assert config.init_text_positions == ("keep" if name == "longer_text" else None)
    assert config.lr == (1e-5 if name in ("full", "longer_text") else 1e-3)
    names = path_names(abstract_params(config))
    tower = {n: n.split("/")[0] for n in names}
    frozen = match_rules(config.frozen, names, key="frozen")
    lr_mults = match_rules(config.lr_mults, names, key="lr_mults")
    wd_mults = match_rules(config.wd_mults, names, key="wd_mults")
    locked = {"lit": "img", "locked_text": "txt", "longer_text": "img"}.get(name)
    kept = {"unlocked": ("img",), "lit": ("img",), "locked_text": ("txt", "t", "b")}.get(name, ())
    assert config.init_only == kept
    for n in names:
        assert frozen[n] == (tower[n] == locked), n
        assert lr_mults[n] == (0.1 if name == "unlocked" and tower[n] == "img" else 1.0), n
        decays = n.endswith("/kernel") and not (name == "unlocked" and tower[n] == "img")
        assert wd_mults[n] == (1.0 if decays else 0.0), n
    assert (config.wd > 0) == (name in ("unlocked", "lit", "locked_text"))


# The reference run, shrunk, on data sets as TFDS prepares them.


class Pairs(tfds.core.GeneratorBasedBuilder):
    """A table of (png, texts, label) as one of the three data sets that the config names."""

    VERSION = tfds.core.Version("1.0.0")
    # Of each data set: the split, and the features beside the image.
    text = tfds.features.Text()
    KINDS = {  # noqa: RUF012
        "my_pairs": ("train", {"caption": text}),
        "imagenet2012": ("validation", {"label": tfds.features.ClassLabel(num_classes=1000)}),
        "coco_captions": (
            "test",
            {"captions": tfds.features.Sequence({"text": text, "id": np.int64})},
        ),
    }
    rows: list

    def _info(self):
        features = {"image": tfds.features.Image(encoding_format="png"), **self.KINDS[self.name][1]}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {self.KINDS[self.name][0]: self._generate_examples()}

    def _generate_examples(self):
        for i, row in enumerate(self.rows):
            texts = [{"text": text, "id": j} for j, text in enumerate(row["texts"])]
            values = {"caption": row["texts"][0], "label": row["label"], "captions": texts}
            kept = {key: values[key] for key in self.KINDS[self.name][1]}
            yield i, {"image": io.BytesIO(row["image"]), **kept}


@pytest.fixture
def data_dir(emoji_tiny, tmp_path):
    folder = str(tmp_path / "tfds")
    for name, split in (("my_pairs", "train"), ("imagenet2012", "val"), ("coco_captions", "val")):
        source = Files(path=str(emoji_tiny), split=split, label_column="class")
        rows = [source[i] for i in range(min(len(source), 64))]
        attributes = {"name": name, "rows": rows, "__module__": __name__}
        if name == "coco_captions":  # as the real one has
            attributes["BUILDER_CONFIGS"] = [tfds.core.BuilderConfig(name="2014")]
        builder = type(name, (Pairs,), attributes)
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.mark.slow
def test_the_reference_run_trains_and_evaluates_shrunk_without_tensorflow(data_dir, tmp_path):
    flag = f"--config={FOLDER}/siglip_b16.py:dataset=my_pairs,data_dir={data_dir},runlocal"
    code = (
        "import sys, main\n"
        "code = main.main(sys.argv[1:])\n"
        "print('imported:', [m for m in ('tensorflow', 'torch') if m in sys.modules])\n"
        "sys.exit(code)\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(FOLDER.parent)}
    command = [sys.executable, "-c", code, flag, f"--workdir={tmp_path}/w"]
    done = processes.run(command, env=env, cwd=tmp_path, code=program.DONE)
    assert done.stdout.endswith("imported: []\n")
    events = [json.loads(line) for line in (tmp_path / "w/metrics.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if "loss" in event]
    assert len(losses) == 6 and all(np.isfinite(losses)) and losses[-1] < losses[0]
    results = json.loads((tmp_path / "w/results.json").read_text())
    assert results["imagenet"]["top1"]["chance"] == 1e-3
    assert set(results["coco"]) == {f"{way}_R@{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)}
    assert results["coco"]["t2i_R@1"]["chance"] == pytest.approx(1 / 23)  # the val pictures


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("pairs.csv", "files"),
        ("cc/{0000..0331}.tar", "webdataset"),
        ("gs://b/{a.tar,b.tar}", "webdataset"),
        ("data/train-*.parquet", "parquet"),
        ("data/train.array_record*", "array_record"),
    ],
)
def test_the_ending_of_a_path_says_which_source_reads_it(path, name):
    mine = load("pairs", f"path='{path}'").input.source
    assert (mine.name, mine.path) == (name, path)
    if name != "files":
        paper = load("siglip_b16", f"dataset='{path}',data_dir=folder,tokenizer=pieces.model")
        assert paper.input.source.to_dict() == mine.to_dict()
        assert paper.evals.coco.source.name == "tfds"
        both = load("pairs", f"path='{path}',val_path='{path}'")
        assert both.evals.retrieval.source.to_dict() == mine.to_dict()
