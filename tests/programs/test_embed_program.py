"""python -m programs.embed: from a command line to a folder that a run can train on."""

import json
import os
import pathlib
import re
import signal
import sys

import cv2
import embed_process
import jax
import numpy as np
import processes
import pytest
from embed_process import RES

import siglip
from embedding.neighbours import nearest
from input_pipeline.sources.embeddings import Embeddings
from input_pipeline.sources.scenes import Scenes
from programs import embed as program

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCENES = ("--source", "scenes", "size=50", f"res={RES}", "split=val")
COMMON = ("--model", "tiny", *SCENES, "--batch_size", "16", "--shard_rows", "20")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(siglip, "load", embed_process.load, raising=False)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # no folder in the user's home


def run(capsys, *argv):
    """(exit code, lines on stdout, lines on stderr)."""
    code = program.main([str(word) for word in argv])
    out = capsys.readouterr()
    return code, out.out.splitlines(), out.err.splitlines()


def folder(path):
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != ".lock"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(siglip, "load", embed_process.load, raising=False)
        patch.setenv("JAX_COMPILATION_CACHE_DIR", "")
        assert program.main([*COMMON, "--out", str(out)]) == 0
    return out


def test_a_folder_holds_what_the_model_says_of_the_source(whole):
    model, scenes = embed_process.load("tiny"), Scenes(size=50, res=RES, split="val")
    source = Embeddings(path=str(whole))
    assert len(source) == len(scenes)
    pixels = np.stack([model.preprocess.image(scenes[i]["image"]) for i in range(len(scenes))])
    tokens = np.stack(
        [model.preprocess.text(t) for i in range(len(scenes)) for t in scenes[i]["texts"]]
    )
    zimg, ztxt, _ = model.module.apply({"params": model.params}, image=pixels, text=tokens)
    images, ids = source.arrays("image")
    np.testing.assert_allclose(images[:], zimg, atol=1e-5)
    np.testing.assert_allclose(source.arrays("text")[0][:], ztxt, atol=1e-5)
    assert ids[:] == [scenes[i]["id"] for i in range(len(scenes))]
    assert source[7]["texts"] == scenes[7]["texts"] and source.class_names == scenes.class_names
    np.testing.assert_array_equal(nearest(images[:], images, 1).scores.round(5), 1)


def test_the_manifest_tells_the_preprocessing_and_the_source(whole):
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["model"] == ["tiny"]
    assert manifest["source"] == ["scenes", f"res={RES}", "size=50", "split=val"]
    tokens = manifest["preprocessing"]["tokenizer"].pop("tokens_sha256")
    assert re.fullmatch("[0-9a-f]{64}", tokens)
    assert manifest["preprocessing"] == {
        "image": "decode | resize",
        "text": "lower | tokenize",
        "res": 16,
        "token_len": 8,
        "tokenizer": {"name": "Bytes", "vocab_size": 259, "eos_id": 1},
    }


def test_it_says_what_was_done_and_how_to_train_with_it(tmp_path, capsys):
    out = tmp_path / "out"
    code, lines, told = run(capsys, *COMMON, "--out", out, "--dtype", "float16")
    assert code == 0
    assert re.fullmatch(rf"50 rows, \d+ texts of width 16 in {out}", lines[0])
    assert re.fullmatch(r"\d+ texts of this run were too long and were cut, EOS kept", lines[1])
    assert lines[2:] == [
        "train with it:",
        "  --config.input.source.name=embeddings",
        f"  --config.input.source.path={out}",
        "  --config.input.image=embedding",
        "  --config.model.img.variant=precomputed",
        "  --config.model.img.width=16",
    ]
    assert re.fullmatch(r"50/50 rows, [\d.]+ rows/s, [\d.]+ texts/s, 0s left", told[-1])
    code, again, told = run(capsys, *COMMON, "--out", out, "--dtype", "float16")
    assert (
        code == 0
        and again == [lines[0], *lines[2:]]
        and told == ["50 of 50 rows are there already"]
    )
    code, lines, _ = run(capsys, *COMMON, "--out", tmp_path / "t", "--what", "text")
    assert code == 0 and len(lines) == 2 and not list((tmp_path / "t").glob("image-*"))
    words = ("--what", "image", "--model_option", "lacks=tokenizer")
    code, lines, _ = run(capsys, *COMMON, "--out", tmp_path / "i", *words)
    assert code == 0 and lines[0] == f"50 rows of width 16 in {tmp_path / 'i'}"


def test_two_processes_write_what_one_does(whole, tmp_path, capsys):
    two = (*COMMON, "--out", tmp_path, "--num_processes", "2", "--process_id")
    code, lines, _ = run(capsys, *two, 0)
    assert code == 0
    assert lines[0] == (
        f"this process's shards are in {tmp_path}; those of other processes are not all there"
    )
    code, lines, _ = run(capsys, *two, 1)
    assert code == 0 and lines[0].startswith("50 rows")
    assert folder(tmp_path) == folder(whole)


