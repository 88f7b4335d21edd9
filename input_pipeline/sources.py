"""All sources by their names in config files; see input_pipeline/__init__.py for what one is."""

from input_pipeline import (
    array_record,
    embeddings,
    emoji,
    files,
    grocery,
    memory,
    parquet,
    scenes,
    tfds,
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
    "embeddings": embeddings.Embeddings,
}
