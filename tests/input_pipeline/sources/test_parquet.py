"""Rows of Parquet files, by row group."""

import concurrent.futures
import contextlib
import io
import json
import re
import threading
import time

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from base.errors import UserError
from input_pipeline.errors import BadExample
from input_pipeline.sources.parquet import Parquet

HUGGING_FACE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def image(i):
    return f"bytes of {i}".encode() * 20


def columns(start, stop, **more):
    rows = range(start, stop)
    return {
        "image": pa.array([{"bytes": image(i), "path": f"{i}.png"} for i in rows], HUGGING_FACE),
        "caption": pa.array([f"caption {i} é" for i in rows]),
        "wide": pa.array([b"x" * 1000 for _ in rows]),  # what nobody asks for
        **more,
    }


def write(path, data, group=10, names=None, **kw):
    table = pa.table(data)
    if names:
        about = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    kw = {"row_group_size": group, "write_page_checksum": True, **kw}
    if "://" in str(path):
        with fsspec.open(str(path), "wb") as file:
            pq.write_table(table, file, **kw)
    else:
        pq.write_table(table, path, **kw)
    return str(path)


def assert_refused(pattern, **kw):
    with pytest.raises(UserError, match=re.escape(pattern)) as error:
        Parquet(**kw)
    assert "\n" not in str(error.value)


def bad(source, i):
    with pytest.raises(BadExample) as error:
        source[i]
    return error.value


def counted(monkeypatch):
    """Row groups that are decoded from now on, slowly."""
    decoded, read = [], pq.ParquetFile.read_row_group

    def slow(self, group, columns=None, **kw):
        decoded.append((group, columns))
        time.sleep(0.05)
        return read(self, group, columns, **kw)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", slow)
    return decoded


@pytest.mark.parametrize("place", ["{}", "memory:///parquet{}"])
def test_examples_are_what_was_written_in_the_order_of_the_files(tmp_path, place):
    folder = place.format(tmp_path)
    for k, (start, stop) in enumerate([(0, 25), (25, 25), (25, 38)]):
        write(f"{folder}/{k}.parquet", columns(start, stop))
    source = Parquet(path=f"{folder}/*.parquet")
    assert len(source) == 38 and source.class_names is None
    for i in range(38):
        file, row = (0, i) if i < 25 else (2, i - 25)
        assert source[i] == {
            "image": image(i),
            "texts": [f"caption {i} é"],
            "id": f"{file}.parquet[{row}]",
            "shard": f"{folder}/{file}.parquet",
        }
    assert source.blocks.tolist() == [0, 10, 20, 25, 35, 38] and source.window == 8
    assert source.blocks.dtype == np.int64
    for i in (-1, 38):
        with pytest.raises(IndexError):
            source[i]


