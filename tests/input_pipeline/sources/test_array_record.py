"""Records of ArrayRecord files, without TensorFlow."""

import concurrent.futures
import pathlib
import re
import sys

import fsspec
import numpy as np
import processes
import pytest
from array_record.python.array_record_module import (  # pyright: ignore[reportMissingImports]
    ArrayRecordWriter,
)

from base.errors import UserError
from input_pipeline.errors import BadExample
from input_pipeline.sources import array_record
from input_pipeline.sources.array_record import ArrayRecord, TfExample


def image(i):
    return f"bytes of {i}".encode() * 20


def record(**features):
    example = TfExample()
    for name, values in features.items():
        feature = example.features.feature[name]
        kind = {bytes: "bytes_list", int: "int64_list", float: "float_list"}[type(values[0])]
        getattr(feature, kind).value.extend(values)
    return example.SerializeToString()


def records(start, stop):
    return [
        record(
            image=[image(i)],
            caption=[f"caption {i} {j} é".encode() for j in range(1 + i % 2)],
            label=[i % 3],
            language=[b"de" if i % 2 else b"en"],
            height=[1.5],
        )
        for i in range(start, stop)
    ]


def write(path, data, group=1):
    writer = ArrayRecordWriter(str(path), f"group_size:{group},uncompressed")
    for one in data:
        writer.write(one)
    writer.close()
    return str(path)


def assert_refused(pattern, **kw):
    with pytest.raises(UserError, match=re.escape(pattern)) as error:
        ArrayRecord(**kw)
    assert "\n" not in str(error.value)


def bad(source, i):
    with pytest.raises(BadExample) as error:
        source[i]
    return error.value


def test_examples_are_what_was_written_in_the_order_of_the_files(tmp_path):
    for k, (start, stop) in enumerate([(0, 12), (12, 12), (12, 20)]):
        write(tmp_path / f"x.array_record-0000{k}-of-00003", records(start, stop), group=1 + 2 * k)
    path = f"{tmp_path}/x.array_record*"
    source = ArrayRecord(path=path, label="label", language="language")
    assert len(source) == 20 and source.class_names is None
    for i in range(20):
        file, row = (0, i) if i < 12 else (2, i - 12)
        name = f"x.array_record-0000{file}-of-00003"
        texts = [f"caption {i} {j} é" for j in range(1 + i % 2)]
        assert source[i] == {
            "image": image(i),
            "texts": texts,
            "languages": ["de" if i % 2 else "en"] * len(texts),
            "label": i % 3,
            "id": f"{name}[{row}]",
            "shard": f"{tmp_path}/{name}",
        }
    assert set(ArrayRecord(path=path)[0]) == {"image", "texts", "id", "shard"}
    assert ArrayRecord(path=path, text="")[0]["texts"] == []
    for i in (-1, 20):
        with pytest.raises(IndexError):
            source[i]


def test_languages_are_found_in_one_pass(tmp_path, monkeypatch):
    data = [
        record(image=[b"i"], caption=[b"a", b"", b"b"], language=[b"en", b"fr", b"de"]),
        record(image=[b"i"], caption=[b"a"], language=[b"de"]),
        record(image=[b"i"], caption=[b""], language=[b"de"]),
        record(image=[b"i"], caption=[b"a"]),
        record(image=[b"i"], caption=[b"a", b"b", b"c"], language=[b"de", b"en"]),
    ]
    paths = write(tmp_path / "a", data), write(tmp_path / "b", data[:2])
    source = ArrayRecord(path=paths, language="language")
    read, passes = ArrayRecord._record, []
    monkeypatch.setattr(
        ArrayRecord, "_record", lambda self, *at: (passes.append(at), read(self, *at))[1]
    )
    found = source.by_language()
    assert source.by_language() is found and len(passes) == 7
    assert {k: v.tolist() for k, v in found.items()} == {"de": [0, 1, 5, 6], "en": [0, 5]}
    assert found["de"].dtype == np.int64
    assert source[0]["languages"] == ["en", "de"] and source[3]["languages"] == [""]
    assert bad(source, 4).kind == "damaged record"
    assert ArrayRecord(path=paths[1]).by_language() == {}


