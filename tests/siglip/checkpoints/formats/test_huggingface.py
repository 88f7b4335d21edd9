"""Folders of transformers as others write them, and what is refused of them. Without PyTorch."""

import dataclasses
import io
import json
import os
import types

import numpy as np
import pytest
import tokenizers as hf
from tiny_models import TINY, arrays, files, one_line, tiny

from input_pipeline.transforms import tokenizer as tokenizers
from input_pipeline.transforms.preprocess import make_preprocess
from input_pipeline.transforms.tokenizer import TOKENIZERS
from siglip import checkpoints
from siglip.checkpoints import CheckpointError, spec
from siglip.checkpoints.files import safetensors_file
from siglip.checkpoints.files.lazy_array import LazyArray, of_array
from siglip.checkpoints.formats import hf_config, huggingface, names, sentencepiece_json
from siglip.presets import PRESETS

GIVEN = tiny()
CONFIG, ARRAYS = "config.json", "model.safetensors"


def edit(file, **changes):
    """Sets keys ('vision_config__hidden_act'), or with ... takes them out."""
    content = json.loads(file.read_text())
    for key, value in changes.items():
        *path, last = key.split("__")
        block = content
        for part in path:
            block = block[part]
        block[last] = value
        if value is ...:
            del block[last]
    file.write_text(json.dumps(content))


def rewrite(folder, change):
    """model.safetensors after change(leaves)."""
    leaves = {n: of_array(x.read()) for n, x in safetensors_file.read(folder / ARRAYS).items()}
    safetensors_file.write(folder / ARRAYS, change(leaves) or leaves, {"format": "pt"})


@pytest.fixture
def folder(tmp_path):
    """As transformers writes it: without siglip.json."""
    checkpoints.write(GIVEN, tmp_path / "hf", "huggingface")
    (tmp_path / "hf" / spec.FILE).unlink()
    return tmp_path / "hf"


# Released models, by config.json alone


def released_folder(preset, folder):
    """What the Hub has of it but the arrays, with the defaults of transformers left out."""
    made = spec.of_preset(preset)
    full = {**made.txt, "out_dim": preset.out_dim}
    config = hf_config.config_of(dataclasses.replace(made, txt=full), "float32")
    known = {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072}
    known |= {"num_attention_heads": 12, "hidden_act": "gelu_pytorch_tanh"}
    known |= {"layer_norm_eps": 1e-6, "attention_dropout": 0.0, "vision_use_head": True}
    known |= {"num_patches": 256, "max_position_embeddings": 64, "num_channels": 3}
    known_text, known_vision = {"vocab_size": 32000}, {"patch_size": 16, "image_size": 224}
    for key, more in (("text_config", known_text), ("vision_config", known_vision)):
        block = config[key]
        for name, default in {**known, **more}.items():
            if block.get(name) == default:
                del block[name]
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        del config["text_config"][name]
    if config["text_config"]["projection_size"] == config["text_config"].get("hidden_size", 768):
        del config["text_config"]["projection_size"]
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize("name", PRESETS)
def test_a_released_model_is_known_by_its_config_alone(name, tmp_path, monkeypatch):
    preset = PRESETS[name]
    released_folder(preset, tmp_path / "hf")
    made = spec.of_preset(preset)
    full = dataclasses.replace(made, txt={**made.txt, "out_dim": preset.out_dim})

    def unread():
        raise AssertionError("nothing may be read before it is asked for")

    shapes = full.shapes()
    theirs = {
        e.theirs: LazyArray(names.their_shape(e, shapes), np.dtype("f4"), "", unread)
        for e in names.huggingface(shapes)
    }
    monkeypatch.setattr(safetensors_file, "read_folder", lambda folder: theirs)
    read = checkpoints.read(tmp_path / "hf")
    assert read.spec == full
    assert {n: stored.shape for n, stored in read.arrays.items()} == shapes
    assert read.parameters >= preset.parameters


