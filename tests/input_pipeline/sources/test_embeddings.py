"""Embeddings read back: as a source to train on, and as arrays to search in.

The folders are written here by hand, as the writer belongs to a layer above.
"""

import json
import pathlib

import numpy as np
import pyarrow as pa
import pytest

from base.errors import UserError
from input_pipeline import loader
from input_pipeline.mixture import Languages
from input_pipeline.order import order_of
from input_pipeline.sources import embeddings
from input_pipeline.sources.embeddings import SCHEMA, Embeddings
from input_pipeline.sources.registry import SOURCES

D, EXAMPLES, SHARD = 4, 23, 10
BAD = (0, 9, 13, *range(20, 23))  # at both ends of a shard, in one, and all of the last


def make_examples():
    rng = np.random.default_rng(0)
    examples = []
    for i in range(EXAMPLES):
        texts = [] if i in BAD else [f"{i}.{k}" for k in range(i % 3)]
        examples.append(
            {
                "index": i,
                "id": f"id {i}",
                "texts": texts,
                "languages": [("de", "en", "ja")[(i + k) % 3] for k in range(len(texts))],
                "weights": [0.5] * len(texts) if i % 2 else None,
                "label": i if i % 4 else None,
                "bad": "damaged image" if i in BAD else "",
                "image": rng.normal(size=D) * (i not in BAD),
                "text": rng.normal(size=(len(texts), D)),
            }
        )
    return examples


