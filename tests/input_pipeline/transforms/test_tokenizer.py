"""Text to ids, and the table of what EOS and padding become."""

import io

import numpy as np
import pytest
import sentencepiece
import tokenizers as hf

from base.errors import UserError
from input_pipeline.transforms.tokenizer import TOKENIZERS, pad_to_length


@pytest.mark.parametrize(
    ("eos", "pad_id", "rows"),
    [
        ("none", 0, [[2, 0, 0], [2, 2, 0], [2, 2, 2]]),
        ("yes", 0, [[2, 1, 0], [2, 2, 1], [2, 2, 2]]),
        ("sticky", 0, [[2, 1, 0], [2, 2, 1], [2, 2, 1]]),  # SigLIP 2
        ("sticky", 1, [[2, 1, 1], [2, 2, 1], [2, 2, 1]]),  # SigLIP v1
    ],
)
def test_eos_and_padding_are_those_of_the_released_models(eos, pad_id, rows):
    for n, row in enumerate(rows, 1):
        padded = pad_to_length([2] * n, 3, eos_id=1, pad_id=pad_id, eos=eos)
        assert padded.dtype == np.int32 and padded.tolist() == row


@pytest.mark.parametrize("eos", ["none", "yes", "sticky"])
def test_any_length_fits(eos):
    for n in range(5):
        for token_len in (1, 2, 3):
            padded = pad_to_length(range(2, 2 + n), token_len, eos_id=1, pad_id=0, eos=eos)
            assert padded.shape == (token_len,)
    assert pad_to_length([5, 6], 1, eos_id=1, pad_id=0, eos="sticky").tolist() == [1]


def test_another_eos_mode_is_refused():
    with pytest.raises(ValueError, match="eos='always' is none of sticky, yes, none"):
        pad_to_length([2], 3, eos_id=1, pad_id=0, eos="always")


def test_bytes_need_no_file_and_take_any_language():
    tokenizer = TOKENIZERS["bytes"]()
    assert tokenizer.encode("aé") == [97 + 3, 0xC3 + 3, 0xA9 + 3]
    assert tokenizer.encode("") == []
    ids = tokenizer.encode("".join(map(chr, [*range(0x250), 0x4E2D, 0x1F600])))
    assert min(ids) >= 3 and max(ids) < tokenizer.vocab_size
    assert tokenizer.eos_id == 1


def train_sentencepiece(path, **kw):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat sat on a mat", "a dog ran to a cat"] * 20),
        model_writer=model,
        vocab_size=24,
        hard_vocab_limit=False,
        minloglevel=2,
        **kw,
    )
    path.write_bytes(model.getvalue())


def test_sentencepiece_gives_ids_without_specials(tmp_path):
    train_sentencepiece(tmp_path / "a.model", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    tokenizer = TOKENIZERS["sentencepiece"](path=str(tmp_path / "a.model"))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "a.model"))
    ids = tokenizer.encode("a cat")
    assert ids == processor.encode("a cat") and processor.decode(ids) == "a cat"
    assert tokenizer.eos_id == 1 and tokenizer.eos_id not in ids
    assert tokenizer.vocab_size == processor.vocab_size()


def test_sentencepiece_says_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match=r"^[^\n]*no file [^\n]*set config.input.tokenizer.path"):
        TOKENIZERS["sentencepiece"](path=str(tmp_path / "none.model"))
    (tmp_path / "b.model").write_bytes(b"{}")
    with pytest.raises(UserError, match=r"b.model is not a SentencePiece model"):
        TOKENIZERS["sentencepiece"](path=str(tmp_path / "b.model"))
    train_sentencepiece(tmp_path / "c.model", eos_id=-1)
    with pytest.raises(UserError, match=r"the vocabulary of .*c.model has no EOS"):
        TOKENIZERS["sentencepiece"](path=str(tmp_path / "c.model"))


def save_huggingface(path, vocab):
    tokenizer = hf.Tokenizer(hf.models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    last = max(vocab, key=vocab.get)
    tokenizer.post_processor = hf.processors.TemplateProcessing(
        single=f"{last} $A {last}", special_tokens=[(last, vocab[last])]
    )
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=5)
    tokenizer.save(str(path))


def test_huggingface_uses_the_ids_only(tmp_path):
    vocab = {"[UNK]": 0, "a": 2, "cat": 3, "sat": 4, "</s>": 9}
    save_huggingface(tmp_path / "tokenizer.json", vocab)
    tokenizer = TOKENIZERS["huggingface"](path=str(tmp_path / "tokenizer.json"))
    # No padding, truncation or specials of the file; the table reaches the highest id.
    assert tokenizer.encode("a cat sat") == [2, 3, 4]
    assert tokenizer.encode("a") == [2]
    assert tokenizer.eos_id == 9 and tokenizer.vocab_size == 10
    chosen = TOKENIZERS["huggingface"](path=str(tmp_path / "tokenizer.json"), eos_token="cat")
    assert chosen.eos_id == 3


def test_huggingface_says_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match=r"^[^\n]*no file [^\n]*to a tokenizer.json file$"):
        TOKENIZERS["huggingface"](path=str(tmp_path / "none.json"))
    (tmp_path / "b.json").write_text("[]\n")
    with pytest.raises(UserError, match=r"^[^\n]*b.json is not a tokenizer.json[^\n]*$"):
        TOKENIZERS["huggingface"](path=str(tmp_path / "b.json"))
    save_huggingface(tmp_path / "c.json", {"[UNK]": 0, "a": 1})
    with pytest.raises(UserError, match=r"no token </s> or .*config.input.tokenizer.eos_token"):
        TOKENIZERS["huggingface"](path=str(tmp_path / "c.json"))
    with pytest.raises(UserError, match="no token <end>;"):
        TOKENIZERS["huggingface"](path=str(tmp_path / "c.json"), eos_token="<end>")


def test_eos_is_the_special_token_where_others_are_spelt_so_too(tmp_path):
    """Gemma's vocabulary has the HTML tag </s>, and its end of a text is <eos>."""
    vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "a": 3, "</s>": 4}
    made = hf.Tokenizer(hf.models.BPE(vocab, [], unk_token="<unk>"))
    made.save(str(tmp_path / "plain.json"))
    assert TOKENIZERS["huggingface"](path=str(tmp_path / "plain.json")).eos_id == 1  # the lower id
    made = hf.Tokenizer(hf.models.BPE({**vocab, "<eos>": 4, "</s>": 1}, [], unk_token="<unk>"))
    made.add_special_tokens(["<eos>"])
    made.save(str(tmp_path / "special.json"))
    assert TOKENIZERS["huggingface"](path=str(tmp_path / "special.json")).eos_id == 4
    assert (
        TOKENIZERS["huggingface"](path=str(tmp_path / "special.json"), eos_token="</s>").eos_id == 1
    )
