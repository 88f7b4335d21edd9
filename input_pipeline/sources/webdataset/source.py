"""Tar shards as img2dataset and open_clip write them (WebDataset), read at random.

Members of one sample stand together and share their name up to the first dot of its last part:
000123.jpg, 000123.txt, 000123.json. The headers of each shard are walked once; where the members
lie is kept in a .npy file (storage.index_folder), so that later starts read no headers.
"""

import collections
import contextlib
import os
import re
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from base.errors import UserError
from base.words import nearest, one_line
from input_pipeline.errors import BadExample
from input_pipeline.sources import storage
from input_pipeline.sources.contract import Example
from input_pipeline.sources.webdataset.index import (
    Layout,
    Summary,
    bytes_at,
    index_file,
    make_index,
    open_all,
    open_index,
)
from input_pipeline.sources.webdataset.sample import MAX_JSON_BYTES, Field, Fields, read_sample
from input_pipeline.sources.webdataset.tar_headers import Extent

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "avif", "tif", "tiff")
# Suffixes that are never read as text, whatever a config names: some run code when they are read.
NOT_TEXT = {*IMAGES, "pkl", "pickle", "pyd", "npy", "npz", "pt", "pth", "ten", "tar", "zip"}

CHECKED_SAMPLES = 10  # samples in which the JSON keys of the config are looked up at the start
WARNINGS = 10


