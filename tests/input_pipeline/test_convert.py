"""Data sets copied from one format into another."""

import io
import json
import pathlib
import re
import shlex
import shutil
import struct
import sys
import tarfile
from typing import Any

import numpy as np
import processes
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import (  # pyright: ignore[reportMissingImports]
    ArrayRecordReader,
)
from PIL import Image
from tensorboardX.record_writer import masked_crc32c

from base.errors import UserError
from input_pipeline.convert import __main__ as command
from input_pipeline.convert import conversion, tfds_files, writers
from input_pipeline.errors import BadExample
from input_pipeline.sources import from_words, storage
from input_pipeline.sources.array_record import ArrayRecord
from input_pipeline.sources.files import Files
from input_pipeline.sources.in_memory import Memory
from input_pipeline.sources.parquet import Parquet
from input_pipeline.sources.tfds import Tfds
from input_pipeline.sources.webdataset.source import WebDataset

READERS: dict[str, Any] = {
    "array_record": ArrayRecord,
    "parquet": Parquet,
    "webdataset": WebDataset,
    "files": Files,
    "tfds": Tfds,
}


@pytest.fixture(autouse=True)
def indexes(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_index_folder", str(tmp_path / "indexes"))


def run(capsys, *argv):
    """(exit code, lines on stdout, stderr)."""
    code = command.main([str(word) for word in argv])
    out = capsys.readouterr()
    return code, out.out.splitlines(), out.err


def assert_refused(capsys, pattern, *argv, code=2):
    result, out, error = run(capsys, *argv)
    assert result == code and not out
    assert re.search(re.escape(pattern), error), error
    *before, last = error.splitlines()
    assert last.startswith("error: ")
    assert not [line for line in before if not re.search("examples|records|shards", line)]


def examples(source: Any):
    return [source[i] for i in range(len(source))]


def opened(lines) -> Any:
    """The source that the printed lines configure, as a shell and the config would read them."""
    words = shlex.split(" ".join(lines[lines.index("train with it:") + 1 :]))
    pairs = dict(word.removeprefix("--config.input.source.").split("=", 1) for word in words)
    name = pairs.pop("name")
    if "captions" in pairs:
        captions = re.findall(r"\('([\w.]+)', ([\d.]+)\)", pairs.pop("captions"))
        return READERS[name](**pairs, captions=tuple((key, float(p)) for key, p in captions))
    return READERS[name](**pairs)


def write_pairs(folder, count=7, **more):
    folder.mkdir(exist_ok=True)
    rows = []
    for i in range(count):
        Image.new("RGB", (3, 2), (i, 0, 0)).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "caption": [f"caption {i} é\n\u2028", "b"], "split": "x"})
        rows[-1] |= {key: values[i] for key, values in more.items()}
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "t.jsonl"


@pytest.mark.parametrize("to", writers.WRITERS)
def test_every_format_holds_the_same_examples(emoji_tiny, tmp_path, capsys, to):
    settings = {"language_column": "languages", "label_column": "class"}
    pairs = [f"{key}={value}" for key, value in settings.items()]
    words = ["--to", to, "files", f"path={emoji_tiny}", *pairs, "languages='en','de'"]
    code, lines, _ = run(capsys, *words, "--out", tmp_path / "o [1]", "--shard_examples", 100)
    assert code == 0 and len(lines) > 2, lines
    source = Files(path=str(emoji_tiny), **settings, languages=("en", "de"))
    assert source.class_names is not None
    copy = opened(lines)
    assert len(copy) == len(source) > 200
    assert lines[0] == f"{len(source)} examples in {tmp_path}/o [1]"
    for i in range(len(source)):
        one, other = source[i], copy[i]
        assert other["image"] == one["image"]
        assert other["texts"] == one["texts"]
        if to != "webdataset":  # it has one language for each example
            assert other["languages"] == one["languages"]
        if to != "webdataset":
            assert source.class_names[one["label"]] == copy.class_names[other["label"]]
        else:
            assert one["label"] == other["label"]


