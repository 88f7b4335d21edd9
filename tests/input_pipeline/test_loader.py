"""The order of examples is a function of (seed, step) and of nothing else."""

import io
import threading
import time

import cv2
import numpy as np
import pytest
from PIL import Image

from base.errors import UserError
from input_pipeline import loader
from input_pipeline.bad_examples import BadExamples
from input_pipeline.errors import KINDS, BadExample
from input_pipeline.sources.in_memory import Memory
from input_pipeline.transforms.preprocess import make_preprocess
from input_pipeline.transforms.tokenizer import Bytes


class Preprocess:
    """Puts the example's index, and a draw of its generator, where image and text would be."""

    def example(self, example, rng):
        text = np.array([example, rng.integers(2**31)], np.int32)
        return {"image": np.zeros((1, 1, 3), np.uint8), "text": text}


def stream(examples=10, batch_size=4, steps=12, seed=0, **options):
    options = {"num_threads": 2} | options
    with loader.train_batches(
        range(examples), Preprocess(), batch_size=batch_size, seed=seed, **options
    ) as batches:
        return [next(batches) for _ in range(steps)]


def texts(batches) -> np.ndarray:
    return np.concatenate([batch["text"] for batch in batches])


@pytest.mark.parametrize("examples", [1, 2, 7, 10, 64])
def test_every_epoch_is_a_permutation_and_epochs_differ(examples):
    order = texts(stream(examples, batch_size=4, steps=4 * examples))[:, 0]
    epochs = order[: 16 * examples].reshape(16, examples)
    for epoch in epochs:
        assert sorted(epoch) == list(range(examples))
    assert len({tuple(epoch) for epoch in epochs}) >= min(examples, 8)


def test_threads_change_nothing():
    one = texts(stream(num_threads=1, prefetch=1))
    for num_threads in (2, 5):
        np.testing.assert_array_equal(one, texts(stream(num_threads=num_threads, prefetch=3)))


# 4: one chunk; 132: several, of another size on each number of processes (22, 22, 11)
@pytest.mark.parametrize("batch_size", [4, 132])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_see_the_rows_of_the_same_global_batches(processes, batch_size, steps=3):
    whole = stream(batch_size=batch_size, steps=steps)
    positions = np.concatenate([batch["position"] for batch in whole])
    np.testing.assert_array_equal(positions, np.arange(steps * batch_size))
    parts = [
        stream(batch_size=batch_size, steps=steps, process_index=p, process_count=processes)
        for p in range(processes)
    ]
    for key in ("text", "position"):
        for step, batch in enumerate(whole):
            together = np.concatenate([part[step][key] for part in parts])
            np.testing.assert_array_equal(together, batch[key])


@pytest.mark.parametrize(("batch_size", "steps"), [(4, 12), (132, 3)])
def test_the_stream_resumed_at_any_step_is_the_suffix(batch_size, steps):
    whole = stream(examples=10, batch_size=batch_size, steps=steps)  # epochs end inside batches
    for start in range(steps):
        rest = stream(batch_size=batch_size, steps=steps - start, start_step=start)
        np.testing.assert_array_equal(texts(rest), texts(whole[start:]))


def test_seeds_and_epochs_draw_different_randomness():
    first, other = texts(stream(seed=0)), texts(stream(seed=1))
    assert (first[:, 0] != other[:, 0]).any()
    draws = first[:, 1]
    assert len(set(draws)) == len(draws)


def test_step_a_million_is_reached_without_reading_what_lies_before():
    read = []

    class Source:
        def __len__(self):
            return 1000

        def __getitem__(self, i):
            read.append(i)
            return i

    with loader.train_batches(
        Source(), Preprocess(), batch_size=8, seed=0, start_step=10**6, num_threads=1, prefetch=1
    ) as batches:
        assert next(batches)["position"].tolist() == list(range(8 * 10**6, 8 * 10**6 + 8))
        assert len(read) <= 8 * 4 + 1  # and one for the shapes


