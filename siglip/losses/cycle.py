"""The order in which a ring visits the devices: its neighbours are neighbours in the machine.

The order of a mesh is another: it has hops of up to 14 links on a TPU v5e of 8 x 8 chips, and XLA
plans those as permutes that block. The mesh stays as it is, and so does which rows a device has;
only the pairs of the permutes follow this order.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

Place = tuple[tuple[int, ...], tuple[int, ...]]


def ring_order(mesh: Mesh, axes: Sequence[str]) -> tuple[int, ...]:
    """Positions along `axes` of a mesh, as lax.axis_index counts them, in the order of the ring.

    Rings over some of the axes run side by side, one for each position along the others, and have
    one order. The first one's cycle is taken if it makes all of them shorter than the mesh's order.
    """
    places = [find_place(device) for device in mesh.devices.flat]
    numbers = np.arange(mesh.devices.size).reshape(mesh.devices.shape)
    first = [mesh.axis_names.index(axis) for axis in axes]
    numbers = np.moveaxis(numbers, first, range(len(first)))
    devices = math.prod(mesh.shape[axis] for axis in axes)
    rings = [[places[i] for i in ring] for ring in numbers.reshape(devices, -1).T]

    def longest_hop_and_sum(order: tuple[int, ...]) -> tuple[int, int]:
        hops = zip(order, (*order[1:], order[0]))
        lengths = [links(ring[a], ring[b]) for a, b in hops for ring in rings]
        return max(lengths), sum(lengths)

    return min(cycle(rings[0]), tuple(range(devices)), key=longest_hop_and_sum)


def find_place(device: Any) -> Place:
    """The island of a device, within which it has fast links, and its coordinates there.

    The core of a chip that is two devices counts as the last coordinate. Devices without
    coordinates (GPUs, CPUs) have none; their islands are processes, those of TPUs slices.
    """
    slice_index = getattr(device, "slice_index", None) or 0
    coords = getattr(device, "coords", None)
    if coords is None:
        return (slice_index, device.process_index), ()
    return (slice_index,), (*coords, getattr(device, "core_on_chip", 0))


def links(a: Place, b: Place) -> int:
    """Links from one device to another, without those that close a torus; 1,000 between islands."""
    return 1000 if a[0] != b[0] else sum(abs(i - j) for i, j in zip(a[1], b[1]))


def cycle(places: Sequence[Place]) -> tuple[int, ...]:
    """Indices of `places`, island after island, along a cycle of neighbours within each."""
    islands: dict[tuple[int, ...], list[int]] = {}
    for i, (island, _) in enumerate(places):
        islands.setdefault(island, []).append(i)
    return tuple(
        members[i]
        for members in islands.values()
        for i in _cycle_of_island([places[member][1] for member in members])
    )


def _cycle_of_island(coords: list[tuple[int, ...]]) -> Sequence[int]:
    """Indices of `coords` along a cycle through a grid; as they come if they are no full grid."""
    sides = [sorted(set(values)) for values in zip(*coords)]
    index = {place: i for i, place in enumerate(coords)}
    if not sides or len(index) < len(coords) or math.prod(map(len, sides)) != len(coords):
        return range(len(coords))
    # Once along an even side and back again leaves no gap, if there are others to snake through.
    axis = max(range(len(sides)), key=lambda i: (len(sides[i]) % 2 == 0, len(sides[i])))
    rest = list(snake([side for i, side in enumerate(sides) if i != axis]))
    rows = sides[axis]
    if len(rest) == 1:  # a line: every other one on the way there, the others on the way back
        path = [(row, rest[0]) for row in (*rows[::2], *rows[1::2][::-1])]
    else:
        path = [(row, rest[0]) for row in rows[::-1]]
        for i, row in enumerate(rows):
            path += [(row, place) for place in (rest[1:], rest[:0:-1])[i % 2]]
    return [index[*place[:axis], row, *place[axis:]] for row, place in path]


def snake(sides: list[list[int]]) -> list[tuple[int, ...]]:
    """All places of a grid, each next to the one before."""
    path: list[tuple[int, ...]] = [()]
    for side in reversed(sides):
        turns = itertools.cycle((path, path[::-1]))
        path = [(row, *place) for row, turn in zip(side, turns) for place in turn]
    return path