def test_shards_are_named_and_of_equal_size(tmp_path, capsys):
    table = write_pairs(tmp_path / "in")
    words = ["files", f"path={table}", "split=x", "--shard_examples", "3"]
    for to, ending in [("array_record",) * 2, ("parquet",) * 2, ("webdataset", "tar")]:
        assert run(capsys, "--to", to, "--out", tmp_path / to, *words)[0] == 0
        names = [f"x-{k:05d}-of-00003.{ending}" for k in range(3)]
        assert sorted(p.name for p in (tmp_path / to).iterdir()) == ["conversion.json", *names]
        copies = {
            "array_record": lambda path: ArrayRecordReader(str(path)).num_records(),
            "parquet": lambda path: pq.ParquetFile(path).metadata.num_rows,
            "webdataset": lambda path: len(WebDataset(path=str(path))),
        }
        assert [copies[to](tmp_path / to / name) for name in names] == [3, 3, 1]
    assert run(capsys, "--to", "files", "--out", tmp_path / "files", *words)[0] == 0
    names = sorted(p.name for p in (tmp_path / "files").iterdir())
    assert names == ["conversion.json", "images", "pairs.jsonl"]
    shard = ArrayRecordReader(f"{tmp_path}/array_record/x-00000-of-00003.array_record")
    assert shard.writer_options_string().startswith("group_size:1,")


def test_shards_that_are_lost_are_made_again(tmp_path, capsys):
    table, out = write_pairs(tmp_path / "in"), tmp_path / "out"
    words = ["--to", "parquet", "files", f"path={table}", "split=x", "--shard_examples", "3"]
    _, lines, _ = run(capsys, *words, "--out", out)
    (out / "x-00001-of-00003.parquet").unlink()
    state = json.loads((out / "conversion.json").read_text())
    del state["shards"]["x-00000-of-00003.parquet"]
    (out / "conversion.json").write_text(json.dumps(state))
    code, again, error = run(capsys, *words, "--out", out)
    assert code == 0 and again == lines and "1 of 3 shards are there already" in error
    assert len(opened(again)) == 7


def test_a_file_that_cannot_be_written_is_told(tmp_path):
    rows = iter([writers.Record(0, b"i", "png", ["a"], [], None, "a", False)])
    with pytest.raises(OSError, match="no folder"):
        writers.WRITERS["array_record"](tmp_path / "no folder" / "x", rows, None)


def test_a_damaged_page_of_a_copy_is_noticed(tmp_path, capsys):
    table = write_pairs(tmp_path / "in")
    words = ["files", f"path={table}", "split=x", "--out", tmp_path / "out"]
    _, lines, _ = run(capsys, "--to", "parquet", *words)
    path = tmp_path / "out" / "x-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes().replace(png(3), b"x" * len(png(3))))
    with pytest.raises(BadExample, match="checksum"):
        opened(lines)[3]


def test_class_names_and_formats_that_a_target_cannot_hold(tmp_path, capsys, monkeypatch):
    ppm = b"P6 1 1 255 abc"
    names = ["ant\nworker", "bee"]
    source = Memory(images=[ppm, png(1)], texts=[[], []], labels=[0, 1], class_names=names)
    monkeypatch.setattr(command, "make_source", lambda words: source)
    for to in writers.WRITERS:
        _, lines, _ = run(capsys, "--to", to, "memory", "--out", tmp_path / to)
        copy = opened(lines)
        if to == "webdataset":
            assert lines[2] == f"  memory/0: unknown image format: it begins with {ppm[:8]!r}"
            assert copy[0]["label"] == 1 and len(copy) == 1
            continue
        assert [(e["image"], e["texts"], e["label"]) for e in examples(copy)] == [
            (ppm, [], 0),
            (png(1), [], 1),
        ]
        first = "ant worker" if to == "array_record" else "ant\nworker"
        assert copy.class_names == [first, "bee"]


def test_what_a_tar_file_holds(tmp_path, capsys):
    table = write_pairs(tmp_path / "in", 2, language=["de", "en"], kind=["ant", "bee"])
    settings = ["split=x", "label_column=kind", "language_column=language"]
    out = tmp_path / "out"
    code, lines, _ = run(
        capsys, "--to", "webdataset", "files", f"path={table}", *settings, "--out", out
    )
    assert code == 0
    with tarfile.open(out / "x-00000-of-00001.tar") as tar:
        read = {m.name: tar.extractfile(m).read() for m in tar}  # pyright: ignore
    assert list(read) == [
        f"0000000{i}.{suffix}" for i in range(2) for suffix in ("png", "txt", "json")
    ]
    assert read["00000001.png"] == (tmp_path / "in" / "1.png").read_bytes()
    assert read["00000001.txt"].decode() == "caption 1 é\n\u2028"
    assert json.loads(read["00000001.json"]) == {
        "caption": "caption 1 é\n\u2028",
        "caption_1": "b",
        "captions": ["caption 1 é\n\u2028", "b"],
        "id": "1.png",
        "language": "en",
        "languages": ["en", "en"],
        "label": 1,
        "class": "bee",
    }
    copy = opened(lines)
    assert copy[1]["languages"] == ["en", "en"] and copy[1]["label"] == 1


