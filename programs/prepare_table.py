"""Turns the small emoji and grocery sets into tables that the source `files` reads.

  python -m programs.prepare_table --data emoji_ml --out emoji
  python main.py --config configs/emoji.py:data_dir=emoji --workdir runs/emoji

DATA is the folder of one of these sets; the files in it tell which it is:
  emoji      images.zip, images.jsonl (id, file, group, split) and captions/<language>.tsv
             (id, name, keywords); pictures of Noto Emoji, texts of Unicode CLDR
  emoji      images.zip, captions.jsonl (file, group, split, captions: {language: name})
  groceries  images.zip, images.tsv (file, split, class_id) and classes.jsonl (id, name, coarse);
             photos of Klasson et al., WACV 2019
OUT gets images.zip, the licences, SOURCE.md and pairs.jsonl, one object for each picture:
  image      its name, 'images.zip/<file>'
  caption    list of captions. Emoji: the name in each language, and for split 'train' the keywords
             too, as in 'face, happy, smile'. Groceries: the class name in several templates
  languages  emoji only: the language of each caption
  split      'train', 'val' or, for groceries, 'test'
  class      group of the emoji, or class of the grocery; coarse_class: its family
"""

import csv
import json
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from base import command_line, whole_file
from base.errors import UserError

TABLE = "pairs.jsonl"
GROCERY_TEMPLATES = (
    "a photo of {}",
    "{}",
    "a photo of {} in a grocery store",
    "a close-up photo of {}",
    "a picture of some {}",
)


def main(argv: list[str]) -> int:
    """Prepares the table; returns the exit code."""
    return command_line.run(lambda: _run(argv), failures=(OSError,))


def _run(argv: list[str]) -> None:
    parser = command_line.Parser(prog="python -m programs.prepare_table", description=__doc__)
    parser.add_argument("--data", required=True, metavar="FOLDER", help="the set as it came")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new folder")
    flags = parser.parse_args(argv)
    count = prepare(pathlib.Path(flags.data), pathlib.Path(flags.out))
    print(f"{count} pictures in {flags.out}/{TABLE}")


def prepare(data: pathlib.Path, out: pathlib.Path) -> int:
    """Writes the table and copies the images; the number of rows.

    Raises:
      UserError: `data` is none of the sets, or a row of it is invalid.
    """
    data, out = data.expanduser(), out.expanduser()
    if not (data / "images.zip").is_file():
        raise UserError(f"--data {data} has no images.zip; pass the folder of one of the sets")
    if (out / TABLE).exists():
        raise UserError(f"--out {out} has a {TABLE} already; pass a new folder")
    if (data / "captions.jsonl").is_file():
        rows = _emoji_rows_from_one_table(data)
    elif (data / "images.jsonl").is_file():
        rows = _emoji_rows_from_language_tables(data)
    elif (data / "images.tsv").is_file():
        rows = _grocery_rows(data)
    else:
        raise UserError(
            f"--data {data} has none of captions.jsonl, images.jsonl and images.tsv; "
            "pass the folder of one of the sets"
        )
    try:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows if row["caption"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--data {data} is damaged ({error!r}); copy it again") from error
    out.mkdir(parents=True, exist_ok=True)
    for file in (data / "images.zip", *sorted(data.glob("LICENSE*")), *data.glob("SOURCE.md")):
        shutil.copyfile(file, out / file.name)
    whole_file.write_text(out / TABLE, "".join(lines))  # last: with it the folder is complete
    return len(lines)


def _emoji_rows_from_one_table(data: pathlib.Path) -> Iterator[dict[str, Any]]:
    for row in _read_jsonl(data / "captions.jsonl"):
        yield _emoji_row(row, sorted(row["captions"].items()))


def _emoji_rows_from_language_tables(data: pathlib.Path) -> Iterator[dict[str, Any]]:
    rows = list(_read_jsonl(data / "images.jsonl"))
    captions: dict[str, list[tuple[str, str]]] = {row["id"]: [] for row in rows}
    is_train = {row["id"]: row["split"] == "train" for row in rows}
    for path in sorted((data / "captions").glob("*.tsv")):
        # Not csv: quotation marks in names are plain characters, and so are odd line separators.
        for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")[1:]:
            id_, name, keywords = line.split("\t")
            if name:
                captions[id_].append((path.stem, name))
            if keywords and is_train[id_]:  # retrieval is measured on names alone
                captions[id_].append((path.stem, keywords.replace("|", ", ")))
    for row in rows:
        yield _emoji_row(row, captions[row["id"]])


def _emoji_row(row: dict[str, Any], captions: list[tuple[str, str]]) -> dict[str, Any]:
    return {
        "image": f"images.zip/{row['file']}",
        "caption": [text for _, text in captions],
        "languages": [language for language, _ in captions],
        "split": row["split"],
        "class": row["group"],
    }


def _grocery_rows(data: pathlib.Path) -> Iterator[dict[str, Any]]:
    classes = {row["id"]: row for row in _read_jsonl(data / "classes.jsonl")}
    with (data / "images.tsv").open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
            kind = classes[int(row["class_id"])]
            captions = [template.format(kind["name"]) for template in GROCERY_TEMPLATES]
            if kind["coarse"] != kind["name"]:
                captions.append(f"a photo of {kind['name']}, a kind of {kind['coarse']}")
            yield {
                "image": f"images.zip/{row['file']}",
                "caption": captions,
                "split": row["split"],
                "class": kind["name"],
                "coarse_class": kind["coarse"],
            }


def _read_jsonl(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
