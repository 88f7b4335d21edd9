"""Which source reads a path."""


def of(path: str, split: str, **settings) -> dict:
    """The block of a table, or of a pattern of tar, Parquet or ArrayRecord files, which have no
    splits: other splits of them are other files."""
    for suffix, name in ((".tar", "webdataset"), (".parquet", "parquet")):
        if path.endswith((suffix, suffix + "}")):
            return {"name": name, "path": path}
    if ".array_record" in path or ".arrayrecord" in path:
        return {"name": "array_record", "path": path}
    source = {"name": "files", **settings, "split": split}
    return {**source, "path": path} if path else source
