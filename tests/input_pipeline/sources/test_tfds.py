"""TFDS data sets written as ArrayRecord and read back, without TensorFlow."""

import concurrent.futures
import io
import re
import shutil
import sys

import numpy as np
import processes
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from base.errors import UserError
from input_pipeline.errors import BadExample
from input_pipeline.sources.registry import SOURCES
from input_pipeline.transforms.decode import decode

Tfds = SOURCES["tfds"]


def png(i):
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (i, 0, 0)).save(file, "PNG")
    return file.getvalue()


class TinyCaptions(tfds.core.GeneratorBasedBuilder):
    """The features of coco_captions."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        caption = {"text": tfds.features.Text(), "id": np.int64}
        features = {
            "image": tfds.features.Image(encoding_format="png"),
            "image/filename": tfds.features.Text(),
            "image/id": np.int64,
            "captions": tfds.features.Sequence(caption),
            "title": tfds.features.Text(),
            "nested": {"picture": tfds.features.Image(encoding_format="png")},
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 10), "val": self._generate_examples(10, 13)}

    def _generate_examples(self, start, end):
        for i in range(start, end):
            texts = [f"caption {i} {j} é" for j in range(i % 3)] + [""] * (i % 2)
            yield (
                i,
                {
                    "image": io.BytesIO(png(i)),
                    "image/filename": f"{i}.png",
                    "image/id": i,
                    "captions": [{"text": t, "id": j} for j, t in enumerate(texts)]
                    if texts
                    else [],
                    "title": f"title {i}",
                    "nested": {"picture": io.BytesIO(png(100 + i))},
                },
            )


class TinyClasses(tfds.core.GeneratorBasedBuilder):
    """The features of imagenet2012."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="png"),
            "label": tfds.features.ClassLabel(names=["ant", "bee"]),
            "number": np.int64,
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"validation": self._generate_examples()}

    def _generate_examples(self):
        for i in range(4):
            label = ["ant", "bee"][i % 2]
            image = io.BytesIO(png(i))
            yield i, {"image": image, "label": label, "number": i, "file_name": f"{i}.png"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tfds"))
    for builder in (TinyCaptions, TinyClasses):
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def number(example, image="image"):
    return int(decode(example["image"])[0, 0, 0])


def assert_refused(pattern, **kw):
    with pytest.raises(UserError, match=re.escape(pattern)) as error:
        Tfds(**kw)
    assert "\n" not in str(error.value)


def test_captions_come_back_and_images_stay_encoded(data_dir):
    source = Tfds(dataset="tiny_captions", data_dir=data_dir, text="captions/text")
    assert len(source) == 10 and source.class_names is None
    seen = set()
    for at in range(10):
        example = source[at]
        i = number(example)
        assert example["image"] == png(i)  # the bytes that were written, not decoded
        assert example["texts"] == [f"caption {i} {j} é" for j in range(i % 3)]
        assert example["id"] == f"tiny_captions/train[{at}]" and "label" not in example
        seen.add(i)
    assert seen == set(range(10))


def test_one_caption_nested_image_version_and_slices(data_dir):
    source = Tfds(
        dataset="tiny_captions:1.0.0",
        data_dir=data_dir,
        split="val[:2]",
        image="nested/picture",
        text="title",
    )
    assert len(source) == 2
    i = number(source[0]) - 100
    assert 10 <= i < 13 and source[0]["texts"] == [f"title {i}"]


def test_a_key_may_have_slashes(data_dir):
    source = Tfds(dataset="tiny_captions", data_dir=data_dir, text="image/filename")
    assert source[0]["texts"] == [f"{number(source[0])}.png"]


def test_classes(data_dir):
    given = {"dataset": "tiny_classes", "data_dir": data_dir, "split": "validation"}
    source = Tfds(**given, label="label")
    assert source.class_names == ["ant", "bee"] and len(source) == 4
    for at in range(4):
        example = source[at]
        assert example["label"] == number(example) % 2 and example["texts"] == []
        assert type(example["label"]) is int
    numbers = Tfds(**given, label="number")
    assert numbers.class_names is None and numbers[0]["label"] == number(numbers[0])


def test_data_dir_of_the_environment(data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", data_dir)
    assert len(Tfds(dataset="tiny_captions")) == 10


def test_many_threads_read(data_dir):
    source = Tfds(dataset="tiny_captions", data_dir=data_dir)
    order = [source[at]["image"] for at in range(10)]
    fresh = Tfds(dataset="tiny_captions", data_dir=data_dir)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        which = [i % 10 for i in range(1000)]
        for at, example in zip(which, pool.map(fresh.__getitem__, which)):
            assert example["image"] == order[at]


def test_mistakes(data_dir, tmp_path):
    given = {"dataset": "tiny_captions", "data_dir": data_dir}
    assert_refused("tiny_caption is not prepared in", dataset="tiny_caption", data_dir=data_dir)
    assert_refused("the nearest: tiny_captions", dataset="tiny_caption", data_dir=data_dir)
    assert_refused(
        "file_format='array_record').download_and_prepare()", dataset="x", data_dir=str(tmp_path)
    )
    assert_refused("has no split 'valid'; the nearest: val", **given, split="valid")
    assert_refused(
        "has no feature text='captions/txt'; the nearest: captions/text",
        **given,
        text="captions/txt",
    )
    assert_refused(
        "has no feature text='captions/text'; ",
        dataset="tiny_classes",
        data_dir=data_dir,
        split="validation",
        text="captions/text",
    )
    assert_refused("has no feature image='imag'; the nearest: image", **given, image="imag")
    assert_refused("image='title' of tiny_captions is not an image", **given, image="title")
    assert_refused("text='image' of tiny_captions is not text", **given, text="image")
    assert_refused("text='captions' of tiny_captions is not text", **given, text="captions")
    assert_refused("label='title' of tiny_captions is not a class", **given, label="title")
    assert_refused(
        "label='captions/id' of tiny_captions is not a class", **given, label="captions/id"
    )


def flip(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", [flip, lambda data: data[: len(data) // 2], None])
def test_damaged_files_are_named(data_dir, tmp_path, damage):
    folder = tmp_path / "tiny_classes"
    shutil.copytree(f"{data_dir}/tiny_classes", folder)
    (shard,) = folder.rglob("*array_record*")
    data = shard.read_bytes()
    shard.unlink()
    if damage:
        shard.write_bytes(damage(data))
    with pytest.raises(BadExample) as error:
        list(Tfds(dataset="tiny_classes", data_dir=str(tmp_path), split="validation"))
    assert error.value.kind == "damaged record" and "\n" not in str(error.value)
    assert "tiny_classes" in error.value.shard and "tiny_classes" in error.value.id


def test_tfrecord_is_refused_with_what_to_do(data_dir, tmp_path):
    import pathlib
    import shutil

    shutil.copytree(pathlib.Path(data_dir) / "tiny_classes", tmp_path / "tiny_classes")
    info = tmp_path / "tiny_classes" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    assert_refused(
        "is prepared as tfrecord, which has no random access; prepare it again:",
        dataset="tiny_classes",
        data_dir=str(tmp_path),
        split="validation",
        text="",
    )


def test_reading_imports_no_tensorflow(data_dir):
    code = (
        "import sys\n"
        "from input_pipeline.sources.registry import SOURCES\n"
        f"s = SOURCES['tfds'](dataset='tiny_captions', data_dir={data_dir!r})\n"
        "assert s[0]['image'][:4] == bytes([0x89]) + b'PNG'\n"
        "print([m for m in ('tensorflow', 'torch') if m in sys.modules])\n"
    )
    done = processes.run([sys.executable, "-c", code])
    assert done.stdout.split() == ["[]"]
