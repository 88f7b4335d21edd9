"""Bytes to batches on the host: sources, transforms, tokenizers, loader."""

from input_pipeline import emoji, grocery, scenes

SOURCES = {
    "scenes": scenes.Scenes,
    "emoji": emoji.Emoji,
    "grocery": grocery.Grocery,
}
