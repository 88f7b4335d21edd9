"""Tokenizers of Hugging Face folders: which file it is, and files that pad and cut as we do."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

from base.words import one_line
from siglip.checkpoints.errors import CheckpointError
from siglip.checkpoints.formats.sentencepiece_json import read_model, to_tokenizer
from siglip.checkpoints.spec import Spec

# In the order in which they are believed: a SentencePiece model is what Google released.
FILES = (
    ("spiece.model", "sentencepiece"),
    ("tokenizer.model", "sentencepiece"),
    ("tokenizer.json", "huggingface"),
)


def find(folder: pathlib.Path) -> dict[str, Any] | None:
    """The tokenizer of a folder, as config.input.tokenizer names it; None where there is none."""
    for file, name in FILES:
        if (folder / file).is_file():
            return {"name": name, "path": str(folder / file)}
    return None


def write(made: Spec, folder: pathlib.Path) -> tuple[Spec, list[str]]:
    """Writes the tokenizer's files: the spec with their name, and what of them is not as the model
    was trained."""
    notes = _write(made, folder)
    if made.tokenizer and "path" in made.tokenizer and (found := find(folder)):
        same = found["name"] == made.tokenizer["name"]
        made = dataclasses.replace(made, tokenizer={**(made.tokenizer if same else {}), **found})
    return made, notes


def _write(made: Spec, folder: pathlib.Path) -> list[str]:
    tokenizer = made.tokenizer
    if tokenizer is None:
        return ["no tokenizer was written: none is known (--tokenizer FILE)"]
    steps = [step.strip() for step in made.text.split("|")]
    lower, notes = "lower" in steps or "canonicalize" in steps, []
    naflex = bool(made.img and made.img.get("naflex_grid"))
    match tokenizer["name"]:
        case "bytes":
            _write_json(_bytes(), made, folder, lower=lower)
        case "huggingface":
            _write_json(_load(tokenizer["path"]), made, folder, lower=lower)
        case "sentencepiece" if read_model(tokenizer["path"]).normalizer_spec.add_dummy_prefix:
            if naflex:
                return [
                    "no tokenizer was written: Siglip2Tokenizer has none that gives the same ids"
                ]
            notes = _write_sentencepiece(tokenizer["path"], made, folder, lower=lower)
        case "sentencepiece":
            same = to_tokenizer(tokenizer["path"], lower=lower)
            if same is None:
                return ["no tokenizer was written: transformers has none that gives the same ids"]
            _write_json(same, made, folder, lower=False)  # it does so by itself
        case name:
            return [f"no tokenizer was written: Hugging Face has none like {name!r}"]
    if naflex and (file := folder / "tokenizer.json").exists() and not _like_gemma(file):
        notes.append(
            "transformers' AutoTokenizer takes Siglip2Tokenizer for NaFlex models, which reads "
            "Gemma's tokenizer right and no other; load this one by PreTrainedTokenizerFast"
        )
    if set(steps[:-1]) - {"lower"} or "eos=" in steps[-1].replace(" ", ""):
        cased = "lower case, " if lower else ""
        notes.append(
            f"texts are prepared by {made.text!r} here, and there by {cased}EOS and padding alone"
        )
    return notes


def _like_gemma(file: pathlib.Path) -> bool:
    model = json.loads(file.read_text()).get("model", {})
    return bool(model.get("type") == "BPE" and model.get("byte_fallback"))


def vocab_size(tokenizer: dict[str, Any]) -> int | None:
    """How many ids the tokenizer of a file has; None for what is no file."""
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
        told = one_line(error)
        raise CheckpointError(f"{path} is no tokenizer.json ({told})") from None


def _bytes() -> Any:
    """UTF-8 bytes as ids 3 to 258, 0 for padding, 1 for EOS: input_pipeline's 'bytes'."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = _byte_letters()
    vocab = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {c: b + 3 for b, c in letters.items()}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made


def _byte_letters() -> dict[int, str]:
    """The letter by which byte-level BPE writes each byte (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


def _write_json(tokenizer: Any, made: Spec, folder: pathlib.Path, *, lower: bool) -> None:
    """tokenizer.json that lower-cases, ends in EOS and pads to the full length by itself."""
    from tokenizers import normalizers, processors

    eos, pad = tokenizer.id_to_token(made.eos_id), tokenizer.id_to_token(made.pad_id)
    if eos is None or pad is None:
        raise _no_id(made.eos_id if eos is None else made.pad_id)
    if lower:
        own = [tokenizer.normalizer] if tokenizer.normalizer else []
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {eos}", special_tokens=[(eos, made.eos_id)]
    )
    tokenizer.enable_truncation(made.token_len)
    tokenizer.enable_padding(length=made.token_len, pad_id=made.pad_id, pad_token=pad)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_config(folder, made, "PreTrainedTokenizerFast", eos, pad)


def _no_id(wanted: int) -> CheckpointError:
    return CheckpointError(
        f"the tokenizer has no id {wanted}, which the model expects for EOS or padding: it is "
        "another model's"
    )


def _write_sentencepiece(path: str, made: Spec, folder: pathlib.Path, *, lower: bool) -> list[str]:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.Load(path)
    except (RuntimeError, OSError) as error:
        told = one_line(error)
        raise CheckpointError(f"{path} is no SentencePiece model ({told})") from None
    if (most := max(made.eos_id, made.pad_id)) >= processor.GetPieceSize():
        raise _no_id(most)
    shutil.copyfile(path, folder / "spiece.model")
    eos, pad = (processor.IdToPiece(i) for i in (made.eos_id, made.pad_id))
    _write_config(folder, made, "SiglipTokenizer", eos, pad, do_lower_case=lower)
    return ["transformers' SiglipTokenizer strips punctuation, which training here keeps"]


def _write_config(
    folder: pathlib.Path, made: Spec, name: str, eos: str, pad: str, **more: Any
) -> None:
    content = {
        "tokenizer_class": name,
        "model_max_length": made.token_len,
        "padding_side": "right",
        "eos_token": eos,
        "pad_token": pad,
        "model_input_names": ["input_ids"],  # padding is attended to: no mask
        **more,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n")
