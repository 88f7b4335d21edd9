import numpy as np
import pytest

from evaluators import ranks
from evaluators.ranks import Ranker, best_match_ranks


def definition(sims, query_group, candidate_group):
    """Sorts everything (stably), which the code under test must not."""
    order = np.argsort(-sims, axis=1, kind="stable")
    hits = candidate_group[order] == query_group[:, None]
    return np.where(hits.any(axis=1), hits.argmax(axis=1), sims.shape[1])


def test_rank_counts_the_nearer_and_the_equal_with_a_smaller_index():
    sims = np.array([[0.1, 0.9, 0.5, 0.5]])
    for candidate, rank in enumerate([3, 0, 1, 2]):
        assert best_match_ranks(sims, np.array([candidate]), np.arange(4)) == rank


def test_of_several_matches_the_nearest_counts_and_of_equal_ones_the_first():
    sims = np.array([[0.5, 0.9, 0.5, 0.5]])
    groups = np.array([0, 1, 2, 2])
    assert best_match_ranks(sims, np.array([2]), groups) == 2
    sims = np.array([[0.1, 0.9, 0.5, 0.8]])
    assert best_match_ranks(sims, np.array([2]), groups) == 1


def test_all_equal_gives_index_order():
    assert best_match_ranks(np.ones((5, 5)), np.arange(5), np.arange(5)).tolist() == [0, 1, 2, 3, 4]


def test_a_query_without_a_match_ranks_behind_everything():
    assert best_match_ranks(np.ones((1, 3)), np.array([9]), np.arange(3)) == 3


def test_ranks_equal_the_stable_sort_with_many_ties():
    rng = np.random.default_rng(0)
    for _ in range(20):
        sims = rng.integers(0, 4, (13, 17)).astype(float)
        query_group, candidate_group = rng.integers(0, 6, 13), rng.integers(0, 6, 17)
        actual = best_match_ranks(sims, query_group, candidate_group)
        np.testing.assert_array_equal(actual, definition(sims, query_group, candidate_group))


@pytest.mark.parametrize("mesh_shape", [(1, 1), (8, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("elements", [1, 60, 2**25])
def test_ranker_equals_the_stable_sort_for_any_mesh_and_chunk(
    fakes, monkeypatch, mesh_shape, elements
):
    monkeypatch.setattr(ranks, "_ELEMENTS", elements)
    rng = np.random.default_rng(1)
    # Small integers: products are exact, whatever the order of additions, and often tie.
    queries = rng.integers(-2, 3, (21, 4)).astype(np.float32)
    candidates = rng.integers(-2, 3, (30, 4)).astype(np.float32)
    query_group, candidate_group = rng.integers(0, 12, 21), rng.integers(0, 12, 30)
    actual = Ranker(fakes.mesh(*mesh_shape))(queries, candidates, query_group, candidate_group)
    expected = definition(queries @ candidates.T, query_group, candidate_group)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("shape", [(9, 67), (33, 128), (130, 5)])
def test_equal_candidates_tie_exactly_wherever_they_stand(fakes, shape):
    rng = np.random.default_rng(2)
    queries, candidate = rng.normal(size=shape), rng.normal(size=(1, shape[1]))
    candidates = np.repeat(candidate, len(queries), 0).astype(np.float32)
    index = np.arange(len(queries))
    got = Ranker(fakes.mesh(4))(queries.astype(np.float32), candidates, index, index)
    assert got.tolist() == index.tolist()
