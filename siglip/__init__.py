"""The science of SigLIP: towers, losses and their sharding, in pure JAX and Flax.

`siglip.load(...)` is a model to call, see library.py.
"""

from typing import TYPE_CHECKING, Any

from siglip import ring

if TYPE_CHECKING:
    from siglip.library import Model, load

__all__ = ["LOSSES", "Model", "load"]

# Config name -> factory (mesh, *, options) -> loss_fn(zimg, ztxt, t, b, mask) on global arrays. One
# whose signature has `ids` or `seed` gets them too, see trainers/contrastive.py.
LOSSES = {
    "sigmoid": ring.make_sigmoid_loss,
    "softmax": ring.make_softmax_loss,
}


def __getattr__(name: str) -> Any:
    # When it is asked for: it needs the image and text transforms, which the science does not.
    if name in ("Model", "load"):
        from siglip import library

        return getattr(library, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