def test_parquet_is_what_hugging_face_reads(tmp_path, capsys):
    table = write_pairs(tmp_path / "in", 150, kind=["ant", "bee"] * 75)
    words = ["files", f"path={table}", "split=x", "label_column=kind", "--out", tmp_path / "out"]
    assert run(capsys, "--to", "parquet", *words)[0] == 0
    file = pq.ParquetFile(tmp_path / "out" / "x-00000-of-00001.parquet")
    groups = [file.metadata.row_group(k).num_rows for k in range(file.metadata.num_row_groups)]
    assert groups == [100, 50]
    metadata: Any = file.schema_arrow.metadata
    features = json.loads(metadata[b"huggingface"])["info"]["features"]
    assert list(features) == file.schema_arrow.names
    assert features["image"] == {"_type": "Image"}
    assert features["label"] == {"names": ["ant", "bee"], "_type": "ClassLabel"}
    image = file.read_row_group(1)["image"][49].as_py()
    assert image == {
        "bytes": (tmp_path / "in" / "149.png").read_bytes(),
        "path": "00000149.png",
    }


class Broken(Memory):
    """Fails as often as it is told to, after some examples."""

    fails = True

    def __getitem__(self, i):
        if self.fails and i == 5:
            raise KeyboardInterrupt
        if i == 2:
            raise BadExample("damaged record", "a checksum", id="the third")
        return super().__getitem__(i)


def png(i):
    file = io.BytesIO()
    Image.new("RGB", (3, 2), (i, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def broken(monkeypatch):
    images = [png(i) for i in range(8)]
    images[3], images[7] = b"", b"no image at all"
    source = Broken(images=images, texts=[f"text {i}" for i in range(8)])
    monkeypatch.setattr(command, "make_source", lambda words: source)
    return source


@pytest.mark.parametrize("to", writers.WRITERS)
def test_a_conversion_that_was_killed_goes_on(tmp_path, capsys, monkeypatch, broken, to):
    words = ["--to", to, "broken", "--out", tmp_path / "out", "--shard_examples", 2]
    code, out, error = run(capsys, *words)
    assert code == 85 and "run the same command again" in error and not out
    written = []
    writer = writers.WRITERS[to]
    monkeypatch.setitem(
        writers.WRITERS, to, lambda path, *rest: (written.append(path.name), writer(path, *rest))
    )
    monkeypatch.setattr(Broken, "fails", False)
    code, lines, error = run(capsys, *words)
    assert code == 0 and "2 of 4 shards are there already" in error
    assert [name.split("-")[1] for name in written] == ["00002", "00003"]
    # What was left out before the interruption is told as well.
    assert lines[:5] == [
        f"5 examples in {tmp_path / 'out'}",
        "left out 3 that cannot be used:",
        "  the third: damaged record: a checksum",
        "  memory/3: no image: the file is missing or empty",
        "  memory/7: unknown image format: it begins with b'no image'",
    ]
    copy = opened(lines)
    assert [copy[i]["image"] for i in range(len(copy))] == [png(i) for i in (0, 1, 4, 5, 6)]
    assert [copy[i]["texts"][0] for i in range(len(copy))] == [f"text {i}" for i in (0, 1, 4, 5, 6)]
    written.clear()
    assert run(capsys, *words)[1] == lines and not written  # and again: nothing is left to do
    assert not list((tmp_path / "out").rglob("*.part"))


def test_arrays_become_png_and_examples_need_texts_or_a_label(tmp_path, capsys, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), np.uint8)
    source = Memory(images=pixels, texts=[["a"], ["\ud800"], []])
    monkeypatch.setattr(command, "make_source", lambda words: source)
    code, lines, _ = run(capsys, "--to", "parquet", "memory", "--out", tmp_path / "out")
    assert code == 0 and lines[2:4] == [
        "  memory/1: caption not UTF-8: 'utf-8' codec can't encode character '\\ud800' in "
        "position 0: surrogates not allowed",
        "  memory/2: no caption",
    ]
    (example,) = examples(opened(lines))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(example["image"]))), pixels[0])
    source._texts = [[], [], []]
    assert_refused(
        capsys,
        "no example could be used; the first: memory/0: no caption",
        "--to",
        "parquet",
        "memory",
        "--out",
        tmp_path / "none",
    )


