"""A model outside of a training run: its arrays, which are read when used, and its contract."""

import collections
import dataclasses
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from base.nested import insert
from siglip.checkpoints.errors import CheckpointError
from siglip.checkpoints.files.lazy_array import LazyArray
from siglip.checkpoints.spec import Spec
from siglip.towers.two_towers import PARTS

MAX_NAMES = 5  # arrays named in a message, for each kind of difference


@dataclasses.dataclass(frozen=True)
class Weights:
    """The arrays and the contract of a model.

    Attributes:
      arrays: by big_vision's names, layers one by one: 'img/Transformer/encoderblock_0/...'.
      spec: the contract: what the arrays are of.
      source: the path or name that was read, for messages.
      format: of the source.
      notes: a line for each thing that was assumed or left out, for the report.
    """

    arrays: dict[str, LazyArray]
    spec: Spec
    source: str
    format: str
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(array.shape)) for array in self.arrays.values())

    def check(self) -> None:
        """Compares names and shapes with the contract's.

        Raises:
          CheckpointError: they differ; the message names the arrays.
        """
        shapes = {name: array.shape for name, array in self.arrays.items()}
        compare(shapes, self.spec.shapes(), where=self.source)

    def only(self, tower: str) -> "Weights":
        """One tower, 'img' or 'txt', without the temperature."""
        if getattr(self.spec, tower, None) is None:
            raise CheckpointError(f"{self.source} holds no tower {tower!r}")
        arrays = {
            name: array for name, array in self.arrays.items() if name.startswith(f"{tower}/")
        }
        other = {
            "img": {"txt": None, "token_len": None, "vocab_size": None, "tokenizer": None},
            "txt": {"img": None, "res": None},
        }
        spec = dataclasses.replace(self.spec, **other[tower], bias=False, preset="")
        return dataclasses.replace(self, arrays=arrays, spec=spec)

    def tree(self, *, scan: bool = False, dtype: Any = np.float32) -> dict[str, Any]:
        """Reads everything: the nested parameters of the model, layers stacked with `scan`.

        Args:
          dtype: of every array; None as in the file.
        """
        tree: dict[str, Any] = {}
        for name, lazy in (stack(self.arrays) if scan else self.arrays).items():
            array = lazy.read()
            array = array if dtype is None else array.astype(dtype, copy=False)
            insert(tree, name, array, "/")
        return tree


def split(weights: Weights) -> tuple[Weights, tuple[str, ...]]:
    """The arrays of PARTS, and a note on the others: () where there are none.

    A run may train further subtrees, a decoder or heads, which released formats do not have.
    """
    others = [name for name in weights.arrays if name.split("/")[0] not in PARTS]
    if not others:
        return weights, ()
    arrays = {name: array for name, array in weights.arrays.items() if name not in set(others)}
    subtrees = ", ".join(dict.fromkeys(name.split("/")[0] for name in others))
    note = f"{len(others)} arrays of {subtrees} were left out: {_some(others)}"
    return dataclasses.replace(weights, arrays=arrays), (note,)


def _some(texts: list[str]) -> str:
    more = f" and {len(texts) - MAX_NAMES} more" if len(texts) > MAX_NAMES else ""
    return ", ".join(texts[:MAX_NAMES]) + more


def compare(
    in_file: Mapping[str, Any], in_model: Mapping[str, Any], *, where: str, what: str = "shape"
) -> None:
    """Compares the arrays of a file and of a model.

    Args:
      in_file, in_model: name -> shape, or another description.
      where, what: the file and what is compared, for the message.

    Raises:
      CheckpointError: names or descriptions differ; the message names the arrays.
    """

    def shown(value: Any) -> str:
        return str(list(value) if isinstance(value, tuple) else value)

    missing = [f"{name} {shown(in_model[name])}" for name in in_model if name not in in_file]
    unknown = [f"{name} {shown(in_file[name])}" for name in in_file if name not in in_model]
    differing = [
        f"{name} is {shown(in_file[name])} there, {shown(in_model[name])} in the model"
        for name in in_model
        if name in in_file and in_file[name] != in_model[name]
    ]
    parts = [
        f"{len(arrays)} {kind}: {_some(arrays)}"
        for kind, arrays in (
            ("missing there", missing),
            ("unknown to the model", unknown),
            (f"of another {what}", differing),
        )
        if arrays
    ]
    if parts:
        raise CheckpointError(f"{where} does not fit the model: arrays {'; '.join(parts)}")


# Layers one by one, and stacked


def unstack(arrays: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
    """'.../encoderblock/x' [depth, ...] -> '.../encoderblock_i/x' [...]; the others as they are."""
    unstacked: dict[str, LazyArray] = {}
    for name, array in arrays.items():
        before, is_stacked, after = name.partition("/encoderblock/")
        if not is_stacked:
            unstacked[name] = array
            continue
        if not array.shape:
            raise CheckpointError(f"{array.origin} has no layer axis, but its name says so")
        layers = _Layers(array.read, array.shape[0])
        for i in range(array.shape[0]):
            unstacked[f"{before}/encoderblock_{i}/{after}"] = LazyArray(
                array.shape[1:],
                array.dtype,
                f"{array.origin}[{i}]",
                lambda layers=layers, i=i: layers.read(i),
            )
    return unstacked


def stack(arrays: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
    """The inverse of `unstack`."""
    stacked: dict[str, LazyArray] = {}
    layers: dict[str, list[LazyArray]] = collections.defaultdict(list)
    for name, array in arrays.items():
        before, is_layer, rest = name.partition("/encoderblock_")
        index, _, after = rest.partition("/")
        if not is_layer:
            stacked[name] = array
            continue
        target = f"{before}/encoderblock/{after}"
        if int(index) != len(layers[target]):
            raise CheckpointError(f"{array.origin}: layer {index} of {target} stands out of turn")
        layers[target].append(array)
    for name, parts in layers.items():
        first = parts[0]
        for part in parts:
            if (part.shape, part.dtype) != (first.shape, first.dtype):
                raise CheckpointError(f"{part.origin} and {first.origin} cannot be stacked")
        stacked[name] = LazyArray(
            (len(parts), *first.shape),
            first.dtype,
            f"{first.origin} and the other layers",
            lambda parts=parts: np.stack([part.read() for part in parts]),
        )
    return stacked


class _Layers:
    """The layers of a stacked array, which is read once and freed when all have been taken."""

    def __init__(self, read: Callable[[], np.ndarray], depth: int):
        self._read_all, self._depth, self._left = read, depth, depth
        self._array: np.ndarray | None = None
        self._lock = threading.Lock()

    def read(self, i: int) -> np.ndarray:
        with self._lock:
            if self._array is None:
                self._array = self._read_all()
            layer, self._left = np.array(self._array[i]), self._left - 1
            if not self._left:
                self._array, self._left = None, self._depth
            return layer


def report(arrays: Mapping[str, LazyArray]) -> Iterable[str]:
    """A line for each array: its name, type and shape, and where it comes from."""
    rows = [(name, f"{x.dtype}{list(x.shape)}", x.origin) for name, x in arrays.items()]
    if not rows:
        return
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    for name, what, origin in rows:
        yield f"{name:{widths[0]}}  {what:{widths[1]}}  {origin}"