def test_several_features_of_captions_share_the_draws_by_their_weights(tmp_path):
    data = [
        record(image=[b"i"], caption=[b"a"], alt=[b"x", b"y"]),
        record(image=[b"i"], caption=[b" "], alt=[b"x"]),
        record(image=[b"i"], caption=[b"a"]),
    ]
    path = write(tmp_path / "a", data)
    source = ArrayRecord(path=path, text=(("caption", 0.4), ("alt", 0.6)))
    assert [(e["texts"], e["weights"]) for e in (source[i] for i in range(3))] == [
        (["a", "x", "y"], [0.4, 0.3, 0.3]),
        (["x"], [0.6]),
        (["a"], [0.4]),
    ]


def test_class_names_stand_beside_the_files(tmp_path):
    write(tmp_path / "a.array_record", records(0, 3))
    (tmp_path / "label.labels.txt").write_text("ant\nbee\nÄsche\n", encoding="utf-8")
    path = str(tmp_path / "*.array_record")
    assert ArrayRecord(path=path, label="label").class_names == ["ant", "bee", "Äsche"]
    assert ArrayRecord(path=path).class_names is None
    (tmp_path / "label.labels.txt").write_bytes(b"\xff")
    assert_refused("label.labels.txt cannot be read", path=path, label="label")


@pytest.mark.parametrize("open_at_once", [256, 1])
def test_many_threads_read_what_one_reads(tmp_path, monkeypatch, open_at_once):
    monkeypatch.setattr(array_record, "MAX_OPEN", open_at_once)
    paths = tuple(write(tmp_path / f"{k}", records(50 * k, 50 * k + 50)) for k in range(3))
    source = ArrayRecord(path=paths)
    order = np.random.default_rng(0).integers(0, 150, 1500).tolist()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for i, example in zip(order, pool.map(source.__getitem__, order)):
            assert example["image"] == image(i) and example["texts"][0] == f"caption {i} 0 é"
    assert len(source._readers) == min(3, open_at_once)


def test_files_at_urls_are_copied_once(tmp_path, monkeypatch):
    monkeypatch.setattr(array_record, "COPY_BYTES", 1000)
    memory = fsspec.filesystem("memory")
    for k in range(2):
        local = write(tmp_path / f"{k}", records(10 * k, 10 * k + 10))
        memory.pipe(f"/records/{k}.array_record", pathlib.Path(local).read_bytes())
    memory.pipe("/records/label.labels.txt", b"ant\nbee\ncat\n")
    given = {"path": "memory:///records/*.array_record", "cache": str(tmp_path / "cache")}
    source = ArrayRecord(**given, label="label")
    assert [source[i]["image"] for i in range(20)] == [image(i) for i in range(20)]
    assert source[0]["shard"] == "memory:///records/0.array_record"
    assert source.class_names == ["ant", "bee", "cat"]
    copies = sorted((tmp_path / "cache").iterdir())
    assert len(copies) == 2
    monkeypatch.setattr(array_record, "_copy", None)  # nothing more to copy
    assert ArrayRecord(**given)[19]["image"] == image(19)
    monkeypatch.undo()

    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(ArrayRecord(path=given["path"])) == 20
    assert len(list((tmp_path / ".cache/siglip-jax/array_record").iterdir())) == 2

    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    assert_refused(
        "set `cache` to a larger disk", path=given["path"], cache=str(tmp_path / "small")
    )
    monkeypatch.undo()
    monkeypatch.setattr(array_record.Blob, "read", lambda self, size, offset: b"short")
    assert_refused("cannot be copied to", path=given["path"], cache=str(tmp_path / "short"))
    assert not list((tmp_path / "short").iterdir())


def test_a_flipped_byte_spoils_its_record_alone(tmp_path):
    path = tmp_path / "x"
    write(path, records(0, 20))
    data = path.read_bytes()
    at = data.index(b"bytes of 7")
    path.write_bytes(data[:at] + b"B" + data[at + 1 :])
    source = ArrayRecord(path=str(path), language="language")
    for i in range(20):
        if i == 7:
            error = bad(source, i)
            assert (error.kind, error.id, error.shard) == ("damaged record", "x[7]", str(path))
        else:
            assert source[i]["image"] == image(i)
    assert 7 not in source.by_language()["de"] and 9 in source.by_language()["de"]


