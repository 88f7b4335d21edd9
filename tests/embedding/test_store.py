"""A source embedded into files: what is in them, and that no kill leaves a gap or a row twice."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pyarrow as pa
import pytest
import tiny_embed
from tiny_embed import BAD, EXAMPLES, SHARD, Model, Preprocess, Source

from base.errors import UserError
from embedding import job, store

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder that was made without interruption."""
    out = tmp_path_factory.mktemp("whole")
    tiny_embed.embed(out)
    return out


def process(out, kill, *words, code):
    """Embeds in a process of its own, which ends with this exit code."""
    command = [sys.executable, tiny_embed.__file__, str(out), kill, *words]
    path = os.pathsep.join([str(ROOT), str(pathlib.Path(tiny_embed.__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": path}
    processes.run(command, env=environment, cwd=ROOT, code=code)


def expected(kind, examples=EXAMPLES, bad=BAD):
    """Embeddings without batches, shards or files."""
    params, preprocess, rows = {"params": tiny_embed.make_params()}, Preprocess(), []
    for i in range(examples):
        if kind == "image":
            image = np.zeros((4, 4, 3), np.uint8) if i in bad else Source()[i]["image"]
            zimg = Model().apply(params, image=jnp.asarray(image)[None])[0]
            rows.append(np.asarray(zimg)[0] * (i not in bad))
        elif i not in bad:
            for text in Source()[i]["texts"]:
                tokens = jnp.asarray(preprocess.text(text))[None]
                rows.append(np.asarray(Model().apply(params, text=tokens)[1])[0])
    return np.stack(rows)


def read(out, kind):
    names = sorted(path for path in pathlib.Path(out).glob(f"{kind}-*.npy"))
    return np.concatenate([np.load(name, mmap_mode="r") for name in names])


def tables(out):
    names = sorted(pathlib.Path(out).glob("rows-*.arrow"))
    return [pa.ipc.open_file(pa.memory_map(str(name))).read_all() for name in names]


@pytest.mark.parametrize("kind", ["image", "text"])
def test_every_row_is_the_embedding_of_its_example(whole, kind):
    np.testing.assert_allclose(read(whole, kind), expected(kind), atol=2e-6)
    sizes = [len(np.load(name)) for name in sorted(whole.glob("image-*.npy"))]
    assert sizes == [20, 20, 13]


def test_rows_say_what_each_example_is(whole):
    rows = [row for table in tables(whole) for row in table.to_pylist()]
    assert [row["index"] for row in rows] == list(range(EXAMPLES))
    for i, row in enumerate(rows):
        assert row["bad"] == BAD.get(i, "") and row["id"] == f"id {i}"
        if i not in BAD:
            example = Source()[i]
            assert row["texts"] == example["texts"] and row["languages"] == example["languages"]
            assert row["label"] == example.get("label") and row["weights"] is None
        else:
            assert row["texts"] == [] and row["languages"] is None
    for table in tables(whole):
        texts = [len(row) for row in table.column("texts").to_pylist()]
        assert table.column("text_offset").to_pylist() == [
            sum(texts[:k]) for k in range(len(texts))
        ]


def test_the_manifest_says_what_was_embedded(whole):
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest == {
        **tiny_embed.DESCRIPTION,
        "version": 1,
        "params_sha256": job.hash_params(tiny_embed.make_params()),
        "what": ["image", "text"],
        "d": 8,
        "dtype": "float32",
        "shard_rows": SHARD,
        "examples": EXAMPLES,
        "examples_sha256": manifest["examples_sha256"],
        "class_names": ["x", "y"],
        "jax": jax.__version__,
        "done": True,
        "rows": EXAMPLES,
        "texts": len(expected("text")),
        "bad": {"damaged image": 1, "damaged record": 2},
    }


# Of each shard: 4 batches of images and 4 of texts are appended, in turns; three files (and thrice
# manifest.json: at the start and at the end) get their names, and each fsyncs the file and the
# folder.
KILLS = ["replace:1", "append:1", "append:5", "replace:2", "replace:4", "fsync:8", "append:14"]


@pytest.mark.slow
@pytest.mark.parametrize("kill", KILLS)
def test_killed_at_any_moment_the_same_command_ends_with_the_same_bytes(whole, tmp_path, kill):
    process(tmp_path, kill, code=-signal.SIGKILL)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("rows-*.arrow")}
    assert len(before) < 3 and "done" not in before
    tiny_embed.embed(tmp_path)
    assert tiny_embed.files(tmp_path) == tiny_embed.files(whole)
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("rows-*.arrow")}
    assert before.items() <= kept.items()  # whole shards are not made again


@pytest.mark.slow
def test_killed_several_times_two_processes_write_the_bytes_of_one(whole, tmp_path):
    two = ["process_count=2"]
    process(tmp_path, "append:3", *two, "process_index=0", code=-signal.SIGKILL)
    process(tmp_path, "replace:2", *two, "process_index=1", code=-signal.SIGKILL)
    process(tmp_path, "never", *two, "process_index=1", code=0)
    assert not json.loads((tmp_path / "manifest.json").read_text())["done"]
    process(tmp_path, "never", *two, "process_index=0", code=0)
    assert tiny_embed.files(tmp_path) == tiny_embed.files(whole)


def test_each_process_makes_its_shards_and_the_last_one_marks_the_end(whole, tmp_path):
    first = tiny_embed.embed(tmp_path, process_index=0, process_count=2)
    assert first.manifest is None
    names = sorted(path.name for path in tmp_path.glob("rows-*"))
    assert names == ["rows-00000.arrow", "rows-00002.arrow"]
    second = tiny_embed.embed(tmp_path, process_index=1, process_count=2)
    assert second.manifest and second.manifest["done"]
    assert tiny_embed.files(tmp_path) == tiny_embed.files(whole)


def test_a_process_waits_for_the_manifest_of_process_0(tmp_path):
    with pytest.raises(UserError, match=r"process 0 wrote no .*manifest.json within 0 s"):
        tiny_embed.embed(tmp_path, process_index=1, process_count=2, wait=0)


def test_two_runs_of_the_same_process_are_refused(whole, tmp_path):
    lock = "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.lockf(f, fcntl.LOCK_EX, 1, 0);"
    lock += "print('locked', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", lock, str(tmp_path / ".lock")]
    with processes.started(command, stdin=subprocess.PIPE) as other:
        processes.read_until(other, "locked")
        with pytest.raises(UserError, match="another run of process 0 writes there"):
            tiny_embed.embed(tmp_path)
        other.kill()
    tiny_embed.embed(tmp_path)
    assert tiny_embed.files(tmp_path) == tiny_embed.files(whole)


def test_leftovers_of_this_process_are_removed_and_others_stay(tmp_path):
    for name in (".image-00000.npy.part", ".text-00003.npy.part", ".manifest.json.1.part"):
        (tmp_path / name).write_bytes(b"torn")
    tiny_embed.embed(tmp_path, process_index=0, process_count=2)
    left = sorted(path.name for path in tmp_path.glob(".*.part"))
    assert left == [".manifest.json.1.part", ".text-00003.npy.part"]


def test_a_run_that_is_done_computes_nothing(whole, monkeypatch):
    before = tiny_embed.files(whole)
    monkeypatch.setattr(store.Store, "writer", None)
    lines = []
    result = tiny_embed.embed(whole, progress=lines.append)
    assert lines == ["53 of 53 rows are there already"]
    assert result.bad.kinds() == {"damaged record": 2, "damaged image": 1}
    assert tiny_embed.files(whole) == before


@pytest.mark.parametrize("name", ["image-00001.npy", "text-00001.npy", "rows-00001.arrow"])
@pytest.mark.parametrize("damage", ["deleted", "cut"])
def test_a_damaged_shard_is_made_again(whole, tmp_path, name, damage):
    tiny_embed.embed(tmp_path)
    if damage == "deleted":
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-4])
    assert tiny_embed.embed(tmp_path).manifest
    assert tiny_embed.files(tmp_path) == tiny_embed.files(whole)