def test_images_are_resized_as_the_processor_says(folder):
    processor = folder / "preprocessor_config.json"
    for resample, program in ((3, "hf-siglip"), (2, "hf-siglip2")):
        edit(processor, resample=resample)
        assert checkpoints.read(folder).spec.image == program
    content = json.loads(processor.read_text())
    processor.unlink()
    assert checkpoints.read(folder).spec.image == "hf-siglip"
    newer = folder / "processor_config.json"
    newer.write_text(json.dumps({"image_processor": content, "processor_class": "X"}))
    assert checkpoints.read(folder).spec.image == "hf-siglip2"


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (CONFIG, {"model_type": "clip"}, "model_type 'clip' is none of siglip, siglip2, siglip_v"),
        (CONFIG, {"vision_config__hidden_act": "gelu"}, "hidden_act 'gelu'; SigLIP has gelu_py"),
        (CONFIG, {"text_config__hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu'"),
        (CONFIG, {"vision_config__vision_use_head": False}, "vision_use_head is false"),
        (CONFIG, {"text_config__layer_norm_eps": 1e-5}, "layer_norm_eps 1e-05"),
        (CONFIG, {"vision_config__image_size": [32, 48]}, "image_size [32, 48] is no square"),
        ("preprocessor_config.json", {"resample": 1}, "Pillow's resample 1, which is none"),
        ("preprocessor_config.json", {"image_mean": [0.48, 0.45, 0.4]}, "image_mean [0.48"),
        ("preprocessor_config.json", {"image_std": [0.26] * 3}, "image_std [0.26"),
    ],
)
def test_what_is_not_siglip_is_refused_in_one_line(file, changes, message, folder):
    edit(folder / file, **changes)
    with pytest.raises(CheckpointError) as error:
        checkpoints.read(folder)
    assert message in one_line(error) and str(folder) in one_line(error)


@pytest.mark.parametrize("content", ["", "[]", "{", "\udcff"])
def test_a_damaged_config_is_refused_in_one_line(content, folder):
    (folder / CONFIG).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError) as error:
        checkpoints.read(folder)
    assert "config.json" in one_line(error)


def test_defaults_may_be_left_out(folder):
    vision, text = ["hidden_act", "num_channels", "vision_use_head", "patch_size"], ["hidden_act"]
    vision, text = ([*keys, "layer_norm_eps", "attention_dropout"] for keys in (vision, text))
    left_out = {f"vision_config__{key}": ... for key in vision}
    left_out |= {f"text_config__{key}": ... for key in text}
    edit(folder / CONFIG, **left_out, text_config__projection_size=...)
    assert arrays(checkpoints.read(folder)) == arrays(GIVEN)


# Arrays


def test_old_buffers_are_ignored_and_scalars_may_have_no_axis(folder):
    def change(leaves):
        for tower, n in (("vision", 4), ("text", 16)):
            ids = of_array(np.arange(n)[None])
            leaves[f"{tower}_model.embeddings.position_ids"] = ids
        for name in ("logit_scale", "logit_bias"):
            leaves[name] = of_array(leaves[name].read().reshape(()))

    rewrite(folder, change)
    assert arrays(checkpoints.read(folder)) == arrays(GIVEN)


def test_shards_are_one_model(folder):
    leaves = safetensors_file.read(folder / ARRAYS)
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    place = {name: shards[i % 3] for i, name in enumerate(leaves)}
    for shard in shards:
        part = {n: stored for n, stored in leaves.items() if place[n] == shard}
        safetensors_file.write(folder / shard, part, {})
    (folder / ARRAYS).unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": place}))
    assert arrays(checkpoints.read(folder)) == arrays(GIVEN)
    assert arrays(checkpoints.read(folder / shards[1])) == arrays(GIVEN)


@pytest.mark.parametrize("prefix", [True, False], ids=["prefix", "no-prefix"])
@pytest.mark.parametrize("tower", ["img", "txt"])
def test_a_tower_alone_is_read_with_its_prefix_or_without(tower, prefix, tmp_path):
    checkpoints.write(GIVEN.only(tower), tmp_path / "hf", "huggingface")
    (tmp_path / "hf" / spec.FILE).unlink()
    name = {"img": "vision_model.", "txt": "text_model."}[tower]
    config = json.loads((tmp_path / "hf" / CONFIG).read_text())
    assert config["model_type"] == f"siglip_{name.removesuffix('.')}"
    if not prefix:
        rewrite(
            tmp_path / "hf", lambda x: {n.removeprefix(name): stored for n, stored in x.items()}
        )
    read = checkpoints.read(tmp_path / "hf")
    assert arrays(read) == arrays(GIVEN.only(tower)) and not read.spec.bias


