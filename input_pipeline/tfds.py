"""TensorFlow Datasets by random access, without TensorFlow: ArrayRecord files only."""

import os
import pathlib
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from input_pipeline.errors import UserError
from input_pipeline.nearest import nearest


class Tfds:
    """A prepared TFDS data set. Images stay encoded: the loader's threads decode them.

    Args:
      dataset: its name, with config and version where there are several: 'imagenet2012:5.1.0'.
      data_dir: the folder it was prepared in; '': $TFDS_DATA_DIR, else ~/tensorflow_datasets.
      split: as in TFDS, slices too: 'validation', 'train[:99%]'.
      image: path of the image among the features.
      text: path of the caption or captions ('captions/text' in coco_captions). '': none.
      label: path of the class ('label' in imagenet2012), which gives class_names. '': none.

    Raises:
      UserError: it is not prepared there, is not ArrayRecord, or has no such split or feature.
    """

    def __init__(
        self,
        *,
        dataset: str,
        data_dir: str = "",
        split: str = "train",
        image: str = "image",
        text: str = "captions/text",
        label: str = "",
    ):
        folder = os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR") or _DEFAULT)
        builder = _builder(dataset, folder)
        self._name, self._features = f"{dataset}/{split}", builder.info.features
        self._image, self._text, self._label = image, text, label
        self.class_names: list[str] | None = None
        if not isinstance(self._feature("image", image), tfds.features.Image):
            raise UserError(
                f"tfds: feature image={image!r} of {dataset} is not an image; "
                f"{nearest(image, _leaves(self._features))}"
            )
        if text and not isinstance(_inside(self._feature("text", text)), tfds.features.Text):
            raise UserError(f"tfds: feature text={text!r} of {dataset} is not text")
        if label:
            feature = self._feature("label", label)
            if isinstance(feature, tfds.features.ClassLabel):
                self.class_names = list(feature.names)
            elif feature.shape != () or not np.issubdtype(feature.np_dtype, np.integer):
                raise UserError(f"tfds: feature label={label!r} of {dataset} is not a class")
        decoders: Any = tfds.decode.SkipDecoding()
        for part in reversed(image.split("/")):
            decoders = {part: decoders}
        try:
            self._records = builder.as_data_source(split=split, decoders=decoders)
        except (ValueError, KeyError) as error:
            raise UserError(
                f"tfds: {dataset} has no split {split!r}; {nearest(split, builder.info.splits)}"
            ) from error

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> dict[str, Any]:
        record = self._records[i]
        example = {
            "image": bytes(_at(record, self._image)),
            "texts": _strings(_at(record, self._text)) if self._text else [],
            "id": f"{self._name}[{i}]",
        }
        if self._label:
            example["label"] = int(_at(record, self._label))
        return example

    def _feature(self, key: str, path: str) -> Any:
        feature = self._features
        for part in path.split("/"):
            feature = _inside(feature)
            if not isinstance(feature, tfds.features.FeaturesDict) or part not in feature:
                raise UserError(
                    f"tfds: {self._name} has no feature {key}={path!r}; "
                    f"{nearest(path, _leaves(self._features))}"
                )
            feature = feature[part]
        return feature


_DEFAULT = "~/tensorflow_datasets"


def _builder(dataset: str, folder: str) -> Any:
    """Reads what was prepared; never imports the code that prepared it, never downloads."""
    try:
        builder = tfds.core.read_only_builder.builder_from_files(dataset, data_dir=folder)
    except (tfds.core.DatasetNotFoundError, ValueError, OSError) as error:
        root = pathlib.Path(folder)
        found = [p.name for p in root.iterdir() if p.is_dir()] if root.is_dir() else []
        near = f"; {nearest(dataset, found)}" if found else ""
        raise UserError(
            f"tfds: {dataset} is not prepared in {folder}{near}; "
            f"prepare it once: {_how_to_prepare(dataset, folder)}"
        ) from error
    formats = builder.info.available_file_formats()
    if not any(f.value == "array_record" for f in formats):
        have = ", ".join(sorted(f.value for f in formats)) or "no known format"
        raise UserError(
            f"tfds: {dataset} in {builder.data_dir} is prepared as {have}, which has no random "
            f"access; prepare it again: {_how_to_prepare(dataset, '<another folder>')}"
        )
    return builder


def _how_to_prepare(dataset: str, folder: str) -> str:
    # Not the command `tfds build`: that one needs TensorFlow.
    return (
        f"tensorflow_datasets.builder({dataset!r}, data_dir={folder!r}, "
        "file_format='array_record').download_and_prepare()"
    )


def _inside(feature: Any) -> Any:
    """What a list is a list of."""
    while isinstance(feature, tfds.features.Sequence | tfds.features.Dataset):
        feature = feature.feature
    return feature


def _leaves(feature: Any, path: str = "") -> list[str]:
    """Paths of all features that hold values."""
    feature = _inside(feature)
    if not isinstance(feature, tfds.features.FeaturesDict):
        return [path]
    return [leaf for key in feature for leaf in _leaves(feature[key], f"{path}/{key}".strip("/"))]


def _at(record: Any, path: str) -> Any:
    """The value of a feature; of a list of records the list of their values."""
    for part in path.split("/") if path else []:
        if isinstance(record, list | tuple):
            record = [one[part] for one in record]
        else:
            record = record[part]
    return record


def _strings(value: Any) -> list[str]:
    """All texts, without empty ones."""
    if isinstance(value, bytes | str):
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        return [text] if text.strip() else []
    return [text for one in value for text in _strings(one)]
