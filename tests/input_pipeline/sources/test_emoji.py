"""Emoji in both layouts of the folder."""

import concurrent.futures
import json
import zipfile

import pytest

from base.errors import UserError
from input_pipeline.sources.emoji import Emoji

GROUPS = [
    "Activities",
    "Animals & Nature",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
]


@pytest.fixture
def small(tmp_path):
    """Three pictures in the layout with tables for each language; Maori lacks two names."""
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as z:
        for name in "abc":
            z.writestr(f"{name}.png", f"picture {name}")
    rows = [
        {"id": name, "file": f"{name}.png", "group": group, "split": split}
        for name, group, split in (("a", "X", "train"), ("b", "W", "train"), ("c", "Y", "val"))
    ]
    (tmp_path / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "captions").mkdir()
    (tmp_path / "captions" / "en.tsv").write_text(
        'id\tname\tkeywords\na\ta "so-called" cat\tcat|pet\nb\tdog\t\nc\tcup\tcup\n'
    )
    (tmp_path / "captions" / "mi.tsv").write_text("id\tname\tkeywords\nb\tkurī\tkurī\n")
    return tmp_path


def test_pictures_without_a_name_are_left_out_and_counted(small, caplog):
    with caplog.at_level("WARNING", logger="absl"):
        Emoji(data_dir=str(small), languages="all")
        assert not caplog.records
        assert len(Emoji(data_dir=str(small), languages="mi")) == 1
    assert "left out 1 of 2 pictures of split train, without a name in mi" in caplog.text


def test_names_keywords_and_gaps(small):
    english = Emoji(data_dir=str(small))
    assert english[0] == {
        "image": b"picture a",
        "texts": ['a "so-called" cat'],
        "languages": ["en"],
        "label": 1,
        "id": "images.zip/a.png",
    }
    assert english.class_names == ["W", "X", "Y"]  # also the group that only 'val' has
    everything = Emoji(data_dir=str(small), languages="all", keywords=True)
    assert everything.languages == ("en", "mi")
    assert everything[0]["texts"] == ['a "so-called" cat', "cat, pet"]
    assert everything[1]["texts"] == ["dog", "kurī", "kurī"]
    # A picture without any name is left out.
    maori = Emoji(data_dir=str(small), languages=("mi",))
    assert len(maori) == 1 and maori[0]["id"] == "images.zip/b.png" and maori[0]["label"] == 0
    assert Emoji(data_dir=str(small), languages="mi,en")[1]["texts"] == ["kurī", "dog"]
    assert len(Emoji(data_dir=str(small), split="val")) == 1


def test_mistakes_are_one_line_that_says_what_to_do(small):
    def refused(match, folder=small, **config):
        with pytest.raises(UserError, match=rf"^[^\n]*{match}[^\n]*$"):
            Emoji(data_dir=str(folder), **config)

    for folder in ("", small / "none", small / "captions"):
        refused("pass a folder that has images.zip with images.jsonl", folder)
        refused("configs/emoji.py:data_dir=", folder)
    refused("language 'eng'; the nearest: en; or 'all'", languages=("mi", "eng"))
    refused("language 'xx'; there are: en, mi; or 'all'", languages=("en", "xx"))
    refused("at least one", languages=())
    refused("split 'test' does not exist", split="test")
    (small / "captions" / "en.tsv").write_text("id\tname\tkeywords\na\tcat\n")
    refused("en.tsv, line 2", folder=small)
    with (small / "images.jsonl").open("a") as table:
        table.write('{"id": "d", "file": "d.png", "group": "X", "split": "val"}\n')
    refused("lacks 1 pictures that images.jsonl lists, first 'd.png'", languages="mi")
    (small / "images.jsonl").write_text('{"id": "d"}\n')
    refused("images.jsonl, line 1: lacks the field 'file'")
    (small / "images.jsonl").write_text("{\n")
    refused("images.jsonl, line 1: not JSON")
    (small / "captions").rename(small / "elsewhere")
    refused("pass a folder that has")
    (small / "images.jsonl").unlink()
    (small / "captions.jsonl").write_text(
        '{"id": "a", "file": "a.png", "group": "X", "split": "train"}\n'
    )
    refused("captions.jsonl, line 1: lacks the field 'captions'")


def test_the_full_set(shared_data):
    folder = str(shared_data / "emoji_ml")
    train, val = (
        Emoji(data_dir=folder, split=split, languages="all") for split in ("train", "val")
    )
    assert (len(train), len(val)) == (1461, 175)
    assert train.class_names == val.class_names == GROUPS
    assert len(train.languages) == 36
    assert "keycap: #" in train[0]["texts"] and "Taste: #" in train[0]["texts"]
    train_ids, val_ids = ({source[i]["id"] for i in range(len(source))} for source in (train, val))
    assert not train_ids & val_ids


def test_bytes_are_unchanged_whatever_thread_reads_them(shared_data):
    folder = shared_data / "emoji_ml"
    source = Emoji(data_dir=str(folder), split="val")
    with zipfile.ZipFile(folder / "images.zip") as z:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            examples = list(pool.map(source.__getitem__, list(range(len(source))) * 4))
        for example in examples:
            assert example["image"] == z.read(example["id"].removeprefix("images.zip/"))


def test_the_tiny_layout(shared_data):
    folder = str(shared_data / "emoji_tiny")
    train, val = (Emoji(data_dir=folder, languages=("en", "ja"), split=s) for s in ("train", "val"))
    assert len(train) + len(val) == 256 and len(val) > 0
    assert train.class_names == GROUPS
    assert train[0]["texts"] == ["keycap: 0", "囲み数字: 0"]
    assert train[0]["image"].startswith(b"\x89PNG")
    assert len(Emoji(data_dir=folder, languages="all").languages) == 6
    with pytest.raises(UserError, match="keywords=False"):
        Emoji(data_dir=folder, keywords=True)


def test_languages_are_told_and_found(small):
    both = Emoji(data_dir=str(small), languages="all", keywords=True)
    found = both.by_language()
    assert set(found) <= set(both.languages) and len(found) > 1
    for language in both.languages:
        rows = [i for i in range(len(both)) if language in both[i]["languages"]]
        assert rows == list(found.get(language, []))
    for i in range(len(both)):
        assert len(both[i]["texts"]) == len(both[i]["languages"])
