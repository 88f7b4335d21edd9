"""All sources by their names in config files; see input_pipeline/__init__.py for what one is."""

from input_pipeline.sources import (
    array_record,
    embeddings,
    files,
    in_memory,
    parquet,
    scenes,
    tfds,
)
from input_pipeline.sources.webdataset import source

SOURCES = {
    "files": files.Files,
    "webdataset": source.WebDataset,
    "parquet": parquet.Parquet,
    "array_record": array_record.ArrayRecord,
    "tfds": tfds.Tfds,
    "memory": in_memory.Memory,
    "scenes": scenes.Scenes,
    "embeddings": embeddings.Embeddings,
}
