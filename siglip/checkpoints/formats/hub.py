"""Released models by name: from the cache of huggingface_hub, or downloaded into it."""

import json
import pathlib

from siglip.checkpoints.errors import CheckpointError
from siglip.checkpoints.files import safetensors_file
from siglip.checkpoints.formats import hf_tokenizer

PATTERNS = ["*.json", "*.safetensors", "*.model"]  # no pickles
# One of each, beside the arrays.
WHOLE = (
    ("config.json",),
    ("preprocessor_config.json", "processor_config.json"),
    tuple(file for file, _ in hf_tokenizer.FILES),
)


def _has_arrays(folder: pathlib.Path) -> bool:
    """A download that was interrupted may have some of the shards."""
    index = folder / safetensors_file.INDEX
    if not index.exists():
        return (folder / "model.safetensors").exists()
    shards = json.loads(index.read_text())["weight_map"].values()
    return all((folder / shard).exists() for shard in shards)


def fetch(repo: str) -> pathlib.Path:
    """The folder of a repository of Hugging Face's hub.

    Raises:
      CheckpointError: it is not in the cache and cannot be downloaded.
    """
    import huggingface_hub

    def snapshot(**options) -> pathlib.Path:
        found = huggingface_hub.snapshot_download(repo, allow_patterns=PATTERNS, **options)
        return pathlib.Path(found)

    try:
        cached = snapshot(local_files_only=True)
        if not _has_arrays(cached):
            cached = None
    except Exception:  # not in the cache: what it raises differs between versions
        cached = None
    # Whoever has only ever loaded a model has no tokenizer there, or nothing about its images.
    if cached and all(any((cached / name).exists() for name in names) for names in WHOLE):
        return cached
    try:
        return snapshot(etag_timeout=10)
    except Exception as error:  # no network, no such repository, no permission
        if cached:
            return cached
        told = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(
            f"{repo} is not in the cache of Hugging Face's hub and cannot be downloaded ({told}); "
            "download it elsewhere and pass the folder"
        ) from None
