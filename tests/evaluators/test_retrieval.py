import itertools

import numpy as np
import pytest

from base.errors import UserError
from evaluators.retrieval import (
    Evaluator,
    i2t_chance,
    image_to_text_retrieval_eval,
    t2i_chance,
    text_to_image_retrieval_eval,
)

# Ranks of the right candidate for 12 queries: 3 are first, 5 among 5, 8 among 10.
RANKS = np.array([0, 0, 0, 4, 4, 5, 9, 9, 10, 11, 11, 11])


def recalls(r1, r5, r10):
    return {"Recall@1": r1, "Recall@5": r5, "Recall@10": r10}


def test_contract_one_text_each():
    # Row i is a rotation of 0 ... 11 that has RANKS[i] on the diagonal.
    i, j = np.arange(12)[:, None], np.arange(12)[None, :]
    dist = (j - i + RANKS[:, None]) % 12
    expected = recalls(3 / 12, 5 / 12, 8 / 12)
    assert image_to_text_retrieval_eval(dist, list(range(12))) == expected
    assert text_to_image_retrieval_eval(dist.T, list(range(12))) == expected


def test_contract_several_texts_and_fewer_candidates_than_k():
    # Texts 0, 1, 2 belong to image 1 and text 3 to image 0.
    own = [1, 1, 1, 0]
    dist = np.array(
        [
            [0.1, 0.7, 0.9, 0.2],  # image 0: its text comes second
            [0.6, 0.5, 0.0, 0.3],  # image 1: one of its three comes first, which is enough
        ]
    )
    assert image_to_text_retrieval_eval(dist, own) == recalls(0.5, 1.0, 1.0)
    # Text 0 prefers image 0; texts 1, 2 and 3 their own.
    assert text_to_image_retrieval_eval(dist, own) == recalls(0.75, 1.0, 1.0)


def test_contract_ties_go_to_the_smaller_index():
    dist = np.zeros((20, 20))
    own = list(range(20))
    expected = recalls(1 / 20, 5 / 20, 10 / 20)
    assert image_to_text_retrieval_eval(dist, own) == expected
    assert text_to_image_retrieval_eval(dist, own) == expected
    # Reversed: image 19's own text comes first, image 0's last.
    assert image_to_text_retrieval_eval(dist, own[::-1]) == expected
    dist = np.array([[0.3, 0.3], [0.2, 0.1]])
    assert image_to_text_retrieval_eval(dist, [0, 1])["Recall@1"] == 1.0
    assert image_to_text_retrieval_eval(dist, [1, 0])["Recall@1"] == 0.0


def test_contract_distances_are_compared_in_double_precision():
    dist = np.array([[1.0, 1.0 - 1e-12], [1.0, 1.0]])
    assert image_to_text_retrieval_eval(dist, [0, 1])["Recall@1"] == 0.0


def test_contract_equals_its_definition_by_sorting():
    rng = np.random.default_rng(0)
    for _ in range(10):
        own = np.concatenate([np.arange(12), rng.integers(0, 12, 18)])
        dist = rng.permutation(12 * 30).reshape(12, 30) / 7
        for k in (1, 5, 10):
            nearest = own[np.argsort(dist, axis=1)[:, :k]]
            i2t = np.mean((nearest == np.arange(12)[:, None]).any(axis=1))
            t2i = np.mean((np.argsort(dist, axis=0)[:k] == own).any(axis=0))
            assert image_to_text_retrieval_eval(dist, own)[f"Recall@{k}"] == i2t
            assert text_to_image_retrieval_eval(dist, own)[f"Recall@{k}"] == t2i


def test_contract_nan_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        image_to_text_retrieval_eval(np.array([[np.nan]]), [0])


@pytest.mark.parametrize("image_of_text", [[0, 1, 2], [0, 0, 1], [0, 1, 1, 2, 2, 2], [0, 0]])
def test_chance_equals_the_mean_over_all_orders(image_of_text):
    n_images = len(set(image_of_text))
    for k in (1, 2, 5, 10):
        orders = list(itertools.permutations(image_of_text))
        hits = [image in order[:k] for order in orders for image in range(n_images)]
        assert i2t_chance(k, image_of_text) == pytest.approx(np.mean(hits), abs=1e-12)
        orders = list(itertools.permutations(range(n_images)))
        assert t2i_chance(k, n_images) == pytest.approx(np.mean([0 in o[:k] for o in orders]))


def test_chance_for_coco():
    assert t2i_chance(1, 5000) == 0.0002
    assert i2t_chance(1, np.repeat(np.arange(5000), 5)) == pytest.approx(5 / 25000)


def run(fakes, source, params, mesh_shape=(2, 1), batch_size=4, **kw):
    mesh = fakes.mesh(*mesh_shape)
    args = (fakes.Model(), mesh, fakes.Preprocess(), source, None)
    results = list(Evaluator(*args, batch_size=batch_size, **kw).run(params))
    return {name: value for name, value, _ in results}, {name: c for name, _, c in results}


