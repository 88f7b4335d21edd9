"""Emoji pictures with their names in many languages: a small, real, multilingual set.

Reads two layouts of a folder, told apart by the files in it:
  images.zip, images.jsonl (id, file, group, split), captions/<language>.tsv (id, name, keywords)
  images.zip, captions.jsonl (id, file, group, split, captions: {language: name})
Pictures: Noto Emoji. Names and keywords: Unicode CLDR annotations.
"""

import json
import pathlib

import numpy as np
from absl import logging

from base.errors import UserError
from base.words import nearest
from input_pipeline.sources.zip_file import Zip

EXPECTED = "images.zip with images.jsonl and captions/<language>.tsv, or with captions.jsonl"


class Emoji:
    """One example for each picture that has a name in any of the languages; others are counted.

    `texts` are its names, one for each language that has one, in the order of `languages`;
    `label` is one of the 8 groups in `class_names`, such as 'Food & Drink'. The image is the PNG,
    unchanged, mostly with transparency.

    Args:
      data_dir: folder of one of the layouts above.
      languages: such as ('en', 'de') or 'en,de', or 'all' that the folder has.
      split: 'train' or 'val'.
      keywords: adds one more text for each language, its keywords, as in 'face, happy, smile'.

    Raises:
      UserError: a folder, file, language, split or picture is missing.
    """

    def __init__(
        self,
        *,
        data_dir: str,
        languages: tuple | str = ("en",),
        split: str = "train",
        keywords: bool = False,
    ):
        folder = pathlib.Path(data_dir).expanduser()
        separate = (folder / "images.jsonl").is_file()
        table = folder / ("images.jsonl" if separate else "captions.jsonl")
        expected = [table, folder / "images.zip"] + [folder / "captions"] * separate
        if not data_dir or not all(path.exists() for path in expected):
            raise UserError(
                f"emoji: data_dir {data_dir!r} is not the emoji set, "
                f"pass a folder that has {EXPECTED}, "
                "as in --config configs/emoji.py:data_dir=FOLDER"
            )
        self._images = Zip(folder / "images.zip")
        fields = ("id", "file", "group", "split") + (() if separate else ("captions",))
        rows = _read_jsonl(table, fields)
        if separate:
            present = sorted(p.stem for p in (folder / "captions").glob("*.tsv"))
        else:
            present = sorted({language for row in rows for language in row["captions"]})
        self.languages = _choose(languages, present)
        if keywords and not separate:
            raise UserError(f"emoji: {table} has no keywords, set keywords=False")
        texts: dict[str, list[tuple[str, str]]] = {row["id"]: [] for row in rows}  # (language, _)
        for language in self.languages:
            if separate:
                _add_tsv(texts, folder / "captions", language, keywords)
            else:
                for row in rows:
                    if language in row["captions"]:
                        texts[row["id"]].append((language, row["captions"][language]))

        splits = sorted({row["split"] for row in rows})
        if split not in splits:
            raise UserError(f"emoji: split {split!r} does not exist, {table} has {splits}")
        missing = [row["file"] for row in rows if row["file"] not in self._images]
        if missing:
            raise UserError(
                f"emoji: {folder / 'images.zip'} lacks {len(missing)} pictures that {table.name} "
                f"lists, first {missing[0]!r}; copy the folder again"
            )
        self.class_names = sorted({row["group"] for row in rows})  # of all splits
        rows = [row for row in rows if row["split"] == split]
        self._rows = [row for row in rows if texts[row["id"]]]
        if nameless := len(rows) - len(self._rows):
            logging.warning(
                "emoji: left out %d of %d pictures of split %s, without a name in %s",
                nameless,
                len(rows),
                split,
                ", ".join(self.languages),
            )
        self._texts = [texts[row["id"]] for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict:
        row = self._rows[i]
        return {
            "image": self._images.read_or_nothing(row["file"]),
            "texts": [text for _, text in self._texts[i]],
            "languages": [language for language, _ in self._texts[i]],
            "label": self.class_names.index(row["group"]),
            "id": f"images.zip/{row['file']}",
        }

    def by_language(self) -> dict[str, np.ndarray]:
        found: dict[str, list[int]] = {language: [] for language in self.languages}
        for i, texts in enumerate(self._texts):
            for language in {language for language, _ in texts}:
                found[language].append(i)
        return {language: np.array(rows, np.int64) for language, rows in found.items() if rows}


def _choose(languages: tuple | str, present: list[str]) -> tuple:
    if languages == "all":
        return tuple(present)
    languages = tuple(languages.split(",") if isinstance(languages, str) else languages)
    if not languages:
        raise UserError("emoji: languages needs at least one, such as en, or 'all'")
    for language in languages:
        if language not in present:
            others = nearest(language, present, limit=len(present))
            raise UserError(f"emoji: no captions in language {language!r}; {others}; or 'all'")
    return languages


def _read_jsonl(path: pathlib.Path, fields: tuple) -> list[dict]:
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                lacking = [field for field in fields if field not in row]
            except ValueError:
                raise UserError(f"{path}, line {number}: not JSON, copy the file again") from None
            if lacking:
                raise UserError(f"{path}, line {number}: lacks the field {lacking[0]!r}")
            rows.append(row)
    return rows


def _add_tsv(texts: dict, folder: pathlib.Path, language: str, keywords: bool) -> None:
    path = folder / f"{language}.tsv"
    # By hand: quotation marks in names are just characters, and so are odd line separators.
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    for number, line in enumerate(lines[1:], 2):
        fields = line.split("\t")
        if len(fields) != 3 or fields[0] not in texts:
            raise UserError(
                f"{path}, line {number}: {line[:40]!r} is not a known id, a name and keywords"
            )
        _, name, words = fields
        if name:
            texts[fields[0]].append((language, name))
        if keywords and words:
            texts[fields[0]].append((language, words.replace("|", ", ")))
