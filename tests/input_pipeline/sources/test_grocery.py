"""Grocery photos with fine and coarse classes."""

import json
import zipfile

import pytest

from base.errors import UserError
from input_pipeline.sources.grocery import Grocery

CLASSES = [
    {"id": 0, "name": "Gala", "coarse_id": 0, "coarse": "Apple"},
    {"id": 1, "name": "Granny Smith", "coarse_id": 0, "coarse": "Apple"},
    {"id": 2, "name": "Banana", "coarse_id": 1, "coarse": "Banana"},
]


@pytest.fixture
def small(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as z:
        for name in "abc":
            z.writestr(f"{name}.jpg", f"photo {name}")
    (tmp_path / "classes.jsonl").write_text("".join(json.dumps(c) + "\n" for c in CLASSES))
    (tmp_path / "images.tsv").write_text(
        "file\tsplit\tclass_id\tcoarse_id\na.jpg\ttrain\t1\t0\nb.jpg\ttrain\t2\t1\nc.jpg\tval\t0\t0\n"
    )
    return tmp_path


def test_labels_and_captions_name_the_chosen_class(small):
    fine, coarse = (Grocery(data_dir=str(small), labels=labels) for labels in ("fine", "coarse"))
    assert fine.class_names == ["Gala", "Granny Smith", "Banana"]
    assert coarse.class_names == ["Apple", "Banana"]
    assert [fine[i]["label"] for i in range(2)] == [1, 2]
    assert [coarse[i]["label"] for i in range(2)] == [0, 1]
    assert fine[0]["image"] == b"photo a" and fine[0]["id"] == "images.zip/a.jpg"
    assert fine[0]["texts"][-1] == "a photo of Granny Smith, a kind of Apple"
    for source in (fine, coarse):
        for i in range(2):
            texts = source[i]["texts"]
            assert len(set(texts)) == len(texts) >= 5
            assert all(source.class_names[source[i]["label"]] in text for text in texts)
    assert not any("kind of" in text for text in fine[1]["texts"])  # a Banana, a kind of Banana
    assert len(Grocery(data_dir=str(small), split="val")) == 1


def test_mistakes_are_one_line_that_says_what_to_do(small):
    def refused(match, folder=small, **config):
        with pytest.raises(UserError, match=rf"^[^\n]*{match}[^\n]*$"):
            Grocery(data_dir=str(folder), **config)

    for folder in ("", small / "none"):
        refused("pass a folder that has images.zip, images.tsv, classes.jsonl", folder)
        refused("configs/grocery.py:data_dir=", folder)
    refused("neither 'fine' nor 'coarse'", labels="all")
    refused("split 'tests' does not exist", split="tests")
    with (small / "images.tsv").open("a") as table:
        table.write("d.jpg\tval\t0\t0\n")
    refused("lacks 1 photos that images.tsv lists, first 'd.jpg'")
    with (small / "images.tsv").open("a") as table:
        table.write("d.jpg\tval\t7\t0\n")
    refused("images.tsv, line 6")
    (small / "classes.jsonl").write_text('{"id": 0}\n')
    refused("classes.jsonl, line 1")


def test_the_full_set(shared_data):
    folder = str(shared_data / "grocery")
    sizes = [len(Grocery(data_dir=folder, split=split)) for split in ("train", "val", "test")]
    assert sizes == [2640, 296, 2485]
    fine, coarse = (
        Grocery(data_dir=folder, split="val", labels=labels) for labels in ("fine", "coarse")
    )
    assert (len(fine.class_names), len(coarse.class_names)) == (81, 43)
    assert fine[0]["image"].startswith(b"\xff\xd8")
    with zipfile.ZipFile(shared_data / "grocery" / "images.zip") as z:
        for i in range(0, len(fine), 37):
            member = fine[i]["id"].removeprefix("images.zip/")
            assert fine[i]["image"] == z.read(member)
            # The file's own name tells its class.
            assert fine.class_names[fine[i]["label"]].replace(" ", "-") in member
