"""Three exchanges that bring the rows of all devices to each device, and the choice among them.

Each device has a block of rows that stays and one that travels. `tour` shows every device the
travelling blocks of all, and brings home what was gathered for them on the way. All three
exchanges are exact; they differ in what is sent when, and in memory:

  ring           one block a step to the next device, its accumulator a step behind. O(n) memory.
  bidirectional  half a block each way: on a torus, whose links run both ways at once, half the
                 time on the wires. O(n) memory.
  gather         one all-gather, one visit, one reduce-scatter (on TPUs two of each): 2 or 4
                 messages instead of 2 D - 1, for when n is so small that the ring would only wait.
                 O(N) memory.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from siglip.chips import CPU, UNKNOWN, find_chip

EXCHANGES = ("ring", "bidirectional", "gather")

# visit(carry, block, own) -> (carry, gathered): `block` is a pytree of arrays with equally many
# rows, `own` says that it is this device's, and `gathered` has a row for each row of it.
Visit = Callable[[Any, Any, bool], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Exchange:
    """An exchange over some axes of a mesh, used inside `shard_map`. Static.

    Attributes:
      name: one of EXCHANGES.
      axes: mesh axes that rows are sharded over, in order.
      order: positions along these axes, in the order of the ring (cycle.ring_order).
      unroll: steps per iteration of the loop round the ring.
      row: if above 1, `gather` takes two steps: within rows of so many devices, then between them,
        and the other way round for what goes home.
    """

    name: str
    axes: tuple[str, ...]
    order: tuple[int, ...]
    unroll: int = 1
    row: int = 1

    @property
    def devices(self) -> int:
        return len(self.order)

    def tour(
        self, visit: Visit, carry: Any, block: Any, *, combine: Callable = jnp.add
    ) -> tuple[Any, Any]:
        """Calls visit(carry, block, own) for the blocks of all devices, the own one first.

        `combine` joins what different devices gathered for a row (jnp.add, jnp.logaddexp).

        Returns:
          carry after the last visit, and what all devices gathered for the rows of `block`.
        """
        if self.devices == 1:
            return visit(carry, block, True)
        rows = len(jax.tree.leaves(block)[0])
        match self.name:
            case "gather":
                return self._gather(visit, carry, block, combine)
            case "bidirectional" if rows > 1:
                return self._rings(visit, carry, block, combine, cuts=[rows // 2], ways=(1, -1))
        return self._rings(visit, carry, block, combine, cuts=[], ways=(1,))

    def _rings(self, visit: Visit, carry, block, combine, *, cuts: list[int], ways):
        """Cuts every block at `cuts`; part i travels ways[i] devices a step."""

        def split(tree):
            parts = [jnp.split(x, cuts) for x in jax.tree.leaves(tree)]
            return [jax.tree.unflatten(jax.tree.structure(tree), p) for p in zip(*parts)] or [
                tree for _ in ways
            ]

        def hop(parts):
            return [self._hop(part, way) for part, way in zip(parts, ways)]

        # Each hop is issued before the matmuls that hide it.
        parts = split(block)
        arriving = hop(parts)
        carry, gathered = visit(carry, block, True)

        def step(state, last: bool = False):
            carry, parts, accumulators = state
            arriving = parts if last else hop(parts)  # the last blocks have nowhere left to go
            accumulators = hop(accumulators)
            for i, part in enumerate(parts):
                carry, gathered = visit(carry, part, False)
                accumulators[i] = jax.tree.map(combine, accumulators[i], gathered)
            return carry, arriving, accumulators

        state = (carry, arriving, split(gathered))
        if (between := self.devices - 2) > 0:
            loop = functools.partial(lax.scan, length=between, unroll=min(self.unroll, between))
            state, _ = loop(lambda state, _: (step(state), None), state)
        carry, _, accumulators = step(state, last=True)
        accumulators = hop(accumulators)  # the D-th hop: each one is where its rows are
        return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *accumulators)

    def _hop(self, tree, way: int):
        pairs = [(i, self.order[(k + way) % self.devices]) for k, i in enumerate(self.order)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axes, pairs), tree)

    def _gather(self, visit: Visit, carry, block, combine):
        rows = len(jax.tree.leaves(block)[0])
        first = lax.axis_index(self.axes) * rows

        def others(x):  # rolled, so that the own rows come first and can be left out
            for groups in reversed(self._groups()):
                x = lax.all_gather(x, self.axes, axis_index_groups=groups, tiled=True)
            return jnp.roll(x, -first, axis=0)[rows:]

        arriving = jax.tree.map(others, block)
        carry, own = visit(carry, block, True)
        carry, rest = visit(carry, arriving, False)

        def return_to_owners(own, rest):
            everyone = jnp.roll(jnp.concatenate([own, rest]), first, axis=0)
            if combine is jnp.add:
                for groups in self._groups():
                    everyone = lax.psum_scatter(
                        everyone, self.axes, axis_index_groups=groups, tiled=True
                    )
                return everyone
            by_device = everyone.reshape(self.devices, rows, *everyone.shape[1:])
            received = lax.all_to_all(by_device, self.axes, 0, 0)
            return functools.reduce(combine, received)

        return carry, jax.tree.map(return_to_owners, own, rest)

    def _groups(self):
        """Groups of devices of each reduce-scatter; all-gathers take them in reverse."""
        if self.row == 1:
            return [None]
        rows = [list(r) for r in zip(*[iter(range(self.devices))] * self.row)]
        return [list(map(list, zip(*rows))), rows]


def row_of(mesh: Mesh, devices: int) -> int:
    """Exchange.row. XLA for TPUs makes all-reduces, with twice the bytes, of most reduce-scatters
    over 8 devices or more and of all-gathers over 64, and of none within rows or between them."""
    if mesh.devices.flat[0].platform != "tpu" or devices < 8:
        return 1
    return max(k for k in range(1, math.isqrt(devices) + 1) if devices % k == 0)


# The choice of an exchange

BETWEEN_GPU_HOSTS = (50e9, 5e-5)  # bytes/s, seconds: GPUs in several hosts, 400 Gb/s each
GATHER_BYTES = 2**28  # what `gather` may hold on a device


@dataclasses.dataclass(frozen=True)
class Choice:
    """The exchange chosen for a loss, with the estimates that decided it."""

    name: str
    seconds: dict[str, float]  # estimate for one loss with gradients, by exchange
    why: str


def choose(mesh: Mesh, *, n: int, d: int, devices: int, itemsize: int) -> Choice:
    """The exchange with the least estimated time for a loss with all gradients.

    Compute hides sends while a block is visited; what it does not hide, and the latency of each
    message, is waited for. `gather` hides nothing, but sends two messages only.

    Args:
      n, d: rows and width of a block. itemsize: bytes of a travelling number.
    """
    device = mesh.devices.flat[0]
    on_cpu = device.platform == "cpu"
    chip = CPU if on_cpu else find_chip(device) or UNKNOWN
    wire, latency = chip.wire, chip.latency
    if device.platform == "gpu" and len({x.process_index for x in mesh.devices.flat}) > 1:
        wire, latency = BETWEEN_GPU_HOSTS
    flops = chip.flops / 4 if itemsize == 4 and not on_cpu else chip.flops  # f32 in passes
    visit = 6 * n * n * d / flops
    block = n * d * (itemsize + 4) / wire  # embeddings and their float32 accumulator
    ways = 2 if chip.torus else 1  # links that send at a time
    seconds = {
        "ring": devices * max(visit, block + 2 * latency),
        "bidirectional": devices * max(visit, (block + 4 * latency) / ways),
        "gather": devices * visit
        + (devices - 1) * block / ways
        + 2 * latency * math.ceil(math.log2(max(devices, 2))),
    }
    held = devices * n * d * (itemsize + 8)
    allowed = [k for k in EXCHANGES if k != "gather" or held <= GATHER_BYTES]
    name = min(allowed, key=lambda k: seconds[k])  # the ring where they are equal
    estimates = ", ".join(f"{k} {seconds[k] * 1e3:.3g} ms" for k in allowed)
    return Choice(name, seconds, f"{device.device_kind}, n={n}, d={d}, D={devices}: {estimates}")
