"""Restores the state of a run: does the checkpoint fit the model, straight onto the devices.

A checkpoint is a directory <workdir>/checkpoints/<step>/ with the items `state` (a pytree of
arrays) and `data` (the data position, JSON). Wherever a path is taken, it is a workdir or the
directory of one step. All processes call the functions here together.
"""

import pathlib
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from base.errors import UserError
from base.words import nearest, similar
from siglip.checkpoints.errors import CheckpointError
from siglip.checkpoints.files import orbax_tree
from siglip.checkpoints.files.orbax_tree import DamagedCheckpoint
from siglip.checkpoints.formats import workdir
from siglip.checkpoints.weights import compare
from siglip.leaf_names import leaves, path_name


def locate(path: str | pathlib.Path, *, key: str = "checkpoint") -> pathlib.Path:
    """The step directory that `path` means: itself, or the newest of a workdir."""
    try:
        return workdir.locate(path, key=key)
    except CheckpointError as error:
        raise UserError(str(error)) from None


def restore_state(
    path: str | pathlib.Path,
    abstract_state: PyTree,
    *,
    fresh: tuple[str, ...] = (),
    init: Callable[[], PyTree] | None = None,
) -> tuple[PyTree, dict, int]:
    """(state, data, step) of another run.

    Args:
      fresh: regexes of what comes from `init`, whatever the checkpoint has: names of parameters
        ('txt/.*'), which bring their optimizer state and moving average along, or names in two
        other branches of the state ('averaged/img/.*', 'carried/NAME.*'). A moving average that
        starts fresh begins at the restored parameters. The numbers of steps, Adam's included, go
        on counting.
      init: makes the initial state, on the shardings of `abstract_state`.

    Raises:
      UserError: the rest does not fit the checkpoint, the checkpoint is damaged (nothing of
        somebody else's run is set aside), or a regex matches nothing.
    """
    step = locate(path, key="config.resume")
    try:
        if not fresh:
            try:
                return *read_step(step, abstract_state), int(step.name)
            except UserError as error:
                hint = _what_may_be_fresh(orbax_tree.saved(step), leaves(abstract_state))
                raise UserError(f"{error}{hint}") from error
        assert init is not None
        is_fresh = _is_fresh(fresh, abstract_state, orbax_tree.saved(step))
        state = _read_but(is_fresh, step, abstract_state, init)
        return state, orbax_tree.json_item(step, "data"), int(step.name)
    except DamagedCheckpoint as damage:
        raise UserError(f"{damage}; give the directory of another step") from damage


def restore_params(
    path: str | pathlib.Path, abstract_params: PyTree, *, averaged: Collection[str] = ()
) -> tuple[PyTree, tuple[str, ...]]:
    """(parameters, notes): the subtrees of a checkpoint's parameters that the model has.

    Nothing else is read; a note says what else there is (workdir.left_out).

    Args:
      averaged: subtrees whose moving averages are used too (restore_averaged).

    Raises:
      UserError: they do not fit the model, or the checkpoint is damaged.
    """
    step = locate(path, key="config.init")
    try:
        saved = orbax_tree.saved(step)
        known = {n: x for n, x in saved.items() if workdir.is_in_subtrees(n, abstract_params)}
        _check_fits(step, known, leaves({"params": abstract_params}))
        params = orbax_tree.to_devices(step, {"params": abstract_params}, partial=True)["params"]
        return params, workdir.left_out(step, saved, abstract_params, averaged)
    except DamagedCheckpoint as damage:
        raise UserError(f"{damage}; give the directory of another step") from damage


def restore_averaged(path: str | pathlib.Path, abstract: PyTree) -> PyTree:
    """The moving averages of a checkpoint, of those subtrees of parameters that `abstract` has.

    Raises:
      UserError: they are not there, do not fit the model, or the checkpoint is damaged.
    """
    step = locate(path)
    wanted = {"averaged": abstract}
    try:
        saved = {n: x for n, x in orbax_tree.saved(step).items() if n in leaves(wanted)}
        _check_fits(step, saved, leaves(wanted))
        return orbax_tree.to_devices(step, wanted, partial=True)["averaged"]
    except DamagedCheckpoint as damage:
        raise UserError(f"{damage}; give the directory of another step") from damage


def read_step(step: pathlib.Path, abstract_state: PyTree) -> tuple[PyTree, dict]:
    """(state, data) of one step directory.

    `abstract_state` is a tree of ShapeDtypeStructs; every array goes straight onto their
    shardings, whatever devices it was saved from (without a sharding: the first device).

    Raises UserError where the arrays differ from `abstract_state` in name, shape or dtype, and
    DamagedCheckpoint where they cannot be read.
    """
    _check_fits(step, orbax_tree.saved(step), leaves(abstract_state))
    state = orbax_tree.to_devices(step, abstract_state)
    return state, orbax_tree.json_item(step, "data")


