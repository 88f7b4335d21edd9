"""The same JPEGs in every format, made once in a folder."""

import json
import pathlib
import subprocess
import sys
import zipfile
from typing import Any

from benchmarks import input_photos
from benchmarks.loss_case import Mistake

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECIPE, MADE = "recipe.json", "made.json"  # written first and last
SHARDS = 4
FORMATS = ("webdataset", "parquet", "array_record")


def prepare(folder: pathlib.Path, count: int, photos: str = "") -> dict[str, Any]:
    """Makes them, or takes what an earlier run of the same recipe made.

    Returns:
      count, mean_bytes of a JPEG, how: in words.

    Raises:
      Mistake: the folder has something else, the photographs cannot be read, or a format cannot
        be made.
    """
    picture = input_photos.Photos(photos, count) if photos else input_photos.Textures()
    recipe = {"count": count, "pictures": picture.key, "bytes": input_photos.MEAN_BYTES}
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not (folder / RECIPE).is_file():
            raise Mistake(f"--data {folder} is not empty, and not of this benchmark")
        if (before := json.loads((folder / RECIPE).read_text())) != recipe:
            raise Mistake(f"--data {folder} was made as {before}; give a new folder")
    if (folder / MADE).exists():
        return json.loads((folder / MADE).read_text())
    (folder / "files").mkdir(parents=True, exist_ok=True)
    (folder / "zip").mkdir(exist_ok=True)
    (folder / RECIPE).write_text(json.dumps(recipe))
    made = _write_files(folder, picture, count)
    _convert(folder, count)
    (folder / MADE).write_text(json.dumps(made))
    return made


def _write_files(folder: pathlib.Path, picture: Any, count: int) -> dict[str, Any]:
    """The folder, its table, and the zip file, which has its members stored as they are."""
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
        f"{picture.told}, at {input_photos.WIDTH} x {input_photos.HEIGHT}; Gaussian grain in the "
        f"luminance, blurred by {input_photos.GRAIN_PX} px, of {grain:g} levels; JPEG of quality "
        f"{input_photos.QUALITY}, 4:2:0"
    )
    return {"count": count, "mean_bytes": size / count, "how": how}


def _convert(folder: pathlib.Path, count: int) -> None:
    """By the project's own converter, all at once."""
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
    said = {to: process.communicate()[1] for to, process in processes.items()}
    for to, process in processes.items():
        if process.returncode:
            last = (said[to].strip().splitlines() or ["it says nothing"])[-1]
            raise Mistake(f"input_pipeline.convert --to {to}: {last.removeprefix('error: ')}")
