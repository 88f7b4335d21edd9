"""The same data in every format are the same batches."""

import pathlib
import shlex
import subprocess
import sys

import numpy as np
import pytest

from input_pipeline import loader
from input_pipeline.sources.registry import SOURCES
from input_pipeline.transforms.preprocess import make_preprocess
from input_pipeline.transforms.tokenizer import Bytes
from trainers.config import complete

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[3]
FORMATS = ("files", "webdataset", "array_record", "parquet")
SETS = {
    "emoji": ("emoji", "data_dir={data}/emoji_ml", "keywords=True"),
    "grocery": ("grocery", "data_dir={data}/grocery", "split=train"),
}
CONFIG = """
from ml_collections import ConfigDict
def get_config():
    return ConfigDict({"input": {"source": {"name": "files"}}})
"""


@pytest.fixture(scope="module")
def data():
    data = ROOT.parent / "shared" / "data"
    if not data.is_dir():
        pytest.skip("the emoji and grocery sets are not beside this checkout (../shared/data)")
    return data


@pytest.fixture(scope="module", params=SETS)
def converted(request, data, tmp_path_factory):
    """Format -> source, opened by the lines that the command prints; and the source it was."""
    folder, found = tmp_path_factory.mktemp(request.param), {}
    spec = [word.format(data=data) for word in SETS[request.param]]
    (folder / "c.py").write_text(CONFIG)
    for to in FORMATS:
        command = [sys.executable, "-m", "input_pipeline.convert", *spec, f"--to={to}"]
        command += [f"--out={folder / to}", "--shard_examples=500"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        flags = shlex.split(done.stdout.partition("train with it:")[2])
        overrides, rest = complete.split_overrides(flags)
        assert not rest
        block = complete.load(str(folder / "c.py"), overrides).input.source.to_dict()
        assert block.pop("name") == to
        found[to] = SOURCES[to](**block)
    name, *settings = spec
    given = dict(setting.split("=") for setting in settings)
    given = {key: value == "True" if key == "keywords" else value for key, value in given.items()}
    return found, SOURCES[name](**given)


def test_every_example_is_what_it_was(converted):
    found, original = converted
    for to, source in found.items():
        assert len(source) == len(original), to
        for i in range(0, len(original), 7):
            there, here = source[i], original[i]
            assert there["image"] == here["image"] and there["texts"] == here["texts"], to
            names = source.class_names or original.class_names  # a table sorts its own
            assert names[there["label"]] == original.class_names[here["label"]], to


def test_batches_are_identical_where_the_order_is_free(converted):
    found, original = converted
    preprocess = make_preprocess(
        Bytes(), res=24, token_len=16, image="decode | random_resized_crop | flip"
    )

    def batches(source):
        with loader.train_batches(
            source, preprocess, batch_size=64, seed=3, start_step=20, num_threads=2
        ) as made:  # into the second epoch
            return [next(made) for _ in range(12)]

    expected = batches(original)
    for to in ("files", "webdataset", "array_record"):
        for got, wanted in zip(batches(found[to]), expected):
            for key in wanted:
                np.testing.assert_array_equal(got[key], wanted[key], err_msg=to)
    # Parquet is read by row groups: the same examples in each epoch, in an order of its own.
    seen = np.concatenate([batch["index"] for batch in batches(found["parquet"])])
    assert len(set(seen)) > 500 and not np.array_equal(
        seen, np.concatenate([batch["index"] for batch in expected])
    )
