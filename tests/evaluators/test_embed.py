import jax
import numpy as np
import pytest

from base.errors import UserError
from evaluators import embed
from evaluators.embed import Embedder, eval_image, tokenize, unique_rows


def expected_images(source):
    z = np.stack([e["image"].reshape(-1)[:4] for e in source]).astype(np.float32)
    return z / np.linalg.norm(z, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("mesh_shape", "batch_size"),
    [((1, 1), 1), ((8, 1), 8), ((4, 2), 16), ((3, 1), 3), ((2, 2), 64)],
)
@pytest.mark.parametrize("n", [1, 16, 37])
def test_every_example_once_in_order_for_any_mesh_and_batch(fakes, mesh_shape, batch_size, n):
    source = fakes.random_source(n)
    embedder = Embedder(fakes.Model(), fakes.mesh(*mesh_shape), fakes.Preprocess(), batch_size)
    z = embedder.images(fakes.params(), source)
    np.testing.assert_allclose(z, expected_images(source), atol=1e-6)


def test_rows_that_the_mesh_reorders_come_back_in_order(fakes, monkeypatch):
    # On TPU pods a mesh orders devices by their links, so processes' rows interleave.
    to_device = embed.to_device

    def interleaved(batch, mesh):
        order = np.arange(len(batch["mask"])).reshape(2, -1).T.ravel()
        return to_device({k: v[order] for k, v in batch.items()}, mesh)

    monkeypatch.setattr(embed, "to_device", interleaved)
    source = fakes.random_source(13)
    z = Embedder(fakes.Model(), fakes.mesh(4), fakes.Preprocess(), 8).images(fakes.params(), source)
    np.testing.assert_allclose(z, expected_images(source), atol=1e-6)


def test_other_arrays_pass_through_with_their_rows(fakes):
    source = fakes.random_source(11)
    embedder = Embedder(fakes.Model(), fakes.mesh(4), fakes.Preprocess(), 8)
    rows = embedder.rows(
        fakes.params(),
        range(11),
        lambda i: {"image": source[i]["image"], "place": np.array([i, -i], np.int32)},
    )
    assert rows["place"].tolist() == [[i, -i] for i in range(11)]
    assert set(rows) == {"z", "place"}


def test_texts_are_embedded_once_per_distinct_tokens(fakes):
    texts = ["b", "a", "B", "a", "c"]  # the preprocessing lower-cases
    tokens = tokenize(fakes.Preprocess(), texts)
    assert len(tokens.distinct) == 3
    embedder = Embedder(fakes.Model(), fakes.mesh(2), fakes.Preprocess(), 2)
    params = fakes.params()
    z = embedder.texts(params, tokens)
    table = params["table"] / np.linalg.norm(params["table"], axis=1, keepdims=True)
    np.testing.assert_allclose(z, table[[ord(t.lower()) for t in texts]], atol=1e-6)
    np.testing.assert_array_equal(z[0], z[2])


def test_each_device_embeds_its_share_of_the_batch(fakes):
    mesh = fakes.mesh(4, 2)
    embedder = Embedder(fakes.Model(), mesh, fakes.Preprocess(), 16)
    batch = {"image": np.zeros((16, 2, 2, 3), np.uint8), "mask": np.ones(16, bool)}
    lowered = embedder._embed.lower(fakes.params(), embed.to_device(batch, mesh))
    compiled = lowered.compile().as_text()
    assert "u8[2,2,2,3]" in compiled and "u8[16,2,2,3]" not in compiled


def test_parameters_may_be_sharded(fakes):
    mesh = fakes.mesh(2, 2)
    source = fakes.random_source(5)
    params = fakes.params()
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    sharded = {**params, "img": jax.device_put(params["img"], sharding)}
    embedder = Embedder(fakes.Model(), mesh, fakes.Preprocess(), 4)
    z = embedder.images(sharded, source)
    np.testing.assert_allclose(z, expected_images(source), atol=1e-6)


def test_an_unreadable_image_is_named_and_never_skipped(fakes):
    source = fakes.random_source(5)
    source[3]["image"] = b"not an image"
    with pytest.raises(UserError, match=r"image 3 cannot be read .*no image header"):
        eval_image(fakes.Preprocess(), source[3])
    embedder = Embedder(fakes.Model(), fakes.mesh(2), fakes.Preprocess(), 2)
    with pytest.raises(UserError, match="image 3 cannot be read"):
        embedder.images(fakes.params(), source)


def test_embeddings_that_are_not_finite_are_refused(fakes):
    source = fakes.random_source(5)
    embedder = Embedder(fakes.Model(), fakes.mesh(2), fakes.Preprocess(), 4)
    with pytest.raises(UserError, match="5 of 5 embeddings are not finite"):
        embedder.images(fakes.params(img=np.full((4, 4), np.nan)), source)


def test_nothing_to_evaluate_on_is_refused(fakes):
    embedder = Embedder(fakes.Model(), fakes.mesh(2), fakes.Preprocess(), 4)
    with pytest.raises(UserError, match="no examples"):
        embedder.images(fakes.params(), fakes.source([], []))


@pytest.mark.parametrize(("batch_size", "near"), [(0, 8), (-8, 8), (13, 16), (250, 248)])
def test_a_batch_that_the_devices_do_not_divide_is_refused(fakes, batch_size, near):
    with pytest.raises(UserError, match=f"batch_size={batch_size} .* 8 devices; .* is {near}$"):
        Embedder(fakes.Model(), fakes.mesh(4, 2), fakes.Preprocess(), batch_size)


def test_unique_rows_keeps_the_order_of_first_appearance():
    x = np.array([[3, 1], [0, 0], [3, 1], [2, 2], [0, 0]])
    distinct, index = unique_rows(x)
    assert distinct.tolist() == [[3, 1], [0, 0], [2, 2]]
    np.testing.assert_array_equal(distinct[index], x)
