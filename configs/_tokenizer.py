"""Chooses the tokenizer that reads a file."""


def of(file: str) -> dict:
    """The config's block for a SentencePiece .model or a tokenizer.json."""
    return {"name": "huggingface" if file.endswith(".json") else "sentencepiece", "path": file}
