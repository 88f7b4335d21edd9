"""The losses: definitions, and the ring that equals them."""

from siglip.losses import ring

__all__ = ["LOSSES"]

# Config name -> factory (mesh, *, options) -> loss_fn(zimg, ztxt, t, b, mask) on global arrays. One
# whose signature has `ids` or `seed` gets them too, see trainers/step/update.py.
LOSSES = {
    "sigmoid": ring.make_sigmoid_loss,
    "softmax": ring.make_softmax_loss,
}