def test_bad_examples_are_told(tmp_path, capsys):
    rows = [{"image": f"{i}.png", "caption": "c"} for i in range(3)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scenes = Scenes(size=3, res=RES, split="val")
    for i in range(3):
        cv2.imwrite(str(tmp_path / f"{i}.png"), scenes[i]["image"])
    (tmp_path / "1.png").write_bytes(b"\x89PNG torn")
    words = ("--model", "tiny", "--source", "files", f"path={tmp_path}/t.jsonl", "--batch_size", 8)
    code, lines, _ = run(capsys, *words, "--out", tmp_path / "o")
    assert code == 0
    assert lines[1].startswith("1 of them are bad, and left out by the reader: 1 ")
    assert lines[2].startswith("  such as 1.png (")
    code, lines, told = run(capsys, *words, "--out", tmp_path / "p", "--max_bad_fraction", 0)
    assert code == 2 and not lines
    assert told[-1].startswith("error: 1 of 3 examples cannot be used (1 ") and "1.png" in told[-1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model", "tini"], "--model tini: there is no checkpoint or preset 'tini'"),
        (["--model_option", "sed=1"], "--model_option has no setting 'sed'; the nearest: seed"),
        (["--model_option", "lacks=img"], "--model tiny: tiny holds no image tower"),
        (["--model_option", "lacks=txt"], "--model tiny: tiny holds no text tower"),
        (["--model_option", "lacks=tokenizer"], "--model tiny: tiny came without its tokenizer"),
        (["--model_option", "seed=x"], "seed=x is not an int"),
        (["--source", "scene"], "there is no source 'scene'; the nearest: scenes"),
        (["--source", "scenes", "siz=5"], "source scenes has no setting 'siz'; the nearest: size"),
        (["--source", "files"], "source files needs path=..."),
        (["--what", "image,sound"], "--what 'sound' is none of image, text; see --help"),
        (["--out", "gs://bucket/x"], "--out gs://bucket/x is no folder of a file system"),
        (["--max_bad_fraction", "1.5"], "--max_bad_fraction 1.5 must be from 0 to 1"),
        (["--batch_size", "12"], "batch_size=12 does not divide over 8 devices"),
        (["--batch_size", "x"], "argument --batch_size: invalid int value: 'x'; see --help"),
        (["--process_id", "1"], "process 1 is not one of 0 to 0"),
        (["--dtype", "int8"], "dtype 'int8' is none of float32, float16"),
        (["--chips", "1"], "unrecognized arguments: --chips 1; see --help"),
    ],
    ids=lambda value: value[0] + value[1] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(tmp_path, capsys, words, told):
    code, lines, error = run(capsys, *COMMON, "--out", tmp_path / "out", *words)
    assert code == 2 and not lines and len(error) == 1
    assert error[0].startswith(f"error: {told}"), error


def test_another_checkpoint_is_refused(whole, capsys):
    before = folder(whole)
    code, _, told = run(capsys, *COMMON, "--out", whole, "--model_option", "seed=1")
    assert code == 2 and len(told) == 1
    pattern = r"error: --out .* is of another embedding, params_sha256 \w+ instead of \w+; .*"
    assert re.fullmatch(pattern, told[0])
    assert folder(whole) == before


def test_a_full_disk_is_one_line(tmp_path, capsys, monkeypatch):
    def full(*unused):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, _, told = run(capsys, *COMMON, "--out", tmp_path)
    assert code == 1
    assert told[-1] == (
        "error: [Errno 28] No space left on device; run the same command again to go on"
    )


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_signal_ends_it_and_the_same_command_goes_on(whole, tmp_path, capsys, signum):
    command = [sys.executable, embed_process.__file__, *COMMON, "--out", str(tmp_path)]
    path = os.pathsep.join([str(ROOT), str(pathlib.Path(embed_process.__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": path}
    with processes.started(command, env=environment, cwd=ROOT) as process:
        processes.wait_until(lambda: list(tmp_path.glob("rows-*")), process)
        process.send_signal(signum)
        told = processes.end(process, 85).stderr.splitlines()
    line = f"{signum.name}: interrupted; run the same command again to go on"
    assert told[-1] == line and not any("Traceback" in other for other in told)
    assert [path.name for path in tmp_path.glob("rows-*")] == ["rows-00000.arrow"]
    code, _, _ = run(capsys, *COMMON, "--out", tmp_path)
    assert code == 0 and folder(tmp_path) == folder(whole)


def test_cpu_devices_are_emulated(tmp_path, capsys, monkeypatch):
    asked = {}
    monkeypatch.setattr(jax.config, "update", asked.__setitem__)
    assert run(capsys, *COMMON, "--out", tmp_path, "--cpu_devices", 4)[0] == 0
    assert asked["jax_num_cpu_devices"] == 4