def test_eval_batches_hold_each_example_once_on_any_number_of_processes():
    for processes in (1, 2, 4):
        for examples in (1, 4, 9, 16):
            parts = [
                list(
                    loader.eval_batches(
                        list(range(examples)),
                        lambda i: {"x": np.array([i + 1, 7])},
                        batch_size=8,
                        process_index=p,
                        process_count=processes,
                    )
                )
                for p in range(processes)
            ]
            assert len({len(part) for part in parts}) == 1
            seen = []
            for batches in zip(*parts):
                x = np.concatenate([b["x"] for b in batches])
                mask = np.concatenate([b["mask"] for b in batches])
                assert x.shape == (8, 2) and mask.shape == (8,)
                assert not x[~mask].any()
                seen += x[mask][:, 0].tolist()
            assert seen == [i + 1 for i in range(examples)]


def test_no_more_is_made_ahead_than_asked_for():
    made = []

    class Counting(Preprocess):
        def example(self, example, rng):
            made.append(example)
            return super().example(example, rng)

    with loader.train_batches(
        range(10), Counting(), batch_size=64, seed=0, num_threads=2, prefetch=3
    ) as batches:
        for taken in range(1, 4):
            next(batches)
            deadline = time.monotonic() + 300
            while len(made) < (taken + 3) * 64 + 1 and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.1)
            assert len(made) == (taken + 3) * 64 + 1


def png(color):
    file = io.BytesIO()
    Image.new("RGB", (5, 4), color).save(file, "PNG")
    return file.getvalue()


def test_bad_images_are_masked_in_place_and_recorded():
    images = [png((i, 0, 0)) for i in range(8)]
    images[3] = b"no image"
    images[5] = images[5][:-20]
    source = Memory(images=images, texts=[chr(97 + i) for i in range(8)])
    preprocess = make_preprocess(Bytes(), res=2, token_len=3)
    bad = BadExamples()
    with loader.train_batches(
        source, preprocess, batch_size=8, seed=0, prefetch=1, bad=bad
    ) as batches:
        batch = next(batches)
    assert batch["image"].shape == (8, 2, 2, 3) and batch["image"].dtype == np.uint8
    assert batch["text"].shape == (8, 3) and batch["text"].dtype == np.int32
    assert batch["mask"].dtype == bool and batch["mask"].sum() == 6
    assert not batch["image"][~batch["mask"]].any() and not batch["text"][~batch["mask"]].any()
    red = batch["image"][batch["mask"]][:, 0, 0, 0]
    assert sorted(red) == [0, 1, 2, 4, 6, 7]
    np.testing.assert_array_equal(batch["text"][batch["mask"]][:, 0], ord("a") + 3 + red)
    kinds = [KINDS[code - 1] if code else "" for code in batch["bad"]]
    assert [kinds.count(kind) for kind in ("", *KINDS)] == [6, 0, 1, 0, 1, 0, 0, 0, 0, 0]
    assert [bool(kind) for kind in kinds] == (~batch["mask"]).tolist()
    assert "memory/3 (unknown image format" in bad.worst() and "memory/5 (damaged" in bad.worst()


def settled(threads: int) -> bool:
    """Whether no more threads than these are left, after a while at most."""
    deadline = time.monotonic() + 300
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.02)
    return threading.active_count() <= threads


@pytest.mark.timeout(300)
@pytest.mark.parametrize("num_threads", [1, 4])
def test_an_exception_in_a_source_ends_the_batches_and_their_threads(num_threads):
    before, read = threading.active_count(), []

    class Source:
        def __len__(self):
            return 1000

        def __getitem__(self, i):
            if read:
                raise OSError(f"disk gone at {i}")
            read.append(i)  # the first one, which is asked for its shapes
            return i

    batches = loader.train_batches(
        Source(), Preprocess(), batch_size=64, seed=0, num_threads=num_threads
    )
    with pytest.raises(OSError, match="disk gone"):
        next(batches)
    with pytest.raises(StopIteration):  # never the batch after the one that failed
        next(batches)
    assert settled(before)


def test_what_an_example_raises_is_raised_by_next():
    def broken(i):
        raise KeyError(f"example {i}")

    with (
        loader.eval_batches([0, 1], broken, batch_size=2) as batches,
        pytest.raises(KeyError, match="example 0"),
    ):
        next(batches)


