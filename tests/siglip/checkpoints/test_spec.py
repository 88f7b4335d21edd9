"""What a model is: read from shapes and from siglip.json, and held against texts."""

import dataclasses
import json

import pytest
from tiny_models import TINY, one_line, tiny

from siglip.checkpoints import CheckpointError, spec
from siglip.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_a_released_model_is_known_by_its_shapes(name):
    contract = spec.of_preset(PRESETS[name])
    assert spec.infer(contract.shapes(), where="here") == contract


@pytest.mark.parametrize("name", ["siglip-b16-224", "siglip2-b16-naflex", "siglip2-b32-256"])
def test_a_tower_alone_is_known_by_its_shapes(name):
    contract = spec.of_preset(PRESETS[name])
    shapes = contract.shapes()
    for tower in ("img", "txt"):
        alone = {n: s for n, s in shapes.items() if n.startswith(f"{tower}/")}
        inferred = spec.infer(alone, where="here")
        assert getattr(inferred, tower) == getattr(contract, tower)
        assert not inferred.bias and inferred.shapes() == alone
        if tower == "txt":
            assert (inferred.pad_id, inferred.text) == (contract.pad_id, contract.text)
            assert (inferred.token_len, inferred.vocab_size) == (64, None)
        else:
            assert (inferred.res, inferred.image) == (contract.res, contract.image)


def test_the_preprocessing_of_an_image_tower_alone_is_that_of_all_models_that_have_it():
    for name, image, res in (
        ("siglip-so400m14-384", "hf-siglip", 384),  # of SigLIP and SigLIP 2: the nearest to both
        ("siglip2-g-opt16-384", "hf-siglip2", 384),
    ):
        shapes = spec.of_preset(PRESETS[name]).shapes()
        inferred = spec.infer({n: s for n, s in shapes.items() if n[:4] == "img/"}, where="x")
        assert (inferred.image, inferred.res) == (image, res), name


def test_a_naflex_tower_of_no_released_size_takes_patches():
    for patch, image in ((16, "hf-naflex"), (8, "decode | naflex(256, 8, 'bilinear-pil')")):
        contract = tiny(
            img={"variant": f"mu/{patch}", "naflex_grid": 3}, res=None, image=image
        ).spec
        inferred = spec.infer(contract.shapes(), where="x")
        assert (inferred.image, inferred.res, inferred.shapes()) == (image, None, contract.shapes())


def test_the_table_without_a_head_may_have_more_rows_than_its_tokenizer_and_pads_with_eos():
    """The file that big_vision#126 has met."""
    contract = spec.of_preset(PRESETS["siglip-so400m16-256-i18n"])
    contract = dataclasses.replace(contract, txt={**contract.txt, "vocab_size": 256_000})
    inferred = spec.infer(contract.shapes(), where="x")
    assert inferred == contract and (inferred.pad_id, inferred.image) == (1, "hf-siglip")
    spec.check_contract(inferred, vocab_size=250_100, token_len=64, eos_id=1, pad_id=1, where="x")


def test_there_is_no_model_is_one_line():
    for change in ({"img": {"variant": "Q/16"}}, {"img": {"variant": "mu/64"}}):
        with pytest.raises(CheckpointError, match=r"there is no model of img="):
            dataclasses.replace(TINY, **change).shapes()


def test_towers_of_this_project_are_known_by_their_shapes():
    for img, txt in (
        ({"variant": "mu/16", "pool": "gap"}, {**TINY.txt, "bottleneck": 8}),
        ({"variant": "mu/16", "pool": "tok", "out_dim": 24}, {**TINY.txt, "out_dim": 24}),
        ({**TINY.img, "width": 48, "num_heads": 3}, {**TINY.txt, "out_dim": 48, "pool": "map"}),
    ):
        contract = tiny(img=img, txt=txt).spec
        inferred = spec.infer(contract.shapes(), where="here")
        assert inferred.shapes() == contract.shapes() and inferred.preset == ""
        assert (inferred.res, inferred.token_len, inferred.vocab_size) == (32, 16, None)


def test_without_a_bias_there_is_none():
    contract = dataclasses.replace(spec.of_preset(PRESETS["siglip-b16-224"]), bias=False)
    assert "b" not in contract.shapes() and spec.infer(contract.shapes(), where="here") == contract


@pytest.mark.parametrize(
    "shapes",
    [{}, {"visual.proj": (3, 4)}, {"img/head/bias": (3,)}, {"txt/Embed_0/embedding": (3, 4)}],
)
def test_arrays_of_something_else_are_refused_in_one_line(shapes):
    with pytest.raises(CheckpointError) as error:
        spec.infer(shapes, where="FILE")
    message = one_line(error)
    assert message.startswith("FILE holds no ") and next(iter(shapes), "none") in message


# siglip.json