def test_labels_that_only_some_have_are_told_and_not_configured(tmp_path, capsys, monkeypatch):
    class Some(Memory):
        def __getitem__(self, i):
            return {**super().__getitem__(i), **({"label": 1} if i else {})}

    source = Some(images=[png(0), png(1)], texts=["a", "b"])
    monkeypatch.setattr(command, "make_source", lambda words: source)
    for to in writers.WRITERS:
        _, lines, _ = run(capsys, "--to", to, "memory", "--out", tmp_path / to)
        assert "only 1 of them have labels" in lines
        assert len(examples(opened(lines))) == 2


@pytest.mark.parametrize(
    ("suffix", "format"),
    [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("gif", "GIF"), ("bmp", "BMP"),
     ("tiff", "TIFF"), ("ppm", "PPM"), ("avif", "AVIF")],
)  # fmt: skip
def test_suffixes_follow_the_first_bytes(suffix, format):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, format)
    assert conversion._suffix(file.getvalue()) == suffix


def test_weights_are_said_to_be_lost(tmp_path, capsys):
    table = write_pairs(tmp_path / "in")
    words = ["files", f"path={table}", "split=x", "--out", tmp_path / "p"]
    _, lines, _ = run(capsys, "--to", "parquet", *words)
    assert not [line for line in lines if "drawn" in line]
    path = f"path={tmp_path}/p/*.parquet"
    words = ["parquet", path, "text=(('caption', 1.0),)", "--out", tmp_path / "a"]
    _, lines, _ = run(capsys, "--to", "array_record", *words)
    assert "not copied: how often each caption is drawn; set it again" in lines


def test_settings_are_of_the_type_that_the_source_wants(tmp_path, monkeypatch):
    class Source:
        def __init__(self, *, path: str, n: int = 1, p: float = 0.5, some: str | tuple = "",
                     pairs: tuple[tuple[str, float], ...] = ()):  # fmt: skip
            self.given = path, n, p, some, pairs

    monkeypatch.setattr(from_words, "SOURCES", {"s": Source})
    words = ["s", "path=2024", "n=3", "p=1", "some=('a', 1.0)", "pairs=(('a', 1.0),)"]
    assert command.make_source(words).given == ("2024", 3, 1.0, ("a", 1.0), (("a", 1.0),))
    words = ["s", "path='2024'", "some=train[:9%]"]
    assert command.make_source(words).given == ("2024", 1, 0.5, "train[:9%]", ())
    for pair in ("n=x", "n=1.5", "p=x", "pairs=x"):
        with pytest.raises(UserError, match=f"^{pair} is not an? "):
            command.make_source(["s", "path=x", pair])


def test_mistakes(tmp_path, capsys):
    out = ["--out", tmp_path / "out"]
    files = ["--to", "parquet", "files", *out]
    assert_refused(capsys, "pass --out", "--to", "parquet", "files")
    assert_refused(
        capsys, "pass --to; there are: array_record, parquet, webdataset, files", "files", *out
    )
    assert_refused(capsys, "--to tar is not a format", "--to", "tar", "files", *out)
    assert_refused(capsys, "--too", "--too", "parquet", "files", *out)
    assert_refused(capsys, "the following arguments are required: source", *out)
    assert_refused(
        capsys, "there is no source 'fils'; the nearest: files", "--to", "parquet", "fils", *out
    )
    assert_refused(capsys, "'x.jsonl' is no setting", *files[:3], "x.jsonl", *out)
    assert_refused(capsys, "no setting 'paht'; the nearest: path", *files[:3], "paht=x", *out)
    assert_refused(capsys, "source files needs path=...", *files)
    assert_refused(capsys, "there is no file", *files[:3], "path=no.jsonl", *out)
    assert_refused(
        capsys, "is no folder on a local disk", *files[:3], "path=x", "--out", "gs://bucket/x"
    )
    assert_refused(capsys, "--shard_examples 0", *files, "--shard_examples", "0")
    assert not (tmp_path / "out").exists()

    table = write_pairs(tmp_path / "in")
    convertible = ["files", f"path={table}", "split=x"]
    assert_refused(
        capsys, "in is not empty", "--to", "files", *convertible, "--out", tmp_path / "in"
    )
    assert_refused(capsys, "t.jsonl is a file", "--to", "files", *convertible, "--out", table)
    assert run(capsys, "--to", "files", *convertible, *out)[0] == 0
    assert_refused(
        capsys,
        "is of another conversion, to files instead of",
        "--to",
        "parquet",
        *convertible,
        *out,
    )
    assert_refused(
        capsys,
        "shard_examples 5000 instead of 3",
        "--to",
        "files",
        *convertible,
        *out,
        "--shard_examples",
        3,
    )
    assert_refused(capsys, "source files", "--to", "files", *convertible, "text_column=", *out)
    (tmp_path / "out" / "conversion.json").write_text("{}")
    assert_refused(capsys, "conversion.json is damaged", "--to", "files", *convertible, *out)
    (tmp_path / "file").touch()
    assert_refused(
        capsys,
        "run the same command again",
        "--to",
        "files",
        *convertible,
        "--out",
        tmp_path / "file" / "out",
        code=1,
    )


