"""What the command shows is what a run would see."""

import importlib
import re

import numpy as np
import pytest
from PIL import Image

from programs import contact_sheet

inspect = importlib.import_module("programs.inspect_data")

CONFIG = """
from ml_collections import ConfigDict
def get_config():
    return ConfigDict({{
        "input": {{
            "batch_size": 8, "res": 16, "token_len": 8,
            "source": {{"name": "mixture"}},
            "mixture": {{
                "a": {{"name": "files", "path": {path!r}, "weight": 3.0}},
                "b": {{"name": "files", "path": {path!r}, "weight": 1.0, "split": "other"}},
            }},
        }},
    }})
"""


@pytest.fixture
def config(tmp_path):
    lines = ["image,caption,split"]
    for i in range(6):
        Image.new("RGB", (20, 10), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,Number {i},{'other' if i > 3 else 'train'}")
    (tmp_path / "1.png").write_bytes(b"nothing")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    (tmp_path / "c.py").write_text(CONFIG.format(path=str(tmp_path / "pairs.csv")))
    return tmp_path / "c.py"


def run(config, *flags):
    return inspect.main([f"--config={config}", f"--sheet={config.parent / 's.png'}", *flags])


def test_it_shows_shapes_counts_captions_tokens_and_a_sheet(config, capsys):
    assert run(config, "--batches=10", "--step=3") == 0
    out = capsys.readouterr().out
    assert "6 examples; the first 8 rows of each batch of 8 are made" in out
    assert "image        uint8[8, 16, 16, 3]" in out and "text         int32[8, 8]" in out
    assert "80 rows of steps 3 to 12:" in out
    assert "sources: a 60, b 20" in out
    assert "a run stops above 1 % (config.input.max_bad_fraction=0.01)" in out
    (unusable,) = re.findall(r"unusable: (\d+) unknown image format", out)
    assert abs(int(unusable) - 15) <= 1 and "the worst: 1.png" in out
    assert "'Number 3'\n    -> 'number '" in out and " images/s, " in out
    with Image.open(config.parent / "s.png") as picture:
        assert picture.width > 1000 and len(picture.convert("L").getcolors(256)) > 4


def test_any_config_key_can_be_changed(config, capsys):
    assert run(config, "--config.input.image=hf-naflex", "--config.input.text=lower") == 2
    assert "config.input.text must end with `tokenize`" in capsys.readouterr().err
    assert run(config, "--config.input.image=hf-naflex") == 0
    out = capsys.readouterr().out
    assert "image        uint8[8, 256, 768]" in out and "image_shape  int32[8, 2]" in out


def test_of_a_large_batch_it_shows_the_first_rows(config, capsys, monkeypatch):
    monkeypatch.setattr(inspect.loader.Batches, "__next__", spied := _spy(inspect.loader.Batches))
    assert run(config, "--config.input.batch_size=1026", "--step=3", "--batches=2") == 0
    assert "the first 171 rows of each batch of 1026" in capsys.readouterr().out
    starts = [batch["position"][0] for batch in spied.batches]
    assert starts == [3 * 1026, 4 * 1026]


def _spy(cls):
    original = cls.__next__

    def spied(self):
        spied.batches.append(original(self))
        return spied.batches[-1]

    spied.batches = []
    return spied


def test_patches_are_put_together_again():
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    patches = image.reshape(2, 2, 3, 2, 3).swapaxes(1, 2).reshape(6, 12)
    padded = np.concatenate([patches, np.zeros((3, 12), np.uint8)])
    batch = {"image": padded[None], "image_shape": np.array([[2, 3]]), "mask": [True]}
    np.testing.assert_array_equal(contact_sheet.pixels(batch, 0), image)


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--step=-1", "--step=-1 must be at least 0"),
        ("--batches=0", "--batches=0 must be at least 1"),
        ("--stp=1", "unrecognized arguments: --stp=1"),
        ("--config.input.rse=1", "config.input.rse"),
        ("--sheet=nowhere/x.png", "--sheet=nowhere/x.png cannot be written"),
    ],
)
def test_mistakes_are_one_line(config, capsys, flag, told):
    assert run(config, flag) == 2
    err = capsys.readouterr().err
    assert told in err and err.startswith("error: ") and err.count("\n") == 1


def test_an_embedding_is_a_strip_of_grays():
    batch = {"image": np.array([[0, -1, 0.5, 0], [0, 0, 0, 0]], np.float32)}
    strip = contact_sheet.pixels(batch, 0)
    assert strip.dtype == np.uint8 and strip.shape == (2, 4, 3)
    assert strip[0, :, 0].tolist() == [0, 255, 127, 0]
    assert not contact_sheet.pixels(batch, 1).any()
    contact_sheet.draw([(strip, "", "")])


@pytest.mark.parametrize(
    ("bad", "allowed", "stops"), [(1, 0.01, False), (1, 0, True), (2, 0.1, True)]
)
def test_it_says_that_a_run_stops_where_a_run_does(capsys, bad, allowed, stops):
    codes = np.zeros(16, np.int32)
    codes[:bad] = 1
    sample = inspect.Sample([{"bad": codes}], inspect.BadExamples(), "")
    inspect.print_bad(sample, allowed)
    assert ("a run stops above" in capsys.readouterr().out) == stops
