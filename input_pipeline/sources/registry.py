"""All sources by their names in config files; contract.py says what a source is."""

from collections.abc import Callable

from input_pipeline.sources import (
    array_record,
    embeddings,
    files,
    in_memory,
    parquet,
    scenes,
    tfds,
)
from input_pipeline.sources.contract import Source
from input_pipeline.sources.webdataset import source

SOURCES: dict[str, Callable[..., Source]] = {
    "files": files.Files,
    "webdataset": source.WebDataset,
    "parquet": parquet.Parquet,
    "array_record": array_record.ArrayRecord,
    "tfds": tfds.Tfds,
    "memory": in_memory.Memory,
    "scenes": scenes.Scenes,
    "embeddings": embeddings.Embeddings,
}
