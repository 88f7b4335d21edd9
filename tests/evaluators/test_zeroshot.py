import numpy as np
import pytest

from base.errors import UserError
from evaluators.zeroshot import Evaluator, unit_mean


def run(fakes, source, params, mesh_shape=(2, 1), batch_size=4, templates="{}", **kw):
    args = (fakes.Model(), fakes.mesh(*mesh_shape), fakes.Preprocess(), source, None)
    results = list(Evaluator(*args, batch_size=batch_size, templates=templates, **kw).run(params))
    return {name: value for name, value, _ in results}, {name: c for name, _, c in results}


def by_hand(fakes):
    """Class A owns three images, all right; B one, wrong; C occurs not at all."""
    images = [[9, 1], [9, 0], [9, 2], [9, 3]]
    source = fakes.source(images, [["x"]] * 4, [0, 0, 0, 1], ["A", "B", "C"])
    return source, fakes.params({"a": [1, 0, 0, 0], "b": [0, 1, 0, 0], "c": [0, 0, 1, 0]})


def test_known_answer(fakes):
    values, chances = run(fakes, *by_hand(fakes))
    assert values == {"top1": 0.75, "mean_per_class_recall": 0.5}
    assert chances == {"top1": pytest.approx(1 / 3), "mean_per_class_recall": pytest.approx(1 / 3)}


def test_top5_is_reported_for_more_than_5_classes(fakes):
    # The classes' vectors turn away from the image one by one: class i has rank i.
    angles = np.linspace(0, 1.5, 7)
    table = {chr(97 + i): [np.cos(a), np.sin(a), 0, 0] for i, a in enumerate(angles)}
    names = [chr(65 + i) for i in range(7)]
    source = fakes.source([[9, 0]] * 7, [["x"]] * 7, range(7), names)
    values, chances = run(fakes, source, fakes.params(table))
    assert values["top1"] == pytest.approx(1 / 7)
    assert values["top5"] == pytest.approx(5 / 7)
    assert chances["top5"] == pytest.approx(5 / 7)
    source = fakes.source([[9, 0]] * 5, [["x"]] * 5, range(5), names[:5])
    assert set(run(fakes, source, fakes.params(table))[0]) == {"top1", "mean_per_class_recall"}


def test_equal_class_names_go_to_the_smaller_label(fakes):
    images, params = [[1, 0], [1, 0], [0, 1]], fakes.params({"a": [1, 0, 0, 0], "b": [0, 1, 0, 0]})
    source = fakes.source(images, [["x"]] * 3, [0, 2, 1], ["A", "B", "a"])
    values, _ = run(fakes, source, params)
    assert values["top1"] == pytest.approx(2 / 3)
    assert values["mean_per_class_recall"] == pytest.approx(2 / 3)


def test_prompt_embeddings_are_averaged_and_normalised(fakes):
    # The fake model reads the first letter: the templates alone decide, "pq" of either class.
    table = {"p": [1, 0, 0, 0], "q": [0, 1, 0, 0], "b": [0.8, 0.6, 0, 0], "a": [1, 0, 0, 0]}
    params = fakes.params(table)
    source = fakes.source([[1, 1]], [["x"]], [0], ["A", "B"])
    args = (fakes.Model(), fakes.mesh(2), fakes.Preprocess(), source, None)
    evaluator = Evaluator(*args, batch_size=2, templates=("p {}", "q {}", "q so {}"))
    got = evaluator._class_embeddings(params)
    expected = np.array([1, 2, 0, 0]) / np.sqrt(5)
    np.testing.assert_allclose(got, [expected, expected], atol=1e-6)
    evaluator = Evaluator(*args, batch_size=2, templates=("{}", "q {}"))
    got = evaluator._class_embeddings(params)
    np.testing.assert_allclose(got[0], np.array([1, 1, 0, 0]) / np.sqrt(2), atol=1e-6)
    np.testing.assert_allclose(got[1], np.array([0.8, 1.6, 0, 0]) / np.sqrt(3.2), atol=1e-6)


def test_classes_with_unequal_numbers_of_aliases_weigh_the_same(fakes):
    source = fakes.source([[1, 0]], [["x"]], [1], ["p, q, q", "A"])
    params = fakes.params({"p": [1, 0, 0, 0], "q": [0, 1, 0, 0], "a": [0.8, 0.6, 0, 0]})
    assert run(fakes, source, params, aliases="first")[0]["top1"] == 0.0
    assert run(fakes, source, params, aliases="all")[0]["top1"] == 1.0


def test_vectors_that_cancel_do_not_give_nan():
    assert unit_mean(np.array([[1.0, 0.0], [-1.0, 0.0]])).tolist() == [0.0, 0.0]


def test_names_given_by_the_config_win_over_the_sources(fakes):
    source, params = by_hand(fakes)
    assert run(fakes, source, params, classnames=("b", "a", "c"))[0]["top1"] == 0.25


def test_result_does_not_depend_on_batch_size_or_mesh(fakes):
    source, params = fakes.random_source(23, classes=7), fakes.params()
    expected, _ = run(fakes, source, params, mesh_shape=(1, 1), batch_size=23)
    assert 0 < expected["top1"] < 1
    for mesh_shape, batch_size in [
        ((1, 1), 1),
        ((2, 1), 2),
        ((4, 2), 8),
        ((3, 1), 6),
        ((8, 1), 64),
    ]:
        assert run(fakes, source, params, mesh_shape, batch_size)[0] == expected


@pytest.mark.parametrize("label", [-1, 3, None])
def test_a_label_that_is_no_class_is_refused(fakes, label):
    source, params = by_hand(fakes)
    source[2]["label"] = label
    with pytest.raises(UserError, match=f"image 2: label {label} is none of the 3 classes"):
        run(fakes, source, params)


def test_an_unreadable_image_is_refused(fakes):
    source, params = by_hand(fakes)
    source[1]["image"] = b""
    with pytest.raises(UserError, match="image 1 cannot be read"):
        run(fakes, source, params)


def test_a_source_without_class_names_is_refused_before_any_work(fakes):
    source, _ = by_hand(fakes)
    source.class_names = None
    with pytest.raises(UserError, match="class names"):
        Evaluator(fakes.Model(), fakes.mesh(2), fakes.Preprocess(), source, None)


def test_protocol_is_stated(fakes):
    source, _ = by_hand(fakes)
    args = (fakes.Model(), fakes.mesh(2), fakes.Preprocess(), source, None)
    protocol = Evaluator(*args).protocol
    assert protocol.startswith("4 images, 3 classes, 81 templates")