def test_an_unfinished_repair_is_not_marked_as_done(tmp_path):
    tiny_embed.embed(tmp_path)
    (tmp_path / "rows-00001.arrow").unlink()

    def stop(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_embed.embed(tmp_path, progress=stop)
    assert not json.loads((tmp_path / "manifest.json").read_text())["done"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "params_sha256 [0-9a-f]{64} instead of [0-9a-f]{64}"),
        (
            {"description": {**tiny_embed.DESCRIPTION, "preprocessing": {"res": 5}}},
            "preprocessing.res 4 instead of 5",
        ),
        (
            {"description": {**tiny_embed.DESCRIPTION, "preprocessing": {}}},
            "preprocessing.res 4 instead of None",
        ),
        (
            {"description": {**tiny_embed.DESCRIPTION, "source": ["tiny", "split=x"]}},
            "source tiny instead of tiny split=x",
        ),
        ({"source": Source(54)}, "examples 53 instead of 54"),
        ({"what": ("image",)}, "what image text instead of image"),
        ({"dtype": "float16"}, "dtype float32 instead of float16"),
        ({"shard_rows": 21}, "shard_rows 20 instead of 21"),
    ],
    ids=["params", "preprocessing", "less", "source", "examples", "what", "dtype", "shard_rows"],
)
@pytest.mark.parametrize("process_index", [0, 1])
def test_another_embedding_is_refused_in_the_same_folder(whole, change, message, process_index):
    before = tiny_embed.files(whole)
    with pytest.raises(UserError, match=rf"is of another embedding, {message}; give a new folder$"):
        tiny_embed.embed(whole, process_index=process_index, process_count=2, **change)
    assert tiny_embed.files(whole) == before


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(UserError, match=r"is not empty \(photo.jpg\), and not of an embedding"):
        tiny_embed.embed(tmp_path)
    with pytest.raises(UserError, match="is a file; give a new folder"):
        tiny_embed.embed(tmp_path / "photo.jpg")


