"""Writes the same JPEGs in every format, once for a folder."""

import json
import pathlib
import subprocess
import sys
import zipfile
from typing import Any

from base.errors import UserError
from benchmarks import input_photos

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECIPE, SUMMARY = "recipe.json", "made.json"  # written first and last
SHARDS = 4
FORMATS = ("webdataset", "parquet", "array_record")


def prepare(folder: pathlib.Path, count: int, photos: str = "") -> dict[str, Any]:
    """Writes all formats, or takes those that an earlier run of the same recipe wrote.

    Returns:
      count, mean_bytes of a JPEG, and how they were drawn, in words.

    Raises:
      UserError: the folder has something else, the photographs cannot be read, or a format cannot
        be written.
    """
    picture = input_photos.Photos(photos, count) if photos else input_photos.Textures()
    recipe = {"count": count, "pictures": picture.key, "bytes": input_photos.MEAN_BYTES}
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not (folder / RECIPE).is_file():
            raise UserError(f"--data {folder} is not empty, and not of this benchmark")
        if (before := json.loads((folder / RECIPE).read_text())) != recipe:
            raise UserError(f"--data {folder} was made as {before}; give a new folder")
    if (folder / SUMMARY).exists():
        return json.loads((folder / SUMMARY).read_text())
    (folder / "files").mkdir(parents=True, exist_ok=True)
    (folder / "zip").mkdir(exist_ok=True)
    (folder / RECIPE).write_text(json.dumps(recipe))
    summary = _write_files(folder, picture, count)
    _convert(folder, count)
    (folder / SUMMARY).write_text(json.dumps(summary))
    return summary


def _write_files(folder: pathlib.Path, picture: Any, count: int) -> dict[str, Any]:
    """Writes the folder, its table, and the zip file, whose members are not compressed."""
    size = 0
    with (
        (folder / "files" / "pairs.jsonl").open("w") as table,
        zipfile.ZipFile(folder / "zip" / "images.zip", "w") as archive,
    ):
        grain, images = input_photos.make(picture, count)
        for i, image in enumerate(images):
            name = f"{i:08d}.jpg"
            (folder / "files" / name).write_bytes(image)
            archive.writestr(name, image)
            table.write(json.dumps({"image": name, "caption": input_photos.caption(i)}) + "\n")
            size += len(image)
    how = (
        f"{picture.description}, at {input_photos.WIDTH} x {input_photos.HEIGHT}; "
        f"Gaussian grain in the luminance, blurred by {input_photos.GRAIN_PX} px, "
        f"of {grain:g} levels; JPEG of quality {input_photos.QUALITY}, 4:2:0"
    )
    return {"count": count, "mean_bytes": size / count, "how": how}


def _convert(folder: pathlib.Path, count: int) -> None:
    """Converts to all formats at once, by the project's own converter."""
    processes = {}
    for to in FORMATS:
        source = ["files", f"path={folder / 'files' / 'pairs.jsonl'}"]
        size = ["--shard_examples", str(-(-count // SHARDS))]
        command = [sys.executable, "-m", "input_pipeline.convert", "--to", to, *source, *size]
        processes[to] = subprocess.Popen(
            [*command, "--out", str(folder / to)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
    stderr = {to: process.communicate()[1] for to, process in processes.items()}
    for to, process in processes.items():
        if process.returncode:
            last = (stderr[to].strip().splitlines() or ["it says nothing"])[-1]
            raise UserError(f"input_pipeline.convert --to {to}: {last.removeprefix('error: ')}")
