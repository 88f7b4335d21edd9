"""TensorFlow Datasets by random access, without TensorFlow: ArrayRecord files only."""

import os
import pathlib
import resource
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import read_only_builder

from base.errors import UserError
from base.words import nearest, one_line
from input_pipeline.errors import BadExample
from input_pipeline.sources.contract import Example


class Tfds:
    """A prepared TFDS data set. Images stay encoded: the loader's threads decode them.

    Args:
      dataset: its name, with config and version where there are several: 'imagenet2012:5.1.0'.
      data_dir: the folder it was prepared in; '': $TFDS_DATA_DIR, else ~/tensorflow_datasets.
      split: as in TFDS, slices too: 'validation', 'train[:99%]'.
      image: path of the image among the features.
      text: path of the caption or captions ('captions/text' in coco_captions). '': none, which
        is enough for classification.
      label: path of the class ('label' in imagenet2012), which gives class_names. '': none.

    Raises:
      UserError: it is not prepared there, is not ArrayRecord, or has no such split or feature.
      BadExample: when read, a record's checksum is wrong, or its file is missing or torn.
    """

    def __init__(
        self,
        *,
        dataset: str,
        data_dir: str = "",
        split: str = "train",
        image: str = "image",
        text: str = "",
        label: str = "",
    ):
        folder = os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR") or _DEFAULT)
        builder = _builder(dataset, folder)
        self._name, self._folder = f"{dataset}/{split}", str(builder.data_dir)
        self._features = builder.info.features
        self._image, picture = self._find("image", image)
        if not isinstance(picture, tfds.features.Image):
            raise UserError(
                f"tfds: feature image={image!r} of {dataset} is not an image; "
                f"{nearest(image, _leaves(self._features))}"
            )
        self._text, self._label, self.class_names = (), (), None
        if text:
            self._text, caption = self._find("text", text)
            if not isinstance(_inside(caption), tfds.features.Text):
                raise UserError(f"tfds: feature text={text!r} of {dataset} is not text")
        if label:
            self._label, kind = self._find("label", label)
            if isinstance(kind, tfds.features.ClassLabel):
                self.class_names = list(kind.names)
            elif kind.shape != () or not np.issubdtype(kind.np_dtype, np.integer):
                raise UserError(f"tfds: feature label={label!r} of {dataset} is not a class")
        decoders: Any = tfds.decode.SkipDecoding()
        for key in reversed(self._image):
            decoders = {key: decoders}
        for key, feature in self._features.items():  # other images are never used
            if isinstance(feature, tfds.features.Image):
                decoders = {**decoders, key: tfds.decode.SkipDecoding()}
        allow_open_files()
        try:
            self._records = builder.as_data_source(split=split, decoders=decoders)
        except (ValueError, KeyError) as error:
            raise UserError(
                f"tfds: {dataset} has no split {split!r}; {nearest(split, builder.info.splits)}"
            ) from error

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> Example:
        record, name = self._record(i), f"{self._name}[{i}]"
        try:
            texts = _strings(_at(record, self._text)) if self._text else []
        except UnicodeDecodeError as error:
            detail = one_line(error)
            raise BadExample("caption not UTF-8", detail, id=name, shard=self._folder) from error
        image = bytes(_at(record, self._image))
        example: Example = {"image": image, "texts": texts, "id": name}
        if self._label:
            example["label"] = int(_at(record, self._label))
        return example

    def _record(self, i: int) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        try:
            record = self._records[i]
            if _at(record, self._image) is None:  # how a file that ends too early shows
                raise ValueError("no record")
            return record
        except Exception as error:  # TFDS and protobuf raise whatever damage leads them to
            detail = one_line(error)
            raise BadExample(
                "damaged record", detail, id=f"{self._name}[{i}]", shard=self._folder
            ) from error

    def _find(self, option: str, path: str) -> tuple[tuple[str, ...], Any]:
        """Keys that lead to a feature, and the feature."""
        feature = _walk(self._features, path)
        if feature is None:
            raise UserError(
                f"tfds: {self._name} has no feature {option}={path!r}; "
                f"{nearest(path, _leaves(self._features))}"
            )
        return feature


def _walk(feature: Any, path: str) -> tuple[tuple[str, ...], Any] | None:
    """Keys that lead to the feature at a path, and the feature; None: there is none.

    A key may have slashes itself, as image/filename of coco_captions.
    """
    if not path:
        return (), feature
    inside = _inside(feature)
    if not isinstance(inside, tfds.features.FeaturesDict):
        return None
    for key in inside:
        if f"{path}/".startswith(f"{key}/"):
            rest = _walk(inside[key], path[len(key) + 1 :])
            if rest:
                listed = inside is not feature  # a list of records: each has one
                leaf = tfds.features.Sequence(rest[1]) if listed else rest[1]
                return (key, *rest[0]), leaf
    return None


def allow_open_files() -> None:
    """Raises the limit of open files to the system's: array_record keeps each shard open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


_DEFAULT = "~/tensorflow_datasets"


def _builder(dataset: str, folder: str) -> Any:
    """Opens a prepared data set; never imports the code that prepared it, never downloads."""
    try:
        builder = read_only_builder.builder_from_files(dataset, data_dir=folder)
    except (tfds.core.DatasetNotFoundError, ValueError, OSError, ImportError) as error:
        root = pathlib.Path(folder)
        prepared = [p.name for p in root.iterdir() if p.is_dir()] if root.is_dir() else []
        near = f"; {nearest(dataset, prepared)}" if prepared else ""
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
    """The feature inside lists of lists of it."""
    while isinstance(feature, tfds.features.Sequence | tfds.features.Dataset):
        feature = feature.feature
    return feature


def _leaves(feature: Any, path: str = "") -> list[str]:
    """Paths of all features that hold values."""
    feature = _inside(feature)
    if not isinstance(feature, tfds.features.FeaturesDict):
        return [path]
    return [leaf for key in feature for leaf in _leaves(feature[key], f"{path}/{key}".strip("/"))]


def _at(record: Any, keys: tuple[str, ...]) -> Any:
    """The value of a feature; of a list of records the list of their values."""
    for key in keys:
        listed = isinstance(record, list | tuple)
        record = [one[key] for one in record] if listed else record[key]
    return record


def _strings(value: Any) -> list[str]:
    """All texts, without empty ones."""
    if isinstance(value, bytes | str):
        text = value.decode("utf-8") if isinstance(value, bytes) else value
        return [text] if text.strip() else []
    return [text for one in value for text in _strings(one)]
