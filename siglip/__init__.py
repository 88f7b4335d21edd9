"""The science of SigLIP: towers, losses and their sharding, in pure JAX and Flax."""

from siglip import losses, ring

# Config name -> factory (mesh, *, options) -> loss_fn(zimg, ztxt, t, b, mask) on global arrays.
LOSSES = {
    "sigmoid": ring.make_sigmoid_loss,
    "softmax": losses.make_softmax_loss,
}
