"""A model outside of a training run: its arrays, not read yet, and what they are."""

import collections
import dataclasses
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from siglip.checkpoints.errors import CheckpointError
from siglip.checkpoints.files.lazy_array import Leaf
from siglip.checkpoints.spec import Spec

SHOWN = 5  # arrays named in a message, for each kind of difference


@dataclasses.dataclass(frozen=True)
class Weights:
    """
    Attributes:
      leaves: by big_vision's names, layers one by one: 'img/Transformer/encoderblock_0/...'.
      spec: the model that they are of.
      source: where they come from, for people.
      format: of the source.
      notes: what was not as exact as it looks, for the report.
    """

    leaves: dict[str, Leaf]
    spec: Spec
    source: str
    format: str
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(leaf.shape)) for leaf in self.leaves.values())

    def check(self) -> None:
        """Raises CheckpointError with a diff where the arrays are not those of the spec."""
        shapes = {name: leaf.shape for name, leaf in self.leaves.items()}
        compare(shapes, self.spec.shapes(), where=self.source)

    def only(self, tower: str) -> "Weights":
        """One tower, 'img' or 'txt', without the temperature."""
        if getattr(self.spec, tower, None) is None:
            raise CheckpointError(f"{self.source} holds no tower {tower!r}")
        leaves = {n: leaf for n, leaf in self.leaves.items() if n.startswith(f"{tower}/")}
        gone = {"img": {"txt": None, "token_len": None, "vocab_size": None, "tokenizer": None}}
        gone["txt"] = {"img": None, "res": None}
        spec = dataclasses.replace(self.spec, **gone[tower], bias=False, preset="")
        return dataclasses.replace(self, leaves=leaves, spec=spec)

    def tree(self, *, scan: bool = False, dtype: Any = np.float32) -> dict[str, Any]:
        """Reads everything: the nested parameters of the model, layers stacked with `scan`.

        Args:
          dtype: of every array; None as in the file.
        """
        leaves = stack(self.leaves) if scan else self.leaves
        tree: dict[str, Any] = {}
        for name, leaf in leaves.items():
            array = leaf.read()
            insert(tree, name, array if dtype is None else array.astype(dtype, copy=False))
        return tree


def insert(tree: dict[str, Any], name: str, value: Any) -> None:
    """tree['a']['b'] = value for the name 'a/b'."""
    *folders, last = name.split("/")
    for folder in folders:
        tree = tree.setdefault(folder, {})
    tree[last] = value


def compare(
    have: Mapping[str, Any], want: Mapping[str, Any], *, where: str, what: str = "shape"
) -> None:
    """Raises CheckpointError with the arrays that differ in name, or in what is said of them.

    Args:
      have, want: of the file, of the model: name -> shape, or another description.
      where, what: what is compared, for the message.
    """

    def shown(value: Any) -> str:
        return str(list(value) if isinstance(value, tuple) else value)

    missing = [f"{name} {shown(want[name])}" for name in want if name not in have]
    extra = [f"{name} {shown(have[name])}" for name in have if name not in want]
    other = [
        f"{name} is {shown(have[name])} there, {shown(want[name])} in the model"
        for name in want
        if name in have and have[name] != want[name]
    ]
    told = [
        f"{len(found)} {kind}: {', '.join(found[:SHOWN])}"
        + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
        for kind, found in (
            ("missing there", missing),
            ("unknown to the model", extra),
            (f"of another {what}", other),
        )
        if found
    ]
    if told:
        raise CheckpointError(f"{where} does not fit the model: arrays {'; '.join(told)}")


# Layers one by one, and stacked


def unstack(leaves: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """'.../encoderblock/x' [depth, ...] -> '.../encoderblock_i/x' [...]; the others as they are."""
    found: dict[str, Leaf] = {}
    for name, leaf in leaves.items():
        before, stacked, after = name.partition("/encoderblock/")
        if not stacked:
            found[name] = leaf
            continue
        if not leaf.shape:
            raise CheckpointError(f"{leaf.origin} has no layer axis, but its name says so")
        once = _Once(leaf.read, leaf.shape[0])
        for i in range(leaf.shape[0]):
            layer = Leaf(
                leaf.shape[1:], leaf.dtype, f"{leaf.origin}[{i}]", lambda o=once, i=i: o.layer(i)
            )
            found[f"{before}/encoderblock_{i}/{after}"] = layer
    return found


def stack(leaves: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """The inverse of `unstack`."""
    found: dict[str, Leaf] = {}
    layers: dict[str, list[Leaf]] = collections.defaultdict(list)
    for name, leaf in leaves.items():
        before, is_layer, rest = name.partition("/encoderblock_")
        index, _, after = rest.partition("/")
        if not is_layer:
            found[name] = leaf
            continue
        whole = f"{before}/encoderblock/{after}"
        if int(index) != len(layers[whole]):
            raise CheckpointError(f"{leaf.origin}: layer {index} of {whole} stands out of turn")
        layers[whole].append(leaf)
    for name, parts in layers.items():
        first = parts[0]
        for part in parts:
            if (part.shape, part.dtype) != (first.shape, first.dtype):
                raise CheckpointError(f"{part.origin} and {first.origin} cannot be stacked")
        shape = (len(parts), *first.shape)
        origin = f"{first.origin} and the other layers"
        found[name] = Leaf(
            shape, first.dtype, origin, lambda p=parts: np.stack([part.read() for part in p])
        )
    return found


class _Once:
    """The layers of a stacked array, which is read once and let go when all have been taken."""

    def __init__(self, read: Callable[[], np.ndarray], layers: int):
        self._read, self._all, self._left = read, layers, layers
        self._array: np.ndarray | None = None
        self._lock = threading.Lock()

    def layer(self, i: int) -> np.ndarray:
        with self._lock:
            if self._array is None:
                self._array = self._read()
            layer, self._left = np.array(self._array[i]), self._left - 1
            if not self._left:
                self._array, self._left = None, self._all
            return layer


def report(leaves: Mapping[str, Leaf]) -> Iterable[str]:
    """A line per array: its name, type and shape, and where it comes from."""
    rows = [(name, f"{leaf.dtype}{list(leaf.shape)}", leaf.origin) for name, leaf in leaves.items()]
    if not rows:
        return
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    for name, what, origin in rows:
        yield f"{name:{widths[0]}}  {what:{widths[1]}}  {origin}"
