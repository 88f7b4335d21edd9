"""Positions to examples: permutations, blocks, mixtures, all without memory of what went before."""

import numpy as np
import pytest

from input_pipeline.order import BlockEpochs, Epochs, Pattern


@pytest.mark.parametrize("sizes", [[5], [3, 1, 4, 1, 5, 9, 2, 6], [2] * 11])
@pytest.mark.parametrize("window", [1, 2, 3, 20])
def test_every_epoch_of_blocks_is_a_permutation_of_all_examples(sizes, window):
    starts = np.concatenate([[0], np.cumsum(sizes)])
    order, n = BlockEpochs(starts, window, seed=3), sum(sizes)
    epochs = [[order[e * n + i] for i in range(n)] for e in range(6)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(n))
    if n > 5:
        assert len({tuple(epoch) for epoch in epochs}) == 6


def test_no_more_than_a_window_of_blocks_is_read_at_a_time():
    starts = np.arange(0, 1001, 10)
    order = BlockEpochs(starts, 4, seed=0)
    for epoch in range(2):
        blocks = np.array([order[epoch * 1000 + i] // 10 for i in range(1000)])
        for window in blocks.reshape(-1, 40):
            assert len(set(window)) == 4
            assert len(set(window[:12])) > 1  # and they are mixed
    # Other blocks meet in another epoch.
    first, second = ({order[e * 1000 + i] // 10 for i in range(40)} for e in (0, 1))
    assert first != second


def test_blocks_in_any_order_of_asking():
    order = BlockEpochs(np.array([0, 7, 9, 20]), 2, seed=0)
    forward = [order[i] for i in range(200)]
    other = BlockEpochs(np.array([0, 7, 9, 20]), 2, seed=0)
    assert [other[i] for i in reversed(range(200))] == forward[::-1]


@pytest.mark.parametrize(
    "weights",
    [
        *([1], [0.8, 0.2], [3, 5, 1.5], [0, 1], [1] * 7, [1e-3, 1.0], [1e5, 2]),
        *([0.5, *([0.01] * 50)], [1] * 100, [1 / k for k in range(1, 101)]),
    ],
)
def test_any_first_n_examples_have_each_part_within_one_of_its_share(weights):
    pattern = Pattern(weights)
    n = 2 * pattern.period + 7
    parts, places = map(np.array, zip(*(pattern[i] for i in range(n))))
    share = np.array(weights) / np.sum(weights)
    assert np.abs(pattern.counts / pattern.period - share).max() <= 1 / pattern.period
    for part in range(len(weights)):
        so_far = np.cumsum(parts == part)
        wanted = np.arange(1, n + 1) * (pattern.counts[part] / pattern.period)
        assert np.abs(so_far - wanted).max() < 1
        mine = places[parts == part]  # each part's stream without a gap
        np.testing.assert_array_equal(mine, np.arange(len(mine)))


def test_the_rarest_part_comes_too():
    pattern = Pattern([1, 1e-9, 0])
    assert pattern.period == 10**6 and pattern.counts.tolist() == [10**6 - 1, 1, 0]


@pytest.mark.parametrize("weights", [[], [0, 0], [-1, 2], [float("nan")], [1, float("inf")]])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError):
        Pattern(weights)


@pytest.mark.timeout(300)
def test_a_position_far_away_is_reached_without_those_before_it():
    """10^15 positions one after another would take decades."""
    for order in (Epochs(1000, 0), BlockEpochs(np.arange(0, 1001, 10), 4, 0), Pattern([1, 2])):
        assert order[10**15] is not None
