"""Released models by name: from the cache of huggingface_hub, or downloaded into it."""

import json
import pathlib

from base.words import one_line
from siglip import presets
from siglip.checkpoints import spec
from siglip.checkpoints.errors import CheckpointError
from siglip.checkpoints.files import safetensors_file
from siglip.checkpoints.formats import hf_tokenizer, huggingface
from siglip.checkpoints.spec import Spec
from siglip.checkpoints.weights import Weights

PATTERNS = ["*.json", "*.safetensors", "*.model"]  # no pickles
# A complete download has one file of each of these beside the arrays.
NEEDED = (
    ("config.json",),
    ("preprocessor_config.json", "processor_config.json"),
    tuple(file for file, _ in hf_tokenizer.FILES),
)


def read(preset: presets.Preset) -> Weights:
    """A released model.

    Raises:
      CheckpointError: it is not in the cache and cannot be downloaded.
    """
    return huggingface.read(fetch(preset.huggingface))


def read_contract(preset: presets.Preset) -> Spec:
    """The contract of a released model, without a download; with its tokenizer if the cache has
    it."""
    folder = cached(preset.huggingface)
    return huggingface.read_contract(folder) if folder else spec.of_preset(preset)


def cached(repo: str) -> pathlib.Path | None:
    """The folder of a repository whose arrays are all in the cache; None if they are not."""
    try:
        folder = _snapshot(repo, local_files_only=True)
    except Exception:  # not in the cache; the type of the error differs between versions
        return None
    return folder if _has_arrays(folder) else None


def fetch(repo: str) -> pathlib.Path:
    """The folder of a repository of Hugging Face's hub.

    Raises:
      CheckpointError: it is not in the cache and cannot be downloaded.
    """
    folder = cached(repo)
    # A program that only loaded the model has left no tokenizer and no processor in the cache.
    if folder and all(any((folder / name).exists() for name in names) for names in NEEDED):
        return folder
    try:
        return _snapshot(repo, etag_timeout=10)
    except Exception as error:  # no network, no such repository, no permission
        if folder:
            return folder
        message = one_line(error, with_type=True)
        raise CheckpointError(
            f"{repo} is not in the cache of Hugging Face's hub and cannot be downloaded "
            f"({message}); download it elsewhere and pass the folder"
        ) from None


def _snapshot(repo: str, **options) -> pathlib.Path:
    import huggingface_hub

    return pathlib.Path(huggingface_hub.snapshot_download(repo, allow_patterns=PATTERNS, **options))


def _has_arrays(folder: pathlib.Path) -> bool:
    """Whether all files of arrays are there; an interrupted download has some of the shards."""
    index = folder / safetensors_file.INDEX
    if not index.exists():
        return (folder / "model.safetensors").exists()
    shards = json.loads(index.read_text())["weight_map"].values()
    return all((folder / shard).exists() for shard in shards)
