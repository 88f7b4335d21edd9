"""Losses over all pairs of a batch: definitions, and a ring over devices that equals them."""

from siglip.losses import ring

__all__ = ["LOSSES"]

# Config name -> factory (mesh, *, options) -> definitions.Loss. Its keyword-only arguments are the
# keys of the config's block.
LOSSES = {
    "sigmoid": ring.make_sigmoid_loss,
    "softmax": ring.make_softmax_loss,
}
