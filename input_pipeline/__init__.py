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

from input_pipeline import (
    array_record,
    emoji,
    files,
    grocery,
    memory,
    parquet,
    scenes,
    tfds,
    tokenizers,
    webdataset,
)

SOURCES = {
    "files": files.Files,
    "webdataset": webdataset.WebDataset,
    "parquet": parquet.Parquet,
    "array_record": array_record.ArrayRecord,
    "tfds": tfds.Tfds,
    "memory": memory.Memory,
    "scenes": scenes.Scenes,
    "emoji": emoji.Emoji,
    "grocery": grocery.Grocery,
}

TOKENIZERS = {
    "bytes": tokenizers.Bytes,
    "sentencepiece": tokenizers.SentencePiece,
    "huggingface": tokenizers.HuggingFace,
}
