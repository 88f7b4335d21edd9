"""An evaluation's data are all there, or it stops."""

import pytest

from base.errors import UserError
from evaluators.strict_source import StrictSource
from input_pipeline.errors import BadExample


class Source:
    class_names = ("a",)

    def __len__(self):
        return 2

    def __getitem__(self, i):
        if i:
            raise BadExample("damaged record", "checksum", id="x.tar/1.jpg")
        return {"id": "x.tar/0.jpg"}


def test_what_can_be_read_passes_through():
    strict = StrictSource(Source())
    assert len(strict) == 2 and strict.class_names == ("a",) and strict[0] == {"id": "x.tar/0.jpg"}


def test_an_example_that_cannot_be_read_stops_it():
    told = r"example x.tar/1.jpg cannot be read \(damaged record: checksum\); evaluation skips no"
    with pytest.raises(UserError, match=told):
        StrictSource(Source())[1]


def test_a_source_that_has_left_something_out_is_refused():
    source = Source()
    source.damage = {("no caption", "x.tar"): 2, ("no image", "y.tar"): 5}
    told = r"7 samples of an evaluation's data cannot be used, such as 5 of y.tar \(no image\)"
    with pytest.raises(UserError, match=told):
        StrictSource(source)
