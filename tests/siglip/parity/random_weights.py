"""Models whose every array is random, so that a comparison sees each of them; and what they say."""

import jax
import jax.numpy as jnp
import numpy as np

from siglip.checkpoints import Spec, Weights
from siglip.checkpoints.files.lazy_array import of_array

TOWER = ("width", "depth", "mlp_dim", "num_heads")
T_PRIME, B = 4.7, -12.0  # as released models end


def tower(variant: str, *sizes: int, **more) -> dict:
    """Keywords of make_vit or make_text: width, depth, mlp_dim, num_heads, and others."""
    return {"variant": variant, **dict(zip(TOWER, sizes)), **more}


def random_weights(spec: Spec, seed: int = 0) -> Weights:
    """Biases and LayerNorm scales are random too: fresh ones, 0 and 1, would hide their absence."""
    rng = np.random.default_rng(seed)

    def array(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name in ("t", "b"):
            return np.full(shape, {"t": T_PRIME, "b": B}[name])
        noise, kind = rng.standard_normal(shape, np.float32), name.rpartition("/")[2]
        if kind == "scale":
            return 1 + 0.3 * noise
        if kind == "kernel":
            is_heads_in = name.endswith(("query/kernel", "key/kernel", "value/kernel"))
            fan_in = shape[0] if is_heads_in else np.prod(shape[:-1])
            return noise / np.sqrt(fan_in)
        return noise * (0.2 if kind == "bias" else 0.5)

    leaves = {
        name: of_array(np.asarray(array(name, shape), np.float32))
        for name, shape in spec.shapes().items()
    }
    return Weights(leaves, spec, "random", "random")


def random_inputs(spec: Spec, n: int = 4, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, res, res, 3] in [-1, 1], and full-length texts [n + 1, token_len] that end in
    padding or not."""
    rng = np.random.default_rng(seed)
    image = rng.uniform(-1, 1, (n, spec.res, spec.res, 3)).astype(np.float32)
    text = rng.integers(0, spec.txt["vocab_size"], (n + 1, spec.token_len))
    text[::2, spec.token_len // 2 :] = spec.pad_id
    return image, text


def embed(weights: Weights, image=None, text=None) -> dict[str, np.ndarray]:
    """What this project makes of inputs: image_embeds, text_embeds, and with both the logits.

    As transformers names them also pooler_output and last_hidden_state of the image tower.
    """
    model = weights.spec.make_model()
    # A tower alone has no scalars, but the model reads them.
    params = {"t": np.zeros(1, np.float32), "b": np.zeros(1, np.float32), **weights.tree()}
    with jax.default_matmul_precision("highest"):
        call = jax.jit(lambda p, x, y: model.apply({"params": p}, image=x, text=y))
        zimg, ztxt, out = call(params, image, text)
        outputs = {"image_embeds": zimg, "text_embeds": ztxt}
        outputs["pooler_output"] = out["img"].get("pooled")
        outputs["last_hidden_state"] = out["img"].get("tokens")
        if zimg is not None and ztxt is not None:
            outputs["logits_per_image"] = out["t"] * jnp.matmul(zimg, ztxt.T) + out["b"]
    return {name: np.asarray(x) for name, x in outputs.items() if x is not None}


def difference(got: np.ndarray, want: np.ndarray) -> float:
    """Relative, in the norm of the whole: of hundreds of roundings, not of the worst of them."""
    assert got.shape == want.shape and np.isfinite(got).all()
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
