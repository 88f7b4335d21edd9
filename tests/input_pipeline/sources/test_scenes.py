"""Drawn scenes: deterministic, told by their captions, held-out combinations kept out."""

import numpy as np
import pytest

from base.errors import UserError
from input_pipeline.sources import scenes


def test_equal_arguments_give_equal_scenes_and_seeds_differ():
    one, same, other = (scenes.Scenes(size=40, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.images, same.images)
    assert [e["texts"] for e in map(one.__getitem__, range(40))] == [
        e["texts"] for e in map(same.__getitem__, range(40))
    ]
    assert (one.attributes != other.attributes).any()


def test_an_example_has_the_fields_of_the_contract():
    train, val = scenes.Scenes(size=5, res=48), scenes.Scenes(split="val", size=5)
    example = train[4]
    assert example["image"].shape == (48, 48, 3) and example["image"].dtype == np.uint8
    assert len(set(example["texts"])) == 4 and len(val[4]["texts"]) == 1
    assert example["id"] == "scenes/train/4" != val[4]["id"]
    with pytest.raises(IndexError):
        train[5]
    with pytest.raises(ValueError, match="read-only"):
        example["image"][:] = 0


def test_default_sizes_and_distinct_val_captions_that_fit_48_bytes():
    train, val = scenes.Scenes(res=16), scenes.Scenes(split="val", res=16)
    assert (len(train), len(val)) == (16_384, 500)
    assert len({val[i]["texts"][0] for i in range(500)}) == 500
    longest = max(
        len(text.encode())
        for attributes in scenes.combinations("train")
        for text in scenes.captions(attributes)
    )
    assert longest == 47  # and the end token


def test_held_out_combinations_never_occur_in_train_for_any_seed():
    held_out = {tuple(a) for a in scenes.Scenes(split="val", size=4000, res=16, seed=1).attributes}
    assert len(held_out) == 4000
    for seed in range(3):
        train = scenes.Scenes(size=20_000, res=16, seed=seed)
        assert not held_out & {tuple(a) for a in train.attributes}


def test_every_value_of_every_attribute_occurs_in_both_splits_and_one_eighth_is_held_out():
    train, val = scenes.combinations("train"), scenes.combinations("val")
    for attributes in (train, val):
        assert [len(np.unique(column)) for column in attributes.T] == list(scenes.RADICES)
        assert not (attributes[:, :2] == attributes[:, 2:4]).all(1).any()
    assert len(train) + len(val) == 48 * 47 * 16
    assert abs(len(val) / (48 * 47 * 16) - 1 / scenes.HELD_OUT) < 0.005


def test_captions_of_different_scenes_differ():
    every = np.concatenate([scenes.combinations("train"), scenes.combinations("val")])
    texts = [text for attributes in every for text in set(scenes.captions(attributes))]
    assert len(set(texts)) == len(texts) == 4 * len(every)


def test_the_wordings_of_one_scene():
    colours, shapes, grounds = map(list, (scenes.COLOURS, scenes.SHAPES, scenes.BACKGROUNDS))
    red, star, blue, ring, black = (
        colours.index("red"), shapes.index("star"), colours.index("blue"), shapes.index("ring"),
        grounds.index("black"),
    )  # fmt: skip
    inverses = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
    for relation, (told, _, _) in enumerate(scenes.RELATIONS):
        assert scenes.captions(np.array([red, star, blue, ring, relation, black])) == [
            f"a red star {told} a small blue ring on black",
            f"a small blue ring {inverses[told]} a red star on black",
            f"on black a red star {told} a small blue ring",
            f"red star {told} small blue ring on black",
        ]


def test_the_label_is_the_main_shape_of_the_caption():
    source = scenes.Scenes(split="val", size=100)
    assert len(source.class_names) == 48
    for i in range(100):
        name = source.class_names[source[i]["label"]]
        assert source[i]["texts"][0].startswith(f"a {name} ")


@pytest.mark.parametrize("shape", range(len(scenes.SHAPES)))
def test_drawn_shapes_are_where_and_what_colour_the_caption_says(shape):
    """Finds the pixels near each colour: the main one is larger, and lies in the told direction."""
    red, blue, black = (list(scenes.COLOURS).index("red"), list(scenes.COLOURS).index("blue"), 0)
    second_lies = {"above": (0, 1), "below": (0, -1), "left of": (1, 0), "right of": (-1, 0)}
    for relation, (name, inverse, _) in enumerate(scenes.RELATIONS):
        towards = second_lies[name]
        assert np.array_equal(second_lies[inverse], np.negative(towards))
        attributes = np.array([[red, shape, blue, shape, relation, black]] * 20)
        images = scenes.draw(attributes, 32, np.random.default_rng(0)).astype(int)
        y, x = np.mgrid[:32, :32]
        for image in images:
            reds, blues = (image[..., 0] - image[..., 2] > 90), (image[..., 2] - image[..., 0] > 90)
            assert reds.sum() > 1.3 * blues.sum() > 13
            apart = [axis[blues].mean() - axis[reds].mean() for axis in (x, y)]
            assert np.dot(apart, towards) > 9
            assert not (reds | blues)[[0, -1]].any() and not (reds | blues)[:, [0, -1]].any()
            assert np.median(image[:, :, 1]) < 40


def test_no_two_shapes_look_alike():
    n = len(scenes.SHAPES)
    at, radius, angle = np.zeros((n, 2)), np.full(n, 0.5), np.zeros(n)
    cover = scenes._cover(np.arange(n), at, radius, angle, 32).reshape(n, 1, -1)
    other = cover.reshape(1, n, -1)
    overlap = np.minimum(cover, other).sum(2) / np.maximum(cover, other).sum(2)
    assert overlap[~np.eye(n, dtype=bool)].max() < 0.85  # disc and box


def test_mistakes_are_one_line():
    for wrong in ({"split": "test"}, {"size": -1}, {"res": 8}, {"split": "val", "size": 10_000}):
        with pytest.raises(UserError, match=r"^scenes: [^\n]+$"):
            scenes.Scenes(**wrong)
