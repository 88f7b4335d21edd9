"""Photos of groceries with class names (Klasson et al., WACV 2019).

Reads a folder of images.zip, images.tsv (file, split, class_id, coarse_id) and classes.jsonl
(id, name, coarse_id, coarse).
"""

import csv
import json
import pathlib

from base.errors import UserError
from input_pipeline.sources.zip_file import Zip

FILES = ("images.zip", "images.tsv", "classes.jsonl")
TEMPLATES = (
    "a photo of {}",
    "{}",
    "a photo of {} in a grocery store",
    "a close-up photo of {}",
    "a picture of some {}",
)


class Grocery:
    """One example for each photo; its `texts` are captions made of its class name.

    The fine class gives one more caption, with the coarse class: 'a photo of Galia Melon, a kind
    of Melon'. The image is the JPEG, unchanged, about 128 pixels on its shorter side.

    Args:
      data_dir: folder with the three files above.
      split: 'train', 'val' or 'test'.
      labels: 'fine' (81 `class_names`) or 'coarse' (43); captions name the same classes.

    Raises:
      UserError: a folder, file, split or photo is missing, or `labels` is neither of those.
    """

    def __init__(self, *, data_dir: str, split: str = "train", labels: str = "fine"):
        if labels not in ("fine", "coarse"):
            raise UserError(f"grocery: labels {labels!r} is neither 'fine' nor 'coarse'")
        folder = pathlib.Path(data_dir).expanduser()
        absent = [name for name in FILES if not (folder / name).is_file()]
        if not data_dir or absent:
            raise UserError(
                f"grocery: data_dir {data_dir!r} is not the grocery set, "
                f"pass a folder that has {', '.join(FILES)}, "
                "as in --config configs/grocery.py:data_dir=FOLDER"
            )
        self._images = Zip(folder / "images.zip")
        classes = _read_classes(folder / "classes.jsonl")
        rows = _read_rows(folder / "images.tsv", classes)
        splits = sorted({row["split"] for row in rows})
        if split not in splits:
            raise UserError(f"grocery: split {split!r} does not exist, images.tsv has {splits}")
        missing = [row["file"] for row in rows if row["file"] not in self._images]
        if missing:
            raise UserError(
                f"grocery: {folder / 'images.zip'} lacks {len(missing)} photos that images.tsv "
                f"lists, first {missing[0]!r}; copy the folder again"
            )

        id_key, name_key = ("id", "name") if labels == "fine" else ("coarse_id", "coarse")
        names = {kind[id_key]: kind[name_key] for kind in classes.values()}
        ids = sorted(names)  # labels are positions in class_names, also if ids had gaps
        self.class_names = [names[i] for i in ids]
        self._examples = []
        for row in rows:
            if row["split"] == split:
                kind = classes[int(row["class_id"])]
                texts = [template.format(kind[name_key]) for template in TEMPLATES]
                if labels == "fine" and kind["coarse"] != kind["name"]:
                    texts.append(f"a photo of {kind['name']}, a kind of {kind['coarse']}")
                self._examples.append((row["file"], ids.index(kind[id_key]), texts))

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, i: int) -> dict:
        file, label, texts = self._examples[i]
        return {
            "image": self._images.read_or_nothing(file),
            "texts": list(texts),
            "label": label,
            "id": f"images.zip/{file}",
        }


def _read_classes(path: pathlib.Path) -> dict[int, dict]:
    classes = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            classes[row["id"]] = {key: row[key] for key in ("id", "name", "coarse_id", "coarse")}
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}, line {number}: not JSON with id, name, coarse_id and coarse"
            ) from None
    return classes


def _read_rows(path: pathlib.Path, classes: dict) -> list[dict]:
    with path.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    for number, row in enumerate(rows, 2):
        known = str(row.get("class_id")).isdigit() and int(row["class_id"]) in classes
        if not known or not row.get("file") or not row.get("split"):
            raise UserError(f"{path}, line {number}: not a file, a split and a known class_id")
    return rows