def test_images_as_bytes_or_as_paths(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(image(i))
    names = [f"{i}.png" for i in range(3)]
    captions = {"caption": pa.array(["a", "b", "c"])}
    for kind in (pa.binary(), pa.large_binary(), pa.binary_view()):
        path = write(tmp_path / "b.parquet", captions | {"x": pa.array(map(image, range(3)), kind)})
        assert Parquet(path=path, image="x")[2]["image"] == image(2)
    plain = pa.array(names)
    for values in (plain, plain.cast(pa.large_string()), plain.dictionary_encode()):
        path = write(tmp_path / "p.parquet", captions | {"image": values})
        source = Parquet(path=path, images=str(tmp_path / "pictures"))
        assert [source[i]["image"] for i in range(3)] == [image(i) for i in range(3)]
    beside = write(tmp_path / "pictures" / "p.parquet", captions | {"image": plain})
    assert Parquet(path=beside)[1]["image"] == image(1)
    (tmp_path / "pictures" / "1.png").unlink()
    assert bad(Parquet(path=beside), 1).kind == "no image"
    # Hugging Face: bytes, and where there are none, the path.
    rows = [{"bytes": None, "path": "2.png"}, {"bytes": b"B", "path": "gone.png"}]
    mixed = pa.array([*rows, {"bytes": b"", "path": None}], HUGGING_FACE)
    path = write(tmp_path / "pictures" / "h.parquet", captions | {"image": mixed})
    assert [Parquet(path=path)[i]["image"] for i in range(2)] == [image(2), b"B"]
    assert bad(Parquet(path=path), 2).kind == "no image"


def test_images_by_path_at_urls(tmp_path):
    fsspec.filesystem("memory").pipe("/by_path/images/a.png", b"A")
    data = {"image": pa.array(["images/a.png"]), "caption": pa.array(["a"])}
    assert Parquet(path=write("memory://by_path/t.parquet", data))[0]["image"] == b"A"
    data["image"] = pa.array(["memory://by_path/images/a.png"])
    path = write(tmp_path / "t.parquet", data)
    assert Parquet(path=path, images="memory://by_path")[0]["image"] == b"A"
    with pytest.raises(UserError, match=r"its path is a URL, memory:.*; set `images` to"):
        Parquet(path=path)
    data = {"image": pa.array(["images/a.png", "pipe://rm"]), "caption": pa.array(["a", "b"])}
    assert bad(Parquet(path=write("memory://by_path/p.parquet", data)), 1).kind == "no image"


def test_captions_of_every_type(tmp_path):
    want = [["one", "two"], [], [], ["three"]]
    values = [["one", " ", "two"], None, [], ["three", None]]
    inside = (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()))
    kinds = [make(kind) for kind in inside for make in (pa.list_, pa.large_list)]
    for kind in kinds:
        array = pa.array(values, pa.list_(pa.string())).cast(kind)
        path = write(tmp_path / "t.parquet", columns(0, 4) | {"caption": array})
        assert [Parquet(path=path)[i]["texts"] for i in range(4)] == want, kind
    single = pa.array(["a", None, "", "a"]).dictionary_encode()
    path = write(tmp_path / "t.parquet", columns(0, 4) | {"caption": single})
    assert [Parquet(path=path)[i]["texts"] for i in range(4)] == [["a"], [], [], ["a"]]
    assert Parquet(path=path, text="")[0]["texts"] == []


def test_several_columns_of_captions_share_the_draws_by_their_weights(tmp_path):
    more = {
        "alt": pa.array([["x", "y"], ["x", ""], [], ["x"]]),
        "tongues": pa.array([["de", "fr", "en"], ["de", "en", "en"], ["de"], None]),
        "wide_language": pa.array(["cs"] * 4),
    }
    path = write(tmp_path / "t.parquet", columns(0, 4, **more))
    pairs = (("alt", 0.6), ("caption", 0.4))
    source = Parquet(path=path, text=pairs, language="tongues")
    assert source[0]["texts"] == ["x", "y", "caption 0 é"]
    assert source[0]["weights"] == [0.3, 0.3, 0.4]
    assert source[0]["languages"] == ["de", "fr", "en"]
    assert source[1]["weights"] == [0.6, 0.4] and source[1]["languages"] == ["de", "en"]
    assert source[2]["weights"] == [0.4] and source[2]["languages"] == ["de"]
    assert source[3]["languages"] == ["", ""]
    same = Parquet(path=path, text=pairs, language="wide_language")
    assert same[0]["languages"] == ["cs"] * 3
    assert {k: v.tolist() for k, v in source.by_language().items()} == {
        "de": [0, 1, 2],
        "en": [0, 1],
        "fr": [0],
    }


def test_languages_of_rows_are_found_by_reading_their_column_alone(tmp_path, monkeypatch):
    tongues = [["de", "en", None, ""][i % 4] for i in range(25)]
    for array in (pa.array(tongues), pa.array(tongues).dictionary_encode()):
        path = write(tmp_path / "t.parquet", columns(0, 25, lang=array))
        source = Parquet(path=path, language="lang")
        assert source[4]["languages"] == ["de"] and source[2]["languages"] == [""]
        with monkeypatch.context() as patch:
            decoded = counted(patch)
            found = source.by_language()
            assert found is source.by_language()
        assert sorted(decoded) == [(group, ["lang"]) for group in range(3)]
        assert {k: v.tolist() for k, v in found.items()} == {
            "de": [*range(0, 25, 4)],
            "en": [*range(1, 25, 4)],
        }
        assert found["de"].dtype == np.int64
    assert Parquet(path=path).by_language() == {}


