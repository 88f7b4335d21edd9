"""python -m siglip.checkpoints.convert: what it writes, says, and refuses."""

import dataclasses
import json
import pathlib
import re
import sys

import numpy as np
import processes
import pytest
import tokenizers as hf
from tiny_models import TINY, arrays, tiny

from siglip import checkpoints
from siglip.checkpoints import CheckpointError, convert
from siglip.checkpoints.files import npz_file, safetensors_file
from siglip.checkpoints.files.lazy_array import of_array
from siglip.checkpoints.formats import big_vision, random_weights

ROOT = pathlib.Path(convert.__file__).parents[2]


@pytest.fixture
def source(tmp_path):
    checkpoints.write(tiny(), tmp_path / "source.npz", "big_vision")
    return tmp_path / "source.npz"


def run(capsys, *argv):
    """(exit code, lines of stdout, lines of stderr)."""
    code = convert.main([str(x) for x in argv])
    output = capsys.readouterr()
    return code, output.out.splitlines(), output.err.splitlines()


def test_it_writes_reads_again_and_reports_every_array(source, tmp_path, capsys):
    code, out, err = run(capsys, source, tmp_path / "hf")
    assert (code, err) == (0, [])
    again = checkpoints.read(tmp_path / "hf")
    assert arrays(again) == arrays(tiny()) and again.format == "huggingface"
    count = len(again.arrays)
    assert re.fullmatch(
        r"vision_model\.embeddings\.patch_embedding\.weight +float32\[32, 3, 16, 16\] +"
        r"source\.npz: params/img/embedding/kernel",
        out[0],
    )
    assert "\n".join(out).count("source.npz: params/") == count
    total = again.parameters
    assert f"{source} (big_vision): {total:,} parameters in {count} arrays" in out
    assert out[-1].startswith(f"{tmp_path / 'hf'} (huggingface): written and read again, {count} ")


def test_quiet_leaves_the_report_out(source, tmp_path, capsys):
    code, out, _ = run(capsys, source, tmp_path / "hf", "--quiet")
    assert code == 0 and len(out) == 2


def test_the_ending_chooses_the_format_and_flags_change_the_model(source, tmp_path, capsys):
    argv = [source, tmp_path / "b.npz", "--stacked", "--dtype", "bfloat16", "--res", "48"]
    argv += ["--positions", "bicubic", "--token_len", "20", "--text_positions", "keep"]
    assert run(capsys, *argv)[0] == 0
    made = checkpoints.read(tmp_path / "b.npz")
    assert made.format == "big_vision" and (made.spec.res, made.spec.token_len) == (48, 20)
    assert {str(stored.dtype) for stored in made.arrays.values()} == {"bfloat16"}
    with np.load(tmp_path / "b.npz") as there:
        assert "params/img/Transformer/encoderblock/LayerNorm_0/scale" in there.files
    assert run(capsys, source, tmp_path / "oc", "--format", "open_clip")[0] == 0
    assert (tmp_path / "oc" / "open_clip_model.safetensors").exists()
    assert run(capsys, source, tmp_path / "tower", "--only", "img")[0] == 0
    config = json.loads((tmp_path / "tower" / "config.json").read_text())
    assert config["architectures"] == ["SiglipVisionModel"]