def by_hand(fakes):
    # Image 1 is nearest to text "b" (its second), image 0 to its own "a", image 2 to the wrong "a".
    source = fakes.source([[1, 0, 0], [0, 1, 0], [9, 0, 1]], [["a"], ["x", "b"], ["c", "y"]])
    table = {
        "a": [1, 0, 0, 0],
        "b": [0, 1, 0.1, 0],
        "x": [0.5, 0.4, 0, 0],  # nearest to image 0
        "c": [0, 0, 1, 0],  # nearest to its own image 2, but far
        "y": [0.1, 0, 1, 0],
    }
    return source, fakes.params(table)


def test_known_answer_with_all_captions(fakes):
    values, chances = run(fakes, *by_hand(fakes))
    # I->T: images 0 and 1 hit; image 2's best own text "y" stands behind "a" and "x".
    # T->I: "a", "b", "c", "y" hit; "x" prefers images 0 and 2, its own is the third.
    assert values == {
        "i2t_R@1": pytest.approx(2 / 3),
        "i2t_R@5": 1.0,
        "i2t_R@10": 1.0,
        "t2i_R@1": pytest.approx(4 / 5),
        "t2i_R@5": 1.0,
        "t2i_R@10": 1.0,
    }
    assert chances["i2t_R@1"] == pytest.approx((1 + 2 + 2) / (3 * 5))
    assert chances["t2i_R@1"] == pytest.approx(1 / 3)
    assert chances["i2t_R@10"] == chances["t2i_R@10"] == 1.0


def test_known_answer_with_first_captions(fakes):
    values, chances = run(fakes, *by_hand(fakes), captions="first")
    # Texts are "a", "x", "c". I->T: image 1 still prefers "x"; image 2 prefers "a" and "x".
    assert values["i2t_R@1"] == pytest.approx(2 / 3)
    assert values["t2i_R@1"] == pytest.approx(2 / 3)
    assert chances["i2t_R@1"] == chances["t2i_R@1"] == pytest.approx(1 / 3)


def test_canonicalize_changes_captions_only_when_asked(fakes):
    source = fakes.source([[1, 0], [0, 1]], [["(b"], ["(a"]])
    params = fakes.params({"b": [1, 0, 0, 0], "a": [0, 1, 0, 0]})
    assert run(fakes, source, params, canonicalize=True)[0]["i2t_R@1"] == 1.0
    # Both start with the same "(", so all texts are equal and the first one wins.
    assert run(fakes, source, params)[0]["i2t_R@1"] == 0.5


def test_equal_captions_of_different_images_tie_by_index(fakes):
    n = 12
    source = fakes.source(np.full((n, 4), 7), [["same"]] * n)
    values, chances = run(fakes, source, fakes.params(), batch_size=2)
    assert values == pytest.approx(chances)  # index order has exactly k of n among the first k


def test_result_does_not_depend_on_batch_size_or_mesh(fakes):
    source, params = fakes.random_source(23), fakes.params()
    expected, _ = run(fakes, source, params, mesh_shape=(1, 1), batch_size=23)
    assert 0 < expected["i2t_R@5"] < 1
    for mesh_shape, batch_size in [
        ((1, 1), 1),
        ((2, 1), 2),
        ((4, 2), 8),
        ((3, 1), 6),
        ((8, 1), 64),
    ]:
        assert run(fakes, source, params, mesh_shape, batch_size)[0] == expected


def test_equals_the_contract_functions_on_the_matrix(fakes):
    source, params = fakes.random_source(23), fakes.params()
    zimg, _, _ = fakes.Model().apply({"params": params}, np.stack([e["image"] for e in source]))
    own = np.repeat(np.arange(23), [len(e["texts"]) for e in source])
    ids = np.stack([fakes.Preprocess().text(t) for e in source for t in e["texts"]])
    _, ztxt, _ = fakes.Model().apply({"params": params}, text=ids)
    dist = 1 - np.asarray(zimg @ ztxt.T)
    values, _ = run(fakes, source, params)
    for k in (1, 5, 10):
        assert values[f"i2t_R@{k}"] == image_to_text_retrieval_eval(dist, own)[f"Recall@{k}"]
        assert values[f"t2i_R@{k}"] == text_to_image_retrieval_eval(dist, own)[f"Recall@{k}"]


def test_new_parameters_give_new_numbers_from_the_same_evaluator(fakes):
    source, params = by_hand(fakes)
    args = (fakes.Model(), fakes.mesh(2), fakes.Preprocess(), source, None)
    evaluator = Evaluator(*args, batch_size=4)
    before = list(evaluator.run(params))
    after = list(evaluator.run({**params, "img": -params["img"]}))
    again = list(evaluator.run(params))
    assert before == again != after


def test_bad_values_and_empty_captions_are_refused(fakes):
    source, params = by_hand(fakes)
    with pytest.raises(UserError, match="captions 'some' is none of all, first"):
        run(fakes, source, params, captions="some")
    for texts in ([], [" "], ["a", ""]):
        source[1]["texts"] = texts
        with pytest.raises(UserError, match="image 1: a caption"):
            run(fakes, source, params)
    source[1]["texts"] = ["..."]
    with pytest.raises(UserError, match="image 1: a caption"):
        run(fakes, source, params, canonicalize=True)


def test_protocol_is_stated(fakes):
    source, _ = by_hand(fakes)
    args = (fakes.Model(), fakes.mesh(2), fakes.Preprocess(), source, None)
    assert Evaluator(*args, captions="first").protocol == "3 images, first captions of each"
