"""The same data in every format are the same batches."""

import contextlib
import io
import shlex

import numpy as np
import pytest

from base.command_line import split_overrides
from input_pipeline import loader
from input_pipeline.convert import __main__ as convert
from input_pipeline.sources.from_words import make_source
from input_pipeline.sources.registry import SOURCES
from input_pipeline.transforms.preprocess import make_preprocess
from input_pipeline.transforms.tokenizer import Bytes
from programs import prepare_table
from trainers.config import complete

pytestmark = pytest.mark.slow

FORMATS = ("files", "webdataset", "array_record", "parquet")
SETS = {
    "emoji_ml": ("language_column=languages", "languages='en',", "label_column=class"),
    "grocery": ("label_column=class",),
}
CONFIG = """
from ml_collections import ConfigDict
def get_config():
    return ConfigDict({"input": {"source": {"name": "files"}}})
"""


@pytest.fixture(scope="module", params=SETS)
def converted(request, shared_data, tmp_path_factory):
    """Format -> source, opened by the lines that the command prints; and the source it was."""
    folder, copies = tmp_path_factory.mktemp(request.param), {}
    table = folder / "table"
    prepare_table.prepare(shared_data / request.param, table)
    spec = ["files", f"path={table}/pairs.jsonl", *SETS[request.param]]
    (folder / "c.py").write_text(CONFIG)
    for to in FORMATS:
        words = [*spec, f"--to={to}", f"--out={folder / to}", "--shard_examples=500"]
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert convert.main(words) == 0
        flags = shlex.split(out.getvalue().partition("train with it:")[2])
        overrides, rest = split_overrides(flags)
        assert not rest
        block = complete.load(str(folder / "c.py"), overrides).input.source.to_dict()
        assert block.pop("name") == to
        copies[to] = SOURCES[to](**block)
    return copies, make_source(spec)


def test_every_example_is_what_it_was(converted):
    copies, original = converted
    for to, source in copies.items():
        assert len(source) == len(original), to
        for i in range(0, len(original), 7):
            copy, example = source[i], original[i]
            assert copy["image"] == example["image"] and copy["texts"] == example["texts"], to
            names = source.class_names or original.class_names  # a table sorts its own
            assert names[copy["label"]] == original.class_names[example["label"]], to


def test_batches_are_identical_where_the_order_is_free(converted):
    copies, original = converted
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
        for got, wanted in zip(batches(copies[to]), expected):
            for key in wanted:
                np.testing.assert_array_equal(got[key], wanted[key], err_msg=to)
    # Parquet is read by row groups: the same examples in each epoch, in an order of its own.
    seen = np.concatenate([batch["index"] for batch in batches(copies["parquet"])])
    assert len(set(seen)) > 500 and not np.array_equal(
        seen, np.concatenate([batch["index"] for batch in expected])
    )
