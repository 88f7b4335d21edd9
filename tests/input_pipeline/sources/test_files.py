"""Tables of captions and the places of their images."""

import concurrent.futures
import io
import json
import re
import uuid
import zipfile

import fsspec
import pytest

from base.errors import UserError
from input_pipeline.sources.registry import SOURCES

Files = SOURCES["files"]

ROWS = [
    {"image": "a.png", "caption": '"red" cat, sitting', "split": "train", "kind": "cat"},
    {"image": "b.png", "caption": "ein Hund läuft", "split": "train", "kind": "dog"},
    {"image": "c.png", "caption": "an ant", "split": "val", "kind": "ant"},
]


def write(path, rows):
    if path.suffix == ".jsonl":
        text = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    else:
        comma = path.suffix == ".csv"

        def line(values):
            quoted = ['"' + v.replace('"', '""') + '"' for v in values] if comma else values
            return ("," if comma else "\t").join(quoted)

        text = "\n".join([line(rows[0]), *(line(row.values()) for row in rows)]) + "\n"
    path.write_text(text, encoding="utf-8")
    return str(path)


def put_images(folder, names="abc"):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name}.png").write_bytes(f"bytes of {name}".encode())


def put_zip(path, names="abc"):
    with zipfile.ZipFile(path, "w") as z:
        for name in names:
            z.writestr(f"{name}.png", f"bytes of {name}")


def assert_refused(pattern, **kw):
    with pytest.raises(UserError, match=re.escape(pattern)) as error:
        Files(**kw)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "JSONL"])
def test_every_kind_of_table_gives_the_same_examples(tmp_path, suffix):
    put_images(tmp_path)
    path = tmp_path / f"t.{suffix}"
    write(path.with_suffix(path.suffix.lower()), ROWS)
    path.with_suffix(path.suffix.lower()).rename(path)
    source = Files(path=str(path))
    assert len(source) == 2 and source.class_names is None
    assert source[0] == {
        "image": b"bytes of a",
        "texts": ['"red" cat, sitting'],
        "id": "a.png",
    }
    assert source[1]["texts"] == ["ein Hund läuft"]
    assert [e["id"] for e in (Files(path=str(path), split="val")[0],)] == ["c.png"]


def test_images_in_another_folder_a_zip_file_or_by_zip_names(tmp_path):
    put_images(tmp_path / "images")
    put_zip(tmp_path / "images.zip")
    put_zip(tmp_path / "images" / "deep.zip")
    path = write(tmp_path / "t.jsonl", ROWS)
    assert Files(path=path, images=str(tmp_path / "images"))[1]["image"] == b"bytes of b"
    assert Files(path=path, images=str(tmp_path / "images.zip"))[1]["image"] == b"bytes of b"
    named = [{**row, "image": f"images.zip/{row['image']}"} for row in ROWS]
    source = Files(path=write(tmp_path / "n.jsonl", named))
    assert source[1]["image"] == b"bytes of b" and source[1]["id"] == "images.zip/b.png"
    deep = [{**row, "image": f"deep.zip/{row['image']}"} for row in ROWS]
    source = Files(path=write(tmp_path / "d.jsonl", deep), images=str(tmp_path / "images"))
    assert source[0]["image"] == b"bytes of a"
    absolute = [{**row, "image": str(tmp_path / "images" / row["image"])} for row in ROWS]
    assert Files(path=write(tmp_path / "f.jsonl", absolute))[0]["image"] == b"bytes of a"


def test_captions_may_be_lists_and_columns_may_have_other_names(tmp_path):
    put_images(tmp_path)
    rows = [
        {"file": "a.png", "texts": ["one", "two"], "part": "x"},
        {"file": "b.png", "texts": "three", "part": "x"},
    ]
    source = Files(
        path=write(tmp_path / "t.jsonl", rows),
        image_column="file",
        text_column="texts",
        split_column="part",
        split="x",
    )
    assert source[0]["texts"] == ["one", "two"] and source[1]["texts"] == ["three"]
    source[0]["texts"].clear()
    assert source[0]["texts"] == ["one", "two"]