def test_the_file_gives_back_the_spec_and_the_same_bytes(tmp_path):
    spec.save(TINY, tmp_path / "a.json")
    assert spec.load(tmp_path / "a.json") == TINY
    spec.save(spec.load(tmp_path / "a.json"), tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"version": 2}', '{"version": 1}', "null", "3"],
)
def test_a_damaged_or_newer_file_is_refused_in_one_line(content, tmp_path):
    (tmp_path / "siglip.json").write_text(content)
    with pytest.raises(CheckpointError) as error:
        spec.load(tmp_path / "siglip.json")
    assert "siglip.json" in one_line(error)


def test_unknown_fields_are_refused(tmp_path):
    content = {"version": 1, **dataclasses.asdict(TINY), "rotary": True}
    (tmp_path / "siglip.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="rotary"):
        spec.load(tmp_path / "siglip.json")


def test_the_tokenizer_travels_with_the_file(tmp_path):
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "c4.model").write_bytes(b"pieces")
    block = {"name": "sentencepiece", "path": str(tmp_path / "from" / "c4.model")}
    given = dataclasses.replace(TINY, tokenizer=block)
    for name, copy in (("siglip.json", "c4.model"), ("b16.siglip.json", "b16.c4.model")):
        (tmp_path / "there").mkdir()
        file = tmp_path / "there" / name
        spec.save(spec.with_tokenizer_beside(given, file), file)
        (tmp_path / "there").rename(tmp_path / name.replace(".", "-"))
        moved = tmp_path / name.replace(".", "-")
        loaded = spec.load(moved / name)
        assert loaded.tokenizer == {**block, "path": str(moved / copy)}
        assert (moved / copy).read_bytes() == b"pieces"
        # Once more from there: no second copy, no second prefix.
        assert spec.with_tokenizer_beside(loaded, moved / name).tokenizer["path"] == copy
        assert len(list(moved.iterdir())) == 2
    block["path"] = "nowhere.model"
    with pytest.raises(CheckpointError, match=r"nowhere\.model is not there; pass --tokenizer"):
        spec.with_tokenizer_beside(dataclasses.replace(TINY, tokenizer=block), tmp_path / "x")


# The contract

RIGHT = dict(vocab_size=259, token_len=16, eos_id=1, pad_id=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 300}, "vocabulary 300 where it expects 259"),
        ({"vocab_size": 32_000}, "vocabulary 32,000 where it expects 259"),
        ({"token_len": 64}, "text length 64 where it expects 16"),
        ({"eos_id": 2}, "EOS id 2 where it expects 1"),
        ({"pad_id": 1}, "padding id 1 where it expects 0 (text = 'lower | tokenize(pad_id=0)')"),
    ],
)
def test_texts_that_the_model_was_not_trained_on_are_refused(changes, message):
    spec.check_contract(TINY, **RIGHT, where="FILE")
    with pytest.raises(CheckpointError) as error:
        spec.check_contract(TINY, **RIGHT | changes, where="FILE")
    assert one_line(error) == one_line(error).strip() and message in one_line(error)
    assert one_line(error).startswith("FILE does not fit these texts: ")


def test_a_table_may_have_a_few_rows_more_and_a_vocabulary_mc4s_hundred():
    released = spec.of_preset(PRESETS["siglip-b16-256-i18n"])
    for vocab_size, fits in (
        (250_000, True),
        (249_000, False),  # what a released model expects is known
        (250_100, True),  # 250,000 pieces and 100 extra ids, which no text has
        (250_101, False),
        (200_000, False),
        (256_000, False),
    ):
        given = dict(vocab_size=vocab_size, token_len=64, eos_id=1, pad_id=1)
        if fits:
            spec.check_contract(released, **given, where="FILE")
        else:
            with pytest.raises(CheckpointError, match="taken for the released siglip-b16-256-i18n"):
                spec.check_contract(released, **given, where="FILE")


@pytest.mark.parametrize(
    ("name", "vocab_size"), [("siglip2-b16-256", 250_100), ("siglip-b16-224", 30_522)]
)
def test_a_vocabulary_of_about_the_size_is_not_that_of_a_released_model(name, vocab_size):
    released = spec.of_preset(PRESETS[name])
    ids = dict(token_len=64, eos_id=1, pad_id=released.pad_id, where="x")
    with pytest.raises(CheckpointError, match="take its own tokenizer"):
        spec.check_contract(released, vocab_size=vocab_size, **ids)
    unknown = dataclasses.replace(released, preset="", vocab_size=None)
    rows = unknown.txt["vocab_size"]
    spec.check_contract(unknown, vocab_size=rows - 10, **ids)
    for wrong in (rows + 1, rows // 2):
        with pytest.raises(CheckpointError):
            spec.check_contract(unknown, vocab_size=wrong, **ids)
