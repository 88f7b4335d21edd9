"""Several sources by weight, languages by temperature, in one exact order."""

import numpy as np
import pytest

from base.errors import UserError
from input_pipeline import loader
from input_pipeline.mixture import Languages, Mixture


class Numbers:
    """Examples first, first + 1, ..."""

    def __init__(self, first, count, blocks=None):
        self.first, self.count = first, count
        if blocks:
            self.blocks, self.window = np.array(blocks), 2

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return {"number": self.first + i}


class Preprocess:
    def example(self, example, rng):
        return {"text": np.array([example["number"], rng.integers(2**31)], np.int64)}


PARTS = {
    "big": (Numbers(0, 50), 0.7),
    "small": (Numbers(1000, 3), 0.2),
    "blocks": (Numbers(2000, 12, [0, 5, 6, 12]), 0.1),
}


def mixture():
    return Mixture({k: v[0] for k, v in PARTS.items()}, tuple(v[1] for v in PARTS.values()))


def stream(start=0, steps=25, **options):
    with loader.train_batches(
        mixture(), Preprocess(), batch_size=8, seed=5, start_step=start, num_threads=2, **options
    ) as batches:
        return [next(batches) for _ in range(steps)]


def test_parts_come_as_often_as_their_weights_say_each_in_its_epochs():
    numbers = np.concatenate([batch["text"][:, 0] for batch in stream(steps=125)])
    for first, count, weight in ((0, 50, 0.7), (1000, 3, 0.2), (2000, 12, 0.1)):
        mine = numbers[(numbers >= first) & (numbers < first + 1000)]
        assert abs(len(mine) - weight * 1000) <= 2
        for epoch in range(len(mine) // count):
            got = sorted(mine[epoch * count : (epoch + 1) * count])
            assert got == list(range(first, first + count))


def test_a_mixture_resumed_at_any_step_is_the_suffix():
    whole = stream()
    for start in range(25):
        for left, right in zip(stream(start, 25 - start), whole[start:]):
            for key in left:
                np.testing.assert_array_equal(left[key], right[key])


@pytest.mark.parametrize("processes", [2, 4])
def test_a_mixture_is_the_same_on_any_number_of_processes(processes):
    whole = stream(steps=5)
    parts = [stream(steps=5, process_index=p, process_count=processes) for p in range(processes)]
    for step, batch in enumerate(whole):
        for key in batch:
            together = np.concatenate([part[step][key] for part in parts])
            np.testing.assert_array_equal(together, batch[key])


def test_examples_say_which_source_they_are_of():
    mixed = mixture()
    assert len(mixed) == 65
    assert [mixed[i]["source"] for i in (0, 49, 50, 52, 53, 64)] == [
        *("big", "big", "small", "small", "blocks", "blocks")
    ]
    assert mixed[53]["number"] == 2000
    for outside in (-1, 65):
        with pytest.raises(IndexError):
            mixed[outside]


def test_two_copies_of_a_source_are_not_in_step():
    twice = Mixture({"a": Numbers(0, 100), "b": Numbers(0, 100)}, (1, 1))
    order = twice.order(0)
    numbers = [twice[order[i]]["number"] for i in range(200)]
    assert numbers[0::2] != numbers[1::2] and sorted(numbers[0::2]) == list(range(100))


class Spoken:
    """20 examples: all have an English text, every fifth a German one, one a Basque one."""

    def __len__(self):
        return 20

    def __getitem__(self, i):
        tags = ["en"] + ["de"] * (i % 5 == 0) + ["eu"] * (i == 7)
        texts = [f"{tag} {i}" for tag in tags]
        return {"texts": texts, "languages": tags, "weights": [1.0] * len(tags), "number": i}

    def by_language(self):
        return {"en": np.arange(20), "de": np.arange(0, 20, 5), "eu": np.array([7])}


@pytest.mark.parametrize(
    ("temperature", "shares"),
    [
        (1, {"en": 20 / 25, "de": 4 / 25, "eu": 1 / 25}),
        (2, {"en": 20**0.5 / (20**0.5 + 2 + 1), "de": 2 / (20**0.5 + 3)}),
        (1e9, {"en": 1 / 3, "de": 1 / 3}),
    ],
)
def test_languages_have_the_shares_of_their_temperature(temperature, shares):
    balanced = Languages(Spoken(), temperature)
    order = balanced.order(0)
    seen = [balanced[order[i]] for i in range(1000)]
    for example in seen:
        assert len(example["texts"]) == len(example["weights"]) == 1
        assert example["texts"] == [f"{example['languages'][0]} {example['number']}"]
    tags = [example["languages"][0] for example in seen]
    for tag, share in shares.items():
        assert abs(tags.count(tag) / 1000 - share) < 0.005


def test_an_example_in_two_languages_is_one_example():
    balanced = Languages(Spoken(), 1)
    seven = [i for i in range(len(balanced)) if balanced[i]["number"] == 7]
    assert len(seven) == 2 and {balanced.identity(i) for i in seven} == {7}
    mixed = Mixture({"a": balanced, "b": Numbers(0, 10)}, (1, 1))
    assert {mixed.identity(i) for i in seven} == {7}
    # No two examples share one, though the first part has fewer rows than its source identities.
    few = Spoken()
    few.by_language = lambda: {"de": np.arange(0, 20, 5)}
    mixed = Mixture({"a": Languages(few, 1), "b": Languages(few, 1)}, (1, 1))
    assert len(mixed) == 8 and len({mixed.identity(i) for i in range(8)}) == 8


def test_examples_without_a_language_are_told(caplog):
    source = Spoken()
    source.by_language = lambda: {"de": np.arange(0, 20, 5), "eu": np.array([5, 7])}
    Languages(source, 1)
    assert "15 of 20 examples name no language" in caplog.text


def test_a_mixture_knows_what_its_parts_left_out():
    one, other = Numbers(0, 5), Numbers(0, 5)
    one.damage = {("no image", "a.tar"): 2}
    other.damage = {("no image", "a.tar"): 1, ("no caption", "b.tar"): 4}
    mixed = Mixture({"a": one, "b": other, "c": Numbers(0, 2)}, (1, 1, 1))
    assert mixed.damage == {("no image", "a.tar"): 3, ("no caption", "b.tar"): 4}


def test_mistakes_are_named():
    with pytest.raises(UserError, match="b of the mixture has no examples"):
        Mixture({"a": Numbers(0, 1), "b": Numbers(0, 0)}, (1, 1))
    with pytest.raises(UserError, match="mixture of a: weights must be"):
        Mixture({"a": Numbers(0, 1)}, (0,))
    with pytest.raises(UserError, match="mixture of nothing"):
        Mixture({}, ())
    with pytest.raises(UserError, match="language_temperature=0 must be above 0"):
        Languages(Spoken(), 0)
    with pytest.raises(UserError, match="this source has no languages"):
        Languages(Numbers(0, 5), 1)