def test_classes_and_their_names(tmp_path):
    label = pa.array([0, 1, 1, None], pa.int8())
    path = write(tmp_path / "t.parquet", columns(0, 4, label=label), names=["ant", "bee"])
    source = Parquet(path=path, label="label")
    assert source.class_names == ["ant", "bee"]
    assert [source[i]["label"] for i in range(3)] == [0, 1, 1]
    assert bad(source, 3).kind == "damaged record"
    assert Parquet(path=path).class_names is None
    other = write(tmp_path / "u.parquet", columns(0, 4, label=label), names=["bee", "ant"])
    assert_refused("has other classes of 'label'", path=(path, other), label="label")
    plain = write(tmp_path / "v.parquet", columns(0, 4, label=label))
    assert Parquet(path=plain, label="label").class_names is None


def test_many_threads_read_what_one_reads(tmp_path):
    path = write(tmp_path / "t.parquet", columns(0, 200))
    one, many = Parquet(path=path), Parquet(path=path, window=1)
    order = np.random.default_rng(0).integers(0, 200, 500).tolist()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for i, example in zip(order, pool.map(many.__getitem__, order)):
            assert example == one[i]


def test_one_thread_decodes_a_row_group_that_all_want(tmp_path, monkeypatch):
    source = Parquet(path=write(tmp_path / "t.parquet", columns(0, 30)))
    decoded, start = counted(monkeypatch), threading.Barrier(8, timeout=600)

    def read(i):
        start.wait()
        return source[i]["image"]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(10, 18))) == [image(i) for i in range(10, 18)]
    assert decoded == [(1, ["image", "caption"])]


def test_two_windows_of_row_groups_are_kept_and_no_more(tmp_path, monkeypatch):
    source = Parquet(path=write(tmp_path / "t.parquet", columns(0, 60)), window=2)
    decoded = counted(monkeypatch)
    for i in (0, 10, 20, 30, 0, 10, 20, 30):
        source[i]
    assert [group for group, _ in decoded] == [0, 1, 2, 3]
    source[0]
    source[40]  # takes the place of group 1, the longest unused
    for i in (0, 20, 30, 10):
        source[i]
    assert [group for group, _ in decoded] == [0, 1, 2, 3, 4, 1]


def test_footers_beyond_the_limit_are_read_again(tmp_path, monkeypatch):
    path = write(tmp_path / "t.parquet", columns(0, 30))
    assert Parquet(path=path)._footers != [None]
    monkeypatch.setattr("input_pipeline.sources.parquet.MAX_FOOTER_BYTES", 0)
    source = Parquet(path=path)
    assert source._footers == [None]
    assert [source[i]["image"] for i in range(30)] == [image(i) for i in range(30)]


@pytest.mark.parametrize("kept", [0, 1 << 20])
def test_a_file_that_is_replaced_is_damaged(tmp_path, monkeypatch, kept):
    monkeypatch.setattr("input_pipeline.sources.parquet.MAX_FOOTER_BYTES", kept)
    path = tmp_path / "t.parquet"
    other = {"image": columns(0, 10)["image"], "text": pa.array(["a"] * 10)}
    for replacement in (columns(0, 5), columns(0, 15), other):
        source = Parquet(path=write(path, columns(0, 30)))
        write(path, replacement)
        assert bad(source, 25).kind == "damaged record"
        for i in (9, 12):
            with contextlib.suppress(BadExample):
                assert source[i]["image"] == image(i)


def test_a_damaged_page_spoils_its_row_group_alone(tmp_path, monkeypatch):
    path = tmp_path / "t.parquet"
    write(path, columns(0, 30), compression="none", use_dictionary=False)
    path.write_bytes(path.read_bytes().replace(b"bytes of 17", b"bytes of XX", 1))
    source = Parquet(path=str(path))
    decoded = counted(monkeypatch)
    for i in range(30):
        if 10 <= i < 20:
            error = bad(source, i)
            assert error.kind == "damaged record" and "row group 1" in error.detail
            assert error.id == f"t.parquet[{i}]" and error.shard == str(path)
        else:
            assert source[i]["image"] == image(i)
    assert [group for group, _ in decoded] == [0, 1, 2]  # the failure is kept, too