def test_differences_are_told_in_the_names_of_the_file(folder):
    def change(leaves):
        del leaves["vision_model.head.probe"]
        leaves["vision_model.lora.weight"] = of_array(np.zeros((2, 3), np.float32))
        leaves["text_model.head.weight"] = of_array(np.zeros((32, 31), np.float32))

    rewrite(folder, change)
    with pytest.raises(CheckpointError) as error:
        checkpoints.read(folder)
    message = one_line(error)
    assert "1 missing there: vision_model.head.probe [1, 1, 32]" in message
    assert "1 unknown to the model: vision_model.lora.weight [2, 3]" in message
    assert "text_model.head.weight is [32, 31] there, [32, 32] in the model" in message
    assert "img/" not in message and "txt/" not in message


def test_a_head_or_bias_that_was_filled_in_and_then_trained_is_kept(tmp_path):
    given = tiny(bias=False, txt={**TINY.txt, "out_dim": 0})
    notes = checkpoints.write(given, tmp_path / "hf", "huggingface")
    assert any("identity" in note for note in notes) and any("no bias" in note for note in notes)
    for name in ("text_model.head.bias", "logit_bias"):

        def change(arrays, name=name):
            arrays[name] = of_array(arrays[name].read() + 1)

        rewrite(tmp_path / "hf", change)
    read = checkpoints.read(tmp_path / "hf")
    assert read.spec.bias and read.spec.txt["out_dim"] == 32
    assert read.arrays["b"].read().tolist() == [1]
    np.testing.assert_array_equal(read.arrays["txt/head/kernel"].read(), np.eye(32))
    assert checkpoints.contract_of(tmp_path / "hf") == read.spec


# What transformers reads of a folder


@pytest.fixture(scope="module")
def transformers():
    os.environ["HF_HUB_OFFLINE"] = "1"
    return pytest.importorskip("transformers", reason="pip install 'transformers>=5'")


TEXTS = (
    "", "a", "A Cat Sat On A Mat", "a cat sat on a mat " * 9, "HELLO", "été à la plage",
    "кошка на окне", "猫が座っている", "قطة", "🐈‍⬛ and 🇺🇳", "x" * 15, "x" * 16, "x" * 17,
    "  two  spaces ", "tab\tand\nline", "a\n\n\nb", "a     b",
)  # fmt: skip
PUNCTUATION = ("<h1>a</h1>", "<H2>A", "what's that? a cat!", "(1, 2), a_b; c-d", "...")


def save_json(path):
    vocab = {c: i for i, c in enumerate(["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrst", " "])}
    made = hf.Tokenizer(hf.models.BPE(vocab, [], unk_token="<unk>"))
    made.save(str(path))


def save_sentencepiece(path):
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat sat on a mat!", "what's that? (a dog), a_b; c-d ..."] * 20),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    path.write_bytes(model.getvalue())