def _what_may_be_fresh(saved: Iterable[str], wanted: Iterable[str]) -> str:
    """'; ...' with the config.fresh that would do, where whole subtrees are on one side only."""

    def subtrees(names: Iterable[str]) -> set[str]:
        tops = set()
        for name in names:
            branch, _, rest = name.partition("/")
            top = rest.partition("/")[0]
            if branch == "params":
                tops.add(f"{top}/.*" if "/" in rest else top)
            elif branch in ("averaged", "carried"):
                tops.add("averaged/.*" if branch == "averaged" else f"carried/{top}.*")
        return tops

    if differing := sorted(subtrees(saved) ^ subtrees(wanted)):
        patterns = "".join(f"'{pattern}'," for pattern in differing)
        return f'; to start with these anew, or without them: --config.fresh="({patterns})"'
    return ""


def _is_fresh(
    patterns: tuple[str, ...], abstract_state: PyTree, saved: dict[str, Any]
) -> Callable[[str], bool]:
    """A function that tells whether the leaf of a state with this name starts fresh."""
    both = [*leaves(abstract_state), *saved]
    # Longest first: 'heads/t' is not 't'.
    parameters = sorted(
        {name.removeprefix("params/") for name in both if name.startswith("params/")},
        key=len,
        reverse=True,
    )
    others = {name for name in both if name.startswith(("averaged/", "carried/"))}
    names = sorted({*parameters, *others})
    for pattern in patterns:
        try:
            matches = any(re.fullmatch(pattern, name) for name in names)
        except re.error as error:
            raise UserError(f"config.fresh: {pattern!r} is not a regex: {error}") from None
        if not matches:
            tops = {f"{name.partition('/')[0]}/.*" if "/" in name else name for name in names}
            raise UserError(
                f"config.fresh: {pattern!r} matches no parameter, moving average or state of an "
                f"objective; {nearest(pattern, similar(pattern, names) or tops)}"
            )

    def is_fresh(leaf: str) -> bool:
        branch, _, name = leaf.partition("/")
        if branch == "opt_state":  # opt_state/0/.../mu/NAME
            name = next((p for p in parameters if leaf.endswith(f"/{p}")), "")
        # The number of steps, the schedule's and Adam's included, belongs to no parameter.
        own = {"averaged": (name, leaf), "carried": (leaf,)}.get(branch, (name,) if name else ())
        return any(re.fullmatch(pattern, name) for pattern in patterns for name in own)

    return is_fresh


def _read_but(
    is_fresh: Callable[[str], bool],
    step: pathlib.Path,
    abstract_state: PyTree,
    init: Callable[[], PyTree],
) -> PyTree:
    """The state of one step, but for leaves that are fresh."""
    wanted = leaves(abstract_state)
    kept = {name: leaf for name, leaf in wanted.items() if not is_fresh(name)}
    saved = {n: leaf for n, leaf in orbax_tree.saved(step).items() if not is_fresh(n)}
    _check_fits(step, saved, kept)
    restored = orbax_tree.some_to_devices(step, kept)
    new = wanted.keys() - kept.keys()
    averages = {name for name in new if name.startswith("averaged/")}

    def initial() -> dict[str, Any]:  # under jit XLA drops all other leaves
        made = leaves(init())
        return {name: made[name] for name in new - averages}

    shardings = {name: wanted[name].sharding for name in new - averages}
    restored |= jax.jit(initial, out_shardings=shardings)()
    # Copies, as a step may be given the buffer of either; in one program, as all processes have to
    # start the same ones in the same order.
    copied = {name: restored[f"params/{name.removeprefix('averaged/')}"] for name in averages}
    restored |= jax.jit(
        lambda arrays: jax.tree.map(jnp.copy, arrays),
        out_shardings={name: wanted[name].sharding for name in averages},
    )(copied)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: restored[path_name(path)], abstract_state
    )


def _check_fits(step: pathlib.Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises UserError with the arrays that differ. Nothing is cast: f32 weights read as bf16
    would train on without a word."""
    try:
        compare(
            _described(saved), _described(wanted), where=f"checkpoint {step}", what="shape or dtype"
        )
    except CheckpointError as error:
        raise UserError(str(error)) from None


def _described(arrays: dict[str, Any]) -> dict[str, str]:
    """{'params/img/...': 'float32[768,768]'}, for abstract arrays and Orbax' metadata alike."""
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in arrays.items()}