MISTAKES = {
    "source": (["NONE.npz", "DST"], "NONE.npz: there is no such file or folder"),
    "target": (["SRC", "SRC"], "source.npz is there already; choose another name, or delete it"),
    "stacked": (["SRC", "DST", "--stacked"], "--stacked is for big_vision's .npz, not for hugg"),
    "format": (["SRC", "DST", "--format", "tf"], "invalid choice: 'tf'"),
    "method": (["SRC", "DST", "--res", "64", "--positions", "x"], "invalid choice: 'x'"),
    "no method": (["SRC", "DST", "--res", "64"], "choose how its positions are resized: bilinear"),
    "no size": (["SRC", "DST", "--res", "0"], "res=0 is smaller than a patch of 16 pixels"),
    "no length": (["SRC", "DST", "--token_len", "0"], "token_len=0 is too short for a text"),
    "number": (["SRC", "DST", "--res", "big"], "invalid int value: 'big'"),
    "tokenizer": (["SRC", "DST", "--tokenizer", "N.model"], "N.model: there is no such file"),
    "flag": (["SRC", "DST", "--dry"], "unrecognized arguments: --dry"),
    "nothing": ([], "the following arguments are required: SRC, DST"),
    "preset": (["random:siglip-b16-223", "DST"], "the nearest: siglip-b16-2"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(mistake, source, tmp_path, capsys):
    argv, message = MISTAKES[mistake]
    names = {"SRC": source, "DST": tmp_path / "dst", "NONE.npz": tmp_path / "NONE.npz"}
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(capsys, *[names.get(x, x) for x in argv])
    assert (code, out, len(err)) == (2, [], 1), err
    assert err[0].startswith("error: ") and message in err[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_models_that_only_this_project_has_are_one_line(tmp_path, capsys):
    given = tiny(img={**TINY.img, "pool": "gap"}, txt={**TINY.txt, "bottleneck": 8})
    checkpoints.write(given, tmp_path / "own.npz", "big_vision")
    for format in ("huggingface", "open_clip"):
        for more in ([], ["--dry_run"]):
            argv = [tmp_path / "own.npz", tmp_path / "dst", "--format", format, *more]
            code, out, err = run(capsys, *argv)
            assert (code, out, len(err)) == (2, [], 1)
            assert "write it as big_vision" in err[0]


def test_a_dry_run_reports_and_writes_nothing(source, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(capsys, source, tmp_path / "hf", "--dry_run")
    assert (code, err) == (0, []) and len(out) > 50
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("target", ["hf", "new.npz"])
def test_an_interruption_leaves_nothing(target, source, tmp_path, capsys, monkeypatch):
    real = safetensors_file.write_array
    written = []

    def stop(file, stored):
        if len(written) == 20:
            raise KeyboardInterrupt
        written.append(stored)
        real(file, stored)

    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(safetensors_file, "write_array", stop)
    monkeypatch.setattr(npz_file, "write_array", stop)
    code, _, err = run(capsys, source, tmp_path / target)
    assert (code, err) == (85, ["interrupted; nothing was written"]) and len(written) == 20
    assert sorted(tmp_path.rglob("*")) == before


def test_an_interruption_of_the_comparison_says_what_is_there(
    source, tmp_path, capsys, monkeypatch
):
    def stop(weights, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "verify", stop)
    code, _, err = run(capsys, source, tmp_path / "hf")
    assert code == 85 and len(err) == 1 and "hf is written but not compared" in err[0]


@pytest.mark.parametrize("damage", ["value", "sign of zero", "type"])
def test_what_was_not_written_as_it_was_is_found(damage, source, tmp_path, capsys, monkeypatch):
    """One array of the target is another than the source's."""

    def broken(weights, path, **options):
        changed, name = dict(weights.arrays), "txt/Encoder_0/encoder_norm/bias"
        array = np.array(changed[name].read())
        if damage == "type":
            array = array.astype(np.float64)
        else:
            array[3] = -0.0 if damage == "sign of zero" else array[3] + 1e-7
        changed[name] = of_array(array)
        return big_vision.write(dataclasses.replace(weights, arrays=changed), path, **options)

    if damage == "sign of zero":
        changed = dict(tiny().arrays)
        zero = np.zeros(32, np.float32)
        changed["txt/Encoder_0/encoder_norm/bias"] = of_array(zero)
        source = tmp_path / "zero.npz"
        big_vision.write(dataclasses.replace(tiny(), arrays=changed), source)
    monkeypatch.setitem(checkpoints.FORMATS, "big_vision", broken)
    code, _, err = run(capsys, source, tmp_path / "dst.npz", "--quiet")
    assert code == 2 and len(err) == 1
    assert "encoder_norm/bias is not in" in err[0] and "delete it" in err[0]


def test_it_runs_as_a_module(source, tmp_path):
    argv = [sys.executable, "-m", "siglip.checkpoints.convert"]
    done = processes.run([*argv, source, tmp_path / "hf", "--quiet"], cwd=ROOT)
    assert "arrays equal to the bit" in done.stdout


def test_an_image_tower_is_taken_from_another_model(tmp_path):
    """As for a text tower that was trained on embeddings."""
    text = random_weights.make(
        dataclasses.replace(TINY, img={"variant": "precomputed", "width": 32}, res=None), "a"
    )
    image, target = tiny(), tmp_path / "joined"
    joined = convert.with_image_tower(text, image)
    for name, stored in joined.arrays.items():
        source = image if name.startswith("img/") else text
        assert stored.read().tobytes() == source.arrays[name].read().tobytes(), name
    assert joined.spec.img == image.spec.img and joined.spec.res == image.spec.res
    checkpoints.write(joined, target, "huggingface")
    wide = tiny(img={**TINY.img, "width": 48, "num_heads": 3}, txt={**TINY.txt, "out_dim": 48})
    with pytest.raises(CheckpointError, match=r"have 32 numbers, those of .* 48"):
        convert.with_image_tower(text, wide)


def test_a_tokenizer_of_another_vocabulary_and_a_wrong_ending_are_one_line(tmp_path, capsys):
    made = hf.Tokenizer(hf.models.BPE({"</s>": 0, "a": 1}, []))
    made.save(str(tmp_path / "few.json"))
    name = "random:siglip-b16-224:small"
    for argv, message in (
        ([name, "x", "--tokenizer", str(tmp_path / "few.json")], "vocabulary 2 where it expects"),
        ([name, str(tmp_path / "x"), "--format", "big_vision"], "DST ends in .npz for big_vision"),
        ([name, str(tmp_path / "x.npz"), "--format", "open_clip"], "DST ends in .npz for big_"),
        (["random:siglip2-b16-naflex:small", "y", "--format", "open_clip"], "no NaFlex models"),
        (["./gone", "y"], "gone: there is no such file or folder"),
    ):
        code, _, lines = run(capsys, *argv, "--quiet")
        assert code == 2 and len(lines) == 1 and message in lines[0], argv