class WebDataset:
    """One example for each sample that has an image and a caption.

    Args:
      path: the shards, a pattern of them or several: 'cc12m/{00000..01242}.tar', 'data/*.tar',
        'gs://bucket/laion/{00000..41407}.tar'. Plain tar: compressed ones have no random access.
      image: suffixes of the image; the first that a sample has is taken.
      captions: (name, probability) of each caption. A name is the suffix of a member ('txt') or
        a key of the sample's JSON ('json.caption', a text or a list of them; 'json.meta.alt'). A
        sample's captions are those of them that it has; how often each is drawn is in proportion to
        the probabilities. (): there are none, which is enough for classification.
      label: where the class stands, an integer: 'cls' or 'json.KEY'. '': there is none.
      language: 'json.KEY', where the language of the captions stands ('en'). '': not known.

    Attributes:
      damage: (kind, shard) -> members and samples that could not be used.

    Raises:
      UserError: a shard is missing or compressed, no shard has a usable sample, no sample has a
        key of the config, the index cannot be written.
    """

    class_names = None

    def __init__(
        self,
        *,
        path: str | tuple[str, ...],
        image: tuple[str, ...] = IMAGES,
        captions: tuple[tuple[str, float], ...] = (("txt", 1.0),),
        label: str = "",
        language: str = "",
    ):
        self._captions = _captions(captions)
        self._label = _field("label", label) if label else None
        self._language = _field("language", language) if language else None
        self._rebuild_lock = threading.Lock()
        if self._language and not self._language.key:
            raise UserError(f"webdataset: language={language!r} is no 'json.KEY'")
        self._layout = _layout(image, self._captions, self._label, self._language)

        shards = open_all(storage.expand(path), self._layout)
        self._blobs = [blob for blob, _, _ in shards]
        self._files = [file for _, file, _ in shards]
        summaries = [summary for _, _, summary in shards]
        self._begins = [summary.begins for summary in summaries]
        self._languages = [tuple(map(sys.intern, summary.languages)) for summary in summaries]
        self._starts = np.cumsum([0, *(s.samples for s in summaries)], dtype=np.int64)
        self.damage: dict[tuple[str, str], int] = {}
        for blob, summary in zip(self._blobs, summaries):
            for kind, count in summary.damage.items():  # a shard may be named twice
                self.damage[kind, blob.path] = self.damage.get((kind, blob.path), 0) + count
        self._report(path, summaries)
        self._check_keys()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, i: int) -> Example:
        """Sample i; with languages and a label where the config names them.

        Raises:
          BadExample: the sample does not hold what its headers promised, or no valid captions.
        """
        blob, place, members, language = self._place(i)
        base = blob.path.rsplit("/", 1)[-1]
        example: Example = {
            "image": b"",
            "texts": [],
            "id": f"{base}[{place}]",
            "shard": blob.path,
        }
        try:
            name, image, contents = read_sample(blob, members, example, base)
            example["id"], example["image"] = f"{base}/{name}", image
            fields = Fields(dict(zip(self._layout.texts, contents)))
            texts = []
            for field, weight in self._captions:
                kept = [text for text in fields.texts(field) if text.strip()]
                texts += [(text, weight / len(kept)) for text in kept]  # a list shares its weight
            example["texts"] = [text for text, _ in texts]
            if self._captions:
                example["weights"] = [weight for _, weight in texts]
            if self._label:
                example["label"] = fields.integer(self._label)
        except BadExample as error:
            error.id, error.shard = example["id"], blob.path
            raise
        if self._language:
            example["languages"] = [language] * len(texts)
        return example

    def by_language(self) -> dict[str, np.ndarray]:
        """Language -> ascending indices, int64, of the samples that name it."""
        if not self._language:
            return {}
        indices: dict[str, list[np.ndarray]] = {}
        for shard, start in enumerate(self._starts[:-1]):
            try:
                rows, _ = open_index(self._files[shard], self._layout.columns)
            except (OSError, ValueError):
                self._rebuild(shard)
                rows, _ = open_index(self._files[shard], self._layout.columns)
            for code, language in enumerate(self._languages[shard]):
                if language:
                    matches = np.flatnonzero(rows[:, -1] == code) + start
                    indices.setdefault(language, []).append(matches)
        return {language: np.concatenate(indices[language]) for language in sorted(indices)}

    def _place(self, i: int) -> tuple[storage.Blob, int, list["Extent"], str]:
        """(shard, position in it, extents of the members, language) of sample i."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        # The last that starts at i or before: those with the same start before it are empty.
        shard = int(np.searchsorted(self._starts, i, side="right")) - 1
        place = i - int(self._starts[shard])
        row = self._row(shard, place)
        width = len(Extent._fields)
        members = [Extent(*row[j : j + width]) for j in range(0, self._layout.members, width)]
        language = self._languages[shard][row[-1]] if self._language else ""
        return self._blobs[shard], place, members, language

    def _row(self, shard: int, place: int) -> list[int]:
        # Read, not mapped: a map holds a file descriptor for each shard, and a file that someone
        # truncates would end the process (SIGBUS).
        size = 8 * self._layout.columns
        begin = self._begins[shard] + place * size
        row = bytes_at(self._files[shard], begin, size)
        if len(row) < size:
            self._rebuild(shard)
            row = bytes_at(self._files[shard], begin, size)
            if len(row) < size:
                path = self._blobs[shard].path
                raise BadExample("damaged record", "its index is damaged", shard=path)
        return np.frombuffer(row, np.int64).tolist()

    def _rebuild(self, shard: int) -> None:
        """Makes the index of a shard again after its file was deleted or truncated."""
        with self._rebuild_lock:  # one thread walks the shard, the others wait for it
            try:
                open_index(self._files[shard], self._layout.columns)
            except (OSError, ValueError):
                self._build(shard)

    def _build(self, shard: int) -> None:
        blob, file = self._blobs[shard], self._files[shard]
        try:
            same = index_file(blob, self._layout, os.path.dirname(file)) == file
        except OSError as error:
            detail = one_line(error)
            raise BadExample("damaged record", detail, shard=blob.path) from error
        if not same:  # i would be another sample
            detail = "the shard is not the one that was indexed"
            raise BadExample("damaged record", detail, shard=blob.path)
        make_index(blob, file, self._layout)

    def _report(self, path: str | Sequence[str], summaries: list["Summary"]) -> None:
        lines = []
        for blob, summary in zip(self._blobs, summaries):
            if not summary.samples:
                reasons = summary.broken or _counts(summary.damage) or "it is empty"
                lines.append(f"{blob.path} has no usable sample: {reasons}")
            elif summary.broken:
                lines.append(f"{blob.path} {summary.broken}; {summary.samples} samples before it")
        if not len(self):
            total = collections.Counter[str]()
            for (kind, _), count in self.damage.items():
                total[kind] += count
            suffixes = sorted({suffix for s in summaries for suffix in s.suffixes})
            seen = f"; members end in {', '.join(suffixes[:20])}" if suffixes else ""
            raise UserError(
                f"webdataset: no usable sample in path={path!r} ({_counts(total) or 'empty'}); "
                f"{lines[0]}{seen}; set `image` and `captions` to what "
                "is there; a sample's members stand together"
            )
        for line in lines[:WARNINGS]:
            logging.warning("webdataset: %s", line)
        if len(lines) > WARNINGS:
            logging.warning("webdataset: and %d more shards like these", len(lines) - WARNINGS)

    def _check_keys(self) -> None:
        """Refuses a misspelt JSON key at the start, before a run without captions."""
        wanted = [f for f, _ in self._captions] + [f for f in (self._label, self._language) if f]
        keys = {f.key for f in wanted if f.key}
        if not keys:
            return
        known = set()
        at = 1 + self._layout.texts.index(b"json")
        for i in sorted(
            set(np.linspace(0, len(self) - 1, CHECKED_SAMPLES, dtype=np.int64).tolist())
        ):
            blob, _, members, _ = self._place(i)
            if members[at].start < 0 or members[at].size > MAX_JSON_BYTES:
                continue
            with contextlib.suppress(OSError, BadExample):
                content = blob.read(members[at].size, members[at].data)
                fields = Fields({b"json": content})
                known |= fields.json().keys() | {
                    key for key in keys if fields.value(key) is not None
                }
        if not known:
            return
        for field in wanted:
            if not field.key or field.key in known:
                continue
            line = (
                f"webdataset: no JSON among {CHECKED_SAMPLES} samples of {self._blobs[0].path} ... "
                f"has a key {field.key!r}; {nearest(field.key, known)}"
            )
            others = [f for f, _ in self._captions if not f.key or f.key in known]
            if field in (self._label, self._language) or not others:
                raise UserError(line)
            logging.warning("%s", line)  # a caption that few have, beside others


def _field(setting: str, name: Any) -> Field:
    if not isinstance(name, str) or not re.fullmatch(r"json\.[^\0]+|[A-Za-z0-9_.+-]+", name):
        raise UserError(f"webdataset: {setting}: {name!r} is neither a suffix nor 'json.KEY'")
    if name.startswith("json."):
        return Field(b"json", name[5:])
    suffix = name.lower()
    if suffix == "json":
        raise UserError(f"webdataset: {setting}: 'json' needs the key, as in 'json.caption'")
    if suffix.rsplit(".", 1)[-1] in NOT_TEXT:
        raise UserError(f"webdataset: {setting}: members .{name} hold no text; name one that does")
    return Field(suffix.encode(), "")


def _captions(captions: Any) -> list[tuple[Field, float]]:
    fields = []
    for pair in captions if isinstance(captions, list | tuple) else [captions]:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise UserError(
                f"webdataset: captions: {pair!r} is no (name, probability), as in ('txt', 1.0)"
            )
        name, weight = pair
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1e9:
            raise UserError(
                f"webdataset: captions: {name!r} has no probability above 0: {weight!r}"
            )
        fields.append((_field("captions", name), float(weight)))
    return fields


def _layout(
    image: Any,
    captions: list[tuple[Field, float]],
    label: Field | None,
    language: Field | None,
) -> Layout:
    if not isinstance(image, list | tuple) or not image:
        raise UserError(f"webdataset: image={image!r} is no list of suffixes, as in ('jpg', 'png')")
    for suffix in image:
        if not isinstance(suffix, str) or suffix.lower().rsplit(".", 1)[-1] not in IMAGES:
            raise UserError(
                f"webdataset: image: {suffix!r} is no image; {nearest(str(suffix), IMAGES)}"
            )
    texts = {f.suffix for f, _ in captions} | {f.suffix for f in (label, language) if f}
    return Layout(
        tuple(suffix.lower().encode() for suffix in image),
        tuple(sorted(texts)),
        tuple(sorted({f.suffix for f, _ in captions})),
        language.key if language else "",
    )


def _counts(damage: dict[str, int]) -> str:
    return ", ".join(f"{kind}: {count}" for kind, count in sorted(damage.items()))
