"""The emoji and grocery sets as tables of the source `files`."""

import json
import pathlib
import zipfile

import pytest
from ml_collections import ConfigDict

from configs import emoji, grocery
from input_pipeline.sources.files import Files
from programs import prepare_table

CLASSES = [
    {"id": 0, "name": "Gala", "coarse": "Apple"},
    {"id": 1, "name": "Granny Smith", "coarse": "Apple"},
    {"id": 2, "name": "Banana", "coarse": "Banana"},
]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for name in "abcd":
            archive.writestr(f"{name}.png", f"picture {name}")
    (folder / "LICENSE-pictures").write_text("as you like")
    return folder


@pytest.fixture
def emoji_data(data):
    """Pictures with names in English and Maori, which lacks most; the last has no name at all."""
    splits = {"a": "train", "b": "train", "c": "val", "d": "train"}
    rows = [
        {"id": name, "file": f"{name}.png", "group": group, "split": splits[name]}
        for name, group in zip("abcd", "XWYX")
    ]
    write_jsonl(data / "images.jsonl", rows)
    (data / "captions").mkdir()
    (data / "captions" / "en.tsv").write_text(
        'id\tname\tkeywords\na\ta "so-called" cat\tcat|pet\nb\tdog\t\nc\tcup\tcup\nd\t\t\n'
    )
    (data / "captions" / "mi.tsv").write_text("id\tname\tkeywords\nb\tkurī\tkurī\n")
    return data


@pytest.fixture
def grocery_data(data):
    write_jsonl(data / "classes.jsonl", CLASSES)
    (data / "images.tsv").write_text(
        "file\tsplit\tclass_id\na.png\ttrain\t1\nb.png\ttrain\t2\nc.png\tval\t0\nd.png\ttest\t0\n"
    )
    return data


def prepared(data, tmp_path, capsys) -> pathlib.Path:
    assert prepare_table.main([f"--data={data}", f"--out={tmp_path / 'out'}"]) == 0
    assert "pairs.jsonl" in capsys.readouterr().out
    assert (tmp_path / "out" / "LICENSE-pictures").is_file()
    return tmp_path / "out"


def open_source(block: ConfigDict) -> Files:
    settings = block.to_dict()
    assert settings.pop("name") == "files"
    return Files(**settings)


def test_the_emoji_config_reads_names_and_for_training_keywords(emoji_data, tmp_path, capsys):
    folder = str(prepared(emoji_data, tmp_path, capsys))
    config = emoji.get_config(data_dir=folder)
    train = open_source(config.input.source)
    assert train[0] == {
        "image": b"picture a",
        "texts": ['a "so-called" cat', "cat, pet"],
        "languages": ["en", "en"],
        "label": 1,
        "id": "images.zip/a.png",
    }
    assert [train[i]["texts"] for i in range(1, len(train))] == [["dog"]]  # 'd' has no name
    assert train.class_names == ["W", "X", "Y"]  # also the group that only 'val' has
    held_out = open_source(config.evals.retrieval.source)
    assert [held_out[i]["texts"] for i in range(len(held_out))] == [["cup"]]  # without keywords
    assert train.class_names == open_source(config.evals.groups.source).class_names
    several = open_source(emoji.get_config(data_dir=folder, languages="mi,en").input.source)
    assert several[1]["texts"] == ["kurī", "kurī", "dog"]
    everything = open_source(emoji.get_config(data_dir=folder, languages="all").input.source)
    assert everything[1]["texts"] == ["dog", "kurī", "kurī"]


def test_one_table_of_captions_gives_the_same_examples(emoji_data, tmp_path, capsys):
    (emoji_data / "images.jsonl").unlink()
    row = {"id": "a", "file": "a.png", "group": "X", "split": "train"}
    write_jsonl(emoji_data / "captions.jsonl", [{**row, "captions": {"ja": "neko", "en": "cat"}}])
    folder = prepared(emoji_data, tmp_path, capsys)
    (line,) = (folder / "pairs.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "image": "images.zip/a.png",
        "caption": ["cat", "neko"],
        "languages": ["en", "ja"],
        "split": "train",
        "class": "X",
    }


def test_the_grocery_config_has_captions_and_classes_of_both_levels(grocery_data, tmp_path, capsys):
    config = grocery.get_config(data_dir=str(prepared(grocery_data, tmp_path, capsys)))
    train = open_source(config.input.source)
    assert train[0]["image"] == b"picture a" and train[0]["id"] == "images.zip/a.png"
    assert train[0]["texts"][-1] == "a photo of Granny Smith, a kind of Apple"
    assert len(train[0]["texts"]) == 6
    assert len(train[1]["texts"]) == 5  # no 'Banana, a kind of Banana'
    assert all("Banana" in text for text in train[1]["texts"])
    fine, coarse = (open_source(config.evals[name].source) for name in ("fine", "coarse"))
    assert fine.class_names == ["Banana", "Gala", "Granny Smith"] and fine[0]["label"] == 1
    assert coarse.class_names == ["Apple", "Banana"] and coarse[0]["label"] == 0
    assert len(fine) == len(coarse) == 1


def test_mistakes_are_one_line_that_says_what_to_do(grocery_data, tmp_path, capsys):
    def assert_refused(message, **flags):
        flags = {"data": grocery_data, "out": tmp_path / "out"} | flags
        assert prepare_table.main([f"--{key}={value}" for key, value in flags.items()]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and message in err and err.count("\n") == 1

    (tmp_path / "pairs.jsonl").touch()
    assert_refused("has no images.zip", data=tmp_path)
    assert_refused("has a pairs.jsonl already; pass a new folder", out=tmp_path)
    assert_refused("see --help", dta="x")
    (grocery_data / "classes.jsonl").write_text("{\n")
    assert_refused("is damaged")
    (grocery_data / "images.tsv").unlink()
    assert_refused("none of captions.jsonl, images.jsonl and images.tsv")
    assert not (tmp_path / "out").exists()


def test_the_sets_have_the_sizes_of_their_papers(shared_data, tmp_path):
    counts = {"emoji_ml": (1461, 175, 8), "grocery": (2640, 296, 81)}
    for name, (train, val, classes) in counts.items():
        prepare_table.prepare(shared_data / name, tmp_path / name)
        sources = [
            Files(path=f"{tmp_path / name}/pairs.jsonl", split=split, label_column="class")
            for split in ("train", "val")
        ]
        assert [len(source) for source in sources] == [train, val]
        assert sources[0].class_names == sources[1].class_names
        assert len(sources[0].class_names or ()) == classes
