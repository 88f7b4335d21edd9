"""Examples on their way into files: their order, their shapes, and how many may be bad."""

import numpy as np
import pytest
import tiny_embed
from tiny_embed import Preprocess, Source

from base.errors import UserError
from embedding import reading
from input_pipeline.errors import BadExample


def test_too_many_bad_examples_stop_the_run_with_their_names(tmp_path):
    message = r"3 of 53 examples cannot be used \(2 damaged record, 1 damaged image\), more than .*"
    message += r"max_bad_fraction=0.05; the worst: a.tar: 2 damaged record; such as id 30"
    with pytest.raises(UserError, match=message):
        tiny_embed.embed(tmp_path, max_bad_fraction=0.05)
    # What was written stays, and counts.
    assert (tmp_path / "rows-00000.arrow").exists()
    with pytest.raises(UserError, match=r"2 of 53 examples"):
        tiny_embed.embed(tmp_path, max_bad_fraction=0.02)
    assert tiny_embed.embed(tmp_path, max_bad_fraction=0.06).manifest


def test_one_bad_example_is_allowed_unless_none_is(tmp_path):
    source = Source(10, {3: "damaged record"})
    assert tiny_embed.embed(tmp_path / "a", source=source, max_bad_fraction=0.01).manifest
    with pytest.raises(UserError, match="1 of 10 examples"):
        tiny_embed.embed(tmp_path / "b", source=source, max_bad_fraction=0)


def test_data_that_has_gone_stops_long_before_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MIN_SAMPLE", 16)
    source = Source(10_000, dict.fromkeys(range(20, 10000), "damaged record"))
    with pytest.raises(UserError, match=r"2\d of 4\d examples cannot be used"):
        tiny_embed.embed(tmp_path, source=source, max_bad_fraction=0.4)
    source = Source(100, dict.fromkeys(range(100), "damaged record"))
    with pytest.raises(UserError, match=r"none of 64 examples .* \(64 damaged record\)"):
        tiny_embed.embed(tmp_path / "b", source=source)


def test_images_of_other_shapes_are_refused(tmp_path):
    class Shapes(Preprocess):
        def pixels(self, example, rng=None):
            image = super().pixels(example, rng)["image"]
            first = np.array_equal(image, Source()[0]["image"])
            return {"image": image if first else image[:3]}

    with pytest.raises(UserError, match=r"image of example \d+ is uint8\[\d, 4, 3\], that of"):
        tiny_embed.embed(tmp_path, preprocess=Shapes())


@pytest.mark.parametrize("examples", [1, 7, 8, 20, 21, 40, 53])
@pytest.mark.parametrize("shards", [slice(None), slice(1, None, 2), slice(0, 1)], ids=str)
def test_slots_hold_every_row_of_their_shards_once_in_whole_batches(examples, shards):
    mine = list(range(-(-examples // 20)))[shards]
    slots = reading.Slots(examples, mine, 20, 8)
    places = [slots[i] for i in range(len(slots))]
    rows = [row for row in places if row >= 0]
    assert rows == [row for row in range(examples) if row // 20 in mine]
    assert slots.rows == len(rows) and len(slots) % 8 == 0
    for first in range(0, len(places), 8):  # no batch has rows of two shards, or none at all
        assert len({row // 20 for row in places[first : first + 8] if row >= 0}) == 1


def test_bad_examples_raise_from_the_source_as_they_are():
    with pytest.raises(BadExample):  # the fake does what the tests above rest on
        Source()[7]
