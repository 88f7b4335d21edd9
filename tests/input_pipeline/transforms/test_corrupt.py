"""Noise on purpose: where it falls is a function of (seed, step) and of p."""

import numpy as np
import pytest

from base.errors import UserError
from input_pipeline import loader
from input_pipeline.sources.in_memory import Memory
from input_pipeline.transforms.corrupt import Corruption
from input_pipeline.transforms.preprocess import make_preprocess
from input_pipeline.transforms.tokenizer import Bytes

N = 200
IMAGES = np.repeat(np.arange(N, dtype=np.uint8), 4 * 4 * 3).reshape(N, 4, 4, 3)
SOURCE = Memory(images=list(IMAGES), texts=[f"{i:03d}" for i in range(N)])
PREPROCESS = make_preprocess(Bytes(), res=4, token_len=8)


def batches(corrupt, steps=10, start=0, seed=0, **options):
    with loader.train_batches(
        SOURCE,
        PREPROCESS,
        batch_size=100,
        seed=seed,
        start_step=start,
        num_threads=2,
        corrupt=corrupt,
        **options,
    ) as stream:
        return [next(stream) for _ in range(steps)]


CLEAN = batches("")


def changed(key, noisy):
    different = [noise[key] != clean[key] for noise, clean in zip(noisy, CLEAN)]
    return np.concatenate([d.reshape(len(d), -1).any(axis=1) for d in different])


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_an_image_becomes_uniform_noise_with_probability_p(p):
    noisy = batches(f"image({p})")
    hit = changed("image", noisy)
    assert abs(hit.mean() - p) < 4 * np.sqrt(p * (1 - p) / 1000) + 1e-9
    assert not changed("text", noisy).any()
    pixels = np.concatenate([batch["image"] for batch in noisy])[hit]
    assert abs(pixels.mean() - 127.5) < 3 and pixels.min() == 0 and pixels.max() == 255
    assert len(np.unique(pixels.reshape(len(pixels), -1), axis=0)) == len(pixels)


def test_an_embedding_becomes_one_of_a_random_direction():
    noise = Corruption("image(0.5)", seed=0, batch_size=1)
    embedding = np.full(64, 3.0, np.float32)
    rows = [noise.corrupt_image(embedding, position) for position in range(400)]
    hit = np.array([row[0] != 3 for row in rows])
    assert abs(hit.mean() - 0.5) < 0.1
    noisy = np.stack(rows)[hit]
    assert noisy.dtype == np.float32 and np.isfinite(noisy).all()
    unit = noisy / np.linalg.norm(noisy, axis=1, keepdims=True)
    assert np.abs(unit.mean(axis=0)).max() < 0.04  # in 200 draws of 1 / 8 in each coordinate
    np.testing.assert_array_equal(noise.corrupt_image(embedding, 9), rows[9])


@pytest.mark.parametrize("p", [0.2, 1.0])
def test_a_text_becomes_random_tokens_of_random_length(p):
    noisy = batches(f"text({p})")
    hit = changed("text", noisy)
    assert abs(hit.mean() - p) < 4 * np.sqrt(p * (1 - p) / 1000) + 1e-9
    assert not changed("image", noisy).any()
    tokens = np.concatenate([batch["text"] for batch in noisy])[hit]
    assert tokens.min() >= 0 and tokens.max() < Bytes.vocab_size and tokens.max() > 240
    lengths = 8 - np.argmax((tokens != 0)[:, ::-1], axis=1)
    assert set(lengths) == set(range(1, 9))


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_the_texts_of_a_share_of_the_batch_are_shuffled(p):
    for noise, clean in zip(batches(f"batch({p})"), CLEAN):
        hit = (noise["text"] != clean["text"]).any(axis=1)
        # A shuffle of k leaves about one in its place.
        assert 100 * p - 6 <= hit.sum() <= 100 * p
        np.testing.assert_array_equal(
            np.sort(noise["text"].view("V32").ravel()), np.sort(clean["text"].view("V32").ravel())
        )
        np.testing.assert_array_equal(noise["image"], clean["image"])


def test_every_step_shuffles_other_rows():
    hits = changed("text", batches("batch(0.3)")).reshape(10, 100)
    assert len({row.tobytes() for row in hits}) == 10


def test_a_greater_p_corrupts_what_a_smaller_one_does_and_more():
    for kind, key in (("image", "image"), ("text", "text")):
        few, many = (changed(key, batches(f"{kind}({p})")) for p in (0.1, 0.4))
        assert not (few & ~many).any() and many.sum() > few.sum()


def test_together_each_is_what_it_is_alone():
    together = batches("image(0.3) | text(0.3) | batch(0.2)")
    for batch, image in zip(together, batches("image(0.3)")):
        np.testing.assert_array_equal(batch["image"], image["image"])
    for batch, text, shuffle, clean in zip(
        together, batches("text(0.3)"), batches("batch(0.2)"), CLEAN
    ):
        place = {row.tobytes(): i for i, row in enumerate(clean["text"])}
        whose = [place[row.tobytes()] for row in shuffle["text"]]
        np.testing.assert_array_equal(batch["text"], text["text"][whose])


def test_noise_resumes_and_is_the_same_on_two_processes():
    corrupt = "image(0.3) | text(0.3) | batch(0.5)"
    whole = batches(corrupt)
    halves = [batches(corrupt, process_index=p, process_count=2) for p in (0, 1)]
    for step, rest in enumerate(batches(corrupt, steps=6, start=4), 4):
        for key in rest:
            np.testing.assert_array_equal(rest[key], whole[step][key])
            parts = np.concatenate([half[step][key] for half in halves])
            np.testing.assert_array_equal(parts, whole[step][key])
    assert changed("image", batches(corrupt, seed=1)).mean() > 0.5  # another seed, another order


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        ("image(1.5)", "must be from 0 to 1"),
        ("image", "image needs p"),
        ("imag(1)", "the nearest"),
        ("image(0.1) | image(0.5)", "image is given twice"),
    ],
)
def test_mistakes_are_named(corrupt, message):
    with pytest.raises(UserError, match=message):
        batches(corrupt)
