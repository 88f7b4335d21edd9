"""A checkpoint that holds more than two towers is read by all that need the towers alone."""

import json
import pathlib
import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest
from tiny_run import Tiny

import main as program
from siglip import checkpoints, library
from siglip.checkpoints import convert

pytestmark = pytest.mark.slow
LEFT_OUT = "averaged (1 arrays), carried (1 arrays), params/decoder (2 arrays), which were left out"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(a run, a copy whose checkpoint also has a decoder, an average and carried state)."""
    tiny = Tiny(tmp_path_factory.mktemp("more"))
    plain, more = tiny.folder / "plain", tiny.folder / "more"
    tiny.train(plain, evals="retrieval", total="2 steps", evals__retrieval__every="")
    shutil.copytree(plain, more)
    (more / "results.json").unlink()
    state = more / "checkpoints" / "2" / "state"
    handler = ocp.StandardCheckpointer()
    tree = handler.restore(state.absolute())
    tree["params"]["decoder"] = {"kernel": np.ones((3, 4), np.float32), "bias": np.ones(3)}
    tree |= {"averaged": {"img": np.ones(2)}, "carried": {"centre": np.ones(4)}}
    shutil.rmtree(state)
    handler.save(state.absolute(), tree)
    handler.wait_until_finished()
    return plain, more


def test_the_towers_are_read_and_the_rest_is_named_in_one_note(runs):
    plain, more = map(checkpoints.read, runs)
    assert plain.notes == ()
    assert more.notes == (f"{runs[1]}/checkpoints/2 also holds {LEFT_OUT}",)
    assert set(more.arrays) == set(plain.arrays)
    for name, array in plain.arrays.items():
        np.testing.assert_array_equal(more.arrays[name].read(), array.read())


def test_the_model_that_people_call_takes_the_towers(runs):
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    plain, more = (library.load(run).encode_image(images) for run in runs)
    np.testing.assert_array_equal(more, plain)


def test_it_is_converted_with_one_note(runs, tmp_path, capsys):
    assert convert.main([str(runs[1]), str(tmp_path / "model.npz")]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert len(notes) == 1 and notes[0].endswith(LEFT_OUT)


def test_it_is_evaluated_with_one_note(runs, capsys):
    _, more = runs
    assert program.main(["--eval_only", f"--workdir={more}"]) == program.DONE
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert len(notes) == 1 and notes[0].endswith(LEFT_OUT)
    results = [json.loads((pathlib.Path(run) / "results.json").read_text()) for run in runs]
    assert results[0] == results[1]