@pytest.mark.timeout(300)
def test_close_ends_the_threads_even_while_they_work():
    before = threading.active_count()

    class Slow(Preprocess):
        def example(self, example, rng):
            time.sleep(0.01)
            return super().example(example, rng)

    batches = loader.train_batches(range(10), Slow(), batch_size=4, seed=0, num_threads=4)
    next(batches)
    batches.close()
    batches.close()
    assert settled(before)
    with pytest.raises(StopIteration):
        next(batches)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="batch_size 6 does not divide over 4 processes"):
        stream(batch_size=6, process_count=4)
    with pytest.raises(ValueError, match="the source has no examples"):
        stream(examples=0)


class Damaged:
    """Example i is bad where bad(i)."""

    def __init__(self, examples, bad):
        self.examples, self.bad = examples, bad

    def __len__(self):
        return self.examples

    def __getitem__(self, i):
        if self.bad(i):
            raise BadExample("damaged record", f"of {i}", id=f"a.tar/{i}", shard="a.tar")
        return i


def test_bad_examples_change_no_other_row():
    options = {"batch_size": 8, "seed": 0, "num_threads": 2}
    with loader.train_batches(range(40), Preprocess(), **options) as batches:
        good = [next(batches) for _ in range(10)]
    with loader.train_batches(Damaged(40, lambda i: i % 3 == 1), Preprocess(), **options) as b:
        some = [next(b) for _ in range(10)]
    for whole, part in zip(good, some):
        bad = whole["text"][:, 0] % 3 == 1
        np.testing.assert_array_equal(part["mask"], ~bad)
        np.testing.assert_array_equal(part["text"][~bad], whole["text"][~bad])
        np.testing.assert_array_equal(part["index"], whole["index"])
        assert not part["text"][bad].any()


def test_a_bad_caption_is_booked_on_the_example_it_is_of():
    bad = BadExamples()
    preprocess = make_preprocess(Bytes(), res=2, token_len=3)

    class Source(Memory):
        def __getitem__(self, i):
            if i == 3:
                raise BadExample("damaged record", shard="three")
            return {**super().__getitem__(i), "shard": "others"}

    source = Source(images=[png((i, 0, 0)) for i in range(8)], texts=list("abcdefgh"))
    with loader.train_batches(
        source, preprocess, batch_size=8, seed=0, prefetch=1, corrupt="batch(1.0)", bad=bad
    ) as batches:
        next(batches)
    assert set(bad.shards()) == {"three"} and bad.worst().endswith("such as [3] (damaged record)")


def test_embeddings_of_other_shapes_are_one_line():
    embeddings = [np.zeros(3 + (i == 5), np.float32) for i in range(8)]
    source = Memory(images=embeddings, texts=list("abcdefgh"))
    preprocess = make_preprocess(Bytes(), image="embedding", token_len=3)
    message = r"image of memory/5 is float32\[4\], that of another .*\[3\]"
    with (
        loader.train_batches(source, preprocess, batch_size=8, seed=0) as batches,
        pytest.raises(UserError, match=message),
    ):
        next(batches)


def test_the_loader_turns_opencv_s_own_threads_off():
    cv2.setNumThreads(2)
    with loader.eval_batches([0], lambda i: {"x": np.zeros(1)}, batch_size=1):
        assert cv2.getNumThreads() == 1


@pytest.mark.timeout(300)
def test_a_source_without_a_good_example_stops_at_once_with_the_reasons():
    read = []
    source = Damaged(10**9, lambda i: read.append(i) is None)
    with pytest.raises(
        UserError, match=r"none of 64 examples .* \(64 damaged record\); a\.tar: 64"
    ):
        loader.train_batches(source, Preprocess(), batch_size=8, seed=0)
    assert len(read) == 64 and max(read) > 9e8  # from all over


def test_which_example_a_row_is_goes_by_its_identity():
    class Twice(list):
        def identity(self, i):
            return i % 3

    with loader.train_batches(Twice(range(6)), Preprocess(), batch_size=6, seed=0) as batches:
        batch = next(batches)
    np.testing.assert_array_equal(batch["index"], batch["text"][:, 0] % 3)
