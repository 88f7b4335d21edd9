"""The science of SigLIP: towers, losses and their sharding, in pure JAX and Flax."""

from siglip import ring

# Config name -> factory (mesh, *, options) -> loss_fn(zimg, ztxt, t, b, mask) on global arrays. One
# whose signature has `ids` or `seed` gets them too, see trainers/contrastive.py.
LOSSES = {
    "sigmoid": ring.make_sigmoid_loss,
    "softmax": ring.make_softmax_loss,
}
