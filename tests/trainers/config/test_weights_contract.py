"""config.contract: what a config leaves out is what its weights expect."""

import dataclasses
import shutil

import pytest
from tiny_models import tiny

from base.errors import UserError
from base.nested import flatten
from siglip import checkpoints
from trainers.config import complete, stored

FILE = """
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict()
    config.init = config.contract = {weights!r}
    config.input = ConfigDict({{"source": {{"name": "scenes", "split": "train"}}}})
    config.model = ConfigDict({{"dtype": "bfloat16"}})
    {more}
    return config
"""
TOKENIZER = {"name": "huggingface", "path": "tokenizer.json"}


@pytest.fixture
def weights(tmp_path):
    """Tiny weights with a tokenizer of their own, as a folder of Hugging Face's."""
    folder = tmp_path / "weights"
    save(folder)
    return folder


def save(folder, **changes):
    given = tiny()
    spec = dataclasses.replace(given.spec, **{"tokenizer": {"name": "bytes"}, **changes})
    checkpoints.write(dataclasses.replace(given, spec=spec), folder, "huggingface")


def load(weights, *overrides, more=""):
    file = weights.parent / "config.py"
    file.write_text(FILE.format(weights=str(weights), more=more))
    return complete.load(str(file), overrides)


def test_what_a_config_leaves_out_is_the_contract_of_the_weights(weights):
    config, contract = load(weights), checkpoints.contract_of(weights)
    for tower in ("img", "txt"):
        expected = getattr(contract, tower)
        assert expected and {key: config.model[tower][key] for key in expected} == expected
    for key in ("res", "token_len", "image", "text"):
        assert config.input[key] == getattr(contract, key)
    assert config.input.tokenizer.to_dict() == {"name": "bytes"}
    assert config.model.dtype == "bfloat16" and config.model.b_init == -10.0


def test_the_file_and_the_flags_win(weights):
    config = load(
        weights,
        ("input.token_len", "9"),
        more="config.input.res, config.input.text = 48, 'strip | tokenize'",
    )
    contract = checkpoints.contract_of(weights)
    assert (config.input.res, config.input.token_len) == (48, 9)
    assert config.input.text == "strip | tokenize" and config.input.image == contract.image


@pytest.mark.parametrize("by_flag", [False, True])
def test_a_tower_of_another_variant_takes_nothing_from_the_weights(weights, by_flag):
    if by_flag:
        config = load(weights, ("model.img.variant", "S/8"))
    else:
        config = load(weights, more="config.model.img = ConfigDict({'variant': 'S/8'})")
    plain = load(weights, ("contract", "None"), ("model.img.variant", "S/8"))
    assert config.model.img.to_dict() == plain.model.img.to_dict()
    assert config.model.txt.to_dict() != plain.model.txt.to_dict()


def test_the_config_of_a_run_is_complete_without_its_weights(weights, tmp_path):
    config = load(weights)
    stored.save(config, tmp_path / "run")
    shutil.rmtree(weights)
    again = stored.read(tmp_path / "run")
    assert again.to_dict() == config.to_dict()
    assert stored.differences(again, tmp_path / "run") == []


def test_another_tokenizer_keeps_the_table_of_a_text_tower_that_is_taken(weights):
    flags = [("input.tokenizer.name", "huggingface"), ("input.tokenizer.path", "x.json")]
    config, rows = load(weights, *flags), checkpoints.contract_of(weights).txt["vocab_size"]
    assert config.input.tokenizer.path == "x.json" and config.model.txt.vocab_size == rows
    new_text_tower = load(weights, *flags, more="config.init_only = ('img',)")
    assert new_text_tower.model.txt.vocab_size is None  # that of the tokenizer


def test_weights_without_a_tokenizer_are_one_line(tmp_path):
    save(tmp_path / "weights", tokenizer=None)
    with pytest.raises(UserError, match="came without a tokenizer; pass tokenizer=FILE") as error:
        load(tmp_path / "weights")
    assert "\n" not in str(error.value)
    config = load(tmp_path / "weights", ("input.tokenizer.name", "bytes"))
    assert config.input.tokenizer.name == "bytes"


def test_the_tokenizer_of_the_weights_serves_a_model_that_is_named(weights):
    config = load(weights, ("contract", "random:siglip-b16-224"))
    assert config.model.img.variant == "B/16" and config.input.res == 224
    assert config.input.tokenizer.name == "bytes"


def test_a_model_without_a_bias_has_none(tmp_path):
    given = tiny(bias=False)
    spec = dataclasses.replace(given.spec, tokenizer={"name": "bytes"})
    checkpoints.write(dataclasses.replace(given, spec=spec), tmp_path / "w.npz", "big_vision")
    assert load(tmp_path / "w.npz").model.b_init is None
    for fresh in ("config.init_only = ('img',)", "del config.init"):
        assert load(tmp_path / "w.npz", more=fresh).model.b_init == -10.0


def test_no_weights_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"config.contract: .* no such file or folder") as error:
        load(tmp_path / "nothing")
    assert "\n" not in str(error.value)


def test_flags_say_as_the_file_does_which_towers_come_from_the_weights(weights):
    tokenizer = ("input.tokenizer.name", "bytes")
    kept = load(weights, tokenizer).model.txt.vocab_size
    assert kept == checkpoints.contract_of(weights).txt["vocab_size"]
    new_tower = load(weights, tokenizer, ("init_only", "('img',)"))
    assert new_tower.model.txt.vocab_size is None  # the trainer takes that of the tokenizer


def test_show_config_tells_what_comes_from_the_weights(weights):
    load(weights)
    file = weights.parent / "config.py"
    tree = complete.load_settings(str(file), [("input.res", "32")])
    sources = {key: setting.source for key, setting in flatten(tree).items()}
    assert sources["input.token_len"] == sources["model.img.variant"] == "config.contract"
    assert sources["input.res"] == "--config.input.res"
    assert "config.py" in sources["model.dtype"]
