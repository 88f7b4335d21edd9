"""Nearest neighbours, against a sort of everything."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from base.errors import UserError
from embedding import neighbours
from embedding.neighbours import nearest


def unit(rng, *shape):
    z = rng.normal(size=shape).astype(np.float32)
    return z / np.linalg.norm(z, axis=-1, keepdims=True)


def by_sorting(queries, index, k):
    scores = queries.astype(np.float64) @ index.astype(np.float64).T
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, rows, axis=1), rows


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (3, 5, 5), (5, 100, 1), (9, 203, 10), (4, 40, 40)], ids=str
)
@pytest.mark.parametrize("chunk", [None, 16])
def test_neighbours_are_those_of_a_sort(monkeypatch, m, n, k, chunk):
    if chunk:
        monkeypatch.setattr(neighbours, "_ELEMENTS", chunk * m)
    rng = np.random.default_rng(0)
    queries, index = unit(rng, m, 8), unit(rng, n, 8)
    scores, rows = by_sorting(queries, index, k)
    result = nearest(queries, index, k)
    np.testing.assert_array_equal(result.rows, rows)
    np.testing.assert_allclose(result.scores, scores, atol=1e-6)
    assert result.rows.dtype == np.int64 and result.scores.dtype == np.float32


@pytest.mark.parametrize("devices", [1, 3, 8])
@pytest.mark.parametrize("chunk", [None, 24])
def test_of_equally_near_rows_the_smaller_comes_first(monkeypatch, devices, chunk):
    # Halves and signs: products are exact, most rows tie, over chunks and devices.
    rng = np.random.default_rng(1)
    index = rng.choice([-0.5, 0.5], size=(150, 4)).astype(np.float32)
    queries = rng.choice([-0.5, 0.5], size=(7, 4)).astype(np.float32)
    if chunk:
        monkeypatch.setattr(neighbours, "_ELEMENTS", chunk * 7)
    mesh = jax.make_mesh(
        (devices, 1),
        ("data", "fsdp"),
        axis_types=(AxisType.Auto,) * 2,
        devices=jax.devices()[:devices],
    )
    for k in (1, 20, 150):
        scores, rows = by_sorting(queries, index, k)
        result = nearest(queries, index, k, mesh)
        np.testing.assert_array_equal(result.rows, rows)
        np.testing.assert_array_equal(result.scores, scores)


def test_copies_of_a_row_tie_wherever_they_lie(monkeypatch):
    monkeypatch.setattr(neighbours, "_ELEMENTS", 2 * 64)
    rng = np.random.default_rng(2)
    index = np.tile(unit(rng, 1, 96), (300, 1))
    result = nearest(np.concatenate([index[:1], unit(rng, 1, 96)]), index, 300)
    np.testing.assert_array_equal(result.rows, np.tile(np.arange(300), (2, 1)))


def test_many_queries_go_in_blocks(monkeypatch):
    monkeypatch.setattr(neighbours, "QUERIES", 4)
    rng = np.random.default_rng(3)
    queries, index = unit(rng, 11, 8), unit(rng, 60, 8)
    np.testing.assert_array_equal(nearest(queries, index, 3).rows, by_sorting(queries, index, 3)[1])


def test_the_index_is_read_once_in_pieces(monkeypatch):
    monkeypatch.setattr(neighbours, "_ELEMENTS", 2 * 16)
    rng = np.random.default_rng(4)
    index, queries = unit(rng, 70, 8).astype(np.float16), unit(rng, 2, 8)
    read = []

    class Lazy:
        shape = index.shape

        def __getitem__(self, rows):
            read.append((rows.start, min(rows.stop, len(index))))
            return index[rows]

    result = nearest(queries, Lazy(), 5)
    np.testing.assert_array_equal(result.rows, by_sorting(queries, index, 5)[1])
    assert read == [(0, 16), (16, 32), (32, 48), (48, 64), (64, 70)]


def test_similarities_in_memory_are_bounded():
    for n, queries, devices in ((10**9, 1024, 8), (10**9, 1, 1), (10**6, 1000, 4), (5, 7, 8)):
        chunk = neighbours._chunk_rows(n, queries, devices)
        assert chunk % devices == 0 and chunk * queries <= max(2**25, devices * queries)
        assert chunk < n + devices


def test_negative_scores_beat_the_rows_that_fill_up():
    index = -np.eye(3, dtype=np.float32)
    result = nearest(np.ones((1, 3), np.float32), index, 3)
    np.testing.assert_array_equal(result.rows, [[0, 1, 2]])
    np.testing.assert_array_equal(result.scores, [[-1, -1, -1]])


def test_no_queries_have_no_neighbours():
    result = nearest(np.zeros((0, 3), np.float32), np.eye(3, dtype=np.float32), 2)
    assert result.rows.shape == result.scores.shape == (0, 2)


def test_mistakes():
    eye = np.eye(3, dtype=np.float32)
    for k in (0, 4):
        with pytest.raises(UserError, match=f"k={k} nearest neighbours of 3 rows"):
            nearest(eye, eye, k)
    with pytest.raises(UserError, match=r"queries of shape \(3, 2\) do not fit .* width 3"):
        nearest(eye[:, :2], eye, 1)
    broken = eye.copy()
    broken[1, 1] = np.nan
    with pytest.raises(UserError, match="queries are not finite"):
        nearest(broken, eye, 1)
    with pytest.raises(UserError, match="rows 0 to 2 of the index are not finite"):
        nearest(eye, broken, 1)