def test_labels_by_name_are_the_same_in_every_split(tmp_path):
    put_images(tmp_path)
    path = write(tmp_path / "t.csv", ROWS)
    for split, labels in (("train", [1, 2]), ("val", [0])):
        source = Files(path=path, split=split, label_column="kind")
        assert source.class_names == ["ant", "cat", "dog"]
        assert [source[i]["label"] for i in range(len(source))] == labels


@pytest.mark.parametrize("suffix", ["jsonl", "tsv"])
def test_labels_by_integer(tmp_path, suffix):
    put_images(tmp_path)
    value = int if suffix == "jsonl" else str
    rows = [{"image": "a.png", "caption": "x", "y": value(7)}]
    source = Files(path=write(tmp_path / f"t.{suffix}", rows), label_column="y")
    assert source[0]["label"] == 7 and source.class_names is None


def test_table_without_captions_serves_classification(tmp_path):
    put_images(tmp_path)
    path = write(tmp_path / "t.jsonl", [{"image": "a.png", "kind": "cat"}])
    source = Files(path=path, text_column="", label_column="kind")
    assert source[0] == {"image": b"bytes of a", "texts": [], "id": "a.png", "label": 0}


def test_spreadsheet_files(tmp_path):
    """A mark before the first column, CRLF, a quoted line break, an empty line."""
    put_images(tmp_path)
    text = '\ufeffimage,caption\r\na.png,"two\r\nlines"\r\n\r\nb.png,b\r\n'
    (tmp_path / "t.csv").write_bytes(text.encode())
    source = Files(path=str(tmp_path / "t.csv"))
    assert len(source) == 2 and source[0]["texts"] == ["two\r\nlines"]


def test_image_that_goes_later_is_a_bad_image_and_no_crash(tmp_path):
    put_images(tmp_path)
    source = Files(path=write(tmp_path / "t.jsonl", ROWS))
    (tmp_path / "b.png").unlink()
    assert source[1]["image"] == b"" and source[0]["image"] == b"bytes of a"
    put_zip(tmp_path / "i.zip")
    damaged = (tmp_path / "i.zip").read_bytes().replace(b"bytes of b", b"bytes of X")
    (tmp_path / "i.zip").write_bytes(damaged)
    source = Files(path=str(tmp_path / "t.jsonl"), images=str(tmp_path / "i.zip"))
    assert source[1]["image"] == b"" and source[0]["image"] == b"bytes of a"


def test_many_threads_read_one_zip_file(tmp_path):
    names = [f"n{i}" for i in range(40)]
    put_zip(tmp_path / "i.zip", names)
    rows = [{"image": f"i.zip/{name}.png", "caption": name} for name in names]
    source = Files(path=write(tmp_path / "t.jsonl", rows))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for example in pool.map(source.__getitem__, [i % 40 for i in range(2000)]):
            assert example["image"] == f"bytes of {example['texts'][0]}".encode()