def test_records_that_do_not_fit_are_bad_examples(tmp_path):
    good = record(image=[b"i"], caption=[b"a"], label=[1])
    kinds = {
        record(caption=[b"a"], label=[1]): "no image",
        record(image=[b""], caption=[b"a"], label=[1]): "no image",
        record(image=[b"i", b"j"], caption=[b"a"], label=[1]): "damaged record",
        record(image=[1], caption=[b"a"], label=[1]): "damaged record",
        record(image=[b"i"], caption=[b"\xff"], label=[1]): "caption not UTF-8",
        record(image=[b"i"], caption=[1.0], label=[1]): "damaged record",
        record(image=[b"i"], caption=[b"a"]): "damaged record",
        record(image=[b"i"], caption=[b"a"], label=[1, 2]): "damaged record",
        b"\x0a\xff": "damaged record",
        b"": "no image",
    }
    path = write(tmp_path / "x", [good] * 100 + list(kinds))
    source = ArrayRecord(path=path, label="label")
    assert source[0]["texts"] == ["a"]
    assert [bad(source, 100 + k).kind for k in range(len(kinds))] == list(kinds.values())


def test_mutated_records_parse_or_are_bad_examples(tmp_path):
    good, rng, outcomes = records(3, 4)[0], np.random.default_rng(0), set()
    source = ArrayRecord(path=write(tmp_path / "x", [good]), label="label", language="language")
    for k in range(2000):
        data = np.frombuffer(good, np.uint8).copy()
        places = rng.integers(0, len(data), 1 + k % 3)
        # Tags and lengths are what matters; the image is most of the bytes.
        places[0] = rng.integers(0, 2) * (len(data) - 120) + rng.integers(0, 120)
        data[places] = rng.integers(0, 256, len(places))
        cut = data[: rng.integers(0, len(data))] if k % 4 == 0 else data
        try:
            source._example(array_record._features(cut.tobytes()), id="a", shard="b")
            outcomes.add("parsed")
        except BadExample as error:
            outcomes.add(error.kind)
    assert {"parsed", "damaged record", "no image"} <= outcomes


def test_mistakes(tmp_path):
    path = write(tmp_path / "x", records(0, 5))
    assert_refused("has no feature image='imag'; the nearest: image", path=path, image="imag")
    assert_refused(
        "has no feature text='captions'; the nearest: caption", path=path, text="captions"
    )
    assert_refused("feature image='label' of", path=path, image="label")
    assert_refused("is int64_list, not bytes_list", path=path, text="label")
    assert_refused("feature label='caption' of", path=path, label="caption")
    assert_refused("is float_list, not int64_list", path=path, label="height")
    assert_refused("has no feature language='lang'", path=path, language="lang")
    assert_refused(
        "text=('caption', 1.0) is neither a name nor pairs", path=path, text=("caption", 1.0)
    )
    assert_refused("no file matches", path=str(tmp_path / "*.no"))
    assert_refused("no.array_record cannot be read", path=str(tmp_path / "no.array_record"))
    assert_refused("has no records", path=write(tmp_path / "e", []))
    assert_refused("are not tf.train.Example", path=write(tmp_path / "t", [b"some text"] * 3))
    data = pathlib.Path(path).read_bytes()
    for damaged in (data[:-1], data[: len(data) // 2], data[:10], b"", b"\0" * 200_000):
        (tmp_path / "d").write_bytes(damaged)
        assert_refused(
            f"{tmp_path}/d cannot be read as an ArrayRecord file", path=str(tmp_path / "d")
        )
    (tmp_path / "file").touch()
    fsspec.filesystem("memory").pipe("/mistake/x", data)
    assert_refused("cannot be made", path="memory:///mistake/x", cache=str(tmp_path / "file"))


def test_reading_imports_no_tensorflow(tmp_path):
    path = write(tmp_path / "x", records(0, 5))
    code = (
        "import sys\n"
        "from input_pipeline.sources.array_record import ArrayRecord\n"
        f"assert ArrayRecord(path={path!r})[0]['texts'] == ['caption 0 0 é']\n"
        "print([m for m in ('tensorflow', 'torch') if m in sys.modules])\n"
    )
    done = processes.run([sys.executable, "-c", code])
    assert done.stdout.split() == ["[]"]
