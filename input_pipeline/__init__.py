"""Bytes to batches on the host: sources, transforms, tokenizers, loader.

A source is a class whose keyword-only settings are config keys, with
* `__len__`, and `__getitem__(i)` -> example, from any thread and the same for ever:
    image      encoded bytes, or uint8 [h, w, 3]
    texts      list of captions; training draws one, evaluation sees all
    id         its name, for people
    weights, languages   (optional) of each text: how often it is drawn; its language tag
    label      (optional) class, an index into `class_names` where the source has them
    shard      (optional) the file it came in
  An example that cannot be read raises BadExample; mistakes of the settings, UserError.
* `class_names`: list, or None;
* `blocks`, `window` (optional): see order.BlockEpochs;
* `by_language()` (optional): language tag -> indices of the examples that have a text in it;
* `damage` (optional): (kind, file) -> samples that were left out while opening.
"""

from typing import TYPE_CHECKING, Any

from input_pipeline import tokenizers

if TYPE_CHECKING:
    from input_pipeline.sources import SOURCES

__all__ = ["SOURCES", "TOKENIZERS"]

TOKENIZERS = {
    "bytes": tokenizers.Bytes,
    "sentencepiece": tokenizers.SentencePiece,
    "huggingface": tokenizers.HuggingFace,
}


def __getattr__(name: str) -> Any:
    # SOURCES when it is asked for: its readers import TFDS, Arrow and more, which nobody needs who
    # only prepares images and texts.
    if name == "SOURCES":
        from input_pipeline.sources import SOURCES

        return SOURCES
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
