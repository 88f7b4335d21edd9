"""Every source keeps the contract, and whoever reads a source asks for nothing beyond it."""

import ast
import io
import pathlib
import typing

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from base.errors import UserError
from evaluators.strict_source import StrictSource
from input_pipeline import loader
from input_pipeline.convert import __main__ as convert
from input_pipeline.errors import BadExample
from input_pipeline.mixture import Languages, Mixture
from input_pipeline.sources import from_words, storage
from input_pipeline.sources.contract import Example, OptionalMembers, Source
from input_pipeline.sources.files import Files
from input_pipeline.sources.registry import SOURCES
from input_pipeline.transforms.preprocess import make_preprocess
from input_pipeline.transforms.tokenizer import Bytes
from programs import inspect_data

ROOT = pathlib.Path(__file__).resolve().parents[3]
READERS = ("input_pipeline", "embedding", "evaluators", "trainers", "programs")
OPTIONAL = {name for name in dir(OptionalMembers) if not name.startswith("_")}
OPTIONAL |= set(typing.get_type_hints(OptionalMembers))
ROWS = 5


def png(i: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (40 * i, 0, 0)).save(file, "PNG")
    return file.getvalue()


class Minimal:
    """A source with the required part only."""

    class_names = None

    def __init__(self, *, count: int = ROWS):
        self._count = count

    def __len__(self):
        return self._count

    def __getitem__(self, i: int) -> Example:
        if not 0 <= i < self._count:
            raise IndexError(i)
        return {"image": png(i), "texts": [f"picture {i}"], "id": f"minimal/{i}"}


