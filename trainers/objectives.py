"""config.objectives -> the objectives of a run, and what their settings say of the model."""

import dataclasses
import inspect
from typing import Any

import jax

from base.errors import UserError
from siglip.losses import LOSSES, exchange
from siglip.losses.definitions import Loss
from siglip.losses.pairs import log_odds
from siglip.objectives import OBJECTIVES
from siglip.objectives.contrastive import make_contrastive
from siglip.objectives.objective import Objective
from siglip.towers.precomputed import Precomputed
from siglip.towers.transformer import check_capture
from siglip.towers.two_towers import TwoTowers
from trainers.data import mistakes_of, without


def make_objectives(
    config: Any, model: TwoTowers, mesh: jax.sharding.Mesh
) -> tuple[dict[str, Objective], Loss | None]:
    """Name -> objective, and the loss of the first contrastive one, which evaluators measure.

    Raises:
      UserError: there is none, or an option has a value that its objective refuses.
    """
    if not config.objectives:
        raise UserError("config.objectives is empty, there is nothing to learn")
    objectives, losses = {}, []
    for name, block in config.objectives.items():
        options = without(block, "name", "weight")
        with mistakes_of(f"objectives.{name}"):
            if not 0 <= block.weight < float("inf"):
                raise ValueError(f"weight must be a number >= 0, not {block.weight}")
            if block.name in LOSSES:
                losses.append(LOSSES[block.name](mesh, **options))
                objective = make_contrastive(model, mesh, losses[-1])
            else:
                objective = OBJECTIVES[block.name](model, mesh, **options)
            _check_capture(model, objective.capture)
        objectives[name] = dataclasses.replace(objective, weight=block.weight)
    return objectives, losses[0] if losses else None


def _check_capture(model: TwoTowers, capture: tuple[str, ...]) -> None:
    """Raises ValueError where the model has no such output."""
    towers = {"img": model.img, "txt": model.txt}
    for name in capture:
        tower, _, output = name.partition("/")
        if isinstance(towers.get(tower), Precomputed):
            raise ValueError(f"capture {name!r}: a precomputed tower has embeddings only")
        if tower not in towers:
            raise ValueError(f"capture {name!r} begins with neither img/ nor txt/")
        check_capture((output,), towers[tower].depth, towers[tower].pool)


def initial_bias(config: Any) -> float | None:
    """config.model.b_init, where 'auto' is the bias at which the sigmoid is the share of positives
    among the pairs of a batch."""
    b_init, t_init = config.model.b_init, config.model.t_init
    name, loss = next(
        ((name, block) for name, block in config.objectives.items() if block.name in LOSSES),
        ("contrastive", {}),
    )
    relative = loss.get("relative_bias")  # logits t (x.y - b): the bias is a cosine
    if relative and not (b_init == "auto" or (b_init is not None and abs(b_init) <= 1)):
        raise UserError(
            f"config.objectives.{name}.relative_bias makes the bias a cosine, which "
            f"config.model.b_init={b_init} is not; set config.model.b_init=auto"
        )
    if b_init != "auto":
        return b_init
    bias = log_odds(config.input.batch_size, loss.get("ratio", 0))
    return -bias / t_init if relative and t_init else bias


def describe_objectives(config: Any, model: TwoTowers, mesh: jax.sharding.Mesh) -> str:
    """The loss in a line: settings that are not the default, and the exchange with the estimates it
    was chosen by."""
    terms = []
    for name, block in config.objectives.items():
        text = _describe(block, config.input.batch_size, model, mesh)
        if len(config.objectives) > 1:
            text = f"{block.weight:g} x {name} = {text}"
        terms.append(text)
    return "; ".join(terms)


def _describe(block: Any, batch_size: int, model: TwoTowers, mesh: jax.sharding.Mesh) -> str:
    known = inspect.signature({**LOSSES, **OBJECTIVES}[block.name]).parameters
    settings = "".join(
        f", {key} {value}"
        for key, value in without(block, "name", "weight").items()
        if value != known[key].default
    )
    if block.get("exchange") != "auto":
        return block.name + settings
    choice = exchange.choose(
        mesh,
        n=batch_size // mesh.size,
        d=model.img.out_dim or model.img.width,
        devices=mesh.size,
        itemsize=2 if block.dtype == "bfloat16" else 4,
    )
    return f"{block.name}{settings}, exchange {choice.name} ({choice.why})"