def test_the_command(tmp_path):
    table = write_pairs(tmp_path / "in")
    python = [sys.executable, "-m", "input_pipeline.convert"]
    words = ["--to", "array_record", "files", f"path={table}", "split=x", "--out", "out"]
    env = {"PYTHONPATH": str(pathlib.Path(command.__file__).parents[2]), "PATH": "/usr/bin"}
    done = processes.run(python + words, cwd=tmp_path, env=env)
    assert "7/7 examples" in done.stderr and "left" in done.stderr
    assert len(opened(done.stdout.splitlines())) == 7


# TFDS


class Tiny(tfds.core.GeneratorBasedBuilder):
    """Two splits, of which one has two shards after `as_tfrecord`."""

    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="png"),
            "label": tfds.features.ClassLabel(names=["ant", "bee"]),
            "captions": tfds.features.Sequence({"text": tfds.features.Text()}),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 7), "val": self._generate_examples(7, 9)}

    def _generate_examples(self, start, end):
        for i in range(start, end):
            texts = [{"text": f"text {i} {j}"} for j in range(1 + i % 2)]
            yield i, {"image": io.BytesIO(png(i)), "label": i % 2, "captions": texts}


def tfrecord(data):
    """Records as TensorFlow frames them."""
    length = struct.pack("<Q", len(data))
    crcs = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
    return length + crcs[0] + data + crcs[1]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    Tiny(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture
def as_tfrecord(prepared, tmp_path):
    """The folder of `prepared` as TFDS writes tfrecord."""
    folder = tmp_path / "tfrecord" / "tiny" / "1.2.0"
    shutil.copytree(prepared / "tiny" / "1.2.0", folder)
    for split, sizes in {"train": [4, 3], "val": [2]}.items():
        (file,) = folder.glob(f"tiny-{split}.array_record*")
        records = ArrayRecordReader(str(file)).read_all()
        file.unlink()
        for k, size in enumerate(sizes):
            name = f"tiny-{split}.tfrecord-{k:05d}-of-{len(sizes):05d}"
            mine = [records.pop(0) for _ in range(size)]
            (folder / name).write_bytes(b"".join(map(tfrecord, mine)))
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    for split in info["splits"]:
        split["shardLengths"] = ["4", "3"] if split["name"] == "train" else ["2"]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def test_tfds_files_become_array_record_with_equal_examples(
    prepared, as_tfrecord, tmp_path, capsys
):
    with pytest.raises(UserError, match="is prepared as tfrecord"):
        Tfds(dataset="tiny", data_dir=str(tmp_path / "tfrecord"))
    before = sorted(as_tfrecord.iterdir())
    code, lines, _ = run(capsys, "tfds-files", as_tfrecord, "--out", tmp_path / "new")
    assert code == 0 and lines[0] == f"9 records in {tmp_path}/new/tiny/1.2.0"
    assert "splits: train, val" in lines and len(opened(lines)) == 7
    for split in ("train", "val"):
        given = {"dataset": "tiny", "split": split, "text": "captions/text", "label": "label"}
        one = Tfds(data_dir=str(prepared), **given)
        other = Tfds(data_dir=str(tmp_path / "new"), **given)
        assert examples(one) == examples(other) and other.class_names == ["ant", "bee"]
    direct = ArrayRecord(
        path=f"{tmp_path}/new/tiny/1.2.0/tiny-train*", text="captions/text", label="label"
    )
    given = {"dataset": "tiny", "text": "captions/text", "label": "label"}
    for one, other in zip(examples(Tfds(data_dir=str(prepared), **given)), examples(direct)):
        assert {**other, "id": one["id"], "shard": ""} == {**one, "shard": ""}
    assert direct.class_names == ["ant", "bee"]
    assert sorted(as_tfrecord.iterdir()) == before
    assert_refused(
        capsys, "is prepared already", "tfds-files", as_tfrecord, "--out", tmp_path / "new"
    )


def test_tfds_files_go_on_after_a_kill(as_tfrecord, tmp_path, capsys, monkeypatch):
    read, opened_files = tfds_files._tfrecords, []

    def killed(file, path):
        opened_files.append(path.name)
        if len(opened_files) == 2:
            raise KeyboardInterrupt
        return read(file, path)

    monkeypatch.setattr(tfds_files, "_tfrecords", killed)
    words = ["tfds-files", as_tfrecord, "--out", tmp_path / "new"]
    assert run(capsys, *words)[0] == 85
    with pytest.raises(UserError, match="is not prepared"):  # half of it does not pass for all
        Tfds(dataset="tiny", data_dir=str(tmp_path / "new"))
    assert run(capsys, *words)[0] == 0
    assert opened_files[0] not in opened_files[2:] and len(opened_files) == 4
    assert len(Tfds(dataset="tiny", data_dir=str(tmp_path / "new"))) == 7
    assert not list((tmp_path / "new").rglob(".*"))


def test_damaged_tfds_files_are_named(as_tfrecord, tmp_path, capsys):
    shard = as_tfrecord / "tiny-train.tfrecord-00000-of-00002"
    good, words = shard.read_bytes(), ["tfds-files", as_tfrecord, "--out", tmp_path / "new"]
    first = 16 + struct.unpack("<Q", good[:8])[0]
    huge = struct.pack("<Q", 1 << 62)
    huge += struct.pack("<I", masked_crc32c(huge))
    for damaged, message in {
        good[:-1]: f"{shard} ends within record 3",
        good[: first + 5]: f"{shard} ends within record 1",
        good[:first] + b"x" + good[first + 1 :]: f"{shard} is damaged at the head of record 1",
        huge + good[12:]: f"{shard} ends within record 0",
        good[:12] + b"\xff" * 9 + good[21:]: f"{shard} is damaged in record 0",
        good[:first]: f"{shard} has 1 records, but dataset_info.json says 4",
    }.items():
        shard.write_bytes(damaged)
        assert_refused(capsys, message, *words)
    shard.unlink()
    assert_refused(capsys, f"lacks {shard.name}", *words)


def test_mistakes_with_tfds_files(as_tfrecord, prepared, tmp_path, capsys):
    out = ["--out", tmp_path / "new"]
    assert_refused(capsys, "takes one folder", "tfds-files", *out)
    assert_refused(capsys, "takes one folder", "tfds-files", as_tfrecord, "--to", "parquet", *out)
    assert_refused(capsys, f"the nearest: {as_tfrecord}", "tfds-files", as_tfrecord.parent, *out)
    assert_refused(capsys, "is no prepared TFDS data set", "tfds-files", tmp_path / "no", *out)
    ready = prepared / "tiny" / "1.2.0"
    assert_refused(capsys, "is prepared as array_record; only tfrecord", "tfds-files", ready, *out)
    info = as_tfrecord / "dataset_info.json"
    text = info.read_text()
    for key, value in {"name": "tiny", "version": "1.2.0"}.items():
        info.write_text(text.replace(f'"{key}": "{value}"', f'"{key}": "../{value}"'))
        assert_refused(capsys, "../", "tfds-files", as_tfrecord, *out)
    info.write_text(text[:-5])
    assert_refused(capsys, "cannot be read as TFDS files", "tfds-files", as_tfrecord, *out)
    assert not (tmp_path / "new").exists()


def test_two_conversions_into_one_folder_do_not_meet(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "t.csv").write_text("image,caption\na.png,x\n")
    words = ["--to", "files", "files", f"path={tmp_path / 't.csv'}", "--out", str(tmp_path / "out")]
    with conversion.locked(tmp_path / "out"):
        assert command.main(words) == 2
    assert "another conversion writes there" in capsys.readouterr().err
    assert command.main(words) == 0
