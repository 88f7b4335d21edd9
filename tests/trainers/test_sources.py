"""Runs on every format and on mixtures: the same numbers, and exact when they go on."""

import contextlib
import io
import os
import shlex
import signal

import pytest
from tiny_run import STEPS, TEMPLATE, Tiny, assert_same_state, deterministic, losses, saved

import main as program
from input_pipeline import loader
from input_pipeline.convert import __main__ as convert

pytestmark = pytest.mark.slow
FORMATS = ("files", "webdataset", "array_record", "parquet")
ENGLISH = ("language_column=languages", "languages='en',", "label_column=class")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def converted(emoji_tiny, tmp_path):
    """The flags that train on the emoji set in a format, as the converter prints them."""

    def flags(to):
        words = ["files", f"path={emoji_tiny}", *ENGLISH, f"--to={to}", f"--out={tmp_path / to}"]
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert convert.main(words) == 0
        return shlex.split(out.getvalue().partition("train with it:")[2])

    return flags


def test_every_format_trains_to_the_same_parameters(tiny, converted, tmp_path):
    states = {}
    for to in FORMATS:
        workdir = tmp_path / f"run-{to}"
        assert tiny.main(workdir, *converted(to)) == program.DONE
        states[to] = saved(workdir)
        if to == "webdataset":  # the index is kept beside the run
            assert list((workdir / "index").iterdir())
    for to in ("webdataset", "array_record"):
        assert_same_state(states[to], states["files"])
    # Row groups come in an order of their own: other batches, and still a run.
    assert len(losses(tmp_path / "run-parquet")) == STEPS


MIXTURE = """\
            "source": {"name": "mixture"},
            "mixture": {
                "drawn": {"name": "scenes", "size": 72, "res": 16, "weight": 3},
                "emoji": {"name": "files", "path": TABLE, "language_column": "languages"},
            },
            "language_temperature": 3.0,
            "corrupt": "image(0.2) | text(0.2) | batch(0.5)",
"""


def test_a_mixture_with_noise_goes_on_as_if_nothing_had_happened(
    tiny, emoji_tiny, tmp_path, monkeypatch
):
    source = '            "source": {"name": "scenes", "size": 72, "res": 16},\n'
    assert source in TEMPLATE
    config = tmp_path / "mixture.py"
    config.write_text(TEMPLATE.replace(source, MIXTURE.replace("TABLE", repr(str(emoji_tiny)))))

    def run(workdir):
        return program.main([f"--config={config}:evals=val", f"--workdir={workdir}"])

    assert run(tmp_path / "whole") == program.DONE
    train_batches = loader.train_batches

    def stopping(*args, start_step, **options):
        batches = train_batches(*args, start_step=start_step, **options)
        for _ in range(5):
            yield next(batches)
        os.kill(os.getpid(), signal.SIGTERM)
        yield from batches

    with monkeypatch.context() as patch:
        patch.setattr(loader, "train_batches", stopping)
        assert run(tmp_path / "stopped") == program.INTERRUPTED
    assert run(tmp_path / "stopped") == program.DONE
    assert_same_state(saved(tmp_path / "stopped"), saved(tmp_path / "whole"))
    assert deterministic(tmp_path / "stopped") == deterministic(tmp_path / "whole")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--config.input.source.name=mixture"], "config.input.mixture and config.input.source"),
        (["--config.input.language_temperature=2"], "this source has no languages"),
        (["--config.input.corrupt=image(2)"], "config.input.corrupt: image(2) must be from 0 to 1"),
        (["--config.input.image=decode | naflex"], "naflex, but this image tower takes squares"),
        (["--config.input.image=decode | resze"], "there is no 'resze'; the nearest: resize"),
    ],
)
def test_mistakes_are_one_line(tiny, tmp_path, capsys, flags, told):
    assert tiny.main(tmp_path / "w", *flags) == program.MISTAKE
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1 and "Traceback" not in err
    assert not (tmp_path / "w" / "config.json").exists()