def test_what_is_not_utf8_spoils_its_row_alone(tmp_path):
    raw = pa.array([b"a", b"\xff\xfe", b"c"])
    path = write(tmp_path / "t.parquet", columns(0, 3) | {"caption": raw.view(pa.string())})
    source = Parquet(path=path)
    assert bad(source, 1).kind == "caption not UTF-8"
    assert [source[0]["texts"], source[2]["texts"]] == [["a"], ["c"]]
    rows = pa.array([None, {"bytes": None, "path": None}, {"bytes": b"x"}], HUGGING_FACE)
    source = Parquet(path=write(tmp_path / "t.parquet", columns(0, 3) | {"image": rows}))
    assert [bad(source, i).kind for i in range(2)] == ["no image"] * 2
    assert bad(source, 1).id == "t.parquet[1]"


def test_a_file_that_goes_is_no_damage_and_may_come_back(tmp_path):
    path = tmp_path / "t.parquet"
    source = Parquet(path=write(path, columns(0, 10)))
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"t\.parquet cannot be read"):
        source[0]
    (tmp_path / "elsewhere").rename(path)
    assert source[0]["image"] == image(0)


def test_mutated_files_give_errors_that_are_told(tmp_path):
    file = io.BytesIO()
    more = {"label": pa.array(range(20)), "lang": pa.array(["de", "en"] * 10)}
    table = pa.table(columns(0, 20, **more)).drop_columns("wide")
    pq.write_table(table, file, row_group_size=10)  # without checksums, as most are
    data, rng, seen = file.getvalue(), np.random.default_rng(0), set()
    path = tmp_path / "m.parquet"
    for k in range(300):
        mutated = np.frombuffer(data, np.uint8).copy()
        places = rng.integers(0, len(data), 1 + k % 3)
        mutated[places] = rng.integers(0, 256, len(places))
        path.write_bytes(mutated[: rng.integers(1, len(data)) if k % 5 == 0 else None].tobytes())
        try:
            source = Parquet(path=str(path), label="label", language="lang")
            source.by_language()
        except UserError as error:
            assert str(path) in str(error)
            seen.add("told")
            continue
        for i in range(min(len(source), 40)):
            try:
                source[i]
                seen.add("read")
            except BadExample as error:
                seen.add(error.kind)
    assert {"told", "read", "damaged record"} <= seen


def test_mistakes(tmp_path):
    label = pa.array([1.0, 2.0])
    path = write(tmp_path / "t.parquet", columns(0, 2, label=label))
    assert_refused("has no column image='imag'; the nearest: image", path=path, image="imag")
    assert_refused(
        "has no column text='captions'; the nearest: caption", path=path, text="captions"
    )
    assert_refused("has no column text='x'; there are: ", path=path, text=(("x", 1.0),))
    assert_refused("column image='label'", path=path, image="label")
    assert_refused("is double, not struct{bytes, path}, binary or string", path=path, image="label")
    assert_refused("text='image' of", path=path, text="image")
    assert_refused("text='wide' of", path=path, text="wide")
    assert_refused("label='caption' of", path=path, label="caption")
    assert_refused("label='label' of", path=path, label="label")
    assert_refused("has no column language='lang'", path=path, language="lang")
    assert_refused("language='label' of", path=path, language="label")
    assert_refused("window=0", path=path, window=0)
    for text in (("caption", 1.0), (("caption", 0.0),), (("caption", -1.0), ("wide", 2.0)), 3):
        assert_refused("is neither a name nor pairs", path=path, text=text)
    assert_refused("is neither a name nor pairs", path=path, text=(("caption", float("nan")),))
    assert_refused("no file matches", path=str(tmp_path / "*.pq"))
    assert_refused("no.parquet cannot be read", path=str(tmp_path / "no.parquet"))
    data = (tmp_path / "t.parquet").read_bytes()
    for damaged in (data[:-1], data[: len(data) // 2], b"", b"PAR1", data[:-12] + b"\0" * 12):
        (tmp_path / "d.parquet").write_bytes(damaged)
        assert_refused(
            "d.parquet cannot be read as a Parquet file", path=str(tmp_path / "d.parquet")
        )
    assert_refused("has no rows", path=write(tmp_path / "e.parquet", columns(0, 0)))
    names = {"image": pa.array(["no.png"]), "caption": pa.array(["a"])}
    assert_refused(
        "no.png, which does not exist; set `images`", path=write(tmp_path / "n.parquet", names)
    )
