"""The optimizer chain: update = -schedule * (lr * lr_mult * direction + wd * wd_mult * param).

The order is big_vision's (`big_vision/optax.py`): clip by global norm, optimizer direction, lr,
per-parameter lr multiplier, weight decay, schedule, negate. So, unlike in optax.adamw,
* weight decay is NOT multiplied by lr: lr 1e-3 with wd 1e-4 is optax.adamw(1e-3, weight_decay=0.1);
* weight decay follows the schedule (warm-up included);
* lr multipliers do not scale the weight decay.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from base.errors import UserError
from siglip.leaf_names import path_name, path_names
from trainers.config import durations
from trainers.step.rules import match_rules
from trainers.step.schedules import SCHEDULES, Schedule, Step

# Directions: transformations that turn a gradient into a step of about unit size.


def adamw(
    *,
    b1: float = 0.9,  # decay of the first moment
    b2: float = 0.95,  # decay of the second moment; SigLIP's, where Adam's is 0.999
    eps: float = 1e-8,  # added to the square root of the second moment
) -> optax.GradientTransformation:
    """Adam's direction; the weight decay of AdamW is a later link of the chain."""
    return optax.scale_by_adam(b1=b1, b2=b2, eps=eps)


def adafactor(
    *,
    b1: float = 0.9,  # decay of the momentum, which is kept in bfloat16
    beta2_cap: float = 0.95,  # upper bound of the second moment's decay
    decay_rate: float = 0.8,  # exponent in its decay, 1 - (step + 1)^-decay_rate
    min_dim: int = 32,  # smaller matrices keep their second moment whole, not factored
) -> optax.GradientTransformation:
    """Adafactor of "Scaling Vision Transformers" (2106.04560, 3.4) as big_vision writes it.

    Second moment factored into rows and columns where the two largest dimensions both have
    `min_dim`, decayed by min(beta2_cap, 1 - (step + 1)^-decay_rate); then momentum `b1`, kept in
    bfloat16, not debiased. No clipping of updates, no scaling by the parameter's norm.
    """

    def decay(step, rate):
        return jnp.minimum(beta2_cap, 1 - (jnp.asarray(step, jnp.float32) + 1) ** -rate)

    return optax.chain(
        optax.scale_by_factored_rms(
            decay_rate=decay_rate, min_dim_size_to_factor=min_dim, decay_rate_fn=decay
        ),
        optax.ema(b1, debias=False, accumulator_dtype=jnp.bfloat16),
    )


def lion(
    *,
    b1: float = 0.9,  # share of the momentum in the direction, the rest is the gradient
    b2: float = 0.99,  # decay of the momentum
) -> optax.GradientTransformation:
    """Lion's direction, the sign of an interpolated momentum (2302.06675)."""
    return optax.scale_by_lion(b1=b1, b2=b2)


OPTIMIZERS = {"adamw": adamw, "adafactor": adafactor, "lion": lion}