def write(folder, dtype="float32", **manifest):
    """A folder of EXAMPLES in shards of SHARD; the examples."""
    examples = make_examples()
    for example in examples:
        example |= {kind: example[kind].astype(dtype) for kind in ("image", "text")}
    for k, first in enumerate(range(0, EXAMPLES, SHARD)):
        rows, offset = examples[first : first + SHARD], 0
        np.save(folder / f"image-{k:05d}.npy", np.stack([row["image"] for row in rows]))
        np.save(folder / f"text-{k:05d}.npy", np.concatenate([row["text"] for row in rows]))
        for row in rows:
            row["text_offset"], offset = offset, offset + len(row["texts"])
        save_rows(folder, k, rows)
    manifest = {
        "version": 1,
        "what": ["image", "text"],
        "d": D,
        "dtype": dtype,
        "shard_rows": SHARD,
        "examples": EXAMPLES,
        "class_names": None,
        "done": True,
        **manifest,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return examples


def save_rows(folder, k, rows, schema=SCHEMA):
    path = str(folder / f"rows-{k:05d}.arrow")
    table = pa.Table.from_pylist([{n: row[n] for n in schema.names} for row in rows], schema)
    with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_table(table)


def good(examples):
    return [example for example in examples if not example["bad"]]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_examples_come_back_without_the_bad_ones(tmp_path, dtype):
    examples = good(write(tmp_path, dtype))
    source = Embeddings(path=str(tmp_path))
    assert len(source) == len(examples) == 17 and source.class_names is None
    for i in reversed(range(len(source))):
        got, want = source[i], examples[i]
        assert got["image"].dtype == np.float32
        np.testing.assert_array_equal(got["image"], want["image"].astype(np.float32))
        for key in ("id", "texts", "languages", "weights", "label"):
            assert got.get(key) == want[key], (i, key)
        assert (want["label"] is None) == ("label" not in got)
    for i in (-1, 17):
        with pytest.raises(IndexError):
            source[i]


def test_bad_examples_are_counted_by_file(tmp_path):
    write(tmp_path)
    folder = str(tmp_path)
    assert Embeddings(path=folder).damage == {
        ("damaged image", f"{folder}/rows-00000.arrow"): 2,
        ("damaged image", f"{folder}/rows-00001.arrow"): 1,
        ("damaged image", f"{folder}/rows-00002.arrow"): 3,
    }


def test_images_stay_in_their_files(tmp_path):
    write(tmp_path)
    image = Embeddings(path=str(tmp_path))[0]["image"]
    while not isinstance(image, np.memmap) and image.base is not None:
        image = image.base
    assert isinstance(image, np.memmap) or "mmap" in type(image).__name__


def test_few_shards_are_open_at_a_time(tmp_path, monkeypatch):
    examples = good(write(tmp_path))
    monkeypatch.setattr(embeddings, "MAX_OPEN", 1)
    source = Embeddings(path=str(tmp_path))
    for i in (0, 16, 1, 15, 2):
        assert source[i]["id"] == examples[i]["id"]
    assert source._open.cache_info().currsize == 1


def test_languages(tmp_path):
    examples = good(write(tmp_path))
    found = Embeddings(path=str(tmp_path)).by_language()
    assert list(found) == ["de", "en", "ja"]
    for tag, indices in found.items():
        assert indices.tolist() == [i for i, e in enumerate(examples) if tag in e["languages"]]
    balanced = Languages(Embeddings(path=str(tmp_path)), 2.0)
    texts = {text for i in range(len(balanced)) for text in balanced[i]["texts"]}
    assert texts == {text for example in examples for text in example["texts"]}


def test_without_languages_there_are_none(tmp_path):
    examples = write(tmp_path)
    for k, first in enumerate(range(0, EXAMPLES, SHARD)):
        rows = [{**row, "languages": None} for row in examples[first : first + SHARD]]
        save_rows(tmp_path, k, rows)
    source = Embeddings(path=str(tmp_path))
    assert source.by_language() == {} and "languages" not in source[0]


@pytest.mark.parametrize("kind", ["image", "text"])
def test_arrays_are_all_rows_in_order(tmp_path, kind):
    examples = good(write(tmp_path, "float16"))
    source = Embeddings(path=str(tmp_path))
    vectors, ids = source.arrays(kind)
    want = np.concatenate([np.atleast_2d(e[kind]) for e in examples if len(e[kind])])
    assert vectors.shape == want.shape and vectors.dtype == np.float16 and len(ids) == len(want)
    np.testing.assert_array_equal(vectors[:], want, strict=True)
    for where in (slice(0, 0), slice(3, 9), slice(5, 16), slice(7, None), slice(0, 99, 3)):
        np.testing.assert_array_equal(vectors[where], want[where], strict=True)
    for i in range(len(want)):
        example, text = vectors.example(i)
        np.testing.assert_array_equal(vectors[i], want[i])
        assert ids[i] == examples[example]["id"] == source[example]["id"]
        row = examples[example][kind]
        np.testing.assert_array_equal(want[i], row[text] if kind == "text" else row)
    assert ids[2:5] == [ids[2], ids[3], ids[4]]
    for i in (-1, len(want)):
        with pytest.raises(IndexError):
            vectors[i]


def test_one_kind_alone(tmp_path):
    write(tmp_path, what=["text"])
    for path in tmp_path.glob("image-*"):
        path.unlink()
    source = Embeddings(path=str(tmp_path))
    with pytest.raises(UserError, match="no embeddings of images; embed again with --what image"):
        source[0]
    with pytest.raises(UserError, match="has no embeddings of kind 'image'"):
        source.arrays("image")
    assert len(source.arrays("text")[0]) > 0


def test_the_loader_trains_on_the_stored_rows(tmp_path):
    examples = good(write(tmp_path))

    class Preprocess:
        def example(self, example, rng):
            return {"image": example["image"], "text": np.zeros(2, np.int32)}

    source = SOURCES["embeddings"](path=str(tmp_path))
    seen = []
    with loader.train_batches(source, Preprocess(), batch_size=5, seed=1) as batches:
        for _, batch in zip(range(7), batches):
            assert batch["mask"].all() and batch["image"].dtype == np.float32
            seen += batch["index"].tolist()
            rows = np.stack([examples[i]["image"] for i in batch["index"]])
            np.testing.assert_array_equal(batch["image"], rows)
    assert sorted(seen[:17]) == list(range(17))


def cut(path: pathlib.Path):
    path.write_bytes(path.read_bytes()[:-1])


def test_files_that_do_not_fit_are_refused(tmp_path):
    examples = write(tmp_path)
    again = r"run the same `python -m programs.embed` again"
    saved = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def refused(told):
        with pytest.raises(UserError, match=told) as caught:
            Embeddings(path=str(tmp_path))
        assert "\n" not in str(caught.value)
        for path, contents in saved.items():
            path.write_bytes(contents)

    image, rows = tmp_path / "image-00001.npy", tmp_path / "rows-00001.arrow"
    rows.unlink()
    refused(rf"is not finished: shard 1 of 3 is missing; {again}")
    rows.unlink()
    (tmp_path / "rows-00002.arrow").unlink()
    refused(r"shard 1 of 3 is missing, 2 in all")
    (tmp_path / "text-00002.npy").unlink()
    refused(rf"text-00002.npy is missing or damaged \(.*\); {again}, which makes it anew")
    for path in (image, rows):
        cut(path)
        refused(f"{path.name} is missing or damaged")
    image.write_bytes(saved[image] + b"x")
    refused(r"image-00001.npy is missing .* \(it is longer than its header says\)")
    np.save(image, np.zeros((9, D), np.float32))
    refused(r"float32\[9, 4\], not float32\[10, 4\]")
    np.save(image, np.zeros((10, D), np.float64))
    refused(r"float64\[10, 4\], not float32\[10, 4\]")
    np.save(image, np.zeros((10, D), object), allow_pickle=True)
    refused(r"image-00001.npy is missing or damaged")
    save_rows(tmp_path, 1, examples[10:19])
    refused(r"rows-00001.arrow is missing or damaged \(9 rows of 8 columns, not 10\)")
    save_rows(tmp_path, 1, examples[9:19])
    refused("its rows are not 10 to 19 of the source")
    changed = [{**row, "text_offset": 0} for row in examples[10:20]]
    save_rows(tmp_path, 1, changed)
    refused("its text_offset is not the sum of the texts before")
    changed = [dict(row) for row in examples[10:20]]
    changed[-1]["texts"] = [*changed[-1]["texts"], "one more"]
    save_rows(tmp_path, 1, changed)
    refused(r"text-00001.npy is missing or damaged")
    save_rows(tmp_path, 1, examples[10:20], pa.schema(list(SCHEMA)[:-1]))
    refused("10 rows of 7 columns")
    assert len(Embeddings(path=str(tmp_path))) == 17


def test_manifests_that_are_none_are_refused(tmp_path):
    write(tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())

    def refused(told, contents):
        path.write_text(contents if isinstance(contents, str) else json.dumps(contents))
        with pytest.raises(UserError, match=told):
            Embeddings(path=str(tmp_path))

    refused("is not finished; run the same", manifest | {"done": False})
    refused("is of version 2, this program reads 1", manifest | {"version": 2})
    refused(r"manifest.json cannot be read \(Expecting", "{")
    refused("is no manifest of embeddings", "[]")
    for key, value in (("d", "4"), ("what", ["sound"]), ("dtype", "int8"), ("shard_rows", 0)):
        refused("is no manifest of embeddings", manifest | {key: value})
    for key in manifest:
        refused("is no manifest of embeddings", {k: v for k, v in manifest.items() if k != key})
    path.unlink()
    with pytest.raises(UserError, match=r"has no manifest.json; set `path` to a folder"):
        Embeddings(path=str(tmp_path))
    with pytest.raises(UserError, match=r"has no manifest.json"):
        Embeddings(path=str(tmp_path / "nowhere"))


def test_more_shards_than_can_be_open_are_read_in_blocks(tmp_path, monkeypatch):
    """A permutation of everything would open a file for almost every row."""
    write(tmp_path)
    assert Embeddings(path=str(tmp_path)).blocks is None
    monkeypatch.setattr(embeddings, "MAX_OPEN", 2)
    monkeypatch.setattr(Embeddings, "window", 1)
    source = Embeddings(path=str(tmp_path))
    assert source.blocks.tolist() == [0, 8, 17, 17]
    order = order_of(source, 0)
    epoch = [order[i] for i in range(len(source))]
    assert sorted(epoch) == list(range(17))
    assert sorted(epoch[:8]) == list(range(8)) or sorted(epoch[:9]) == list(range(8, 17))