def test_table_mistakes(tmp_path):
    assert_refused("there is no file", path=str(tmp_path / "none.jsonl"))
    assert_refused("give a .jsonl, .csv or .tsv file", path=str(tmp_path / "t.parquet"))
    (tmp_path / "empty.jsonl").write_text("\n")
    assert_refused("empty.jsonl has no rows", path=str(tmp_path / "empty.jsonl"))
    (tmp_path / "empty.csv").write_text("")
    assert_refused("empty.csv has no rows", path=str(tmp_path / "empty.csv"))
    (tmp_path / "a.jsonl").write_text('{"image": "a.png"}\n{"image"\n')
    assert_refused("a.jsonl line 2 is not JSON", path=str(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_text("[1]\n")
    assert_refused("b.jsonl line 1 is not a JSON object", path=str(tmp_path / "b.jsonl"))
    (tmp_path / "c.csv").write_text('image,caption\na.png,"x\ny"\nb.png,x,y\n')
    assert_refused(
        "c.csv line 4 has 3 values, but the first line names 2", path=str(tmp_path / "c.csv")
    )
    (tmp_path / "d.csv").write_text('image,caption\na.png,"x\n')
    assert_refused("d.csv line 2 cannot be read", path=str(tmp_path / "d.csv"))
    (tmp_path / "f.csv").write_text('image,caption\na.png,"' + "x\n" * 100_000)
    assert_refused(
        "cannot be read (field larger than", path=str(tmp_path / "f.csv")
    )  # a quote not closed
    (tmp_path / "e.tsv").write_bytes("image\tcaption\na.png\tHündin\n".encode("latin-1"))
    assert_refused("e.tsv is not UTF-8", path=str(tmp_path / "e.tsv"))


def test_column_caption_and_label_mistakes(tmp_path):
    path = write(tmp_path / "t.jsonl", ROWS)
    assert_refused(
        "t.jsonl has no column 'captoin'; the nearest: caption", path=path, text_column="captoin"
    )
    assert_refused("t.jsonl has no column 'img'; the nearest: image", path=path, image_column="img")
    assert_refused("t.jsonl has no column 'knd'; the nearest: kind", path=path, label_column="knd")
    rows = [dict(ROWS[0]) for _ in range(9)]
    for i in (1, 2):
        rows[i]["caption"] = " "
    path = write(tmp_path / "e.jsonl", rows)
    assert_refused("e.jsonl: no caption in 'caption' in lines 2, 3;", path=path)
    for i, caption in enumerate([None, 3, [], ["a", ""], {}, "", ["a", 1]]):
        rows[i]["caption"] = caption
    path = write(tmp_path / "f.jsonl", rows)
    assert_refused("no caption in 'caption' in lines 1, 2, 3, 4, 5 and 2 more;", path=path)
    path = write(tmp_path / "g.jsonl", [ROWS[0], {**ROWS[1], "image": None}])
    assert_refused("g.jsonl: no image in 'image' in line 2;", path=path)
    path = write(tmp_path / "h.jsonl", [ROWS[0], {**ROWS[1], "kind": None}])
    assert_refused("h.jsonl: no class in 'kind' in line 2;", path=path, label_column="kind")


def test_no_split_takes_every_row(tmp_path):
    put_images(tmp_path)
    path = write(tmp_path / "t.jsonl", ROWS)
    assert len(Files(path=path, split="")) == len(ROWS) > len(Files(path=path))
    plain = [{"image": row["image"], "caption": row["caption"]} for row in ROWS]
    path = write(tmp_path / "p.jsonl", plain)
    assert len(Files(path=path, split="")) == len(ROWS)


def test_split_mistakes(tmp_path):
    path = write(tmp_path / "t.jsonl", ROWS)
    assert_refused("t.jsonl has no rows of split 'vall'; the nearest: val", path=path, split="vall")
    plain = [{"image": "a.png", "caption": "x"}]
    path = write(tmp_path / "p.jsonl", plain)
    assert_refused(
        "so all of it is split 'train'; for 'val' add the column", path=path, split="val"
    )
    path = write(tmp_path / "m.jsonl", [*ROWS, *plain])
    assert_refused("m.jsonl: no split in 'split' in line 4;", path=path)


def test_missing_images_are_found_at_the_start(tmp_path):
    path = write(tmp_path / "t.jsonl", ROWS)
    assert_refused(
        f"line 1: there is no image {tmp_path / 'a.png'}; names are relative to", path=path
    )
    assert_refused(
        "images='nowhere' is neither a folder nor a zip file", path=path, images="nowhere"
    )
    put_zip(tmp_path / "i.zip", "a")
    kw = {"path": path, "images": str(tmp_path / "i.zip")}
    assert_refused("line 2: ", **kw)
    assert_refused("i.zip has no member 'b.png'; the nearest: a.png", **kw)
    path = write(tmp_path / "z.jsonl", [{"image": "no.zip/a.png", "caption": "x"}])
    assert_refused("no.zip cannot be read", path=path)
    (tmp_path / "bad.zip").write_bytes(b"x")
    assert_refused("bad.zip cannot be read as a zip", path=path, images=str(tmp_path / "bad.zip"))


def test_a_table_and_its_images_behind_urls(tmp_path):
    disk, at = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("in.png", b"inside")
    disk.pipe({f"{at}/a.jpg": b"loose", f"{at}/z.zip": file.getvalue()})
    rows = [{"image": "a.jpg", "caption": "x"}, {"image": "z.zip/in.png", "caption": "y"}]
    disk.pipe(f"{at}/t.jsonl", "\n".join(map(json.dumps, rows)).encode())
    source = Files(path=f"memory:/{at}/t.jsonl")
    assert [source[i]["image"] for i in (0, 1)] == [b"loose", b"inside"]
    assert Files(path=f"memory:/{at}/t.jsonl", images=f"memory:/{at}")[1]["texts"] == ["y"]
    with pytest.raises(UserError, match="there is no image memory:"):
        Files(path=f"memory:/{at}/t.jsonl", images="memory://elsewhere")


def test_rows_tell_their_language(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("image,caption,lang\na.jpg,ein Hund,de\na.jpg,a dog,en\na.jpg,a cat,en\n")
    (tmp_path / "a.jpg").write_bytes(b"x")
    source = Files(path=str(table), language_column="lang")
    assert [source[i]["languages"] for i in range(3)] == [["de"], ["en"], ["en"]]
    assert {tag: rows.tolist() for tag, rows in source.by_language().items()} == {
        "de": [0],
        "en": [1, 2],
    }
    table.write_text("image,caption,lang\na.jpg,ein Hund,\n")
    with pytest.raises(UserError, match="no language in 'lang' in line 2"):
        Files(path=str(table), language_column="lang")
    assert Files(path=str(table)).by_language() == {}


LANGUAGES = [
    {"image": "a.png", "caption": ["a dog", "Hund", "dog"], "lang": ["en", "de", "en"]},
    {"image": "b.png", "caption": "Katze", "lang": "de", "kind": "cat"},
    {"image": "c.png", "caption": ["ant"], "lang": ["en"], "kind": "ant"},
]


def test_each_caption_of_a_list_has_its_language(tmp_path):
    put_images(tmp_path)
    source = Files(path=write(tmp_path / "t.jsonl", LANGUAGES), language_column="lang")
    assert [source[i]["languages"] for i in range(3)] == [["en", "de", "en"], ["de"], ["en"]]
    assert {tag: rows.tolist() for tag, rows in source.by_language().items()} == {
        "de": [0, 1],
        "en": [0, 2],
    }


def test_chosen_languages_keep_their_captions_in_their_order(tmp_path, caplog):
    put_images(tmp_path)
    rows = [{**row, "kind": kind} for row, kind in zip(LANGUAGES, ("dog", "cat", "ant"))]
    settings = {"path": write(tmp_path / "t.jsonl", rows), "language_column": "lang"}
    both = Files(**settings, languages=("de", "en"))
    assert both[0]["texts"] == ["Hund", "a dog", "dog"]
    assert both[0]["languages"] == ["de", "en", "en"] and not caplog.records
    with caplog.at_level("WARNING", logger="absl"):
        english = Files(**settings, languages=("en",), label_column="kind")
    assert "left out 1 of 3 rows, which have no caption in en" in caplog.text
    assert [english[i]["id"] for i in range(len(english))] == ["a.png", "c.png"]
    assert [english[i]["texts"] for i in range(2)] == [["a dog", "dog"], ["ant"]]
    assert [english[i]["image"] for i in range(2)] == [b"bytes of a", b"bytes of c"]
    # Classes are those of the whole table, whatever the language.
    assert english.class_names == ["ant", "cat", "dog"]
    assert [english[i]["label"] for i in range(2)] == [2, 0]
    assert {tag: rows.tolist() for tag, rows in english.by_language().items()} == {"en": [0, 1]}


def test_language_mistakes(tmp_path):
    put_images(tmp_path)
    path = write(tmp_path / "t.jsonl", LANGUAGES)
    settings = {"path": path, "language_column": "lang"}
    assert_refused(
        "no captions in language 'eng'; the nearest: en", **settings, languages=("de", "eng")
    )
    assert_refused("set `language_column`", path=path, languages=("en",))
    rows = [LANGUAGES[0], {**LANGUAGES[1], "lang": ["de", "en"]}]
    path = write(tmp_path / "u.jsonl", rows)
    assert_refused(
        "not one language for each caption in 'lang' in line 2", path=path, language_column="lang"
    )
