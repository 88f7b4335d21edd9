"""The objective that README writes trains, in microbatches, and is as short as it says."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import Tiny, events, losses, saved

from siglip import objectives
from siglip.objectives.objective import Part
from siglip.towers.two_towers import make_model

ROOT = pathlib.Path(__file__).resolve().parents[3]
MOST_LINES = 40


@pytest.fixture(scope="module")
def code() -> str:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = (block for block in blocks if "-> Objective:" in block)
    return block


def test_a_new_objective_is_a_screen_and_a_line(code):
    assert len(code.splitlines()) <= MOST_LINES


def test_the_objective_of_the_readme_trains_and_is_saved(code, tmp_path, monkeypatch):
    names: dict = {}
    exec(code, names)
    monkeypatch.setitem(objectives.OBJECTIVES, "token_classes", names["make_token_classes"])
    tiny = Tiny(tmp_path)
    flags = [
        "--config.objectives.tokens.name=token_classes",
        "--config.objectives.tokens.weight=0.5",
        "--config.input.microbatch=8",
        "--config.lr=0.03",
    ]
    assert tiny.main(tmp_path / "run", *flags, "--config.total=8 steps") == 0
    assert all(np.isfinite(losses(tmp_path / "run")))
    terms = [
        (e["objective/contrastive"], e["objective/tokens"], e["loss"])
        for e in events(tmp_path / "run")
        if "loss" in e
    ]
    for contrastive, tokens, loss in terms:
        assert loss == pytest.approx(contrastive + 0.5 * tokens, rel=1e-5)
    assert terms[-1][1] < terms[0][1] - 0.05  # 8 steps: it learns which tokens occur
    assert "params/token_classes/kernel" in saved(tmp_path / "run", 8)


def test_an_example_that_could_not_be_read_gives_it_no_gradient(code):
    names: dict = {}
    exec(code, names)
    sizes = dict(variant="mu", width=8, depth=1, mlp_dim=8, num_heads=1)
    model = make_model(img={**sizes, "variant": "mu/4"}, txt={**sizes, "vocab_size": 20})
    image = jnp.zeros((2, 4, 4, 3), jnp.uint8).at[0].set(200)
    text = jnp.array([[3, 4, 0], [0, 0, 0]])
    objective = names["make_token_classes"](model, None)
    params = model.init(jax.random.key(0), image, text)["params"]
    params |= objective.init(jax.random.key(1), params)

    def loss(params, mask):
        batch = {"image": image, "text": text, "row": jnp.arange(2), "mask": mask}
        part = Part(model, batch, jax.random.key(2))
        return objective.rows(params, {}, {}, part, jax.random.key(3)).total

    value, grads = jax.value_and_grad(loss)(params, jnp.array([True, False]))
    assert np.isfinite(value) and value > 0
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    assert (
        jax.tree.reduce(lambda a, g: a + float(jnp.abs(g).sum()), grads["token_classes"], 0.0) > 0
    )