class TinyPairs(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="png"),
            "caption": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["ant", "bee"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(ROWS):
            yield i, {"image": io.BytesIO(png(i)), "caption": f"picture {i}", "label": i % 2}


def write_table(folder: pathlib.Path) -> Files:
    lines = ["image\tcaption\tlang\tkind"]
    for i in range(ROWS):
        (folder / f"{i}.png").write_bytes(png(i))
        lines.append(f"{i}.png\tpicture {i}\t{('de', 'en')[i % 2]}\t{('ant', 'bee')[i % 2]}")
    (folder / "t.tsv").write_text("\n".join(lines))
    return Files(path=f"{folder}/t.tsv", language_column="lang", label_column="kind")


def convert_to(name: str, folder: pathlib.Path) -> str:
    words = ["files", f"path={folder}/t.tsv", "language_column=lang", "label_column=kind"]
    assert convert.main([*words, f"--to={name}", f"--out={folder / name}"]) == 0
    return f"{folder / name}/train-*"


def open_source(name: str, folder: pathlib.Path) -> typing.Any:
    """A source of ROWS examples with all that this one can have."""
    table = write_table(folder)
    match name:
        case "files":
            return table
        case "webdataset":
            captions = (("txt", 1.0),)
            fields = {"label": "json.label", "language": "json.language"}
            return SOURCES[name](path=convert_to(name, folder), captions=captions, **fields)
        case "parquet" | "array_record":
            fields = {"text": (("caption", 1.0),), "label": "label", "language": "language"}
            return SOURCES[name](path=convert_to(name, folder), **fields)
        case "tfds":
            TinyPairs(data_dir=folder, file_format="array_record").download_and_prepare()
            fields = {"text": "caption", "label": "label"}
            return SOURCES[name](dataset="tiny_pairs", data_dir=str(folder), **fields)
        case "memory":
            images, texts = [png(i) for i in range(ROWS)], ["a"] * ROWS
            labels = np.arange(ROWS) % 2
            return SOURCES[name](images=images, texts=texts, labels=labels, class_names="ab")
        case "scenes":
            return SOURCES[name](size=ROWS, res=16)
        case "embeddings":
            from test_embeddings import write

            write(folder, class_names=None)
            return SOURCES[name](path=str(folder))
    raise AssertionError(f"add source {name!r} to this test")


def assert_kept(source: typing.Any) -> None:
    """The source has the required part, and what it has beside it is as the contract says."""
    assert isinstance(source, Source)
    names = source.class_names
    assert names is None or all(isinstance(name, str) for name in names)
    count = len(source)
    assert count > 0
    for i in range(count):
        example = source[i]
        assert Example.__required_keys__ <= example.keys() <= Example.__annotations__.keys()
        image, texts = example["image"], example["texts"]
        if isinstance(image, np.ndarray):
            assert (image.dtype, image.ndim) in ((np.uint8, 3), (np.float32, 1))
        else:
            assert isinstance(image, bytes)
        assert isinstance(texts, list) and all(isinstance(text, str) for text in texts)
        for key, kind in (("weights", float), ("languages", str)):
            values = example.get(key, [])
            assert len(values) == len(texts) or key not in example
            assert all(isinstance(value, kind) for value in values)
        for key in {"id", "shard", "source"} & example.keys():
            assert isinstance(example[key], str)
        if "label" in example:
            assert type(example["label"]) is int
            assert names is None or 0 <= example["label"] < len(names)
        again = source[i]
        assert np.array_equal(again["image"], image) and again["texts"] == texts
    with pytest.raises(IndexError):
        source[count]
    for (kind, file), samples in getattr(source, "damage", {}).items():
        assert BadExample(kind) and isinstance(file, str) and samples > 0
    blocks = getattr(source, "blocks", None)
    if blocks is not None:
        assert blocks[0] == 0 and blocks[-1] == count and (np.diff(blocks) > 0).all()
        assert source.window >= 1
    if hasattr(source, "by_language"):
        for language, indices in source.by_language().items():
            tagged = [i for i in range(count) if language in source[i]["languages"]]
            assert indices.tolist() == tagged
    if hasattr(source, "identity"):
        assert all(0 <= source.identity(i) < source.identities for i in range(count))
    if hasattr(source, "order"):
        order = source.order(0)
        assert all(0 <= order[position] < count for position in range(3 * count))


@pytest.fixture(autouse=True)
def indexes(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_index_folder", str(tmp_path / "indexes"))


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_keeps_the_contract(name, tmp_path):
    assert_kept(open_source(name, tmp_path))


def test_sources_made_of_sources_keep_the_contract(tmp_path):
    table = write_table(tmp_path)
    for source in (Mixture({"a": table, "b": Minimal()}, (1.0, 2.0)), Languages(table, 2.0)):
        assert_kept(source)


def test_nothing_asks_a_source_for_more_than_the_contract():
    asked = set()
    for file in (file for folder in READERS for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or len(node.args) < 2:
                continue
            function, (target, member) = node.func, node.args[:2]
            by_name = isinstance(function, ast.Name) and function.id in ("getattr", "hasattr")
            if by_name and isinstance(target, ast.Name) and target.id in ("source", "part"):
                asked.add(ast.literal_eval(member))
    assert asked and asked <= OPTIONAL
    # And nothing stands in the contract that nobody asks for; window is read beside blocks.
    assert asked | {"window"} == OPTIONAL


CONFIG = """
from ml_collections import ConfigDict
def get_config():
    tower = {"width": 8, "depth": 1, "mlp_dim": 8, "num_heads": 1}
    return ConfigDict({
        "total": "2 steps", "lr": 1e-3,
        "model": {"img": {"variant": "Ti/8", **tower}, "txt": {"variant": "Ti", **tower}},
        "input": {"batch_size": 4, "res": 16, "token_len": 12, "source": {"name": "minimal"}},
    })
"""


def test_the_required_part_alone_serves_training_evaluation_conversion_and_inspection(
    tmp_path, monkeypatch, capsys
):
    source = Minimal()
    assert_kept(source)
    preprocess = make_preprocess(Bytes(), res=16, token_len=12)
    with loader.train_batches(source, preprocess, batch_size=4, seed=0, num_threads=1) as batches:
        batch = next(batches)
    assert batch["mask"].all() and len(set(batch["index"].tolist())) == 4

    strict = StrictSource(source)
    assert len(strict) == ROWS and strict[1]["texts"] == ["picture 1"]

    for registry in (SOURCES, from_words.SOURCES):
        monkeypatch.setitem(registry, "minimal", Minimal)
    out = tmp_path / "table"
    assert convert.main(["minimal", "--to=files", f"--out={out}"]) == 0
    assert len(Files(path=f"{out}/pairs.jsonl")) == ROWS

    from trainers.config import schema

    block = schema.BLOCKS["input.source"]
    monkeypatch.setitem(block.of, "minimal", Minimal)
    (tmp_path / "c.py").write_text(CONFIG)
    flags = [f"--config={tmp_path}/c.py", f"--sheet={tmp_path}/sheet.png", "--batches=1"]
    capsys.readouterr()
    assert inspect_data.main(flags) == 0, capsys.readouterr().err
    assert "picture" in capsys.readouterr().out


def test_an_evaluation_refuses_what_a_source_left_out_or_cannot_read():
    class Damaged(Minimal):
        damage: typing.ClassVar = {("no caption", "a.tar"): 2}

    with pytest.raises(UserError, match=r"2 of a\.tar \(no caption\)"):
        StrictSource(Damaged())
