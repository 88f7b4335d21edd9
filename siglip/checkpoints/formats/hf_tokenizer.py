"""Tokenizers of Hugging Face folders: finding their files, and writing files for transformers that
pad and truncate as training here does."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

from base.words import one_line
from siglip.checkpoints.errors import CheckpointError
from siglip.checkpoints.formats.sentencepiece_json import read_model, to_tokenizer
from siglip.checkpoints.spec import Spec

# The first one that is there counts: a SentencePiece model is what Google released.
FILES = (
    ("spiece.model", "sentencepiece"),
    ("tokenizer.model", "sentencepiece"),
    ("tokenizer.json", "huggingface"),
)


def find(folder: pathlib.Path) -> dict[str, Any] | None:
    """The tokenizer of a folder as a block of config.input.tokenizer; None if there is none."""
    for file, name in FILES:
        if (folder / file).is_file():
            return {"name": name, "path": str(folder / file)}
    return None


def write(contract: Spec, folder: pathlib.Path) -> tuple[Spec, list[str]]:
    """Writes the tokenizer's files.

    Returns:
      The contract with their path, and a note for each thing in which transformers' tokenizer
      differs from the one that the model was trained with.
    """
    notes = _write(contract, folder)
    old = contract.tokenizer
    if old and "path" in old and (new := find(folder)):
        options = old if new["name"] == old["name"] else {}
        contract = dataclasses.replace(contract, tokenizer={**options, **new})
    return contract, notes


def _write(contract: Spec, folder: pathlib.Path) -> list[str]:
    tokenizer = contract.tokenizer
    if tokenizer is None:
        return ["no tokenizer was written: none is known (--tokenizer FILE)"]
    steps = [step.strip() for step in contract.text.split("|")]
    lower, notes = "lower" in steps or "canonicalize" in steps, []
    naflex = bool(contract.img and contract.img.get("naflex_grid"))
    match tokenizer["name"]:
        case "bytes":
            _write_json(_bytes(), contract, folder, lower=lower)
        case "huggingface":
            _write_json(_load(tokenizer["path"]), contract, folder, lower=lower)
        case "sentencepiece" if read_model(tokenizer["path"]).normalizer_spec.add_dummy_prefix:
            if naflex:
                return [
                    "no tokenizer was written: Siglip2Tokenizer has none that gives the same ids"
                ]
            notes = _write_sentencepiece(tokenizer["path"], contract, folder, lower=lower)
        case "sentencepiece":
            equal = to_tokenizer(tokenizer["path"], lower=lower)
            if equal is None:
                return ["no tokenizer was written: transformers has none that gives the same ids"]
            _write_json(equal, contract, folder, lower=False)  # it lower-cases already
        case name:
            return [f"no tokenizer was written: Hugging Face has none like {name!r}"]
    if naflex and (file := folder / "tokenizer.json").exists() and not _like_gemma(file):
        notes.append(
            "transformers' AutoTokenizer takes Siglip2Tokenizer for NaFlex models, which reads "
            "no tokenizer but Gemma's right; load this one by PreTrainedTokenizerFast"
        )
    if set(steps[:-1]) - {"lower"} or "eos=" in steps[-1].replace(" ", ""):
        cased = "lower case, " if lower else ""
        notes.append(
            f"texts are prepared by {contract.text!r} here, and there by {cased}EOS and padding "
            "alone"
        )
    return notes


def _like_gemma(file: pathlib.Path) -> bool:
    """Whether a tokenizer.json is of Gemma's kind: byte-pair merges that fall back to bytes."""
    model = json.loads(file.read_text()).get("model", {})
    return bool(model.get("type") == "BPE" and model.get("byte_fallback"))


def vocab_size(tokenizer: dict[str, Any]) -> int | None:
    """Number of ids of a block of config.input.tokenizer; None if it names no file."""
    if "path" not in tokenizer:
        return None
    if tokenizer["name"] == "sentencepiece":
        return len(read_model(tokenizer["path"]).pieces)
    return 1 + max(_load(tokenizer["path"]).get_vocab(with_added_tokens=True).values())


def _load(path: str) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(path)
    except Exception as error:  # the package raises bare Exception
        raise CheckpointError(f"{path} is no tokenizer.json ({one_line(error)})") from None


def _bytes() -> Any:
    """input_pipeline's tokenizer 'bytes': UTF-8 bytes are 3 to 258, padding is 0, EOS 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = _byte_letters()
    vocab = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {c: b + 3 for b, c in letters.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_letters() -> dict[int, str]:
    """Byte -> the letter for it in byte-level BPE (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


def _write_json(tokenizer: Any, contract: Spec, folder: pathlib.Path, *, lower: bool) -> None:
    """Writes a tokenizer.json that adds EOS and pads to the full length, and with `lower` also
    lower-cases."""
    from tokenizers import normalizers, processors

    eos, pad = tokenizer.id_to_token(contract.eos_id), tokenizer.id_to_token(contract.pad_id)
    if eos is None or pad is None:
        raise _no_id(contract.eos_id if eos is None else contract.pad_id)
    if lower:
        own = [tokenizer.normalizer] if tokenizer.normalizer else []
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {eos}", special_tokens=[(eos, contract.eos_id)]
    )
    tokenizer.enable_truncation(contract.token_len)
    tokenizer.enable_padding(length=contract.token_len, pad_id=contract.pad_id, pad_token=pad)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_config(folder, contract, "PreTrainedTokenizerFast", eos, pad)


def _no_id(expected: int) -> CheckpointError:
    return CheckpointError(
        f"the tokenizer has no id {expected}, which the model expects for EOS or padding: it is "
        "another model's"
    )


def _write_sentencepiece(
    path: str, contract: Spec, folder: pathlib.Path, *, lower: bool
) -> list[str]:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.Load(path)
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{path} is no SentencePiece model ({one_line(error)})") from None
    if (largest := max(contract.eos_id, contract.pad_id)) >= processor.GetPieceSize():
        raise _no_id(largest)
    shutil.copyfile(path, folder / "spiece.model")
    eos, pad = (processor.IdToPiece(i) for i in (contract.eos_id, contract.pad_id))
    _write_config(folder, contract, "SiglipTokenizer", eos, pad, do_lower_case=lower)
    return ["transformers' SiglipTokenizer strips punctuation, which training here keeps"]


def _write_config(
    folder: pathlib.Path, contract: Spec, name: str, eos: str, pad: str, **more: Any
) -> None:
    content = {
        "tokenizer_class": name,
        "model_max_length": contract.token_len,
        "padding_side": "right",
        "eos_token": eos,
        "pad_token": pad,
        "model_input_names": ["input_ids"],  # padding is attended to: no mask
        **more,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n")