@pytest.mark.parametrize("what", ["image", "text"])
def test_one_kind_alone_has_the_same_bytes(whole, tmp_path, what):
    # Without images nothing decodes them, so that no image is bad.
    bad = {7: "damaged record", 52: "damaged record"}
    out = tmp_path / "both"
    tiny_embed.embed(out, source=Source(bad=bad))
    tiny_embed.embed(tmp_path / "one", source=Source(bad=bad), what=(what,))
    one, both = tiny_embed.files(tmp_path / "one"), tiny_embed.files(out)
    assert {k: v for k, v in one.items() if "json" not in k} == {
        k: v for k, v in both.items() if k.startswith((what, "rows"))
    }


def test_float16_is_float32_rounded(whole, tmp_path):
    tiny_embed.embed(tmp_path, dtype="float16")
    for kind in ("image", "text"):
        assert read(tmp_path, kind).dtype == np.float16
        np.testing.assert_array_equal(
            read(tmp_path, kind), read(whole, kind).astype(np.float16), strict=True
        )


@pytest.mark.parametrize("batch_size", [16, 64])
def test_the_batch_size_does_not_change_rows(whole, tmp_path, batch_size):
    tiny_embed.embed(tmp_path, batch_size=batch_size)
    for kind in ("image", "text"):
        np.testing.assert_allclose(read(tmp_path, kind), read(whole, kind), atol=1e-6)