def save_gemma_like(path):
    """Merges, bytes for what is unknown, no space before a text: as SigLIP 2's tokenizer."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat sat on a mat!", "what's that? (a dog), a_b; c-d ..."] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=320,
        hard_vocab_limit=False,
        minloglevel=2,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        eos_piece="<eos>",
        # Found before anything is merged, as Gemma's.
        user_defined_symbols=["<h1>", "</h1>", "</s>", "\n\n", "▁▁", "▁▁▁▁", "<H2>"],
    )
    path.write_bytes(model.getvalue())


KINDS = {
    "bytes": (None, tokenizers.Bytes),
    "huggingface": (save_json, tokenizers.HuggingFace),
    "sentencepiece": (save_sentencepiece, tokenizers.SentencePiece),
    "gemma": (save_gemma_like, tokenizers.SentencePiece),
}
FILES = {"huggingface": "tokenizer.json", "sentencepiece": "a.model", "gemma": "a.model"}


def with_tokenizer(kind, folder, **changes):
    """Weights whose texts are of that tokenizer, and the tokenizer."""
    save, make = KINDS[kind]
    block = {}
    if save:
        path = folder / FILES[kind]
        save(path)
        block = {"path": str(path)}
    tokenizer = make(**block)
    changes = {
        "vocab_size": tokenizer.vocab_size,
        "txt": {**TINY.txt, "vocab_size": tokenizer.vocab_size},
        "tokenizer": {"name": "sentencepiece" if kind == "gemma" else kind, **block},
        **changes,
    }
    return tiny(**changes), tokenizer


@pytest.mark.parametrize("pad_id", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_auto_tokenizer_gives_our_tokens(kind, pad_id, tmp_path, transformers):
    text = spec.text_program(1, pad_id)
    given, ours = with_tokenizer(kind, tmp_path, pad_id=pad_id, text=text)
    notes = checkpoints.write(given, tmp_path / "hf", "huggingface")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    preprocess = make_preprocess(ours, token_len=16, res=32, text=text)
    # transformers' SiglipTokenizer strips punctuation, which `write` says.
    stripped = kind == "sentencepiece"
    assert any("strips punctuation" in note for note in notes) == stripped
    tags = ("a </s>b", "</s>") if kind == "gemma" else ()  # EOS of the others
    for caption in (*TEXTS, *tags, *(() if stripped else PUNCTUATION)):
        encoded = theirs(caption, padding="max_length", truncation=True)
        if stripped:  # and white space into one blank each, which SentencePiece does anyway
            assert set(encoded) == {"input_ids"}
        assert encoded["input_ids"] == preprocess.text(caption).tolist(), repr(caption)
    many = theirs(list(TEXTS), padding="max_length", truncation=True)["input_ids"]
    assert many == [preprocess.text(caption).tolist() for caption in TEXTS]
    assert preprocess.text(TEXTS[3])[-1] == 1
    if not stripped:  # the file alone pads and cuts too
        alone = hf.Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
        assert [alone.encode(caption).ids for caption in TEXTS] == many


def test_a_sentencepiece_model_that_no_tokenizer_of_transformers_equals_is_not_written(
    tmp_path, monkeypatch
):
    given, _ = with_tokenizer("gemma", tmp_path, pad_id=0)
    monkeypatch.setattr(sentencepiece_json, "_merges", lambda *unused: [])
    (note,) = checkpoints.write(given, tmp_path / "hf", "huggingface")[-1:]
    assert note.startswith("no tokenizer was written")
    assert not (tmp_path / "hf" / "tokenizer.json").exists()


def test_the_tokenizer_of_a_folder_is_read_back_as_it_was_written(tmp_path):
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        given, ours = with_tokenizer(kind, tmp_path / kind, pad_id=1)
        checkpoints.write(given, tmp_path / kind / "hf", "huggingface")
        block = dict(checkpoints.read(tmp_path / kind / "hf").spec.tokenizer)
        again = TOKENIZERS[block.pop("name")](**block)
        for text in TEXTS:
            assert again.encode(text.lower()) == ours.encode(text.lower()), (kind, text)


def test_a_text_program_that_transformers_has_not_is_said(tmp_path):
    for i, (text, lower, noted) in enumerate(
        (
            ("lower | tokenize", True, False),
            ("tokenize", False, False),
            ("strip | lower | tokenize", True, True),
            ("canonicalize | tokenize", True, True),
            ("lower | tokenize(eos='yes')", True, True),
        )
    ):
        notes = checkpoints.write(tiny(text=text), tmp_path / f"{i}", "huggingface")
        assert any(repr(text) in note for note in notes) == noted, text
        made = json.loads((tmp_path / f"{i}" / "tokenizer.json").read_text())
        assert ("Lowercase" in json.dumps(made["normalizer"])) == lower, text


@pytest.mark.parametrize("kind", ["huggingface", "sentencepiece"])
def test_a_tokenizer_of_another_model_is_refused(kind, tmp_path):
    given, _ = with_tokenizer(kind, tmp_path, pad_id=200)
    with pytest.raises(CheckpointError, match="has no id 200, which the model expects for EOS or"):
        checkpoints.write(given, tmp_path / "hf", "huggingface")
    bad = tmp_path / "bad"
    bad.write_bytes(b"{}")
    block = {"name": kind, "path": str(bad)}
    given = dataclasses.replace(given, spec=dataclasses.replace(given.spec, tokenizer=block))
    with pytest.raises(CheckpointError, match="bad is no ") as error:
        checkpoints.write(given, tmp_path / "hf", "huggingface")
    one_line(error)
    assert not (tmp_path / "hf").exists()


NOISE = np.random.default_rng(0).integers(0, 256, (45, 70, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("image", "exact"),
    [
        ("hf-siglip", True),
        ("hf-siglip2", True),
        ("decode | resize('bicubic-pil')", True),
        ("decode | resize", False),
    ],
)
def test_auto_image_processor_gives_our_pixels_or_a_note(image, exact, tmp_path, transformers):
    notes = checkpoints.write(tiny(image=image), tmp_path / "hf", "huggingface")
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    there = theirs(NOISE, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    ours = make_preprocess(tokenizers.Bytes(), res=32, image=image).image(NOISE) / 127.5 - 1
    assert (np.abs(ours - there).max() <= 3e-7) == exact
    assert any("not equal to the pixel" in note for note in notes) != exact


@pytest.mark.parametrize(("most", "exact"), [(256, True), (64, True), (None, False)])
def test_auto_image_processor_gives_our_patches(most, exact, tmp_path, transformers):
    image = "hf-naflex" if most == 256 else f"decode | naflex({most}, 16, 'bilinear-pil')"
    if most is None:
        image = "decode | naflex(64, 16, 'bilinear')"
    given = tiny(img={"variant": "mu/16", "naflex_grid": 4}, res=None, image=image)
    notes = checkpoints.write(given, tmp_path / "hf", "huggingface")
    assert any("not equal to the pixel" in note for note in notes) != exact
    if exact:
        theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf", backend="pil")
        there = theirs(NOISE, return_tensors="np")
        ours = make_preprocess(tokenizers.Bytes(), image=image).pixels({"image": NOISE})
        np.testing.assert_array_equal(ours["image_mask"], there["pixel_attention_mask"][0])
        np.testing.assert_array_equal(ours["image_shape"], there["spatial_shapes"][0])
        values = np.where(ours["image_mask"][:, None], ours["image"] / 127.5 - 1, 0)
        np.testing.assert_allclose(values, there["pixel_values"][0], rtol=0, atol=3e-7)


@pytest.mark.parametrize("which", ["siglip", "siglip2", "img", "txt"])
def test_auto_config_reads_the_sizes(which, tmp_path, transformers):
    given = GIVEN
    if which == "siglip2":
        given = tiny(img={"variant": "mu/16", "naflex_grid": 4}, res=None, image="hf-naflex")
    elif which != "siglip":
        given = GIVEN.only(which)
    checkpoints.write(given, tmp_path / "hf", "huggingface")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    name = {"img": "SiglipVisionConfig", "txt": "SiglipTextConfig"}.get(which)
    assert type(config).__name__ == (name or f"{which.capitalize()}Config")
    vision, text = (getattr(config, f"{x}_config", config) for x in ("vision", "text"))
    if which != "txt":
        assert (vision.hidden_size, vision.num_hidden_layers, vision.patch_size) == (
            32, given.spec.img.get("depth", 1), 16,
        )  # fmt: skip
        assert vision.num_patches == 16 if which == "siglip2" else vision.image_size == 32
    if which != "img":
        assert (text.vocab_size, text.max_position_embeddings) == (259, 16)
        assert (text.projection_size, text.pad_token_id, text.eos_token_id) == (32, 0, 1)


def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    real = safetensors_file.write

    def stop(path, leaves, metadata):
        real(path, leaves, metadata)
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface, "safetensors_file", types.SimpleNamespace(write=stop))
    with pytest.raises(KeyboardInterrupt):
        checkpoints.write(GIVEN, tmp_path / "deep" / "hf", "huggingface")
    assert files(tmp_path / "deep") == {}