def make_tx(
    config: Any,
    params: PyTree,
    *,
    total_steps: int,
    batch_size: int,
    examples_per_epoch: int | None,
) -> tuple[optax.GradientTransformation, Callable[[Step], Float[Array, ""]]]:
    """The update rule and the learning rate by step, from a config and (abstract) parameters.

    Reads config.lr, wd, wd_mults, lr_mults, frozen, clip_norm (None: no clipping), optimizer and
    schedule ({'name': ..., and the keywords of OPTIMIZERS[name], SCHEDULES[name]}). Each of
    wd_mults, lr_mults, frozen is a tuple of (regex, value); see rules.match_rules.

    A frozen parameter gets a zero update, no decay and no optimizer state, and its gradient is not
    counted in the clipped norm. The state follows the parameters' shapes (Adafactor's factors
    lack one dimension). Raises UserError for rules that do not fit the parameters.
    """
    _check_positive("config.lr", config.lr)
    _check_positive("config.wd", config.wd, or_zero=True)
    lr_mults = _mults(config, params, "lr_mults")
    wd_mults = _mults(config, params, "wd_mults")
    if zeros := [name for name, mult in lr_mults.items() if mult == 0]:
        raise UserError(f"config.lr_mults: 0 for '{zeros[0]}'; to freeze it use config.frozen")
    schedule = _make_schedule(config.schedule, total_steps, batch_size, examples_per_epoch)
    if config.clip_norm is not None:
        _check_positive("config.clip_norm", config.clip_norm)
        clip = _clip_by_global_norm(config.clip_norm)
    else:
        clip = optax.identity()
    frozen = frozen_mask(config, params)
    tx = optax.chain(
        clip,
        OPTIMIZERS[config.optimizer.name](**_keywords(config.optimizer)),
        _scale_and_decay(config.lr, lr_mults, config.wd, wd_mults),
        optax.scale_by_schedule(schedule),
        optax.scale(-1.0),
    )
    tx = optax.chain(
        optax.masked(tx, jax.tree.map(lambda f: not f, frozen)),
        optax.masked(optax.set_to_zero(), frozen),
    )
    return tx, lambda step: config.lr * schedule(step)


def frozen_mask(config: Any, params: PyTree) -> PyTree[bool]:
    """A tree like `params`, True for what config.frozen freezes.

    Where the caller stops the gradients of these, XLA drops their backward pass.

    Raises:
      UserError: a rule does not fit the parameters, or nothing is left to train.
    """
    values = match_rules(config.frozen, path_names(params), key="config.frozen")
    for name, value in values.items():
        if not isinstance(value, bool):
            raise UserError(
                f"config.frozen: the value for '{name}' must be True or False, not {value!r}"
            )
    if all(values.values()):
        raise UserError("config.frozen: every parameter is frozen, nothing is left to train")
    return jax.tree_util.tree_map_with_path(lambda path, _: values[path_name(path)], params)


def _clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """optax.clip_by_global_norm as one multiplication, which XLA fuses into the optimizer: clipped
    gradients are never written to memory."""

    def clip(grads: PyTree, params: PyTree = None) -> PyTree:
        del params
        scale = jnp.minimum(1, max_norm / jnp.maximum(optax.tree.norm(grads), 1e-30))
        return jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)

    return optax.stateless(clip)


def _scale_and_decay(
    lr: float, lr_mults: dict[str, float], wd: float, wd_mults: dict[str, float]
) -> optax.GradientTransformation:
    """update <- lr * lr_mult * update + wd * wd_mult * param."""

    def scale(path, update, param):
        name = path_name(path)
        update = lr * lr_mults[name] * update
        decay = wd * wd_mults[name]
        return update + decay * param if decay else update

    return optax.stateless(functools.partial(jax.tree_util.tree_map_with_path, scale))


def _make_schedule(
    block: Any, total_steps: int, batch_size: int, examples_per_epoch: int | None
) -> Schedule:
    def to_steps(text: str, key: str) -> int | None:
        return durations.to_steps(
            text,
            batch_size=batch_size,
            examples_per_epoch=examples_per_epoch,
            total_steps=total_steps,
            key=f"config.{key}",
        )

    return SCHEDULES[block.name](total_steps, to_steps, **_keywords(block))


def _keywords(block: Any) -> dict[str, Any]:
    return {key: value for key, value in block.items() if key != "name"}


def _mults(config: Any, params: PyTree, key: str) -> dict[str, float]:
    values = match_rules(config[key], path_names(params), key=f"config.{key}")
    for name, value in values.items():
        _check_positive(f"config.{key}: the value for '{name}'", value, or_zero=True)
    return values


def _check_positive(what: str, value: Any, or_zero: bool = False) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0 or (value == 0 and not or_zero):
        raise UserError(f"{what} must be a number {'>= 0' if or_zero else '> 0'}, not {value!r}")