def test_embeddings_that_are_not_finite_are_refused(tmp_path, monkeypatch):
    params = tiny_embed.make_params()
    params["table"][ord("1")] = np.nan
    monkeypatch.setattr(tiny_embed, "make_params", lambda seed: params)
    with pytest.raises(UserError, match="embeddings of kind text are not finite"):
        tiny_embed.embed(tmp_path)
    assert not list(tmp_path.glob("rows-*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"what": ()}, "what is none of image, text"),
        ({"dtype": "int8"}, "dtype 'int8' is none of float32, float16"),
        ({"shard_rows": 0}, "shard_rows=0 must be at least 1"),
        ({"batch_size": 12}, "batch_size=12 does not divide over 8 devices; the nearest .* is 16"),
        ({"process_index": 2, "process_count": 2}, "process 2 is not one of 0 to 1"),
        ({"source": Source(0)}, "nothing to embed: the source has no examples"),
    ],
    ids=["what", "dtype", "shard_rows", "batch_size", "process", "empty"],
)
def test_mistakes(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        tiny_embed.embed(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_what_an_example_may_hold(tmp_path):
    class Odd(Source):
        def __getitem__(self, i):
            example = {
                **super().__getitem__(i),
                "texts": ["a \ud800", "b"],
                "languages": ["x", "y"],
            }
            example |= {"weights": [1, 0.5]} if i else {"weights": [1.0]}
            return example | ({"label": 2**63} if i == 2 else {})

    result = tiny_embed.embed(tmp_path, source=Odd(9, {}), max_bad_fraction=0.5)
    assert result.bad.kinds() == {"damaged record": 2}
    rows = tables(tmp_path)[0].to_pylist()
    assert [row["bad"] for row in rows[:4]] == ["damaged record", "", "damaged record", ""]
    assert rows[1]["texts"] == ["a ?", "b"] and rows[1]["weights"] == [1.0, 0.5]


def test_the_hash_knows_names_shapes_types_and_bytes_and_no_places():
    params = {"a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3)}, "c": np.float32(1)}
    known = job.hash_params(params)
    shuffled = {"c": jnp.float32(1), "a": {"b": jnp.asarray(params["a"]["b"])}}
    assert job.hash_params(shuffled) == known
    devices = jax.sharding.NamedSharding(
        jax.make_mesh((2,), ("x",), devices=jax.devices()[:2]), jax.sharding.PartitionSpec("x")
    )
    split = {"a": {"b": jax.device_put(params["a"]["b"], devices)}, "c": params["c"]}
    assert job.hash_params(split) == known
    b = params["a"]["b"]
    others = [
        {"a": {"x": b}, "c": params["c"]},
        {"a": {"b": b.reshape(3, 2)}, "c": params["c"]},
        {"a": {"b": b.view(np.int32)}, "c": params["c"]},
        {"a": {"b": b + np.eye(2, 3, dtype=np.float32)}, "c": params["c"]},
        {"a": {"b": b}, "c": params["c"].reshape(1)},
        {"a": {"b": b}},
        {"a": {"b": b.astype(jnp.bfloat16)}, "c": params["c"]},
    ]
    assert len({known, *map(job.hash_params, others)}) == 1 + len(others)


@pytest.mark.parametrize("what", [("image", "text"), ("image",)], ids=["both", "image"])
def test_progress_counts_rows_and_the_texts_that_are_embedded(tmp_path, monkeypatch, what):
    monkeypatch.setattr(job, "PROGRESS_SECONDS", 0.0)
    lines = []
    tiny_embed.embed(tmp_path, progress=lines.append, what=what)
    counts = [line.split()[0] for line in lines]
    assert counts[:8] == [f"{rows}/53" for rows in (8, 16, 20, 28, 36, 40, 48, 53)]
    assert set(counts[8:]) <= {"53/53"}
    assert all("rows/s" in line and ("texts/s" in line) == ("text" in what) for line in lines)


def test_runs_that_do_not_agree_on_their_number_do_not_write_beside_each_other(tmp_path):
    """Else shard 1 belongs to the only process and to the second of two."""
    holder = (
        "import sys; from embedding.store import Store\n"
        "made = {'version': 1, 'what': ['image'], 'd': 2, 'dtype': 'float32', 'shard_rows': 2,"
        " 'examples': 8, 'class_names': None, 'jax': '0'}\n"
        "try:\n"
        "    store = Store(sys.argv[1], made, process_index=int(sys.argv[2]),"
        " process_count=int(sys.argv[3]), wait=600, tell=print)\n"
        "    print('in', flush=True); sys.stdin.read(); store.close()\n"
        "except Exception as error:\n"
        "    print(error, flush=True)\n"
    )
    refused = "a run with another --num_processes writes there"
    with contextlib.ExitStack() as running:
        runs = ("0", "2", "in"), ("1", "2", "in"), ("2", "3", refused), ("0", "1", refused)
        for index, count, answer in runs:
            command = [sys.executable, "-c", holder, str(tmp_path), index, count]
            other = processes.started(command, cwd=ROOT, stdin=subprocess.PIPE)
            processes.read_until(running.enter_context(other), answer)
