"""Models with subtrees of parameters that released formats do not have: a decoder, heads."""

import dataclasses

import numpy as np
import orbax.checkpoint as ocp
import pytest
from tiny_models import arrays, files, one_line, tiny

from siglip import checkpoints
from siglip.checkpoints import CheckpointError, convert, spec
from siglip.checkpoints.files import npz_file
from siglip.checkpoints.files.lazy_array import of_array

FORMATS = {"huggingface": "hf", "open_clip": "oc", "big_vision": "x.npz"}
OTHERS = {f"decoder/block_{i}/kernel": np.full((2, 3), i, np.float32) for i in range(6)}
OTHERS["heads/masked/bias"] = np.ones(3, np.float32)
NOTE = (
    "7 arrays of decoder, heads were left out: decoder/block_0/kernel, decoder/block_1/kernel, "
    "decoder/block_2/kernel, decoder/block_3/kernel, decoder/block_4/kernel and 2 more"
)


def note_of_run(workdir) -> str:
    step = (workdir / "checkpoints" / "10").absolute()
    others = "params/decoder (6 arrays), params/heads (1 arrays)"
    return f"{step} also holds {others}, which were left out"


def with_subtrees():
    weights = tiny()
    others = {name: of_array(array) for name, array in OTHERS.items()}
    return dataclasses.replace(weights, arrays={**others, **weights.arrays})


def save(workdir, tree, contract, **options):
    """A run of ten steps with these parameters; options are Orbax's."""
    step = (workdir / "checkpoints" / "10").absolute()
    step.mkdir(parents=True)
    state = {"step": np.int32(10), "params": tree, "opt_state": {"count": np.int32(10)}}
    ocp.PyTreeCheckpointer(**options).save(step / "state", state)
    spec.save(contract, workdir / spec.FILE)
    return workdir


@pytest.fixture
def run(tmp_path):
    """A workdir whose parameters have further subtrees."""
    return save(tmp_path / "run", with_subtrees().tree(), tiny().spec)


def content(path):
    return files(path) if path.is_dir() else path.read_bytes()


@pytest.mark.parametrize("format", FORMATS)
def test_a_format_gets_the_towers_and_a_note_names_the_rest(format, tmp_path):
    (tmp_path / "all").mkdir()
    (tmp_path / "towers").mkdir()
    name = FORMATS[format]
    notes = checkpoints.write(with_subtrees(), tmp_path / "all" / name, format)
    assert notes[0] == NOTE
    assert notes[1:] == checkpoints.write(tiny(), tmp_path / "towers" / name, format)
    assert content(tmp_path / "all" / name) == content(tmp_path / "towers" / name)
    assert arrays(checkpoints.read(tmp_path / "all" / name)) == arrays(tiny())


@pytest.mark.parametrize("prefix", ["params/", "opt/target/"])
def test_of_an_npz_the_towers_are_read_and_a_note_names_the_rest(prefix, tmp_path):
    saved = {f"{prefix}{name}": array for name, array in with_subtrees().arrays.items()}
    saved["opt/params/count"] = of_array(np.zeros(1))  # a training checkpoint's: no parameter
    npz_file.write(tmp_path / "x.npz", saved.items())
    weights = checkpoints.read(tmp_path / "x.npz")
    assert arrays(weights) == arrays(tiny())
    assert weights.notes == (NOTE,)


def test_of_a_run_the_towers_are_read_and_a_note_names_the_rest(run):
    weights = checkpoints.read(run)
    assert arrays(weights) == arrays(tiny())
    assert weights.notes == (note_of_run(run),)


def test_of_a_run_nothing_but_the_towers_is_read(tmp_path):
    """Everything else is damaged; each array lies in a folder of its own."""
    run = save(tmp_path / "run", with_subtrees().tree(), tiny().spec, use_ocdbt=False)
    own = ("params.img.", "params.txt.", "params.t", "params.b")
    folders = [path for path in (run / "checkpoints" / "10" / "state").iterdir() if path.is_dir()]
    others = [folder for folder in folders if not folder.name.startswith(own)]
    assert len(others) == len(OTHERS) + 2  # and step, and count
    for file in (file for folder in others for file in folder.rglob("*") if file.is_file()):
        if file.name not in (".zarray", "zarr.json"):
            file.write_bytes(b"no data")
    assert arrays(checkpoints.read(run)) == arrays(tiny())


def test_a_run_with_the_towers_alone_has_no_note(tmp_path):
    weights = checkpoints.read(save(tmp_path / "run", tiny().tree(scan=True), tiny().spec))
    assert arrays(weights) == arrays(tiny()) and weights.notes == ()


def test_a_subtree_does_not_hide_that_an_array_is_missing(tmp_path):
    tree = with_subtrees().tree()
    del tree["img"]["pos_embedding"]
    with pytest.raises(CheckpointError) as error:
        checkpoints.read(save(tmp_path / "run", tree, tiny().spec))
    assert "1 missing there: img/pos_embedding" in one_line(error)


@pytest.mark.parametrize("more", [[], ["--dry_run"], ["--only", "img"]])
@pytest.mark.parametrize("format", FORMATS)
def test_convert_says_once_what_it_left(format, more, run, tmp_path, capsys):
    if format == "open_clip" and "--only" in more:
        pytest.skip("open_clip has no towers alone")
    argv = [str(run), str(tmp_path / FORMATS[format]), "--format", format, "--quiet", *more]
    assert convert.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines.count(f"note: {note_of_run(run)}") == 1
    assert sum("left out" in line for line in lines) == 1
