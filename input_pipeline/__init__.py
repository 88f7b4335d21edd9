"""Bytes to batches on the host: sources, transforms, tokenizers, loader."""

from input_pipeline import emoji, files, grocery, memory, scenes, tfds, tokenizers

SOURCES = {
    "files": files.Files,
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
