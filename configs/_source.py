"""Chooses the source that reads a path."""


def of(path: str, split: str, **settings) -> dict:
    """The config's block for a table, or for a pattern of tar, Parquet or ArrayRecord files.

    `split` is for tables alone; the other formats have files of their own for each split.
    """
    for suffix, name in ((".tar", "webdataset"), (".parquet", "parquet")):
        if path.endswith((suffix, suffix + "}")):
            return {"name": name, "path": path}
    if ".array_record" in path or ".arrayrecord" in path:
        return {"name": "array_record", "path": path}
    source = {"name": "files", **settings, "split": split}
    return {**source, "path": path} if path else source
